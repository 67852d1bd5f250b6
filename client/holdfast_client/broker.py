"""The ledger's queues, and how senders and consumers use the broker.

A system that may write to `credits` may send every message. From `credits.engine`, the queue of workflow engines, only
workflow messages are taken.

On RabbitMQ, both are quorum queues: replicated, and on disk before a message is confirmed. A message that was delivered
DELIVERY_LIMIT times and never acknowledged has ended its workers. It moves to `credits.dead`, or from `credits.engine`
to `credits.engine.dead`, so that it gains no rights. It leaves the one queue only when the other one has it.
"""

import logging
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from amqp.exceptions import PreconditionFailed
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.utils.url import sanitize_url

from holdfast_client.broker_urls import REDIS_SCHEMES
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

CONTROL_EXCHANGE = "holdfast"
"""The exchange for remote control of workers: not Celery's, through which other applications control theirs."""

NO_LIMIT = 2**31 - 1

_LIMITED: dict[str, Any] = {
    "x-queue-type": "quorum",
    # A worker that dies counts against every message that it held.
    "x-delivery-limit": DELIVERY_LIMIT,
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",  # has no effect without a length limit, but at-least-once requires it
}
# RabbitMQ 4 has a limit by default, beyond which it would drop a message.
_UNLIMITED: dict[str, Any] = {"x-queue-type": "quorum", "x-delivery-limit": NO_LIMIT}
RABBITMQ_ARGUMENTS: dict[str, dict[str, Any]] = {
    QUEUE: {**_LIMITED, "x-dead-letter-routing-key": DEAD_QUEUE},
    ENGINE_QUEUE: {**_LIMITED, "x-dead-letter-routing-key": ENGINE_DEAD_QUEUE},
    DEAD_QUEUE: _UNLIMITED,
    ENGINE_DEAD_QUEUE: _UNLIMITED,
}
"""Do not change these: RabbitMQ does not change a queue that exists."""

SILENT_S = 5.0  # nothing waits forever for a broker that is stuck
_NODE_SILENT_S = 2.0  # nor for one of its nodes that lets nobody in, as there are others


def connection_options(broker_url: str) -> dict[str, Any]:
    """Kombu's options for the transport to this broker."""
    if not broker_url.startswith(REDIS_SCHEMES):
        return {"read_timeout": SILENT_S, "write_timeout": SILENT_S}
    return {"socket_connect_timeout": SILENT_S, "socket_timeout": SILENT_S, "socket_keepalive": True}


def connect_timeout_s(broker_url: str) -> float:
    """How long a node of this broker may take to let us in."""
    return _NODE_SILENT_S if ";" in broker_url else SILENT_S


def masked(url: str) -> str:
    """A broker's URL without passwords, of one or several nodes."""
    return ";".join(sanitize_url(part) for part in url.split(";"))


def verified(url: str) -> str:
    """A broker's URL that says whether to check the server's certificate: yes, unless `url` says otherwise.

    For a `rediss://` URL that does not say so, kombu would not check it, and Celery would not start.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss" or "ssl_cert_reqs" in dict(parse_qsl(parts.query)):
        return url
    return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"


def declare_queues(connection: Connection) -> None:
    """Create the missing queues on RabbitMQ. A queue that exists is used as it is, whatever its arguments.

    Does nothing on Redis, where the first message creates a queue.
    """
    if connection.transport.driver_type != "amqp":
        return
    for name, arguments in RABBITMQ_ARGUMENTS.items():
        queue: Queue = Queue(name, Exchange(name), routing_key=name, queue_arguments=arguments)
        with connection.channel() as channel:  # which RabbitMQ closes after a refusal
            try:
                queue(channel).declare()
            except PreconditionFailed as error:
                logger.warning("The queue %s has wrong arguments, and is used as it is: %s", name, error)
