"""How Holdfast uses the broker: the same for senders and for consumers.

A system that may write to `credits` may send every message. From `credits.engine`, the queue of workflow engines, only
workflow messages are taken.

On RabbitMQ, both are quorum queues: replicated, and on disk before a message is confirmed. A message that was delivered
DELIVERY_LIMIT times and never acknowledged has ended its workers. It moves to `credits.dead`, or from `credits.engine`
to `credits.engine.dead`, so that it gains no rights. It leaves the one queue only when the other one has it.

Other Celery applications may share the broker. So Holdfast does not use Celery's default names: neither its queue, nor
its exchange for remote control, through which one application would stop another's workers. Only the exchange of events
is Celery's, as monitors listen there.
"""

import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from amqp.exceptions import PreconditionFailed
from celery import Celery
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.message import Message
from kombu.utils.url import sanitize_url

from holdfast_client.broker_urls import AMQP_SCHEMES, REDIS_SCHEMES
from holdfast_client.messages import DELIVERY_LIMIT

logger = logging.getLogger(__name__)

QUEUE = "credits"
"""The queue of systems that may send every message."""

ENGINE_QUEUE = "credits.engine"
"""The queue of workflow engines. Only workflow messages are taken from it."""

DEAD_QUEUE, ENGINE_DEAD_QUEUE = "credits.dead", "credits.engine.dead"
"""Where RabbitMQ puts messages of either queue that were delivered too often. The worker consumes both, too."""

ENGINE_QUEUES, DEAD_QUEUES = {ENGINE_QUEUE, ENGINE_DEAD_QUEUE}, {DEAD_QUEUE, ENGINE_DEAD_QUEUE}

REPLAY_OF = "holdfast_replay_of"
"""The header of a message that is sent again: the number of its dead letter. It means nothing in ENGINE_QUEUE."""

VISIBILITY_TIMEOUT_S = 60
"""On Redis, messages that a dead worker has not acknowledged are delivered again after this."""

_NO_LIMIT = 2**31 - 1
_TAKEN_FROM = "taken_from"

_LIMITED: dict[str, Any] = {
    "x-queue-type": "quorum",
    # A worker that dies counts against every message that it held.
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",  # has no effect without a length limit, but at-least-once requires it
}
# RabbitMQ 4 has a limit by default, beyond which it would drop a message.
_UNLIMITED: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT}
_RABBITMQ_ARGUMENTS: dict[str, dict[str, Any]] = {
    QUEUE: {**_LIMITED, "x-dead-letter-routing-key": DEAD_QUEUE},
    ENGINE_QUEUE: {**_LIMITED, "x-dead-letter-routing-key": ENGINE_DEAD_QUEUE},
    DEAD_QUEUE: _UNLIMITED,
    ENGINE_DEAD_QUEUE: _UNLIMITED,
}
"""Do not change these: RabbitMQ does not change a queue that exists."""


def create_celery(name: str, broker_url: str, result_url: str | None) -> Celery:
    """Create a Celery app that accepts only JSON, with `QUEUE` as its default. Connects to nothing yet."""
    is_redis = broker_url.startswith(REDIS_SCHEMES)
    app = Celery(
        name,
        broker=_verified(broker_url),
        backend="disabled://" if result_url is None else _verified(result_url),
        set_as_current=False,
    )
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],  # nothing that could run code, such as pickle
        task_default_queue=QUEUE,
        control_exchange="holdfast",
        # Celery's own transport loses a message when the worker is killed between taking and recording it. And any
        # program that waits with it, even for the answer to a ping, restores what other applications' workers hold.
        broker_transport="worker.transport:Transport" if is_redis else None,
        broker_transport_options=_redis_options() if is_redis else _rabbitmq_options(),
    )
    return app


def masked(url: str) -> str:
    """A broker's URL without passwords, of one or several nodes."""
    return ";".join(sanitize_url(part) for part in url.split(";"))


def reason(error: Exception) -> str:
    """The reason of an error of the broker or the connection to it, for a person."""
    _, _, said = str(error).rpartition(" caused error: ")  # before it, redis-py shows the bytes that it sent
    return said or type(error).__name__


def _verified(url: str) -> str:
    """A broker's URL that says whether to check the server's certificate: yes, unless `url` says otherwise.

    For a `rediss://` URL that does not say so, kombu would not check it, and Celery would not start.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss" or "ssl_cert_reqs" in dict(parse_qsl(parts.query)):
        return url
    return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"


class LedgerQueue(Queue):
    """A queue that marks its messages with its name, whatever their sender has written."""

    def consume(
        self, consumer_tag: str = "", callback: Callable[[Any], object] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Deliver the messages of this queue, and of no other, to `callback`."""
        assert callback is not None

        def received(message: Any) -> None:
            given = message.delivery_info
            message.delivery_info = {**(given if isinstance(given, dict) else {}), _TAKEN_FROM: self.name}
            callback(message)

        return super().consume(consumer_tag, received, *args, **kwargs)  # type: ignore[no-untyped-call]


def taken_from(message: Message) -> str:
    """The name of the `LedgerQueue` from which `message` was taken; empty if it was taken from another queue."""
    about = message.delivery_info
    return str(about.get(_TAKEN_FROM, "")) if isinstance(about, dict) else ""


def queues(broker_url: str) -> list[Queue]:
    """The queues that a worker consumes. On RabbitMQ it must call `declare_queues` before."""
    if broker_url.startswith(AMQP_SCHEMES):
        return _rabbitmq_queues(no_declare=True)
    return [_queue(name) for name in (QUEUE, ENGINE_QUEUE)]


def declare_queues(connection: Connection) -> None:
    """Create the missing queues on RabbitMQ. A queue that exists is used as it is, whatever its arguments.

    Does nothing on Redis, where the first message creates a queue.
    """
    if connection.transport.driver_type != "amqp":
        return
    for queue in _rabbitmq_queues(no_declare=False):
        with connection.channel() as channel:  # which RabbitMQ closes after a refusal
            try:
                queue(channel).declare()
            except PreconditionFailed as error:
                logger.warning("The queue %s has wrong arguments, and is used as it is: %s", queue.name, error)


def _rabbitmq_queues(*, no_declare: bool) -> list[Queue]:
    return [
        _queue(
            name,
            queue_arguments=arguments,
            # In ms: while the database is away, a worker may hold messages for longer than RabbitMQ's 30 minutes.
            consumer_arguments={"x-consumer-timeout": _NO_LIMIT},
            no_declare=no_declare,
        )
        for name, arguments in _RABBITMQ_ARGUMENTS.items()
    ]


def _queue(name: str, **options: Any) -> Queue:
    return LedgerQueue(name, Exchange(name), routing_key=name, **options)  # type: ignore[no-untyped-call]


def _redis_options() -> dict[str, Any]:
    return {
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_restore_interval": 1,  # check every second, not every ten, for messages to deliver again
        "priority_steps": [0],  # one list per queue: messages have no priorities
        "socket_connect_timeout": 5,
        "socket_timeout": 5,  # nothing waits forever for a broker that is stuck
        "socket_keepalive": True,
    }


def _rabbitmq_options() -> dict[str, Any]:
    return {"read_timeout": 5, "write_timeout": 5}  # nothing waits forever for a broker that is stuck
