"""Holdfast as its operator has it: a database, a broker, and processes that know them from the environment alone."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import httpx
import redis
from celery import Celery
from celery.result import AsyncResult
from sqlalchemy import Engine, text

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from ledger import audit
from ledger.database import connect
from ledger.roles import READER, WORKER
from tests import forks
from tests.databases import MIGRATED, new_broker_database, new_database
from tests.support import PATIENCE_S, as_role, eventually, sql
from worker.local.broker import Broker
from worker.local.embedded import Embedded
from worker.local.machine import free_port
from worker.local.process import Process
from worker.transport import UNACKED

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))

# A worker as it is, except that its minute lasts a second.
IMPATIENT_WORKER = """
from worker import celery
celery.conf.broker_transport_options["visibility_timeout"] = 1
celery.worker_main(["worker"])
"""

# A process that has sent forks in both ways of Python; then it and its children send at the same time.
FORKING = """
import multiprocessing, os, sys
from holdfast_client.client import Client
connects = []
sys.addaudithook(lambda event, _: connects.append(os.getpid()) if event == "socket.connect" else None)
client = Client(sys.argv[1])
def send(who):
    for number in range(20):
        client.grant(org_id="acme", grant_id=f"{who}-{number}", credits=1)
send("before")
child = os.fork()
if child == 0:
    send("fork")
    os._exit(0)
idle = os.fork()
if idle == 0:
    client.close()
    os._exit(0)
other = multiprocessing.get_context("fork").Process(target=send, args=("multiprocessing",))
other.start()
send("parent")
other.join()
codes = [os.waitpid(child, 0)[1], os.waitpid(idle, 0)[1], other.exitcode]
send("after")
client.close()
sys.exit(f"{codes}, {connects}" if any(codes) or connects != [os.getpid()] else 0)
"""
SENT_BY_FORKS = {f"{who}-{n}" for who in ("before", "fork", "multiprocessing", "parent", "after") for n in range(20)}


class Fork(Process):
    """A part that is in Python; see `forks`."""

    def _spawn(self, log: IO[bytes]) -> Any:
        env, cwd = self._options["env"], self._options["cwd"]
        with Path(os.devnull).open() as nothing:
            streams = nothing.fileno(), log.fileno(), log.fileno()
            return _Forked(forks.start(self.argv, *streams, env=env, cwd=cwd, death_signal=self.stop_signal))


class _Forked:
    """It, as if `subprocess.Popen` had started it."""

    def __init__(self, process: ForkServerProcess) -> None:
        self._process = process
        self.pid = process.pid
        self.stdin = Path(os.devnull).open("wb")  # noqa: SIM115 # until the process ends

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float) -> None:
        self._process.join(timeout_s)


@dataclass(frozen=True, slots=True)
class Installation:
    """One ledger: its database, its broker, and a folder for the logs of its processes."""

    database_url: str
    """As the owner of the tables."""
    broker_url: str
    folder: Path
    engine: Engine
    broker: redis.Redis
    _cleanup: ExitStack

    @property
    def environment(self) -> dict[str, str]:
        """For a person's commands."""
        return self.environment_of(READER)

    def environment_of(self, role: str) -> dict[str, str]:
        url = as_role(role, self.database_url)
        return environment(HOLDFAST_DATABASE_URL=url, HOLDFAST_BROKER_URL=self.broker_url)

    def start(self, name: str, *argv: str, **settings: str) -> Process:
        """Start a part that is in Python and works on the ledger, with more settings or others; see `forks`.

        It is killed with the installation, if it still runs then.
        """
        return self._start(Fork, name, argv, settings)

    def start_anew(self, name: str, *argv: str, **settings: str) -> Process:
        """The same, with every import and with options of Python."""
        return self._start(Process, name, argv, settings)

    def _start(self, kind: type[Process], name: str, argv: tuple[str, ...], settings: dict[str, str]) -> Process:
        process = kind(name, argv, self.folder, env={**self.environment_of(WORKER), **settings}, cwd=self.folder)
        self._cleanup.callback(process.kill)
        process.start()
        return process

    def start_worker(self, name: str = "worker") -> Process:
        return self.start(name, *celery("worker"))

    def start_worker_on(self, rabbitmq_url: str, name: str = "worker", *flags: str) -> Process:
        """A worker whose broker is RabbitMQ; answers are kept in Redis beside it."""
        settings = {"HOLDFAST_BROKER_URL": rabbitmq_url, "HOLDFAST_RESULT_URL": self.broker_url}
        return self.start(name, *celery("worker"), *flags, **settings)

    @contextmanager
    def serving_figures(self, *argv: str) -> Iterator[tuple[Process, httpx.Client]]:
        """A worker, and who reads its figures; it is killed at the end."""
        address = f"127.0.0.1:{free_port()}"
        worker = self.start("worker", *(argv or celery("worker")), HOLDFAST_METRICS_ADDRESS=address)
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=PATIENCE_S) as figures:
            yield worker, figures
        worker.kill()

    def waiting(self) -> dict[str, int]:
        """How many messages are in the queue, and how many a worker holds."""
        return {"credits": self.broker.llen(QUEUE), "unacked": self.broker.hlen(UNACKED)}

    def is_drained(self) -> bool:
        """Whether no message is on its way: neither in the broker, nor waiting for its organization."""
        in_broker = [*self.waiting().values(), self.broker.llen(ENGINE_QUEUE)]
        return not any(in_broker) and self.count("waiting_messages") == 0

    def is_sound(self, *, events: int) -> bool:
        """Every message was applied once, and nothing else was."""
        assert self.count("credit_events") == events
        assert self.count("dead_letters") == 0
        return audit.verify(self.engine).is_clean

    @contextmanager
    def locked(self, org_id: str) -> Iterator[None]:
        """Somebody holds the lock of this organization's wallet."""
        with self.engine.connect() as connection, connection.begin() as transaction:
            connection.execute(text("SELECT 1 FROM wallets WHERE org_id = :org_id FOR UPDATE"), {"org_id": org_id})
            yield
            transaction.rollback()

    def count(self, table: str) -> int:
        [(rows,)] = sql(self.engine, f"SELECT count(*) FROM {table}")
        return int(rows)


class Producer:
    """What an engine in another company is: plain Celery and the names of docs/messages.md."""

    def __init__(self, broker_url: str) -> None:
        self.celery = Celery(broker=broker_url, backend=broker_url, set_as_current=False)
        self.celery.conf.control_exchange = "holdfast"  # who controls our workers has our application

    def send(self, task: str, *args: object, **kwargs: object) -> None:
        self.celery.send_task(task, args=args, kwargs=kwargs, queue=QUEUE, ignore_result=True)

    def send_grants(self, first: int, count: int) -> None:
        """Send so many grants of one credit, to twenty organizations in turn."""
        for number in range(first, first + count):
            self.send("wallet.grant", {"org_id": f"org-{number % 20}", "grant_id": f"gift-{number}", "credits": 1})

    def ask(self, task: str, *args: object, **kwargs: object) -> AsyncResult:
        return self.celery.send_task(task, args=args, kwargs=kwargs, queue=QUEUE, ignore_result=False)

    def answer(self, task: str, *args: object, **kwargs: object) -> Any:
        """The task's result; raises what it failed with."""
        return self.ask(task, *args, **kwargs).get(timeout=PATIENCE_S)

    def close(self) -> None:
        self.celery.backend.result_consumer.stop()
        self.celery.backend.client.close()
        self.celery.close()


def envelope(
    body: str | bytes,
    *,
    task: str = "wallet.grant",
    content_type: str | None = "application/json",
    headers: dict[str, Any] | None = None,
) -> str:
    """A message as it lies in Redis, whoever put it there."""
    usual = {"lang": "py", "task": task, "id": "1", "argsrepr": "", "kwargsrepr": "", "ignore_result": True}
    return json.dumps(
        {
            "body": base64.b64encode(body.encode() if isinstance(body, str) else body).decode(),
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": usual if headers is None else headers,
            "properties": {
                "correlation_id": "1",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "credits"},
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    )


def send_from_forks(broker_url: str) -> None:
    """Have `SENT_BY_FORKS` sent by one `Client`."""
    subprocess.run([sys.executable, "-c", FORKING, broker_url], check=True, timeout=PATIENCE_S)


def celery(command: str) -> list[str]:
    """The command line of a part as the README has it: without any flag."""
    return [sys.executable, "-m", "celery", "-A", "worker", command]


def environment(**settings: str) -> dict[str, str]:
    """Ours, but with only these settings of Holdfast."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}, **settings}


def log_of(process: Process) -> str:
    return process.log_file.read_text()


def warnings_in(process: Process) -> list[str]:
    """What its log says at level WARNING or above, without the time."""
    lines = [json.loads(line) for line in log_of(process).splitlines() if line.startswith("{")]
    return [line["message"] for line in lines if line["level"] in ("WARNING", "ERROR", "CRITICAL")]


def terminate(process: Process) -> None:
    os.kill(process.pid, signal.SIGTERM)


def exit_code(process: Process, *, within_s: float = PATIENCE_S) -> int:
    """What it ends with; fails the test if it takes longer."""
    eventually(lambda: not process.is_running, timeout_s=within_s)
    assert process._child is not None
    assert process._child.returncode is not None
    return process._child.returncode


@contextmanager
def installed(services: Embedded, *, template: str = MIGRATED) -> Iterator[Installation]:
    """A database and a broker that are nobody else's, on the session's servers."""
    with (
        new_database(services, template) as database_url,
        new_broker_database(services) as broker_url,
        installed_on(database_url, broker_url) as installation,
    ):
        yield installation


@contextmanager
def installed_on(database_url: str, broker_url: str) -> Iterator[Installation]:
    """A database and a broker that the test has started itself."""
    with open_folder() as folder, ExitStack() as cleanup:
        engine = connect(database_url)
        cleanup.callback(engine.dispose)
        broker = cleanup.enter_context(closing(redis.Redis.from_url(broker_url)))
        processes = cleanup.enter_context(ExitStack())
        yield Installation(database_url, broker_url, folder, engine, broker, processes)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every account can enter, which pytest's own are not: as root, PostgreSQL runs as another one."""
    folder = Path(tempfile.mkdtemp(prefix="acceptance-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class _ConfiguredBroker(Broker):
    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        super().__init__(folder)
        self._settings = settings

    def _config(self) -> str:
        return super()._config() + "".join(f"{name} {value}\n" for name, value in self._settings.items())


@contextmanager
def closing_broker(folder: Path, **settings: str) -> Iterator[Broker]:
    """A broker with more settings, that has its address but does not run yet; stopped at the end."""
    broker = _ConfiguredBroker(folder, settings)
    try:
        yield broker
    finally:
        broker.stop()


def wait_for_workers(producer: Producer, number: int = 1) -> None:
    """Wait until so many workers take messages."""
    # The limit: without it, Celery waits for answers of more workers until the time is over.
    eventually(lambda: len(producer.celery.control.ping(timeout=1, limit=number)) == number)
