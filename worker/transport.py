"""The Redis transport that cannot lose a message: kombu's own, with another way of taking and acknowledging.

Kombu takes a message in one round trip and records it as unacknowledged in the next; a worker that is killed in between
loses it. Here a worker waits for a queue without taking anything from it, and then one script takes what is there and
records it, atomically. A whole batch is acknowledged in one round trip.

Guarantee: whatever is killed, a message is in its queue, in `UNACKED`, or in the quarantine list. These keys are our
own: under kombu's names every worker of the database keeps what it holds, of whatever application, and restores what it
finds there, after a timeout that is only its own. What is in a queue but is no message of kombu's is set aside in
`QUARANTINE` and delivered from there, as an undecodable message.

It does not change how messages are published, and it leans on the internals of kombu 5.7: tests/integration/
test_transport.py holds what it leans on.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from queue import Empty
from typing import Any
from uuid import uuid4

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from pydantic_core import from_json
from redis import Redis
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

logger = logging.getLogger(__name__)

MOST_TAKEN = 500
"""How many messages one step takes at most."""

MOST_BYTES = 8 * 2**20
"""After how many bytes one step takes no more; twenty messages may come on top."""

QUARANTINE = "credits.quarantine"
"""The list of what was in a queue and is no message. The worker makes dead letters of it."""

UNACKED, UNACKED_INDEX = "credits.unacked", "credits.unacked_index"
"""What is taken and not acknowledged, by its tag, and when each was taken."""

NOT_A_MESSAGE = "application/octet-stream"
"""The content type under which an entry of the quarantine is delivered."""

WAIT_S = 1
"""How long one wait lasts. Then the lists are looked at that nobody waits for: the quarantine, and messages with a
priority, which kombu keeps in lists of their own."""

OVERDUE_S = 30
"""A wait that is not answered for so long has lost its server."""

OLDEST_REDIS = (6, 2)
_PRIORITIES = (3, 6, 9)

_TAKE = """
local unacked, unacked_index, quarantine = KEYS[1], KEYS[2], KEYS[3]
local limit, tag, tail, keep = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4] == '1'
-- The server's clock: those of the workers may differ.
local clock = redis.call('TIME')
local now = string.format('%d.%06d', clock[1], clock[2])
-- What can fail fails here, before anything is taken.
redis.call('HLEN', unacked); redis.call('ZCARD', unacked_index)
for list = 4, #KEYS do redis.call('LLEN', KEYS[list]) end
local set_aside = redis.call('LRANGE', quarantine, -20, -1)
local taken, held, index, bytes, most = {}, {}, {}, 0, tonumber(ARGV[5])
for list = 4, #KEYS do
  while #taken < limit and bytes < most do
    local items = redis.call('RPOP', KEYS[list], math.min(limit - #taken, 20))
    if not items then break end
    for _, item in ipairs(items) do
      bytes = bytes + #item
      taken[#taken + 1] = item
      held[#held + 1] = tag .. #taken
      held[#held + 1] = '[' .. item .. tail
      index[#index + 1] = now
      index[#index + 1] = tag .. #taken
    end
  end
end
if keep and #taken > 0 then
  redis.call('HSET', unacked, unpack(held))
  redis.call('ZADD', unacked_index, unpack(index))
end
return {taken, set_aside}
"""

_RESTORE = """
local unacked, unacked_index, push = KEYS[1], KEYS[2], ARGV[1]
redis.call('HDEL', unacked, '')
for at = 2, #ARGV, 2 do
  local tag, item = ARGV[at], ARGV[at + 1]
  -- The push goes first: what fails there is still held.
  if redis.call('HEXISTS', unacked, tag) == 1 then
    for list = 3, #KEYS do redis.call(push, KEYS[list], item) end
  end
  redis.call('HDEL', unacked, tag)
  redis.call('ZREM', unacked_index, tag)
end
"""

_SET_ASIDE = """
redis.call('HDEL', KEYS[1], '')
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held then
  redis.call('LPUSH', KEYS[3], held:match('^%[(.*), "", "[^"]*"%]$') or held)
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
end
"""

# A script that has written may go on when the memory is full. Those above, which move what is there already, therefore
# begin with a write that changes nothing.

Receiver = Callable[[virtual.Message], object]


class UnsupportedServerError(Exception):
    """The server cannot be the broker; the text says why."""


def server_problem(info: Mapping[str, Any]) -> str | None:
    """Why the server that tells this of itself cannot be the broker, in words."""
    version = str(info["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        return f"the broker is Redis {version}; Holdfast needs 6.2 or newer, or Valkey"
    if info.get("cluster_enabled"):
        return "the broker is a Redis cluster; Holdfast needs a single server"
    return None


def read_json(text: bytes) -> Any:
    """The value of a JSON text, read as Python's own `json` does, in half the time. Raises what that raises."""
    try:
        return from_json(text)
    except ValueError:  # some that Python would take, such as half of a surrogate pair
        return json.loads(text.decode())


class QoS(kombu_redis.QoS):
    """What one channel holds unacknowledged."""

    def append(self, message: virtual.Message, delivery_tag: str) -> None:
        """Count the message as held. The script that took it has recorded it in Redis."""
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge one message."""
        self.acknowledge([delivery_tag])

    def acknowledge(self, delivery_tags: Sequence[str]) -> None:
        """Acknowledge messages, all in one round trip."""
        self.channel.forget(delivery_tags)
        for tag in delivery_tags:
            self._delivered.pop(tag, None)

    def restore_by_tag(self, tag: str, _client: Any = None, leftmost: bool = False) -> None:
        """Put a message back into its queue."""
        self.channel.restore([tag], leftmost=leftmost)

    def restore_unacked(self, _client: Any = None) -> None:
        """Put back all that is held."""
        self.channel.restore(list(self._delivered))
        self._delivered.clear()

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Put back what nobody has acknowledged within the visibility timeout. Called by kombu every second."""
        self.channel.restore_timed_out(self.visibility_timeout)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give back what is held, on a connection that still exists; without one, Redis does after the timeout."""
        connection = self.channel.connection
        if connection is None or connection.client is None:
            self._on_collect.cancel()
            self._delivered.clear()
        else:
            super().restore_unacked_once(stderr)


class Channel(kombu_redis.Channel):
    """Takes many messages in one step. Every queue is waited for on a connection of its own."""

    QoS = QoS
    unacked_key, unacked_index_key = UNACKED, UNACKED_INDEX

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._receivers: dict[str, Receiver] = {}
        self._without_ack: set[str] = set()
        self._waiting: dict[str, Redis] = {}
        self._asked_at: dict[str, float] = {}
        self._ask_again_at: dict[str, float] = {}
        self._is_refused = False
        self._quarantined: dict[str, bytes] = {}
        self._tags = (f"{uuid4()}.{number}." for number in count())
        super().__init__(*args, **kwargs)
        self._redis = Redis(connection_pool=self.pool)
        self._take = self._redis.register_script(_TAKE)
        self._restore_to = self._redis.register_script(_RESTORE)
        self._set_aside = self._redis.register_script(_SET_ASIDE)

    def check_server(self) -> None:
        """Raise UnsupportedServerError for a server that cannot do what this transport needs."""
        try:
            problem = server_problem(self._redis.info())  # before Redis 7: one section, or none
        except NoPermissionError:
            return
        if problem is not None:
            raise UnsupportedServerError(problem)

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Receiver,
        consumer_tag: str,
        **kwargs: Any,
    ) -> None:
        """Deliver what arrives in `queue` to `callback`."""
        self._receivers[queue] = callback
        if no_ack:
            self._without_ack.add(queue)
        super().basic_consume(queue, no_ack=no_ack, callback=callback, consumer_tag=consumer_tag, **kwargs)

    def _basic_cancel(self, consumer_tag: str) -> None:
        queue = self._tag_to_queue.get(consumer_tag, "")
        super()._basic_cancel(consumer_tag)
        if (client := self._waiting.pop(queue, None)) is not None:
            self._asked_at.pop(queue, None)
            self._ask_again_at.pop(queue, None)
            self.connection.cycle.unregister_wait(self, client, f"wait {queue}")
            self._disconnect(client)  # nothing is taken by waiting; the reply must not be the next one's
            client.close()

    def _queue_bind(self, *args: Any) -> None:
        with suppress(OutOfMemoryError):  # what waits in a queue was put there by somebody who has bound it
            super()._queue_bind(*args)

    def basic_get(self, *_: Any, **__: Any) -> None:
        """Not offered: it would take without recording."""
        raise NotImplementedError("this transport delivers messages to consumers only")

    def wait(self, poller: "Poller") -> None:
        """Ask for news of every queue that is not asked for yet."""
        if self.connection is None or self.connection.client is None:
            return  # the connection is lost, and this channel with it
        for queue in self.active_queues if self.qos.can_consume() else ():
            client = self._waiting.get(queue)
            if client is None:
                client = self._waiting[queue] = Redis(connection_pool=self.async_pool)
                self.handlers[f"wait {queue}"] = partial(self._woken, queue)
            if poller.register_wait(self, client, f"wait {queue}"):
                self._asked_at.pop(queue, None)
            if queue not in self._asked_at and time.monotonic() >= self._ask_again_at.get(queue, 0.0):
                key = self._key(queue)
                assert client.connection is not None
                client.connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", WAIT_S)
                self._asked_at[queue] = time.monotonic()

    def drop_overdue_waits(self) -> None:
        """Disconnect from a server that went away without a word."""
        for queue, asked_at in self._asked_at.items():
            if time.monotonic() - asked_at > OVERDUE_S:
                self._disconnect(self._waiting[queue])

    def _poll_error(self, type: str, **_: Any) -> None:
        self.handlers[type]()  # reading tells what is wrong

    def _woken(self, queue: str) -> None:
        """There is something in `queue`, or it was waited for long enough."""
        client = self._waiting[queue]
        self._asked_at.pop(queue, None)
        try:
            client.parse_response(client.connection, "BLMOVE")
        except self.connection_errors:
            self._disconnect(client)
            raise
        except OutOfMemoryError:  # Redis takes the wait for a write; what is taken makes room
            self._ask_again_at[queue] = time.monotonic() + WAIT_S
        except ResponseError as error:  # it only reads, as after a failover, or cannot write its file
            self._ask_again_at[queue] = time.monotonic() + WAIT_S
            if not self._is_refused:
                logger.warning("The broker lets nothing be taken, it is asked every second: %s", error)
            self._is_refused = True
            raise Empty from error
        else:
            if self._is_refused:
                logger.warning("The broker lets messages be taken again")
            self._is_refused = False
        if not (queue in self._active_queues and self._take_from(queue)):
            raise Empty

    def _disconnect(self, client: Redis) -> None:
        if client.connection is not None:
            client.connection.disconnect()

    def _take_from(self, queue: str) -> int:
        """Take and deliver what is in `queue`, up to the prefetch limit; answers with how many messages that was."""
        room = self.qos.can_consume_max_estimate()  # None: no limit
        limit, tag = MOST_TAKEN if room is None else min(room, MOST_TAKEN), next(self._tags)
        if limit == 0:
            return 0
        lists = [queue, *(f"{queue}{self.sep}{priority}" for priority in _PRIORITIES)]
        tail = f', "", {json.dumps(queue)}]'  # the exchange and the routing key that lead back to the queue
        keep = 0 if queue in self._without_ack else 1
        items, quarantined = self._take(
            keys=[*self._kept_keys(), *map(self._key, lists)], args=[limit, tag, tail, keep, MOST_BYTES]
        )
        for number, item in enumerate(items, start=1):
            self._deliver(queue, f"{tag}{number}", item)
        # Who takes without acknowledging waits for a reply, not for messages.
        if keep and quarantined and not self._quarantined:
            self._deliver_quarantined(queue, tag, quarantined)
        return len(items)

    def _deliver(self, queue: str, tag: str, item: bytes) -> None:
        try:
            envelope = read_json(item)
            envelope["properties"]["delivery_tag"] = tag
            message = self.Message(envelope, channel=self)
        except Exception:  # noqa: BLE001 - what is in the envelope decides what is raised
            self.set_aside(tag)
            return
        self._hand_over(queue, message)

    def _deliver_quarantined(self, queue: str, tag: str, items: Sequence[bytes]) -> None:
        for number, item in enumerate(items):
            quarantine_tag = f"{tag}quarantine.{number}"
            self._quarantined[quarantine_tag] = item
            properties = {"delivery_tag": quarantine_tag, "delivery_info": {}}
            message = self.Message({"content-type": NOT_A_MESSAGE, "properties": properties}, channel=self)
            message.body = item
            self._hand_over(queue, message)

    def _hand_over(self, queue: str, message: virtual.Message) -> None:
        if queue not in self._without_ack:
            self.qos.append(message, message.delivery_tag)
        self._receivers[queue](message)

    def forget(self, delivery_tags: Sequence[str]) -> None:
        """Remove messages from what is unacknowledged, in one round trip."""
        if self.connection is None:
            raise ConnectionError("the connection to the broker is closed")
        unacked, unacked_index, quarantine = self._kept_keys()
        with self._redis.pipeline(transaction=False) as pipe:
            # In this order: of one that is half done, nothing stays that no timeout finds.
            pipe.hdel(unacked, *delivery_tags)
            pipe.zrem(unacked_index, *delivery_tags)
            for tag in self._quarantined.keys() & set(delivery_tags):
                pipe.execute_command("LREM", quarantine, 1, self._quarantined.pop(tag))
            pipe.execute()

    def maybe_refresh_binding_expiry(self) -> None:
        """Called by kombu every second; with a server that refuses it, too, and `_woken` has told so."""
        with suppress(ResponseError):
            super().maybe_refresh_binding_expiry()

    def restore(self, delivery_tags: Sequence[str], *, leftmost: bool = False) -> None:
        """Put what is held under these tags, in the order in which it was taken, back to where it is taken from next.

        `leftmost`: to where it is taken from last. What cannot be read, or has no queue, is set aside. Two round trips,
        for `MOST_TAKEN` messages at a time.
        """
        for end in range(len(delivery_tags), 0, -MOST_TAKEN):
            self._restore_some(delivery_tags[max(0, end - MOST_TAKEN) : end], "LPUSH" if leftmost else "RPUSH")

    def restore_timed_out(self, timeout_s: float) -> None:
        """Put back what any worker of ours took more than `timeout_s` seconds ago."""
        index = self._key(self.unacked_index_key)
        seconds, _ = self._redis.time()
        while tags := self._redis.zrange(
            index, seconds - timeout_s, "-inf", desc=True, byscore=True, offset=0, num=MOST_TAKEN
        ):
            self._restore_some(tags[::-1], "RPUSH")

    def _restore_some(self, delivery_tags: Sequence[Any], push: str) -> None:
        unacked, unacked_index, _ = self._kept_keys()
        moves: dict[tuple[str, ...], list[Any]] = {}
        held: Iterable[tuple[Any, Any]] = zip(delivery_tags, self._redis.hmget(unacked, delivery_tags), strict=True)
        for tag, item in reversed(list(held)):  # the last one first: what is pushed last is taken first
            try:
                queues, message = ((), "") if item is None else self._to_restore(item)
            except (ValueError, TypeError, AttributeError, RecursionError):
                self.set_aside(tag)
            else:
                moves.setdefault(queues, []).extend((tag, message))
        for queues, tags_and_messages in moves.items():
            self._restore_to(keys=[unacked, unacked_index, *map(self._key, queues)], args=[push, *tags_and_messages])

    def _to_restore(self, item: bytes) -> tuple[tuple[str, ...], str]:
        """The queues that a message which is held goes back to, and what is put there: as it was."""
        payload, exchange, routing_key = read_json(item)
        queues = tuple(self._lookup(exchange, routing_key))
        if not queues or not all(isinstance(queue, str) for queue in queues):
            raise ValueError(f"no queue is bound to the exchange {exchange}")
        return queues, json.dumps(payload)

    def set_aside(self, tag: str | bytes) -> None:
        """Move what is held under `tag` to the quarantine."""
        self._set_aside(keys=self._kept_keys(), args=[tag])

    def _kept_keys(self) -> list[str]:
        return [self._key(name) for name in (self.unacked_key, self.unacked_index_key, QUARANTINE)]

    def _key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"


class Poller(kombu_redis.MultiChannelPoller):
    """Waits for the queues of all channels, in the event loop."""

    def on_poll_start(self) -> None:
        """Before the loop waits: make sure that there is something to wait for."""
        for channel in self._channels:
            channel.wait(self)
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def register_wait(self, channel: Channel, client: Redis, kind: str) -> bool:
        """Have the loop watch the connection of `client`; answers whether that was new."""
        if self._client_registered(channel, client, kind):
            return False
        self._register(channel, client, kind)
        return True

    def unregister_wait(self, channel: Channel, client: Redis, kind: str) -> None:
        """Have the loop no longer watch the connection of `client`."""
        sock = self._chan_to_sock.pop((channel, client, kind), None)
        if sock is not None and (fileno := sock.fileno()) >= 0:
            self._unregister_from_poll(fileno)
            self._fd_to_chan.pop(fileno, None)

    def on_readable(self, fileno: int) -> None:
        """A server answered, or closed the connection."""
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if channel is not None:
            channel.handlers[kind]()

    def maybe_restore_messages(self) -> None:
        """Called by kombu every second; with a server that refuses it, too, and `Channel` has told so."""
        with suppress(ResponseError):
            super().maybe_restore_messages()

    def maybe_check_brpop_health(self) -> None:
        """Called by kombu every now and then."""
        for channel in self._channels:
            channel.drop_overdue_waits()


class Transport(kombu_redis.Transport):
    """As set by `broker_transport`."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()  # type: ignore[assignment] # kombu replaces it so, too
