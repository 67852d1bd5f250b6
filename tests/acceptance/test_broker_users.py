"""What the broker's users may do, on the server that `holdfast up` starts: an engine sends and is answered, no more."""

import asyncio
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis
from celery import Celery

from holdfast_client.async_client import AsyncClient
from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client
from tests.installation import Installation, Producer, installed_on, open_folder, wait_for_workers
from tests.support import PATIENCE_S, eventually
from worker.local.broker import Broker

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine

FORBIDDEN_TO_ALL = [
    "CONFIG GET requirepass",
    "CONFIG SET appendonly no",
    "FLUSHALL",
    "FLUSHDB",
    "DEBUG SLEEP 0",
    "SHUTDOWN NOSAVE",
    "ACL LIST",
    "ACL SETUSER engine +@all",
    "KEYS *",
    "SCAN 0",
    "MONITOR",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "REPLICAOF 127.0.0.1 1",
    "MODULE LIST",
    "PSUBSCRIBE *",
    "SUBSCRIBE other",
    "GET other",
    "SET other 1",
    "SWAPDB 0 1",
]
ANSWER = "celery-task-meta-7f3c1f0e-6f0a-4d0c-9d55-2f6c0c0f2f11"
FORBIDDEN_TO_ENGINES = [
    "LPUSH credits x",
    "RPUSH credits x",
    "LPUSH credits.unacked x",
    "LPUSH credits.enginex x",
    "LPUSH credits.engineAB3 x",
    "SELECT 1",
    "LPUSH _kombu.binding.credits x",
    "LPUSH _kombu.binding.credits.engine x",
    "SADD _kombu.binding.credits x",
    "SADD credits.engine x",
    "RPUSH credits.engine x",
    "LRANGE credits.engine 0 -1",
    "LINDEX credits.engine -1",
    "RPOP credits.engine",
    "BRPOP credits.engine 1",
    "BLMOVE credits.engine credits.engine RIGHT RIGHT 1",
    "LLEN credits",
    "DEL credits.engine",
    "RENAME credits.engine credits",
    "HGETALL credits.unacked",
    "GET celery-task-meta-1",
    f"SUBSCRIBE celery-task-meta-{'x' * 37}",
    f"SET {ANSWER} forged",
    f"SETEX {ANSWER} 9 forged",
    f"APPEND {ANSWER} forged",
    f"LPUSH {ANSWER} forged",
    f"PUBLISH {ANSWER} forged",
    "PUBLISH /0.holdfast.pidbox x",
    "SUBSCRIBE /0.holdfast.pidbox",
    "SUBSCRIBE /0.celeryev",
    "SMEMBERS _kombu.binding.holdfast.pidbox",
    "SADD _kombu.binding.holdfast.pidbox x",
    "PSUBSCRIBE celery-task-meta-*",
    "EVAL return 0",
    "INFO",
]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with open_folder() as folder:
        server = Broker(folder)
        server.start()
        yield server
        server.stop()


@pytest.fixture
def ledger(broker: Broker, database_url: str) -> Iterator[Installation]:
    """A ledger all of whose parts are the user `holdfast`."""
    url = broker.url_of("holdfast")
    with installed_on(database_url, url) as own, closing(Producer(url)) as control:
        own.start_worker()
        control.celery.conf.broker_transport = "worker.transport:Transport"
        wait_for_workers(control)
        yield own


def test_engines_send_and_are_answered_and_nothing_of_ours_is_refused(ledger: Installation, broker: Broker) -> None:
    url = broker.url_of("engine")
    with Client(ledger.broker_url) as billing, Client(url, queue=ENGINE_QUEUE) as engine:
        billing.grant(org_id="acme", grant_id="gift", credits=100, wait_s=PATIENCE_S)
        assert billing.sees_worker() is True
        assert engine.start(org_id="acme", workflow_id="run", credits=5, wait_s=PATIENCE_S).holds
        with engine.batch() as batch:
            batch.finish(org_id="acme", workflow_id="run", credits=5)
        eventually(lambda: billing.waiting()[ENGINE_QUEUE].messages == 0)
    asyncio.run(_start_and_cancel(url))
    with Celery(broker=url, backend=url, set_as_current=False) as stock:
        for priority in (0, 3, 9):
            fields = {"org_id": "acme", "workflow_id": f"stock-{priority}", "credits": 5}
            sent = stock.send_task(
                "workflow.finish", args=[fields], queue=ENGINE_QUEUE, ignore_result=False, priority=priority
            )
            assert sent.get(timeout=PATIENCE_S)["outcome"] == "settled"
            sent.forget()
        stock.backend.result_consumer.stop()
        stock.backend.client.close()
    eventually(ledger.is_drained)
    with redis.Redis.from_url(broker.url) as administrator:
        refused = {(entry["username"], entry["object"]) for entry in administrator.acl_log()}
    assert refused <= {("engine", "info")}, "the client asks what server it is, if it may"


async def _start_and_cancel(engine_url: str) -> None:
    async with AsyncClient(engine_url, queue=ENGINE_QUEUE) as engine:
        calls = (engine.start(org_id="acme", workflow_id=f"at-once-{n}", credits=5, wait_s=PATIENCE_S) for n in (1, 2))
        assert [answer.outcome for answer in await asyncio.gather(*calls)] == ["reserved"] * 2
        assert (await engine.cancel(org_id="acme", workflow_id="at-once-1", wait_s=PATIENCE_S)).state == "cancelled"


@pytest.mark.parametrize(
    ("user", "forbidden"),
    [
        ("engine", [*FORBIDDEN_TO_ALL, *FORBIDDEN_TO_ENGINES]),
        ("holdfast", FORBIDDEN_TO_ALL),
    ],
)
def test_whatever_else_is_refused(user: str, forbidden: list[str], broker: Broker) -> None:
    with redis.Redis.from_url(broker.url_of(user)) as client:
        for command in forbidden:
            name, *arguments = command.split()
            arguments = ["return 0", "0"] if name == "EVAL" else arguments
            with pytest.raises(redis.ResponseError, match=r"[Nn]o permissions|not allowed"):
                pytest.fail(f"{user} may do {command}: {client.execute_command(name, *arguments)!r}")


def test_who_names_no_user_may_do_nothing(broker: Broker) -> None:
    port = broker.url.rsplit(":", 1)[1]
    with redis.Redis.from_url(f"redis://127.0.0.1:{port}") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
