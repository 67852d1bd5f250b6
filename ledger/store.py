"""The only place that writes to the ledger: a batch of messages becomes one transaction.

`apply_batch` locks the wallets concerned in the order of their ids, loads what the messages name, lets `rules` decide
one message after the other, and writes the result set by set: the number of statements does not depend on the number
of messages. What cannot be applied becomes a dead letter in the same transaction. When a batch fails for a reason of
its own making, it is halved until the culprit stands alone, so its neighbours are applied all the same.

A fault of the database (see `database.is_transient`) is raised as it is: nothing of the batch, or all of it, has
happened, and applying it again is safe.
"""

import json
import logging
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime
from operator import attrgetter
from typing import Any, TypeVar

import psycopg
from psycopg.rows import args_row
from sqlalchemy import Dialect, Engine, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB

from ledger import dead_letters, rules, tables
from ledger.database import is_transient
from ledger.dead_letters import DeadLetter
from ledger.messages import (
    InvalidMessage,
    Message,
    Refund,
    Subscribe,
    Unsubscribe,
    WalletMessage,
    WorkflowMessage,
    parse,
)
from ledger.state import Event, PostedMessage, Refusal, Result, Subscription, Wallet, Workflow

logger = logging.getLogger(__name__)

MAX_BATCH = 1_000
"""The most messages that one transaction applies; more are applied as several batches."""

MAX_TASK_LENGTH = 256
"""How much of a task's name a dead letter keeps: it is part of an index."""

Connection = psycopg.Connection[Any]
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it arrived."""

    task: str
    payload: object
    """The JSON value that should be the message, or why there is none."""
    body: bytes
    """What arrived, byte by byte, as a dead letter keeps it."""


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """What became of a message that could not be applied."""

    letter_id: int
    code: str
    error: str


def apply_batch(engine: Engine, deliveries: Sequence[Delivery]) -> list[Result | DeadLettered]:
    """Apply `deliveries`, in order, and answer each of them. Everything is committed when this returns.

    Raises a database error that is transient: see the module's description.
    """
    return _in_transactions(engine, deliveries, _apply, _bury)


def catch_up(engine: Engine, org_ids: Sequence[str], *, task: str) -> int:
    """Begin the periods and release the reservations that are due in the wallets `org_ids`.

    A wallet that somebody else holds is left out: whoever holds it does the same. `task` is named in a dead letter,
    should that become necessary. Answers with the number of events written. Raises a database error that is transient.
    """

    def bury(engine: Engine, org_id: str, error: Exception) -> int:
        payload = {"org_id": org_id}
        _bury(engine, Delivery(task, payload, json.dumps([[payload], {}, {}]).encode()), error)
        return 0

    return sum(_in_transactions(engine, org_ids, _catch_up, bury))


def _in_transactions(
    engine: Engine,
    items: Sequence[Item],
    apply: Callable[[Connection, Sequence[Item]], list[Answer]],
    bury: Callable[[Engine, Item, Exception], Answer],
) -> list[Answer]:
    """Apply `items` in as few transactions as possible; an item that cannot be applied even on its own is buried."""
    answers: list[Answer] = []
    pending = [items[first : first + MAX_BATCH] for first in range(0, len(items), MAX_BATCH)]
    pending.reverse()
    while pending:
        batch = pending.pop()
        try:
            with _connection(engine) as connection:
                answers += apply(connection, batch)
        except Exception as error:
            if is_transient(error):
                raise
            if len(batch) > 1:
                middle = len(batch) // 2
                pending += [batch[middle:], batch[:middle]]
            else:
                answers.append(bury(engine, batch[0], error))
    return answers


@contextmanager
def _connection(engine: Engine) -> Iterator[Connection]:
    """A psycopg connection, for one transaction. One that failed is closed, not returned to the pool."""
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, psycopg.Connection)
        try:
            yield connection
        except BaseException:
            pooled.invalidate()
            raise


def _apply(connection: Connection, deliveries: Sequence[Delivery]) -> list[Result | DeadLettered]:
    messages = [parse(delivery.task, delivery.payload) for delivery in deliveries]
    work = _WorkingSet.load(connection, [message for message in messages if isinstance(message, Message)])
    answers: list[Result | InvalidMessage | Refusal] = [
        message if isinstance(message, InvalidMessage) else work.apply(message) for message in messages
    ]
    letters = [
        DeadLetter(_storable(delivery.task)[:MAX_TASK_LENGTH], delivery.body, message.org_id, answer.code, answer.error)
        for delivery, message, answer in zip(deliveries, messages, answers, strict=True)
        if not isinstance(answer, Result)
    ]
    letter_ids = iter(dead_letters.record(connection, letters) if letters else ())
    work.write_and_commit(connection)
    return [
        answer if isinstance(answer, Result) else DeadLettered(next(letter_ids), answer.code, answer.error)
        for answer in answers
    ]


def _catch_up(connection: Connection, org_ids: Sequence[str]) -> list[int]:
    work = _WorkingSet.load_due(connection, org_ids)
    work.write_and_commit(connection)
    return [len(work.events)]


def _bury(engine: Engine, delivery: Delivery, error: Exception) -> DeadLettered:
    letter = DeadLetter(
        _storable(delivery.task)[:MAX_TASK_LENGTH],
        delivery.body,
        parse(delivery.task, delivery.payload).org_id,
        "unexpected_error",
        _storable(f"{delivery.task} failed unexpectedly: {type(error).__name__}: {error}"),
        _storable("".join(traceback.format_exception(error))),
    )
    with _connection(engine) as connection:
        [letter_id] = dead_letters.record(connection, [letter])
        connection.commit()
    logger.error("%s failed unexpectedly, see dead letter %d:\n%s", letter.task, letter_id, letter.traceback)
    return DeadLettered(letter_id, letter.code, letter.error)


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


class _WorkingSet:
    """What one transaction has locked and loaded, and what it is going to write."""

    def __init__(self, locked: Iterable[Wallet], database_now: datetime) -> None:
        self.wallets = {wallet.org_id: wallet for wallet in locked}
        # The database's clock, but never before what the wallet has already seen.
        self.now = {
            org_id: max(database_now, wallet.last_event_at or database_now) for org_id, wallet in self.wallets.items()
        }
        self.workflows: dict[tuple[str, str], Workflow] = {}
        self.subscriptions: dict[tuple[str, str], Subscription] = {}
        self.posted: dict[tuple[str, str, str], PostedMessage] = {}
        self.events: list[Event] = []
        self._changed_wallets: set[str] = set()
        self._changed_workflows: set[tuple[str, str]] = set()
        self._changed_subscriptions: set[tuple[str, str]] = set()
        self._new_posted: list[PostedMessage] = []

    @classmethod
    def load(cls, connection: Connection, messages: Sequence[Message]) -> "_WorkingSet":
        """Lock the wallets of `messages`, load all that deciding them needs, and post what is due."""
        org_ids = sorted({message.org_id for message in messages})
        named_workflows = {
            (message.org_id, message.workflow_id)
            for message in messages
            if isinstance(message, WorkflowMessage | Refund) and message.workflow_id is not None
        }
        named_posted = {
            (message.org_id, message.kind, message.message_id)
            for message in messages
            if isinstance(message, WalletMessage)
        }
        named_subscriptions = {
            (message.org_id, message.subscription_id)
            for message in messages
            if isinstance(message, Subscribe | Unsubscribe)
        }
        with connection.pipeline():
            locked = _select(connection, Wallet, _LOCK_WALLETS, [org_ids])
            clock = connection.execute(_CLOCK)
            workflows = _select(connection, Workflow, _WORKFLOWS, _arrays(named_workflows, 2))
            posted = _select(connection, PostedMessage, _POSTED, _arrays(named_posted, 3))
            work = cls(locked.fetchall(), clock.fetchall()[0][0])
            work._keep_loaded(workflows.fetchall(), posted.fetchall())
        missing = [org_id for org_id in org_ids if org_id not in work.wallets]
        if missing:
            # In a transaction of its own: to create wallets while holding others would invite deadlocks.
            connection.rollback()
            connection.execute(_CREATE_WALLETS, _columns(Wallet, [Wallet(org_id) for org_id in missing]))
            connection.commit()
            return cls.load(connection, messages)
        work._post_due(connection, named_subscriptions)
        return work

    @classmethod
    def load_due(cls, connection: Connection, org_ids: Sequence[str]) -> "_WorkingSet":
        """Lock those of the wallets `org_ids` that nobody else holds, and post what is due in them."""
        with connection.pipeline():
            locked = _select(connection, Wallet, f"{_LOCK_WALLETS} SKIP LOCKED", [sorted(org_ids)])
            clock = connection.execute(_CLOCK)
            work = cls(locked.fetchall(), clock.fetchall()[0][0])
        work._post_due(connection, set())
        return work

    def _keep_loaded(self, workflows: Iterable[Workflow], posted: Iterable[PostedMessage]) -> None:
        self.workflows.update({(workflow.org_id, workflow.workflow_id): workflow for workflow in workflows})
        self.posted.update({(known.org_id, known.kind, known.message_id): known for known in posted})

    def _post_due(self, connection: Connection, named_subscriptions: set[tuple[str, str]]) -> None:
        """Do what time alone does, before any message; load the subscriptions that this or a message needs."""
        due = [wallet for wallet in self.wallets.values() if wallet.is_due(self.now[wallet.org_id])]
        current = {(wallet.org_id, wallet.subscription_id) for wallet in due if wallet.subscription_id is not None}
        if not due and not named_subscriptions:
            return
        due_at = [[wallet.org_id for wallet in due], [self.now[wallet.org_id] for wallet in due]]
        with connection.pipeline():
            subscriptions = _select(connection, Subscription, _SUBSCRIPTIONS, _arrays(current | named_subscriptions, 2))
            expired = _select(connection, Workflow, _EXPIRED_HOLDS, due_at)
            next_expiry = connection.execute(_NEXT_HOLD_EXPIRY, due_at)
            for subscription in subscriptions.fetchall():
                self.subscriptions[subscription.org_id, subscription.subscription_id] = subscription
            expired_by_org = defaultdict(list)
            for workflow in expired.fetchall():
                expired_by_org[workflow.org_id].append(workflow)
            next_expiry_by_org = dict(next_expiry.fetchall())
        for wallet in due:
            self._begin_due_periods(wallet)
            self._release_expired(wallet.org_id, expired_by_org[wallet.org_id], next_expiry_by_org.get(wallet.org_id))

    def _begin_due_periods(self, wallet: Wallet) -> None:
        if wallet.subscription_id is None:
            return
        subscription = self.subscriptions[wallet.org_id, wallet.subscription_id]
        wallet, subscription, events = rules.begin_due_periods(wallet, subscription, self.now[wallet.org_id])
        self._keep(wallet, events, subscription=subscription)

    def _release_expired(self, org_id: str, expired: Sequence[Workflow], next_expiry: datetime | None) -> None:
        for expired_workflow in expired:
            wallet, workflow, event = rules.release_expired(self.wallets[org_id], expired_workflow, self.now[org_id])
            self._keep(wallet, (event,), workflow=workflow)
        self._keep(replace(self.wallets[org_id], next_hold_expiry=next_expiry), ())

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
        return Result(
            decision.outcome,
            decision.reason,
            decision.duplicate,
            org_id,
            workflow_id,
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
        if wallet is not self.wallets[wallet.org_id]:
            self.wallets[wallet.org_id] = wallet
            self._changed_wallets.add(wallet.org_id)
        self.events += events
        if workflow is not None:
            self.workflows[workflow.org_id, workflow.workflow_id] = workflow
            self._changed_workflows.add((workflow.org_id, workflow.workflow_id))
        if subscription is not None:
            self.subscriptions[subscription.org_id, subscription.subscription_id] = subscription
            self._changed_subscriptions.add((subscription.org_id, subscription.subscription_id))
        if posted is not None:
            self.posted[posted.org_id, posted.kind, posted.message_id] = posted
            self._new_posted.append(posted)

    def write_and_commit(self, connection: Connection) -> None:
        """Write everything that changed, set by set, and commit."""
        # One after the other: in a pipeline, statements of a megabyte and more were seen to stall.
        for statement, record, rows in (
            (_WRITE_WALLETS, Wallet, [self.wallets[key] for key in self._changed_wallets]),
            (_WRITE_WORKFLOWS, Workflow, [self.workflows[key] for key in self._changed_workflows]),
            (
                _WRITE_SUBSCRIPTIONS,
                Subscription,
                [self.subscriptions[key] for key in self._changed_subscriptions],
            ),
            (_WRITE_POSTED, PostedMessage, self._new_posted),
            (_WRITE_EVENTS, Event, self.events),
        ):
            if rows:
                connection.execute(statement, _columns(record, rows))
        connection.commit()


# SQL. The fields of a record are the columns of its table, in the same order; arrays go in, one per column.


def _select(
    connection: Connection, record: type[Any], statement: str, parameters: Sequence[Any]
) -> psycopg.Cursor[Any]:
    cursor = connection.cursor(row_factory=args_row(record), binary=True)
    return cursor.execute(statement, parameters)


def _arrays(keys: set[Any], width: int) -> list[list[str]]:
    return [list(column) for column in zip(*keys, strict=True)] or [[] for _ in range(width)]


def _columns(record: type[Any], rows: Sequence[Any]) -> list[list[Any]]:
    names = [field.name for field in fields(record)]
    columns = [list(column) for column in zip(*map(attrgetter(*names), rows), strict=True)]
    for position, name in enumerate(names):
        if name in _JSON_COLUMNS:
            columns[position] = [json.dumps(value, ensure_ascii=False) for value in columns[position]]
    return columns


_JSON_COLUMNS = frozenset({"metadata", "terms"})


def _names(record: type[Any], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{field.name}" for field in fields(record))


_DIALECT: Dialect = postgresql.dialect()


def _insert(table: Table, record: type[Any]) -> str:
    columns = [table.c[field.name] for field in fields(record)]
    types = ["text" if isinstance(column.type, JSONB) else column.type.compile(_DIALECT) for column in columns]
    arrays = ", ".join(f"%b::{array_type}[]" for array_type in types)
    values = ", ".join(f"{column.name}::jsonb" if isinstance(column.type, JSONB) else column.name for column in columns)
    names = _names(record)
    return f"INSERT INTO {table.name} ({names}) SELECT {values} FROM unnest({arrays}) AS new ({names})"


def _upsert(table: Table, record: type[Any]) -> str:
    key = [column.name for column in table.primary_key]
    changes = ", ".join(f"{field.name} = excluded.{field.name}" for field in fields(record) if field.name not in key)
    return f"{_insert(table, record)} ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changes}"


_CLOCK = "SELECT clock_timestamp()"
_LOCK_WALLETS = f"SELECT {_names(Wallet)} FROM wallets WHERE org_id = ANY(%b::text[]) ORDER BY org_id FOR UPDATE"
_CREATE_WALLETS = f"{_insert(tables.wallets, Wallet)} ON CONFLICT DO NOTHING"
_WORKFLOWS = (
    f"SELECT {_names(Workflow)} FROM workflows"
    " JOIN unnest(%b::text[], %b::text[]) AS named (org_id, workflow_id) USING (org_id, workflow_id)"
)
_POSTED = (
    f"SELECT {_names(PostedMessage)} FROM posted_messages"
    " JOIN unnest(%b::text[], %b::text[], %b::text[]) AS named (org_id, kind, message_id)"
    " USING (org_id, kind, message_id)"
)
_SUBSCRIPTIONS = (
    f"SELECT {_names(Subscription)} FROM subscriptions"
    " JOIN unnest(%b::text[], %b::text[]) AS named (org_id, subscription_id) USING (org_id, subscription_id)"
)
_EXPIRED_HOLDS = (
    f"SELECT {_names(Workflow)} FROM workflows"
    " JOIN unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now) USING (org_id)"
    " WHERE state = 'reserved' AND expires_at <= due.now ORDER BY org_id, expires_at, workflow_id"
)
_NEXT_HOLD_EXPIRY = (
    "SELECT org_id, min(expires_at) FROM workflows JOIN unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now)"
    " USING (org_id) WHERE state = 'reserved' AND expires_at > due.now GROUP BY org_id"
)
_WRITE_WALLETS = _upsert(tables.wallets, Wallet)
_WRITE_WORKFLOWS = _upsert(tables.workflows, Workflow)
_WRITE_SUBSCRIPTIONS = _upsert(tables.subscriptions, Subscription)
_WRITE_POSTED = _insert(tables.posted_messages, PostedMessage)
_WRITE_EVENTS = _insert(tables.credit_events, Event)
