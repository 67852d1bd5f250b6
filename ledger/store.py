"""The only place that writes to the ledger: a batch of messages becomes one transaction.

`apply_batch` locks the wallets in the order of their ids and loads the records that the messages name. `rules` decides
the messages one by one, and `working_set` writes the result. A message that cannot be applied becomes a dead letter in
the same transaction. If a message makes the transaction fail, the batch is split until the culprit is alone, and its
neighbours are applied.

No organization waits for a fault of another one. A fault that may concern a single organization or message, such as a
locked wallet or a slow statement (see `faults.may_be_local`), is isolated like any other error, within
`database.LOCK_TIMEOUT_S` and `PATIENCE_S`. The culprit's messages are kept in `waiting_messages`, and `apply_waiting`
applies them in order once that is possible. The same holds for an organization in which more is due than one
transaction does.

A fault of the whole database (see `faults.is_transient`) is raised. Then some, all or none of the batch is applied,
and applying it again is safe.
"""

import logging
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg.errors import LockNotAvailable, QueryCanceled
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from holdfast_client.messages import (
    DELIVERY_LIMIT,
    AnyMessage,
    InvalidMessage,
    parse,
)
from holdfast_client.results import ErrorCode, Result
from ledger import bodies, dead_letters, traces, waiting
from ledger.database import LONG_PATIENCE_S, raw_connection
from ledger.dead_letters import MAX_ERROR_LENGTH, DeadLetter
from ledger.faults import describe, is_about_a_node, is_transient
from ledger.isolation import Work, apply_all, node_of
from ledger.readable import beginning
from ledger.statements import Connection
from ledger.waiting import (
    AWAY,
    BEHIND,
    BLOCKED,
    LOCKED,
    MUCH_DUE,
    RECORD_LOCKED,
    SLOW,
    NumberedMessage,
    Taken,
    WaitingMessage,
    Waits,
)
from ledger.working_set import BEGIN, PATIENCE_S, Decided, WorkingSet, exists

logger = logging.getLogger(__name__)

MAX_TASK_LENGTH = 256
"""The most characters of a task's name in a dead letter: the name is part of an index."""

MAX_TRACEBACK_LENGTH = 64 * 1024
"""The most characters of a traceback in a dead letter: the last ones, which say most."""


class Delivery(NamedTuple):
    """A message as it arrived."""

    task: str
    payload: object
    """The JSON value of the message, or an InvalidMessage."""
    body: bytes
    """The body as received, which a dead letter keeps."""
    answer_to: str | None = None
    """Where to send the answer; opaque to the ledger, and kept with a message that waits."""
    replay_of: int | None = None
    """The dead letter whose message this is, sent again. It is believed only if it holds the same message."""
    traceparent: str | None = None
    """The trace that the message belongs to: see `traces`."""


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """The result of a message that could not be applied."""

    letter_id: int
    code: ErrorCode
    error: str


class Applied(NamedTuple):
    """The result of `apply_waiting`."""

    answers: list[tuple[Delivery, Result | DeadLettered]]
    """The messages that no longer wait, and the result of each."""
    problem: str | None
    """Why the organization has to keep waiting; None: it does not."""


def apply_batch(
    engine: Engine, deliveries: Sequence[Delivery], *, known_to_wait: Collection[str] = ()
) -> list[Result | DeadLettered | Waits]:
    """Apply `deliveries` in order. Returns the result of each. Everything is committed when this returns.

    The wallets of organizations in `known_to_wait` are not tried: their messages are put behind those that wait. Raises
    transient database errors: see the module's docstring.
    """
    return apply_all(engine, deliveries, Work(_org_id, partial(_apply, known_to_wait), _bury, _keep_waiting))


def apply_past(engine: Engine, past: Sequence[tuple[datetime, AnyMessage]]) -> list[Result]:
    """Apply messages of one organization, each as if it had come at its time. Returns the result of each.

    This is for a ledger that begins with a past. The times must be in order; one that is later than now counts as now,
    and one before the wallet's last event as the time of that. What falls due between them is posted at its time.
    Raises ValueError at a message that cannot be applied: some of those before it are applied by then.
    """
    results: list[Result] = []
    due: datetime | None = None
    while left := past[len(results) :]:
        with raw_connection(engine) as connection:
            messages = [message for _, message in left]
            work = WorkingSet.load(connection, messages, known_to_wait={}, patience_s=None, at=due or left[0][0])
            for at, message in left:
                if due := work.wait_until(at, message.org_id):
                    break  # the next transaction posts it
                [decided] = work.decide([message])
                if not isinstance(decided, Result):
                    raise ValueError(f"{message.task} cannot be applied: {decided}")
                results.append(decided)
            work.write_and_commit(connection)
    return results


def apply_waiting(engine: Engine, org_id: str, *, limit: int, patience_s: float = PATIENCE_S) -> Applied:
    """Apply the first waiting messages of `org_id`, at most `limit`, in order and in one transaction.

    Each statement may take `patience_s` seconds. A message that cannot be applied even alone becomes a dead letter, and
    so does one that has ended `DELIVERY_LIMIT` workers. Raises transient database errors.
    """
    taken: Taken | None = None
    try:
        node = node_of(engine, org_id)
        with raw_connection(engine, node=node, patience_s=patience_s) as connection:
            found = _take_waiting(connection, org_id, limit, patience_s)
        if isinstance(found, Applied):
            return found
        taken = found
        with raw_connection(engine, node=node, patience_s=patience_s) as connection:
            if taken.attempts > DELIVERY_LIMIT:
                return _bury_waiting(connection, org_id, taken, None)
            applied = _apply_waiting(connection, org_id, taken, patience_s)
        if applied.problem is not None:
            _give_back(engine, org_id, taken)
        return applied
    except Exception as error:
        if taken is not None:
            _give_back(engine, org_id, taken)
        if is_transient(error):
            raise
        count = limit if taken is None else len(taken.numbers)
        if count > 1:
            return apply_waiting(engine, org_id, limit=count // 2, patience_s=patience_s)
        with raw_connection(engine) as connection:
            return _bury_waiting(connection, org_id, taken, error)


def _give_back(engine: Engine, org_id: str, taken: Taken) -> None:
    """Take back the attempt, as it has not ended the worker. If that cannot be written, the attempt stays counted."""
    with suppress(psycopg.Error, DBAPIError), raw_connection(engine) as connection:
        waiting.give_back(connection, org_id, taken)


def catch_up(engine: Engine, org_ids: Sequence[str], *, task: str) -> Iterator[int]:
    """Begin the periods and release the reservations that are due in the wallets `org_ids`.

    Yields the number of events written, after about every `working_set.MOST_DUE`: of each shard, if the ledger is
    distributed. Skips a locked wallet: the worker that holds the lock does the same. `task` is the task that a dead
    letter names. Raises transient database errors.
    """

    def bury(engine: Engine, org_id: str, error: Exception) -> _CaughtUp:
        payload = {"org_id": org_id}
        _bury(engine, Delivery(task, payload, bodies.written([payload], {})), error)
        return _CaughtUp(0, ())

    def leave_out(_: Engine, org_ids: Sequence[str], error: Exception) -> list[_CaughtUp]:
        logger.warning("%s skips the organization %s until its next run: %s", task, org_ids[0], describe(error))
        return [_CaughtUp(0, ())] * len(org_ids)

    work: Work[str, _CaughtUp] = Work(str, _catch_up, bury, leave_out, LONG_PATIENCE_S)
    first = apply_all(engine, org_ids, work)
    yield _written(first)
    for done in first:
        for org_id in done.unfinished:
            while written := _written(apply_all(engine, [org_id], work)):
                yield written


def _apply(
    known_to_wait: Collection[str], connection: Connection, deliveries: Sequence[Delivery], patience_s: float | None
) -> list[Result | DeadLettered | Waits]:
    messages = [parse(delivery.task, delivery.payload) for delivery in deliveries]
    concerned = {message.org_id or waiting.NOBODY for message in messages} if known_to_wait else ()
    work = WorkingSet.load(
        connection,
        [message for message in messages if not isinstance(message, InvalidMessage)],
        known_to_wait=dict.fromkeys(set(known_to_wait).intersection(concerned), BEHIND),
        patience_s=patience_s,
    )
    decided = work.decide(messages)
    if work.reasons_to_wait:
        waiting.keep(
            connection,
            [
                _waiting_message(delivery, message, decision.reason)
                for delivery, message, decision in zip(deliveries, messages, decided, strict=True)
                if isinstance(decision, Waits)
            ],
        )
    return _write_and_commit(connection, work, deliveries, messages, decided)


def _write_and_commit(
    connection: Connection,
    work: WorkingSet,
    deliveries: Sequence[Delivery],
    messages: Sequence[AnyMessage | InvalidMessage],
    decided: Sequence[Decided],
) -> list[Any]:
    letters = [
        DeadLetter(
            _storable(delivery.task)[:MAX_TASK_LENGTH],
            delivery.body,
            message.org_id,
            answer.code,
            answer.error,
            replay_of=delivery.replay_of,
            traceparent=delivery.traceparent,
        )
        for delivery, message, answer in zip(deliveries, messages, decided, strict=True)
        if not isinstance(answer, (Result, Waits))
    ]
    letter_ids = iter(dead_letters.record(connection, letters) if letters else ())
    work.write_and_commit(connection)
    return [
        answer if isinstance(answer, (Result, Waits)) else DeadLettered(next(letter_ids), answer.code, answer.error)
        for answer in decided
    ]


def _waiting_message(delivery: Delivery, message: AnyMessage | InvalidMessage, reason: str) -> WaitingMessage:
    problem = delivery.payload if isinstance(delivery.payload, InvalidMessage) else None
    return WaitingMessage(
        message.org_id or waiting.NOBODY,
        _storable(delivery.task),
        delivery.body,
        delivery.answer_to,
        None if problem is None else problem.code,
        None if problem is None else problem.error,
        reason,
        delivery.replay_of,
        delivery.traceparent,
    )


def _org_id(delivery: Delivery) -> str:
    """The organization of a message, or `NOBODY`."""
    return parse(delivery.task, delivery.payload).org_id or waiting.NOBODY


def _keep_waiting(engine: Engine, deliveries: Sequence[Delivery], error: Exception) -> Sequence[Waits]:
    """Keep the messages of one organization that cannot be applied now."""
    reason = reason_to_wait(error)
    kept = [_waiting_message(delivery, parse(delivery.task, delivery.payload), reason) for delivery in deliveries]
    with raw_connection(engine) as connection:
        waiting.keep(connection, kept)
    return [Waits(message.org_id, message.reason) for message in kept]


def reason_to_wait(error: Exception) -> str:
    """Why an organization waits after `error`, for a person."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, QueryCanceled):
        return SLOW
    if isinstance(original, LockNotAvailable):
        return BLOCKED
    if is_about_a_node(error):
        return AWAY
    return f"the database does not apply its messages: {describe(error)}"


def _load_one(connection: Connection, org_id: str, patience_s: float) -> WorkingSet | Applied:
    """Lock the wallet of `org_id`, if it exists, and post what is due. Or end the transaction and return why not."""
    work = WorkingSet.load_due(connection, [org_id], patience_s)
    if not work.wallets and exists(connection, org_id):
        connection.execute("ROLLBACK")
        return Applied([], work.reasons_to_wait.get(org_id, LOCKED))
    if org_id in work.reasons_to_wait:
        work.write_and_commit(connection)
        return Applied([], work.reasons_to_wait[org_id])
    return work


def _take_waiting(connection: Connection, org_id: str, limit: int, patience_s: float) -> Taken | Applied:
    """Post what is due in the wallet of `org_id`, and count an attempt for the messages about to be applied.

    This is committed before any is applied, so a message that ends its worker leaves a trace.
    """
    work = _load_one(connection, org_id, patience_s)
    if isinstance(work, Applied):
        return work
    taken = waiting.take(connection, org_id, limit)
    work.write_and_commit(connection)
    return taken or Applied([], None)


def _apply_waiting(connection: Connection, org_id: str, taken: Taken, patience_s: float) -> Applied:
    work = _load_one(connection, org_id, patience_s)
    if isinstance(work, Applied):
        return work
    deliveries = [_delivery(message) for message in waiting.read(connection, org_id, taken)]
    messages = [parse(delivery.task, delivery.payload) for delivery in deliveries]
    valid = [message for message in messages if not isinstance(message, InvalidMessage)]
    if valid and not work.wallets:
        connection.execute("ROLLBACK")
        WorkingSet.create(connection, [org_id])
        return _apply_waiting(connection, org_id, taken, patience_s)
    work.load_named(connection, valid)
    if org_id in work.with_locked_records(connection):
        connection.execute("ROLLBACK")
        return Applied([], RECORD_LOCKED)
    decided = work.decide(messages)
    waiting.remove(connection, org_id, taken)
    answers = _write_and_commit(connection, work, deliveries, messages, decided)
    return Applied(list(zip(deliveries, answers, strict=True)), None)


def _delivery(kept: NumberedMessage) -> Delivery:
    """The message as it was delivered."""
    payload: object
    if kept.error_code is not None:
        assert kept.error is not None
        payload = InvalidMessage(kept.error_code, kept.error, None)
    else:
        arguments = bodies.arguments(kept.body)
        assert arguments is not None
        payload = bodies.only_argument(kept.task, *arguments)
    return Delivery(kept.task, payload, kept.body, kept.answer_to, kept.replay_of, kept.traceparent)


class _CaughtUp(NamedTuple):
    written: int
    unfinished: tuple[str, ...]
    """The wallets in which more is due."""


def _written(done: Sequence[_CaughtUp]) -> int:
    return sum(each.written for each in done)


def _catch_up(connection: Connection, org_ids: Sequence[str], _: float | None) -> list[_CaughtUp]:
    work = WorkingSet.load_due(connection, org_ids, LONG_PATIENCE_S)
    work.write_and_commit(connection)
    # The first result stands for all of them.
    unfinished = tuple(org_id for org_id, reason in work.reasons_to_wait.items() if reason == MUCH_DUE)
    return [_CaughtUp(len(work.events), unfinished), *[_CaughtUp(0, ())] * (len(org_ids) - 1)]


def _bury(engine: Engine, delivery: Delivery, error: Exception) -> DeadLettered:
    with raw_connection(engine) as connection:
        return _record_unexpected(connection, delivery, error)


def _bury_waiting(connection: Connection, org_id: str, taken: Taken | None, error: Exception | None) -> Applied:
    """Make a dead letter of the message that was taken alone, or of the first one.

    Without an error, the message has ended its workers, and is not parsed.
    """
    connection.execute(BEGIN)
    if taken is None and (taken := waiting.take(connection, org_id, 1)) is None:
        connection.execute("ROLLBACK")
        return Applied([], None)
    [kept] = waiting.read(connection, org_id, taken)
    if error is None:
        delivery = Delivery(kept.task, None, kept.body, kept.answer_to, traceparent=kept.traceparent)
        task, text = kept.task[:MAX_TASK_LENGTH], "its worker ended each time it was applied"
        why: ErrorCode = "delivery_limit"
        letter = DeadLetter(task, kept.body, org_id or None, why, text, None, kept.replay_of, kept.traceparent)
        [letter_id] = dead_letters.record(connection, [letter])
        answer = DeadLettered(letter_id, letter.code, letter.error)
    else:
        delivery = _delivery(kept)
        answer = _record_unexpected(connection, delivery, error)
    waiting.remove(connection, org_id, taken)
    connection.execute("COMMIT")
    return Applied([(delivery, answer)], None)


def _record_unexpected(connection: Connection, delivery: Delivery, error: Exception) -> DeadLettered:
    letter = DeadLetter(
        _storable(delivery.task)[:MAX_TASK_LENGTH],
        delivery.body,
        parse(delivery.task, delivery.payload).org_id,
        "unexpected_error",
        beginning(_storable(f"{delivery.task} failed unexpectedly: {type(error).__name__}: {error}"), MAX_ERROR_LENGTH),
        _end(_storable("".join(traceback.format_exception(error))), MAX_TRACEBACK_LENGTH),
        delivery.replay_of,
        delivery.traceparent,
    )
    [letter_id] = dead_letters.record(connection, [letter])
    text, trace = "%s failed unexpectedly, see dead letter %d:\n%s", traces.of(delivery.traceparent)
    logger.error(text, letter.task, letter_id, letter.traceback, extra=trace)
    return DeadLettered(letter_id, letter.code, letter.error)


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
