"""One worker a module, for the tests that can share it; an installation of its own for a test that cannot."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.installation import Installation, Producer, installed, wait_for_workers
from worker.local.embedded import Embedded


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
def running(services: Embedded) -> Iterator[Installation]:
    """A migrated ledger of this module's own, whose worker takes messages."""
    with installed(services) as own:
        own.start_worker()
        with closing(Producer(own.broker_url)) as plain:
            wait_for_workers(plain)
        yield own


@pytest.fixture
def workflow_engine(running: Installation) -> Iterator[Producer]:
    """Sends to the module's running worker."""
    with closing(Producer(running.broker_url)) as plain:
        yield plain
