"""The test stand: one PostgreSQL and one broker with production settings, and workers as processes.

Guarantee: every measurement gets a database of its own, made from the same template just after a checkpoint, and an
empty queue. The processes that it starts end with it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from typing import Self

from redis import Redis
from sqlalchemy import Engine, text

from bench.workload import NotAccountedError, Workload
from holdfast_client.broker import QUEUE
from ledger import audit, migrations
from ledger.database import connect
from ledger.settings import PREFIX
from worker.broker import create_celery
from worker.local.embedded import Embedded
from worker.local.process import Process, ServiceError
from worker.transport import UNACKED

STAGED = "bench-staged"
"""A list that no worker takes from: messages wait here, and then move to the queue all at once."""

_WARM_UP = Workload.without_effect(800, organizations=10)
"""Messages for a worker before a measurement, so that its connections and first plans do not count."""

MIGRATED, EMPTY = "holdfast", "template1"
POLL_S = 0.005
STALLED_S = 60.0
"""A queue that has not become shorter for so long has stalled."""


class Stand:
    """Databases, queue and workers on `embedded`, which must run. A context manager."""

    def __init__(self, embedded: Embedded) -> None:
        self.embedded = embedded
        self._numbers = count(1)
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            self._admin = connect(self.embedded.admin_url).execution_options(isolation_level="AUTOCOMMIT")
            cleanup.callback(self._admin.dispose)
            self.broker = cleanup.enter_context(closing(Redis.from_url(self.embedded.broker.url)))
            engine = connect(self.embedded.database_url)
            migrations.upgrade(engine)
            engine.dispose()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cleanup.close()

    def describe_database(self) -> str:
        """PostgreSQL's version, and whether a commit waits for the disk."""
        with self._admin.connect() as connection:
            names = ("server_version", "fsync", "synchronous_commit", "full_page_writes")
            version, *settings = (connection.scalar(text(f"SHOW {name}")) for name in names)
        return f"PostgreSQL {version}, " + ", ".join(
            f"{name} {value}" for name, value in zip(names[1:], settings, strict=True)
        )

    def template(self, fill: Callable[[Engine], None], *, like: str = MIGRATED) -> str:
        """Make a database to copy others from, filled once. Returns its name."""
        name = self._create(like)
        self._cleanup.callback(self._drop, name)
        with self.opened(name) as engine:
            fill(engine)
            # Now, so that autovacuum does not do it in the middle of a measurement.
            with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                connection.execute(text("VACUUM ANALYZE"))
        return name

    @contextmanager
    def database(self, template: str) -> Iterator[Engine]:
        """A new database, for one measurement."""
        name = self._create(template)
        try:
            with self.opened(name) as engine:
                yield engine
        finally:
            self._drop(name)

    @contextmanager
    def holdfast(self, engine: Engine, *, workers: int) -> Iterator[None]:
        """Holdfast's workers on this database, ready."""
        settings = {f"{PREFIX}DATABASE_URL": _url(engine), f"{PREFIX}BROKER_URL": self.embedded.broker.url}
        with self._workers("worker", settings, workers):
            yield

    @contextmanager
    def naive(self, engine: Engine) -> Iterator[None]:
        """The naive way's worker on this database, ready."""
        settings = {"DATABASE_URL": _url(engine), "CELERY_BROKER_URL": self.embedded.broker.url}
        with self._workers("bench.naive", settings, 1):
            yield

    def drain_s(self, envelopes: Sequence[bytes]) -> float:
        """Put all messages into the queue at once. Returns the seconds until the last one is acknowledged.

        That is after the last commit, as a message is acknowledged after its transaction is committed.
        """
        for first in range(0, len(envelopes), 1_000):
            self.broker.lpush(STAGED, *envelopes[first : first + 1_000])
        began_at = moved_at = time.perf_counter()
        self.broker.rename(STAGED, QUEUE)
        left = len(envelopes)
        while (now_left := self._in_broker()) > 0:
            now = time.perf_counter()
            if now_left != left:
                left, moved_at = now_left, now
            if now - moved_at > STALLED_S:
                raise NotAccountedError(f"{left:,} messages still wait, but none was taken for {STALLED_S:g} s")
            time.sleep(POLL_S)
        return time.perf_counter() - began_at

    def waiting_s(self, engine: Engine) -> float:
        """The seconds until no message waits for its organization. On a busy machine, some may wait for a moment."""
        began_at = time.perf_counter()
        with engine.connect() as connection:
            while connection.execute(text("SELECT EXISTS (SELECT FROM waiting_messages)")).scalar_one():
                connection.rollback()
                time.sleep(POLL_S)
        return time.perf_counter() - began_at

    def empty_queue(self) -> int:
        """Drop the messages in the queue. Returns their number, with those not yet acknowledged."""
        waiting = self._in_broker()
        self.broker.delete(QUEUE)
        return waiting

    def _in_broker(self) -> int:
        """The number of messages that wait, or are taken and not acknowledged."""
        with self.broker.pipeline() as together:
            together.llen(QUEUE)
            together.hlen(UNACKED)
            together.hlen("unacked")  # the naive way's
            return sum(map(int, together.execute()))

    @contextmanager
    def _workers(self, app: str, settings: dict[str, str], number: int) -> Iterator[None]:
        self.broker.flushdb()
        environment = {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "CELERY_"))}
        with ExitStack() as running, create_celery("bench", self.embedded.broker.url, None) as celery:
            processes = [
                Process(
                    f"{app}-{position}",
                    [sys.executable, "-m", "celery", "-A", app, "worker", "--hostname", f"{app}-{position}@bench"],
                    self.embedded.data_dir,
                    env={**environment, **settings},
                )
                for position in range(number)
            ]
            for process in processes:
                running.callback(process.kill)  # it holds no messages any more, and stopping takes seconds
                process.start()
            processes[0].wait_until(lambda: len(celery.control.ping(timeout=0.1, limit=number)) == number)
            self.drain_s(_WARM_UP.envelopes)
            yield
            for process in processes:
                if not process.is_running:
                    raise ServiceError(f"{process.name} ended: {process.last_words()}")

    def _create(self, template: str) -> str:
        name = f"bench_{next(self._numbers)}"
        with self._admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template} OWNER holdfast STRATEGY FILE_COPY"))
        return name

    def _drop(self, name: str) -> None:
        with self._admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))

    @contextmanager
    def opened(self, name: str) -> Iterator[Engine]:
        """Open the database of this name."""
        engine = connect(self.embedded.postgres.url("holdfast", name))
        try:
            yield engine
        finally:
            engine.dispose()


def check_ledger(engine: Engine) -> None:
    """Check that every invariant of the ledger holds and there are no dead letters. Raises NotAccountedError."""
    verdict = audit.verify(engine)
    for finding in verdict.findings:
        if finding.offenders:
            raise NotAccountedError(f"the ledger is broken: {finding.check.rule} {' '.join(finding.offenders[0])}")
    if verdict.open_dead_letters:
        raise NotAccountedError(f"{verdict.open_dead_letters:,} messages became dead letters")


def _url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)
