"""The Redis transport takes messages in batches and acknowledges them: a real server, a stock producer."""

import time

import pytest
import redis
from celery import Celery

from tests.integration.transport.kombu_worker import QUEUE, SECOND, held, lay_down, numbers, send, working
from tests.support import PATIENCE_S
from worker.transport import MOST_TAKEN, UNACKED

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine


def test_what_a_stock_producer_sends_arrives_in_order_and_is_gone_once_acknowledged(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(50))
    with working(broker_url) as worker:
        assert numbers(worker.receive(50)) == list(range(50))
        assert {message.headers["task"] for message in worker.received} == {"workflow.start"}
        assert (broker.llen(QUEUE), held(broker)) == (0, 50)
        worker.acknowledge()
        assert broker.keys() == broker.keys("_kombu.binding*")
        send(producer, 50)
        assert numbers(worker.receive(1)) == [50]


def test_one_step_takes_no_more_than_the_limit_and_no_more_than_the_prefetch(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    item = lay_down(producer, broker)
    broker.lpush(QUEUE, *[item] * (2 * MOST_TAKEN))
    with working(broker_url, prefetch=MOST_TAKEN + 7) as worker:
        worker.run(lambda: worker.received)
        assert len(worker.received) == MOST_TAKEN
        worker.receive(MOST_TAKEN + 7)
        idle_until = time.monotonic() + 1.5
        worker.run(lambda: time.monotonic() > idle_until)
        assert (len(worker.received), held(broker)) == (MOST_TAKEN + 7, MOST_TAKEN + 7)
        worker.acknowledge()
        worker.receive(MOST_TAKEN - 7)


def test_a_batch_is_taken_in_one_command_and_acknowledged_in_two(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(100))
    with working(broker_url) as worker:
        broker.config_resetstat()
        worker.receive(100)
        worker.acknowledge()
        stats = broker.info("commandstats")
        assert stats["cmdstat_zrem"]["calls"] == stats["cmdstat_hdel"]["calls"] == 1
        assert stats["cmdstat_hset"]["calls"] == stats["cmdstat_zadd"]["calls"] == 1


def test_an_idle_worker_waits_and_does_not_poll(broker_url: str, broker: redis.Redis) -> None:
    with working(broker_url) as worker:
        broker.config_resetstat()
        idle_since = time.monotonic()
        worker.run(lambda: broker.info("commandstats").get("cmdstat_blmove", {"calls": 0})["calls"] >= 6)
        assert time.monotonic() - idle_since > 1.5  # two queues, a wait of a second each


def test_a_waiting_worker_is_woken_by_the_message(
    broker_url: str, producer: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.transport.WAIT_S", 10 * PATIENCE_S)  # so that nothing comes with the end of a wait
    with working(broker_url) as worker:
        worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
        for number, queue in enumerate((QUEUE, SECOND, QUEUE)):
            producer.send_task("workflow.start", args=[number], queue=queue)
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()


def test_a_message_with_a_priority_is_taken_too(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, 1, priority=9)
    send(producer, 2, priority=3)
    with working(broker_url) as worker:
        assert sorted(numbers(worker.receive(2))) == [1, 2]
        worker.acknowledge()
    assert held(broker) == 0


def test_every_key_has_the_prefix(broker_url: str, broker: redis.Redis) -> None:
    options = {"global_keyprefix": "ledger:"}
    with Celery(broker=broker_url, set_as_current=False) as producer:
        producer.conf.broker_transport_options = options
        send(producer, 1)
    with working(broker_url, **options) as worker:
        broker.lpush(f"ledger:{QUEUE}", "no message")
        worker.receive(2)
        assert {key.split(b":")[0] for key in broker.scan_iter()} == {b"ledger"}
        assert broker.hlen(f"ledger:{UNACKED}") == 2
        worker.acknowledge()
        assert broker.keys() == broker.keys("ledger:_kombu.binding*")
