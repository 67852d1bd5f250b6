"""A Redis transport that cannot lose a message: kombu's own, with another way of taking and acknowledging.

Kombu takes a message in one round trip and records it as unacknowledged in the next. A worker that is killed in between
loses it. Here a worker waits for a queue without taking anything from it. Then one script takes the messages and
records them, atomically. A whole batch is acknowledged in one round trip. The reply to a wait is the next entry; if
that is too large to be taken whole, only its length is read.

Guarantee: whatever is killed, a message is in its queue or in `UNACKED`. These keys are our own. Under kombu's names,
the workers of all applications on the database keep what they hold, and each restores what it finds there after its own
timeout. An entry that is no message of kombu's is delivered too, as `SetAside`, and so is the first part of an entry
that is too large to be taken whole.

The messages of a living worker do not time out. Those of a dead one go back to their queue, and each entry counts how
often it was restored, unless it is too large: such an entry is never parsed. An entry that was restored `SUSPECT` times
is taken alone, so that from then on only the culprit is counted. After `DELIVERY_LIMIT` times it is delivered as
`SetAside`, and not parsed.

Does not change how messages are published. It depends on internals of kombu 5.7 and on redis-py's parser, which
tests/integration/transport checks.
"""

import base64
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from queue import Empty
from typing import Any
from uuid import uuid4

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from pydantic_core import from_json
from redis import ConnectionPool, Redis
from redis._parsers import _RESP2Parser
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

from holdfast_client.broker import QUEUE, REPLAY_OF
from holdfast_client.messages import DELIVERY_LIMIT, MAX_BODY_BYTES, SUSPECT, InvalidMessage, too_large_entry
from holdfast_client.redis_server import check_server
from worker.redis_server import server_risk

logger = logging.getLogger(__name__)

NO_MESSAGE = InvalidMessage("undecodable_message", "the entry in the queue is not a Celery message", None)
DELIVERED_TOO_OFTEN = InvalidMessage("delivery_limit", "it was delivered too often and never acknowledged", None)

MOST_TAKEN = 500
"""The most messages that one step takes."""

MOST_BYTES = 8 * 2**20
"""After this many bytes, one step takes no more."""

MOST_HELD_BYTES = 32 * 2**20
"""A worker that holds this many bytes takes no more until it has acknowledged some."""

MOST_ENTRY_BYTES = 256 * 2**10
"""The largest entry of a queue that is taken whole; of a larger one a worker gets the first part."""

UNACKED, UNACKED_INDEX = "credits.unacked", "credits.unacked_index"
"""The entries that are taken and not acknowledged, by tag, and when each was taken. One that is too large to be taken
whole is in a list of its own, `credits.unacked.<tag>`: it is moved there and back, and never copied."""

TAKES_ONE = (
    f"Taking messages one by one: the next one came back from workers that died, {SUSPECT} times or more, and may have "
    f"ended them; a message that comes back {DELIVERY_LIMIT} times becomes a dead letter"
)
TAKES_MANY = "Taking many messages at once again"

WAIT_S = 1
"""How long one wait lasts. Then the lists without a wait are checked too: messages with a priority, which kombu keeps
in lists of their own."""

OVERDUE_S = 30
"""A wait that has no reply after this long has lost its server."""

_PRIORITIES = (3, 6, 9)

_TAKE = """
local unacked, unacked_index = KEYS[1], KEYS[2]
local limit, tag, tail, keep = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4] == '1'
local most, most_entry, first_part = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local holds_nothing, suspect_from = ARGV[8] == '1', tonumber(ARGV[9])
-- A header of an entry that is not parsed: no text within it has such quotes, as JSON escapes them.
local function header(ends, name)
  local at = string.find(ends, '"' .. name .. '": ', 1, true)
  return at and string.match(string.sub(ends, at, at + 300), '^"[%w_]+": "?([%w_.:-]+)"?[,}]') or ''
end
-- The server's clock: those of the workers may differ.
local clock = redis.call('TIME')
local now = string.format('%d.%06d', clock[1], clock[2])
-- What can fail fails here, before anything is taken.
redis.call('HLEN', unacked); redis.call('ZCARD', unacked_index)
for list = 3, #KEYS do redis.call('LLEN', KEYS[list]) end
local taken, held, index, large, bytes, suspect, full = {}, {}, {}, {}, 0, 0, false
for list = 3, #KEYS do
  while not full and #taken < limit do
    local items = redis.call('LRANGE', KEYS[list], -math.min(limit - #taken, 20), -1)
    local done = 0 -- how many of the list's last entries are taken and still in it
    for at = #items, 1, -1 do
      local item, restored = items[at], 0
      if keep and string.sub(item, 1, 13) == '{"restored": ' then
        restored = tonumber(string.match(item, '^{"restored": (%d+), ')) or 0
      end
      if restored >= suspect_from then
        suspect = 1
        full = #taken > 0 or not holds_nothing
        if full then break end
      end
      done = done + 1
      local own_tag = tag .. string.format('%03d', #taken + 1) -- entries are restored in the order of their tags
      local kept = item
      if #item > most_entry then
        kept = '' -- it is moved to a key of its own: a copy would take the server's time
        local told = {#taken + 1, #item, redis.sha1hex(item)}
        local ends = string.sub(item, 1, first_part) .. string.sub(item, -first_part)
        for name = 10, #ARGV do told[#told + 1] = header(ends, ARGV[name]) end
        large[#large + 1] = told
        item = string.sub(item, 1, first_part)
        if keep then
          redis.call('LTRIM', KEYS[list], 0, -done)
          redis.call('LMOVE', KEYS[list], unacked .. '.' .. own_tag, 'RIGHT', 'LEFT')
          done = 0
        end
      end
      taken[#taken + 1] = item
      bytes = bytes + #item
      held[#held + 1] = own_tag
      held[#held + 1] = '[' .. kept .. tail
      index[#index + 1] = now
      index[#index + 1] = own_tag
      full = bytes >= most or suspect == 1
      if full then break end
    end
    if done > 0 then redis.call('LTRIM', KEYS[list], 0, -1 - done) end
    if #items == 0 then break end
  end
end
if keep and #taken > 0 then
  redis.call('HSET', unacked, unpack(held))
  redis.call('ZADD', unacked_index, unpack(index))
end
return {taken, large, suspect}
"""

_RESTORE = """
local unacked, unacked_index = KEYS[1], KEYS[2]
local push, prefix, counts, queue = ARGV[1], ARGV[2], ARGV[3] == '1', ARGV[4]
redis.call('HDEL', unacked, '')
for at = 5, #ARGV do
  local tag = ARGV[at]
  local held = redis.call('HGET', unacked, tag)
  if held then
    local item, came_from = string.match(held, '^%[(.*), "", "([^"]*)"%]$')
    if not item then item, came_from = held, queue end
    local own_key = unacked .. '.' .. tag
    -- The push goes first: what fails there is still held.
    if item == '' and redis.call('EXISTS', own_key) == 1 then -- it is large
      redis.call('LMOVE', own_key, prefix .. came_from, 'LEFT', push == 'LPUSH' and 'LEFT' or 'RIGHT')
    else
      if counts and string.sub(item, 1, 1) == '{' then
        local restored, rest = string.match(item, '^{"restored": (%d+), (.*)$')
        item = '{"restored": ' .. (restored or 0) + 1 .. ', ' .. (rest or string.sub(item, 2))
      end
      redis.call(push, prefix .. came_from, item)
    end
  end
  redis.call('HDEL', unacked, tag)
  redis.call('ZREM', unacked_index, tag)
end
"""

_KEEP_ALIVE = """
local clock = redis.call('TIME')
redis.call('HDEL', KEYS[1], '')
for _, tag in ipairs(ARGV) do redis.call('ZADD', KEYS[2], 'XX', clock[1], tag) end
"""

# When the memory is full, Redis lets a script write only if it has written before. So these two, which add nothing,
# begin with a write that changes nothing; taking begins with LTRIM.

_RESTORED = re.compile(rb'{"restored": (\d{1,9}), ')
_BODY = re.compile(rb'"body": "([A-Za-z0-9+/]*=*)')

_HEADERS = ("task", "id", "ignore_result", REPLAY_OF)
"""What is found in an entry that is not parsed: its task, who waits for its answer, and what it replays."""

_FOUND = [re.compile(rb'"%b": "?([A-Za-z0-9_.:-]{1,256})"?[,}]' % name.encode()) for name in _HEADERS]

Receiver = Callable[[virtual.Message], object]


def read_json(text: bytes) -> Any:
    """Parse JSON as Python's own `json` does, in half the time. Raises the same errors."""
    try:
        return from_json(text)
    except ValueError:  # Python accepts more, such as half a surrogate pair
        return json.loads(text.decode())


class SetAside(virtual.Message):
    """An entry of a queue that cannot or must not be parsed. Its content does not decide how it is handled."""

    def __init__(
        self, channel: "Channel", tag: str, body: bytes, *, headers: dict[str, Any], problem: InvalidMessage
    ) -> None:
        """`headers`: those that are known of it."""
        properties = {"delivery_tag": tag, "delivery_info": {}}
        super().__init__({"properties": properties, "headers": headers}, channel=channel)
        self.body = body
        self.problem = problem


class EntryTooLargeError(Exception):
    """The reply to a wait is an entry that is too large to be taken whole. It is not read, so its connection ends."""


class WaitParser(_RESP2Parser):
    """Reads a reply, unless it is a text of more than MOST_ENTRY_BYTES."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Return the reply. Raises EntryTooLargeError, after which redis-py disconnects."""
        assert self._buffer is not None
        start = self._buffer.get_pos()
        header = self._buffer.readline()
        self._buffer.rewind(start)
        if header.startswith(b"$") and int(header[1:]) > MOST_ENTRY_BYTES:
            raise EntryTooLargeError
        return super().read_response(*args, **kwargs)


class QoS(kombu_redis.QoS):
    """The unacknowledged messages of one channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_for_one = False
        """Whether the message that is held, or the next one, must be held alone."""
        self._bytes: dict[str, int] = {}
        self._held_bytes = 0
        self._kept_alive_at = self._checked_at = time.monotonic()

    def append(self, message: virtual.Message, delivery_tag: str, *, size: int = 0) -> None:
        """Count the message as held. The script that took it has recorded it in Redis."""
        virtual.QoS.append(self, message, delivery_tag)
        self._bytes[delivery_tag] = size
        self._held_bytes += size

    @property
    def holds_nothing(self) -> bool:
        """Whether every message that was taken is acknowledged or given back."""
        return not self._delivered

    def can_consume(self) -> bool:
        """Whether more may be taken: the limits are not reached, and no message must be held alone."""
        if self.holds_nothing:
            return True
        return not self.is_for_one and self._held_bytes < MOST_HELD_BYTES and bool(super().can_consume())

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge one message."""
        self.acknowledge([delivery_tag])

    def acknowledge(self, delivery_tags: Sequence[str]) -> None:
        """Acknowledge messages, all in one round trip."""
        # An entry that was too large to be taken whole is set aside; perhaps others are, too.
        large = [tag for tag in delivery_tags if isinstance(self._delivered.get(tag), SetAside)]
        self.channel.forget(delivery_tags, large)
        for tag in delivery_tags:
            self._delivered.pop(tag, None)
        self._held_bytes -= sum([self._bytes.pop(tag, 0) for tag in delivery_tags])
        self.channel.ask_again()

    def restore_by_tag(self, tag: str, _client: Any = None, leftmost: bool = False) -> None:
        """Put a message back into its queue."""
        self.channel.restore([tag], leftmost=leftmost)

    def restore_unacked(self, _client: Any = None) -> None:
        """Put back all messages that are held."""
        self.channel.restore(list(self._delivered))
        self._forget()

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Put back messages that a dead or frozen worker has held for the visibility timeout. Called every second."""
        now = time.monotonic()
        if now - self._kept_alive_at > self.visibility_timeout / 6:
            self._kept_alive_at = now
            self.channel.keep_alive(list(self._delivered))
        if now - self._checked_at > self.visibility_timeout:
            self._checked_at = now
            self.channel.check_risk()
        self.channel.restore_timed_out(self.visibility_timeout)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """Give back what is held, if the connection still exists. If not, another worker does so after the timeout."""
        connection = self.channel.connection
        if connection is None or connection.client is None:
            self._on_collect.cancel()
            self._forget()
        else:
            super().restore_unacked_once(stderr)

    def _forget(self) -> None:
        self._delivered.clear()
        self._bytes.clear()
        self._held_bytes = 0


class Channel(kombu_redis.Channel):
    """Takes many messages in one step. Waits for each queue on a connection of its own."""

    QoS = QoS
    unacked_key, unacked_index_key = UNACKED, UNACKED_INDEX

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._receivers: dict[str, Receiver] = {}
        self._without_ack: set[str] = set()
        self._waiting: dict[str, Redis] = {}
        self._wait_pool: ConnectionPool | None = None
        self._asked_at: dict[str, float] = {}
        self._ask_again_at: dict[str, float] = {}
        self._is_refused = False
        self._queues_with_suspects: set[str] = set()
        self._next_in: str | None = None
        self.on_risk: Callable[[str | None], object] = lambda _: None
        """Called at the start and every visibility timeout with what `server_risk` returns."""
        self.on_suspect: Callable[[], object] = lambda: None
        """Called with each message that is taken alone."""
        owner = uuid4()
        self._tags = (f"{owner}.{number:012}." for number in count())
        super().__init__(*args, **kwargs)
        self._redis = Redis(connection_pool=self.pool)
        self._take = self._redis.register_script(_TAKE)
        self._begin_again = self._redis.register_script(_KEEP_ALIVE)
        self._restore_to = self._redis.register_script(_RESTORE)

    def check_server(self) -> None:
        """Raise UnsupportedServerError for a server that cannot do what this transport needs. Report its risk."""
        check_server(self._redis)
        self.check_risk()

    def check_risk(self) -> None:
        """Report whether the server's present configuration allows it to lose messages."""
        with suppress(NoPermissionError):
            self.on_risk(server_risk(self._redis.info()))

    def basic_consume(
        self,
        queue: str,
        no_ack: bool,
        callback: Receiver,
        consumer_tag: str,
        **kwargs: Any,
    ) -> None:
        """Deliver the messages of `queue` to `callback`."""
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
            self._disconnect(client)  # a wait takes nothing; its reply must not be read as another one's
            client.close()
        self._queues_with_suspects.discard(queue)
        if queue == self._next_in:
            self._next_in = None

    def _queue_bind(self, *args: Any) -> None:
        with suppress(OutOfMemoryError):  # a queue with messages was bound by their sender
            super()._queue_bind(*args)

    def _connect_to_wait(self) -> Redis:
        if self._wait_pool is None:
            # WaitParser reads protocol 2; redis-py would choose another one, and with it another parser.
            params = {**self._connparams(asynchronous=True), "parser_class": WaitParser, "protocol": 2}
            self._wait_pool = ConnectionPool(**params)
        return Redis(connection_pool=self._wait_pool)

    def _disconnect_pools(self) -> None:
        super()._disconnect_pools()
        pool, self._wait_pool = self._wait_pool, None
        if pool is not None:
            pool.disconnect()

    def basic_get(self, *_: Any, **__: Any) -> None:
        """Not offered: it would take without recording."""
        raise NotImplementedError("this transport delivers messages to consumers only")

    def wait(self, poller: "Poller") -> None:
        """Begin a wait for every queue that has none."""
        if self.connection is None or self.connection.client is None:
            return  # the connection is lost, and this channel with it
        # A suspect that waits to be taken alone comes next, and so does a queue that waited behind another queue's
        # suspect: neither can delay the other forever.
        queues = self.active_queues if self._next_in is None else [self._next_in]
        for queue in queues if self.qos.can_consume() else ():
            client = self._waiting.get(queue)
            if client is None:
                client = self._waiting[queue] = self._connect_to_wait()
                self.handlers[f"wait {queue}"] = partial(self._woken, queue)
            if poller.register_wait(self, client, f"wait {queue}"):
                self._asked_at.pop(queue, None)
            if queue not in self._asked_at and time.monotonic() >= self._ask_again_at.get(queue, 0.0):
                key = self._key(queue)
                assert client.connection is not None
                client.connection.send_command("BLMOVE", key, key, "RIGHT", "RIGHT", WAIT_S)
                self._asked_at[queue] = time.monotonic()

    def ask_again(self) -> None:
        """Wait again at once, as there is room now. The event loop might do so only a second later."""
        if self.connection is not None and self._waiting:
            self.wait(self.connection.cycle)

    def drop_overdue_waits(self) -> None:
        """Disconnect from a server that went away silently."""
        for queue, asked_at in self._asked_at.items():
            if time.monotonic() - asked_at > OVERDUE_S:
                self._disconnect(self._waiting[queue])

    def _poll_error(self, type: str, **_: Any) -> None:
        self.handlers[type]()  # reading raises the error

    def _woken(self, queue: str) -> None:
        """Handle the reply to a wait: there is a message in `queue`, or the wait has ended."""
        client = self._waiting[queue]
        self._asked_at.pop(queue, None)
        is_there = True
        try:
            with suppress(EntryTooLargeError):  # it is there; the next wait has a new connection
                is_there = client.parse_response(client.connection, "BLMOVE") is not None
        except self.connection_errors:
            self._disconnect(client)
            raise
        except OutOfMemoryError:  # to Redis, the wait is a write; taking messages makes room
            self._ask_again_at[queue] = time.monotonic() + WAIT_S
        except ResponseError as error:  # it is read-only, as after a failover, or cannot write its file
            self._ask_again_at[queue] = time.monotonic() + WAIT_S
            if not self._is_refused:
                logger.warning("The broker lets no message be taken; trying every second: %s", error)
            self._is_refused = True
            raise Empty from error
        else:
            if self._is_refused:
                logger.warning("The broker lets messages be taken again")
            self._is_refused = False
        if is_there and self.qos.is_for_one and self._next_in is None and not self.qos.can_consume():
            self._next_in = queue
        if not (queue in self._active_queues and self._take_from(queue)):
            raise Empty

    def _disconnect(self, client: Redis) -> None:
        if client.connection is not None:
            client.connection.disconnect()

    def _take_from(self, queue: str) -> int:
        """Take and deliver the messages of `queue`, up to the prefetch limit. Returns how many."""
        room = self.qos.can_consume_max_estimate()  # None: no limit
        limit, tag = MOST_TAKEN if room is None else min(room, MOST_TAKEN), next(self._tags)
        if limit == 0 or not self.qos.can_consume() or self._next_in not in (None, queue):
            return 0
        lists = [queue, *(f"{queue}{self.sep}{priority}" for priority in _PRIORITIES)]
        tail = f', "", {json.dumps(queue)}]'  # the exchange and the routing key that lead back to the queue
        keep = queue not in self._without_ack
        items, large, suspect = self._take(
            keys=[*self._kept_keys(), *map(self._key, lists)],
            args=[
                limit,
                tag,
                tail,
                int(keep),
                MOST_BYTES,
                MOST_ENTRY_BYTES,
                MAX_BODY_BYTES,
                int(self.qos.holds_nothing),
                SUSPECT,
                *_HEADERS,
            ],
        )
        took_one = bool(self._queues_with_suspects)
        (self._queues_with_suspects.add if suspect else self._queues_with_suspects.discard)(queue)
        if bool(self._queues_with_suspects) != took_one:
            logger.warning(TAKES_MANY if took_one else TAKES_ONE)
        self.qos.is_for_one = bool(suspect)
        self._next_in = queue if suspect and not items else None
        shortened = {position: rest for position, *rest in large}
        for number, item in enumerate(items, start=1):
            message = self._message(f"{tag}{number:03}", item, shortened.get(number), is_suspect=bool(suspect))
            if keep:
                self.qos.append(message, message.delivery_tag, size=len(item))
            if suspect and _restored(item) >= SUSPECT:
                self.on_suspect()
            self._receivers[queue](message)
        return len(items)

    def _message(self, tag: str, item: bytes, shortened: list[Any] | None, *, is_suspect: bool) -> virtual.Message:
        if shortened is not None:
            size, sha1, *found = shortened
            problem = too_large_entry(size, MOST_ENTRY_BYTES, sha1.decode())
            return SetAside(self, tag, _body_of(item), headers=_headers(found), problem=problem)
        if is_suspect and _restored(item) >= DELIVERY_LIMIT:
            headers = _headers([b"" if (told := header.search(item)) is None else told[1] for header in _FOUND])
            return SetAside(self, tag, _body_of(item), headers=headers, problem=DELIVERED_TOO_OFTEN)
        try:
            envelope = read_json(item)
            envelope["properties"]["delivery_tag"] = tag
            return self.Message(envelope, channel=self)
        except Exception:  # noqa: BLE001 - the content of an envelope may cause any error
            return SetAside(self, tag, item, headers={}, problem=NO_MESSAGE)

    def forget(self, delivery_tags: Sequence[str], large: Sequence[str]) -> None:
        """Remove unacknowledged messages, in one round trip. `large`: those that may have keys of their own."""
        if self.connection is None:
            raise ConnectionError("the connection to the broker is closed")
        unacked, unacked_index = self._kept_keys()
        with self._redis.pipeline(transaction=bool(large)) as pipe:
            # In this order, so that the timeout finds whatever an interrupted removal leaves.
            pipe.hdel(unacked, *delivery_tags)
            pipe.zrem(unacked_index, *delivery_tags)
            if large:
                pipe.unlink(*(f"{unacked}.{tag}" for tag in large))
            pipe.execute()

    def keep_alive(self, delivery_tags: Sequence[Any]) -> None:
        """Restart the visibility timeout of these messages."""
        if delivery_tags:
            self._begin_again(keys=self._kept_keys(), args=list(delivery_tags))

    def maybe_refresh_binding_expiry(self) -> None:
        """Called by kombu every second. Ignores a server that refuses it, which `_woken` has reported."""
        with suppress(ResponseError):
            super().maybe_refresh_binding_expiry()

    def restore(self, delivery_tags: Sequence[str], *, leftmost: bool = False) -> None:
        """Put the messages with these tags, in the order in which they were taken, back to the front of their queues.

        `leftmost`: to the back. A round trip for every `MOST_TAKEN` messages.
        """
        for end in range(len(delivery_tags), 0, -MOST_TAKEN):
            some = delivery_tags[max(0, end - MOST_TAKEN) : end]
            self._restore_some(some, "LPUSH" if leftmost else "RPUSH", counts=False)

    def restore_timed_out(self, timeout_s: float) -> None:
        """Put back messages that any worker of ours took more than `timeout_s` seconds ago, and count that."""
        index = self._key(self.unacked_index_key)
        seconds, _ = self._redis.time()
        # These were taken before the server's clock was set back. Their timeout begins now.
        if tags := self._redis.zrange(index, seconds + timeout_s, "+inf", byscore=True, offset=0, num=MOST_TAKEN):
            self.keep_alive(tags)
        while tags := self._redis.zrange(
            index, seconds - timeout_s, "-inf", desc=True, byscore=True, offset=0, num=MOST_TAKEN
        ):
            self._restore_some(tags[::-1], "RPUSH", counts=True)

    def _restore_some(self, delivery_tags: Sequence[Any], push: str, *, counts: bool) -> None:
        # The last one first: what is pushed last is taken first.
        args = [push, self.global_keyprefix, int(counts), QUEUE, *reversed(delivery_tags)]
        self._restore_to(keys=self._kept_keys(), args=args)

    def _kept_keys(self) -> list[str]:
        return [self._key(name) for name in (self.unacked_key, self.unacked_index_key)]

    def _key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"


def _restored(item: bytes) -> int:
    """How often an entry of a queue was restored: the number that the script writes in front of it."""
    count = _RESTORED.match(item)
    return 0 if count is None else int(count[1])


def _headers(found: Sequence[bytes]) -> dict[str, Any]:
    """The headers of `_HEADERS` whose values were found."""
    headers: dict[str, Any] = {name: text.decode() for name, text in zip(_HEADERS, found, strict=True) if text}
    for name in {"ignore_result", REPLAY_OF} & headers.keys():
        with suppress(ValueError):
            headers[name] = json.loads(headers[name])
    return headers


def _body_of(item: bytes) -> bytes:
    """The body in an entry, or in the first part of one, found without a parser; otherwise the entry itself."""
    found = _BODY.search(item)
    if found is None:
        return item
    encoded = found[1]
    return base64.b64decode(encoded[: len(encoded) // 4 * 4])


class Poller(kombu_redis.MultiChannelPoller):
    """Waits for the queues of all channels, in the event loop."""

    def on_poll_start(self) -> None:
        """Begin every wait, before the loop waits."""
        for channel in self._channels:
            channel.wait(self)
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def register_wait(self, channel: Channel, client: Redis, kind: str) -> bool:
        """Have the loop watch the connection of `client`. Returns whether that is new."""
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
        """Handle the reply of a server, or the end of its connection."""
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if channel is not None:
            channel.handlers[kind]()

    def maybe_restore_messages(self) -> None:
        """Called by kombu every second. Ignores a server that refuses it, which `Channel` has reported."""
        with suppress(ResponseError):
            super().maybe_restore_messages()

    def maybe_check_brpop_health(self) -> None:
        """Called by kombu at intervals."""
        for channel in self._channels:
            channel.drop_overdue_waits()


class Transport(kombu_redis.Transport):
    """As set by `broker_transport`."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()  # type: ignore[assignment] # kombu replaces it so, too
