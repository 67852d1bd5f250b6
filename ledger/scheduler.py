"""Does what is due in wallets that get no message: begins periods, ends credits, releases reservations.

Every message first does the same for its own wallet. So a run may come late, twice, or beside another one, and the
ledger ends up the same. A run is a series of steps of a few transactions each, so that other work can run in between.
"""

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import ColumnElement, Engine, Select, select, tuple_
from sqlalchemy.exc import DBAPIError

from ledger import daily_sums, distribution
from ledger.due import DUE, POST_DUE, RELEASE_EXPIRED
from ledger.faults import is_about_a_node
from ledger.store import catch_up
from ledger.tables import wallets

CHUNK = 500
"""The most wallets that one transaction catches up."""


def post_due(engine: Engine) -> int:
    """Begin the subscription periods and end the credits that are due. Returns the number of events written.

    Raises transient database errors.
    """
    return sum(steps(engine, POST_DUE))


def release_expired(engine: Engine) -> int:
    """Release the reservations that have expired. Returns the number of events written.

    Raises transient database errors.
    """
    return sum(steps(engine, RELEASE_EXPIRED))


def steps(engine: Engine, task: str) -> Iterator[int]:
    """Run `task` step by step. Yields the number of events that each step wrote.

    Raises transient database errors; the steps yielded before are committed.
    """
    if task == daily_sums.SUM_UP:
        yield from daily_sums.steps(engine)
        return
    for due_at, is_due in DUE[task]:
        yield from _steps(engine, task, due_at, is_due)


def _steps(engine: Engine, task: str, due_at: ColumnElement[datetime], is_due: ColumnElement[bool]) -> Iterator[int]:
    due = select(due_at, wallets.c.org_id).where(is_due).order_by(due_at, wallets.c.org_id)
    after: tuple[datetime, str] | None = None
    while True:
        page = due if after is None else due.where(tuple_(due_at, wallets.c.org_id) > tuple_(*after))
        rows = _found(engine, page.limit(CHUNK))
        if not rows:
            return
        yield from catch_up(engine, [org_id for _, org_id in rows], task=task)
        after = rows[-1]


def _found(engine: Engine, page: Select[datetime, str]) -> list[tuple[datetime, str]]:
    """A page of what is due. While a node of a distributed ledger is away, of what is due elsewhere."""
    with engine.connect() as connection:
        try:
            return [(due_at, org_id) for due_at, org_id in connection.execute(page)]
        except DBAPIError as error:
            if not is_about_a_node(error):
                raise
    query = page.compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        rows = distribution.found_in_shards(connection, str(query))
    at, whose = page.selected_columns.keys()
    return sorted((datetime.fromisoformat(row[at]), row[whose]) for row in rows)[:CHUNK]
