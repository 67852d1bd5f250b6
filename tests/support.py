"""What tests of every kind need: waiting for what is about to be true, and a database behind the ledger's back."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import psutil
import pytest
from sqlalchemy import Connection, Engine, make_url, text

from ledger import distribution
from ledger.database import raw_connection, shard_connections
from worker.local.process import Process

Value = TypeVar("Value")

PATIENCE_S = 60.0
"""How long a test waits for what is about to be true: many times what a slow and busy machine needs."""


def eventually(predicate: Callable[[], Value], *, timeout_s: float = PATIENCE_S) -> Value:
    """Return the first truthy value of `predicate`; fail the test when there is none in time."""
    began_at = time.monotonic()
    while not (value := predicate()):
        waited_s = time.monotonic() - began_at
        if waited_s > timeout_s:
            pytest.fail(f"not true within {timeout_s:g} s: {predicate}")
        time.sleep(min(max(0.01, waited_s / 10), 0.1))  # what takes long need not be asked for all the time
    return value


@contextmanager
def suspended(*pids: int) -> Iterator[None]:
    """These processes do nothing; those that are about to end, neither."""
    with ExitStack() as resumed:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                process.suspend()
                resumed.callback(process.resume)
                eventually(partial(_is_idle, process))
        yield


def processes_of(server: Process) -> list[int]:
    """The server's own process, and those of its connections."""
    return [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]


def _is_idle(process: psutil.Process) -> bool:
    return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)


def raw(value: object) -> bytes:
    """A value from Redis as it is there: its client makes no text of it, but has types for both."""
    assert isinstance(value, bytes)
    return value


def sql(engine: Engine, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
    """Run `statement` in a transaction of its own, behind the ledger's back; answers with its rows, if it has any."""
    with engine.begin() as connection:
        result = connection.execute(text(statement), parameters)
        return [tuple(row) for row in result] if result.returns_rows else []


def is_distributed(engine: Engine) -> bool:
    """Whether the ledger is distributed over nodes."""
    return shard_connections(engine) is not None


def of_one_shard(engine: Engine, count: int) -> list[str]:
    """So many organizations, in the order of their ids, that one transaction can be about, distributed or not."""
    if not is_distributed(engine):
        return [f"org-{number:05}" for number in range(count)]
    candidates = [f"org-{number:05}" for number in range(count * 100)]
    with raw_connection(engine) as connection:
        places = distribution.places(connection, candidates)
    return [org_id for org_id in candidates if places[org_id] == places[candidates[0]]][:count]


def on_every_server(engine: Engine, statement: str) -> list[str]:
    """Run `statement`, which has one value, on the database's server: on each one, if the ledger is distributed."""
    if is_distributed(engine):
        of_each = "SELECT success, result FROM run_command_on_all_nodes(:command)"
        answers = sql(engine, of_each, command=statement)
        assert all(success for success, _ in answers), answers
        return [str(answer) for _, answer in answers]
    return [str(answer) for row in sql(engine, statement) for answer in row]


@contextmanager
def another_past(engine: Engine) -> Iterator[Connection]:
    """Lets events be changed, which the database refuses otherwise: in the shards, too, if there are any."""
    for act in ("DISABLE", "ENABLE"):
        alter = f"ALTER TABLE %s {act} TRIGGER USER"
        sql(engine, alter % "credit_events")
        if sql(engine, "SELECT FROM pg_proc WHERE proname = 'run_command_on_shards'"):
            sql(engine, "SELECT run_command_on_shards('credit_events', :alter)", alter=alter)
        if act == "DISABLE":
            with engine.begin() as connection:
                yield connection


def moved(column: str, by: str) -> str:
    """An expression of SQL: the time in `column`, moved by so much, such as `-1 day`.

    PostgreSQL's own sum depends on the time zone. Citus takes no such function of a column in an UPDATE.
    """
    return f"timezone('UTC', timezone('UTC', {column}) + interval '{by}')"


def begin_schedules(engine: Engine, since: str, **parameters: Any) -> None:
    """What is scheduled was to begin at `since`, an expression of SQL; nothing has noticed yet."""
    scheduled = (
        f"SELECT org_id, subscription_id AS id, {since} AS at FROM subscriptions WHERE active AND period IS NULL"
    )
    with engine.begin() as connection:
        if rows := [row._asdict() for row in connection.execute(text(scheduled), parameters)]:
            for statement in (
                "UPDATE subscriptions SET anchor = :at WHERE org_id = :org_id AND subscription_id = :id",
                "UPDATE wallets SET scheduled_at = :at WHERE org_id = :org_id AND scheduled_id = :id",
            ):
                connection.execute(text(statement), rows)


def on_insert_into(engine: Engine, table: str, act: str, *, when: str = "true") -> None:
    """Have PostgreSQL do something for every row."""
    sql(engine, f"CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {act}; RETURN NEW; END $$")
    sql(engine, f"CREATE TRIGGER act BEFORE INSERT ON {table} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION act()")


def no_more_acting(engine: Engine, table: str) -> None:
    sql(engine, f"DROP TRIGGER act ON {table}")


def as_role(role: str, database_url: str) -> str:
    """The same database for another role than its owner."""
    return make_url(database_url).set(username=role).render_as_string(hide_password=False)


def reads_of(engine: Engine) -> Callable[[Callable[[Connection], Any]], Any]:
    """As `Reader.read`, from this database alone."""

    def reads(read: Callable[[Connection], Any]) -> Any:
        with engine.connect() as connection:
            return read(connection)

    return reads
