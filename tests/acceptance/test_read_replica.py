"""A replica of the database answers what only informs, and says how old it is; if it cannot, the primary answers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from fastapi import FastAPI

from ledger import migrations
from ledger import replica as reading
from ledger.database import connect
from ledger.roles import READER
from tests.acceptance import website
from tests.acceptance.website import Patient, serving, token, write
from tests.installation import Installation, installed_on, open_folder
from tests.replicas import as_admin, replica_of
from tests.support import as_role, eventually
from worker.local.embedded import Embedded
from worker.local.postgres import OWNER, Postgres

EVENTS, USAGE, CREDITS = (f"/api/organizations/acme/{name}" for name in ("credit-events", "usage", "credits"))


class System:
    """A primary with one customer, its replica, and an API that reads from both."""

    def __init__(self, services: Embedded, replica: Postgres, ledger: Installation) -> None:
        self.primary = services.postgres
        self.replica = replica
        self.ledger = ledger
        self.number = 0

    def grant(self, credits: int = 1) -> None:
        self.number += 1
        write(self.ledger.engine, "acme", ("wallet.grant", {"grant_id": f"g{self.number}", "credits": credits}))

    def follow(self) -> None:
        """Wait until the replica has everything."""
        with as_admin(self.primary) as admin:
            [(position,)] = admin.execute("SELECT pg_current_wal_flush_lsn()").fetchall()
        with as_admin(self.replica) as standby:
            reached = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
            eventually(lambda: standby.execute(reached, [position]).fetchall() == [(True,)])

    @contextmanager
    def paused(self) -> Iterator[None]:
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
    with ExitStack() as stack:
        own = stack.enter_context(Embedded(stack.enter_context(open_folder()), durable=False))
        engine = connect(own.database_url)
        migrations.upgrade(engine)
        migrations.grant(engine)
        engine.dispose()
        replica = stack.enter_context(replica_of(own.postgres))
        yield System(own, replica, stack.enter_context(installed_on(own.database_url, own.broker.url)))


@pytest.fixture
def system(whole: System, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(reading, "LOOK_AT_PRIMARY_S", 0.1)
    monkeypatch.setattr(reading, "LOOK_EVERY_S", 0.1)
    whole.follow()
    return whole


@pytest.fixture
def app(system: System) -> FastAPI:
    url = as_role(READER, system.replica.url(OWNER, "holdfast"))
    return website.app(system.ledger.database_url, system.ledger.broker_url, read_database_url=url)


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        eventually(lambda: app.state.services.replica.is_readable)
        yield address


@pytest.fixture
def api(address: str) -> Iterator[Patient]:
    with Patient(base_url=address, headers={"Authorization": f"Bearer {token()}"}) as client:
        yield client


def total(api: Patient) -> int:
    answer = api.get(EVENTS)
    assert answer.status_code == 200, answer.text
    number = answer.json()["total"]
    assert isinstance(number, int)
    return number


def test_what_informs_comes_from_the_replica_and_says_how_old_it_is(system: System, api: Patient) -> None:
    system.grant()
    system.follow()
    before = total(api)
    with system.paused():
        system.grant()
        assert total(api) == before
        assert api.get(CREDITS).json()["available"] == before + 1
