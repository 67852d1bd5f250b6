"""Hands messages to the broker: one or a thousand of them in one round trip.

Guarantee: when `publish` returns, the broker has every message, in this order. Redis answers one LPUSH once it has all
of them; RabbitMQ confirms each one, and all confirms are awaited together. When `publish` raises, none, some or all
have arrived. A message is one of Celery's protocol 2, as of `Celery.send_task`; kombu adds what the transport needs.

The broker may get a message more than once: one that may not have arrived is sent again, up to three times.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from socket import gethostname
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakSet

from amqp.exceptions import AMQPError
from kombu.connection import Connection, ConnectionPool
from kombu.exceptions import KombuError
from kombu.messaging import Producer
from kombu.pools import ProducerPool
from kombu.serialization import dumps
from kombu.utils.json import dumps as to_json
from redis.exceptions import RedisError

from holdfast_client.broker import (
    ENGINE_QUEUE,
    QUEUE,
    REPLAY_OF,
    SILENT_S,
    connect_timeout_s,
    connection_options,
    declare_queues,
    masked,
    verified,
)
from holdfast_client.broker_urls import REDIS_SCHEMES
from holdfast_client.redis_server import UnsupportedServerError, check_server
from holdfast_client.tracing import TRACEPARENT, publishing

TIMEOUT_S = SILENT_S
"""How long the broker, or one of its nodes, may be silent."""

POOL_LIMIT = 10
"""The most connections of one client; further threads wait for one."""

CHUNK_MESSAGES = 1_000
CHUNK_BYTES = 4 * 2**20
"""The most that is sent in one round trip: too little to slow down other users of the broker."""

_SHOWN = 1024
_PERSISTENT = 2  # AMQP's delivery mode for messages that survive a restart of the broker
RETRY_S, RETRY_PAUSE_S = 3.0, 0.1
"""How long a sender that wants an answer tries to be told of it, and the pause in between, if the store is away."""

_RETRIES: dict[str, Any] = {"max_retries": 3, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1.0}


class UnconfirmedError(Exception):
    """RabbitMQ did not confirm a message. The text says why."""


BROKER_ERRORS = (KombuError, RedisError, AMQPError, OSError, UnconfirmedError, UnsupportedServerError)
"""The errors of `publish`: the broker is away, silent or full, refuses the login, or can never be used."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A task as Celery sends it, without what the connection adds."""

    body: str | bytes
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]


class FailoverConnection(Connection):
    """Switches to another node of the broker at once, whatever the old one is doing."""

    def switch(self, conn_str: str) -> None:
        """Leave the old node without a word to it."""
        self.collect()  # type: ignore[no-untyped-call] # an orderly close would wait for a node that is silent
        super().switch(conn_str)  # type: ignore[no-untyped-call]


class _Connections(ConnectionPool):
    """Connections that a fork leaves alone. Closing its copies, as kombu does, would end the parent's on AMQP, too."""

    close_after_fork = False

    def new(self) -> FailoverConnection:
        like = self.connection._info(resolve=False)  # noqa: SLF001 # as its base class does
        return FailoverConnection(**dict(like))  # type: ignore[no-untyped-call]


class Publisher:
    """Hands messages to the broker, over a few connections of its own. May be used by many threads and forks."""

    def __init__(self, broker_url: str, queue: str = QUEUE) -> None:
        """`queue`: the ledger's queue that messages go to. Raises ValueError if it is another one."""
        if queue not in (QUEUE, ENGINE_QUEUE):
            raise ValueError(f"the queue must be {QUEUE} or {ENGINE_QUEUE}, not {queue!r}: no worker takes from others")
        self._broker_url = broker_url
        self._system = "redis" if broker_url.startswith(REDIS_SCHEMES) else "rabbitmq"
        self.queue = queue
        self._reply_to = str(uuid4())  # a message of Celery's names one, though nobody listens there
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        # Pools of our own, which `close` may close: the whole process shares those of kombu.
        self._connections: ConnectionPool = _Connections(_connection(self._broker_url), POOL_LIMIT)  # type: ignore[no-untyped-call]
        self._producers = ProducerPool(self._connections, limit=POOL_LIMIT)
        self._confirms: WeakKeyDictionary[Any, _Confirms] = WeakKeyDictionary()
        self._checked: WeakSet[Any] = WeakSet()

    def _reopen_after_fork(self) -> None:
        if self._process != os.getpid():  # the open connections are the parent's
            self._open()

    @property
    def connections(self) -> ConnectionPool:
        """The pool of connections to the broker."""
        self._reopen_after_fork()
        return self._connections

    def new_connection(self) -> Connection:
        """A connection of its own, which whoever asks for it closes."""
        return _connection(self._broker_url)

    @property
    def broker(self) -> str:
        """The broker's URL without passwords."""
        return masked(self._broker_url)

    def encode(
        self,
        task: str,
        args: list[Any],
        kwargs: dict[str, Any],
        *,
        task_id: str | None = None,
        replay_of: int | None = None,
        traceparent: str | None = None,
    ) -> Encoded:
        """Encode a message for `task`. Its result is stored only if `task_id` is given. Raises EncodeError.

        `replay_of`: the dead letter whose message this is. `traceparent`: the trace of that message.
        """
        is_awaited = task_id is not None
        task_id = task_id or str(uuid4())
        headers: dict[str, Any] = {
            "lang": "py",
            "task": task,
            "id": task_id,
            "shadow": None,
            "eta": None,
            "expires": None,
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": task_id,
            "parent_id": None,
            "argsrepr": _shown(args),
            "kwargsrepr": _shown(kwargs),
            "origin": f"gen{os.getpid()}@{gethostname()}",
            "ignore_result": not is_awaited,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        }
        if replay_of is not None:
            headers[REPLAY_OF] = replay_of
        if traceparent is not None:
            headers[TRACEPARENT] = traceparent
        embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
        content_type, content_encoding, body = dumps((args, kwargs, embed), serializer="json")
        properties = {"correlation_id": task_id, "reply_to": self._reply_to, "delivery_mode": _PERSISTENT}
        return Encoded(body, content_type, content_encoding, headers, properties)

    def publish(self, messages: Sequence[Encoded]) -> None:
        """Hand over all `messages`, in this order. Raises one of BROKER_ERRORS; then any of them may have arrived."""
        with publishing(self.queue, self._system, [message.headers for message in messages]):
            self._publish(messages)

    def _publish(self, messages: Sequence[Encoded]) -> None:
        self._reopen_after_fork()
        with self._producers.acquire(block=True) as producer:
            hand_over = self._confirmed if producer.connection.transport.driver_type == "amqp" else self._pushed
            patiently = producer.connection.ensure(producer, hand_over, **_RETRIES)
            try:
                for chunk in _chunks(messages):
                    patiently(producer, chunk)
            except BROKER_ERRORS:
                leave(producer.connection)
                raise

    def close(self) -> None:
        """Close all connections; in a fork, not those of its parent."""
        self._reopen_after_fork()
        self._producers.force_close_all()
        self._connections.force_close_all()

    def _pushed(self, producer: Producer, chunk: list[Encoded]) -> None:
        channel = producer.channel
        if channel not in self._checked:  # a cluster would accept messages that no worker takes
            check_server(channel.client)
            self._checked.add(channel)
        channel.client.lpush(self.queue, *[_envelope(channel, message, self.queue) for message in chunk])

    def _confirmed(self, producer: Producer, chunk: list[Encoded]) -> None:
        channel = producer.channel
        confirms = self._confirms.get(channel)
        if confirms is None:
            confirms = self._confirms[channel] = _Confirms(channel, self.queue)
        if confirms.publish(channel, chunk) == 0:
            return
        declare_queues(producer.connection)  # nobody has yet
        if unroutable := confirms.publish(channel, chunk):
            raise UnconfirmedError(f"there is no queue {self.queue} for {unroutable} of {len(chunk)} messages")


class _Confirms:
    """RabbitMQ's confirms for the messages published on one channel. Keeps no reference to the channel."""

    def __init__(self, channel: Any, queue: str) -> None:
        self._queue = queue
        # A user of RabbitMQ's default exchange may write to every queue, which an engine must not.
        self._exchange = "" if queue == QUEUE else queue
        self._tag = 0  # RabbitMQ numbers the messages published on a channel, from 1
        self._acknowledged_to = 0
        self._open: set[int] = set()
        self._nacked = 0
        self._returned = 0
        channel.confirm_select()
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(self._on_nack)
        channel.events["basic_return"].add(self._on_return)

    def publish(self, channel: Any, chunk: list[Encoded]) -> int:
        """Publish all, then wait for all confirms. Returns how many found no queue. Raises UnconfirmedError."""
        self._nacked = self._returned = 0
        for message in chunk:
            channel.basic_publish(
                _prepared(channel, message),
                exchange=self._exchange,
                routing_key=self._queue,
                mandatory=True,
                timeout=TIMEOUT_S,
            )
            self._tag += 1
            self._open.add(self._tag)
        try:
            while self._open:
                channel.connection.drain_events(timeout=TIMEOUT_S)
        except TimeoutError:
            raise UnconfirmedError(f"it confirmed nothing for {TIMEOUT_S:g} s") from None
        if self._nacked:
            raise UnconfirmedError(
                f"it refused {self._nacked} of {len(chunk)} messages: the queue {self._queue} is full or unavailable"
            )
        return self._returned

    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._open.difference_update(range(self._acknowledged_to + 1, tag + 1) if multiple else (tag,))
        if multiple:
            self._acknowledged_to = tag

    def _on_nack(self, tag: int, multiple: bool) -> None:
        before = len(self._open)
        self._on_ack(tag, multiple)
        self._nacked += before - len(self._open)

    def _on_return(self, *_: object) -> None:
        self._returned += 1


def leave(connection: Connection) -> None:
    """Drop a connection that has failed. Its next use goes to the broker's next node, if there is one."""
    connection.collect()  # an orderly close would wait for a broker that may be silent
    connection.maybe_switch_next()


def connect(connection: Connection) -> None:
    """Try each of the broker's nodes once. Raises one of BROKER_ERRORS."""
    nodes = len(connection.alt) or 1
    connection.ensure_connection(max_retries=nodes - 1, timeout=nodes * TIMEOUT_S)


def _connection(broker_url: str) -> Connection:
    """A connection to the broker, which is opened when it is used."""
    nodes = broker_url.count(";") + 1
    return Connection(
        verified(broker_url),
        heartbeat=0,  # an idle client sends none; a dead connection is found when used
        connect_timeout=connect_timeout_s(broker_url),
        transport_options={
            **connection_options(broker_url),
            # Kombu's limits for connecting, for all nodes together: the number of tries, and the time. Without the
            # first it tries forever; without the second it gives up after the first silent node.
            **_RETRIES,
            "max_retries": nodes * (_RETRIES["max_retries"] + 1) - 1,
            "connect_retries_timeout": nodes * TIMEOUT_S,
            # On RabbitMQ, kombu's confirms would wait for each message, which `_Confirms` does not. On Redis, kombu
            # would put back what workers hold unacknowledged, also those of others, whenever it waits for a reply.
            **({"ack_emulation": False} if broker_url.startswith(REDIS_SCHEMES) else {"confirm_publish": False}),
        },
    )


def _chunks(messages: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    chunk: list[Encoded] = []
    size = 0
    for message in messages:
        if len(chunk) == CHUNK_MESSAGES or (chunk and size + len(message.body) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(message)
        size += len(message.body)
    if chunk:
        yield chunk


def _shown(arguments: Any) -> str:
    """Arguments as monitors show them, cut at the length of Celery."""
    return repr(arguments)[:_SHOWN]


def _prepared(channel: Any, message: Encoded) -> Any:
    return channel.prepare_message(
        message.body, 0, message.content_type, message.content_encoding, message.headers, dict(message.properties)
    )


def _envelope(channel: Any, message: Encoded, queue: str) -> str:
    """The entry that kombu's Redis transport puts on the list."""
    prepared = _prepared(channel, message)
    channel._inplace_augment_message(prepared, "", queue)  # noqa: SLF001 # adds the delivery tag, encodes the body
    return str(to_json(prepared))
