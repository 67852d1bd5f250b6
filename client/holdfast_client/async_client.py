"""The producer for workflow engines and services that run on asyncio.

    async with AsyncClient("redis://broker:6379/0") as client:
        run = await client.start(org_id="acme", workflow_id="run-1", credits=50, wait_s=5)
        async with client.batch() as batch:  # which gathers, so its calls are not awaited
            batch.finish(org_id="acme", workflow_id="run-1", credits=30)

It sends the same messages as `Client`, and raises the same errors. A call that waits for its answer holds no
thread, and all calls that wait share one connection. A call that is cancelled may have sent its message.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from typing import Any, Self, TypeVar
from uuid import uuid4

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from holdfast_client.broker import QUEUE
from holdfast_client.client import (
    NO_RESULT_URL,
    AsyncMessages,
    Batch,
    NoAnswerError,
    NoAnswersError,
    Waiting,
    a_batch,
    answer_key,
    answers_at,
    encoded,
    hand_over,
    told,
    waiting,
)
from holdfast_client.publishing import POOL_LIMIT, RETRY_PAUSE_S, RETRY_S, TIMEOUT_S, Publisher
from holdfast_client.results import Result
from holdfast_client.silence import what_is_seen

Value = TypeVar("Value")

_ERRORS = (RedisError, OSError)
_HANGS = (TimeoutError, RedisTimeoutError)


class TooLateError(NoAnswerError):
    """The answer did not come in time; that of `Asked.answer` does not say what may be the reason."""


class Asked:
    """A message that the broker has, and whose answer is on its way."""

    def __init__(self, task: str, announced: asyncio.Future[bytes]) -> None:
        self._task = task
        self._announced = announced

    async def answer(self, wait_s: float) -> Result | None:
        """The answer, if it comes within `wait_s` seconds. Raises NoAnswerError and DeadLetteredError.

        May be called again. None: it is the answer of a run of the scheduler, which has no Result.
        """
        try:
            async with asyncio.timeout(wait_s):
                announced = await asyncio.shield(self._announced)
        except TimeoutError:
            raise TooLateError(f"{self._task} was sent, but no answer came within {wait_s:g} s") from None
        except _ERRORS as error:
            raise NoAnswerError(f"{self._task} was sent, but its answer could not be read: {error}") from error
        return told(json.loads(announced))


class AsyncClient(AsyncMessages):
    """Sends messages to the ledger. One client may be used by many tasks of one event loop.

    Every method takes `wait_s`: how many seconds to wait for the answer. Without it the method returns Unanswered as
    soon as the broker has the message; with it, the Result. Raises InvalidMessageError, NotSentError and, with
    `wait_s`, NoAnswerError and DeadLetteredError. If the broker is gone, retries for some seconds before NotSentError.
    """

    def __init__(self, broker_url: str, *, queue: str = QUEUE, result_url: str | None = None) -> None:
        """As for `Client`. Raises ValueError for a URL that can never be used."""
        result_url = answers_at(broker_url, result_url)
        super().__init__(Publisher(broker_url, queue))
        # Of its own: the event loop's threads are for others, and a broker that is silent keeps a thread busy.
        self._threads = ThreadPoolExecutor(POOL_LIMIT, thread_name_prefix="holdfast-client")
        self._results = None if result_url is None else _redis(result_url)
        self._line: _Line | None = None
        self._looking: asyncio.Task[str] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """The one that has used this client first."""

    @property
    def keeps_answers(self) -> bool:
        """Whether answers are kept, so that `wait_s` may be given."""
        return self._results is not None

    async def close(self) -> None:
        """Close all connections. Calls that send are waited for; those that wait for an answer must have ended."""
        await asyncio.to_thread(self._threads.shutdown)
        if self._looking is not None:
            await asyncio.wait([self._looking])
        self._publisher.close()
        if self._results is not None:
            await self._results.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Batch]:
        """Gather messages, and send all of them when the block ends: as `Client.batch`."""
        batch = Batch(self._publisher)
        try:
            yield batch
        finally:
            messages = batch.close()
        if messages:
            await self._in_thread(lambda: hand_over(self._publisher, a_batch(messages), messages))

    async def waiting(self) -> dict[str, Waiting]:
        """The messages in each queue of the ledger. Raises BrokerUnavailableError or UnsupportedBrokerError."""
        return await self._in_thread(lambda: waiting(self._publisher))

    async def send(self, task: str, message: dict[str, Any], *, wait_s: float | None = None) -> Result | None:
        """Send `message`, a JSON object, to `task`. Raises InvalidMessageError if it is not valid."""
        self.refuse_invalid(task, message)
        return await self.send_as_is(task, [message], {}, wait_s=wait_s)

    async def send_as_is(
        self, task: str, args: list[Any], kwargs: dict[str, Any], *, wait_s: float | None = None
    ) -> Result | None:
        """Send a task with these arguments, unchecked, as for a replay. Raises the errors of the other methods.

        Returns None for a run of the scheduler, which has no Result.
        """
        if wait_s is not None:
            async with self.asking(task, args, kwargs) as asked:
                try:
                    return await asked.answer(wait_s)
                except TooLateError as error:
                    raise NoAnswerError(f"{error}: {await self._seen()}") from None
        self._refuse_not_allowed(task, args[0] if args else None)
        message = encoded(self._publisher, task, args, kwargs)
        await self._in_thread(lambda: hand_over(self._publisher, task, [message]))
        return None

    @asynccontextmanager
    async def asking(self, task: str, args: list[Any], kwargs: dict[str, Any]) -> AsyncIterator[Asked]:
        """Send a task with these arguments, unchecked. In the block the broker has it, and its answer can be awaited.

        Raises NotSentError, which is a NoAnswersError if only its answer could not be waited for, and ValueError if no
        answers are kept.
        """
        self._refuse_not_allowed(task, args[0] if args else None)
        if self._results is None:
            raise ValueError(NO_RESULT_URL)
        task_id = str(uuid4())
        message = encoded(self._publisher, task, args, kwargs, task_id=task_id)
        key = answer_key(task_id)
        try:
            line, announced = await self._expect(self._results, key)
        except _ERRORS as error:
            why = str(error) or f"nothing was heard from the store of answers for {TIMEOUT_S:g} s"
            raise NoAnswersError(f"{task} was not sent, as its answer could not be waited for: {why}") from error
        try:
            await self._in_thread(lambda: hand_over(self._publisher, task, [message]))
            yield Asked(task, announced)
        finally:
            if await self._leave(line, key):
                with suppress(*_ERRORS):
                    await self._results.delete(key)

    async def _expect(self, results: Redis, key: str) -> "tuple[_Line, asyncio.Future[bytes]]":
        """The line and what is announced on it under `key`. Retries for RETRY_S, as sending does."""
        self._refuse_other_loop()
        loop = asyncio.get_running_loop()
        until = loop.time() + RETRY_S
        while True:
            line = self._line
            if line is None or line.is_broken:
                line = self._line = _Line(_Announcements(results.connection_pool))
            try:
                return line, await line.expect(key)
            except BaseException as error:
                await self._leave(line, key)
                if not isinstance(error, _ERRORS) or isinstance(error, _HANGS) or loop.time() > until:
                    raise
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _leave(self, line: "_Line", key: str) -> bool:
        """Expect nothing under `key` any more. Returns whether it was announced."""
        was_announced = line.forget(key)
        if line.is_idle:
            if self._line is line:
                self._line = None
            await line.close()
        return was_announced

    def _refuse_other_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("this AsyncClient is used by another event loop already: make one for each")

    async def _seen(self) -> str:
        """Why answers do not come. Looked up once for all who ask meanwhile: it takes a thread, which sends need."""
        if self._looking is None or self._looking.done():
            looking = self._in_thread(lambda: what_is_seen(self._publisher))
            self._looking = asyncio.create_task(looking)
        return await asyncio.shield(self._looking)

    async def _in_thread(self, act: Callable[[], Value]) -> Value:
        self._refuse_other_loop()
        # With the caller's context, in which a span may be current.
        return await asyncio.get_running_loop().run_in_executor(self._threads, copy_context().run, act)


class _Announcements(PubSub):
    """Does not connect again by itself: one task writes and one reads, and both would do it, on the same connection."""

    async def _reconnect(self, conn: AbstractConnection, *_: object, **__: object) -> None:
        await conn.disconnect(nowait=True)


class _Line:
    """One connection on which the answers of several calls are announced. It is closed when none of them waits.

    Only tasks of its own use the connection, so a call that is cancelled leaves it as it is.
    """

    def __init__(self, pubsub: PubSub) -> None:
        self._pubsub = pubsub
        self._wanted = asyncio.Queue[tuple[bool, str] | None]()
        """The keys to subscribe to, or not any more; None is the end."""
        self._subscribed: dict[bytes, asyncio.Future[None]] = {}
        self._announced: dict[bytes, asyncio.Future[bytes]] = {}
        self._heard = 0
        self.is_broken = False
        self._running = asyncio.create_task(self._run())

    @property
    def is_idle(self) -> bool:
        """Whether nobody expects an answer."""
        return not self._announced

    async def expect(self, key: str) -> asyncio.Future[bytes]:
        """What is announced under `key` from here on: none is missed. It fails if the connection does.

        Raises RedisError and OSError; then the connection is broken. Whoever calls this must `forget` the key.
        """
        loop = asyncio.get_running_loop()
        channel = key.encode()
        subscribed = self._subscribed[channel] = loop.create_future()
        announced = self._announced[channel] = loop.create_future()
        self._wanted.put_nowait((True, key))
        silences = 0
        while not subscribed.done():
            heard = self._heard
            await asyncio.wait([subscribed], timeout=TIMEOUT_S / 2)
            # The loop may have been too busy to hear anything, but not twice: it has read in between.
            silences = silences + 1 if self._heard == heard else 0
            if silences == 2 and not subscribed.done():
                self.is_broken = True
                raise TimeoutError
        subscribed.result()
        return announced

    def forget(self, key: str) -> bool:
        """Expect it no longer. Returns whether it was announced."""
        subscribed, announced = self._subscribed.pop(key.encode()), self._announced.pop(key.encode())
        if not self.is_idle:
            self._wanted.put_nowait((False, key))
        return not any([_failed(subscribed), _failed(announced)])  # a list, as both must be looked at

    async def close(self) -> None:
        """Close the connection."""
        self._wanted.put_nowait(None)
        await asyncio.wait([self._running])

    async def _run(self) -> None:
        """Send what is wanted, until it is None. Not cancelled: Python 3.11 may lose that while redis-py sends."""
        reading: asyncio.Task[None] | None = None
        try:
            while (wanted := await self._wanted.get()) is not None:
                is_wanted, key = wanted
                await (self._pubsub.subscribe(key) if is_wanted else self._pubsub.unsubscribe(key))
                reading = reading or asyncio.create_task(self._read())
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody must wait for what is not read any more
            self._fail(error)
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.wait([reading])
            await self._pubsub.aclose()

    async def _read(self) -> None:
        try:
            while True:
                message = await self._pubsub.get_message(timeout=None)
                self._heard += 1
                match message:
                    case {"type": "subscribe", "channel": bytes(channel)} if channel in self._subscribed:
                        _set(self._subscribed[channel], None)
                    case {"type": "message", "channel": bytes(channel), "data": data} if channel in self._announced:
                        _set(self._announced[channel], data)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
            self._wanted.put_nowait(None)

    def _fail(self, error: Exception) -> None:
        self.is_broken = True
        told = error if isinstance(error, _ERRORS) else RedisError(repr(error))
        expected: list[asyncio.Future[Any]] = [*self._subscribed.values(), *self._announced.values()]
        for future in expected:
            if not future.done():
                future.set_exception(told)


def _failed(future: asyncio.Future[Any]) -> bool:
    """Whether `future`, which nobody awaits any more, has no result."""
    return future.cancel() or future.cancelled() or future.exception() is not None


def _set(future: asyncio.Future[Value], value: Value) -> None:
    if not future.done():  # or cancelled
        future.set_result(value)


def _redis(url: str) -> Redis:
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=POOL_LIMIT,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),  # the caller gets the error at once, and decides
    )
    return Redis.from_pool(pool)
