"""The only place that writes to the ledger: a batch of messages becomes one transaction.

`apply_batch` locks the wallets concerned in the order of their ids, loads what the messages name, lets `rules` decide
one message after the other, and writes the result set by set: the number of statements does not depend on the number
of messages, and they travel in two round trips, one to load and one to write. What cannot be applied becomes a dead
letter in the same transaction. When a batch fails for a reason of its own making, it is halved until the culprit stands
alone, so its neighbours are applied all the same.

A fault of the database (see `database.is_transient`) is raised as it is: nothing of the batch, or all of it, has
happened, and applying it again is safe.
"""

import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg.rows import args_row
from sqlalchemy import BigInteger, Dialect, Engine, Table, Text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

from ledger import arrays, dead_letters, rules, tables
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


class Delivery(NamedTuple):
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
    """A psycopg connection that begins no transaction by itself. One that failed is closed, not used again."""
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, psycopg.Connection)
        try:
            connection.autocommit = True  # the BEGIN that psycopg would send costs a round trip of its own
            yield connection
            connection.autocommit = False
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
    logger.error("%s failed unexpectedly, see dead letter %d:\n%s", letter.task, letter_id, letter.traceback)
    return DeadLettered(letter_id, letter.code, letter.error)


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
        self.wallets = {wallet.org_id: wallet for wallet in locked}
        # The database's clock, but never before what the wallet has already seen.
        self.now = {
            org_id: max(database_now, wallet.last_event_at or database_now) for org_id, wallet in self.wallets.items()
        }
        self.workflows: dict[tuple[str, str], Workflow] = {}
        self.subscriptions: dict[tuple[str, str], Subscription] = {}
        self.posted: dict[tuple[str, str, str], PostedMessage] = {}
        self.events: list[Event] = []
        # As they are in the database.
        self._loaded_wallets = dict(self.wallets)
        self._loaded_workflows: dict[tuple[str, str], Workflow] = {}
        self._loaded_subscriptions: dict[tuple[str, str], Subscription] = {}
        self._new_posted: list[PostedMessage] = []

    @classmethod
    def load(cls, connection: Connection, messages: Sequence[Message]) -> "_WorkingSet":
        """Lock the wallets of `messages`, load all that deciding them needs, and post what is due."""
        org_ids = sorted({message.org_id for message in messages})
        with connection.pipeline():
            connection.execute(_BEGIN)
            locked = _select(connection, Wallet, _LOCK_WALLETS, [arrays.text(org_ids)])
            clock = connection.execute(_CLOCK)
            named = _Named(messages)
            workflows = _find(connection, Workflow, _WORKFLOWS, named.workflows)
            posted = _find(connection, PostedMessage, _POSTED, named.posted)
        work = cls(locked.fetchall(), clock.fetchall()[0][0])
        missing = [org_id for org_id in org_ids if org_id not in work.wallets]
        if missing:
            with connection.pipeline():
                # In a transaction of its own: to create wallets while holding others would invite deadlocks.
                connection.execute("COMMIT")
                connection.execute(*_CREATE_WALLETS.of([Wallet(org_id) for org_id in missing]))
            return cls.load(connection, messages)
        work._keep_loaded(workflows(), posted())
        work._post_due(connection, named.subscriptions)
        return work

    @classmethod
    def load_due(cls, connection: Connection, org_ids: Sequence[str]) -> "_WorkingSet":
        """Lock those of the wallets `org_ids` that nobody else holds, and post what is due in them."""
        with connection.pipeline():
            connection.execute(_BEGIN)
            locked = _select(connection, Wallet, f"{_LOCK_WALLETS} SKIP LOCKED", [arrays.text(sorted(org_ids))])
            clock = connection.execute(_CLOCK)
        work = cls(locked.fetchall(), clock.fetchall()[0][0])
        work._post_due(connection, set())
        return work

    def _keep_loaded(
        self,
        workflows: Iterable[Workflow] = (),
        posted: Iterable[PostedMessage] = (),
        subscriptions: Iterable[Subscription] = (),
    ) -> None:
        self._loaded_workflows |= {(workflow.org_id, workflow.workflow_id): workflow for workflow in workflows}
        self.workflows |= self._loaded_workflows
        self.posted |= {(known.org_id, known.kind, known.message_id): known for known in posted}
        self._loaded_subscriptions |= {(known.org_id, known.subscription_id): known for known in subscriptions}
        self.subscriptions |= self._loaded_subscriptions

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
            expired = _select(connection, Workflow, _EXPIRED_HOLDS, holding_at)
            next_expiry = connection.execute(_NEXT_HOLD_EXPIRY, holding_at)
        expired_workflows = expired.fetchall()
        self._keep_loaded(expired_workflows, subscriptions=subscriptions())
        for wallet in due:
            self._begin_due_periods(wallet)
        for workflow in expired_workflows:
            self._release_expired(workflow)
        for org_id, expires_at in next_expiry.fetchall():
            self._keep(self.wallets[org_id]._replace(next_hold_expiry=expires_at), ())

    def _begin_due_periods(self, wallet: Wallet) -> None:
        if wallet.subscription_id is None:
            return
        subscription = self.subscriptions[wallet.org_id, wallet.subscription_id]
        wallet, subscription, events = rules.begin_due_periods(wallet, subscription, self.now[wallet.org_id])
        self._keep(wallet, events, subscription=subscription)

    def _release_expired(self, workflow: Workflow) -> None:
        org_id = workflow.org_id
        wallet, workflow, event = rules.release_expired(self.wallets[org_id], workflow, self.now[org_id])
        self._keep(wallet, (event,), workflow=workflow)

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


# Whatever the server's default: what is read once a lock is held is current.
_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# The clock is read once the locks are held. From here on rows are looked up by their keys, one after the other; the
# planner takes that for dearer than it is, and would rather read all of a table of some hundred thousand rows.
_CLOCK = """
    SELECT clock_timestamp(), set_config('enable_hashjoin', 'off', true), set_config('enable_mergejoin', 'off', true)
"""
_LOCK_WALLETS = f"SELECT {_names(Wallet)} FROM wallets WHERE org_id = ANY(%b::text[]) ORDER BY org_id FOR UPDATE"
_CREATE_WALLETS = _insert(tables.wallets, Wallet, "ON CONFLICT DO NOTHING")
_WORKFLOWS = _by_key(tables.workflows, Workflow)
_POSTED = _by_key(tables.posted_messages, PostedMessage)
_SUBSCRIPTIONS = _by_key(tables.subscriptions, Subscription)
# OFFSET 0 keeps this from becoming a join, which would read everybody's open holds.
_EXPIRED_HOLDS = f"""
    SELECT expired.* FROM unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now) CROSS JOIN LATERAL (
        SELECT {_names(Workflow)} FROM workflows
        WHERE workflows.org_id = due.org_id AND state = 'reserved' AND expires_at <= due.now OFFSET 0
    ) AS expired ORDER BY expires_at, workflow_id
"""
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
