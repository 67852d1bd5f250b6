"""A replica of the database answers what only informs, and says how old it is; if it cannot, the primary answers."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, make_url

from api_stub.reader import Reader
from ledger import history
from ledger import replica as replicas
from ledger.filters import EVERY_EVENT
from ledger.replica import NotReadableError
from ledger.roles import READER
from tests.acceptance import website
from tests.acceptance.website import (
    HISTORY,
    LEDGER,
    Patient,
    Visitor,
    figures,
    operator_token,
    serving,
    shown,
    token,
    write,
)
from tests.installation import Installation, installed
from tests.replicas import as_admin, configure, replica_of
from tests.support import PATIENCE_S, as_role, eventually, processes_of, sql, suspended
from worker.local.embedded import Embedded
from worker.local.postgres import OWNER, Postgres

OF_ACME = "/api/organizations/acme"
EVENTS, USAGE, CREDITS = (f"{OF_ACME}/{name}" for name in ("credit-events", "usage", "credits"))


class System:
    """A primary with one customer, and its replica."""

    def __init__(self, primary: Postgres, replica: Postgres, ledger: Installation) -> None:
        self.primary = primary
        self.replica = replica
        self.ledger = ledger
        self.granted = 0

    @property
    def read_url(self) -> str:
        """Of the ledger on the replica."""
        return self.replica.url(OWNER, self.database)

    @property
    def database(self) -> str:
        """The ledger's name on both servers."""
        name = make_url(self.ledger.database_url).database
        assert name is not None
        return name

    def write(self, *messages: tuple[str, dict[str, Any]]) -> None:
        write(self.ledger.engine, "acme", *messages)

    def grant(self) -> int:
        """Give one credit; returns how many there are now."""
        self.granted += 1
        self.write(("wallet.grant", {"grant_id": f"g{self.granted}", "credits": 1}))
        return self.granted

    def follow(self) -> None:
        """Wait until the replica has everything."""
        with as_admin(self.primary) as admin:
            [(position,)] = admin.execute("SELECT pg_current_wal_flush_lsn()").fetchall()
        with as_admin(self.replica) as standby:
            has_it = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
            eventually(lambda: standby.execute(has_it, [position]).fetchall() == [(True,)])

    @contextmanager
    def behind(self) -> Iterator[None]:
        """The replica replays nothing."""
        with as_admin(self.replica) as standby:
            standby.execute("SELECT pg_wal_replay_pause()")
            eventually(lambda: standby.execute("SELECT pg_get_wal_replay_pause_state()").fetchall() == [("paused",)])
        try:
            yield
        finally:
            with as_admin(self.replica) as standby:
                standby.execute("SELECT pg_wal_replay_resume()")
        self.follow()


@pytest.fixture(scope="module")
def whole(services: Embedded) -> Iterator[System]:
    with installed(services) as ledger, replica_of(services.postgres) as replica:
        yield System(services.postgres, replica, ledger)


@pytest.fixture
def system(whole: System, monkeypatch: pytest.MonkeyPatch) -> System:
    """Both are well, and the API looks at them more often."""
    monkeypatch.setattr(replicas, "LOOK_AT_PRIMARY_S", 0.1)
    monkeypatch.setattr(replicas, "LOOK_EVERY_S", 0.1)
    # A slow machine is no replica that is away, or behind.
    monkeypatch.setattr(replicas, "CONNECT_TIMEOUT_S", int(PATIENCE_S))
    monkeypatch.setattr(replicas, "MOST_BEHIND_S", 10 * PATIENCE_S)
    whole.grant()
    whole.follow()
    return whole


def app_that_reads_from(system: System, url: str) -> FastAPI:
    ledger = system.ledger
    return website.app(ledger.database_url, ledger.broker_url, read_database_url=as_role(READER, url))


@pytest.fixture
def app(system: System) -> FastAPI:
    return app_that_reads_from(system, system.read_url)


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        eventually(partial(reads_from_replica, app))
        yield address


def reads_from_replica(app: FastAPI) -> bool:
    is_readable = app.state.services.replica.is_readable
    assert isinstance(is_readable, bool)
    return is_readable


@pytest.fixture
def api(address: str) -> Iterator[Patient]:
    with Patient(base_url=address, headers={"Authorization": f"Bearer {token()}"}) as client:
        yield client


def told(api: Patient, path: str = EVENTS, **query: Any) -> Any:
    answer = api.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def as_of(answer: Any) -> datetime:
    return datetime.fromisoformat(answer["as_of"])


def looked_at_since(system: System, app: FastAPI) -> datetime:
    """The primary's time now; returns when the API has asked for its position once more."""
    [(now,)] = sql(system.ledger.engine, "SELECT clock_timestamp()")
    assert isinstance(now, datetime)
    eventually(lambda: app.state.services.replica._positions[-1].time > now)
    return now


# Which server answers what


def test_the_replica_answers_what_only_informs_and_says_until_when_it_has_everything(
    system: System, app: FastAPI, api: Patient
) -> None:
    with system.behind():
        before = system.granted
        after = system.grant()
        missed = looked_at_since(system, app)
        for path, query in ((EVENTS, {}), (EVENTS, {"group_by": "workflow"}), (USAGE, {})):
            assert as_of(told(api, path, **query)) < missed
        assert told(api)["total"] == before
        file = api.get(f"{USAGE}.csv")
        assert datetime.fromisoformat(file.headers["holdfast-as-of"]) < missed
        assert told(api, CREDITS)["available"] == after
        assert told(api, f"{OF_ACME}/quote", credits=0)["available"] == after
        system.write(("workflow.start", {"workflow_id": "new", "credits": 10**9}))
        assert told(api, f"{OF_ACME}/workflows/new")["state"] == "rejected"
    eventually(lambda: as_of(told(api)) > missed)  # although nothing more is written


def test_the_page_of_a_customer_says_how_old_it_is_and_that_of_staff_is_not_old(system: System, address: str) -> None:
    with system.behind(), Visitor(base_url=address) as customer, Visitor(base_url=address) as operator:
        before = system.granted
        after = system.grant()
        system.write(("workflow.start", {"workflow_id": "newer", "credits": 10**9}))
        customer.sign_in(token())
        page = customer.get(HISTORY)
        assert figures(page)["available"] == str(before)
        assert re.search(r'As of <time datetime="[-T:0-9]+Z">[\d:]+ UTC</time>', page.text)
        file = customer.get(f"{HISTORY}.csv")
        assert file.text.count("\r\n") == 1 + before
        assert file.headers["holdfast-as-of"]
        # A run that the replica does not have yet is no run that there is not.
        run = customer.get("/organizations/acme/runs/newer")
        assert (run.status_code, "As of" in run.text) == (200, False)
        operator.sign_in(operator_token())
        page = operator.get(HISTORY)
        assert figures(page)["available"] == str(after)
        assert "As of" not in page.text


def test_what_follows_a_page_of_the_primary_skips_nothing_that_the_replica_lacks(
    system: System, api: Patient, address: str
) -> None:
    with system.behind(), Visitor(base_url=address) as customer:
        for _ in range(3):
            last = system.grant()
        assert [each["id"] for each in told(api, cursor=last, limit=2)["items"]] == [last - 1, last - 2]
        grouped = told(api, cursor=f"{last + 1}-{last}", limit=2, group_by="workflow")
        assert [each["last_id"] for each in grouped["items"]] == [last - 1, last - 2]
        customer.sign_in(token())
        assert shown(customer.get(HISTORY, params=LEDGER | {"before": last}))[0] == last - 1
        # What the replica has, it may go on with.
        assert told(api, cursor=last - 2, limit=1)["total"] == last - 3


def test_metrics_are_the_replicas_and_say_until_when_they_have_everything(
    system: System, app: FastAPI, api: Patient
) -> None:
    with system.behind():
        system.write(("wallet.purchase", {"purchase_id": "p", "credits": 0}))
        missed = looked_at_since(system, app)
        values = metrics(api)
        assert values["holdfast_dead_letters_open"] == 0
        assert values["holdfast_figures_timestamp_seconds"] < missed.timestamp()
        assert (values["holdfast_database_up"], values["holdfast_replica_up"]) == (1, 1)
    assert metrics(api)["holdfast_dead_letters_open"] == 1


def test_metrics_do_not_wait_for_those_who_read(system: System, app: FastAPI, api: Patient) -> None:
    pool = app.state.services.replica._engine.pool
    pool._timeout = 0.05
    with ExitStack() as held:
        for _ in range(pool.size() + pool._max_overflow):
            held.enter_context(app.state.services.replica._engine.connect())
        # The primary has enough to do: it is not asked in place of a replica that is only busy.
        assert api.get(EVENTS).status_code == 503
        assert metrics(api)["holdfast_figures_timestamp_seconds"] > 0
        assert reads_from_replica(app)


def metrics(api: Patient) -> dict[str, float]:
    lines = api.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


# A replica that cannot answer


def test_a_replica_that_is_away_is_missed_by_nobody_and_read_again_when_it_is_back(
    system: System, app: FastAPI, api: Patient
) -> None:
    system.replica.kill()
    number = system.grant()
    assert told(api)["total"] == number
    eventually(lambda: not reads_from_replica(app))
    assert metrics(api)["holdfast_replica_up"] == 0
    system.replica.start()
    eventually(partial(reads_from_replica, app))
    assert metrics(api)["holdfast_replica_up"] == 1


@pytest.fixture
def impatient(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CONNECT_TIMEOUT_S", 2)


def test_who_reads_when_the_replica_freezes_gets_the_primarys_answer(
    system: System, impatient: None, app: FastAPI, api: Patient
) -> None:
    told(api)
    with suspended(*processes_of(system.replica)):
        number = system.grant()
        assert told(api)["total"] == number
        assert not reads_from_replica(app)
        assert told(api)["total"] == number
    eventually(partial(reads_from_replica, app))


def test_readers_go_on_while_the_primary_is_away(system: System, api: Patient) -> None:
    before = told(api)
    system.primary.kill()
    try:
        system.ledger.engine.dispose()
        later = told(api)
        assert later["items"] == before["items"]
        assert as_of(later) <= as_of(told(api))
        assert told(api, USAGE)["total"]["credits"] == 0
        assert api.get(CREDITS).status_code == 503
        begun_later = app_that_reads_from(system, system.read_url)
        with serving(begun_later) as address, Visitor(base_url=address) as customer:
            customer.sign_in(token())
            eventually(lambda: reads_from_replica(begun_later))
            assert figures(customer.get(HISTORY))["available"] == str(system.granted)
        values = metrics(api)
        assert (values["holdfast_database_up"], values["holdfast_replica_up"]) == (0, 1)
        assert "holdfast_dead_letters_open" in values
    finally:
        system.primary.start()
    eventually(lambda: api.get(CREDITS).status_code == 200)
    system.follow()


def test_a_replica_that_is_much_behind_is_not_read(
    system: System, app: FastAPI, api: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "MOST_BEHIND_S", 0.5)
    with system.behind():
        number = system.grant()
        eventually(lambda: told(api)["total"] == number)
        eventually(lambda: not reads_from_replica(app))
    eventually(partial(reads_from_replica, app))


def test_a_replica_whose_schema_is_not_the_primarys_is_not_read(system: System, app: FastAPI, api: Patient) -> None:
    [(revision,)] = sql(system.ledger.engine, "SELECT version_num FROM alembic_version")
    with system.behind():
        number = system.grant()
        sql(system.ledger.engine, "UPDATE alembic_version SET version_num = '9999'")
        eventually(lambda: told(api)["total"] == number)
        sql(system.ledger.engine, "UPDATE alembic_version SET version_num = :revision", revision=revision)
    eventually(partial(reads_from_replica, app))


def test_what_is_no_replica_of_the_ledger_is_not_read(
    system: System, database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    system.follow()
    other = make_url(database_url).database
    assert other is not None
    for url, problem in (
        (system.ledger.database_url, "it is no replica, but a database on its own"),
        (system.replica.url(OWNER, other), "it is no replica of HOLDFAST_DATABASE_URL's database, but of another one"),
    ):
        app = app_that_reads_from(system, url)
        with serving(app) as address, Patient(base_url=address) as api:
            api.headers["Authorization"] = f"Bearer {token()}"
            assert problem in eventually(lambda: capfd.readouterr().err)
            assert told(api)["total"] == system.granted
            assert not reads_from_replica(app)


def test_what_the_replica_cancels_in_favour_of_replication_is_read_from_the_primary(
    system: System, app: FastAPI, address: str
) -> None:
    configure(system.replica, "max_standby_streaming_delay", "0")
    calls = []

    def read(ledger: Connection) -> int:
        calls.append(ledger)
        number = history.number_of_events(ledger, "acme")
        if len(calls) == 1:
            sql(system.ledger.engine, "LOCK TABLE credit_events")
            system.follow()
        return number + history.number_of_events(ledger, "globex")

    reader = Reader(app.state.services)
    assert reader.read(read) == system.granted
    assert (len(calls), reader.is_from_replica) == (2, False)


def test_an_export_goes_on_at_the_primary_where_the_replica_has_ended(
    system: System, app: FastAPI, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "EXPORT_STEP", 1)
    system.grant()
    system.follow()
    with pytest.raises(NotReadableError, match="not as new"):
        app.state.services.replica.read(lambda ledger: ledger, since=2**60)
    reader = Reader(app.state.services)
    exported = history.all_events(reader.read, "acme", EVERY_EVENT)
    first = next(exported)
    system.replica.kill()
    system.grant()
    assert [event["seq"] for event in (first, *exported)] == list(range(system.granted - 1, 0, -1))
    assert not reader.is_from_replica
    system.replica.start()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_readers_leave_the_primary_alone(whole: System) -> None:
    """With `-s` it prints what docs/operating.md says of it."""
    orgs = [f"org-{number}" for number in range(10)]
    for org_id in orgs:
        runs = [
            (task, {"workflow_id": f"run-{number}", "project_id": f"p{number % 7}", "credits": 5})
            for number in range(400)
            for task in ("workflow.start", "workflow.finish")
        ]
        write(whole.ledger.engine, org_id, ("wallet.grant", {"grant_id": "g", "credits": 10_000}), *runs)
    whole.follow()
    alone = website.app(whole.ledger.database_url, whole.ledger.broker_url)
    with_replica = app_that_reads_from(whole, whole.read_url)
    spent = [processor_s_of_reading(app, orgs, [whole.primary, whole.replica]) for app in (alone, with_replica)]
    print(f"\nprocessor time of the primary and of the replica, in seconds: {spent[0]}, and {spent[1]}")
    assert spent[1][0] < spent[0][0] / 5


def processor_s_of_reading(app: FastAPI, orgs: list[str], servers: list[Postgres]) -> list[float]:
    """What 1,000 answers cost each server: a third each the API's history, its usage, and the page."""
    with serving(app) as address, Visitor(base_url=address) as customer:
        customer.headers["Authorization"] = f"Bearer {token(orgs=orgs)}"
        customer.sign_in(token(orgs=orgs))
        eventually(lambda: app.state.services.replica is None or reads_from_replica(app))
        before = [processor_s(server) for server in servers]
        for number in range(333):
            org_id = orgs[number % len(orgs)]
            of, page = f"/api/organizations/{org_id}", f"/organizations/{org_id}/credit-history"
            for path in (f"{of}/credit-events", f"{of}/usage?group_by=project", page):
                assert customer.get(path).status_code == 200
        return [round(processor_s(server) - begin, 2) for server, begin in zip(servers, before, strict=True)]


def processor_s(server: Postgres) -> float:
    """The time that the server and all its processes have computed, in seconds."""
    parent = psutil.Process(server.pid)
    living = sum(sum(child.cpu_times()[:2]) for child in parent.children(recursive=True))
    return living + sum(parent.cpu_times()[:4])
