"""How Holdfast talks to the broker, the same for who sends and for who consumes.

Who may write to `credits` may send every message. Workflow engines need not: from `credits.engine` only messages about
workflows are taken.

On RabbitMQ, both are quorum queues: replicated, and on disk before a message is confirmed. A message that was delivered
DELIVERY_LIMIT times and never acknowledged, as it ended every worker that took it, moves to `credits.dead`, or to
`credits.engine.dead`, which gives it no more rights; it leaves the one queue only when the other one has it.

Other Celery applications may share the broker. No name that is Celery's default is used: neither its queue, nor its
exchange for remote control, through which one application would stop another's workers. The exchange of its events is,
as monitors listen there.
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

from ledger.broker_urls import AMQP_SCHEMES, REDIS_SCHEMES
from ledger.messages import DELIVERY_LIMIT

logger = logging.getLogger(__name__)

QUEUE = "credits"
"""Where messages of whoever may send all of them wait."""

ENGINE_QUEUE = "credits.engine"
"""Where messages of engines wait. Only those about workflows are taken from it."""

DEAD_QUEUE, ENGINE_DEAD_QUEUE = "credits.dead", "credits.engine.dead"
"""Where RabbitMQ puts what was delivered too often, from the one and from the other. The worker consumes both, too."""

ENGINE_QUEUES, DEAD_QUEUES = {ENGINE_QUEUE, ENGINE_DEAD_QUEUE}, {DEAD_QUEUE, ENGINE_DEAD_QUEUE}

VISIBILITY_TIMEOUT_S = 60
"""After this, Redis delivers again what a worker took and never acknowledged."""

_NO_LIMIT = 2**31 - 1
_TAKEN_FROM = "taken_from"

_LIMITED: dict[str, Any] = {
    "x-queue-type": "quorum",
    # Each worker that dies counts against all that it held, guilty or not.
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",  # without a length limit it changes nothing, but at-least-once wants it
}
# RabbitMQ 4 has a limit of its own, beyond which a message would be gone.
_UNLIMITED: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT}
_RABBITMQ_ARGUMENTS: dict[str, dict[str, Any]] = {
    QUEUE: {**_LIMITED, "x-dead-letter-routing-key": DEAD_QUEUE},
    ENGINE_QUEUE: {**_LIMITED, "x-dead-letter-routing-key": ENGINE_DEAD_QUEUE},
    DEAD_QUEUE: _UNLIMITED,
    ENGINE_DEAD_QUEUE: _UNLIMITED,
}
"""Whatever stands here stays as it is: RabbitMQ does not change a queue that exists."""


def create_celery(name: str, broker_url: str, result_url: str | None) -> Celery:
    """A Celery app that speaks only JSON, with `QUEUE` as its default. Connects to nothing yet."""
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
        # Celery's own loses a message when the worker is killed between taking and recording it. Whoever waits for
        # anything with it, if only for the answer to a ping, restores what workers of other applications hold.
        broker_transport="worker.transport:Transport" if is_redis else None,
        broker_transport_options=_redis_options() if is_redis else _rabbitmq_options(),
    )
    return app


def masked(url: str) -> str:
    """A broker's URL without its passwords, of however many nodes."""
    return ";".join(sanitize_url(part) for part in url.split(";"))


def reason(error: Exception) -> str:
    """What the broker, or the way to it, has said, for a person."""
    _, _, said = str(error).rpartition(" caused error: ")  # before it, redis-py shows the bytes that it sent
    return said or type(error).__name__


def _verified(url: str) -> str:
    """A broker's URL that says whether the server's certificate is checked: it is, unless `url` says otherwise.

    Kombu would not check it for a `rediss://` that says nothing, and Celery would not start.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss" or "ssl_cert_reqs" in dict(parse_qsl(parts.query)):
        return url
    return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"


class LedgerQueue(Queue):
    """A queue whose messages say where they were taken from, whatever their sender has written."""

    def consume(
        self, consumer_tag: str = "", callback: Callable[[Any], object] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Deliver what is taken from this queue to `callback`. The broker, or our transport, calls it for no other."""
        assert callback is not None

        def received(message: Any) -> None:
            given = message.delivery_info
            message.delivery_info = {**(given if isinstance(given, dict) else {}), _TAKEN_FROM: self.name}
            callback(message)

        return super().consume(consumer_tag, received, *args, **kwargs)  # type: ignore[no-untyped-call]


def taken_from(message: Message) -> str:
    """The name of the `LedgerQueue` that a worker took `message` from; empty, if it is no message for the ledger."""
    about = message.delivery_info
    return str(about.get(_TAKEN_FROM, "")) if isinstance(about, dict) else ""


def queues(broker_url: str) -> list[Queue]:
    """What a worker consumes. On RabbitMQ it must have called `declare_queues` before."""
    if broker_url.startswith(AMQP_SCHEMES):
        return _rabbitmq_queues(no_declare=True)
    return [_queue(name) for name in (QUEUE, ENGINE_QUEUE)]


def declare_queues(connection: Connection) -> None:
    """Make all queues on RabbitMQ that are not there yet. One that is there stays and is used, whatever its arguments.

    Does nothing on Redis, where a queue is made by its first message.
    """
    if connection.transport.driver_type != "amqp":
        return
    for queue in _rabbitmq_queues(no_declare=False):
        with connection.channel() as channel:  # which RabbitMQ closes after a refusal
            try:
                queue(channel).declare()
            except PreconditionFailed as error:
                logger.warning("The queue %s is not as it should be, and is used as it is: %s", queue.name, error)


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
        "unacked_restore_interval": 1,  # look every second, not every ten, for messages to deliver again
        "priority_steps": [0],  # one list per queue: messages have no priorities
        "socket_connect_timeout": 5,
        "socket_timeout": 5,  # nobody waits for ever for a broker that is stuck
        "socket_keepalive": True,
    }


def _rabbitmq_options() -> dict[str, Any]:
    return {"read_timeout": 5, "write_timeout": 5}  # nobody waits for ever for a broker that is stuck
