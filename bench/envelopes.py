"""Messages as they wait in the broker, byte for byte as Celery's own `send_task` writes them."""

import json
from collections.abc import Sequence
from typing import Any

from celery import Celery
from kombu.connection import Connection
from kombu.transport import memory
from kombu.utils.json import dumps
from redis import Redis

from holdfast_client.broker import QUEUE

Message = tuple[str, dict[str, Any]]
"""A task's name and its one argument."""

_DRAWN_ANEW = {"headers": ("id", "root_id", "origin"), "properties": ("correlation_id", "reply_to", "delivery_tag")}
"""The parts that differ for every message or program: the message's id, its sender, and its delivery tag."""


def send_task(broker_url: str, messages: Sequence[Message]) -> None:
    """Send as an engine does that has only Celery, the names of the tasks and the queue."""
    app = _engine(broker_url)
    with app.connection_for_write() as connection:
        _send(app, connection, messages)
    app.close()


def envelopes(messages: Sequence[Message]) -> list[bytes]:
    """The entries that `send_task` would put into the queue: Celery and kombu make them, but nothing is sent."""
    kept: list[bytes] = []

    class Channel(memory.Channel):
        """Keeps the entries for a queue, written as the Redis transport writes them."""

        def _put(self, queue: str, message: dict[str, Any], **_: object) -> None:  # noqa: ARG002 - kombu names it
            kept.append(dumps(message).encode())

    class Transport(memory.Transport):
        """The transport with that channel."""

    Transport.Channel = Channel
    app = _engine("memory://")
    with Connection(transport=Transport) as connection:
        _send(app, connection, messages)
    app.close()
    return kept


def are_as_sent(broker: Redis, broker_url: str, message: Message) -> bool:
    """Whether `envelopes` gives for `message`, byte for byte, what `send_task` puts into this broker."""
    send_task(broker_url, [message])
    sent: Any = broker.rpop(QUEUE)
    [made] = envelopes([message])
    theirs, ours = json.loads(sent), json.loads(made)
    for part, names in _DRAWN_ANEW.items():
        for name in names:
            ours[part][name] = theirs[part][name]
    return bool(dumps(ours).encode() == sent)


def _engine(broker_url: str) -> Celery:
    app = Celery("engine", broker=broker_url, set_as_current=False)
    app.conf.task_default_queue = QUEUE
    return app


def _send(app: Celery, connection: Connection, messages: Sequence[Message]) -> None:
    with app.amqp.Producer(connection) as producer:
        for task, payload in messages:
            app.send_task(task, args=[payload], ignore_result=True, producer=producer)
