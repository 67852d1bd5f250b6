"""Nobody waits for somebody else: real workers beside a locked wallet, a flood of sweeps, a silent database."""

import re
from contextlib import closing
from functools import partial
from uuid import uuid4

import pytest
from celery.result import AsyncResult
from sqlalchemy import Engine, text

from holdfast_client.client import Client
from holdfast_client.messages import DELIVERY_LIMIT
from ledger import audit, migrations
from ledger.database import connect
from ledger.waiting import LOCKED
from tests.acceptance import commands
from tests.installation import (
    Installation,
    Producer,
    installed,
    log_of,
    open_folder,
    wait_for_workers,
    warnings_in,
)
from tests.messages import grant
from tests.support import PATIENCE_S, eventually, no_more_acting, on_insert_into, sql
from worker.local.embedded import Embedded
from worker.outage import SILENT_S

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


def send_grants(client: Client, org_ids: list[str], numbers: range) -> None:
    with client.batch() as batch:
        for number in numbers:
            for org_id in org_ids:
                batch.grant(**grant(org_id, f"{number:05}"))


def test_while_one_wallet_is_locked_and_flooded_everybody_else_goes_on(
    installation: Installation, producer: Producer
) -> None:
    others = [f"org-{number}" for number in range(10)]
    with installation.serving_figures() as (worker, figures), Client(installation.broker_url) as client:
        for org_id in ("stuck", *others):
            producer.answer("wallet.grant", grant(org_id, "first"))
        with installation.locked("stuck"):
            asked = producer.ask("workflow.start", {"org_id": "stuck", "workflow_id": "run", "credits": 1})
            send_grants(client, ["stuck"], range(2_500))  # more than a worker may hold
            send_grants(client, others, range(100))
            assert producer.answer("wallet.grant", grant("org-1", "last"))["available"] > 1
            eventually(lambda: not any(installation.waiting().values()))
            assert sql(installation.engine, "SELECT count(*) FROM credit_events") == [(11 + 1_000 + 1,)]
            assert sql(installation.engine, "SELECT DISTINCT org_id, count(*) FROM waiting_messages GROUP BY 1") == [
                ("stuck", 2_501)
            ]
            [told] = eventually(lambda: warnings_in(worker))
            assert told == f"Messages wait for their organizations. The organization stuck: {LOCKED}"
            waiting_since = f'holdfast_organization_waiting_since_seconds{{org_id="stuck",reason="{LOCKED}"}}'
            eventually(lambda: waiting_since in figures.get("/metrics").text)
            shown = commands.run("waiting", env=installation.environment)
            assert shown.returncode == 0
            assert re.search(rf"\d s +stuck +2,501 +{LOCKED}", shown.stdout)
            assert not asked.ready()
        assert asked.get(timeout=PATIENCE_S)["outcome"] == "reserved"
        eventually(installation.is_drained)
        eventually(lambda: len(warnings_in(worker)) > 1)
        assert re.fullmatch(r"The organization stuck: nothing waits any more, after \d+\.\d s", warnings_in(worker)[1])
        eventually(lambda: "holdfast_waiting_organizations 0.0" in figures.get("/metrics").text)
        assert waiting_since not in figures.get("/metrics").text
    events = (
        "SELECT coalesce(metadata ->> 'grant_id', workflow_id) FROM credit_events WHERE org_id = 'stuck' ORDER BY seq"
    )
    assert [key for (key,) in sql(installation.engine, events)] == ["first", "run", *(f"{n:05}" for n in range(2_500))]
    assert installation.count("dead_letters") == 0
    assert audit.verify(installation.engine).is_clean
    ended = commands.run("waiting", env=installation.environment)
    assert (ended.returncode, ended.stdout) == (0, "No message waits for its organization.\n")


def left_waiting(installation: Installation, producer: Producer, *grant_ids: str) -> list[AsyncResult]:
    """Grants to the organization stuck, that waited for its wallet when their worker was killed."""
    worker = installation.start_worker()
    producer.answer("wallet.grant", grant("stuck", "first"))
    with installation.locked("stuck"):
        asked = [producer.ask("wallet.grant", grant("stuck", grant_id)) for grant_id in grant_ids]
        eventually(lambda: installation.count("waiting_messages") == len(grant_ids))
        worker.kill()
    return asked


def test_what_waits_when_its_worker_is_killed_another_one_applies(
    installation: Installation, producer: Producer
) -> None:
    [asked] = left_waiting(installation, producer, "second")
    installation.start_worker("worker-2")
    assert asked.get(timeout=PATIENCE_S)["available"] == 2
    assert eventually(installation.is_drained)


def test_a_waiting_message_that_ends_its_workers_becomes_a_dead_letter_and_the_one_behind_it_is_applied(
    installation: Installation, producer: Producer
) -> None:
    """Whatever ends them: here they are killed while PostgreSQL takes its time over it."""
    poison, innocent = left_waiting(installation, producer, "poison", "innocent")
    when = "NEW.metadata ->> 'grant_id' = 'poison'"
    on_insert_into(installation.engine, "credit_events", "PERFORM pg_sleep(5)", when=when)

    def ended() -> int:
        [count] = sql(installation.engine, "SELECT attempts FROM waiting_messages ORDER BY number LIMIT 1")[0]
        assert isinstance(count, int)
        return count

    sql(installation.engine, f"UPDATE waiting_messages SET attempts = {DELIVERY_LIMIT - 2}")

    def has_ended_one_more(before: int) -> bool:
        return ended() > before

    while (before := ended()) < DELIVERY_LIMIT:
        worker = installation.start_worker(f"worker-{uuid4()}")
        eventually(partial(has_ended_one_more, before))
        worker.kill()
    last = installation.start_worker("last")
    assert innocent.get(timeout=PATIENCE_S)["available"] == 2
    assert "its worker ended each time it was applied" in str(poison.get(timeout=PATIENCE_S, propagate=False))
    assert eventually(installation.is_drained)
    letters = sql(installation.engine, "SELECT error_code, org_id, task FROM dead_letters")
    assert letters == [("delivery_limit", "stuck", "wallet.grant")]
    assert "Traceback" not in log_of(last)
    no_more_acting(installation.engine, "credit_events")
    replayed = commands.run("failed", "replay", "1", env=installation.environment)
    assert (replayed.returncode, replayed.stdout) == (0, "Dead letter 1: posted.\n")
    assert audit.verify(installation.engine).is_clean


def test_a_flood_of_expired_reservations_is_released_while_others_are_served(
    installation: Installation, producer: Producer
) -> None:
    installation.start_worker()
    producer.answer("wallet.grant", {"org_id": "flooded", "grant_id": "first", "credits": 50_000})
    number = 20_000
    reserve(installation.engine, "flooded", number)
    run = producer.ask("reservations.release_expired")
    released = "SELECT count(*) FROM workflows WHERE state = 'expired'"
    eventually(lambda: sql(installation.engine, released) > [(0,)])
    served = 0
    while not run.ready():
        served += 1
        assert producer.answer("wallet.grant", grant("other", str(served)))["available"] == served
    assert served > 5
    assert run.get(timeout=PATIENCE_S) == number
    assert (
        producer.answer("workflow.start", {"org_id": "flooded", "workflow_id": "new", "credits": 50_000})["outcome"]
        == "reserved"
    )
    eventually(installation.is_drained)
    assert sql(installation.engine, released) == [(number,)]
    assert audit.verify(installation.engine).is_clean


def test_a_message_for_a_flooded_organization_waits_until_all_its_expired_reservations_are_released(
    installation: Installation, producer: Producer
) -> None:
    installation.start_worker()
    producer.answer("wallet.grant", {"org_id": "flooded", "grant_id": "first", "credits": 10_000})
    reserve(installation.engine, "flooded", 10_000)
    asked = producer.ask("workflow.start", {"org_id": "flooded", "workflow_id": "new", "credits": 10_000})
    assert producer.answer("wallet.grant", grant("other", "first"))["available"] == 1
    assert asked.get(timeout=PATIENCE_S)["outcome"] == "reserved"
    assert audit.verify(installation.engine).is_clean


def reserve(engine: Engine, org_id: str, number: int) -> None:
    """As if so many workflows had started, one credit each, a day too long ago."""
    sql(
        engine,
        """
        INSERT INTO workflows (org_id, workflow_id, state, start_credits, start_answer, expires_at, refunded)
        SELECT :org_id, 'run-' || n, 'reserved', 1, 'reserved', now() - interval '1 day', 0
        FROM generate_series(1, :number) AS n
        """,
        org_id=org_id,
        number=number,
    )
    sql(
        engine,
        """
        INSERT INTO credit_events
        SELECT org_id, last_seq + n, now(), 'reservation', 'test', 'run-' || n, NULL, NULL,
               -1, prepaid_balance, 0, n, 0, 'start:run-' || n, '{}'
        FROM wallets CROSS JOIN generate_series(1, :number) AS n WHERE org_id = :org_id
        """,
        org_id=org_id,
        number=number,
    )
    sql(
        engine,
        "UPDATE wallets SET last_seq = last_seq + :number, last_event_at = now(), reserved = :number,"
        " next_hold_expiry = now() - interval '1 day' WHERE org_id = :org_id",
        org_id=org_id,
        number=number,
    )


def test_a_commit_that_hangs_is_told_of(services: Embedded) -> None:
    """As when a synchronous replica is gone: no error, and no timeout of PostgreSQL's ends it."""
    with open_folder() as folder, Embedded(folder, durable=False) as own:
        engine = connect(own.database_url)
        migrations.upgrade(engine)
        migrations.grant(engine)
        engine.dispose()
        with installed(own) as installation, closing(Producer(installation.broker_url)) as producer:
            admin = connect(own.admin_url).execution_options(isolation_level="AUTOCOMMIT")

            def set_replicas(names: str) -> None:
                with admin.connect() as connection:
                    connection.execute(text(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'"))
                    connection.execute(text("SELECT pg_reload_conf()"))
                admin.dispose()

            asked: list[AsyncResult] = []

            def hangs() -> bool:
                """Whether a commit waits: each process of the server reads the new setting when it gets to it."""
                asked.append(producer.ask("wallet.grant", grant("acme", str(len(asked)))))
                return bool(sql(admin, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))

            with installation.serving_figures() as (worker, figures):
                wait_for_workers(producer)
                producer.answer("wallet.grant", grant("acme", "first"))
                assert "holdfast_waiting_for_database 0.0" in figures.get("/metrics").text
                set_replicas("gone")
                try:
                    eventually(hangs)
                    told = f"The database has been silent for more than {SILENT_S:g} s; the messages wait"
                    eventually(lambda: told in warnings_in(worker))
                    assert "holdfast_waiting_for_database 1.0" in figures.get("/metrics").text
                finally:
                    set_replicas("")
                assert asked[-1].get(timeout=PATIENCE_S)["available"] == 1 + len(asked)
                eventually(lambda: re.match(r"The database answers again after \d", warnings_in(worker)[-1]))
                eventually(lambda: "holdfast_waiting_for_database 0.0" in figures.get("/metrics").text)
