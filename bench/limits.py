"""PostgreSQL's own limit: rows like those of events, written without any decision, check or look-up."""

import time
from datetime import UTC, datetime
from typing import Any

import psycopg
from sqlalchemy import Engine

_COLUMNS = {
    "org_id": "text",
    "seq": "bigint",
    "created_at": "timestamptz",
    "event_type": "text",
    "source": "text",
    "workflow_id": "text",
    "project_id": "text",
    "activity_name": "text",
    "credits": "bigint",
    "prepaid_balance_after": "bigint",
    "subscription_balance_after": "bigint",
    "reserved_after": "bigint",
    "period_usage_after": "bigint",
    "idempotency_key": "text",
    "metadata": "text",
}
_INSERT = (
    f"INSERT INTO bare_events SELECT {', '.join(_COLUMNS).replace('metadata', 'metadata::jsonb')}"  # noqa: S608 - ours
    f" FROM unnest({', '.join(f'%b::{column_type}[]' for column_type in _COLUMNS.values())})"
    f" AS new ({', '.join(_COLUMNS)})"
)


def bare_inserts_s(engine: Engine, *, rows: int, batch: int) -> float:
    """The seconds that `rows` take, `batch` of them for each INSERT and commit, on one connection."""
    events = [_event(number) for number in range(rows)]
    parameters = [
        [list(column) for column in zip(*events[first : first + batch], strict=True)] for first in range(0, rows, batch)
    ]
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, psycopg.Connection)
        # With the two indexes of the ledger's events, but without their checks.
        connection.execute("CREATE TABLE bare_events (LIKE credit_events INCLUDING INDEXES)")
        connection.commit()
        connection.autocommit = True  # one round trip: the statement is the transaction
        began_at = time.perf_counter()
        for columns in parameters:
            connection.execute(_INSERT, columns)
        took_s = time.perf_counter() - began_at
        connection.autocommit = False
    return took_s


def _event(number: int) -> tuple[Any, ...]:
    key = f"run-{number}"
    balances = 1_000_000, 0, 10, 0
    names = "usage", "workflow-engine", key, "project-1", "Weekly report"
    return f"org-{number % 1_000}", 1 + number, datetime.now(UTC), *names, -10, *balances, key, "{}"
