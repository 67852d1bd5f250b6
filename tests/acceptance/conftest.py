"""One worker a module for the tests that can share it, an installation of its own for one that cannot, and visitors."""

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from tests.acceptance.website import LETTERS, Visitor, operator_token, served, token, write
from tests.installation import Installation, Producer, installed, wait_for_workers
from tests.rabbitmq import RabbitMQ
from tests.support import sql
from tests.wheels import Environment, Wheels, build
from worker.local.embedded import Embedded
from worker.local.process import Process

_numbers = count(1)


@pytest.fixture
def installation(services: Embedded) -> Iterator[Installation]:
    """A migrated ledger of this test's own, with no process yet."""
    with installed(services) as own:
        yield own


@pytest.fixture
def producer(installation: Installation) -> Iterator[Producer]:
    """Sends to the test's own installation."""
    with closing(Producer(installation.broker_url)) as plain:
        yield plain


@pytest.fixture(scope="module")
def with_worker(services: Embedded) -> Iterator[tuple[Installation, Process]]:
    """A migrated ledger of this module's own, and its worker, which takes messages."""
    with installed(services) as own:
        worker = own.start_worker()
        with closing(Producer(own.broker_url)) as plain:
            wait_for_workers(plain)
        yield own, worker


@pytest.fixture(scope="module")
def running(with_worker: tuple[Installation, Process]) -> Installation:
    """The same without the worker, for tests that leave it alone."""
    return with_worker[0]


@pytest.fixture
def workflow_engine(running: Installation) -> Iterator[Producer]:
    """Sends to the module's running worker."""
    with closing(Producer(running.broker_url)) as plain:
        yield plain


@pytest.fixture(scope="module")
def rights(rabbitmq_server: RabbitMQ) -> Iterator[Callable[[str], str]]:
    """Two users of RabbitMQ with the rights of docs/security.md; returns the URL of each."""
    document = (Path(__file__).parents[2] / "docs/security.md").read_text()
    about_rabbitmq = document.split("\n## RabbitMQ\n")[1].split("\n## ")[0]
    [commands] = re.findall(r"^```shell\n(.*?)^```$", about_rabbitmq, re.MULTILINE | re.DOTALL)
    for user in ("holdfast", "engine"):
        rabbitmq_server.control("add_user", user, "sekrit")
    try:
        for line in commands.splitlines():
            program, *command = shlex.split(line)
            assert program == "rabbitmqctl"
            rabbitmq_server.control(*command)
        yield lambda user: rabbitmq_server.url.replace("guest:guest", f"{user}:sekrit")
    finally:
        for user in ("holdfast", "engine"):
            rabbitmq_server.control("delete_user", user)


# The web pages, on a ledger without a worker


@pytest.fixture(scope="module")
def ledger(services: Embedded) -> Iterator[Installation]:
    """A ledger of this module's own, without a worker; every test has organizations of its own."""
    with installed(services) as own:
        yield own


@pytest.fixture(scope="module")
def address(ledger: Installation) -> Iterator[str]:
    with served(ledger.database_url, ledger.broker_url) as address:
        yield address


@pytest.fixture
def visitor(address: str) -> Iterator[Visitor]:
    """Somebody who is not signed in."""
    with Visitor(base_url=address) as visitor:
        yield visitor


@pytest.fixture
def org_id() -> str:
    """An organization that is this test's own."""
    return f"org-{next(_numbers)}"


@pytest.fixture
def customer(visitor: Visitor, org_id: str) -> Visitor:
    """Somebody who may read the credits of `org_id`."""
    assert visitor.sign_in(token(orgs=[org_id])).status_code == 303
    return visitor


@pytest.fixture
def operator(visitor: Visitor) -> Visitor:
    assert visitor.sign_in(operator_token()).status_code == 303
    return visitor


@pytest.fixture
def letter(ledger: Installation, org_id: str) -> str:
    """The address of a dead letter that is this test's own."""
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p1", "credits": 0}))
    [(number,)] = sql(ledger.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id", org_id=org_id)
    return f"{LETTERS}/{number}"


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Holdfast and its client, built."""
    return build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture
def empty(tmp_path: Path) -> Environment:
    """An environment in which nothing is installed."""
    return Environment(tmp_path / "environment")
