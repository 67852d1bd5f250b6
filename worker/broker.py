"""How Holdfast uses Celery, and takes from the ledger's queues, which are those of `holdfast_client.broker`.

Other Celery applications may share the broker. So Holdfast does not use Celery's default names: neither its queue, nor
its exchange for remote control, through which one application would stop another's workers. Only the exchange of events
is Celery's, as monitors listen there.
"""

from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from kombu.entity import Exchange, Queue
from kombu.message import Message

from holdfast_client.broker import (
    CONTROL_EXCHANGE,
    ENGINE_QUEUE,
    NO_LIMIT,
    QUEUE,
    RABBITMQ_ARGUMENTS,
    connect_timeout_s,
    connection_options,
    verified,
)
from holdfast_client.broker_urls import AMQP_SCHEMES, REDIS_SCHEMES
from holdfast_client.publishing import FailoverConnection

VISIBILITY_TIMEOUT_S = 60
"""On Redis, messages that a dead worker has not acknowledged are delivered again after this."""

_REDIS_OPTIONS: dict[str, Any] = {
    "visibility_timeout": VISIBILITY_TIMEOUT_S,
    "unacked_restore_interval": 1,  # check every second, not every ten, for messages to deliver again
    "priority_steps": [0],  # one list per queue: messages have no priorities
}
_TAKEN_FROM = "taken_from"
_TRANSPORT = "worker.transport:Transport"


class _Connection(FailoverConnection):
    def as_uri(self, *args: Any, **kwargs: Any) -> str:
        """Name the scheme of the URL, as monitors expect, and not the class of the transport."""
        scheme = "rediss" if self.ssl else "redis"
        return str(super().as_uri(*args, **kwargs)).replace(f"{_TRANSPORT}:", f"{scheme}:", 1)


class _AMQP(AMQP):  # type: ignore[misc] # Celery ships no types
    Connection = _Connection


def create_celery(name: str, broker_url: str, result_url: str | None) -> Celery:
    """Create a Celery app that accepts only JSON, with `QUEUE` as its default. Connects to nothing yet."""
    is_redis = broker_url.startswith(REDIS_SCHEMES)
    app = Celery(
        name,
        broker=verified(broker_url),
        backend="disabled://" if result_url is None else verified(result_url),
        set_as_current=False,
        amqp=_AMQP,
    )
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],  # nothing that could run code, such as pickle
        task_default_queue=QUEUE,
        control_exchange=CONTROL_EXCHANGE,
        broker_connection_timeout=connect_timeout_s(broker_url),
        # Celery's own transport loses a message when the worker is killed between taking and recording it. And any
        # program that waits with it, even for the answer to a ping, restores what other applications' workers hold.
        broker_transport=_TRANSPORT if is_redis else None,
        broker_transport_options=connection_options(broker_url) | (_REDIS_OPTIONS if is_redis else {}),
    )
    return app


def reason(error: Exception) -> str:
    """The reason of an error of the broker or the connection to it, for a person."""
    _, _, said = str(error).rpartition(" caused error: ")  # before it, redis-py shows the bytes that it sent
    return said or type(error).__name__


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
    if not broker_url.startswith(AMQP_SCHEMES):
        return [_queue(name) for name in (QUEUE, ENGINE_QUEUE)]
    return [
        _queue(
            name,
            queue_arguments=arguments,
            # In ms: while the database is away, a worker may hold messages for longer than RabbitMQ's 30 minutes.
            consumer_arguments={"x-consumer-timeout": NO_LIMIT},
            no_declare=True,
        )
        for name, arguments in RABBITMQ_ARGUMENTS.items()
    ]


def _queue(name: str, **options: Any) -> Queue:
    return LedgerQueue(name, Exchange(name), routing_key=name, **options)  # type: ignore[no-untyped-call]
