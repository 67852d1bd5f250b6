"""What a worker of the Redis transport holds is delivered again, whatever is killed, and by nobody else."""

import json
import time

import pytest
import redis
from celery import Celery
from kombu.entity import Exchange, Queue

from tests.installation import closing_broker, open_folder
from tests.integration.transport.kombu_worker import (
    OURS,
    QUEUE,
    SECOND,
    Worker,
    a_broker_of_its_own,
    changed,
    held,
    lay_down,
    numbers,
    send,
    time_out,
    told,
    working,
)
from tests.support import eventually, raw
from worker.broker import create_celery
from worker.transport import MOST_BYTES, MOST_ENTRY_BYTES, MOST_HELD_BYTES, UNACKED, UNACKED_INDEX

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine


def test_what_a_killed_worker_held_is_delivered_again(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, *range(20))
    killed = Worker(broker_url)
    killed.receive(20)
    killed.is_killed()
    eventually(lambda: held(broker) == 20)
    time_out(broker)
    with working(broker_url) as worker:
        assert numbers(worker.receive(20)) == list(range(20))
        for message in worker.received:
            message.ack()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_a_killed_worker_held_is_delivered_again_though_the_servers_clock_was_set_back(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(20))
    killed = Worker(broker_url)
    killed.receive(20)
    killed.is_killed()
    eventually(lambda: held(broker) == 20)
    a_month_later = time.time() + 31 * 86_400
    broker.zadd(UNACKED_INDEX, dict.fromkeys(map(raw, broker.zrange(UNACKED_INDEX, 0, -1)), a_month_later))
    with working(broker_url, visibility_timeout=1) as worker:
        assert sorted(numbers(worker.receive(20))) == list(range(20))
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


@pytest.mark.parametrize(("first", "second"), [(OURS, None), (None, OURS)], ids=["ours", "stock"])
def test_what_a_worker_holds_one_of_another_application_leaves_alone(
    broker_url: str, broker: redis.Redis, producer: Celery, first: str | None, second: str | None
) -> None:
    keys = {OURS: (UNACKED, UNACKED_INDEX), None: ("unacked", "unacked_index")}
    send(producer, 1)
    killed = Worker(broker_url, transport=first)
    killed.receive(1)
    killed.is_killed()
    messages, index = keys[first]
    eventually(lambda: broker.hlen(messages) == 1)
    kept = broker.hgetall(messages)
    broker.zadd(index, dict.fromkeys(map(raw, kept), 0))
    other_messages, other_index = keys[second]
    broker.hset(other_messages, "its own", next(iter(kept.values())))
    broker.zadd(other_index, {"its own": 0})
    with working(broker_url, transport=second) as worker:
        assert numbers(worker.receive(1)) == [1]
        worker.received[0].ack()
        assert (broker.hgetall(messages), broker.llen(QUEUE)) == (kept, 0)
        assert broker.hlen(other_messages) == 0


def test_who_only_waits_for_an_answer_leaves_alone_what_other_applications_hold(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, 1)
    killed = Worker(broker_url, transport=None)
    killed.receive(1)
    killed.is_killed()
    eventually(lambda: broker.hlen("unacked") == 1)
    broker.zadd("unacked_index", dict.fromkeys(map(raw, broker.hkeys("unacked")), 0))
    with create_celery("test", broker_url, None) as app:
        assert app.control.ping(timeout=0.2) == []
    assert (broker.hlen("unacked"), broker.llen(QUEUE)) == (1, 0)


def test_who_asks_again_and_again_needs_no_more_connections(broker_url: str) -> None:
    """Every question has a queue of its own for its answers. The pool has ten connections."""
    with create_celery("test", broker_url, None) as app:
        assert [app.control.ping(timeout=0.01) for _ in range(30)] == [[]] * 30


def test_a_queue_that_is_given_up_and_taken_again(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    with working(broker_url) as worker:
        worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
        for number in range(20):
            worker.consumer.cancel_by_queue(QUEUE)
            send(producer, number)
            producer.send_task("workflow.start", args=[-1], queue=SECOND)
            assert numbers(worker.receive(1)) == [-1]
            worker.acknowledge()
            worker.consumer.add_queue(Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE))
            worker.consumer.consume()
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()


def test_it_is_delivered_again_soon_after_the_timeout_and_not_before(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(50))
    killed = Worker(broker_url)
    held_since = time.monotonic()
    killed.receive(50)
    killed.is_killed()
    with working(broker_url, visibility_timeout=2) as worker:
        looked_since = time.monotonic()
        worker.receive(50)
        assert time.monotonic() - held_since > 1
        assert time.monotonic() - looked_since < 2 + 8, "kombu's own interval of ten seconds"
        worker.acknowledge()


def test_thousands_are_restored_in_a_few_round_trips_and_in_order(
    broker_url: str, broker: redis.Redis, producer: Celery
) -> None:
    item = lay_down(producer, broker)
    broker.lpush(QUEUE, *[changed(item, headers={"number": number}) for number in range(1_200)])
    killed = Worker(broker_url, prefetch=1_200)
    killed.receive(1_200)
    killed.is_killed()
    time_out(broker)
    calls = broker.info("commandstats")["cmdstat_evalsha"]["calls"]
    with working(broker_url, prefetch=2_000) as worker:
        order = [message.headers["number"] for message in worker.receive(1_200)]
        assert order == list(range(1_200))
        worker.channel.qos.restore_unacked()
        assert (broker.llen(QUEUE), held(broker)) == (1_200, 0)
        # Each idle second has a few more.
        assert broker.info("commandstats")["cmdstat_evalsha"]["calls"] - calls < 1_200 / 10
        worker.received.clear()
        assert [message.headers["number"] for message in worker.receive(1_200)] == order
        worker.acknowledge()


def test_the_servers_clock_decides_when_it_is_delivered_again(
    broker_url: str, broker: redis.Redis, producer: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(producer, 1)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 4e9)
        killed = Worker(broker_url)
        killed.receive(1)
        killed.is_killed()
    [tag] = map(raw, broker.zrange(UNACKED_INDEX, 0, -1))
    taken_at = broker.zscore(UNACKED_INDEX, tag)
    assert taken_at is not None
    assert abs(taken_at - broker.time()[0]) < 60


def test_a_worker_that_stops_gives_back_what_it_holds(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, *range(30))
    with working(broker_url) as worker:
        worker.receive(30)
    assert (broker.llen(QUEUE), held(broker)) == (30, 0)


def test_a_worker_that_holds_messages_survives_the_end_of_its_broker() -> None:
    with open_folder() as folder, closing_broker(folder) as broker:
        broker.start()
        with Celery(broker=broker.url, set_as_current=False) as producer:
            send(producer, *range(10))
        worker = Worker(broker.url)
        worker.receive(10)
        with redis.Redis.from_url(broker.url) as client:  # the kernel has all that it was told
            eventually(lambda: client.info("persistence")["aof_buffer_length"] == 0)
        broker.kill()
        with pytest.raises(worker.connection.connection_errors):
            worker.acknowledge()
        worker.connection.collect()
        with pytest.raises(worker.connection.connection_errors):
            worker.channel.qos.acknowledge(["1"])
        worker.hub.close()
        broker.start()
        with redis.Redis.from_url(broker.url) as client:
            time_out(client)
        with working(broker.url) as next_worker:
            assert sorted(numbers(next_worker.receive(10))) == list(range(10))


def test_whatever_it_holds_is_given_back_and_restored(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    """Kombu marks what it puts back as redelivered; an envelope that it cannot mark it would drop."""
    item = lay_down(producer, broker)
    properties = json.loads(item)["properties"]
    odd = [
        changed(item, headers=None),
        changed(item, headers=[]),
        changed(item, properties={**properties, "delivery_info": None}),
        changed(item, properties={**properties, "delivery_info": [1]}),
        json.dumps({name: value for name, value in json.loads(item).items() if name != "headers"}).encode(),
    ]
    broker.lpush(QUEUE, *odd)
    with working(broker_url) as worker:
        worker.receive(len(odd))
    assert (broker.llen(QUEUE), held(broker)) == (len(odd), 0)
    killed = Worker(broker_url)
    killed.receive(len(odd))
    killed.is_killed()
    time_out(broker)
    with working(broker_url) as worker:
        worker.receive(len(odd))
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_nothing_is_taken_where_not_everything_can_be(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, 1, 2, 3)
    with working(broker_url) as worker:
        broker.set(f"{QUEUE}\x06\x163", "no list")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            worker.channel._take_from(QUEUE)
        assert broker.llen(QUEUE) == 3
        broker.delete(f"{QUEUE}\x06\x163")
        worker.receive(3)
        worker.acknowledge()


def test_a_full_broker_can_be_drained() -> None:
    with a_broker_of_its_own() as (producer, client, worker):
        send(producer, *range(100))
        client.config_set("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("more", "data")
        assert numbers(worker.receive(100)) == list(range(100))
        worker.acknowledge()
        assert held(client) == 0


def test_on_a_full_broker_a_worker_begins_and_gives_back() -> None:
    with open_folder() as folder, closing_broker(folder) as broker:
        broker.start()
        with Celery(broker=broker.url, set_as_current=False) as producer, redis.Redis.from_url(broker.url) as client:
            send(producer, *range(10))
            client.lpush(QUEUE, b"no message")
            client.config_set("maxmemory", 1)
            with working(broker.url) as worker:
                worker.receive(11)
                worker.channel.qos.restore_unacked()
                worker.received.clear()
                worker.receive(11)
                assert numbers(worker.received[:10]) == list(range(10))
                assert worker.received[10].body == b"no message"
                worker.channel.keep_alive([message.delivery_tag for message in worker.received])
                worker.acknowledge()


def test_one_step_takes_no_more_bytes_than_it_may(broker_url: str, producer: Celery, broker: redis.Redis) -> None:
    """Nor does a worker hold more than it may, however many messages that are."""
    item = lay_down(producer, broker)
    size = MOST_ENTRY_BYTES - 1_000
    for number in range(400):
        broker.lpush(QUEUE, changed(item, headers={"number": number, "padding": "x" * size}))
    with working(broker_url) as worker:
        worker.run(lambda: worker.received)
        at_once = MOST_BYTES // size + 1
        assert len(worker.received) == at_once
        idle_until = time.monotonic() + 1.5
        worker.run(lambda: time.monotonic() > idle_until)
        most = MOST_HELD_BYTES // size + at_once
        assert MOST_HELD_BYTES // size < len(worker.received) <= most
        seen: list[int] = []
        while len(seen) < 400:
            worker.run(lambda: worker.received)
            seen += [message.headers["number"] for message in worker.received]
            worker.acknowledge()
        assert seen == list(range(400))
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_a_broker_that_refuses_is_asked_again_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with a_broker_of_its_own() as (producer, client, worker):
        send(producer, 1)
        client.config_set("min-replicas-to-write", 1)
        worker.run(lambda: caplog.records)
        refused_until = time.monotonic() + 2.5
        worker.run(lambda: time.monotonic() > refused_until)
        assert worker.received == []
        client.config_set("min-replicas-to-write", 0)
        worker.receive(1)
        worker.acknowledge()
    assert told(caplog) == [
        "The broker lets no message be taken; trying every second: NOREPLICAS Not enough good replicas to write.",
        "The broker lets messages be taken again",
    ]
