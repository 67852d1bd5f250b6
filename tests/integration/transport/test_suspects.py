"""Messages that end their workers: the Redis transport counts what it restores, and takes suspects alone."""

import json
import time
from itertools import count

import pytest
import redis
from celery import Celery

from holdfast_client.messages import DELIVERY_LIMIT, SUSPECT
from tests.integration.transport.kombu_worker import (
    QUEUE,
    SECOND,
    Worker,
    give_up,
    held,
    numbers,
    send,
    time_out,
    told,
    working,
)
from tests.support import raw
from worker.transport import DELIVERED_TOO_OFTEN, TAKES_MANY, TAKES_ONE, SetAside

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine


def restored(broker: redis.Redis) -> list[int]:
    """How often each entry of the queue was restored, the next one first."""
    entries = broker.lrange(QUEUE, 0, -1)
    return [json.loads(entry).get("restored", 0) for entry in reversed(entries)]


def test_a_message_that_a_dead_worker_held_is_counted_and_otherwise_as_it_was(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(3))
    entries = broker.lrange(QUEUE, 0, -1)
    for times in range(1, SUSPECT):
        give_up(broker_url, broker, 3)
        assert restored(broker) == [times] * 3
    kept = map(raw, broker.lrange(QUEUE, 0, -1))
    assert [entry.replace(b'"restored": 2, ', b"") for entry in kept] == entries
    with working(broker_url) as worker:
        assert numbers(worker.receive(3)) == [0, 1, 2]
        worker.acknowledge()


def test_a_message_that_a_worker_gives_back_is_not_counted(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(3))
    for _ in range(5):
        with working(broker_url) as worker:
            worker.receive(3)
    assert restored(broker) == [0, 0, 0]


def test_a_suspect_is_taken_alone_so_that_its_neighbours_are_not_counted(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(10))
    for _ in range(SUSPECT):
        give_up(broker_url, broker, 10)
    with working(broker_url) as worker:
        for number in range(4):  # the fifth one ends its workers
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()
    send(producer, 10)
    for times in range(SUSPECT + 1, DELIVERY_LIMIT + 1):
        give_up(broker_url, broker, 1)
        assert restored(broker) == [times, *[SUSPECT] * 5, 0]
    with working(broker_url) as worker:
        [poison] = worker.receive(1)
        assert isinstance(poison, SetAside)
        assert (poison.headers["task"], poison.problem) == ("workflow.start", DELIVERED_TOO_OFTEN)
        assert json.loads(poison.body)[0] == [4]
        worker.acknowledge()
        for number in range(5, 11):
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_a_suspect_waits_for_what_a_worker_holds_and_is_taken_when_that_is_acknowledged(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, 1)
    for _ in range(SUSPECT):
        give_up(broker_url, broker, 1)
    suspect = raw(broker.rpop(QUEUE))
    send(producer, 2)
    broker.lpush(QUEUE, suspect)
    send(producer, 3)
    with working(broker_url) as worker:
        assert numbers(worker.receive(1)) == [2]
        broker.config_resetstat()
        idle_until = time.monotonic() + 1.5
        worker.run(lambda: time.monotonic() > idle_until)
        assert len(worker.received) == 1
        asked = broker.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
        assert asked < 10, "it asks again and again"
        worker.acknowledge()
        assert numbers(worker.receive(1)) == [1]
        worker.acknowledge()
        assert numbers(worker.receive(1)) == [3]
        worker.acknowledge()
    assert held(broker) == 0


def test_what_arrives_in_another_queue_does_not_put_off_a_suspect(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, 1)
    for _ in range(SUSPECT):
        give_up(broker_url, broker, 1)
    suspect = raw(broker.rpop(QUEUE))
    producer.send_task("workflow.start", args=[2], queue=SECOND)
    with working(broker_url) as worker:
        assert numbers(worker.receive(1)) == [2]
        broker.lpush(QUEUE, suspect)
        worker.run(lambda: worker.channel._next_in == QUEUE)
        for number in (3, 4):
            producer.send_task("workflow.start", args=[number], queue=SECOND)
        worker.acknowledge()
        assert numbers(worker.receive(1)) == [1]
        worker.acknowledge()
        assert numbers(worker.receive(2)) == [3, 4]
        worker.acknowledge()
    assert held(broker) == 0


def test_suspects_in_one_queue_do_not_put_off_what_arrives_in_another(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    for busy, other in ((QUEUE, SECOND), (SECOND, QUEUE)):
        for number in range(20):
            producer.send_task("workflow.start", args=[number], queue=busy)
            entry = broker.rpop(busy)
            assert isinstance(entry, bytes)
            broker.lpush(busy, b'{"restored": %d, %s' % (SUSPECT, entry[1:]))
        with working(broker_url) as worker:
            taken = [*numbers(worker.receive(1))]
            for number in (100, 101):
                producer.send_task("workflow.start", args=[number], queue=other)
            while len(taken) < 22:
                worker.acknowledge()
                worker.run(lambda worker=worker: worker.received)
                taken += numbers(worker.received)
            worker.acknowledge()
        assert max(taken.index(100), taken.index(101)) < 8


def test_what_is_given_back_goes_to_the_queue_that_it_was_taken_from_whatever_its_sender_says(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    producer.send_task("workflow.start", args=[1], queue=SECOND)
    forged = json.loads(raw(broker.rpop(SECOND)))
    forged["properties"]["delivery_info"] = {"exchange": "", "routing_key": QUEUE}
    broker.lpush(SECOND, json.dumps(forged), json.dumps(forged) + '", "", "credits"]')
    for _ in range(2):
        with working(broker_url) as worker:
            worker.receive(2)
        assert (broker.llen(SECOND), broker.llen(QUEUE)) == (2, 0)
    worker = Worker(broker_url)
    worker.receive(2)
    worker.is_killed()
    time_out(broker)
    with working(broker_url, visibility_timeout=1) as worker:
        worker.receive(2)
        assert broker.llen(QUEUE) == 0
        worker.acknowledge()


def test_that_messages_are_taken_alone_is_told_once_and_that_it_is_over_too_and_each_is_counted(
    broker_url: str, broker: redis.Redis, producer: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    send(producer, *range(10))
    for _ in range(SUSPECT):
        give_up(broker_url, broker, 10)
    entries = broker.lrange(QUEUE, 0, -1)
    send(producer, *range(10, 15))
    suspects = count()
    with working(broker_url) as worker:
        worker.channel.on_suspect = suspects.__next__
        for _ in range(10):
            worker.receive(1)
            worker.acknowledge()
        assert told(caplog) == [TAKES_ONE]
        worker.receive(5)
        worker.acknowledge()
        assert told(caplog) == [TAKES_ONE, TAKES_MANY]
        broker.rpush(QUEUE, *entries[:2])
        for _ in range(2):
            worker.receive(1)
            worker.acknowledge()
        worker.run(lambda: len(told(caplog)) == 4)  # nothing more has come
        assert told(caplog) == [TAKES_ONE, TAKES_MANY] * 2
    assert next(suspects) == 12


def test_what_a_living_worker_holds_does_not_time_out(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    """However long the database is away."""
    send(producer, *range(3))
    with working(broker_url, visibility_timeout=2) as worker:
        worker.receive(3)
        held_until = time.monotonic() + 5
        worker.run(lambda: time.monotonic() > held_until)
        assert (len(worker.received), held(broker), broker.llen(QUEUE)) == (3, 3, 0)
        worker.acknowledge()
