"""The schema's history: it makes exactly the tables that `ledger.tables` describes, and can be taken back."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Engine, text

from ledger import audit, migrations
from ledger.database import connect
from ledger.store import apply_batch
from ledger.tables import metadata
from tests.support import PATIENCE_S, delivery, eventually, sql

TABLES = [
    "credit_events",
    "dead_letters",
    "posted_messages",
    "subscriptions",
    "waiting_messages",
    "wallets",
    "workflows",
]

# What a schema consists of; each query answers with rows that name it completely.
CATALOG = {
    "columns": """
        SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull, attidentity,
               attgenerated, attcollation, attnum, pg_get_expr(adbin, adrelid)
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, contype, pg_get_constraintdef(oid), convalidated, condeferrable
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
    """,
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "sequences": "SELECT sequencename, data_type::text, start_value, increment_by FROM pg_sequences",
    "views": "SELECT viewname FROM pg_views WHERE schemaname = 'public'",
    "types": "SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd')",
    "functions": "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    "triggers": """
        SELECT tgrelid::regclass::text, tgname, tgenabled, pg_get_triggerdef(oid) FROM pg_trigger
        WHERE NOT tgisinternal
    """,
}


@pytest.fixture
def empty_engine(empty_database_url: str) -> Iterator[Engine]:
    """A database that has never been migrated."""
    engine = connect(empty_database_url)
    yield engine
    engine.dispose()


def catalog(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in the schema but Alembic's own table."""
    return {
        kind: sorted((row for row in sql(engine, query) if row[0] != "alembic_version"), key=repr)
        for kind, query in CATALOG.items()
    }


def tables(engine: Engine) -> list[str]:
    return [name for (name,) in sql(engine, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]


def test_an_empty_database_has_no_revision(empty_engine: Engine) -> None:
    assert migrations.current_revision(empty_engine) is None
    assert tables(empty_engine) == []  # asking has not made it one


def test_up_from_empty_makes_the_ledger(empty_engine: Engine) -> None:
    migrations.upgrade(empty_engine)
    assert tables(empty_engine) == ["alembic_version", *TABLES]
    assert migrations.current_revision(empty_engine) == migrations.head_revision()


def test_up_again_changes_nothing(empty_engine: Engine) -> None:
    migrations.upgrade(empty_engine)
    apply_batch(empty_engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5)])
    before = catalog(empty_engine)
    migrations.upgrade(empty_engine)
    assert catalog(empty_engine) == before
    assert sql(empty_engine, "SELECT prepaid_balance FROM wallets") == [(5,)]


def test_down_to_base_leaves_nothing_and_up_again_makes_the_same(empty_engine: Engine) -> None:
    migrations.upgrade(empty_engine)
    apply_batch(empty_engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5)])
    before = catalog(empty_engine)
    migrations.downgrade(empty_engine, "base")
    assert catalog(empty_engine) == {kind: [] for kind in CATALOG}
    assert migrations.current_revision(empty_engine) is None
    migrations.upgrade(empty_engine)
    assert catalog(empty_engine) == before
    assert sql(empty_engine, "SELECT count(*) FROM wallets") == [(0,)]
    assert audit.verify(empty_engine).is_clean


def test_the_migrated_schema_is_the_described_one_and_an_append_only_trigger(
    engine: Engine, empty_engine: Engine
) -> None:
    metadata.create_all(empty_engine)
    described, migrated = catalog(empty_engine), catalog(engine)
    assert (described.pop("triggers"), described.pop("functions")) == ([], [])
    triggers, functions = migrated.pop("triggers"), migrated.pop("functions")
    assert migrated == described
    assert {table for table, *_ in described["columns"]} == set(TABLES)  # so there was something to compare
    assert functions == [("credit_events_refuse_change",)]
    assert triggers == [
        (
            "credit_events",
            "credit_events_append_only",
            "O",
            (
                "CREATE TRIGGER credit_events_append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON public.credit_events"
                " FOR EACH STATEMENT EXECUTE FUNCTION credit_events_refuse_change()"
            ),
        )
    ]


def test_a_migration_that_fails_leaves_nothing(empty_engine: Engine) -> None:
    sql(empty_engine, "CREATE FUNCTION credit_events_refuse_change() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    with pytest.raises(Exception, match="credit_events_refuse_change"):
        migrations.upgrade(empty_engine)
    assert "wallets" not in tables(empty_engine)
    assert migrations.current_revision(empty_engine) is None
    sql(empty_engine, "DROP FUNCTION credit_events_refuse_change()")
    migrations.upgrade(empty_engine)
    assert tables(empty_engine) == ["alembic_version", *TABLES]


def test_two_migrations_at_once_both_succeed(empty_engine: Engine, empty_database_url: str) -> None:
    barrier = Barrier(2, timeout=PATIENCE_S)

    def migrate(_: int) -> str | None:
        own = connect(empty_database_url)
        try:
            barrier.wait()
            migrations.upgrade(own)
            return migrations.current_revision(own)
        finally:
            own.dispose()

    with ThreadPoolExecutor(2) as threads:
        revisions = list(threads.map(migrate, range(2), timeout=PATIENCE_S))
    assert revisions == [migrations.head_revision()] * 2
    assert tables(empty_engine) == ["alembic_version", *TABLES]
    assert sql(empty_engine, "SELECT count(*) FROM alembic_version") == [(1,)]


def test_a_migration_waits_for_another_longer_than_any_lock_timeout(
    empty_engine: Engine, empty_database_url: str
) -> None:
    own = connect(empty_database_url)
    sql(own, "SET lock_timeout = '1s'; SET statement_timeout = '1s'")  # of its pooled connection
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    long_enough = f"{waiting} AND clock_timestamp() - query_start > interval '1500 ms'"
    try:
        with ThreadPoolExecutor(1) as threads, empty_engine.connect() as holder:
            holder.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": migrations._LOCK_ID})
            migrating = threads.submit(migrations.upgrade, own)
            eventually(lambda: migrating.done() or sql(empty_engine, long_enough))
            assert not migrating.done()
            holder.rollback()
            migrating.result(PATIENCE_S)
    finally:
        own.dispose()
    assert tables(empty_engine) == ["alembic_version", *TABLES]
