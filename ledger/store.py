"""The only place that writes to the ledger: a batch of messages becomes one transaction.

`apply_batch` locks the wallets concerned in the order of their ids, loads what the messages name, lets `rules` decide
one message after the other, and writes the result (`working_set`). What cannot be applied becomes a dead letter in the
same transaction. When a batch fails for a reason of its own making, it is split until the culprit stands alone, so its
neighbours are applied all the same.

Nobody waits for somebody else's trouble. What one organization or one message may be the cause of (a locked wallet, a
statement that takes too long, see `database.may_be_local`) is isolated like any other error, within
`database.LOCK_TIMEOUT_S` and `PATIENCE_S`. The culprit's messages are kept in `waiting_messages`, and `apply_waiting`
applies them, in order, once that is possible. So are those of an organization in which more is due than one transaction
does.

A fault of the whole database (see `database.is_transient`) is raised as it is: some of the batch, all of it or nothing
has happened, and applying it again is safe.
"""

import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg.errors import LockNotAvailable, QueryCanceled
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from ledger import bodies, dead_letters, waiting
from ledger.database import (
    LedgerConnection,
    describe,
    is_abandoned,
    is_lost_connection,
    is_transient,
    may_be_local,
)
from ledger.dead_letters import MAX_ERROR_LENGTH, DeadLetter
from ledger.messages import (
    DELIVERY_LIMIT,
    AnyMessage,
    InvalidMessage,
    parse,
)
from ledger.readable import beginning
from ledger.state import ErrorCode, Result
from ledger.statements import Connection
from ledger.waiting import (
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
from ledger.working_set import BEGIN, PATIENCE_S, SHORT_PATIENCE_S, Decided, WorkingSet, exists

logger = logging.getLogger(__name__)

MAX_BATCH = 1_000
"""The most messages that one transaction applies; more are applied as several batches."""

SHORTEST_PATIENCE_S = 0.05
"""How long a statement may take while one culprit of many is looked for: others wait behind them."""

LONG_PATIENCE_S = 10.0
"""How long one statement may take where nobody else waits for it."""

PIECES = 32
"""Into how many parts a batch is split that fails for somebody's reason: two steps lead to the culprit."""

MOST_CULPRITS = 10
"""How many organizations fail alone, while nobody gets through, before it is taken for everybody's fault."""

MAX_TASK_LENGTH = 256
"""How much of a task's name a dead letter keeps: it is part of an index."""

MAX_TRACEBACK_LENGTH = 64 * 1024
"""How much of a traceback a dead letter keeps: its last characters, which say most."""

Item = TypeVar("Item")
Became = TypeVar("Became")


class Delivery(NamedTuple):
    """A message as it arrived."""

    task: str
    payload: object
    """The JSON value that should be the message, or why there is none."""
    body: bytes
    """What arrived, byte by byte, as a dead letter keeps it."""
    answer_to: str | None = None
    """Who wants the answer, in the sender's words: kept with a message that waits."""


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """What became of a message that could not be applied."""

    letter_id: int
    code: ErrorCode
    error: str


class Applied(NamedTuple):
    """What `apply_waiting` did."""

    answers: list[tuple[Delivery, Result | DeadLettered]]
    """The messages that wait no more."""
    problem: str | None
    """Why the organization has to wait on; None: it has not."""


def apply_batch(
    engine: Engine, deliveries: Sequence[Delivery], *, known_to_wait: Collection[str] = ()
) -> list[Result | DeadLettered | Waits]:
    """Apply `deliveries`, in order, and answer each of them. Everything is committed when this returns.

    Organizations that are `known_to_wait` need not be found out about: their messages go behind those that wait, and
    no time is lost over their wallets. Raises a database error that is transient: see the module's description.
    """
    return _in_transactions(engine, deliveries, _org_id, partial(_apply, known_to_wait), _bury, _keep_waiting)


def apply_waiting(engine: Engine, org_id: str, *, limit: int, patience_s: float = PATIENCE_S) -> Applied:
    """Apply the first messages of `org_id` that wait, at most `limit`, in order and in one transaction.

    Each statement may take `patience_s` seconds. A message that cannot be applied even on its own becomes a dead
    letter, and so does one that has ended `DELIVERY_LIMIT` workers. Raises a database error that is transient.
    """
    taken: Taken | None = None
    try:
        with _connection(engine) as connection:
            found = _take_waiting(connection, org_id, limit, patience_s)
        if isinstance(found, Applied):
            return found
        taken = found
        with _connection(engine) as connection:
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
        with _connection(engine) as connection:
            return _bury_waiting(connection, org_id, taken, error)


def _give_back(engine: Engine, org_id: str, taken: Taken) -> None:
    """This attempt has not ended the worker. If not even that can be written, it counts as if it had."""
    with suppress(psycopg.Error, DBAPIError), _connection(engine) as connection:
        waiting.give_back(connection, org_id, taken)


def catch_up(engine: Engine, org_ids: Sequence[str], *, task: str) -> Iterator[int]:
    """Begin the periods and release the reservations that are due in the wallets `org_ids`.

    Yields the number of events that were written, after every `working_set.MOST_DUE` or so. A wallet that somebody else
    holds is left out: whoever holds it does the same. `task` is named in a dead letter, should that become necessary.
    Raises a database error that is transient.
    """

    def bury(engine: Engine, org_id: str, error: Exception) -> _CaughtUp:
        payload = {"org_id": org_id}
        _bury(engine, Delivery(task, payload, bodies.written([payload], {})), error)
        return _CaughtUp(0, ())

    def leave_out(_: Engine, org_ids: Sequence[str], error: Exception) -> list[_CaughtUp]:
        logger.warning("%s leaves out the organization %s this time: %s", task, org_ids[0], describe(error))
        return [_CaughtUp(0, ())] * len(org_ids)

    first = _in_transactions(engine, org_ids, str, _catch_up, bury, leave_out)
    yield _written(first)
    for done in first:
        for org_id in done.unfinished:
            while written := _written(_in_transactions(engine, [org_id], str, _catch_up, bury, leave_out)):
                yield written


def _in_transactions(
    engine: Engine,
    items: Sequence[Item],
    org_id_of: Callable[[Item], str],
    apply: Callable[[Connection, Sequence[Item], float | None], list[Became]],
    bury: Callable[[Engine, Item, Exception], Became],
    keep_waiting: Callable[[Engine, Sequence[Item], Exception], Sequence[Became]],
) -> list[Became]:
    """Apply `items` in as few transactions as possible.

    An item that cannot be applied even on its own is buried; an organization whose items cannot be applied now is kept
    waiting, with all of them that are left. After a failure, `apply` is told to be careful: to leave out what somebody
    else has locked, and how many seconds to wait for a statement.
    """
    answers: dict[int, Became] = {}
    places: Sequence[int] = range(len(items))
    pending = [(part, False) for part in _parts(places, MAX_BATCH)]
    culprits: dict[str, Exception] = {}
    waited_for = 0
    while pending:
        places, carefully = pending.pop()
        if culprits:
            places = [place for place in places if org_id_of(items[place]) not in culprits]
        if not places:
            continue
        # The more had to be waited for, the less each of them may cost the others.
        patience_s = max(SHORT_PATIENCE_S / (1 + waited_for), SHORTEST_PATIENCE_S) if carefully else None
        began_at = time.monotonic()
        try:
            with _connection(engine) as connection:
                answers |= zip(places, apply(connection, [items[place] for place in places], patience_s), strict=True)
        except Exception as error:  # noqa: BLE001 - what cannot be isolated is raised, as `fault`
            fault = error
            if not is_transient(error):
                if len(places) > 1:
                    pending += [(half, carefully) for half in _parts(places, (len(places) + 1) // 2)]
                    continue
                try:
                    answers[places[0]] = bury(engine, items[places[0]], error)
                    continue
                except psycopg.Error as second:
                    fault = second
            if not _others_can_go_on(engine, fault):
                raise fault from None
            is_slow = isinstance(fault, QueryCanceled)
            slow_ones = sum(isinstance(fault, QueryCanceled) for fault in culprits.values())
            if not carefully and not is_slow:
                pending.append((places, True))
            elif is_slow and answers and slow_ones >= MOST_CULPRITS:
                # Each further try costs the others time. Those that are left are tried by themselves.
                culprits |= {org_id_of(items[place]): fault for place in places}
            elif len(places) > 1:
                pending += [(part, True) for part in _dealt(places, lambda place: org_id_of(items[place]))]
            elif answers or len(culprits) < MOST_CULPRITS:
                culprits[org_id_of(items[places[0]])] = fault
                if patience_s is not None and time.monotonic() - began_at > patience_s / 2:
                    waited_for += 1  # whoever fails at once costs the others nothing
            else:
                raise fault from None
    for org_id, fault in culprits.items():
        left = [place for place, item in enumerate(items) if place not in answers and org_id_of(item) == org_id]
        try:
            answers |= zip(left, keep_waiting(engine, [items[place] for place in left], fault), strict=True)
        except psycopg.Error as second:  # not even that can be written
            raise fault from second
    return [answers[place] for place in range(len(items))]


def _parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """`items` in parts of at most `size`, the last part first, so that the first one is popped first."""
    return [items[first : first + size] for first in range(0, len(items), size)][::-1]


def _dealt(places: Sequence[int], org_id_at: Callable[[int], str]) -> list[Sequence[int]]:
    """`places` in `PIECES` parts, so that no organization is in two of them; those of a single one in order.

    Neighbours get into different parts: what is wrong with one of them is often wrong with the other.
    """
    places_of: dict[str, list[int]] = {}
    for place in places:
        places_of.setdefault(org_id_at(place), []).append(place)
    if len(places_of) == 1:
        return _parts(places, -(-len(places) // PIECES))
    groups = [places_of[org_id] for org_id in sorted(places_of)]
    return [[place for group in groups[first::PIECES] for place in group] for first in range(min(PIECES, len(groups)))]


def _others_can_go_on(engine: Engine, error: Exception) -> bool:
    if not may_be_local(error) or is_abandoned(engine):
        return False
    if is_lost_connection(error):
        try:
            with _connection(engine) as connection:
                connection.execute("SELECT 1")
        except Exception as second:
            if not is_transient(second):
                raise
            return False
    return True


@contextmanager
def _connection(engine: Engine) -> Iterator[Connection]:
    """A psycopg connection that begins no transaction by itself. One that failed is closed, not used again."""
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, LedgerConnection)
        try:
            connection.autocommit = True  # the BEGIN that psycopg would send costs a round trip of its own
            yield connection
            connection.refuse_unconfirmed()
            connection.autocommit = False
        except BaseException:
            # The server ends a connection that was closed a moment later; until then, it would hold the locks.
            if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
            pooled.invalidate()
            raise


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
        DeadLetter(_storable(delivery.task)[:MAX_TASK_LENGTH], delivery.body, message.org_id, answer.code, answer.error)
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
    )


def _org_id(delivery: Delivery) -> str:
    """The organization whose trouble a message shares."""
    return parse(delivery.task, delivery.payload).org_id or waiting.NOBODY


def _keep_waiting(engine: Engine, deliveries: Sequence[Delivery], error: Exception) -> Sequence[Waits]:
    """Keep the messages of one organization that cannot be applied now."""
    reason = reason_to_wait(error)
    kept = [_waiting_message(delivery, parse(delivery.task, delivery.payload), reason) for delivery in deliveries]
    with _connection(engine) as connection:
        waiting.keep(connection, kept)
    return [Waits(message.org_id, message.reason) for message in kept]


def reason_to_wait(error: Exception) -> str:
    """Why an organization waits whose messages failed with `error`, for a person."""
    original = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(original, QueryCanceled):
        return SLOW
    if isinstance(original, LockNotAvailable):
        return BLOCKED
    return f"the database does not apply its messages: {describe(error)}"


def _load_one(connection: Connection, org_id: str, patience_s: float) -> WorkingSet | Applied:
    """Lock the wallet of `org_id`, if it is there, and post what is due; or end the transaction and say why not."""
    work = WorkingSet.load_due(connection, [org_id], patience_s)
    if not work.wallets and exists(connection, org_id):
        connection.execute("ROLLBACK")
        return Applied([], work.reasons_to_wait.get(org_id, LOCKED))
    if org_id in work.reasons_to_wait:
        work.write_and_commit(connection)
        return Applied([], work.reasons_to_wait[org_id])
    return work


def _take_waiting(connection: Connection, org_id: str, limit: int, patience_s: float) -> Taken | Applied:
    """Post what is due in the wallet of `org_id`, and note which of its messages are about to be applied.

    Nothing is applied before that is committed, so a message that ends its worker has left a trace.
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
    return Delivery(kept.task, payload, kept.body, kept.answer_to)


class _CaughtUp(NamedTuple):
    written: int
    unfinished: tuple[str, ...]
    """The wallets in which more is due."""


def _written(done: Sequence[_CaughtUp]) -> int:
    return sum(each.written for each in done)


def _catch_up(connection: Connection, org_ids: Sequence[str], _: float | None) -> list[_CaughtUp]:
    work = WorkingSet.load_due(connection, org_ids, LONG_PATIENCE_S)
    work.write_and_commit(connection)
    # One answer for all of them: the first one's.
    unfinished = tuple(org_id for org_id, reason in work.reasons_to_wait.items() if reason == MUCH_DUE)
    return [_CaughtUp(len(work.events), unfinished), *[_CaughtUp(0, ())] * (len(org_ids) - 1)]


def _bury(engine: Engine, delivery: Delivery, error: Exception) -> DeadLettered:
    with _connection(engine) as connection:
        return _record_unexpected(connection, delivery, error)


def _bury_waiting(connection: Connection, org_id: str, taken: Taken | None, error: Exception | None) -> Applied:
    """Make a dead letter of the message that was taken alone, or of the first one.

    Without an error, it has ended the workers that applied it, and is not read.
    """
    connection.execute(BEGIN)
    if taken is None and (taken := waiting.take(connection, org_id, 1)) is None:
        connection.execute("ROLLBACK")
        return Applied([], None)
    [kept] = waiting.read(connection, org_id, taken)
    if error is None:
        delivery = Delivery(kept.task, None, kept.body, kept.answer_to)
        task, text = kept.task[:MAX_TASK_LENGTH], "its worker ended each time it was applied"
        letter = DeadLetter(task, kept.body, org_id or None, "delivery_limit", text)
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
    )
    [letter_id] = dead_letters.record(connection, [letter])
    logger.error("%s failed unexpectedly, see dead letter %d:\n%s", letter.task, letter_id, letter.traceback)
    return DeadLettered(letter_id, letter.code, letter.error)


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")
