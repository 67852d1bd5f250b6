"""PostgreSQL and a broker without installing either: child processes in one data folder.

Guarantee: the servers end with this process. `stop` ends them in order. If this process is killed instead, Linux ends
them at once, and on any system the next start on the same folder ends survivors. Only one `Embedded` runs on a folder,
and every start on it has the same URLs.

Does not: supervise (a server that dies stays dead until `start`), or serve more than this machine.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from ledger.roles import READER, WORKER
from worker.local.broker import Broker
from worker.local.data_folder import DataFolder, opened, saying_what_is_wrong_with
from worker.local.machine import closed_folder
from worker.local.postgres import OWNER, Postgres, postgres_account, socket_folder


class Embedded:
    """Both services in one data folder, from `start` to `stop` (or as a context manager).

    `durable=False` is for tests: PostgreSQL is faster, and survives a kill, but may lose its data in a power cut.
    `fresh`: new ports and passwords, instead of those of earlier starts. `progress` gets one line before each step that
    takes a moment. `start` raises ServiceError, and then leaves nothing running.
    """

    folder: DataFolder
    postgres: Postgres
    broker: Broker

    def __init__(
        self,
        data_dir: Path,
        *,
        durable: bool = True,
        fresh: bool = False,
        progress: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.data_dir = Path(os.path.realpath(data_dir))  # `resolve` would raise if links lead in a circle
        self._durable = durable
        self._fresh = fresh
        self._progress = progress
        self._cleanup = ExitStack()

    @property
    def database_url(self) -> str:
        """The URL of the database `holdfast` for its owner."""
        return self.postgres.url(OWNER, "holdfast")

    @property
    def worker_url(self) -> str:
        """The same for a worker or a beat."""
        return self.postgres.url(WORKER, "holdfast")

    @property
    def reader_url(self) -> str:
        """The same for the API and people."""
        return self.postgres.url(READER, "holdfast")

    @property
    def admin_url(self) -> str:
        """The URL of the database `postgres` for the superuser: for tests, which create databases."""
        return self.postgres.url("postgres", "postgres")

    @property
    def broker_url(self) -> str:
        """The URL of the broker for worker, beat, API and people."""
        return self.broker.url_of("holdfast")

    @property
    def engine_broker_url(self) -> str:
        """The URL of the broker for workflow engines."""
        return self.broker.url_of("engine")

    def start(self) -> None:
        """Start both. Raises ServiceError."""
        with saying_what_is_wrong_with(self.data_dir), ExitStack() as cleanup:
            account = postgres_account()
            self.folder = cleanup.enter_context(opened(self.data_dir, account, fresh=self._fresh))
            sockets = cleanup.enter_context(socket_folder(self.data_dir, account))
            self.postgres = Postgres(self.data_dir, sockets, durable=self._durable, account=account)
            first = "" if self.postgres.data.exists() else " (the first start creates its data)"
            self._progress(f"Starting PostgreSQL{first} …")
            cleanup.callback(self.postgres.stop)
            self.postgres.start()
            self._progress("Starting the broker …")
            passwords = {user: self.folder.secret(user) for user in ("holdfast", "engine")}
            self.broker = Broker(self.data_dir, port=self.folder.port("broker"), passwords=passwords)
            cleanup.callback(self.broker.stop)
            self.broker.start()
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """Stop both, the broker first. A second call does nothing."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def default_data_dir(checkout: Path) -> Path:
    """`.holdfast` in the checkout; in /var/lib if we are root and PostgreSQL's account cannot enter the checkout."""
    checkout = checkout.resolve()
    if closed_folder(checkout, postgres_account()) is None:
        return checkout / ".holdfast"
    digest = hashlib.sha256(os.fsencode(checkout)).hexdigest()[:8]
    return Path("/var/lib/holdfast") / f"{checkout.name}-{digest}"
