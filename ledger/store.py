"""The only place that writes to the ledger: a batch of messages becomes one transaction.

`apply_batch` locks the wallets concerned in the order of their ids, loads what the messages name, lets `rules` decide
one message after the other, and writes the result set by set: the number of statements does not depend on the number
of messages, and they travel in two round trips, one to load and one to write. What cannot be applied becomes a dead
letter in the same transaction. When a batch fails for a reason of its own making, it is split until the culprit stands
alone, so its neighbours are applied all the same.

Nobody waits for somebody else's trouble. What one organization or one message may be the cause of (a locked wallet, a
statement that takes too long, see `database.may_be_local`) is isolated like any other error, within
`database.LOCK_TIMEOUT_S` and `PATIENCE_S`. The culprit's messages are kept in `waiting_messages`, and `apply_waiting`
applies them, in order, once that is possible. So are those of an organization in which more is due than one transaction
does.

A fault of the whole database (see `database.is_transient`) is raised as it is: some of the batch, all of it or nothing
has happened, and applying it again is safe.
"""

import json
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg.errors import LockNotAvailable, QueryCanceled
from psycopg.pq import TransactionStatus
from psycopg.rows import args_row
from sqlalchemy import BigInteger, Dialect, Engine, Table, Text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.exc import DBAPIError

from ledger import arrays, clocks, dead_letters, rules, tables, waiting
from ledger.database import (
    LOCK_TIMEOUT_S,
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
    InvalidMessage,
    Message,
    Refund,
    Subscribe,
    Unsubscribe,
    WalletMessage,
    WorkflowMessage,
    only_argument,
    parse,
)
from ledger.readable import beginning
from ledger.state import Event, PostedMessage, Refusal, Result, Subscription, Wallet, Workflow
from ledger.waiting import NumberedMessage, Taken, WaitingMessage

logger = logging.getLogger(__name__)

MAX_BATCH = 1_000
"""The most messages that one transaction applies; more are applied as several batches."""

MOST_DUE = 1_000
"""The most events that one transaction writes for what is due; some more, if periods begin. The rest comes after it."""

PATIENCE_S = 1.0
"""How long a batch waits for one statement before it looks for the culprit."""

SHORT_PATIENCE_S, SHORTEST_PATIENCE_S = 0.25, 0.05
"""The same while it looks for one culprit, and for one of many: others wait behind them."""

SECOND_LOOK_S = 0.1
"""How long after a wallet was found locked it is looked at again: another worker has it for less than that."""

LONG_PATIENCE_S = 10.0
"""How long one statement may take where nobody else waits for it."""

PIECES = 32
"""Into how many parts a batch is split that fails for somebody's reason: two steps lead to the culprit."""

MOST_CULPRITS = 10
"""How many organizations fail alone, while nobody gets through, before it is taken for everybody's fault."""

LOCKED = "its wallet is locked"
RECORD_LOCKED = "one of its workflows or subscriptions is locked"
BEING_CREATED = "its wallet is being created"
BEHIND = "its earlier messages wait"
MUCH_DUE = "more is due in its wallet than one transaction does"
SLOW = "the database takes too long over its messages"
BLOCKED = "a row that its messages need is locked"

MAX_TASK_LENGTH = 256
"""How much of a task's name a dead letter keeps: it is part of an index."""

MAX_TRACEBACK_LENGTH = 64 * 1024
"""How much of a traceback a dead letter keeps: its last characters, which say most."""

Connection = psycopg.Connection[Any]
Item = TypeVar("Item")
Answer = TypeVar("Answer")


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
    code: str
    error: str


@dataclass(frozen=True, slots=True)
class Waits:
    """What became of a message that waits for its organization. It is kept, and may be acknowledged."""

    org_id: str
    """`waiting.NOBODY`, if the message names none."""
    reason: str


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

    Yields the number of events that were written, after every `MOST_DUE` or so. A wallet that somebody else holds is
    left out: whoever holds it does the same. `task` is named in a dead letter, should that become necessary. Raises a
    database error that is transient.
    """

    def bury(engine: Engine, org_id: str, error: Exception) -> _CaughtUp:
        payload = {"org_id": org_id}
        _bury(engine, Delivery(task, payload, json.dumps([[payload], {}, {}]).encode()), error)
        return _CaughtUp(0, ())

    def leave_out(_: Engine, org_ids: Sequence[str], error: Exception) -> list[_CaughtUp]:
        logger.warning("%s leaves out the organization %s this time: %s", task, org_ids[0], describe(error))
        return [_CaughtUp(0, ())] * len(org_ids)

    first = _in_transactions(engine, org_ids, str, _catch_up, bury, leave_out)
    yield sum(done.written for done in first)
    for done in first:
        for org_id in done.unfinished:
            written = MOST_DUE
            while written > 0:
                more = _in_transactions(engine, [org_id], str, _catch_up, bury, leave_out)
                written = sum(done.written for done in more)
                yield written


def _in_transactions(
    engine: Engine,
    items: Sequence[Item],
    org_id_of: Callable[[Item], str],
    apply: Callable[[Connection, Sequence[Item], float | None], list[Answer]],
    bury: Callable[[Engine, Item, Exception], Answer],
    keep_waiting: Callable[[Engine, Sequence[Item], Exception], Sequence[Answer]],
) -> list[Answer]:
    """Apply `items` in as few transactions as possible.

    An item that cannot be applied even on its own is buried; an organization whose items cannot be applied now is kept
    waiting, with all of them that are left. After a failure, `apply` is told to be careful: to leave out what somebody
    else has locked, and how many seconds to wait for a statement.
    """
    answers: dict[int, Answer] = {}
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
    work = _WorkingSet.load(
        connection,
        [message for message in messages if isinstance(message, Message)],
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


_Decided = Result | InvalidMessage | Refusal | Waits


def _write_and_commit(
    connection: Connection,
    work: "_WorkingSet",
    deliveries: Sequence[Delivery],
    messages: Sequence[Message | InvalidMessage],
    decided: Sequence[_Decided],
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


def _waiting_message(delivery: Delivery, message: Message | InvalidMessage, reason: str) -> WaitingMessage:
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


def _take_waiting(connection: Connection, org_id: str, limit: int, patience_s: float) -> Taken | Applied:
    """Post what is due in the wallet of `org_id`, and note which of its messages are about to be applied.

    Nothing is applied before that is committed, so a message that ends its worker has left a trace.
    """
    work = _WorkingSet.load_one(connection, org_id, patience_s)
    if isinstance(work, Applied):
        return work
    taken = waiting.take(connection, org_id, limit)
    work.write_and_commit(connection)
    return taken or Applied([], None)


def _apply_waiting(connection: Connection, org_id: str, taken: Taken, patience_s: float) -> Applied:
    work = _WorkingSet.load_one(connection, org_id, patience_s)
    if isinstance(work, Applied):
        return work
    deliveries = [_delivery(message) for message in waiting.read(connection, org_id, taken)]
    messages = [parse(delivery.task, delivery.payload) for delivery in deliveries]
    valid = [message for message in messages if isinstance(message, Message)]
    if valid and not work.wallets:
        connection.execute("ROLLBACK")
        _WorkingSet.create(connection, [org_id])
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
        arguments = dead_letters.arguments(kept.body)
        assert arguments is not None
        payload = only_argument(kept.task, *arguments)
    return Delivery(kept.task, payload, kept.body, kept.answer_to)


class _CaughtUp(NamedTuple):
    written: int
    unfinished: tuple[str, ...]
    """The wallets in which more is due."""


def _catch_up(connection: Connection, org_ids: Sequence[str], _: float | None) -> list[_CaughtUp]:
    work = _WorkingSet.load_due(connection, org_ids, LONG_PATIENCE_S)
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
    connection.execute(_BEGIN)
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


class _Named:
    """What messages name, by its keys."""

    def __init__(self, messages: Iterable[Message]) -> None:
        self.workflows: set[tuple[str, str]] = set()
        self.posted: set[tuple[str, str, str]] = set()
        self.subscriptions: set[tuple[str, str]] = set()
        for message in messages:
            if isinstance(message, WorkflowMessage):
                self.workflows.add((message.org_id, message.workflow_id))
            elif isinstance(message, WalletMessage):
                self.posted.add((message.org_id, message.kind, message.message_id))
                if isinstance(message, Subscribe | Unsubscribe):
                    self.subscriptions.add((message.org_id, message.subscription_id))
                elif isinstance(message, Refund) and message.workflow_id is not None:
                    self.workflows.add((message.org_id, message.workflow_id))


class _WorkingSet:
    """What one transaction has locked and loaded, and what it is going to write."""

    def __init__(self, locked: Iterable[Wallet], database_now: datetime) -> None:
        clocks.check(database_now)
        self.wallets = {wallet.org_id: wallet for wallet in locked}
        # The database's clock, but never before what the wallet has already seen.
        self.now = {
            org_id: max(database_now, wallet.last_event_at or database_now) for org_id, wallet in self.wallets.items()
        }
        self.workflows: dict[tuple[str, str], Workflow] = {}
        self.subscriptions: dict[tuple[str, str], Subscription] = {}
        self.posted: dict[tuple[str, str, str], PostedMessage] = {}
        self.events: list[Event] = []
        self.reasons_to_wait: dict[str, str] = {}
        """Why the messages of an organization cannot be applied in this transaction."""
        # As they are in the database.
        self._loaded_wallets = dict(self.wallets)
        self._loaded_workflows: dict[tuple[str, str], Workflow] = {}
        self._loaded_subscriptions: dict[tuple[str, str], Subscription] = {}
        self._new_posted: list[PostedMessage] = []

    @classmethod
    def load(
        cls,
        connection: Connection,
        messages: Sequence[Message],
        *,
        known_to_wait: Mapping[str, str],
        patience_s: float | None,
        looked_twice: bool = False,
    ) -> "_WorkingSet":
        """Lock the wallets of `messages`, load all that deciding them needs, and post what is due.

        An organization that has to wait is in `reasons_to_wait`: it is one of those `known_to_wait`, with their
        reasons, or messages of it wait already. With `patience_s`, what somebody else has locked is not waited for, and
        its organization has to wait, too.
        """
        again = partial(cls.load, connection, messages, patience_s=patience_s)
        named_ids = {message.org_id for message in messages}
        org_ids = sorted(named_ids.difference(known_to_wait))
        if carefully := patience_s is not None:
            lock, read_clock = _LOCK_WALLETS_THAT_CAN_BE, _clock(patience_s)
        else:
            lock, read_clock = _LOCK_WALLETS, _CLOCK
        with connection.pipeline():
            connection.execute(_BEGIN)
            locked = _select(connection, Wallet, lock, [arrays.text(org_ids)])
            clock = connection.execute(read_clock)
            named = _Named(messages)
            workflows = _find(connection, Workflow, _WORKFLOWS, named.workflows)
            posted = _find(connection, PostedMessage, _POSTED, named.posted)
        now, somebody_waits, *_ = clock.fetchall()[0]
        work = cls(locked.fetchall(), now)
        if missing := [org_id for org_id in org_ids if org_id not in work.wallets]:
            there = {org_id for (org_id,) in connection.execute(_THERE, [arrays.text(missing)])}
            # Those that are not there will be; one that is there by now was just created by somebody else.
            connection.execute("ROLLBACK")
            unknown = sorted(set(missing) - there)
            if carefully and there and not looked_twice:
                time.sleep(SECOND_LOOK_S)
                looked_twice = True
            elif carefully:
                being_created = [org_id for org_id in unknown if not cls.can_create(connection, org_id)]
                found_out = dict.fromkeys(there, LOCKED) | dict.fromkeys(being_created, BEING_CREATED)
                known_to_wait = {**known_to_wait, **found_out}
            else:
                cls.create(connection, unknown)
            return again(known_to_wait=known_to_wait, looked_twice=looked_twice)
        work.reasons_to_wait = dict(known_to_wait)
        if somebody_waits:
            for (org_id,) in connection.execute(_WAITING, [arrays.text(sorted(named_ids))]):
                work.reasons_to_wait[org_id] = BEHIND
        work._keep_loaded(workflows(), posted())
        work._post_due(connection, named.subscriptions)
        if carefully and (stuck := work.with_locked_records(connection)):
            connection.execute("ROLLBACK")
            known_to_wait = {**known_to_wait, **dict.fromkeys(stuck, RECORD_LOCKED)}
            return again(known_to_wait=known_to_wait, looked_twice=looked_twice)
        return work

    @classmethod
    def load_one(cls, connection: Connection, org_id: str, patience_s: float) -> "_WorkingSet | Applied":
        """Lock the wallet of `org_id`, if it is there, and post what is due; or end the transaction and say why not."""
        work = cls.load_due(connection, [org_id], patience_s)
        if not work.wallets and connection.execute(_THERE, [arrays.text([org_id])]).fetchall():
            connection.execute("ROLLBACK")
            return Applied([], work.reasons_to_wait.get(org_id, LOCKED))
        if org_id in work.reasons_to_wait:
            work.write_and_commit(connection)
            return Applied([], work.reasons_to_wait[org_id])
        return work

    @classmethod
    def load_due(cls, connection: Connection, org_ids: Sequence[str], patience_s: float) -> "_WorkingSet":
        """Lock those of the wallets `org_ids` that nobody else holds, and post what is due in them."""
        with connection.pipeline():
            connection.execute(_BEGIN)
            locked = _select(connection, Wallet, _LOCK_WALLETS_THAT_CAN_BE, [arrays.text(sorted(org_ids))])
            clock = connection.execute(_clock(patience_s))
        [(now, *_)] = clock.fetchall()
        work = cls(locked.fetchall(), now)
        work._post_due(connection, set())
        if stuck := work.with_locked_records(connection):
            connection.execute("ROLLBACK")
            work = cls.load_due(connection, sorted(set(org_ids) - stuck), patience_s)
            work.reasons_to_wait |= dict.fromkeys(stuck, RECORD_LOCKED)
        return work

    def with_locked_records(self, connection: Connection) -> set[str]:
        """The organizations of which somebody else has locked a workflow or a subscription that is loaded."""
        stuck: set[str] = set()
        for loaded, lock in (
            (self._loaded_workflows, _LOCK_WORKFLOWS_THAT_CAN_BE),
            (self._loaded_subscriptions, _LOCK_SUBSCRIPTIONS_THAT_CAN_BE),
        ):
            if keys := sorted(key for key in loaded if key[0] in self.wallets):
                can_be = connection.execute(lock, [arrays.text(column) for column in zip(*keys, strict=True)])
                stuck |= {org_id for org_id, _ in set(keys).difference(can_be)}
        return stuck

    @staticmethod
    def create(connection: Connection, org_ids: Collection[str]) -> None:
        """Create wallets, in a transaction of its own: to do so while holding others would invite deadlocks."""
        if not org_ids:
            return
        with connection.pipeline():
            connection.execute(_BEGIN)
            connection.execute(*_CREATE_WALLETS.of([Wallet(org_id) for org_id in org_ids]))
            connection.execute("COMMIT")

    @classmethod
    def can_create(cls, connection: Connection, org_id: str) -> bool:
        """Create a wallet, unless somebody else is about to create it and takes time over that."""
        connection.execute(_BEGIN)
        connection.execute(_clock(SHORT_PATIENCE_S))
        try:
            connection.execute(*_CREATE_WALLETS.of([Wallet(org_id)]))
        except (LockNotAvailable, QueryCanceled):
            connection.execute("ROLLBACK")
            return False
        connection.execute("COMMIT")
        return True

    def load_named(self, connection: Connection, messages: Sequence[Message]) -> None:
        """Load what deciding `messages` needs besides their wallets, which are locked."""
        named = _Named(messages)
        with connection.pipeline():
            workflows = _find(connection, Workflow, _WORKFLOWS, named.workflows)
            posted = _find(connection, PostedMessage, _POSTED, named.posted)
            subscriptions = _find(connection, Subscription, _SUBSCRIPTIONS, named.subscriptions)
        self._keep_loaded(workflows(), posted(), subscriptions())

    def _keep_loaded(
        self,
        workflows: Iterable[Workflow] = (),
        posted: Iterable[PostedMessage] = (),
        subscriptions: Iterable[Subscription] = (),
    ) -> None:
        # What is known already may have changed in this transaction.
        new_workflows = {
            key: workflow
            for workflow in workflows
            if (key := (workflow.org_id, workflow.workflow_id)) not in self._loaded_workflows
        }
        self._loaded_workflows |= new_workflows
        self.workflows |= new_workflows
        self.posted |= {(known.org_id, known.kind, known.message_id): known for known in posted}
        new_subscriptions = {
            key: known
            for known in subscriptions
            if (key := (known.org_id, known.subscription_id)) not in self._loaded_subscriptions
        }
        self._loaded_subscriptions |= new_subscriptions
        self.subscriptions |= new_subscriptions

    def _post_due(self, connection: Connection, named_subscriptions: set[tuple[str, str]]) -> None:
        """Do what time alone does, before any message; load the subscriptions that this or a message needs."""
        due = [wallet for wallet in self.wallets.values() if wallet.is_due(self.now[wallet.org_id])]
        if not due and not named_subscriptions:
            return
        current = {(wallet.org_id, wallet.subscription_id) for wallet in due if wallet.subscription_id is not None}
        holding = [wallet.org_id for wallet in due if wallet.next_hold_expiry is not None]
        holding_at = [arrays.text(holding), arrays.timestamptz([self.now[org_id] for org_id in holding])]
        with connection.pipeline():
            subscriptions = _find(connection, Subscription, _SUBSCRIPTIONS, current | named_subscriptions)
            found = _select(connection, Workflow, _EXPIRED_HOLDS, [*holding_at, MOST_DUE])
            next_expiry = connection.execute(_NEXT_HOLD_EXPIRY, holding_at)
        expired = sorted(found.fetchall(), key=lambda workflow: (workflow.expires_at, workflow.workflow_id))
        self._keep_loaded(expired, subscriptions=subscriptions())
        for wallet in due:
            self._begin_due_periods(wallet)
        # Periods first: a wallet in which more of them are due keeps its holds for another time.
        overdue = {org_id for org_id, wallet in self.wallets.items() if self._period_is_due(wallet)}
        for workflow in expired:
            if workflow.org_id not in overdue:
                self._release_expired(workflow)
        if len(expired) < MOST_DUE:  # otherwise, there may be more of them
            for org_id, expires_at in next_expiry.fetchall():
                if org_id not in overdue:
                    self._keep(self.wallets[org_id]._replace(next_hold_expiry=expires_at), ())
        for org_id, wallet in self.wallets.items():
            if wallet.is_due(self.now[org_id]):
                self.reasons_to_wait[org_id] = MUCH_DUE

    def _period_is_due(self, wallet: Wallet) -> bool:
        return wallet.next_period_at is not None and wallet.next_period_at <= self.now[wallet.org_id]

    def _begin_due_periods(self, wallet: Wallet) -> None:
        if wallet.subscription_id is None:
            return
        subscription = self.subscriptions[wallet.org_id, wallet.subscription_id]
        wallet, subscription, events = rules.begin_due_periods(
            wallet, subscription, self.now[wallet.org_id], most_events=MOST_DUE - len(self.events)
        )
        self._keep(wallet, events, subscription=subscription)

    def _release_expired(self, workflow: Workflow) -> None:
        org_id = workflow.org_id
        wallet, workflow, event = rules.release_expired(self.wallets[org_id], workflow, self.now[org_id])
        self._keep(wallet, (event,), workflow=workflow)

    def decide(self, messages: Sequence[Message | InvalidMessage]) -> list["_Decided"]:
        """What becomes of `messages`, in order: those that have to wait change nothing."""
        if not self.reasons_to_wait:  # as nearly always
            return [message if isinstance(message, InvalidMessage) else self.apply(message) for message in messages]
        return [self._decide(message) for message in messages]

    def _decide(self, message: Message | InvalidMessage) -> "_Decided":
        org_id = message.org_id or waiting.NOBODY
        if org_id in self.reasons_to_wait:
            return Waits(org_id, self.reasons_to_wait[org_id])
        return message if isinstance(message, InvalidMessage) else self.apply(message)

    def apply(self, message: Message) -> Result | Refusal:
        """Decide `message` on the state that the messages before it have left."""
        org_id = message.org_id
        workflow_id: str | None = getattr(message, "workflow_id", None)
        workflow = None if workflow_id is None else self.workflows.get((org_id, workflow_id))
        subscription = posted = None
        if isinstance(message, WalletMessage):
            posted = self.posted.get((org_id, message.kind, message.message_id))
            if isinstance(message, Subscribe | Unsubscribe):
                subscription = self.subscriptions.get((org_id, message.subscription_id))
        decision = rules.decide(
            self.wallets[org_id],
            message,
            self.now[org_id],
            workflow=workflow,
            subscription=subscription,
            posted=posted,
        )
        if decision.refusal is not None:
            return decision.refusal
        if not decision.duplicate:
            self._keep(decision.wallet, decision.events, decision.workflow, decision.subscription, decision.posted)
        if workflow_id is not None:
            workflow = self.workflows[org_id, workflow_id]
        return Result(
            decision.outcome,
            decision.reason,
            decision.duplicate,
            org_id,
            workflow_id,
            None if workflow is None else workflow.state,
            tuple([event.seq for event in decision.events]),
            decision.wallet.available,
        )

    def _keep(
        self,
        wallet: Wallet,
        events: Sequence[Event],
        workflow: Workflow | None = None,
        subscription: Subscription | None = None,
        posted: PostedMessage | None = None,
    ) -> None:
        self.wallets[wallet.org_id] = wallet
        self.events += events
        if workflow is not None:
            self.workflows[workflow.org_id, workflow.workflow_id] = workflow
        if subscription is not None:
            self.subscriptions[subscription.org_id, subscription.subscription_id] = subscription
        if posted is not None:
            self.posted[posted.org_id, posted.kind, posted.message_id] = posted
            self._new_posted.append(posted)

    def write_and_commit(self, connection: Connection) -> None:
        """Write everything that changed, set by set, and commit."""
        # COMMIT is a statement like any other: psycopg's own `commit()` waits for the answers before it has sent all of
        # it, so once the sockets' buffers are full it waits forever.
        with connection.pipeline():
            # PostgreSQL begins while the rest is being put together, so what is put together last is the largest.
            for write, rows in (
                (_INSERT_WORKFLOWS, _new(self.workflows, self._loaded_workflows)),
                (_UPDATE_WORKFLOWS, _changed(self.workflows, self._loaded_workflows)),
                (_INSERT_SUBSCRIPTIONS, _new(self.subscriptions, self._loaded_subscriptions)),
                (_UPDATE_SUBSCRIPTIONS, _changed(self.subscriptions, self._loaded_subscriptions)),
                (_UPDATE_WALLETS, _changed(self.wallets, self._loaded_wallets)),
                (_INSERT_POSTED, self._new_posted),
                (_INSERT_EVENTS, self.events),
            ):
                if rows:
                    connection.execute(*write.of(rows))
            committed = connection.execute("COMMIT")
        assert committed.statusmessage == "COMMIT"


def _new(records: Mapping[Any, Any], loaded: Mapping[Any, Any]) -> list[Any]:
    return [record for key, record in records.items() if key not in loaded]


def _changed(records: Mapping[Any, Any], loaded: Mapping[Any, Any]) -> list[Any]:
    return [records[key] for key, as_loaded in loaded.items() if records[key] is not as_loaded]


# SQL. The fields of a record are the columns of its table, in the same order; arrays go in, one per column.


def _select(
    connection: Connection, record: type[Any], statement: str, parameters: Sequence[Any]
) -> psycopg.Cursor[Any]:
    cursor = connection.cursor(row_factory=args_row(record), binary=True)
    return cursor.execute(statement, parameters)


def _find(connection: Connection, record: type[Any], statement: str, keys: set[Any]) -> Callable[[], Sequence[Any]]:
    """Look for the records with `keys`, if there are any; what is returned gives them, after the round trip."""
    if not keys:
        return tuple
    return _select(
        connection, record, statement, [arrays.text(column) for column in zip(*sorted(keys), strict=True)]
    ).fetchall


class _Write(NamedTuple):
    """A statement that writes rows, which arrive as one array per column."""

    sql: str
    encoders: tuple[Callable[[Sequence[Any]], object], ...]

    def of(self, rows: Sequence[Any]) -> tuple[str, list[object]]:
        """What to execute, to write `rows`."""
        columns = zip(*sorted(rows), strict=True)  # neighbours in an index cost less, one after the other
        return self.sql, [encode(column) for encode, column in zip(self.encoders, columns, strict=True)]


# What is not named here is rare: psycopg finds out how to send a list.
_ENCODERS: dict[type, Callable[[Any], object]] = {
    Text: arrays.text,
    BigInteger: arrays.bigint,
    TIMESTAMP: arrays.timestamptz,
    JSONB: arrays.jsonb,
}
_DIALECT: Dialect = postgresql.dialect()


def _names(record: type[Any]) -> str:
    return ", ".join(record._fields)


def _write(table: Table, record: type[Any], statement: str) -> _Write:
    """`statement` with `{rows}` replaced by the rows of `record` that arrive as arrays."""
    types = [table.c[name].type for name in record._fields]
    columns = ", ".join(f"%b::{column_type.compile(_DIALECT)}[]" for column_type in types)
    rows = f"unnest({columns}) AS new ({_names(record)})"
    return _Write(statement.format(rows=rows), tuple(_ENCODERS.get(type(column_type), list) for column_type in types))


def _insert(table: Table, record: type[Any], on_conflict: str = "") -> _Write:
    names = _names(record)
    return _write(table, record, f"INSERT INTO {table.name} ({names}) SELECT {names} FROM {{rows}} {on_conflict}")


def _update(table: Table, record: type[Any]) -> _Write:
    same = " AND ".join(f"{table.name}.{key.name} = new.{key.name}" for key in table.primary_key)
    changes = ", ".join(f"{name} = new.{name}" for name in record._fields if not table.c[name].primary_key)
    return _write(table, record, f"UPDATE {table.name} SET {changes} FROM {{rows}} WHERE {same}")


def _by_key(table: Table, record: type[Any]) -> str:
    keys = [column.name for column in table.primary_key]
    columns = ", ".join("%b::text[]" for _ in keys)
    return (
        f"SELECT {_names(record)} FROM {table.name}"
        f" JOIN unnest({columns}) AS named ({', '.join(keys)}) USING ({', '.join(keys)})"
    )


def _lock_that_can_be(table: Table) -> str:
    keys = ", ".join(column.name for column in table.primary_key)
    return (
        f"SELECT {keys} FROM {table.name} JOIN unnest(%b::text[], %b::text[]) AS named ({keys}) USING ({keys})"
        f" FOR NO KEY UPDATE OF {table.name} SKIP LOCKED"
    )


def _clock(statement_timeout_s: float) -> str:
    # Rows are looked up by their keys, one after the other; the planner takes that for dearer than it is, and would
    # rather read all of a table of some hundred thousand rows.
    settings = {
        "lock_timeout": f"{min(LOCK_TIMEOUT_S, statement_timeout_s / 2)}s",
        "statement_timeout": f"{statement_timeout_s}s",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
    }
    local = [f"set_config('{name}', '{value}', true)" for name, value in settings.items()]
    return f"SELECT clock_timestamp(), EXISTS (SELECT FROM waiting_messages), {', '.join(local)}"


# Whatever the server's default: what is read once a lock is held is current.
_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# The clock is read once the locks are held, and whether anybody waits at all; the settings are for what follows.
_CLOCK = _clock(PATIENCE_S)
_LOCK_WALLETS = f"SELECT {_names(Wallet)} FROM wallets WHERE org_id = ANY(%b::text[]) ORDER BY org_id FOR UPDATE"
_LOCK_WALLETS_THAT_CAN_BE = f"{_LOCK_WALLETS} SKIP LOCKED"
_THERE = "SELECT org_id FROM wallets WHERE org_id = ANY(%b::text[])"
_WAITING = "SELECT DISTINCT org_id FROM waiting_messages WHERE org_id = ANY(%b::text[])"
_CREATE_WALLETS = _insert(tables.wallets, Wallet, "ON CONFLICT DO NOTHING")
_WORKFLOWS = _by_key(tables.workflows, Workflow)
_POSTED = _by_key(tables.posted_messages, PostedMessage)
_SUBSCRIPTIONS = _by_key(tables.subscriptions, Subscription)
# OFFSET 0 keeps this from becoming a join, which would read everybody's open holds.
_EXPIRED_HOLDS = f"""
    SELECT expired.* FROM unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now) CROSS JOIN LATERAL (
        SELECT {_names(Workflow)} FROM workflows
        WHERE workflows.org_id = due.org_id AND state = 'reserved' AND expires_at <= due.now
        ORDER BY expires_at OFFSET 0
    ) AS expired LIMIT %b
"""
_LOCK_WORKFLOWS_THAT_CAN_BE = _lock_that_can_be(tables.workflows)
_LOCK_SUBSCRIPTIONS_THAT_CAN_BE = _lock_that_can_be(tables.subscriptions)
_NEXT_HOLD_EXPIRY = """
    SELECT org_id, (
        SELECT min(expires_at) FROM workflows
        WHERE workflows.org_id = due.org_id AND state = 'reserved' AND expires_at > due.now
    ) FROM unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now)
"""
_UPDATE_WALLETS = _update(tables.wallets, Wallet)
_INSERT_WORKFLOWS = _insert(tables.workflows, Workflow)
_UPDATE_WORKFLOWS = _update(tables.workflows, Workflow)
_INSERT_SUBSCRIPTIONS = _insert(tables.subscriptions, Subscription)
_UPDATE_SUBSCRIPTIONS = _update(tables.subscriptions, Subscription)
_INSERT_POSTED = _insert(tables.posted_messages, PostedMessage)
_INSERT_EVENTS = _insert(tables.credit_events, Event)
