"""The nemesis of a RabbitMQ cluster: three nodes, each of them killed and frozen in turn under load.

Two workers, a beat, the API, and senders: a producer in plain Celery with the workload, and a synchronous client, an
asynchronous one and the API's with a message every now and then. Afterwards the checker looks as always. Besides, the
longest pause of each of them is measured: the time between two successes.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from subprocess import CalledProcessError
from threading import Event, Thread
from time import monotonic
from typing import Self

import httpx
import jwt
import redis

from holdfast_client.async_client import AsyncClient
from holdfast_client.client import Client, NotSentError
from ledger import migrations
from ledger.database import connect
from tests import rabbitmq
from tests.installation import Fork, celery, environment
from tests.nemesis import checker
from tests.nemesis.checker import Finding
from tests.nemesis.machine import WAITING
from tests.nemesis.producer import ClusterProducer, Sent
from tests.nemesis.run import AnyReport, Goal, terminate, wait
from tests.nemesis.workload import Message, Workload
from tests.rabbitmq import RabbitMQ
from tests.support import sql, suspended
from worker.local.embedded import Embedded
from worker.local.machine import free_port
from worker.local.process import Process, ServiceError
from worker.local.system import API_OPTIONS

LONGEST_PAUSE_S = 15.0
FAULTS = ("SIGKILL", "SIGSTOP")
DOWN_S = {"SIGKILL": (8, 15), "SIGSTOP": (25, 40)}
"""For how long a node is gone; frozen, for longer than it takes the others to notice it."""
CALM_S = 5.0
HEALED_WITHIN_S = 30.0
"""After this, what was frozen is restarted, as docs/reliability.md says."""
WHOLE_WITHIN_S, DRAINED_WITHIN_S, READY_WITHIN_S, DUE_WITHIN_S = 300.0, 60.0, 120.0, 10.0
PULSE_S, LOOK_S = 0.1, 0.05

SENT_FILE = "beat.sent"

# The beat as it is, except that its minute lasts half a second, and that it notes when the broker has taken something.
BEAT = f"""
import datetime, time
from celery.signals import after_task_publish
from worker import celery
note = open("{SENT_FILE}", "a", buffering=1)
after_task_publish.connect(lambda **_: note.write(f"{{time.monotonic()}}\\n"), weak=False)
for entry in celery.conf.beat_schedule.values():
    entry["schedule"].run_every = datetime.timedelta(seconds=0.5)
celery.Beat(loglevel="INFO").run()
"""

SECRET = "a secret for the nemesis, of at least 32 characters"
TOKEN = jwt.encode({"sub": "nemesis", "orgs": ["pulse-api"], "scope": "wallet:write", "exp": 4_102_444_800}, SECRET)

Attempt = Callable[[Message], bool]


class Sender(Thread):
    """Sends a message every now and then, each as often as it takes, and notes when it succeeds."""

    def __init__(self, who: str, attempt: Attempt, workload: Workload) -> None:
        super().__init__(name=who, daemon=True)
        self.sent: list[Sent] = []
        self.successes: list[float] = []
        self.error: BaseException | None = None
        self._attempt = attempt
        self._workload = workload
        self._stopping = Event()

    def run(self) -> None:
        """Send, until it is told to stop."""
        try:
            while not self._stopping.wait(PULSE_S):
                one = Sent(self._workload.one_credit(f"pulse-{self.name}"))
                self.sent.append(one)
                while not (self._stopping.is_set() or one.confirmed):
                    one.calls += 1
                    one.confirmed += self._attempt(one.message)
                if one.confirmed:
                    self.successes.append(monotonic())
        except BaseException as error:  # noqa: BLE001 - whoever reads the verdict has to know
            self.error = error

    def finish(self) -> list[Sent]:
        """End; what was sent and confirmed."""
        self._stopping.set()
        if self.is_alive():
            self.join()
        return [one for one in self.sent if one.confirmed]


def by_client(client: Client) -> Attempt:
    def attempt(message: Message) -> bool:
        try:
            client.send(message.task, message.fields)
        except NotSentError:
            return False
        return True

    return attempt


def by_async_client(client: AsyncClient, runner: asyncio.Runner) -> Attempt:
    def attempt(message: Message) -> bool:
        try:
            runner.run(client.send(message.task, message.fields))
        except NotSentError:
            return False
        return True

    return attempt


def by_api(api: httpx.Client) -> Attempt:
    def attempt(message: Message) -> bool:
        body = {name: value for name, value in message.fields.items() if name != "org_id"}
        address = f"/api/organizations/{message.fields['org_id']}/{message.task.replace('.', '/')}"
        try:
            return api.post(address, json=body).status_code == httpx.codes.ACCEPTED
        except httpx.HTTPError:
            return False

    return attempt


class Watch(Thread):
    """Notes when a worker has applied a batch, as its metrics say."""

    def __init__(self, who: str, address: str) -> None:
        super().__init__(name=who, daemon=True)
        self.successes: list[float] = []
        self._metrics = httpx.Client(base_url=address, trust_env=False, timeout=5)
        self._stopping = Event()

    def run(self) -> None:
        """Look, until it is told to stop."""
        before = ""
        with self._metrics:
            while not self._stopping.wait(LOOK_S):
                try:
                    lines = self._metrics.get("/metrics").text.splitlines()
                except httpx.HTTPError:  # it starts just now
                    continue
                applied = next((line for line in lines if line.startswith("holdfast_batch_messages_count ")), "")
                if applied != before:
                    before = applied
                    self.successes.append(monotonic())

    def finish(self) -> None:
        """End."""
        self._stopping.set()
        if self.is_alive():
            self.join()


@dataclass(slots=True)
class Report(AnyReport):
    """The same of nodes of the broker that are killed and frozen."""

    faults: list[str] = field(default_factory=list)
    """Each as `SIGKILL node 1`."""
    pauses: dict[str, float] = field(default_factory=dict)
    """The longest of each part, in seconds."""

    @property
    def doubts(self) -> list[str]:
        everything = {f"{how} node {number}" for how in FAULTS for number in (1, 2, 3)}
        missing = sorted(everything - set(self.faults))
        too_few = f"{self.messages} messages of {self.goal.messages} were sent"
        return [f"this did not happen: {', '.join(missing)}"] * bool(missing) + [too_few] * (
            self.messages < self.goal.messages
        )

    @property
    def faults_in_words(self) -> str:
        return f"{len(self.faults)} faults of nodes"

    def measured(self) -> list[str]:
        return ["longest pauses: " + ", ".join(f"{who} {pause:.1f} s" for who, pause in self.pauses.items())]


class Cluster:
    """The system, from its start to its end, as a context manager."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self._folder = folder
        self._workload = workload
        self._cleanup = ExitStack()
        self.services = Embedded(folder, durable=False)
        """PostgreSQL, and the store of answers."""

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.enter_context(self.services)
            self.engine = connect(self.services.database_url)
            cleanup.callback(self.engine.dispose)
            migrations.upgrade(self.engine)
            migrations.grant(self.engine)
            self.store = cleanup.enter_context(closing(redis.Redis.from_url(self.services.broker.url)))
            nodes = self._folder / "rabbitmq"
            nodes.mkdir()
            self.nodes = cleanup.enter_context(rabbitmq.cluster(as_recommended=True, folder=nodes))
            self.url = ";".join(node.url for node in self.nodes)
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _start(self, cleanup: ExitStack) -> None:
        api_port, ports = free_port(), {f"worker-{number}": free_port() for number in (1, 2)}
        self.workers = [
            self._child(
                cleanup,
                name,
                *celery("worker"),
                "--hostname",
                f"{name}@nemesis",
                HOLDFAST_METRICS_ADDRESS=f"127.0.0.1:{port}",
            )
            for name, port in ports.items()
        ]
        self.beat = self._child(cleanup, "beat", sys.executable, "-c", BEAT)
        uvicorn = ("-m", "uvicorn", "api_stub.app:app", "--port", str(api_port), *API_OPTIONS)
        reader = {"HOLDFAST_DATABASE_URL": self.services.reader_url, "HOLDFAST_JWT_SECRET": SECRET}
        self.api = self._child(cleanup, "api", sys.executable, *uvicorn, **reader)
        self.watches = [Watch(name, f"http://127.0.0.1:{port}") for name, port in ports.items()]
        for watch in self.watches:
            cleanup.callback(watch.finish)
        runner = cleanup.enter_context(asyncio.Runner())
        client = cleanup.enter_context(closing(Client(self.url)))
        async_client = AsyncClient(self.url)
        cleanup.callback(lambda: asyncio.run(async_client.close()))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        api_url = f"http://127.0.0.1:{api_port}"
        api = httpx.Client(base_url=api_url, headers=headers, trust_env=False, timeout=70)
        cleanup.enter_context(api)
        self.senders = [
            Sender("client", by_client(client), self._workload),
            Sender("async-client", by_async_client(async_client, runner), self._workload),
            Sender("api", by_api(api), self._workload),
        ]
        for sender in self.senders:
            cleanup.callback(sender.finish)

    def _child(self, cleanup: ExitStack, name: str, *argv: str, **settings: str) -> Process:
        own = {
            "HOLDFAST_DATABASE_URL": self.services.worker_url,
            "HOLDFAST_BROKER_URL": self.url,
            "HOLDFAST_RESULT_URL": self.services.broker.url,
            **settings,
        }
        process = Fork(name, argv, self._folder, env=environment(**own), cwd=self._folder)
        cleanup.callback(process.kill)
        process.start()
        return process

    def successes(self) -> dict[str, list[float]]:
        """When each part had done something, by its name."""
        file = self._folder / SENT_FILE
        sent = [float(line) for line in file.read_text().splitlines()] if file.exists() else []
        found = {watch.name: list(watch.successes) for watch in self.watches}
        found |= {sender.name: list(sender.successes) for sender in self.senders}
        return found | {"beat": sent}

    def waiting(self) -> dict[str, int]:
        """How many messages are in each queue, and those that workers hold; and how many wait in the database."""
        rows = json.loads(self.nodes[0].control("--silent", "--formatter=json", "list_queues", "name", "messages"))
        found = {row["name"]: int(row["messages"]) for row in rows if row["name"].startswith("credits")}
        [(found[WAITING],)] = sql(self.engine, f"SELECT count(*) FROM {WAITING}")
        return found

    def is_drained(self) -> bool:
        return not any(self.waiting().values())

    def is_nothing_due(self) -> bool:
        [(due,)] = sql(self.engine, "SELECT count(*) FROM wallets WHERE scheduled_at <= clock_timestamp()")
        return bool(due == 0)

    def is_whole(self) -> bool:
        """Whether each node takes connections, and sees all others."""
        if not all(node.answers() for node in self.nodes):
            return False
        try:
            told = [json.loads(node.control("--formatter=json", "cluster_status")) for node in self.nodes]
        except (CalledProcessError, json.JSONDecodeError):  # it starts just now
            return False
        return all(len(one["running_nodes"]) == 3 and not one["partitions"] for one in told)

    def ended(self) -> list[str]:
        """Who is not there, although nobody has killed it."""
        children = [*self.workers, self.beat, self.api]
        return [f"{child.name}: {child.last_words()[:500]}" for child in children if not child.is_running]


def start(node: RabbitMQ) -> None:
    """Start it; once more, as Compose does, if it ends: it may fail to get the tables of the others."""
    try:
        node.start()
    except ServiceError:
        node.start()


@contextmanager
def fault(how: str, node: RabbitMQ) -> Iterator[None]:
    """A node that is gone, and back at the end."""
    if how == "SIGKILL":
        node.server.kill()
        yield
        start(node)
    else:
        assert node.server.pid is not None
        with suspended(node.server.pid):
            yield


def longest_pause(successes: Sequence[float], since: float, until: float) -> float:
    """The longest time without a success between the two moments."""
    within = [since, *(moment for moment in successes if since < moment < until), until]
    return max(after - before for before, after in pairwise(within))


def run(seed: int, goal: Goal, folder: Path, *, say: Callable[[str], None] = lambda _line: None) -> Report:
    """Run it in `folder`, which every account can enter. What it starts has ended when this returns or raises."""
    report = Report(seed, goal, folder)
    began_at = monotonic()

    def note(line: str) -> None:
        report.history.append(f"{monotonic() - began_at:8.2f} s  {line}")
        say(report.history[-1])

    with ExitStack() as cleanup:
        workload = Workload(seed, datetime.now(UTC), flood=0)
        cluster = cleanup.enter_context(Cluster(folder, workload))
        rate = 1.5 * goal.messages / goal.seconds
        producer = ClusterProducer(cluster.url, workload, seed=seed, messages_per_s=rate)
        cleanup.enter_context(closing(producer))
        opening = workload.opening()
        try:
            producer.send(opening)
            if not wait(cluster.is_drained, READY_WITHIN_S * goal.patience):
                raise TimeoutError(f"the opening was not applied in time: {cluster.waiting()}")
            for thread in (producer, *cluster.watches, *cluster.senders):
                thread.start()
            note("everything runs")
            _strike(cluster, producer, report, note)
            note("no more faults")
            sent = _recover(cluster, producer, workload, report, note)
            report.messages, report.sends = len(sent) - len(opening), sum(one.calls for one in sent)
        except Exception as error:  # noqa: BLE001 - what happened until then is worth a report
            report.findings.append(Finding("broken", "".join(traceback.format_exception(error))))
    return report


def _strike(cluster: Cluster, producer: ClusterProducer, report: Report, note: Callable[[str], None]) -> None:
    goal, random, pause = report.goal, Random(report.seed), Event()
    ends_at = monotonic() + goal.seconds
    while True:
        for how in FAULTS:
            for number, node in enumerate(cluster.nodes, 1):
                pause.wait(CALM_S)
                since, down_s = monotonic(), random.uniform(*DOWN_S[how])
                with fault(how, node):
                    note(f"{how} node {number}, for {down_s:.1f} s")
                    pause.wait(down_s)
                if not wait(cluster.is_whole, HEALED_WITHIN_S * goal.patience):
                    note(f"node {number} stays apart from the others, and is restarted")
                    node.server.kill()
                    start(node)
                if not wait(cluster.is_whole, WHOLE_WITHIN_S * goal.patience):
                    raise TimeoutError(f"the cluster was not whole again after {how} of node {number}")
                pauses = {who: longest_pause(at, since, monotonic()) for who, at in cluster.successes().items()}
                note("whole again; pauses: " + ", ".join(f"{who} {pause:.1f} s" for who, pause in pauses.items()))
                report.faults.append(f"{how} node {number}")
                report.pauses = {who: max(longest, report.pauses.get(who, 0)) for who, longest in pauses.items()}
                report.findings += [Finding("process", f"it ended by itself: {who}") for who in cluster.ended()]
                for error in (producer.error, *(sender.error for sender in cluster.senders)):
                    if error is not None:
                        raise error
                if report.findings:
                    return
        if monotonic() > ends_at:
            break
    report.findings += [
        Finding("pause", f"{who} did nothing for {longest:.1f} s")
        for who, longest in report.pauses.items()
        if longest > LONGEST_PAUSE_S * goal.patience
    ]


def _recover(
    cluster: Cluster, producer: ClusterProducer, workload: Workload, report: Report, note: Callable[[str], None]
) -> list[Sent]:
    """Wait for the end of it all, and look. Returns what was sent."""
    patience, well_since = report.goal.patience, monotonic()
    producer.finish()
    sent = [*producer.sent.values(), *(one for sender in cluster.senders for one in sender.finish())]
    for watch in cluster.watches:
        watch.finish()
    if wait(cluster.is_drained, DRAINED_WITHIN_S * patience):
        report.drained_after_s = monotonic() - well_since
        note("drained")
    else:
        report.findings.append(Finding("drain", f"not drained in time: {cluster.waiting()}"))
    _ask_again(cluster, producer, report, note)
    rest_s = max(0.0, (workload.last_anchor - datetime.now(UTC)).total_seconds())
    wait(lambda: datetime.now(UTC) > workload.last_anchor, rest_s + 1)
    [(due_until,)] = sql(cluster.engine, "SELECT clock_timestamp()")
    if not wait(cluster.is_nothing_due, DUE_WITHIN_S * patience):
        report.findings.append(Finding("drain", f"what is due is not posted within {DUE_WITHIN_S * patience:g} s"))
    cluster.beat.kill()
    wait(cluster.is_drained, DRAINED_WITHIN_S * patience)
    report.findings += [finding for worker in cluster.workers for finding in terminate(worker, patience)]
    if not cluster.is_drained():
        report.findings.append(Finding("drain", f"something was left behind: {cluster.waiting()}"))
    report.findings += checker.check(sent, checker.observe(cluster.engine, cluster.store, due_until))
    return sent


def _ask_again(cluster: Cluster, producer: ClusterProducer, report: Report, note: Callable[[str], None]) -> None:
    """As engines do: whoever confirms late is asked once more."""
    unanswered = checker.unanswered(producer.sent.values(), checker.answers(cluster.store))
    producer.send(sent.message for sent in unanswered)
    note(f"asked again for the answers to {len(unanswered)} starts")
    if not wait(cluster.is_drained, DRAINED_WITHIN_S * report.goal.patience):
        report.findings.append(Finding("drain", f"not drained after asking again: {cluster.waiting()}"))
