"""The Redis transport as the worker uses it, and what it leaves in a real server.

What it leans on in kombu 5.7 is used here in kombu's own event loop, so that a kombu that changes it fails these tests.
A worker that is killed is a connection that is forgotten: nothing of it is closed.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import redis
from celery import Celery
from kombu.asynchronous import Hub, get_event_loop, set_event_loop
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.message import Message
from kombu.messaging import Consumer

from tests.installation import closing_broker, open_folder
from tests.support import PATIENCE_S, raw
from worker.transport import UNACKED, UNACKED_INDEX, Channel

OURS = "worker.transport:Transport"
QUEUE, SECOND = "credits", "second"


def channel_of(connection: Connection) -> Channel:
    return cast(Channel, connection.default_channel)


class Worker:
    """What a Celery worker does with its transport: one channel, one consumer, kombu's event loop.

    With another transport than ours its channel and its messages are kombu's, which have less.
    """

    def __init__(self, broker_url: str, *, transport: str | None = OURS, prefetch: int = 1_000, **options: Any) -> None:
        self.received: list[Message] = []
        self._previous_loop = get_event_loop()
        self.hub = Hub()
        set_event_loop(self.hub)
        defaults = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 1}
        self.connection = Connection(
            broker_url, transport=transport, transport_options={**defaults, "visibility_timeout": 60, **options}
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
def working(broker_url: str, **options: Any) -> Iterator[Worker]:
    worker = Worker(broker_url, **options)
    try:
        yield worker
    finally:
        worker.close()


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


def lay_down(producer: Celery, broker: redis.Redis) -> bytes:
    """An envelope, as a stock producer makes it."""
    send(producer, 0)
    return raw(broker.rpop(QUEUE))


def changed(item: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(item), **changes}).encode()


def give_up(broker_url: str, broker: redis.Redis, count: int) -> None:
    """A worker takes so many messages, and is killed; they are restored."""
    killed = Worker(broker_url)
    killed.receive(count)
    killed.is_killed()
    time_out(broker)
    with Connection(broker_url, transport=OURS) as connection:
        channel_of(connection).restore_timed_out(60)
    assert held(broker) == 0


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]
