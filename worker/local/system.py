"""All of Holdfast on one machine: database, broker, worker, beat and API, as children of this process.

Guarantee: they stop together, in an order that lets the worker finish its batch. A child that dies is started again;
one that keeps dying ends the system with an error. Every start on a data folder has the same URLs and secrets.
"""

import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from ledger import migrations
from ledger.database import connect
from ledger.settings import PREFIX
from worker.broker import create_celery
from worker.local import weeks
from worker.local.data_folder import saying_what_is_wrong_with
from worker.local.embedded import Embedded
from worker.local.process import Process, ServiceError

HOST = "127.0.0.1"
API_OPTIONS = ("--http", "api_stub.protocol:PromptProtocol", "--limit-concurrency", "500")
"""How uvicorn treats slow clients. A process usually has 1,024 file descriptors; the others are for the servers."""

POLL_S = 0.2
MOST_RESTARTS = 5
"""How often a child may die within `RESTART_WINDOW_S`; once more is an error."""
RESTART_WINDOW_S = 60.0


class System:
    """All services in one data folder, from `start` to `stop` (or as a context manager).

    `fresh`: new ports and secrets, instead of those of earlier starts. `product_name` and `buy_credits_url`: on the
    pages. `with_weeks`: an empty ledger begins with those of `worker.local.weeks`. `progress` gets one line before each
    step that takes a moment. `start` raises ServiceError, with nothing left running.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        fresh: bool = False,
        product_name: str | None = None,
        buy_credits_url: str | None = None,
        with_weeks: bool = False,
        progress: Callable[[str], None],
    ) -> None:
        self._shown = {"PRODUCT_NAME": product_name, "BUY_CREDITS_URL": buy_credits_url}
        self._with_weeks = with_weeks
        self.embedded = Embedded(data_dir, fresh=fresh, progress=progress)
        self._progress = progress
        self._processes: list[Process] = []
        self._cleanup = ExitStack()

    def start(self) -> None:
        """Start everything, and return when the worker takes messages."""
        with saying_what_is_wrong_with(self.embedded.data_dir), ExitStack() as cleanup:
            cleanup.enter_context(self.embedded)
            engine = connect(self.embedded.database_url)
            migrations.upgrade(engine)
            migrations.grant(engine)
            if self._with_weeks:
                weeks.tell(engine, datetime.now(UTC))
            engine.dispose()
            self._progress("Starting the worker, the beat and the API …")
            celery = ("celery", "--quiet", "-A", "worker")
            api_port, metrics_port = self.embedded.folder.port("api"), self.embedded.folder.port("metrics")
            uvicorn = ("uvicorn", "api_stub.app:app", "--host", HOST, "--port", str(api_port), *API_OPTIONS)
            as_worker, as_reader = self.embedded.worker_url, self.embedded.reader_url
            metrics_address = f"{HOST}:{metrics_port}"
            worker = self._process(
                "worker", as_worker, *celery, "worker", port=metrics_port, METRICS_ADDRESS=metrics_address
            )
            beat = self._process("beat", as_worker, *celery, "beat")
            shown = {name: value for name, value in self._shown.items() if value}
            api = self._process("api", as_reader, *uvicorn, port=api_port, JWT_SECRET=self.jwt_secret, **shown)
            self._processes = [worker, beat, api]
            for process in self._processes:
                cleanup.callback(process.stop)
                process.start()
            api.wait_until(self._api_answers)
            with create_celery("holdfast-system", self.embedded.broker_url, None) as producer:
                worker.wait_until(lambda: bool(producer.control.ping(timeout=POLL_S)))
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """Stop everything; a second call does nothing."""
        self._cleanup.close()

    @property
    def jwt_secret(self) -> str:
        """The secret that the API's tokens are signed with."""
        return self.embedded.folder.secret("jwt")

    @property
    def metrics_urls(self) -> tuple[str, str]:
        """The URLs of the metrics for Prometheus: the system's, and its worker's."""
        return f"{self.url}/metrics", f"http://{HOST}:{self.embedded.folder.port('metrics')}/metrics"

    @property
    def url(self) -> str:
        """The URL of the API and the pages."""
        return f"http://{HOST}:{self.embedded.folder.port('api')}"

    def supervise(self, *, until: Callable[[], bool]) -> None:
        """Start a child that dies again, until `until` or an interrupt. Raises ServiceError if one keeps dying."""
        restarts = defaultdict[str, list[float]](list)
        with saying_what_is_wrong_with(self.embedded.data_dir):
            while not until():
                for process in (self.embedded.postgres, self.embedded.broker, *self._processes):
                    if not process.is_running:
                        self._start_again(process, restarts[process.name])
                time.sleep(POLL_S)

    def _start_again(self, process: Process, restarts: list[float]) -> None:
        now = time.monotonic()
        restarts[:] = [t for t in restarts if now - t < RESTART_WINDOW_S] + [now]
        if len(restarts) > MOST_RESTARTS:
            raise ServiceError(f"{process.name} keeps ending: {process.killed_by() or process.last_words()}")
        self._progress(f"{process.name} ended: {process.killed_by() or process.last_words()}; starting it again …")
        process.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _process(
        self, name: str, database_url: str, module: str, *arguments: str, port: int | None = None, **settings: str
    ) -> Process:
        own = {**settings, "DATABASE_URL": database_url, "BROKER_URL": self.embedded.broker_url}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        environment = inherited | {f"{PREFIX}{setting}": value for setting, value in own.items()}
        program = [sys.executable, "-m", module, *arguments]
        return Process(name, program, self.embedded.data_dir, env=environment, port=port)

    def _api_answers(self) -> bool:
        port = self.embedded.folder.port("api")
        with suppress(OSError), socket.create_connection((HOST, port), timeout=POLL_S):
            return True
        return False
