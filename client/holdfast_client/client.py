"""The producer for workflow engines and billing systems written in Python.

    client = Client("redis://broker:6379/0")
    run = client.start(org_id="acme", workflow_id="run-1", credits=50, wait_s=5)
    if run.holds:  # the credits are held now
        ...

    with client.batch() as batch:  # thousands at once, in a few round trips
        for run in runs:
            batch.finish(org_id="acme", workflow_id=run.id, credits=run.credits)

A message is checked before it is sent. When a call returns, or a batch's block ends, the broker has it for good. After
a NotSentError, the broker may or may not have it. **Sending the same message again is always safe**, from anywhere and
at any time: it is applied once. `AsyncClient` is the same for asyncio.
"""

import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from inspect import signature
from threading import TIMEOUT_MAX
from typing import Any, Generic, ParamSpec, Protocol, Self, cast, overload
from uuid import uuid4

from kombu.connection import Connection
from kombu.exceptions import EncodeError
from pydantic import BaseModel
from redis import Redis
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.broker_urls import REDIS_SCHEMES, refuse_no_broker, refuse_no_result_store
from holdfast_client.messages import (
    WORKFLOW_TASKS,
    Adjust,
    AnyMessage,
    Bill,
    Cancel,
    Configure,
    Fail,
    Finish,
    Grant,
    InvalidMessage,
    Purchase,
    Refund,
    Reverse,
    Start,
    Subscribe,
    Unsubscribe,
    parse,
)
from holdfast_client.publishing import (
    BROKER_ERRORS,
    RETRY_PAUSE_S,
    RETRY_S,
    TIMEOUT_S,
    Encoded,
    Publisher,
    connect,
    leave,
)
from holdfast_client.redis_server import UnsupportedServerError, check_server
from holdfast_client.results import Limit, Result
from holdfast_client.silence import sees_worker, what_is_seen
from holdfast_client.unanswered import Unanswered

# Kombu keeps a queue as a list and takes from its right end. An entry may be large, so it is not fetched. At its end is
# the tag that distinguishes equal messages.
_OLDEST = """
local entry = redis.call('LINDEX', KEYS[1], -1)
return entry and redis.sha1hex(string.sub(entry, 1, 65536) .. string.sub(entry, -65536))
"""


class ClientError(Exception):
    """The base of the client's errors, about a message or the broker."""


class InvalidMessageError(ClientError, ValueError):
    """The message is not valid; nothing was sent. The text says what is wrong with it."""


class NotSentError(ClientError):
    """It is not certain that the broker has the message, or all of a batch. Sending it again is safe.

    Of a batch, the broker may have none, some or all messages: send all again.
    """


class NoAnswersError(NotSentError):
    """The message was not sent, as its answer could not be waited for: the store of answers does not answer."""


class NoAnswerError(ClientError):
    """The message was sent, but its answer did not come in time. It is still applied; sending it again is safe."""


class BrokerUnavailableError(ClientError):
    """The broker does not answer."""


class UnsupportedBrokerError(BrokerUnavailableError):
    """The broker answers, but can never be used. The text says why."""


class DeadLetteredError(ClientError):
    """The message arrived but could not be applied, and was kept as a dead letter. The text says why."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        told = re.search(r"\(dead letter (\d+), (\w+)\)\Z", text)
        self.letter_id = None if told is None else int(told[1])
        """The number of the dead letter."""
        self.code = None if told is None else told[2]
        """Why, in one word: an `ErrorCode`, or one of a newer worker."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The messages in a queue: their number, and a digest of the oldest one (Redis only)."""

    messages: int
    oldest: bytes | None


Sent = ParamSpec("Sent")
Asked = ParamSpec("Asked")


class AsyncMethod(Protocol[Sent, Asked]):
    """To type checkers, a Method of AsyncMessages: what it returns is awaited."""

    @overload
    async def __call__(self, *args: Sent.args, **kwargs: Sent.kwargs) -> Unanswered: ...

    @overload
    async def __call__(self, *args: Asked.args, **kwargs: Asked.kwargs) -> Result: ...


class Method(Generic[Sent, Asked]):
    """Sends one kind of message. Takes its fields by name, and `wait_s`, the seconds to wait for the answer."""

    def __init__(self, message: Callable[Sent, AnyMessage], asked: Callable[Asked, AnyMessage]) -> None:
        """`asked` is `message` with the field `wait_s`, for type checkers and `help` only."""
        self.task = cast(type[AnyMessage], message).task
        self.__doc__, self.__signature__ = message.__doc__, signature(asked)
        self._sender: Messages | AsyncMessages | None = None

    @overload
    def __get__(self, sender: "AsyncMessages", _: object) -> AsyncMethod[Sent, Asked]: ...

    @overload
    def __get__(self, sender: "Messages | None", _: object) -> Self: ...

    def __get__(self, sender: Any, _: object) -> Any:
        bound = copy(self)
        bound._sender = sender  # noqa: SLF001 - of the same class
        return bound

    @overload
    def __call__(self, *args: Sent.args, **kwargs: Sent.kwargs) -> Unanswered: ...

    @overload
    def __call__(self, *args: Asked.args, **kwargs: Asked.kwargs) -> Result: ...

    def __call__(self, *args: Any, **fields: Any) -> Any:
        """Send the message, without fields that are None. Raises InvalidMessageError if it is not valid."""
        if args:
            raise TypeError(f"{self.task} takes its fields by name")
        assert self._sender is not None
        wait_s = _seconds(fields.pop("wait_s", None))
        given = {name: value for name, value in fields.items() if value is not None}
        message = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in given.items()}
        if isinstance(self._sender, AsyncMessages):
            return self._awaited(self._sender.send(self.task, message, wait_s=wait_s))
        return self._answered(self._sender.send(self.task, message, wait_s=wait_s))

    def _answered(self, answer: Result | None) -> Result | Unanswered:
        return Unanswered(self.task) if answer is None else answer

    async def _awaited(self, answer: Awaitable[Result | None]) -> Result | Unanswered:
        return self._answered(await answer)


def _seconds(wait_s: Any) -> float | None:
    """Check `wait_s` before anything is sent. Raises InvalidMessageError."""
    is_number = isinstance(wait_s, int | float) and not isinstance(wait_s, bool)
    if wait_s is None or (is_number and 0 <= wait_s <= TIMEOUT_MAX):
        return cast(float | None, wait_s)
    raise InvalidMessageError(f"wait_s must be a number of seconds, such as 10, got {wait_s!r}; nothing was sent")


class _Asked(BaseModel):
    wait_s: float


class _Start(_Asked, Start): ...


class _Finish(_Asked, Finish): ...


class _Cancel(_Asked, Cancel): ...


class _Fail(_Asked, Fail): ...


class _Purchase(_Asked, Purchase): ...


class _Grant(_Asked, Grant): ...


class _Adjust(_Asked, Adjust): ...


class _Refund(_Asked, Refund): ...


class _Bill(_Asked, Bill): ...


class _Reverse(_Asked, Reverse): ...


class _Subscribe(_Asked, Subscribe): ...


class _Unsubscribe(_Asked, Unsubscribe): ...


class _Configure(_Asked, Configure): ...


class Methods:
    """A method for every message of the ledger. Each raises InvalidMessageError if its message is not valid."""

    start = Method(Start, _Start)
    finish = Method(Finish, _Finish)
    cancel = Method(Cancel, _Cancel)
    fail = Method(Fail, _Fail)
    purchase = Method(Purchase, _Purchase)
    grant = Method(Grant, _Grant)
    adjust = Method(Adjust, _Adjust)
    refund = Method(Refund, _Refund)
    bill = Method(Bill, _Bill)
    reverse = Method(Reverse, _Reverse)
    subscribe = Method(Subscribe, _Subscribe)
    unsubscribe = Method(Unsubscribe, _Unsubscribe)
    configure = Method(Configure, _Configure)

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    @property
    def queue(self) -> str:
        """The ledger's queue that messages go to."""
        return self._publisher.queue

    def refuse_invalid(self, task: str, message: dict[str, Any]) -> None:
        """Raise InvalidMessageError if `message` is not valid, or is not taken from the queue of this sender."""
        self._refuse_not_allowed(task, message)
        problem = parse(task, message)
        if isinstance(problem, InvalidMessage):
            raise InvalidMessageError(problem.error)

    def _refuse_not_allowed(self, task: str, message: object) -> None:
        """Raise InvalidMessageError if no worker takes such a message from the queue of this sender."""
        if self._publisher.queue != ENGINE_QUEUE:
            return
        if task not in WORKFLOW_TASKS:
            raise InvalidMessageError(
                f"{task} is not taken from {ENGINE_QUEUE}, the queue of engines: "
                f"send it to {QUEUE}, if you have the right"
            )
        if isinstance(message, dict) and "source" in message:
            raise InvalidMessageError(f"{task}: an engine must not name a source: the worker sets it")


class Messages(Methods, ABC):
    """The methods, each of which has sent or gathered its message when it returns."""

    def send(self, task: str, message: dict[str, Any], *, wait_s: float | None = None) -> Result | None:
        """Send `message`, a JSON object, to `task`. Raises InvalidMessageError if it is not valid."""
        self.refuse_invalid(task, message)
        return self._take(task, message, wait_s)

    @abstractmethod
    def _take(self, task: str, message: dict[str, Any], wait_s: float | None) -> Result | None:
        """Send a valid message, or gather it."""


class AsyncMessages(Methods, ABC):
    """The methods, each of which has sent its message when what it returns has been awaited."""

    @abstractmethod
    async def send(self, task: str, message: dict[str, Any], *, wait_s: float | None = None) -> Result | None:
        """Send `message`, a JSON object, to `task`. Raises InvalidMessageError if it is not valid."""


class Batch(Messages):
    """Messages that are sent together, when the block of `batch` ends. Used by one thread; waits for no answers.

    Its methods raise InvalidMessageError, and ValueError when they are given `wait_s` or called after the block.
    """

    def __init__(self, publisher: Publisher) -> None:
        super().__init__(publisher)
        self._messages: list[Encoded] | None = []

    def __len__(self) -> int:
        """The number of messages gathered."""
        return len(self._messages or ())

    def close(self) -> list[Encoded]:
        """End the batch. Returns its messages, in the order of the calls."""
        messages, self._messages = self._messages or [], None
        return messages

    def _take(self, task: str, message: dict[str, Any], wait_s: float | None) -> None:
        if wait_s is not None:
            raise ValueError("a batch waits for no answers: use the client for a message that needs one")
        if self._messages is None:
            raise ValueError("this batch has ended: begin another one")
        self._messages.append(encoded(self._publisher, task, [message], {}))


class Client(Messages):
    """Sends messages to the ledger. One client may be used by many threads.

    Every method takes `wait_s`: how many seconds to wait for the answer. Without it the method returns Unanswered as
    soon as the broker has the message; with it, the Result. Raises InvalidMessageError, NotSentError and, with
    `wait_s`, NoAnswerError and DeadLetteredError. If the broker is gone, retries for some seconds before NotSentError.
    """

    def __init__(self, broker_url: str, *, queue: str = QUEUE, result_url: str | None = None) -> None:
        """`queue`: ENGINE_QUEUE for an engine, which may send only workflow messages, without a `source`.

        `result_url`: where answers are kept, `redis://`; default: the broker, if that is Redis.

        `broker_url`: for a RabbitMQ cluster, the URLs of all nodes with semicolons between them.

        Raises ValueError for a URL that can never be used, such as `sentinel://`.
        """
        result_url = answers_at(broker_url, result_url)
        super().__init__(Publisher(broker_url, queue))
        self._results = None if result_url is None else _redis(result_url)

    @property
    def keeps_answers(self) -> bool:
        """Whether answers are kept, so that `wait_s` may be given."""
        return self._results is not None

    def close(self) -> None:
        """Close all connections."""
        self._publisher.close()
        if self._results is not None:
            self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Gather messages, and send all of them when the block ends: a round trip for every thousand.

        If the block raises, none is sent. When it has ended without an error, the broker has every message for good,
        in this order. NotSentError at its end means that the broker has none, some or all of them; sending all again
        is safe. They are kept in memory until then, about 2 KiB each.
        """
        batch = Batch(self._publisher)
        try:
            yield batch
        finally:
            messages = batch.close()
        if messages:
            hand_over(self._publisher, a_batch(messages), messages)

    def waiting(self) -> dict[str, Waiting]:
        """The messages in each queue of the ledger. Raises BrokerUnavailableError or UnsupportedBrokerError."""
        return waiting(self._publisher)

    def sees_worker(self) -> bool | None:
        """Whether a worker answers within a second. None: this user of the broker may not ask.

        Raises BrokerUnavailableError.
        """
        try:
            return sees_worker(self._publisher)
        except BROKER_ERRORS as error:
            raise BrokerUnavailableError(f"the broker at {self._publisher.broker} does not answer: {error}") from error

    def _take(self, task: str, message: dict[str, Any], wait_s: float | None) -> Result | None:
        return self.send_as_is(task, [message], {}, wait_s=wait_s)

    def send_as_is(
        self,
        task: str,
        args: list[Any],
        kwargs: dict[str, Any],
        *,
        wait_s: float | None = None,
        replay_of: int | None = None,
        traceparent: str | None = None,
    ) -> Result | None:
        """Send a task with these arguments, unchecked, as for a replay. Raises the errors of the other methods.

        Returns None for a run of the scheduler, which has no Result. `replay_of`: the dead letter that holds the
        message, and is open again if it fails. `traceparent`: the trace that the message belongs to.
        """
        self._refuse_not_allowed(task, args[0] if args else None)
        about = {"replay_of": replay_of, "traceparent": traceparent}
        if wait_s is None:
            hand_over(self._publisher, task, [encoded(self._publisher, task, args, kwargs, **about)])
            return None
        if self._results is None:
            raise ValueError(NO_RESULT_URL)
        task_id = str(uuid4())
        message = encoded(self._publisher, task, args, kwargs, task_id=task_id, **about)
        key = answer_key(task_id)
        with self._results.pubsub() as announced:
            try:
                _subscribe(announced, key)
            except RedisError as error:
                raise NoAnswersError(f"{task} was not sent, as its answer could not be waited for: {error}") from error
            hand_over(self._publisher, task, [message])
            try:
                answer = _next_message(announced, wait_s)
                self._results.delete(key)
            except RedisError as error:
                raise NoAnswerError(f"{task} was sent, but its answer could not be read: {error}") from error
        if answer is None:
            seen = what_is_seen(self._publisher)
            raise NoAnswerError(f"{task} was sent, but no answer came within {wait_s:g} s: {seen}")
        return told(answer)


NO_RESULT_URL = "wait_s needs a result_url: this broker keeps no answers"


def answers_at(broker_url: str, result_url: str | None) -> str | None:
    """Where answers are kept, or None if they are not. Raises ValueError for a URL that can never be used."""
    _refuse(refuse_no_broker, broker_url, "broker's URL")
    if result_url is not None:
        _refuse(refuse_no_result_store, result_url, "URL for answers")
        return result_url
    return broker_url if broker_url.startswith(REDIS_SCHEMES) else None


def answer_key(task_id: str) -> str:
    """Where Celery stores an answer, and the channel that it is announced on."""
    return f"celery-task-meta-{task_id}"


def a_batch(messages: Sequence[Encoded]) -> str:
    """A batch in words, for `hand_over`."""
    return f"a batch of {len(messages):,} messages, of which some may have arrived,"


def hand_over(publisher: Publisher, what: str, messages: Sequence[Encoded]) -> None:
    """Publish `messages`. Raises NotSentError, which names them as `what`."""
    try:
        publisher.publish(messages)
    except BROKER_ERRORS as error:
        raise NotSentError(
            f"{what} could not be handed to the broker at {publisher.broker}, and may be sent again: {error}"
        ) from error


def waiting(publisher: Publisher) -> dict[str, Waiting]:
    """The messages in each queue of the ledger. Raises BrokerUnavailableError or UnsupportedBrokerError."""
    try:
        with publisher.connections.acquire(block=True) as connection:
            try:
                connect(connection)
                return {queue: _waiting(connection, queue) for queue in (QUEUE, ENGINE_QUEUE)}
            except BROKER_ERRORS:
                leave(connection)
                raise
    except UnsupportedServerError as error:
        raise UnsupportedBrokerError(str(error)) from error
    except BROKER_ERRORS as error:
        raise BrokerUnavailableError(f"the broker at {publisher.broker} does not answer: {error}") from error


def told(answer: dict[str, Any]) -> Result | None:
    """The result in an answer as Celery stores it; None: of a run of the scheduler. Raises DeadLetteredError."""
    result = answer["result"]
    if answer["status"] != "SUCCESS":
        raise DeadLetteredError(" ".join(map(str, result["exc_message"])))
    return _result(result) if isinstance(result, dict) else None


def encoded(publisher: Publisher, task: str, args: list[Any], kwargs: dict[str, Any], **options: Any) -> Encoded:
    """Encode a message, with the options of `Publisher.encode`. Raises InvalidMessageError."""
    try:
        return publisher.encode(task, args, kwargs, **options)
    except (EncodeError, RecursionError) as error:
        raise InvalidMessageError(f"{task} was not sent, as it cannot be encoded: {error}") from error


def _result(answer: dict[str, Any]) -> Result:
    """The answer of a worker of any version: it may lack a field, or have some that are not known here."""
    known = {name: value for name, value in answer.items() if name in Result._fields}
    limit = _limit(answer["limit"]) if answer.get("limit") else None
    return Result(**{"state": None, **known, "event_seqs": tuple(answer["event_seqs"]), "limit": limit})


def _limit(told: dict[str, Any]) -> Limit:
    known = {name: value for name, value in told.items() if name in Limit._fields}
    resets_at = told["resets_at"]
    return Limit(**{**known, "resets_at": None if resets_at is None else datetime.fromisoformat(resets_at)})


def _refuse(check: Callable[[str], None], url: str, what: str) -> None:
    if not isinstance(url, str):
        raise ValueError(f"the {what} must be a text, such as redis://broker:6379/0, got {url!r}")
    try:
        check(url)
    except ValueError as error:
        raise ValueError(f"the {what} {error}") from None


def _redis(url: str) -> Redis:
    # No retries: the caller gets the error at once, and decides.
    return Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0))


def _subscribe(announced: PubSub, key: str) -> None:
    """From here on, no answer is missed. Retries for RETRY_S, as sending does; not if the store hangs."""
    until = time.monotonic() + RETRY_S
    while True:
        try:
            announced.subscribe(key)
            announced.get_message(timeout=TIMEOUT_S)
        except RedisError as error:
            if isinstance(error, RedisTimeoutError) or time.monotonic() > until:
                raise
            announced.reset()
            time.sleep(RETRY_PAUSE_S)
        else:
            return


def _next_message(announced: PubSub, wait_s: float) -> dict[str, Any] | None:
    """The answer that is announced within `wait_s` seconds, or None."""
    deadline = time.monotonic() + wait_s
    while (left_s := deadline - time.monotonic()) > 0:
        message = announced.get_message(ignore_subscribe_messages=True, timeout=left_s)
        if message is not None:
            answer: dict[str, Any] = json.loads(message["data"])
            return answer
    return None


def _waiting(connection: Connection, queue: str) -> Waiting:
    is_redis = connection.transport.driver_type == "redis"
    channel = connection.channel()  # of its own, as RabbitMQ closes it if there is no such queue
    if is_redis:
        check_server(channel.client)
    try:
        count = int(channel.queue_declare(queue, passive=True).message_count)
    except connection.channel_errors:  # nothing was ever sent to it
        return Waiting(0, None)
    waiting = Waiting(count, channel.client.eval(_OLDEST, 1, queue) if is_redis else None)
    channel.close()  # only after success: a silent broker would not answer this either
    return waiting
