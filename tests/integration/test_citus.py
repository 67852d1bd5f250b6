"""The ledger distributed over the nodes of a real Citus: HOLDFAST_TEST_CITUS_URL, see tests/citus.py.

With that variable, the other tests of this folder run there, too.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
from celery import Celery
from psycopg.errors import OperatorIntervention
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError

from api_stub.probes import SystemCollector
from api_stub.services import READ_TIMEOUT_S, Services
from holdfast_client.results import Result
from ledger import audit, distribution, migrations, receipts, scheduler
from ledger.database import SilenceError, connect, raw_connection
from ledger.distribution import is_distributed
from ledger.faults import describe, is_transient
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.roles import WORKER
from ledger.settings import Settings
from ledger.store import DeadLettered, Delivery, apply_batch, apply_waiting
from ledger.tables import metadata
from ledger.waiting import AWAY, Waits
from tests import citus
from tests.cut import cut_way_to
from tests.messages import delivery, purchase
from tests.support import PATIENCE_S, begin_schedules, eventually, sql
from worker.answers import Answers
from worker.background import Background
from worker.outage import Outage

if citus.cluster() is None:
    pytest.skip(f"{citus.VARIABLE} is not set", allow_module_level=True)

ORGANIZATIONS = [f"org-{number}" for number in range(40)]
DISTRIBUTED = "SELECT count(*) FROM pg_dist_partition WHERE partmethod = 'h'"
EVENTS = "SELECT org_id, count(*), sum(credits) FROM credit_events GROUP BY org_id"


@pytest.fixture
def cluster() -> citus.Cluster:
    found = citus.cluster()
    assert found is not None
    return found


@pytest.fixture
def node_of(engine: Engine) -> Callable[[str], int]:
    """The id of the node that has an organization."""

    def find(org_id: str) -> int:
        with raw_connection(engine) as connection:
            group = distribution.places(connection, [org_id])[org_id].node
        [(node,)] = sql(engine, "SELECT nodeid FROM pg_dist_node WHERE groupid = :group", group=group)
        return int(node)

    return find


@contextmanager
def away(cluster: citus.Cluster, engine: Engine, node: int) -> Iterator[None]:
    """Nobody answers where this database looks for the node."""
    admin = cluster.administrator_of(0, str(engine.url.database))
    [(host, port)] = sql(admin, "SELECT nodename, nodeport FROM pg_dist_node WHERE nodeid = :node", node=node)
    move = "SELECT citus_update_node(:node, :host, :port)"
    sql(admin, "UPDATE pg_dist_node SET nodeport = 1 WHERE nodeid = :node", node=node)
    engine.dispose()  # the coordinator keeps its connections to the node as long as ours
    try:
        yield
    finally:
        sql(admin, "UPDATE pg_dist_node SET nodeport = :port WHERE nodeid = :node", node=node, port=port)
        sql(admin, move, node=node, host=host, port=port)
        admin.dispose()
        engine.dispose()


@contextmanager
def hanging(cluster: citus.Cluster, engine: Engine, node: int) -> Iterator[None]:
    """The node takes connections, and does nothing."""
    admin = cluster.administrator_of(0, str(engine.url.database))
    [(host, port)] = sql(admin, "SELECT nodename, nodeport FROM pg_dist_node WHERE nodeid = :node", node=node)
    move = "SELECT citus_update_node(:node, :host, :port)"
    with cut_way_to(port) as way:
        sql(admin, move, node=node, host=host, port=way.port)
        with way.silent():
            yield
        sql(admin, move, node=node, host=host, port=port)
    admin.dispose()


def url_of_a_node(cluster: citus.Cluster, engine: Engine) -> URL:
    """The URL of the first node for the owner of the tables, who may change the shards there."""
    url = cluster.owner_url(str(engine.url.database)).set(port=cluster.nodes[0][1])
    return url.update_query_dict({"options": "-c citus.enable_manual_changes_to_shards=on"})


def shard_on_a_node(cluster: citus.Cluster, engine: Engine, table: str) -> str:
    """The name of a shard of `table` on the first node."""
    [(name,)] = sql(
        engine,
        "SELECT :table || '_' || shardid FROM pg_dist_shard JOIN pg_dist_placement USING (shardid)"
        " JOIN pg_dist_node USING (groupid)"
        " WHERE logicalrelid = to_regclass(:table) AND nodeport = :port ORDER BY 1 LIMIT 1",
        table=table,
        port=cluster.nodes[0][1],
    )
    return str(name)


def test_the_tables_of_organizations_are_distributed_together(engine: Engine) -> None:
    placed = "SELECT count(*), count(DISTINCT colocationid) FROM pg_dist_partition WHERE partmethod = 'h'"
    assert sql(engine, placed) == [(len([table for table in metadata.sorted_tables if is_distributed(table)]), 1)]
    with engine.connect() as connection:
        assert "of Citus" in str(distribution.described(connection))
    assert audit.verify(engine).is_clean


def test_an_interrupted_distribution_is_completed_by_the_next_migration_and_keeps_what_was_there(
    engine: Engine,
) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    before, tables = sorted(sql(engine, EVENTS)), sql(engine, DISTRIBUTED)
    for name in ("credit_events", "workflows"):
        sql(engine, "SELECT undistribute_table(CAST(:name AS regclass))", name=name)
    assert sql(engine, DISTRIBUTED) != tables
    migrations.upgrade(engine)
    assert sql(engine, DISTRIBUTED) == tables
    assert sorted(sql(engine, EVENTS)) == before
    assert audit.verify(engine).is_clean


def test_each_shard_is_on_one_node_whatever_the_cluster_keeps_by_default(engine: Engine) -> None:
    migrations.downgrade(engine, "0033")
    sql(engine, f"ALTER DATABASE {engine.url.database} SET citus.shard_replication_factor = 2")
    engine.dispose()
    migrations.upgrade(engine)
    assert [type(answer) for answer in apply_batch(engine, [purchase("acme", "p1", 5)])] == [Result]


def test_a_database_for_an_older_version_has_its_tables_on_the_coordinator_and_the_newer_distributes_them_again(
    engine: Engine,
) -> None:
    # As on a server whose administrator has changed nothing.
    sql(engine, f"ALTER DATABASE {engine.url.database} RESET citus.enable_unsafe_triggers")
    engine.dispose()
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    before, tables = sorted(sql(engine, EVENTS)), sql(engine, DISTRIBUTED)
    migrations.downgrade(engine, "0030")
    assert sql(engine, DISTRIBUTED) == [(0,)]
    assert sorted(sql(engine, EVENTS)) == before
    with pytest.raises(IntegrityError, match="credit_events is append-only"):
        sql(engine, "UPDATE credit_events SET credits = 6")
    migrations.upgrade(engine)
    assert sql(engine, DISTRIBUTED) == tables
    assert sorted(sql(engine, EVENTS)) == before
    assert audit.verify(engine).is_clean


def test_a_migration_lets_others_through_while_somebody_has_locked_a_shard(
    cluster: citus.Cluster, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "PAUSE_S", 0.1)
    on_the_node, own = create_engine(url_of_a_node(cluster, engine)), connect(database_url)
    said: list[str] = []
    with ThreadPoolExecutor(1) as threads, on_the_node.connect() as reader:
        reader.execute(text(f"SELECT count(*) FROM {shard_on_a_node(cluster, engine, 'wallets')}"))
        migrating = threads.submit(migrations.downgrade, own, "0033", say=said.append)
        eventually(lambda: said or migrating.done())
        answers = apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
        assert {answer.outcome for answer in answers if isinstance(answer, Result)} == {"posted"}
        assert not migrating.done()
        reader.rollback()
        migrating.result(PATIENCE_S)
    on_the_node.dispose()
    own.dispose()
    assert sql(engine, DISTRIBUTED) == [(0,)]
    [line] = said
    assert line.startswith("Somebody's open transaction has locked a table that the migration changes: ")


def test_a_batch_over_all_shards_is_applied_once_and_in_the_order_of_each_organization(engine: Engine) -> None:
    batch = [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS]
    batch += [delivery("workflow.start", org_id=org_id, workflow_id="w1", credits=5) for org_id in ORGANIZATIONS]
    batch += [delivery("workflow.start", org_id=org_id, workflow_id="w2", credits=1) for org_id in ORGANIZATIONS]
    for duplicate in (False, True):
        results = apply_batch(engine, batch)
        outcomes = [result.outcome for result in results if isinstance(result, Result)]
        assert outcomes == ["posted"] * 40 + ["reserved"] * 40 + ["rejected"] * 40
        assert {result.duplicate for result in results if isinstance(result, Result)} == {duplicate}
    assert audit.verify(engine).is_clean


def test_messages_without_an_organization_become_dead_letters_beside_others(engine: Engine) -> None:
    bad, good = delivery("wallet.purchase"), purchase("acme", "p1", 5)
    answers = apply_batch(engine, [bad, good, bad])
    assert [type(answer) for answer in answers] == [DeadLettered, Result, DeadLettered]
    assert [type(answer) for answer in apply_batch(engine, [bad])] == [DeadLettered]


def test_while_a_node_is_away_its_organizations_wait_and_the_others_do_not(
    cluster: citus.Cluster, engine: Engine, node_of: Callable[[str], int]
) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    gone = node_of(ORGANIZATIONS[0])
    waiting = {org_id for org_id in ORGANIZATIONS if node_of(org_id) == gone}
    assert 0 < len(waiting) < len(ORGANIZATIONS)
    with away(cluster, engine, gone):
        answers = apply_batch(engine, [purchase(org_id, "p2", 5) for org_id in ORGANIZATIONS])
        assert {answer for answer in answers if isinstance(answer, Waits)} == {Waits(one, AWAY) for one in waiting}
        assert sum(isinstance(answer, Result) for answer in answers) == len(ORGANIZATIONS) - len(waiting)
        with pytest.raises(DBAPIError):
            sql(engine, "SELECT count(*) FROM wallets")
    for org_id in waiting:
        assert [answer.outcome for _, answer in apply_waiting(engine, org_id, limit=9).answers] == ["posted"]  # type: ignore[union-attr]
    assert sql(engine, "SELECT count(*), sum(prepaid_balance) FROM wallets") == [(40, 400)]
    assert audit.verify(engine).is_clean


def test_what_waited_for_a_node_is_applied_in_one_transaction_however_often_the_node_was_tried(
    cluster: citus.Cluster, engine: Engine, node_of: Callable[[str], int]
) -> None:
    apply_batch(engine, [purchase("acme", "p0", 5)])
    background = Background(engine, Answers(Celery(set_as_current=False)), Outage(engine))
    with away(cluster, engine, node_of("acme")):
        apply_batch(engine, [purchase("acme", f"p{number}", 5) for number in range(1, 21)])
        for _ in range(5):
            background._look()
    eventually(lambda: background._look() or sql(engine, "SELECT count(*) FROM waiting_messages") == [(0,)])
    moments = "SELECT count(*), count(DISTINCT created_at) FROM credit_events"
    assert sql(engine, moments) == [(21, 2)]


def test_while_a_node_is_away_the_runs_of_other_organizations_can_be_read(
    cluster: citus.Cluster, engine: Engine, node_of: Callable[[str], int]
) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    nodes = {org_id: node_of(org_id) for org_id in ORGANIZATIONS}
    others = [org_id for org_id, node in nodes.items() if node != nodes[ORGANIZATIONS[0]]]
    filters = [EVERY_EVENT, EventFilter(event_types=("prepaid_purchase",))]
    with away(cluster, engine, nodes[ORGANIZATIONS[0]]), engine.connect() as connection:
        pages = [receipts.page(connection, org_id, matching) for org_id in others for matching in filters]
        assert [page.credits for page in pages] == [5] * len(pages)


def test_a_worker_says_that_a_node_is_away_and_not_the_database(
    cluster: citus.Cluster, engine: Engine, node_of: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    with away(cluster, engine, node_of(ORGANIZATIONS[0])), pytest.raises(DBAPIError) as raised:
        sql(engine, "SELECT count(*) FROM wallets")
    Outage(engine).failed("patient", raised.value)
    assert "A node of the database does not answer; its organizations wait" in caplog.text


def test_while_a_node_is_away_what_is_due_elsewhere_is_done(
    cluster: citus.Cluster, engine: Engine, node_of: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"subscription_id": "s", "version": 1, "plan": "p", "monthly_credits": 7, "anchor": "2200-01-01T00:00:00Z"}
    for batch in (
        [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS],
        [delivery("workflow.start", org_id=org_id, workflow_id="w1", credits=5) for org_id in ORGANIZATIONS],
        [delivery("wallet.subscribe", org_id=org_id, **plan) for org_id in ORGANIZATIONS],
    ):
        apply_batch(engine, batch)
    sql(engine, "UPDATE workflows SET expires_at = now() - interval '1 minute'")
    sql(engine, "UPDATE wallets SET next_hold_expiry = now() - interval '1 minute'")
    begin_schedules(engine, "now() - interval '1 minute'")
    monkeypatch.setattr(scheduler, "CHUNK", 3)
    nodes = {org_id: node_of(org_id) for org_id in ORGANIZATIONS}
    elsewhere = sum(node != nodes[ORGANIZATIONS[0]] for node in nodes.values())
    assert 3 < elsewhere < len(ORGANIZATIONS)
    with away(cluster, engine, nodes[ORGANIZATIONS[0]]):
        written = [scheduler.post_due(engine) + scheduler.release_expired(engine) for _ in range(2)]
    assert written == [2 * elsewhere, 0]
    written = [scheduler.post_due(engine) + scheduler.release_expired(engine) for _ in range(2)]
    assert written == [2 * (len(ORGANIZATIONS) - elsewhere), 0]
    assert audit.verify(engine).is_clean


def test_a_node_that_hangs_makes_only_its_organizations_wait_and_is_left_alone_for_a_while(
    cluster: citus.Cluster, engine: Engine, database_url: str, node_of: Callable[[str], int]
) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    stuck = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'"
    gone = node_of(ORGANIZATIONS[0])
    waiting = {org_id for org_id in ORGANIZATIONS if node_of(org_id) == gone}
    with hanging(cluster, engine, gone):
        attempts = []
        for purchase_id in ("p2", "p3"):
            answers = apply_batch(engine, [purchase(org_id, purchase_id, 5) for org_id in ORGANIZATIONS])
            assert {answer for answer in answers if isinstance(answer, Waits)} == {Waits(one, AWAY) for one in waiting}
            assert sum(isinstance(answer, Result) for answer in answers) == len(ORGANIZATIONS) - len(waiting)
            attempts += sql(engine, stuck)
        assert attempts[0] == attempts[1]  # of sessions of the coordinator, which wait for the node
        with pytest.raises(SilenceError, match="does not answer"):
            apply_waiting(engine, ORGANIZATIONS[0], limit=9)
    another = connect(database_url)  # a worker that never noticed it
    for org_id in waiting:
        answers_later = [answer for _, answer in apply_waiting(another, org_id, limit=9).answers]
        assert [answer.outcome for answer in answers_later if isinstance(answer, Result)] == ["posted", "posted"]
    another.dispose()
    assert sql(engine, "SELECT count(*), sum(prepaid_balance) FROM wallets") == [(40, 600)]
    assert audit.verify(engine).is_clean


@pytest.mark.parametrize("gone", [hanging, away])
def test_the_metrics_without_a_node_are_those_that_the_coordinator_has(
    cluster: citus.Cluster,
    engine: Engine,
    node_of: Callable[[str], int],
    database_url: str,
    broker_url: str,
    gone: Callable[[citus.Cluster, Engine, int], AbstractContextManager[None]],
) -> None:
    settings = Settings(database_url=database_url, broker_url=broker_url, jwt_secret="0123456789abcdef" * 2)
    collector = SystemCollector(Services(settings))
    with ThreadPoolExecutor() as pool, gone(cluster, engine, node_of(ORGANIZATIONS[0])):
        found = pool.submit(lambda: list(collector.collect())).result(3 * READ_TIMEOUT_S)  # Citus gives up after 30 s
    values = {metric.name: [sample.value for sample in metric.samples] for metric in found}
    for name, value in {"database_up": 1, "broker_up": 1, "dead_letters_open": 0, "waiting_messages": 0}.items():
        assert values[f"holdfast_{name}"] == [value]
    assert "holdfast_oldest_hold_age_seconds" not in values


def test_a_node_that_goes_away_at_the_commit_makes_no_dead_letter(
    engine: Engine, node_of: Callable[[str], int]
) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    one, other = ORGANIZATIONS[0], next(each for each in ORGANIZATIONS if node_of(each) != node_of(ORGANIZATIONS[0]))
    end = "BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END"
    sql(engine, f"CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS $$ {end} $$")
    sql(
        engine,
        "CREATE CONSTRAINT TRIGGER leave AFTER INSERT ON credit_events DEFERRABLE INITIALLY DEFERRED"
        f" FOR EACH ROW WHEN (NEW.org_id = '{one}') EXECUTE FUNCTION leave()",
    )
    waits, applied = apply_batch(engine, [purchase(one, "p2", 5), purchase(other, "p2", 5)])
    assert isinstance(waits, Waits)
    assert isinstance(applied, Result)
    sql(engine, "DROP TRIGGER leave ON credit_events")
    [(_, answer)] = apply_waiting(engine, one, limit=9).answers
    assert isinstance(answer, Result)
    assert answer.available == 10
    assert audit.verify(engine).is_clean


def test_a_commit_that_no_replica_of_its_node_has_confirmed_is_no_commit(engine: Engine) -> None:
    """Such a node warns at the commit. Here, a trigger does."""
    apply_batch(engine, [purchase("acme", "p1", 5)])
    warn = "BEGIN RAISE WARNING 'canceling wait for synchronous replication'; RETURN NULL; END"
    sql(engine, f"CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$ {warn} $$")
    sql(
        engine,
        "CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON posted_messages DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION warn()",
    )
    for write in (
        partial(apply_batch, engine, [purchase("acme", "p2", 5)]),
        partial(sql, engine, "INSERT INTO posted_messages VALUES ('acme', 'purchase', 'p3', '{}', 'posted', NULL)"),
    ):
        with pytest.raises((DBAPIError, OperatorIntervention)) as unconfirmed:
            write()
        assert is_transient(unconfirmed.value)
        assert describe(unconfirmed.value).startswith("somebody canceled a commit that waited for the synchronous")
    [again] = apply_batch(engine, [purchase("acme", "p2", 5)])
    assert isinstance(again, Result)
    assert again.duplicate


def test_an_event_can_be_changed_neither_through_the_coordinator_nor_on_a_node(
    cluster: citus.Cluster, engine: Engine
) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    shard = shard_on_a_node(cluster, engine, "credit_events")
    url = url_of_a_node(cluster, engine)
    owner, worker = create_engine(url), create_engine(url.set(username=WORKER))
    for change in ("UPDATE {} SET credits = 6", "DELETE FROM {}", "TRUNCATE {}"):
        with pytest.raises(IntegrityError, match="credit_events is append-only"):
            sql(engine, change.format("credit_events"))
        with pytest.raises(IntegrityError, match="credit_events is append-only"):
            sql(owner, change.format(shard))
        with pytest.raises(ProgrammingError, match="permission denied"):
            sql(worker, change.format(shard))
    owner.dispose()
    worker.dispose()


def test_what_is_due_is_found_in_every_shard(engine: Engine) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS])
    apply_batch(
        engine, [delivery("workflow.start", org_id=org_id, workflow_id="w1", credits=5) for org_id in ORGANIZATIONS]
    )
    sql(engine, "UPDATE workflows SET expires_at = now() - interval '1 minute'")
    sql(engine, "UPDATE wallets SET next_hold_expiry = now() - interval '1 minute'")
    assert scheduler.release_expired(engine) == len(ORGANIZATIONS)
    assert audit.verify(engine).is_clean


def test_a_worker_that_was_there_before_the_distribution_loses_nothing(engine: Engine, database_url: str) -> None:
    older = connect(database_url)
    with older.connect() as connection:
        driver = connection.connection.driver_connection
        driver.is_distributed = False  # type: ignore[union-attr]
    batch: list[Delivery] = [purchase(org_id, "p1", 5) for org_id in ORGANIZATIONS]
    answers = apply_batch(older, batch)
    assert [answer.outcome for answer in answers if isinstance(answer, Result)] == ["posted"] * len(ORGANIZATIONS)
    assert make_url(database_url).database == older.url.database
    older.dispose()


def found(engine: Engine) -> dict[str, list[tuple[str, str]]]:
    return {each.check.name: each.offenders for each in audit.verify(engine).findings if each.offenders}


def shards_of(engine: Engine, table: str) -> list[int]:
    ids = "SELECT shardid FROM pg_dist_shard WHERE logicalrelid = to_regclass(:of) ORDER BY 1"
    return [int(shard) for (shard,) in sql(engine, ids, of=table)]


def test_verify_finds_a_shard_without_its_trigger_or_a_constraint(engine: Engine) -> None:
    (event_shard, *_), (wallet_shard, *_) = shards_of(engine, "credit_events"), shards_of(engine, "wallets")
    for change in (
        f"ALTER TABLE IF EXISTS credit_events_{event_shard} DISABLE TRIGGER USER",
        f"ALTER TABLE IF EXISTS wallets_{wallet_shard} DROP CONSTRAINT wallets_last_seq",
    ):
        sql(engine, "SELECT run_command_on_workers(:change)", change=change)
    disabled = [f"the trigger credit_events_{name} is disabled" for name in ("append_only", "no_truncate")]
    assert found(engine) == {
        "append-only": [("credit_events", f"{each} in shard {event_shard}") for each in disabled],
        "constraints": [("wallets", f"wallets_last_seq is missing in shard {wallet_shard}")],
    }


def test_verify_finds_a_node_whose_trigger_does_something_else(cluster: citus.Cluster, engine: Engine) -> None:
    nothing = "CREATE OR REPLACE FUNCTION credit_events_refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'"
    node = cluster.administrator_of(1, str(engine.url.database))
    with node.connect() as connection:
        connection.execute(text("SET citus.enable_ddl_propagation = off"))
        connection.execute(text(nothing))
    node.dispose()
    placed = "SELECT shardid FROM pg_dist_shard_placement WHERE nodeport = :port"
    on_the_node = {shard for (shard,) in sql(engine, placed, port=cluster.nodes[0][1])}
    there = [str(shard) for shard in shards_of(engine, "credit_events") if shard in on_the_node]
    other = f"is not the one that holdfast migrate creates in shard {', '.join(there)}"
    names = ("append_only", "no_truncate")
    assert found(engine) == {
        "append-only": [("credit_events", f"the trigger credit_events_{name} {other}") for name in names]
    }


def test_each_check_is_made_where_the_rows_are(engine: Engine) -> None:
    for check in audit.CHECKS:
        explain = f"EXPLAIN SELECT org_id, offender FROM ({check.offenders}) AS broken ORDER BY 1, 2 LIMIT 20"
        assert "Distributed Subplan" not in "".join(line for (line,) in sql(engine, explain)), check.name
