"""The schema's history: it makes exactly the tables that `ledger.tables` describes, and can be taken back."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError

from holdfast_client.results import Result
from ledger import audit, history, migrations, scheduler
from ledger.database import connect
from ledger.filters import EventFilter
from ledger.store import Delivery, apply_batch
from ledger.tables import metadata
from tests import citus
from tests.databases import administrator_of
from tests.messages import delivery, subscribe
from tests.support import PATIENCE_S, begin_schedules, eventually, moved, sql
from worker import cli
from worker.local.embedded import Embedded

TABLES = [
    "archive_head",
    "archived",
    "credit_events",
    "daily_sums",
    "daily_sums_through",
    "dead_letters",
    "ending_credits",
    "erasures",
    "last_verification",
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
    "sequences": """
        SELECT sequencename, data_type::text, start_value, increment_by FROM pg_sequences WHERE schemaname = 'public'
    """,
    "views": """
        SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'm')
        AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'e')  -- an extension's
    """,
    "types": "SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype IN ('e', 'd')",
    "functions": "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    "triggers": """
        SELECT tgrelid::regclass::text, tgname, tgenabled, pg_get_triggerdef(pg_trigger.oid)
        FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
        WHERE NOT tgisinternal AND relnamespace = 'public'::regnamespace
    """,
}

if citus.cluster() is not None:
    # The copies that it makes of a table have a NOT NULL of another name, and conditions in fewer parentheses.
    CATALOG["constraints"] = """
        SELECT conrelid::regclass::text, CASE contype WHEN 'n' THEN '' ELSE conname END, contype,
               translate(pg_get_constraintdef(oid), '()', ''), convalidated, condeferrable
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
    """


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


@pytest.mark.parametrize("newest", [6, pytest.param(None, marks=[pytest.mark.soak, pytest.mark.timeout(1_800)])])
def test_down_to_a_revision_and_up_again_makes_the_same_keys_and_loses_nothing(
    engine: Engine, newest: int | None
) -> None:
    """To each of the newest, and to the oldest; or, as that takes long, to all."""
    apply_batch(engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5)])
    before = catalog(engine)
    oldest, *others = migrations.revisions()[:-1]
    for revision in [*others[::-1][:newest], oldest]:
        migrations.downgrade(engine, revision)
        migrations.upgrade(engine)
        after = catalog(engine)
        for kind in ("constraints", "indexes"):
            assert (revision, after[kind]) == (revision, before[kind])
    assert audit.verify(engine).is_clean
    assert sql(engine, "SELECT prepaid_balance FROM wallets") == [(5,)]


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
                "CREATE TRIGGER credit_events_append_only BEFORE DELETE OR UPDATE ON public.credit_events"
                " FOR EACH ROW EXECUTE FUNCTION credit_events_refuse_change()"
            ),
        ),
        (
            "credit_events",
            "credit_events_no_truncate",
            "O",
            (
                "CREATE TRIGGER credit_events_no_truncate BEFORE TRUNCATE ON public.credit_events"
                " FOR EACH STATEMENT EXECUTE FUNCTION credit_events_refuse_change()"
            ),
        ),
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


def test_a_migration_waits_for_another_and_says_so_once(
    empty_engine: Engine, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "PAUSE_S", 0.01)
    own = connect(empty_database_url)
    said: list[str] = []
    tries: list[str] = []
    event.listen(own, "before_cursor_execute", lambda *sent: tries.append(sent[2]))
    try:
        with ThreadPoolExecutor(1) as threads, empty_engine.connect() as holder:
            holder.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": migrations._LOCK_ID})
            migrating = threads.submit(migrations.upgrade, own, say=said.append)
            eventually(lambda: migrating.done() or len(tries) >= 5)
            assert not migrating.done()
            holder.rollback()
            migrating.result(PATIENCE_S)
    finally:
        own.dispose()
    assert tables(empty_engine) == ["alembic_version", *TABLES]
    assert said == ["Another migration is running: this one waits until it has ended."]


# A ledger of 0009, with a wallet in every state that 0010 to 0016 are about


def subscribed(org_id: str, **terms: Any) -> Delivery:
    """A plan of 100 credits a month whose period began ten days ago."""
    return subscribe(org_id, monthly_credits=100, anchor=(datetime.now(UTC) - timedelta(days=10)).isoformat(), **terms)


def finish(org_id: str, workflow_id: str, credits: int) -> Delivery:
    return delivery("workflow.finish", org_id=org_id, workflow_id=workflow_id, credits=credits)


OF_0009 = [
    subscribed("current", rollover_limit=20),
    delivery("wallet.purchase", org_id="current", purchase_id="p1", credits=50),
    delivery("workflow.start", org_id="current", workflow_id="held", credits=25),
    finish("current", "used", 30),
    delivery("workflow.start", org_id="current", workflow_id="expired", credits=5, expires_in_s=60),
    subscribed("unsubscribed"),
    delivery("wallet.unsubscribe", org_id="unsubscribed", subscription_id="s1", version=2),
    subscribed("replaced"),
    subscribe("replaced", subscription_id="s2", version=7, monthly_credits=70),
    subscribed("soon"),
    finish("soon", "used", 40),
    subscribed("late"),
    subscribed("off"),
    subscribed("nothing-left"),
    finish("nothing-left", "used", 100),
    delivery("wallet.configure", org_id="scheduled", version=1, credit_limit=5),
    subscribed("debt"),
    finish("debt", "used", 150),
]

# As 0009 wrote down that s2 comes later; it began nothing, and forgot the one before.
SCHEDULED_IN_0009 = """
    WITH later AS (
        INSERT INTO subscriptions (org_id, subscription_id, version, active, plan, monthly_credits, rollover_limit,
                                   anchor, period, period_granted)
        VALUES (:org_id, 's2', 3, :active, 'later', 70, 0, now() + :days * interval '1 day', NULL, 0)
        RETURNING org_id, subscription_id, anchor
    ), posted AS (
        INSERT INTO posted_messages (org_id, kind, message_id, terms, outcome)
        VALUES (:org_id, 'subscribe', 's2:3', '{}', 'posted')
    )
    UPDATE wallets SET subscription_id = later.subscription_id, next_period_at = least(next_period_at, anchor)
    FROM later WHERE wallets.org_id = later.org_id
"""


@pytest.fixture
def of_0009(engine: Engine) -> Engine:
    apply_batch(engine, OF_0009[:8])
    # What a replaced plan has left, 0009 let roll over or expire at once: here all of it was used.
    apply_batch(engine, [finish("replaced", "used", 100), *OF_0009[8:]])
    assert audit.verify(engine).is_clean
    migrations.downgrade(engine, "0009")
    # 0009 had no such words.
    sql(engine, "UPDATE posted_messages SET terms = terms - 'expires_at' - 'first_credits'")
    sql(engine, "ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only")
    sql(engine, "UPDATE credit_events SET metadata = metadata - 'paid_by'")
    sql(engine, "ALTER TABLE credit_events ENABLE TRIGGER credit_events_append_only")
    for org_id, days, active in (
        ("soon", 5, True),
        ("late", 60, True),
        ("off", 5, False),
        ("nothing-left", 5, True),
        ("scheduled", 5, True),
    ):
        sql(engine, SCHEDULED_IN_0009, org_id=org_id, days=days, active=active)
    return engine


PLANS = """
    SELECT org_id, plan_version, wallets.subscription_id, known.active, scheduled_id, next_period_at - now() > '6 days',
           subscription_balance, prepaid_balance
    FROM wallets LEFT JOIN subscriptions AS known USING (org_id, subscription_id) ORDER BY org_id
"""


def broken(engine: Engine) -> dict[str, Any]:
    """What `holdfast verify` finds."""
    return {finding.check.name: finding.offenders for finding in audit.verify(engine).findings if finding.offenders}


def test_what_0009_knew_of_plans_is_what_they_are_now(of_0009: Engine) -> None:
    migrations.upgrade(of_0009)
    expected = [
        ("current", 1, "s1", True, None, True, 70, 50),
        ("debt", 1, "s1", True, None, True, 0, -50),
        ("late", 3, "s1", False, "s2", True, 100, 0),
        ("nothing-left", 3, None, None, "s2", None, 0, 0),
        ("off", 3, "s1", False, None, True, 100, 0),
        ("replaced", 7, "s2", True, None, True, 70, 0),
        ("scheduled", 3, None, None, "s2", None, 0, 0),
        ("soon", 3, "s1", False, "s2", True, 60, 0),
        ("unsubscribed", 2, "s1", False, None, True, 100, 0),
    ]
    assert sql(of_0009, PLANS) == expected
    assert broken(of_0009) == {}
    for answer in apply_batch(of_0009, OF_0009):
        assert isinstance(answer, Result)
        assert (answer.duplicate, answer.event_seqs) == (True, ())
    assert sql(of_0009, PLANS) == expected


def pass_time(engine: Engine, column: str, of: str, where: str = "true") -> None:
    """As if it were a day after the latest of these times."""
    [(by,)] = sql(engine, f"SELECT CAST(now() - max({column}) - interval '1 day' AS text) FROM {of} WHERE {where}")
    sql(engine, f"UPDATE {of} SET {column} = {moved(column, by)} WHERE {where}")


def test_time_and_messages_go_on_after_0009(of_0009: Engine) -> None:
    migrations.upgrade(of_0009)
    begin_schedules(of_0009, "now() - interval '1 day'")
    scheduler.post_due(of_0009)
    assert broken(of_0009) == {}
    plans = "SELECT org_id, subscription_id, subscription_balance FROM wallets WHERE org_id = ANY(:org_ids) ORDER BY 1"
    later = ["late", "nothing-left", "scheduled", "soon"]
    assert sql(of_0009, plans, org_ids=later) == [
        ("late", "s2", 170),
        ("nothing-left", "s2", 70),
        ("scheduled", "s2", 70),
        ("soon", "s2", 130),
    ]
    # What s1 had left ends with its own period.
    pass_time(of_0009, "expires_at", "ending_credits")
    pass_time(of_0009, "next_ending_at", "wallets", "next_ending_at IS NOT NULL")
    pass_time(of_0009, "next_period_at", "wallets", "org_id IN ('off', 'unsubscribed')")
    scheduler.post_due(of_0009)
    assert sql(
        of_0009,
        "SELECT org_id, credits, metadata ->> 'subscription_id' FROM credit_events WHERE event_type = 'adjustment'"
        " ORDER BY 1",
    ) == [("late", -100, "s1"), ("off", -100, "s1"), ("soon", -60, "s1"), ("unsubscribed", -100, "s1")]
    assert broken(of_0009) == {}
    for org_id, version in (("late", 3), ("off", 3), ("current", 1)):
        [stale] = apply_batch(of_0009, [subscribe(org_id, subscription_id="s3", version=version)])
        assert isinstance(stale, Result)
        assert stale.reason == "stale_version"
        [newer] = apply_batch(of_0009, [subscribe(org_id, subscription_id="s3", version=9, monthly_credits=1)])
        assert isinstance(newer, Result)
        assert newer.outcome == "posted"
    apply_batch(of_0009, [finish("current", "held", 25), finish("current", "expired", 5)])
    [refund] = apply_batch(
        of_0009, [delivery("wallet.refund", org_id="current", refund_id="r", workflow_id="used", credits=30)]
    )
    assert isinstance(refund, Result)  # 0009 did not write down what had paid: it comes back for good
    assert sql(of_0009, "SELECT count(*) FROM ending_credits WHERE origin = 'refund:r'") == [(0,)]
    assert broken(of_0009) == {}


@pytest.mark.parametrize(
    "last",
    [
        delivery("wallet.grant", org_id="acme", grant_id="g1", credits=5, expires_at="2999-01-01T00:00:00Z"),
        subscribe("acme", anchor="2999-01-01T00:00:00Z"),
        delivery("wallet.reverse", org_id="acme", reversal_id="v1", purchase_id="p1", reason="disputed"),
    ],
    ids=["credits that end", "a schedule", "a reversal"],
)
def test_what_0009_does_not_know_is_not_taken_back_to_it(
    engine: Engine,
    database_url: str,
    last: Delivery,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    apply_batch(engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5), last])
    migrations.downgrade(engine, "0016")  # what came later can be made again
    before = catalog(engine)
    monkeypatch.setenv("HOLDFAST_DATABASE_URL", database_url)
    monkeypatch.setattr(sys, "argv", ["holdfast", "migrate", "--to", "0009"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = "there are credits with an end, scheduled subscriptions or reversals, which 0009 does not know"
    assert told in capsys.readouterr().err
    assert catalog(engine) == before
    migrations.upgrade(engine)
    assert audit.verify(engine).is_clean


REFUNDED = [
    delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=50),
    delivery("workflow.start", org_id="acme", workflow_id="w", credits=50, project_id="web"),
    delivery("workflow.finish", org_id="acme", workflow_id="w", credits=50),
    delivery("wallet.refund", org_id="acme", refund_id="r1", credits=10, workflow_id="w"),
    delivery("wallet.refund", org_id="acme", refund_id="r2", credits=10, workflow_id="w"),
    delivery("wallet.refund", org_id="acme", refund_id="r3", credits=10, metadata={"workflow_id": "w"}),
]


def test_a_refund_that_0016_wrote_is_found_by_its_workflow_and_stays_as_it_is(engine: Engine) -> None:
    apply_batch(engine, REFUNDED[:-1])
    with engine.begin() as connection:  # as 0016 wrote the first one
        connection.execute(text("ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only"))
        connection.execute(text("UPDATE credit_events SET workflow_id = NULL WHERE idempotency_key = 'refund:r1'"))
        connection.execute(text("ALTER TABLE credit_events ENABLE TRIGGER credit_events_append_only"))
    apply_batch(engine, REFUNDED)  # all but the last one again
    with engine.connect() as connection:
        page = history.events(connection, "acme", EventFilter(workflow_id="w"))
    found = [(event["seq"], event["event_type"], event["workflow_id"], event["project_id"]) for event in page.events]
    assert found == [
        (6, "refund", "w", "web"),
        (5, "refund", None, "web"),
        (4, "usage", "w", "web"),
        (3, "reservation_released", "w", "web"),
        (2, "reservation", "w", "web"),
    ]
    assert audit.verify(engine).is_clean


def test_refunds_that_name_their_workflow_are_not_taken_back_to_0016(engine: Engine) -> None:
    apply_batch(engine, REFUNDED)
    with pytest.raises(DBAPIError, match="there are refunds that name a workflow, which 0016 does not know"):
        migrations.downgrade(engine, "0016")
    assert migrations.current_revision(engine) == "0017"
    migrations.upgrade(engine)
    assert audit.verify(engine).is_clean


# A live ledger

Revise = Callable[[str], None]

LATER = """
from alembic import op
revision, down_revision, branch_labels, depends_on = "later", "{head}", None, None
def upgrade():
{body}
"""

ADD_COLUMN = """
    op.execute("ALTER TABLE wallets ADD COLUMN later BIGINT")
"""

CREATE_INDEX = """
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS later")
        op.execute("CREATE INDEX CONCURRENTLY later ON wallets (credit_limit)")
"""

WAITS_FOR_WALLETS = "SELECT pid FROM pg_locks WHERE relation = 'wallets'::regclass AND NOT granted"
IS_VACUUMED = """
    SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database WHERE datname = current_database()
    AND relation::regclass::text ~ '^wallets(_[0-9]+)?$' AND mode = 'ShareUpdateExclusiveLock' AND granted
"""
WAITS_FOR_TRANSACTIONS = """
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'virtualxid'
    AND clock_timestamp() - query_start > interval '400 ms'
"""


@pytest.fixture
def add_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Revise:
    """Adds a revision after the newest, with this body of its `upgrade`, as a later version of Holdfast has it."""

    def add(body: str) -> None:
        (tmp_path / "later.py").write_text(LATER.format(head=migrations.head_revision(), body=body))
        ours = migrations._config

        def config() -> Config:
            config = ours()
            versions = Path(migrations.__file__).with_name("versions")
            config.set_main_option("path_separator", "os")
            config.set_main_option("version_locations", f"{versions}{os.pathsep}{tmp_path}")
            return config

        monkeypatch.setattr(migrations, "_config", config)
        monkeypatch.setattr(migrations, "PAUSE_S", 0.1)

    return add


def purchase(engine: Engine, number: int) -> Result:
    [answer] = apply_batch(engine, [delivery("wallet.purchase", org_id="acme", purchase_id=f"p{number}", credits=1)])
    assert isinstance(answer, Result)
    return answer


def test_while_a_migration_waits_for_a_long_transaction_everybody_else_goes_on(
    engine: Engine, database_url: str, add_revision: Revise
) -> None:
    before = migrations.head_revision()
    add_revision(ADD_COLUMN)
    own = connect(database_url)
    said: list[str] = []
    with ThreadPoolExecutor(1) as threads, engine.connect() as reader:
        reader.execute(text("SELECT count(*) FROM wallets"))
        migrating = threads.submit(migrations.upgrade, own, say=said.append)
        for number in range(5):
            eventually(lambda: migrating.done() or sql(engine, WAITS_FOR_WALLETS))
            answer = purchase(engine, number)
            assert (answer.outcome, answer.available) == ("posted", number + 1)
        assert migrations.current_revision(engine) == before
        assert not migrating.done()
        reader.rollback()
        migrating.result(PATIENCE_S)
    own.dispose()
    assert migrations.current_revision(engine) == "later"
    [line] = said
    assert line == (
        "Somebody's open transaction has locked a table that the migration changes: "
        "trying again every 0.1 s, for at most 300 s."
    )


def test_a_migration_that_never_gets_its_lock_ends_with_one_sentence_and_changes_nothing(
    engine: Engine,
    database_url: str,
    add_revision: Revise,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = migrations.head_revision()
    add_revision(ADD_COLUMN)
    monkeypatch.setattr(migrations, "PATIENCE_S", 0.5)
    monkeypatch.setenv("HOLDFAST_DATABASE_URL", database_url)
    monkeypatch.setattr(sys, "argv", ["holdfast", "migrate"])
    with engine.connect() as reader:
        reader.execute(text("SELECT count(*) FROM wallets"))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "holdfast: for 0.5 seconds, somebody's open transaction has locked a table that the migration changes; end "
        "that transaction (pg_stat_activity shows it), and run `holdfast migrate` again\n"
    )
    assert migrations.current_revision(engine) == before
    migrations.upgrade(engine)
    assert migrations.current_revision(engine) == "later"


@contextmanager
def vacuumed_slowly(engine: Engine, services: Embedded) -> Iterator[None]:
    """PostgreSQL vacuums `wallets` by itself, for longer than a test lasts."""
    columns = "org_id, last_seq, prepaid_balance, subscription_balance, reserved, period_usage, credit_limit"
    sql(
        engine,
        f"INSERT INTO wallets ({columns}, config_version)"
        " SELECT 'org-' || n, 0, 0, 0, 0, 0, 0, 0 FROM generate_series(1, 20000) AS n",
    )
    sql(
        engine,
        "ALTER TABLE wallets SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
        " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)",
    )
    sql(engine, "UPDATE wallets SET config_version = 1")
    admin = administrator_of(services, str(engine.url.database), of_rows=True)

    def set_system(what: str) -> None:
        sql(admin, f"ALTER SYSTEM {what}")
        sql(admin, "SELECT pg_reload_conf()")

    set_system("SET autovacuum_naptime = '1s'")
    try:
        eventually(lambda: sql(admin, IS_VACUUMED))
        if citus.cluster() is not None:  # every second, it would begin again on one shard while another is locked
            set_system("RESET autovacuum_naptime")
        yield
    finally:
        set_system("RESET autovacuum_naptime")
        admin.dispose()


def test_a_vacuum_of_postgresqls_own_gives_way_to_a_migration(
    engine: Engine, services: Embedded, add_revision: Revise, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_revision(ADD_COLUMN)
    monkeypatch.setattr(migrations, "PATIENCE_S", 15.0)
    with vacuumed_slowly(engine, services):
        migrations.upgrade(engine)
    assert migrations.current_revision(engine) == "later"


def test_an_index_is_built_after_long_transactions_while_everybody_else_and_another_migration_wait_for_nothing(
    engine: Engine, database_url: str, add_revision: Revise
) -> None:
    add_revision(CREATE_INDEX)
    sql(engine, "CREATE INDEX later ON wallets (period_cap)")  # as an attempt that failed may have left one
    both = connect(database_url), connect(database_url)
    with ThreadPoolExecutor(2) as threads, engine.connect() as writer:
        writer.execute(text("UPDATE wallets SET last_seq = 0 WHERE false"))
        migrating = [threads.submit(migrations.upgrade, own) for own in both]
        eventually(lambda: any(one.done() for one in migrating) or sql(engine, WAITS_FOR_TRANSACTIONS))
        assert purchase(engine, 1).outcome == "posted"
        writer.rollback()
        for one in migrating:
            one.result(PATIENCE_S)
    for own in both:
        own.dispose()
    valid = "SELECT indisvalid, pg_get_indexdef(indexrelid) FROM pg_index WHERE indexrelid = 'later'::regclass"
    assert sql(engine, valid) == [(True, "CREATE INDEX later ON public.wallets USING btree (credit_limit)")]


# What may be in a migration after 0002. Whatever is not here may lock a table for as long as it has rows.
CONSTANT = r"(-?\d+|'[^']*'|true|false)"
TYPE = r"(BIGINT|INTEGER|BOOLEAN|TEXT|BYTEA|JSONB|TIMESTAMP WITH TIME ZONE)"
PARENTHESES = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
QUICK = [
    rf"ALTER TABLE (\w+) ADD COLUMN \w+ {TYPE}( DEFAULT {CONSTANT}( NOT NULL)?)?",
    rf"ALTER TABLE (\w+) ADD CONSTRAINT \w+ CHECK {PARENTHESES} NOT VALID",
    r"ALTER TABLE (\w+) ADD CONSTRAINT \w+ (UNIQUE|PRIMARY KEY) USING INDEX \w+",
    r"ALTER TABLE (\w+) DROP (CONSTRAINT|COLUMN) \w+",
    r"DROP TABLE (\w+)",
    rf"ALTER TABLE (\w+) ALTER COLUMN \w+ (DROP NOT NULL|DROP DEFAULT|SET DEFAULT {CONSTANT})",
    r"CREATE OR REPLACE FUNCTION \w+\(\) RETURNS trigger LANGUAGE plpgsql AS \$\$\$\$",
    r"DROP TRIGGER \w+ ON (\w+)",
    r"CREATE TRIGGER \w+ BEFORE [A-Z ]+ ON (\w+) FOR EACH (ROW|STATEMENT) EXECUTE FUNCTION \w+\(\)",
]
CREATE = r"CREATE TABLE (\w+) \(.*\)"
WITHOUT_LIMIT = r"SET (LOCAL )?lock_timeout = 0"
VALIDATE = r"ALTER TABLE \w+ VALIDATE CONSTRAINT \w+"  # stops nobody who reads or writes rows
SLOW = [
    [WITHOUT_LIMIT, VALIDATE],
    [WITHOUT_LIMIT, r"DROP INDEX CONCURRENTLY IF EXISTS (\w+)", r"CREATE (UNIQUE )?INDEX CONCURRENTLY \w+ ON .*"],
]


def may_stop_somebody(statements: list[str]) -> list[str]:
    """Which statements of a revision may keep others from a table that they use for longer than a moment."""
    without_bodies = [re.sub(r"\$\$.*?\$\$", "$$$$", statement, flags=re.DOTALL) for statement in statements]
    one_by_one = [" ".join(part.split()) for each in without_bodies for part in each.split(";") if part.strip()]
    if len(one_by_one) > 1 and all(re.fullmatch(VALIDATE, part) for part in one_by_one[1:]):
        one_by_one = one_by_one[:2]
    for forms in SLOW:
        if len(forms) == len(one_by_one) and all(map(re.fullmatch, forms, one_by_one)):
            return []
    created = {found[1] for part in one_by_one if (found := re.fullmatch(CREATE, part))}
    changed: set[str] = set()
    refused = []
    for part in one_by_one:
        named = re.match(
            r"(?:CREATE TABLE|ALTER TABLE|DROP TABLE|(?:CREATE (?:UNIQUE )?INDEX|DROP TRIGGER|CREATE TRIGGER) .*?\bON)"
            r" (\w+)",
            part,
        )
        if named and named[1] in created:
            continue
        if not any(re.fullmatch(form, part) for form in QUICK):
            refused.append(part)
        elif named:
            changed.add(named[1])
    return refused + ([f"changes {len(changed)} tables"] if len(changed) > 1 else [])


def test_no_migration_after_0002_stops_anybody(empty_engine: Engine) -> None:
    sent: list[str] = []
    limit = f"SET LOCAL lock_timeout = '{migrations.LOCK_WAIT_S * 1e3:.0f}ms'"  # tells the nodes of Citus
    migrations.upgrade(empty_engine, "0002")
    event.listen(empty_engine, "before_cursor_execute", lambda *given: sent.append(given[2].strip()))
    later = [*ScriptDirectory.from_config(migrations._config()).iterate_revisions("head", "0002")]
    assert [script.revision for script in later][-2:] == ["0004", "0003"]
    for script in reversed(later):
        sent.clear()
        migrations.upgrade(empty_engine, script.revision)
        own = [one for one in sent if not one.startswith(("SELECT", limit)) and "alembic_version" not in one]
        assert own
        assert (script.revision, may_stop_somebody(own)) == (script.revision, [])


@pytest.mark.parametrize(
    ("statements", "refused"),
    [
        (["ALTER TABLE t ADD CONSTRAINT c CHECK (a > (1 + b))"], 1),
        (["ALTER TABLE t ADD CONSTRAINT c CHECK (a > (1 + b)) NOT VALID"], 0),
        (["ALTER TABLE t ADD CONSTRAINT c CHECK (a > 1), ADD CONSTRAINT d CHECK (b > 1) NOT VALID"], 1),
        (["ALTER TABLE t ADD CONSTRAINT c CHECK (a > 1) NOT VALID", "ALTER TABLE t VALIDATE CONSTRAINT c"], 1),
        (["ALTER TABLE t VALIDATE CONSTRAINT c"], 1),
        (["SET LOCAL lock_timeout = 0", "ALTER TABLE t VALIDATE CONSTRAINT c"], 0),
        (["SET LOCAL lock_timeout = 0", *(f"ALTER TABLE {t} VALIDATE CONSTRAINT c" for t in "tuv")], 0),
        (["ALTER TABLE t ADD COLUMN c TEXT", "ALTER TABLE t VALIDATE CONSTRAINT c"], 1),
        (["SET LOCAL lock_timeout = 0", "ALTER TABLE t ADD COLUMN c TEXT"], 1),
        (["ALTER TABLE t ADD COLUMN c TEXT", "ALTER TABLE u ADD COLUMN c TEXT"], 1),
        (["ALTER TABLE t ADD COLUMN c TEXT; UPDATE t SET c = 'x'"], 1),
        (["ALTER TABLE t ADD COLUMN c TEXT DEFAULT clock_timestamp()"], 1),
        (["ALTER TABLE t ADD COLUMN c BIGINT GENERATED ALWAYS AS IDENTITY"], 1),
        (["ALTER TABLE t ADD COLUMN c BIGINT NOT NULL"], 1),
        (["ALTER TABLE t ADD COLUMN c BIGINT DEFAULT 0 NOT NULL"], 0),
        (["ALTER TABLE t ADD COLUMN c BIGINT DEFAULT 0 CHECK (c >= 0)"], 1),
        (["ALTER TABLE t ADD COLUMN c BIGINT UNIQUE"], 1),
        (["ALTER TABLE t ALTER COLUMN c TYPE TEXT"], 1),
        (["ALTER TABLE t ALTER COLUMN c SET NOT NULL"], 1),
        (["ALTER TABLE t ADD CONSTRAINT c PRIMARY KEY (a)"], 1),
        (["ALTER TABLE t ADD CONSTRAINT c PRIMARY KEY USING INDEX i"], 0),
        (["CREATE INDEX i ON t (a)"], 1),
        (["CREATE INDEX CONCURRENTLY i ON t (a)"], 1),
        (["SET lock_timeout = 0", "DROP INDEX CONCURRENTLY IF EXISTS i", "CREATE INDEX CONCURRENTLY i ON t (a)"], 0),
        (["CREATE TABLE t (a BIGINT)", "CREATE INDEX i ON t (a)", "ALTER TABLE u ADD COLUMN c TEXT"], 0),
        (["DROP TABLE t"], 0),
        (["DROP TABLE t, u"], 1),
        (["DROP TABLE t", "DROP TABLE u"], 1),
        (["DROP TABLE t CASCADE"], 1),
        (["DELETE FROM t"], 1),
        (["LOCK TABLE t"], 1),
    ],
)
def test_what_may_stop_somebody_is_seen(statements: list[str], refused: int) -> None:
    assert len(may_stop_somebody(statements)) == refused, statements
