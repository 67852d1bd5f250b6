"""Another Celery application on the same broker: its messages are its own, ours are ours, and neither notices."""

import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import redis
from celery import Celery
from kombu.entity import Queue

from holdfast_client.client import Client
from tests.acceptance import commands
from tests.installation import (
    IMPATIENT_WORKER,
    Installation,
    Producer,
    celery,
    environment,
    exit_code,
)
from tests.support import PATIENCE_S, eventually, raw
from worker.local.process import Process
from worker.transport import UNACKED, UNACKED_INDEX

ROOT = Path(__file__).parents[2]


def programs(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


_, PRODUCER = programs("README.md")
[RABBITMQ_PRODUCER] = programs("docs/operating.md")

MESSAGES, TASKS = 200, 50
ONCE = Counter(["archive-0", *(f"render-{number}" for number in range(TASKS))])

# A stock worker with default settings. Its tasks tell Redis that they ran; the late one waits until it is told to end.
ENGINE = """
import sys
from celery import Celery
from redis import Redis

engine = Celery("engine", broker=sys.argv[1])
diary = Redis.from_url(sys.argv[2])

@engine.task(name="engine.render")
def render(number):
    diary.rpush("ran", f"render-{number}")

@engine.task(name="engine.archive", acks_late=True)
def archive(number):
    diary.rpush("ran", f"archive-{number}")
    diary.blpop("end", timeout=60)

engine.worker_main(["worker", "--concurrency", "2"])
"""

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


@contextmanager
def engine_at(broker_url: str, installation: Installation) -> Iterator[tuple[Celery, Process]]:
    """The other application: its producer, and its worker, which takes tasks."""
    worker = installation.start("engine", sys.executable, "-c", ENGINE, broker_url, installation.broker_url)
    with closing(Celery("engine", broker=broker_url, set_as_current=False)) as app:
        eventually(lambda: app.control.ping(timeout=1, limit=1))
        yield app, worker


def start_ours(installation: Installation, broker_url: str, *argv: str) -> Process:
    settings = {"HOLDFAST_BROKER_URL": broker_url, "HOLDFAST_RESULT_URL": installation.broker_url}
    return installation.start("worker", *(argv or celery("worker")), **settings)


def run_producer(program: str, broker_url: str) -> None:
    """Run what a page shows: as it stands, and its last line again for other workflows."""
    *_, sending = program.splitlines()
    other = re.sub(r'"run-\d"', 'f"other-{number}"', sending)
    again = f"for number in range({MESSAGES - 1}):\n    {other}\n"
    subprocess.run(
        [sys.executable, "-c", program + again],
        env=environment(HOLDFAST_BROKER_URL=broker_url, HOLDFAST_ENGINE_BROKER_URL=broker_url),
        check=True,
        timeout=PATIENCE_S,
    )


def ran(diary: redis.Redis) -> Counter[str]:
    return Counter(raw(name).decode() for name in diary.lrange("ran", 0, -1))


def leave_behind(installation: Installation, taken_at: float) -> None:
    """What a worker of ours has left that took `late` then, and died."""
    with closing(Producer(installation.broker_url)) as producer:
        finish = {"org_id": "acme", "workflow_id": "late", "credits": 80}
        producer.celery.send_task("workflow.finish", args=[finish], queue="staging")
    broker = installation.broker
    item = raw(broker.rpop("staging"))
    broker.hset(UNACKED, "late", b'[%s, "", "credits"]' % item)
    broker.zadd(UNACKED_INDEX, {"late": taken_at})


# Messages


def test_on_redis_each_takes_and_restores_its_own(installation: Installation) -> None:
    broker, url = installation.broker, installation.broker_url
    with engine_at(url, installation) as (engine, _):
        worker = start_ours(installation, url, sys.executable, "-c", IMPATIENT_WORKER)
        engine.send_task("engine.archive", args=[0])
        for number in range(TASKS):
            engine.send_task("engine.render", args=[number])
        run_producer(PRODUCER, url)
        eventually(lambda: len(list(ran(broker).elements())) == 1 + TASKS and broker.hlen("unacked") == 1)
        [archive] = map(raw, broker.zrange("unacked_index", 0, -1))
        taken_at = broker.zscore("unacked_index", archive)
        assert taken_at is not None
        # What ours finds timed out now was taken when the neighbour's was.
        leave_behind(installation, taken_at)
        eventually(lambda: installation.count("credit_events") == MESSAGES + 1)
        assert broker.hkeys("unacked") == [archive]
        broker.rpush("end", "now")
        eventually(lambda: broker.hlen("unacked") == 0)
        assert ran(broker) == ONCE
        assert eventually(installation.is_drained)
        assert worker.is_running
        assert broker.llen("celery") == 0
    assert installation.is_sound(events=MESSAGES + 1)


def test_on_rabbitmq_each_takes_its_own(installation: Installation, rabbitmq_url: str) -> None:
    with engine_at(rabbitmq_url, installation) as (engine, _):
        worker = start_ours(installation, rabbitmq_url)
        with Client(rabbitmq_url, result_url=installation.broker_url) as client:
            client.grant(org_id="acme", grant_id="gift", credits=1, wait_s=PATIENCE_S)
        engine.send_task("engine.archive", args=[0])
        for number in range(TASKS):
            engine.send_task("engine.render", args=[number])
        run_producer(RABBITMQ_PRODUCER, rabbitmq_url)
        installation.broker.rpush("end", "now")
        eventually(lambda: installation.count("credit_events") == MESSAGES + 1)
        eventually(lambda: len(list(ran(installation.broker).elements())) == 1 + TASKS)
        assert ran(installation.broker) == ONCE
        assert worker.is_running
    assert installation.is_sound(events=MESSAGES + 1)


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest, installation: Installation) -> str:
    """Each of the two brokers."""
    return installation.broker_url if request.param == "redis" else request.getfixturevalue("rabbitmq_url")


def test_routes_may_name_the_queue(broker_url: str) -> None:
    ledger: object = "credits" if broker_url.startswith("redis") else {"queue": Queue("credits", no_declare=True)}
    with Client(broker_url) as client, closing(Celery(broker=broker_url, set_as_current=False)) as engine:
        client.grant(org_id="acme", grant_id="gift", credits=1)
        engine.conf.task_routes = {"workflow.*": ledger, "wallet.*": ledger}
        for task in ("wallet.grant", "workflow.finish", "engine.render"):
            engine.send_task(task, args=[{}])
        eventually(lambda: client.waiting()["credits"].messages == 3)


# Remote control


def test_what_the_neighbour_tells_its_workers_ours_do_not_hear(installation: Installation, broker_url: str) -> None:
    env = {**installation.environment, "HOLDFAST_BROKER_URL": broker_url}
    name = f"celery@{socket.gethostname()}"  # of the neighbour, too
    with (
        engine_at(broker_url, installation) as (engine, neighbour),
        Client(broker_url, result_url=installation.broker_url) as client,
    ):
        worker = start_ours(installation, broker_url)
        client.grant(org_id="acme", grant_id="first", credits=1, wait_s=PATIENCE_S)
        assert len(engine.control.ping(timeout=1)) == 1
        engine.control.add_consumer("engine.own")
        engine.control.cancel_consumer("credits")
        engine.control.shutdown()
        assert exit_code(neighbour) == 0
        engine.send_task("engine.render", args=[0], queue="engine.own")
        # As docker-compose.yml asks.
        assert commands.run("consuming", "--wait-s", "10", env=env).stdout == f"{name} takes messages.\n"
        assert client.grant(org_id="acme", grant_id="second", credits=1, wait_s=PATIENCE_S).available == 2
        assert worker.is_running
    assert installation.is_sound(events=2)
