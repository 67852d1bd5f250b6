"""Connecting to PostgreSQL, and telling the faults that pass from the errors that stay, by real errors."""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.errors import OperatorIntervention
from sqlalchemy import Connection, Engine, make_url, text
from sqlalchemy.exc import DBAPIError

from holdfast_client.results import Result
from ledger import arrays
from ledger.arrays import Array
from ledger.database import DatabaseURLError, UnsuitableDatabaseError, connect, refuse_unsuitable
from ledger.faults import describe, is_transient, may_be_local
from ledger.store import apply_batch
from tests.databases import new_database
from tests.messages import delivery
from tests.support import PATIENCE_S, eventually, on_every_server, on_insert_into, sql
from worker.local.embedded import Embedded

PURCHASE = "INSERT INTO posted_messages VALUES ('acme', 'purchase', 'p1', '{}', 'posted', NULL)"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "is not a URL; it looks like postgresql+psycopg://user:password@host/database"),
        ("secret", "is not a URL; it looks like postgresql+psycopg://user:password@host/database"),
        ("postgresql://ann:secret@host/credits", "must begin with postgresql+psycopg://, not postgresql://"),
        ("postgresql+asyncpg://ann:secret@host/d", "must begin with postgresql+psycopg://, not postgresql+asyncpg://"),
        ("postgres://ann:secret@host/credits", "must begin with postgresql+psycopg://, not postgres://"),
        ("sqlite:///secret", "must begin with postgresql+psycopg://, not sqlite://"),
        ("redis://:secret@host", "must begin with postgresql+psycopg://, not redis://"),
        (
            "postgresql+psycopg://ann@host:secret/credits",
            "is not a URL; it looks like postgresql+psycopg://user:password@host/database",
        ),
        (
            "postgresql+psycopg://ann:p@ss:secret@host/credits",  # an @ that should be %40
            "is not a URL; it looks like postgresql+psycopg://user:password@host/database",
        ),
        (
            "postgresql+psycopg://ann:pass@secret@host/credits",
            "names a host with an @ in it; in a user's name or a password, write %40 for @",
        ),
        (
            "postgresql+psycopg://ann:secret@/credits?host=one&host=two&target_session_attrs=read_write",
            'has an option with a wrong value: invalid target_session_attrs value: "read_write"',
        ),
        (
            "postgresql+psycopg://ann:secret@/credits?host=/sockets&port=first",
            "has an option with a wrong value: Received non-integer port arguments: ('first',)",
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, problem: str) -> None:
    with pytest.raises(DatabaseURLError) as refused:
        connect(url)
    assert str(refused.value) == problem
    assert "secret" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_a_good_url_is_not_connected_to_yet() -> None:
    connect("postgresql+psycopg://ann:secret@no-such-host.invalid/credits").dispose()


def test_a_session_cannot_wait_forever_and_speaks_utc(engine: Engine) -> None:
    names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "TimeZone", "plan_cache_mode")
    assert {name: sql(engine, f"SHOW {name}")[0][0] for name in (*names, "application_name")} == {
        "lock_timeout": "500ms",
        "statement_timeout": "1min",
        "idle_in_transaction_session_timeout": "1min",
        "TimeZone": "UTC",
        "plan_cache_mode": "force_custom_plan",
        "application_name": "holdfast",
    }


def test_the_options_of_the_url_are_kept_beside_ours(engine: Engine, database_url: str) -> None:
    own = connect(f"{database_url}&options=-csearch_path%3Dother&application_name=mine")
    shown = {name: sql(own, f"SHOW {name}")[0][0] for name in ("search_path", "application_name", "lock_timeout")}
    own.dispose()
    assert shown == {"search_path": "other", "application_name": "mine", "lock_timeout": "500ms"}


def test_the_url_may_name_several_servers(engine: Engine, database_url: str) -> None:
    with_ports = re.sub(r"&port=(\d+)", r":\1", database_url)
    two = connect(with_ports.replace("?host=", "?host=/no/such/folder:5432&host="))
    assert sql(two, "SHOW application_name") == [("holdfast",)]
    two.dispose()


def test_a_connection_pooler_is_refused(engine: Engine, database_url: str) -> None:
    # As behind one, the process that answers is not the one that the client was told of.
    sql(engine, "CREATE SCHEMA pooler")
    sql(engine, "CREATE FUNCTION pooler.pg_backend_pid() RETURNS int LANGUAGE sql RETURN 0")
    pooled = connect(f"{database_url}&options=-csearch_path%3Dpooler,pg_catalog")
    with pytest.raises(DBAPIError, match="leads to a connection pooler, such as PgBouncer") as refused:
        sql(pooled, "SELECT 1")
    pooled.dispose()
    assert is_transient(refused.value)


@pytest.mark.parametrize(
    ("inherited", "used"), [("off", "on"), ("local", "on"), ("remote_write", "on"), ("remote_apply", "remote_apply")]
)
def test_what_is_committed_is_on_disk_whatever_the_default_is(
    engine: Engine, database_url: str, inherited: str, used: str
) -> None:
    on_every_server(engine, f"ALTER DATABASE {make_url(database_url).database} SET synchronous_commit = {inherited}")
    there = "current_setting('synchronous_commit')"
    on_insert_into(engine, "credit_events", f"IF {there} <> '{used}' THEN RAISE EXCEPTION '%', {there}; END IF")
    own = connect(database_url)
    assert sql(own, "SHOW synchronous_commit") == [(used,)]
    with own.connect() as connection:
        connection.execute(text("SELECT 1"))
        connection.rollback()
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == used
    [answer] = apply_batch(own, [delivery("wallet.grant", org_id="acme", grant_id="g", credits=5)])
    assert isinstance(answer, Result)
    own.dispose()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_text_is_refused(services: Embedded, encoding: str) -> None:
    options = f"ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'"
    with new_database(services, "template0", options) as url:
        own = connect(url)
        with pytest.raises(UnsuitableDatabaseError) as refused:
            refuse_unsuitable(own)
        own.dispose()
    assert str(refused.value) == (
        f"the database {make_url(url).database} has the encoding {encoding}; Holdfast needs one that was created"
        " with ENCODING 'UTF8' TEMPLATE template0"
    )


@pytest.mark.one_server("sets what counts for all databases of its server; test_citus.py has the warning of a node")
def test_a_commit_that_was_canceled_while_it_waited_for_a_replica_is_no_commit(
    services: Embedded, engine: Engine, database_url: str
) -> None:
    """Neither of a batch nor of anything else: the replica that takes over may not have it. Asking again waits, too."""
    admin = connect(services.admin_url).execution_options(isolation_level="AUTOCOMMIT")
    cancels = (
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
        f" WHERE wait_event = 'SyncRep' AND datname = '{make_url(database_url).database}'"
    )
    apply = partial(apply_batch, engine, [delivery("wallet.grant", org_id="acme", grant_id="g", credits=5)])
    insert = partial(sql, engine, PURCHASE)

    def shows_replicas(names: str) -> bool:
        """Whether a new session has the setting."""
        new = connect(database_url)
        try:
            return sql(new, "SHOW synchronous_standby_names") == [(names,)]
        finally:
            new.dispose()

    try:
        sql(admin, "ALTER SYSTEM SET synchronous_standby_names = 'gone'")
        sql(admin, "SELECT pg_reload_conf()")
        eventually(partial(shows_replicas, "gone"))
        engine.dispose()
        with ThreadPoolExecutor() as pool:
            for attempt in (apply, apply, insert):
                asked = pool.submit(attempt)
                while not asked.done():  # a new wallet is a commit of its own
                    sql(admin, cancels)
                    time.sleep(0.05)
                with pytest.raises((DBAPIError, OperatorIntervention)) as failed:
                    asked.result(timeout=PATIENCE_S)
                assert is_transient(failed.value)
                assert describe(failed.value).startswith("somebody canceled a commit that waited for the synchronous")
    finally:
        sql(admin, "ALTER SYSTEM RESET synchronous_standby_names")
        sql(admin, "SELECT pg_reload_conf()")
        admin.dispose()
    eventually(partial(shows_replicas, ""))
    [again] = apply()
    assert isinstance(again, Result)
    assert (again.duplicate, again.available) == (True, 5)


def test_a_database_that_is_not_there_may_be_suitable() -> None:
    nowhere = connect("postgresql+psycopg://holdfast@127.0.0.1:1/holdfast")
    refuse_unsuitable(nowhere)
    nowhere.dispose()


def test_a_worker_that_is_frozen_in_its_transaction_loses_its_locks(engine: Engine, database_url: str) -> None:
    if sql(engine, "SELECT current_setting('server_version_num')::int < 170000") == [(True,)]:
        pytest.skip("PostgreSQL before 17 has no transaction_timeout")
    apply_batch(engine, [delivery("wallet.grant", org_id="acme", grant_id="first", credits=1)])
    lock, ended = "SELECT 1 FROM wallets WHERE org_id = 'acme' FOR UPDATE", False
    frozen = connect(database_url, transaction_timeout_s=1)
    with frozen.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, psycopg.Connection)
        connection.autocommit = True
        with suppress(psycopg.Error), connection.pipeline() as pipeline:
            connection.execute("BEGIN")
            locked = connection.execute(lock)
            pipeline.sync()
            locked.fetchall()
            connection.execute("SELECT 2")  # a message without a Sync behind it: no idle timeout begins
            connection.pgconn.send_flush_request()
            connection.pgconn.flush()
            assert sql(engine, f"{lock} SKIP LOCKED") == []
            eventually(lambda: sql(engine, f"{lock} SKIP LOCKED") == [(1,)])
            ended = True
        pooled.invalidate()
    frozen.dispose()
    assert ended


def test_a_peer_that_vanished_is_given_up_by_the_server_too(engine: Engine) -> None:
    names = ["tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"]
    settings = "SELECT name, reset_val FROM pg_settings WHERE name = ANY(:names)"
    assert dict(sql(engine, settings, names=names)) == dict(zip(names, ("10", "5", "3", "30000"), strict=True))


@pytest.mark.parametrize(
    ("encode", "array_type", "values"),
    [
        (arrays.text, "text", []),
        (arrays.text, "text", ["", None, "a", "a", "žluťoučký 📄", "x" * 100_000, "NULL", '{"\\,}']),
        (arrays.text, "text", [None, None]),
        (arrays.bigint, "bigint", []),
        (arrays.bigint, "bigint", [0, 1, -1, 2**53 - 1, -(2**53) + 1, 2**63 - 1, -(2**63)]),
        (arrays.bigint, "bigint", [None, 5, None]),
        (
            arrays.timestamptz,
            "timestamptz",
            [
                datetime(2026, 1, 31, 9, 0, 0, 123_456, UTC),
                None,
                datetime(1970, 1, 1, tzinfo=UTC),
                datetime(1999, 12, 31, 23, 59, 59, 999_999, UTC),
                datetime(2999, 12, 31, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
            ],
        ),
        (arrays.jsonb, "jsonb", []),
        (
            arrays.jsonb,
            "jsonb",
            [{}, {"a": [1.5, None, True, {"ž\u2028\x7f": '"\\'}]}, {"n": 2**1023, "e": 1e-300, "t": 0.1}],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_column_of_values_arrives_as_it_was(
    engine: Engine, encode: Callable[[Sequence[Any]], Array], array_type: str, values: list[Any]
) -> None:
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        rows = driver.execute(
            f"SELECT value, pg_typeof(value)::text, ordinality"
            f" FROM unnest(%b::{array_type}[]) WITH ORDINALITY AS sent (value, ordinality)",
            [encode(values)],
        ).fetchall()
    typename = "timestamp with time zone" if array_type == "timestamptz" else array_type
    assert rows == [(value, typename, number) for number, value in enumerate(values, 1)]


# Each provokes one error on a connection of its own; `engine` is another one.


def unique_violation(connection: Connection, engine: Engine) -> None:
    connection.execute(text(PURCHASE))
    connection.execute(text(PURCHASE))


def check_violation(connection: Connection, engine: Engine) -> None:
    connection.execute(text(PURCHASE.replace("'posted'", "'lost'")))


def not_null_violation(connection: Connection, engine: Engine) -> None:
    connection.execute(text(PURCHASE.replace("'p1'", "NULL")))


def append_only(connection: Connection, engine: Engine) -> None:
    connection.execute(text("TRUNCATE credit_events"))


def out_of_range(connection: Connection, engine: Engine) -> None:
    connection.execute(text("SELECT 9223372036854775807 + 1"))


def nul_character(connection: Connection, engine: Engine) -> None:
    connection.execute(text("SELECT CAST(:value AS text)"), {"value": "\x00"})


def lock_timeout(connection: Connection, engine: Engine) -> None:
    with engine.connect() as holder:
        holder.execute(text("LOCK TABLE wallets"))
        connection.execute(text("SET lock_timeout = '20ms'"))
        connection.execute(text("SELECT * FROM wallets"))


def lock_not_available(connection: Connection, engine: Engine) -> None:
    with engine.connect() as holder:
        holder.execute(text("LOCK TABLE wallets"))
        connection.execute(text("LOCK TABLE wallets NOWAIT"))


def deadlock(connection: Connection, engine: Engine) -> None:
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as threads, engine.connect() as other:
        other.execute(text("LOCK TABLE wallets"))
        connection.execute(text("LOCK TABLE workflows"))
        for each in (other, connection):
            each.execute(text("SET lock_timeout = 0"))
        first_to_wait = threads.submit(connection.execute, text("LOCK TABLE wallets"))
        eventually(lambda: sql(engine, waiting))
        other.execute(text("LOCK TABLE workflows"))
        first_to_wait.result(PATIENCE_S)


def serialization_failure(connection: Connection, engine: Engine) -> None:
    sql(engine, PURCHASE)
    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    connection.execute(text("SELECT * FROM posted_messages"))
    sql(engine, "UPDATE posted_messages SET reason = 'changed'")
    connection.execute(text("UPDATE posted_messages SET reason = 'changed here'"))


def statement_timeout(connection: Connection, engine: Engine) -> None:
    connection.execute(text("SET statement_timeout = '20ms'"))
    connection.execute(text("SELECT pg_sleep(10)"))


def read_only(connection: Connection, engine: Engine) -> None:
    connection.execute(text("SET TRANSACTION READ ONLY"))
    connection.execute(text(PURCHASE))


def terminate(connection: Connection, engine: Engine) -> None:
    pid = connection.scalar(text("SELECT pg_backend_pid()"))
    sql(engine, f"SELECT pg_terminate_backend({pid}, 50000)")


def admin_shutdown(connection: Connection, engine: Engine) -> None:
    terminate(connection, engine)
    connection.execute(text("SELECT 1"))


def vanished_in_the_middle(connection: Connection, engine: Engine) -> None:
    """Like a server that is killed: the second use of a broken connection has no word from it any more."""
    terminate(connection, engine)
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    with pytest.raises(psycopg.OperationalError):
        driver.execute("SELECT 1")
    driver.execute("SELECT 1")


def closed_connection(connection: Connection, engine: Engine) -> None:
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    driver.close()
    connection.execute(text("SELECT 1"))


def undefined_table(connection: Connection, engine: Engine) -> None:
    connection.execute(text("SELECT * FROM no_such_table"))


def forgotten_statement(connection: Connection, _: Engine) -> None:
    connection.execute(text("EXECUTE nobody_prepared_this"))


def damaged_file(connection: Connection, _: Engine) -> None:
    connection.execute(text("DO $$ BEGIN RAISE SQLSTATE 'XX001'; END $$"))


def no_rights(connection: Connection, engine: Engine) -> None:
    connection.execute(text("SELECT * FROM pg_authid"))


def connection_refused(connection: Connection, engine: Engine) -> None:
    connect("postgresql+psycopg://ann@127.0.0.1:1/credits").connect()


def no_socket(connection: Connection, engine: Engine) -> None:
    connect("postgresql+psycopg://ann@/credits?host=/nowhere").connect()


def unknown_database(connection: Connection, engine: Engine) -> None:
    connect(engine.url.set(database="no_such_database").render_as_string(hide_password=False)).connect()


MAY_BE_LOCAL = (
    lock_timeout,
    lock_not_available,
    deadlock,
    serialization_failure,
    statement_timeout,
    read_only,
    admin_shutdown,
    damaged_file,
)
"""What may be the fault of one organization or one message."""


@pytest.mark.parametrize(
    ("provoke", "transient", "sqlstate"),
    [
        (unique_violation, False, "23505"),
        (check_violation, False, "23514"),
        (not_null_violation, False, "23502"),
        (append_only, False, "23001"),
        (out_of_range, False, "22003"),
        (nul_character, False, None),
        (lock_timeout, True, "55P03"),
        (lock_not_available, True, "55P03"),
        (deadlock, True, "40P01"),
        (serialization_failure, True, "40001"),
        (statement_timeout, True, "57014"),
        (read_only, True, "25006"),
        (admin_shutdown, True, "57P01"),
        (vanished_in_the_middle, True, None),
        (closed_connection, True, None),
        (undefined_table, True, "42P01"),
        (no_rights, True, "42501"),
        (forgotten_statement, True, "26000"),
        (damaged_file, True, "XX001"),
        (connection_refused, True, None),
        (no_socket, True, None),
        (unknown_database, True, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_error_is_transient_if_it_is_not_about_what_was_asked(
    engine: Engine, provoke: Callable[[Connection, Engine], None], transient: bool, sqlstate: str | None
) -> None:
    with engine.connect() as connection:
        with pytest.raises((DBAPIError, psycopg.Error)) as raised:
            provoke(connection, engine)
        connection.invalidate()
    original = raised.value.orig if isinstance(raised.value, DBAPIError) else raised.value
    assert isinstance(original, psycopg.Error)
    assert original.sqlstate == sqlstate
    # As SQLAlchemy wraps it, and as the driver raised it.
    assert (is_transient(raised.value), is_transient(original)) == (transient, transient)
    if sqlstate is not None:
        assert may_be_local(original) == (provoke in MAY_BE_LOCAL)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("the connection is closed"), KeyboardInterrupt()])
def test_an_error_of_something_else_is_not_transient(error: BaseException) -> None:
    assert not is_transient(error)


def test_a_database_error_is_described_in_one_line(engine: Engine) -> None:
    with pytest.raises(DBAPIError) as raised:
        sql(engine, "SELECT no_such_column FROM wallets")
    assert describe(raised.value) == 'column "no_such_column" does not exist'
    assert describe(psycopg.OperationalError()) == "OperationalError"
