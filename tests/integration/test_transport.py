"""The Redis transport against a real server, fed by stock Celery producers and beside stock kombu workers.

What it leans on in kombu 5.7 is used here as the worker uses it, in kombu's own event loop, so that a kombu that
changes it fails these tests. A worker that is killed is a connection that is forgotten: nothing of it is closed.
"""

import asyncio
import hashlib
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from itertools import count
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import kombu
import pytest
import redis
from celery import Celery
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kombu.asynchronous import Hub, get_event_loop, set_event_loop
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.message import Message
from kombu.messaging import Consumer

from ledger.messages import DELIVERY_LIMIT, MAX_BODY_BYTES, SUSPECT, too_large_entry
from tests.acceptance.installation import environment, open_folder
from tests.support import PATIENCE_S, eventually, raw
from worker.broker import create_celery
from worker.local.embedded import Broker, Embedded, free_port
from worker.transport import (
    DELIVERED_TOO_OFTEN,
    MOST_BYTES,
    MOST_ENTRY_BYTES,
    MOST_HELD_BYTES,
    MOST_TAKEN,
    NO_MESSAGE,
    TAKES_MANY,
    TAKES_ONE,
    UNACKED,
    UNACKED_INDEX,
    Channel,
    SetAside,
    UnsupportedServerError,
    server_problem,
)

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine

OURS = "worker.transport:Transport"
QUEUE, SECOND = "credits", "second"
CLUSTER = {"cluster-enabled": "yes"}
_databases = count(1)


def channel_of(connection: Connection) -> Channel:
    return cast(Channel, connection.default_channel)


class Worker:
    """What a Celery worker does with its transport: one channel, one consumer, kombu's event loop.

    With another transport than ours its channel and its messages are kombu's, which have less.
    """

    def __init__(self, url: str, *, transport: str | None = OURS, prefetch: int = 1_000, **options: Any) -> None:
        self.received: list[Message] = []
        self._previous_loop = get_event_loop()
        self.hub = Hub()
        set_event_loop(self.hub)
        defaults = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 1}
        self.connection = Connection(
            url, transport=transport, transport_options={**defaults, "visibility_timeout": 60, **options}
        )
        self.connection.connect()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.channel = channel_of(self.connection)
        self.channel.basic_qos(0, prefetch, False)
        queues = [Queue(name, Exchange(name), routing_key=name) for name in (QUEUE, SECOND)]
        self.consumer = Consumer(
            self.channel, queues, on_message=self.received.append, accept=["json"], auto_declare=True
        )
        self.consumer.consume()

    def run(self, until: Any) -> None:
        """Run the event loop until something is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, f"not true within {PATIENCE_S:g} s"
            self.hub.run_once()

    def receive(self, number: int) -> list[Message]:
        self.run(lambda: len(self.received) >= number)
        assert len(self.received) == number
        return self.received

    def acknowledge(self) -> None:
        self.channel.qos.acknowledge([message.delivery_tag for message in self.received])
        self.received.clear()

    def close(self) -> None:
        self.connection.close()
        self.hub.close()
        set_event_loop(self._previous_loop)

    def is_killed(self) -> None:
        """Forget everything without a word to the server."""
        self.channel.qos._on_collect.cancel()
        self.channel._disconnect_pools()
        self.hub.close()
        set_event_loop(self._previous_loop)


@contextmanager
def working(url: str, **options: Any) -> Iterator[Worker]:
    worker = Worker(url, **options)
    try:
        yield worker
    finally:
        worker.close()


@pytest.fixture
def url(services: Embedded) -> str:
    """An empty database of the broker."""
    url = services.broker_url.removesuffix("0") + str(1 + next(_databases) % 15)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def broker(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url) as client:
        yield client


@pytest.fixture
def producer(url: str) -> Iterator[Celery]:
    """Stock Celery, as in another company."""
    with Celery(broker=url, set_as_current=False) as app:
        yield app


def send(producer: Celery, *numbers: int, **options: Any) -> None:
    for number in numbers:
        producer.send_task("workflow.start", args=[number], queue=QUEUE, **options)


def numbers(messages: list[Message]) -> list[int]:
    return [json.loads(message.body)[0][0] for message in messages]


def held(broker: redis.Redis) -> int:
    assert broker.hlen(UNACKED) == broker.zcard(UNACKED_INDEX)
    return broker.hlen(UNACKED)


def time_out(broker: redis.Redis) -> None:
    """Have everything that is held look as if it was taken long ago."""
    broker.zadd(UNACKED_INDEX, dict.fromkeys(map(raw, broker.zrange(UNACKED_INDEX, 0, -1)), 0))


# Taking and acknowledging


def test_what_a_stock_producer_sends_arrives_in_order_and_is_gone_once_acknowledged(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(50))
    with working(url) as worker:
        assert numbers(worker.receive(50)) == list(range(50))
        assert {message.headers["task"] for message in worker.received} == {"workflow.start"}
        assert (broker.llen(QUEUE), held(broker)) == (0, 50)
        worker.acknowledge()
        assert broker.keys() == broker.keys("_kombu.binding*")
        send(producer, 50)
        assert numbers(worker.receive(1)) == [50]


def test_one_step_takes_no_more_than_the_limit_and_no_more_than_the_prefetch(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    item = lay_down(producer, broker)
    broker.lpush(QUEUE, *[item] * (2 * MOST_TAKEN))
    with working(url, prefetch=MOST_TAKEN + 7) as worker:
        worker.run(lambda: worker.received)
        assert len(worker.received) == MOST_TAKEN
        worker.receive(MOST_TAKEN + 7)
        idle_until = time.monotonic() + 1.5
        worker.run(lambda: time.monotonic() > idle_until)
        assert (len(worker.received), held(broker)) == (MOST_TAKEN + 7, MOST_TAKEN + 7)
        worker.acknowledge()
        worker.receive(MOST_TAKEN - 7)


def test_a_batch_is_taken_in_one_command_and_acknowledged_in_two(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(100))
    with working(url) as worker:
        broker.config_resetstat()
        worker.receive(100)
        worker.acknowledge()
        stats = broker.info("commandstats")
        assert stats["cmdstat_zrem"]["calls"] == stats["cmdstat_hdel"]["calls"] == 1
        assert stats["cmdstat_hset"]["calls"] == stats["cmdstat_zadd"]["calls"] == 1


def test_an_idle_worker_waits_and_does_not_poll(url: str, broker: redis.Redis) -> None:
    with working(url) as worker:
        broker.config_resetstat()
        idle_since = time.monotonic()
        worker.run(lambda: broker.info("commandstats").get("cmdstat_blmove", {"calls": 0})["calls"] >= 6)
        assert time.monotonic() - idle_since > 1.5  # two queues, a wait of a second each


def test_a_waiting_worker_is_woken_by_the_message(url: str, producer: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.transport.WAIT_S", 10 * PATIENCE_S)  # so that nothing comes with the end of a wait
    with working(url) as worker:
        worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
        for number, queue in enumerate((QUEUE, SECOND, QUEUE)):
            producer.send_task("workflow.start", args=[number], queue=queue)
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()


def test_a_message_with_a_priority_is_taken_too(url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, 1, priority=9)
    send(producer, 2, priority=3)
    with working(url) as worker:
        assert sorted(numbers(worker.receive(2))) == [1, 2]
        worker.acknowledge()
    assert held(broker) == 0


def test_every_key_has_the_prefix(url: str, broker: redis.Redis) -> None:
    options = {"global_keyprefix": "ledger:"}
    with Celery(broker=url, set_as_current=False) as producer:
        producer.conf.broker_transport_options = options
        send(producer, 1)
    with working(url, **options) as worker:
        broker.lpush(f"ledger:{QUEUE}", "no message")
        worker.receive(2)
        assert {key.split(b":")[0] for key in broker.scan_iter()} == {b"ledger"}
        assert broker.hlen(f"ledger:{UNACKED}") == 2
        worker.acknowledge()
        assert broker.keys() == broker.keys("ledger:_kombu.binding*")


# Whatever is killed


def test_what_a_killed_worker_held_is_delivered_again(url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, *range(20))
    killed = Worker(url)
    killed.receive(20)
    killed.is_killed()
    eventually(lambda: held(broker) == 20)
    time_out(broker)
    with working(url) as worker:
        assert numbers(worker.receive(20)) == list(range(20))
        for message in worker.received:
            message.ack()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_a_killed_worker_held_is_delivered_again_though_the_servers_clock_was_set_back(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(20))
    killed = Worker(url)
    killed.receive(20)
    killed.is_killed()
    eventually(lambda: held(broker) == 20)
    a_month_later = time.time() + 31 * 86_400
    broker.zadd(UNACKED_INDEX, dict.fromkeys(map(raw, broker.zrange(UNACKED_INDEX, 0, -1)), a_month_later))
    with working(url, visibility_timeout=1) as worker:
        assert sorted(numbers(worker.receive(20))) == list(range(20))
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


@pytest.mark.parametrize(("first", "second"), [(OURS, None), (None, OURS)], ids=["ours", "stock"])
def test_what_a_worker_holds_one_of_another_application_leaves_alone(
    url: str, broker: redis.Redis, producer: Celery, first: str | None, second: str | None
) -> None:
    keys = {OURS: (UNACKED, UNACKED_INDEX), None: ("unacked", "unacked_index")}
    send(producer, 1)
    killed = Worker(url, transport=first)
    killed.receive(1)
    killed.is_killed()
    messages, index = keys[first]
    eventually(lambda: broker.hlen(messages) == 1)
    kept = broker.hgetall(messages)
    broker.zadd(index, dict.fromkeys(map(raw, kept), 0))
    other_messages, other_index = keys[second]
    broker.hset(other_messages, "its own", next(iter(kept.values())))
    broker.zadd(other_index, {"its own": 0})
    with working(url, transport=second) as worker:
        assert numbers(worker.receive(1)) == [1]
        worker.received[0].ack()
        assert (broker.hgetall(messages), broker.llen(QUEUE)) == (kept, 0)
        assert broker.hlen(other_messages) == 0


def test_who_only_waits_for_an_answer_leaves_alone_what_other_applications_hold(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, 1)
    killed = Worker(url, transport=None)
    killed.receive(1)
    killed.is_killed()
    eventually(lambda: broker.hlen("unacked") == 1)
    broker.zadd("unacked_index", dict.fromkeys(map(raw, broker.hkeys("unacked")), 0))
    with create_celery("test", url, None) as app:
        assert app.control.ping(timeout=0.2) == []
    assert (broker.hlen("unacked"), broker.llen(QUEUE)) == (1, 0)


def test_who_asks_again_and_again_needs_no_more_connections(url: str) -> None:
    """Every question has a queue of its own for its answers. The pool has ten connections."""
    with create_celery("test", url, None) as app:
        assert [app.control.ping(timeout=0.01) for _ in range(30)] == [[]] * 30


def test_a_queue_that_is_given_up_and_taken_again(url: str, broker: redis.Redis, producer: Celery) -> None:
    with working(url) as worker:
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
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(50))
    killed = Worker(url)
    held_since = time.monotonic()
    killed.receive(50)
    killed.is_killed()
    with working(url, visibility_timeout=2) as worker:
        looked_since = time.monotonic()
        worker.receive(50)
        assert time.monotonic() - held_since > 1
        assert time.monotonic() - looked_since < 2 + 8, "kombu's own interval of ten seconds"
        worker.acknowledge()


def test_thousands_are_restored_in_a_few_round_trips_and_in_order(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    item = lay_down(producer, broker)
    broker.lpush(QUEUE, *[changed(item, headers={"number": number}) for number in range(1_200)])
    killed = Worker(url, prefetch=1_200)
    killed.receive(1_200)
    killed.is_killed()
    time_out(broker)
    calls = broker.info("commandstats")["cmdstat_evalsha"]["calls"]
    with working(url, prefetch=2_000) as worker:
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
    url: str, broker: redis.Redis, producer: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(producer, 1)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 4e9)
        killed = Worker(url)
        killed.receive(1)
        killed.is_killed()
    [tag] = map(raw, broker.zrange(UNACKED_INDEX, 0, -1))
    taken_at = broker.zscore(UNACKED_INDEX, tag)
    assert taken_at is not None
    assert abs(taken_at - broker.time()[0]) < 60


def test_a_worker_that_stops_gives_back_what_it_holds(url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, *range(30))
    with working(url) as worker:
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


@contextmanager
def closing_broker(folder: Path, **settings: str) -> Iterator[Broker]:
    with closing(ConfiguredBroker(folder, settings)) as broker:
        yield broker


class ConfiguredBroker(Broker):
    """The broker of the wheels, with settings of the test's own."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        super().__init__(folder)
        self._settings = settings

    def _config(self) -> str:
        return super()._config() + "".join(f"{name} {value}\n" for name, value in self._settings.items())

    def close(self) -> None:
        self.stop()


def test_whatever_it_holds_is_given_back_and_restored(url: str, broker: redis.Redis, producer: Celery) -> None:
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
    with working(url) as worker:
        worker.receive(len(odd))
    assert (broker.llen(QUEUE), held(broker)) == (len(odd), 0)
    killed = Worker(url)
    killed.receive(len(odd))
    killed.is_killed()
    time_out(broker)
    with working(url) as worker:
        worker.receive(len(odd))
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_nothing_is_taken_where_not_everything_can_be(url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, 1, 2, 3)
    with working(url) as worker:
        broker.set(f"{QUEUE}\x06\x163", "no list")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            worker.channel._take_from(QUEUE)
        assert broker.llen(QUEUE) == 3
        broker.delete(f"{QUEUE}\x06\x163")
        worker.receive(3)
        worker.acknowledge()


@contextmanager
def a_broker_of_its_own() -> Iterator[tuple[Celery, redis.Redis, Worker]]:
    """A producer, a client and a worker of a broker whose settings may be changed."""
    with open_folder() as folder, closing_broker(folder) as broker:
        broker.start()
        with (
            Celery(broker=broker.url, set_as_current=False) as producer,
            redis.Redis.from_url(broker.url) as client,
            working(broker.url) as worker,
        ):
            yield producer, client, worker


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


def test_one_step_takes_no_more_bytes_than_it_may(url: str, producer: Celery, broker: redis.Redis) -> None:
    """Nor does a worker hold more than it may, however many messages that are."""
    item = lay_down(producer, broker)
    size = MOST_ENTRY_BYTES - 1_000
    for number in range(400):
        broker.lpush(QUEUE, changed(item, headers={"number": number, "padding": "x" * size}))
    with working(url) as worker:
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


# What is no message


def lay_down(producer: Celery, broker: redis.Redis) -> bytes:
    """An envelope, as a stock producer makes it."""
    send(producer, 0)
    return raw(broker.rpop(QUEUE))


def changed(item: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(item), **changes}).encode()


def no_messages(item: bytes) -> dict[str, bytes]:
    properties = json.loads(item)["properties"]
    return {
        "text": b"hello",
        "nothing": b"",
        "bytes": bytes(range(256)),
        "null": b"null",
        "a list": b"[1, 2, 3]",
        "an object": b"{}",
        "no properties": changed(item, properties=None),
        "properties that are a list": changed(item, properties=[]),
        "a body that is an object": changed(item, body={"a": 1}),
        "a body that is not base64": changed(item, body="a"),
        "an unknown encoding": changed(item, properties={**properties, "body_encoding": "rot13"}),
        "headers that are a list": changed(item, headers=[1]),
        "nested too deep": b"[" * 100_000,
        "not utf-8": item.replace(b"workflow", b"work\xfflow"),
        "brackets at the end": b'x, "", "other"]',
    }


def test_what_is_no_message_is_delivered_with_its_bytes(url: str, broker: redis.Redis, producer: Celery) -> None:
    items = no_messages(lay_down(producer, broker))
    broker.lpush(QUEUE, *items.values())
    send(producer, 7)
    with working(url) as worker:
        worker.receive(len(items) + 1)
        odd = [message for message in worker.received if isinstance(message, SetAside)]
        assert numbers([message for message in worker.received if message not in odd]) == [7]
        assert [(message.body, message.task, message.problem) for message in odd] == [
            (item, "", NO_MESSAGE) for item in items.values()
        ]
        assert held(broker) == len(items) + 1
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_is_no_message_is_restored_as_it_was(url: str, broker: redis.Redis, producer: Celery) -> None:
    items = [item for item in no_messages(lay_down(producer, broker)).values() if not item.startswith(b"{")]
    broker.lpush(QUEUE, *items)
    killed = Worker(url)
    killed.receive(len(items))
    killed.is_killed()
    time_out(broker)
    with working(url) as worker:
        assert [message.body for message in worker.receive(len(items))] == items
    assert broker.lrange(QUEUE, 0, -1) == items[::-1]


def test_what_is_held_in_no_form_of_ours_is_delivered_as_it_is(url: str, broker: redis.Redis) -> None:
    """Somebody else has written to our keys."""
    kept = {
        '[garbage, "", "credits"]': b"garbage",
        '[{"a": 1}, "no exchange", "x"]': b'[{"a": 1}, "no exchange", "x"]',
        "[[], [], []]": b"[[], [], []]",
        "5": b"5",
    }
    broker.hset(UNACKED, mapping={str(number): entry for number, entry in enumerate(kept)})
    broker.zadd(UNACKED_INDEX, {str(number): 1 for number in range(len(kept))})
    broker.zadd(UNACKED_INDEX, {"held by nobody": 1})
    with working(url) as worker:
        worker.receive(len(kept))
        assert {type(message) for message in worker.received} == {SetAside}
        assert sorted(message.body for message in worker.received) == sorted(kept.values())
        worker.acknowledge()
    assert broker.keys() == broker.keys("_kombu.binding*")


def test_two_equal_entries_are_two(url: str, broker: redis.Redis) -> None:
    broker.lpush(QUEUE, "same", "same")
    with working(url) as worker:
        worker.receive(2)
        worker.channel.qos.acknowledge([worker.received.pop().delivery_tag])
        assert held(broker) == 1
        worker.acknowledge()
    assert held(broker) == 0


# What is too large


@pytest.mark.parametrize("size", [MOST_ENTRY_BYTES, 5_000_000])
def test_of_an_entry_that_is_too_large_only_the_first_part_is_taken(
    url: str, broker: redis.Redis, producer: Celery, size: int
) -> None:
    producer.send_task("wallet.grant", args=[f"first {'x' * size}"], queue=QUEUE, ignore_result=True)
    [entry] = map(raw, broker.lrange(QUEUE, 0, -1))
    with working(url) as worker:
        [message] = worker.receive(1)
        assert isinstance(message, SetAside)
        assert message.body.startswith(b'[["first xxx')
        assert 40_000 < len(message.body) <= MAX_BODY_BYTES
        assert message.task == "wallet.grant"
        digest = hashlib.sha1(entry).hexdigest()
        assert message.problem == too_large_entry(len(entry), MOST_ENTRY_BYTES, digest)
    assert broker.lrange(QUEUE, 0, -1) == [entry]  # given back whole
    with working(url) as worker:
        worker.receive(1)
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_is_too_large_is_moved_and_never_written_again(url: str, broker: redis.Redis) -> None:
    """Else the server would be busy with it for seconds, and the worker give up before it has an answer."""

    def written_bytes() -> int:
        return int(broker.info("persistence")["aof_current_size"])

    entries = [b"first", b"x" * 5_000_000, b"second", b"y" * 5_000_000, b"", b"third"]
    broker.lpush(QUEUE, *entries)
    before = written_bytes()
    with working(url) as worker:
        assert [len(message.body) for message in worker.receive(6)] == [5, MAX_BODY_BYTES, 6, MAX_BODY_BYTES, 0, 5]
        assert len(broker.keys(f"{UNACKED}.*")) == 2
    assert broker.lrange(QUEUE, 0, -1) == entries[::-1]  # given back
    give_up(url, broker, 6)
    assert broker.lrange(QUEUE, 0, -1) == entries[::-1]  # timed out
    with working(url) as worker:
        worker.channel.restore([worker.receive(6)[1].delivery_tag], leftmost=True)
    assert broker.lrange(QUEUE, 0, -1) == [entries[1], *reversed(entries[2:]), entries[0]]  # to be taken last
    with working(url) as worker:
        worker.receive(6)
        worker.acknowledge()
    assert written_bytes() - before < 1_000_000
    assert broker.keys("credits*") == []


def test_what_a_wait_is_answered_with_is_read_unless_it_is_too_large_and_only_then_the_wait_has_a_new_connection(
    url: str, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.transport.WAIT_S", 10 * PATIENCE_S)  # so that nothing comes with the end of a wait

    def connections() -> int:
        return int(broker.info("stats")["total_connections_received"])

    with working(url) as worker:
        opened: list[int] = []
        for size in (1, MOST_ENTRY_BYTES, MOST_ENTRY_BYTES, MOST_ENTRY_BYTES + 1, 1, 20_000_000, MOST_ENTRY_BYTES):
            worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
            before = connections()
            broker.lpush(QUEUE, b"x" * size)
            [message] = worker.receive(1)
            assert len(message.body) == (size if size <= MOST_ENTRY_BYTES else MAX_BODY_BYTES)
            worker.acknowledge()
            worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
            opened.append(connections() - before)
    assert opened == [0, 0, 0, 1, 0, 1, 0]
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_is_too_large_and_no_message_is_taken_in_part(url: str, broker: redis.Redis) -> None:
    broker.lpush(QUEUE, b"\xff" * MOST_ENTRY_BYTES + b"!")
    with working(url) as worker:
        [message] = worker.receive(1)
        assert isinstance(message, SetAside)
        assert (message.body, message.task) == (b"\xff" * MAX_BODY_BYTES, "")
        worker.acknowledge()
    assert held(broker) == 0


# What ends its workers


def restored(broker: redis.Redis) -> list[int]:
    """How often each entry of the queue was restored, the next one first."""
    entries = broker.lrange(QUEUE, 0, -1)
    return [json.loads(entry).get("restored", 0) for entry in reversed(entries)]


def give_up(url: str, broker: redis.Redis, count: int) -> None:
    """A worker takes so many messages, and is killed; they are restored."""
    killed = Worker(url)
    killed.receive(count)
    killed.is_killed()
    time_out(broker)
    with Connection(url, transport=OURS) as connection:
        channel_of(connection).restore_timed_out(60)
    assert held(broker) == 0


def test_a_message_that_a_dead_worker_held_is_counted_and_otherwise_as_it_was(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(3))
    entries = broker.lrange(QUEUE, 0, -1)
    for times in range(1, SUSPECT):
        give_up(url, broker, 3)
        assert restored(broker) == [times] * 3
    kept = map(raw, broker.lrange(QUEUE, 0, -1))
    assert [entry.replace(b'"restored": 2, ', b"") for entry in kept] == entries
    with working(url) as worker:
        assert numbers(worker.receive(3)) == [0, 1, 2]
        worker.acknowledge()


def test_a_message_that_a_worker_gives_back_is_not_counted(url: str, broker: redis.Redis, producer: Celery) -> None:
    send(producer, *range(3))
    for _ in range(5):
        with working(url) as worker:
            worker.receive(3)
    assert restored(broker) == [0, 0, 0]


def test_a_suspect_is_taken_alone_so_that_its_neighbours_are_not_counted(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, *range(10))
    for _ in range(SUSPECT):
        give_up(url, broker, 10)
    with working(url) as worker:
        for number in range(4):  # the fifth one ends its workers
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()
    send(producer, 10)
    for times in range(SUSPECT + 1, DELIVERY_LIMIT + 1):
        give_up(url, broker, 1)
        assert restored(broker) == [times, *[SUSPECT] * 5, 0]
    with working(url) as worker:
        [poison] = worker.receive(1)
        assert isinstance(poison, SetAside)
        assert (poison.task, poison.problem) == ("workflow.start", DELIVERED_TOO_OFTEN)
        assert json.loads(poison.body)[0] == [4]
        worker.acknowledge()
        for number in range(5, 11):
            assert numbers(worker.receive(1)) == [number]
            worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_a_suspect_waits_for_what_a_worker_holds_and_is_taken_when_that_is_acknowledged(
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, 1)
    for _ in range(SUSPECT):
        give_up(url, broker, 1)
    suspect = raw(broker.rpop(QUEUE))
    send(producer, 2)
    broker.lpush(QUEUE, suspect)
    send(producer, 3)
    with working(url) as worker:
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
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    send(producer, 1)
    for _ in range(SUSPECT):
        give_up(url, broker, 1)
    suspect = raw(broker.rpop(QUEUE))
    producer.send_task("workflow.start", args=[2], queue=SECOND)
    with working(url) as worker:
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
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    for busy, other in ((QUEUE, SECOND), (SECOND, QUEUE)):
        for number in range(20):
            producer.send_task("workflow.start", args=[number], queue=busy)
            entry = broker.rpop(busy)
            assert isinstance(entry, bytes)
            broker.lpush(busy, b'{"restored": %d, %s' % (SUSPECT, entry[1:]))
        with working(url) as worker:
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
    url: str, broker: redis.Redis, producer: Celery
) -> None:
    producer.send_task("workflow.start", args=[1], queue=SECOND)
    forged = json.loads(raw(broker.rpop(SECOND)))
    forged["properties"]["delivery_info"] = {"exchange": "", "routing_key": QUEUE}
    broker.lpush(SECOND, json.dumps(forged), json.dumps(forged) + '", "", "credits"]')
    for _ in range(2):
        with working(url) as worker:
            worker.receive(2)
        assert (broker.llen(SECOND), broker.llen(QUEUE)) == (2, 0)
    worker = Worker(url)
    worker.receive(2)
    worker.is_killed()
    time_out(broker)
    with working(url, visibility_timeout=1) as worker:
        worker.receive(2)
        assert broker.llen(QUEUE) == 0
        worker.acknowledge()


def test_that_messages_are_taken_alone_is_told_once_and_that_it_is_over_too_and_each_is_counted(
    url: str, broker: redis.Redis, producer: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    send(producer, *range(10))
    for _ in range(SUSPECT):
        give_up(url, broker, 10)
    entries = broker.lrange(QUEUE, 0, -1)
    send(producer, *range(10, 15))
    suspects = count()
    with working(url) as worker:
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


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_what_a_living_worker_holds_does_not_time_out(url: str, broker: redis.Redis, producer: Celery) -> None:
    """However long the database is away."""
    send(producer, *range(3))
    with working(url, visibility_timeout=2) as worker:
        worker.receive(3)
        held_until = time.monotonic() + 5
        worker.run(lambda: time.monotonic() > held_until)
        assert (len(worker.received), held(broker), broker.llen(QUEUE)) == (3, 3, 0)
        worker.acknowledge()


# The server


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"redis_version": "6.0.16"}, "the broker is Redis 6.0.16; Holdfast needs 6.2 or newer, or Valkey"),
        ({"redis_version": "6.2.0", "cluster_enabled": 0}, None),
        ({"redis_version": "7.2.4"}, None),
        (
            {"redis_version": "8.0.1", "cluster_enabled": 1},
            "the broker is a Redis cluster; Holdfast needs a single server",
        ),
    ],
)
def test_which_servers_can_be_the_broker(info: dict[str, Any], problem: str | None) -> None:
    assert server_problem(info) == problem


def test_a_worker_ends_with_one_line_at_a_cluster() -> None:
    with open_folder() as folder, closing_broker(folder, **CLUSTER, **{"cluster-port": str(free_port())}) as broker:
        broker.start()
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "celery", "--quiet", "-A", "worker", "worker"],
            env=environment(
                HOLDFAST_DATABASE_URL="postgresql+psycopg://u@127.0.0.1:1/d", HOLDFAST_BROKER_URL=broker.url
            ),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    [line] = ended.stderr.splitlines()
    problem = "the broker is a Redis cluster; Holdfast needs a single server"
    assert (ended.returncode, ended.stdout, json.loads(line)["message"]) == (2, "", problem)


def test_a_cluster_is_refused() -> None:
    with (
        open_folder() as folder,
        closing_broker(folder, **CLUSTER, **{"cluster-port": str(free_port())}) as broker,
    ):
        broker.start()
        with Connection(broker.url, transport=OURS) as connection, pytest.raises(UnsupportedServerError):
            channel_of(connection).check_server()


def test_it_speaks_tls(url: str, broker: redis.Redis) -> None:
    """The wheel's server does not, so something in front of it does, as a cloud's proxy would."""
    with open_folder() as folder, tls_in_front_of(url, folder) as (secure_url, certificate):
        with Celery(broker=secure_url, set_as_current=False) as producer:
            producer.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(certificate)}
            send(producer, 1)
        query = f"?ssl_cert_reqs=required&ssl_ca_certs={certificate}"
        with working(f"{secure_url}{query}") as worker:
            assert numbers(worker.receive(1)) == [1]
            worker.acknowledge()
            broker.lpush(QUEUE, b"x" * 20_000_000)
            assert isinstance(worker.receive(1)[0], SetAside)
            worker.acknowledge()
            broker.lpush(QUEUE, b"small")
            assert worker.receive(1)[0].body == b"small"
            worker.acknowledge()
        assert held(broker) == 0


@contextmanager
def tls_in_front_of(url: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """A rediss:// URL for the server at `url`, and the certificate to trust."""
    server = urlsplit(url)
    certificate = self_signed(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, folder / "key.pem")

    address: Future[int] = Future()
    stopped = threading.Event()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(server.hostname, server.port)
        await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one of the two went away
        finally:
            writer.transport.abort()

    async def serve() -> None:
        proxy = await asyncio.start_server(connect, "127.0.0.1", 0, ssl=context)
        address.set_result(proxy.sockets[0].getsockname()[1])
        await asyncio.to_thread(stopped.wait)
        proxy.close()
        connections = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        port = address.result(PATIENCE_S)
        yield f"rediss://{server.username}:{server.password}@127.0.0.1:{port}{server.path}", certificate
    finally:
        stopped.set()
        thread.join()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1, for an hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def test_the_settings_of_the_worker_are_those_that_are_tested_here() -> None:
    with create_celery("test", "redis://127.0.0.1:1/0", None) as app:
        options = app.conf.broker_transport_options
    assert options["unacked_restore_interval"] == 1
    assert options["priority_steps"] == [0]


def test_the_pinned_kombu_is_here() -> None:
    assert kombu.VERSION[:2] == (5, 7), "read worker/transport.py again, with this kombu's transport/redis.py beside it"
