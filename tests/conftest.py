"""Real services for the tests that need them: one PostgreSQL and one broker a session, one database a test.

And how hard Hypothesis tries: `default` on every push, `soak` (HYPOTHESIS_PROFILE=soak) forty times as long.
"""

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

from ledger import migrations
from ledger.database import connect
from tests import citus, rabbitmq
from tests.databases import EMPTY, administrator, new_broker_database, new_database
from tests.rabbitmq import RabbitMQ
from worker.local.embedded import Embedded

EVERY_PUSH = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,  # a busy machine is not a bug
    suppress_health_check=[HealthCheck.too_slow],  # nor is a slow one
    derandomize="CI" in os.environ,  # a push is repeatable; elsewhere every run looks somewhere else
)
settings.register_profile("default", EVERY_PUSH)
settings.register_profile("soak", EVERY_PUSH, max_examples=1_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class OneRabbitMQ(LoadFileScheduling):  # type: ignore[misc]
    """A file to a process, but all files that share a RabbitMQ to the same: its start takes as long as many tests."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "RabbitMQ" if _needs_rabbitmq(self.config.rootpath / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneRabbitMQ:
    return OneRabbitMQ(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no process works on one while the others have ended."""
    long = {item.path for item in items if item.get_closest_marker("timeout") is not None}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (not _needs_rabbitmq(item.path), item.path not in long, -tests[item.path]))
    if citus.cluster() is not None:
        for item in items:
            if (marker := item.get_closest_marker("one_server")) is not None:
                (why,) = marker.args
                item.add_marker(pytest.mark.skip(reason=f"one server: {why}"))


@cache
def _needs_rabbitmq(file: Path) -> bool:
    return re.search(r"\brabbitmq_(server|url)\b", file.read_text()) is not None


class Services(Embedded):
    """With every right at the broker: tests look into it, use many databases of it, and are other applications, too."""

    @property
    def broker_url(self) -> str:
        return self.broker.url


@pytest.fixture(scope="session")
def services() -> Iterator[Embedded]:
    """PostgreSQL, its database `holdfast` migrated as a template, with what each role may do, and the broker."""
    os.environ.pop(citus.VARIABLE, None)  # it is no setting of the programs that tests run
    folder = Path(tempfile.mkdtemp(prefix="holdfast-tests-", dir=_fast_folder()))
    folder.chmod(0o711)  # as root, PostgreSQL runs as an account that has to pass through
    with Services(folder, durable=False) as running:
        engine = connect(running.database_url)
        migrations.upgrade(engine)
        migrations.grant(engine)
        engine.dispose()
        yield running
        administrator(running).dispose()
        if (distributed := citus.cluster()) is not None:
            distributed.dispose()
    shutil.rmtree(folder)


@pytest.fixture
def empty_database_url(services: Embedded) -> Iterator[str]:
    """The URL of a database that has never been migrated."""
    with new_database(services, EMPTY) as url:
        yield url


@pytest.fixture
def empty_engine(empty_database_url: str) -> Iterator[Engine]:
    """A database that has never been migrated, as its owner connects."""
    engine = connect(empty_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def database_url(services: Embedded) -> Iterator[str]:
    """The URL of a migrated, empty database that is this test's own."""
    with new_database(services) as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """The test's own database."""
    engine = connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def broker_url(services: Embedded) -> Iterator[str]:
    """The URL of an empty database of the broker that is this test's own."""
    with new_broker_database(services) as url:
        yield url


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[RabbitMQ]:
    """A RabbitMQ of this session's own, which a test may end; where it is not installed, the test skips."""
    if not rabbitmq.is_installed():
        pytest.skip("RabbitMQ (rabbitmq-server) is not installed")
    with rabbitmq.running() as broker:
        yield broker


@pytest.fixture
def rabbitmq_url(rabbitmq_server: RabbitMQ) -> str:
    """The URL of a RabbitMQ in which nothing was ever declared."""
    if not rabbitmq_server.server.is_running:
        rabbitmq_server.start()
    rabbitmq_server.clear()
    return rabbitmq_server.url


def _fast_folder() -> str | None:
    """Memory, where there is enough of it: a database for every test is some 300 files each time."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 2**30 else None
