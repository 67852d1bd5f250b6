"""Faults of the database and of the broker, on the real worker: nothing acknowledged, nothing lost, and no help needed.

And of the database, on the real API: as soon as it is there again, every request is answered.

Where a test waits for at most `SOON_S`, that is the promise: after a fault the worker is soon at work again.
"""

import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, event, make_url, text
from sqlalchemy.exc import OperationalError

from ledger import audit, migrations
from ledger.database import connect
from ledger.roles import WORKER
from ledger.store import apply_batch
from ledger.waiting import LOCKED
from tests.acceptance import commands, website
from tests.acceptance.website import HISTORY, LETTERS, Visitor
from tests.databases import EMPTY, new_database
from tests.installation import (
    IMPATIENT_WORKER,
    Fork,
    Installation,
    Producer,
    celery,
    closing_broker,
    exit_code,
    installed,
    installed_on,
    log_of,
    open_folder,
    terminate,
    wait_for_workers,
    warnings_in,
)
from tests.messages import delivery, grant
from tests.support import eventually, processes_of, sql, suspended
from worker.answers import PAUSE_S
from worker.local.broker import Broker
from worker.local.embedded import Embedded
from worker.local.process import Process

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine

WAITS = "The database does not answer; the messages wait: "
UNUSABLE = "The database cannot be used as it is; the messages wait: "
WAIT_ALONE = "Messages wait for their organizations. "
GOES_ON = r"The database answers again after \d+\.\d s"
HELD_AT_MOST = 1_000
"""The prefetch limit of a worker."""

SOON_S = 20.0
"""Long enough for a slow machine, as a worker tries every two seconds; not for one that waits for another timeout."""

GRACE_S = 30.0
"""How long docker-compose.yml lets a worker stop, which takes less than ten seconds of a machine that has time."""


@pytest.fixture
def fed(installation: Installation, producer: Producer) -> tuple[Installation, Process, Producer]:
    """A ledger, its worker, and who feeds it; one grant was applied."""
    worker = installation.start_worker()
    producer.answer("wallet.grant", grant("before"))
    return installation, worker, producer


@pytest.fixture(scope="module")
def machine() -> Iterator[Embedded]:
    """Servers that may be killed."""
    with open_folder() as folder, Embedded(folder, durable=False) as own:
        engine = connect(own.database_url)
        migrations.upgrade(engine)
        migrations.grant(engine)
        engine.dispose()
        yield own


@pytest.fixture
def fragile(machine: Embedded) -> Iterator[Installation]:
    """A ledger on servers that may be killed; they run again afterwards."""
    with installed(machine) as own:
        yield own
        machine.postgres.start()


def test_a_database_that_goes_away_costs_no_message(machine: Embedded, fragile: Installation) -> None:
    worker = fragile.start_worker()
    with closing(Producer(fragile.broker_url)) as producer:
        producer.answer("wallet.grant", {"org_id": "before", "grant_id": "gift", "credits": 1})
        machine.postgres.kill()
        fragile.engine.dispose()
        down_since = time.monotonic()
        producer.send_grants(0, 100)
        eventually(lambda: warnings_in(worker))
        eventually(lambda: time.monotonic() > down_since + 2)  # long enough for half a dozen tries
        assert len(warnings_in(worker)) == 1
        machine.postgres.start()
        eventually(lambda: fragile.count("credit_events") == 101, timeout_s=SOON_S)
        assert eventually(fragile.is_drained)
        eventually(lambda: len(warnings_in(worker)) > 1)
    waits, goes_on = warnings_in(worker)
    assert waits.startswith("The database does not answer; the messages wait: ")
    assert re.fullmatch(r"The database answers again after \d+\.\d s", goes_on)
    assert "Traceback" not in log_of(worker)
    assert fragile.count("dead_letters") == 0
    assert audit.verify(fragile.engine).is_clean


def test_what_was_answered_survives_a_crash_of_a_database_that_writes_late_by_default(
    machine: Embedded, fragile: Installation
) -> None:
    with as_admin(machine) as admin:
        admin.execute(text("ALTER ROLE holdfast SET synchronous_commit = off"))
    fragile.start_worker()
    with closing(Producer(fragile.broker_url)) as producer:
        for number in range(10):
            producer.answer("wallet.grant", grant("acme", str(number)))
        machine.postgres.kill()
        fragile.engine.dispose()
        machine.postgres.start()
        assert fragile.is_sound(events=10)
    with as_admin(machine) as admin:
        admin.execute(text("ALTER ROLE holdfast RESET synchronous_commit"))


def test_a_database_that_cannot_hold_every_text_is_refused_at_the_start(
    services: Embedded, installation: Installation
) -> None:
    with new_database(services, "template0", "ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'") as url:
        refused = (
            f"holdfast: the database {make_url(url).database} has the encoding SQL_ASCII; Holdfast needs one that was"
            " created with ENCODING 'UTF8' TEMPLATE template0"
        )
        worker = installation.start("encoded", *celery("worker"), HOLDFAST_DATABASE_URL=url)
        migrated = commands.run("migrate", env={**installation.environment, "HOLDFAST_DATABASE_URL": url})
        assert (migrated.returncode, migrated.stdout, migrated.stderr) == (2, "", f"{refused}\n")
        eventually(lambda: not worker.is_running)
    assert log_of(worker).splitlines()[-1] == refused


def test_a_database_whose_clock_is_a_month_ahead_is_waited_for(
    services: Embedded, installation: Installation, producer: Producer
) -> None:
    worker = installation.start_worker()
    subscribe = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 100}
    anchor = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}"
    assert producer.answer("wallet.subscribe", {"org_id": "acme", **subscribe, "anchor": anchor})["available"] == 100
    producer.answer("workflow.start", {"org_id": "acme", "workflow_id": "run", "credits": 10, "expires_in_s": 86_400})
    worker.stop()
    set_clock_ahead(services, installation, "31 days")
    worker = installation.start_worker("later")
    asked = producer.ask("wallet.grant", grant("acme"))
    run = producer.ask("subscriptions.post_due")
    eventually(lambda: warnings_in(worker))
    [told] = warnings_in(worker)
    assert re.match(r"The database's clock is wrong; the messages wait: it says 20.*, this worker's 20.*, and", told)
    assert not asked.ready()
    assert installation.count("credit_events") == 2
    set_clock_ahead(services, installation, None)
    assert asked.get(timeout=SOON_S)["available"] == 91
    assert run.get(timeout=SOON_S) == 0
    assert installation.is_sound(events=3)


def set_clock_ahead(services: Embedded, installation: Installation, by: str | None) -> None:
    """Have new sessions of this database find another clock first."""
    name = installation.engine.url.database
    if by is not None:
        sql(installation.engine, "CREATE SCHEMA wrong")
        sql(installation.engine, "GRANT USAGE ON SCHEMA wrong TO PUBLIC")
        ahead = f"RETURN pg_catalog.clock_timestamp() + interval '{by}'"
        sql(installation.engine, f"CREATE FUNCTION wrong.clock_timestamp() RETURNS timestamptz LANGUAGE sql {ahead}")
    installation.engine.dispose()
    with as_admin(services) as admin:
        path = "RESET search_path" if by is None else "SET search_path = wrong, pg_catalog, public"
        admin.execute(text(f"ALTER DATABASE {name} {path}"))
        admin.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))


def test_a_worker_told_to_stop_while_the_database_is_away_gives_its_messages_back(
    machine: Embedded, fragile: Installation
) -> None:
    worker = fragile.start_worker("worker-1")
    with closing(Producer(fragile.broker_url)) as producer:
        producer.answer("wallet.grant", {"org_id": "before", "grant_id": "gift", "credits": 1})
        machine.postgres.kill()
        fragile.engine.dispose()
        producer.send_grants(0, 10)
        eventually(lambda: warnings_in(worker))
        terminate(worker)
        assert exit_code(worker) == 0, worker.last_words()
        assert fragile.waiting() == {"credits": 10, "unacked": 0}
        machine.postgres.start()
        fragile.start_worker("worker-2")
        eventually(lambda: fragile.count("credit_events") == 11)
    assert fragile.count("dead_letters") == 0


def test_a_worker_waits_for_the_database_to_be_migrated(services: Embedded) -> None:
    with installed(services, template=EMPTY) as installation, closing(Producer(installation.broker_url)) as producer:
        worker = installation.start_worker()
        asked = producer.ask("wallet.grant", {"org_id": "early", "grant_id": "gift", "credits": 1})
        eventually(lambda: warnings_in(worker))
        [line] = warnings_in(worker)
        assert line == f"{UNUSABLE}the database is not migrated yet: run `holdfast migrate`"
        assert not asked.ready()
        as_owner = {**installation.environment, "HOLDFAST_DATABASE_URL": installation.database_url}
        assert commands.run("migrate", "--roles", env=as_owner).returncode == 0
        assert asked.get(timeout=SOON_S)["available"] == 1
        assert installation.count("dead_letters") == 0


def test_a_worker_waits_for_what_its_role_needs(installation: Installation, producer: Producer) -> None:
    sql(installation.engine, "REVOKE ALL ON credit_events FROM holdfast_worker")
    worker = installation.start_worker()
    asked = producer.ask("wallet.grant", {"org_id": "early", "grant_id": "gift", "credits": 1})
    eventually(lambda: warnings_in(worker))
    [line] = warnings_in(worker)
    assert line == (
        f"{UNUSABLE}permission denied for table credit_events; run `holdfast migrate --roles` as the owner of the "
        "tables, or connect as a role that may do this"
    )
    migrations.grant(installation.engine)
    assert asked.get(timeout=SOON_S)["available"] == 1
    assert installation.count("dead_letters") == 0


def test_a_database_that_dies_in_the_middle_of_a_batch_costs_and_repeats_nothing(
    machine: Embedded, fragile: Installation
) -> None:
    worker = fragile.start_worker()
    with closing(Producer(fragile.broker_url)) as producer:
        producer.answer("wallet.grant", grant("before"))
        with suppress(OperationalError), fragile.locked("before"):
            producer.send("wallet.grant", grant("before", "second"))
            producer.send_grants(0, 100)
            eventually(lambda: is_waiting_for_a_lock(machine, fragile) or fragile.count("waiting_messages"))
            machine.postgres.stop("immediate")
        fragile.engine.dispose()
        eventually(lambda: len(warnings_in(worker)) == 1)
        machine.postgres.start()
        eventually(lambda: fragile.count("credit_events") == 102, timeout_s=SOON_S)
        assert eventually(fragile.is_drained)
    assert fragile.is_sound(events=102)
    assert "Traceback" not in log_of(worker)


def test_while_the_database_is_away_a_worker_holds_no_more_than_its_prefetch_and_answers_its_operators(
    machine: Embedded, fragile: Installation
) -> None:
    fragile.start_worker()
    with closing(Producer(fragile.broker_url)) as producer:
        wait_for_workers(producer)
        machine.postgres.kill()
        fragile.engine.dispose()
        producer.send_grants(0, HELD_AT_MOST + 500)
        eventually(lambda: fragile.waiting()["unacked"] == HELD_AT_MOST)
        assert producer.celery.control.ping(timeout=SOON_S, limit=1), "it does not answer while it waits"
        assert fragile.waiting() == {"credits": 500, "unacked": HELD_AT_MOST}
        machine.postgres.start()
        eventually(lambda: fragile.count("credit_events") == HELD_AT_MOST + 500, timeout_s=SOON_S)
    assert eventually(fragile.is_drained)
    assert fragile.is_sound(events=HELD_AT_MOST + 500)


def test_a_database_that_only_reads_is_waited_for(
    services: Embedded, installation: Installation, producer: Producer
) -> None:
    fail_over(services, installation, read_only=True)
    worker = installation.start_worker()
    producer.send("wallet.grant", grant("later"))
    eventually(lambda: warnings_in(worker))
    assert warnings_in(worker) == [f"{WAITS}cannot execute SELECT FOR UPDATE in a read-only transaction"]
    assert installation.waiting()["unacked"] == 1
    fail_over(services, installation, read_only=False)
    eventually(lambda: installation.count("credit_events") == 1, timeout_s=SOON_S)
    assert eventually(installation.is_drained)
    assert installation.is_sound(events=1)
    eventually(lambda: re.fullmatch(GOES_ON, warnings_in(worker)[-1]))


def fail_over(services: Embedded, installation: Installation, *, read_only: bool) -> None:
    """Every connection is lost, and new ones are to a server that only reads, or to one that writes again."""
    name = installation.engine.url.database
    installation.engine.dispose()
    with as_admin(services) as admin:
        admin.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = {read_only}"))
        admin.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))


@contextmanager
def as_admin(services: Embedded) -> Iterator[Connection]:
    engine = connect(services.admin_url).execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_a_lock_that_somebody_holds_too_long_is_waited_for(fed: Any) -> None:
    installation, worker, producer = fed
    with installation.locked("before"):
        producer.send("wallet.grant", grant("before", "second"))
        eventually(lambda: warnings_in(worker))
        assert warnings_in(worker) == [f"{WAIT_ALONE}The organization before: {LOCKED}"]
        assert not any(installation.waiting().values())
        assert installation.count("waiting_messages") == 1
    eventually(lambda: installation.count("credit_events") == 2, timeout_s=SOON_S)
    assert eventually(installation.is_drained)
    assert installation.is_sound(events=2)


def test_a_deadlock_is_waited_out(services: Embedded, installation: Installation, producer: Producer) -> None:
    """Nobody else locks wallets in another order; if somebody does, PostgreSQL ends one of the two."""
    with as_admin(services) as admin:  # a wait is looked at once, after that long: before the worker's patience ends
        admin.execute(text(f"ALTER DATABASE {installation.engine.url.database} SET deadlock_timeout = '300ms'"))
    worker = installation.start_worker()
    for org_id in ("a", "before"):
        producer.answer("wallet.grant", grant(org_id))
    lock = "SELECT 1 FROM wallets WHERE org_id = '{}' FOR UPDATE"
    conninfo = services.admin_url.replace("postgresql+psycopg", "postgresql").replace(
        "/postgres?", f"/{installation.engine.url.database}?"
    )
    with psycopg.connect(conninfo) as rival:
        rival.execute("SET deadlock_timeout = '60s'")  # so that the worker is the one that is ended
        rival.execute(lock.format("before"))
        for org_id in ("a", "before"):
            producer.celery.send_task("wallet.grant", args=[grant(org_id, "second")], queue="staging")
        installation.broker.rename("staging", "credits")  # both at once: one batch
        eventually(lambda: is_waiting_for_a_lock(services, installation))
        rival.execute(lock.format("a"))
        # Both, or one, if the worker's patience with the first lock ended before the rival came for the second.
        eventually(lambda: installation.count("waiting_messages") > 0)
        rival.rollback()
    eventually(lambda: installation.count("credit_events") == 4, timeout_s=SOON_S)
    assert eventually(installation.is_drained)
    assert installation.is_sound(events=4)
    assert worker.is_running


def is_waiting_for_a_lock(services: Embedded, installation: Installation) -> bool:
    name = installation.engine.url.database
    waiting = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{name}' AND wait_event_type = 'Lock'"
    with as_admin(services) as admin:
        return admin.execute(text(waiting)).first() is not None


# The API, whose connections a restart of the database breaks while nobody uses them.

READS = (
    "/api/organizations/acme/credit-events",
    "/api/organizations/acme/credits",
    "/api/organizations/acme/workflows/run",
    HISTORY,
    f"{HISTORY}.csv",
    LETTERS,
    f"{LETTERS}/1",
    "/readyz",
    "/metrics",
)


@pytest.fixture
def api(fragile: Installation) -> FastAPI:
    """The API of a ledger in which there is something to read everywhere."""
    run = {"org_id": "acme", "workflow_id": "run", "credits": 1}
    gift = delivery("wallet.grant", **grant("acme"))
    apply_batch(fragile.engine, [gift, delivery("workflow.start", **run), delivery("wallet.unknown")])
    return website.app(fragile.database_url, fragile.broker_url)


@contextmanager
def visiting(api: FastAPI) -> Iterator[Visitor]:
    """Somebody who may read everything."""
    bearer = {"Authorization": f"Bearer {website.token(scope='credits:read operator')}"}
    with website.serving(api) as address, Visitor(base_url=address, headers=bearer) as visitor:
        yield visitor


def open_connections(api: FastAPI) -> None:
    """Fill the API's pool with connections that nobody uses."""
    pooled = api.state.services.engine
    with ExitStack() as open_at_once:
        for _ in range(pooled.pool.size()):
            open_at_once.enter_context(pooled.connect())
    assert pooled.pool.checkedin() == pooled.pool.size() > 1


def break_connections(machine: Embedded, installation: Installation) -> None:
    """The server ends all connections to the database, as it does when it restarts."""
    installation.engine.dispose()
    own = f"FROM pg_stat_activity WHERE datname = '{installation.engine.url.database}'"
    with as_admin(machine) as admin:
        assert all(admin.scalars(text(f"SELECT pg_terminate_backend(pid) {own}")))
        eventually(lambda: admin.scalar(text(f"SELECT count(*) {own}")) == 0)


def test_after_a_restart_of_the_database_every_request_is_answered_at_the_first_try(
    machine: Embedded, fragile: Installation, api: FastAPI
) -> None:
    with visiting(api) as visitor, ThreadPoolExecutor(len(READS)) as many:
        open_connections(api)
        machine.postgres.kill()
        fragile.engine.dispose()
        machine.postgres.start()
        answers = dict(zip(READS, many.map(visitor.get, READS), strict=True))
        assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(READS, 200)
        assert "holdfast_database_up 1.0" in answers["/metrics"].text
        for path in READS:  # each of them as the first one that gets a broken connection
            open_connections(api)
            break_connections(machine, fragile)
            assert (path, visitor.get(path).status_code) == (path, 200)


def test_while_the_database_is_away_each_request_tries_once_to_reach_it(
    machine: Embedded, fragile: Installation, api: FastAPI
) -> None:
    tries: list[object] = []
    event.listen(api.state.services.engine, "do_connect", lambda *connecting: tries.append(connecting))
    with visiting(api) as visitor:
        open_connections(api)
        tries.clear()
        machine.postgres.kill()
        fragile.engine.dispose()
        for number in (1, 2):
            answer = visitor.get(READS[0])
            assert (answer.status_code, answer.headers["retry-after"], len(tries)) == (503, "5", number)
        machine.postgres.start()
        assert visitor.get(READS[0]).status_code == 200


def test_after_a_restart_of_the_database_an_operators_decision_is_kept_at_the_first_try(
    machine: Embedded, fragile: Installation, api: FastAPI
) -> None:
    with visiting(api) as visitor:
        form = {"form": website.form_token(visitor.get(f"{LETTERS}/1")), "reason": "sent by a test"}
        open_connections(api)
        break_connections(machine, fragile)
        assert visitor.post(f"{LETTERS}/1/discard", data=form).status_code == 303
    assert sql(fragile.engine, "SELECT status, resolved_by, resolution FROM dead_letters") == [
        ("discarded", "ann", "sent by a test")
    ]


def test_a_file_that_breaks_in_the_middle_stays_broken(machine: Embedded, fragile: Installation, api: FastAPI) -> None:
    long = {"note": "x" * 8_000}
    gifts = [delivery("wallet.grant", **grant("acme", str(number)), metadata=long) for number in range(3_000)]
    apply_batch(fragile.engine, gifts)
    in_use = api.state.services.engine.pool.checkedout
    with visiting(api) as visitor, visitor.stream("GET", f"{HISTORY}.csv") as file:
        assert file.status_code == 200
        eventually(lambda: in_use() == 0)  # its 24 MB are more than what lies between the server and who does not read
        machine.postgres.kill()
        fragile.engine.dispose()
        with pytest.raises(httpx.RemoteProtocolError):
            file.read()
        machine.postgres.start()


def test_a_worker_told_to_stop_while_the_database_is_stuck_gives_its_messages_back_in_time(
    services: Embedded, fed: Any
) -> None:
    installation, worker, producer = fed
    with suspended(*processes_of(services.postgres)):
        producer.send("wallet.grant", grant("later"))
        eventually(lambda: installation.waiting()["unacked"] == 1)
        terminate(worker)
        assert exit_code(worker, within_s=GRACE_S) == 0, worker.last_words()
        assert installation.waiting() == {"credits": 1, "unacked": 0}
    installation.start_worker("worker-2")
    eventually(lambda: installation.count("credit_events") == 2)
    assert installation.is_sound(events=2)


def test_a_place_for_answers_that_is_silent_does_not_hold_the_ledger_up(
    installation: Installation, producer: Producer
) -> None:
    def applied(messages: int) -> bool:
        return installation.count("credit_events") == messages

    with socket.create_server(("127.0.0.1", 0)) as silent:
        program = [*celery("worker")]
        place = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        environment = {**installation.environment_of(WORKER), "HOLDFAST_RESULT_URL": place}
        worker = Fork("worker", program, installation.folder, env=environment, cwd=installation.folder)
        began_at = time.monotonic()
        with killed_at_the_end(worker):
            for number in range(5):
                producer.ask("wallet.grant", grant("acme", str(number)))
                eventually(partial(applied, number + 1))
            assert eventually(installation.is_drained)
            terminate(worker)
            assert exit_code(worker) == 0
        ended_at = time.monotonic()
        warnings = warnings_in(worker)
        assert {warning.partition(": ")[0] for warning in warnings} == {"Answers cannot be stored; next try in 10 s"}
        assert len(warnings) <= 1 + (ended_at - began_at) / PAUSE_S


@contextmanager
def killed_at_the_end(process: Process) -> Iterator[None]:
    process.start()
    try:
        yield
    finally:
        process.kill()


Mortal = tuple[Broker, Installation, Producer]


@pytest.fixture
def mortal(engine: Engine, database_url: str) -> Iterator[Mortal]:
    """A broker that may be killed, and a ledger on it. The `engine` makes its database."""
    with open_folder() as folder, closing_broker(folder) as broker:
        broker.start()
        with installed_on(database_url, broker.url) as installation, closing(Producer(broker.url)) as producer:
            yield broker, installation, producer


def test_a_worker_told_to_stop_while_its_broker_is_stuck_ends_in_time(mortal: Mortal) -> None:
    broker, installation, producer = mortal
    worker = installation.start_worker()
    producer.answer("wallet.grant", grant("before"))
    assert broker.pid is not None
    with suspended(broker.pid):
        terminate(worker)
        assert exit_code(worker, within_s=GRACE_S) == 0, worker.last_words()


def test_a_broker_that_goes_away_while_a_batch_is_applied_is_noticed_and_a_stop_too(mortal: Mortal) -> None:
    broker, installation, producer = mortal
    worker = installation.start_worker()
    producer.answer("wallet.grant", grant("before"))
    assert worker.pid is not None
    with suspended(worker.pid):  # as long as a batch that takes its time
        broker.kill()
        stopped_at = time.monotonic()
        eventually(lambda: time.monotonic() > stopped_at + 3)  # Celery's heartbeat is due
    eventually(lambda: any("Connection to broker lost" in line for line in warnings_in(worker)))
    terminate(worker)
    assert exit_code(worker) == 0, worker.last_words()


def test_what_a_worker_held_when_its_broker_restarted_does_not_wait_for_a_timeout(
    machine: Embedded, fragile: Installation
) -> None:
    with open_folder() as folder, closing_broker(folder) as broker:
        broker.start()
        with installed_on(fragile.database_url, broker.url) as installation:
            worker = installation.start_worker()
            with closing(Producer(broker.url)) as producer:
                producer.answer("wallet.grant", grant("before"))
                machine.postgres.kill()
                installation.engine.dispose()
                producer.send_grants(0, 50)
                eventually(lambda: installation.waiting()["unacked"] == 50)
            eventually(lambda: has_written_all(installation))
            broker.kill()
            eventually(lambda: any("Connection to broker lost" in line for line in warnings_in(worker)))
            broker.start()
            machine.postgres.start()
            eventually(lambda: installation.count("credit_events") == 51, timeout_s=SOON_S)
            assert eventually(installation.is_drained)
            assert installation.is_sound(events=51)
            assert "Traceback" not in log_of(worker)


def has_written_all(installation: Installation) -> bool:
    """Whether the kernel has all that the broker was told, so that it is kept also if the broker is killed now."""
    return bool(installation.broker.info("persistence")["aof_buffer_length"] == 0)


def test_a_worker_waits_for_its_broker_and_outlives_its_end(engine: Engine, database_url: str) -> None:
    with open_folder() as folder, closing_broker(folder) as broker, installed_on(database_url, broker.url) as late:
        worker = late.start_worker()
        eventually(lambda: "Cannot connect to redis://" in log_of(worker))
        assert broker.url not in log_of(worker)  # the password is in it
        broker.start()
        with closing(Producer(broker.url)) as producer:
            assert producer.answer("wallet.grant", {"org_id": "late", "grant_id": "1", "credits": 1})["available"] == 1
            with engine.begin() as connection:  # the worker has to wait for this transaction
                connection.execute(text("SELECT 1 FROM wallets WHERE org_id = 'late' FOR UPDATE"))
                producer.send("wallet.grant", {"org_id": "late", "grant_id": "2", "credits": 1})
                eventually(lambda: late.waiting()["unacked"] == 1)
                broker.kill()
        broker.start()
        with closing(Producer(broker.url)) as producer:
            assert producer.answer("wallet.grant", {"org_id": "late", "grant_id": "3", "credits": 1})["available"] == 3
        assert worker.is_running
        terminate(worker)
        assert exit_code(worker) == 0
        assert "AttributeError" not in log_of(worker)


def test_a_broker_that_refuses_writes_for_a_while_is_told_of_twice(engine: Engine, mortal: Mortal) -> None:
    _, installation, producer = mortal
    worker = installation.start_worker()
    producer.answer("wallet.grant", {"org_id": "refused", "grant_id": "1", "credits": 1})
    with engine.begin() as connection:  # the worker has to wait for this transaction
        connection.execute(text("SELECT 1 FROM wallets WHERE org_id = 'refused' FOR UPDATE"))
        producer.send("wallet.grant", {"org_id": "refused", "grant_id": "2", "credits": 1})
        eventually(lambda: installation.waiting()["unacked"] == 1)
        installation.broker.config_set("min-replicas-to-write", 1)
    eventually(lambda: warnings_in(worker))
    refused_at = time.monotonic()
    eventually(lambda: time.monotonic() > refused_at + 3)  # it tries every second
    installation.broker.config_set("min-replicas-to-write", 0)
    eventually(installation.is_drained)
    eventually(lambda: len(warnings_in(worker)) == 2)
    refused, again = warnings_in(worker)
    assert refused.startswith("Cannot consume from redis://administrator:**@127.0.0.1")
    assert "NOREPLICAS" in refused
    assert again.startswith("Consuming from redis://administrator:**@127.0.0.1")
    assert producer.answer("wallet.grant", {"org_id": "refused", "grant_id": "3", "credits": 1})["available"] == 3


def test_a_broker_that_is_not_durable_is_told_of_at_the_start_and_whenever_that_changes(
    mortal: Mortal,
) -> None:
    _, installation, producer = mortal
    installation.broker.config_set("appendonly", "no")
    with installation.serving_figures(sys.executable, "-c", IMPATIENT_WORKER) as (worker, figures):
        producer.answer("wallet.grant", grant("acme"))

        def is_told_of(value: int) -> bool:
            return f"holdfast_broker_is_not_durable {value}.0" in figures.get("/metrics").text

        no_file = "it keeps no append-only file, so it loses messages when it ends: set appendonly yes"
        not_durable = "Messages may be lost, as the broker is not durable"
        assert warnings_in(worker) == [f"{not_durable}: {no_file}"]
        assert is_told_of(1)
        installation.broker.config_set("appendonly", "yes")
        eventually(lambda: is_told_of(0))
        assert warnings_in(worker)[1:] == ["The broker is durable again"]
        installation.broker.config_set("maxmemory", "1gb")
        installation.broker.config_set("maxmemory-policy", "allkeys-lru")
        eventually(lambda: is_told_of(1))
        removes = "when its memory is full it removes messages: set maxmemory-policy noeviction, not allkeys-lru"
        assert warnings_in(worker)[2:] == [f"{not_durable}: {removes}"]
