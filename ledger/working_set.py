"""What one transaction locks, loads, decides and writes, set by set.

The number of statements does not depend on the number of messages. They take two round trips: one to load, one to
write; and another one if something is due or has an end, or a message names a subscription.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from operator import attrgetter
from typing import Any

from psycopg.errors import LockNotAvailable, QueryCanceled

from holdfast_client.messages import AnyMessage, InvalidMessage, Reverse, WalletMessage
from holdfast_client.results import Result
from ledger import arrays, clocks, rules, tables, waiting
from ledger.database import LOCK_TIMEOUT_S
from ledger.state import Cover, EndingCredits, Event, PostedMessage, Refusal, Subscription, Wallet, Workflow
from ledger.statements import (
    Connection,
    by_key,
    change,
    column_names,
    execute,
    find,
    insert,
    lock_that_can_be,
    select,
    statement,
    update,
)
from ledger.waiting import BEHIND, BEING_CREATED, LOCKED, MUCH_DUE, RECORD_LOCKED, Waits

MOST_DUE = 1_000
"""The most events that one transaction writes for what is due; some more if periods begin. The rest comes later."""

PATIENCE_S = 1.0
"""How long a batch waits for one statement before it looks for the culprit."""

SHORT_PATIENCE_S = 0.25
"""The same while it looks for one culprit."""

SHORTEST_PATIENCE_S = 0.05
"""The same while it looks for one of many culprits, as the other organizations wait meanwhile."""

SECOND_LOOK_S = 0.1
"""How long to wait before a locked wallet is tried again: another worker holds it for less than that."""

Decided = Result | InvalidMessage | Refusal | Waits
"""What was decided about a message."""


class _Named:
    """The keys of the records that messages name."""

    def __init__(self, messages: Iterable[AnyMessage]) -> None:
        self.workflows: set[tuple[str, str]] = set()
        self.posted: set[tuple[str, str, str]] = set()
        self.subscriptions: set[tuple[str, str]] = set()
        for message in messages:
            if (workflow := message.workflow_key) is not None:
                self.workflows.add(workflow)
            if (subscription := message.subscription_key) is not None:
                self.subscriptions.add(subscription)
            if isinstance(message, WalletMessage):
                self.posted.add(message.posted_key)
            if isinstance(message, Reverse):
                self.posted.add(message.purchase_key)


class WorkingSet:
    """The records that one transaction has locked and loaded, and those that it will write."""

    def __init__(self, locked: Iterable[Wallet], database_now: datetime, *, at: datetime | None = None) -> None:
        clocks.check(database_now)
        self._latest = database_now
        now = database_now if at is None else min(at, database_now)
        self.wallets = {wallet.org_id: wallet for wallet in locked}
        # The database's clock, but never before the wallet's last event.
        self.now = {org_id: max(now, wallet.last_event_at or now) for org_id, wallet in self.wallets.items()}
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
        self._loaded_posted: dict[tuple[str, str, str], PostedMessage] = {}

    @classmethod
    def load(
        cls,
        connection: Connection,
        messages: Sequence[AnyMessage],
        *,
        known_to_wait: Mapping[str, str],
        patience_s: float | None,
        looked_twice: bool = False,
        at: datetime | None = None,
    ) -> "WorkingSet":
        """Lock the wallets of `messages`, load the records that they name, and post what is due now, or was due `at`.

        An organization that has to wait is in `reasons_to_wait`: it is in `known_to_wait`, with its reason, or messages
        of it wait already. With `patience_s`, nothing waits for locked records; their organizations have to wait, too.
        """
        again = partial(cls.load, connection, messages, patience_s=patience_s, at=at)
        named_ids = {message.org_id for message in messages}
        org_ids = sorted(named_ids.difference(known_to_wait))
        if carefully := patience_s is not None:
            lock, read_clock = _LOCK_WALLETS_THAT_CAN_BE, _clock(patience_s)
        else:
            lock, read_clock = _LOCK_WALLETS, _CLOCK
        with connection.pipeline():
            _begin(connection)
            locked = _lock(connection, lock, org_ids)
            clock = connection.execute(read_clock)
            named = _Named(messages)
            workflows = find(connection, Workflow, _WORKFLOWS, named.workflows)
            posted = find(connection, PostedMessage, _POSTED, named.posted)
        now, somebody_waits, *_ = clock.fetchall()[0]
        work = cls(locked(), now, at=at)
        if missing := [org_id for org_id in org_ids if org_id not in work.wallets]:
            there = {org_id for (org_id,) in connection.execute(_THERE, [arrays.text(missing)])}
            # A wallet that was missing but exists now is locked, or somebody else has just created it.
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
    def load_due(cls, connection: Connection, org_ids: Sequence[str], patience_s: float) -> "WorkingSet":
        """Lock the wallets of `org_ids` that nobody else has locked, and post what is due in them."""
        with connection.pipeline():
            _begin(connection)
            locked = _lock(connection, _LOCK_WALLETS_THAT_CAN_BE, sorted(org_ids))
            clock = connection.execute(_clock(patience_s))
        [(now, *_)] = clock.fetchall()
        work = cls(locked(), now)
        work._post_due(connection, set())
        if stuck := work.with_locked_records(connection):
            connection.execute("ROLLBACK")
            work = cls.load_due(connection, sorted(set(org_ids) - stuck), patience_s)
            work.reasons_to_wait |= dict.fromkeys(stuck, RECORD_LOCKED)
        return work

    @classmethod
    def look(cls, connection: Connection, org_id: str, messages: Sequence[AnyMessage] = ()) -> "WorkingSet":
        """Load the wallet of `org_id` and the records that its `messages` name, and post what is due, here only.

        Locks and writes nothing. A wallet that does not exist is a new one. `reasons_to_wait` is as if the messages
        were to be applied. The transaction should be one snapshot that only reads.
        """
        named = _Named(messages)
        with connection.pipeline():
            found = select(connection, Wallet, _WALLETS, [arrays.text([org_id])])
            clock = connection.execute("SELECT clock_timestamp()")
            workflows = find(connection, Workflow, _WORKFLOWS, named.workflows)
            posted = find(connection, PostedMessage, _POSTED, named.posted)
        [(now,)] = clock.fetchall()
        work = cls(found.fetchall() or [Wallet(org_id)], now)
        work._keep_loaded(workflows(), posted())
        work._post_due(connection, named.subscriptions)
        return work

    def with_locked_records(self, connection: Connection) -> set[str]:
        """The organizations with a loaded workflow or subscription that somebody else has locked."""
        stuck: set[str] = set()
        for loaded, lock in (
            (self._loaded_workflows, _LOCK_WORKFLOWS_THAT_CAN_BE),
            (self._loaded_subscriptions, _LOCK_SUBSCRIPTIONS_THAT_CAN_BE),
        ):
            if keys := sorted(key for key in loaded if key[0] in self.wallets):
                can_be = execute(connection, lock, [arrays.text(column) for column in zip(*keys, strict=True)])
                stuck |= {org_id for org_id, _ in set(keys).difference(can_be)}
        if ending := {_ENDING_KEY(row) for wallet in self._loaded_wallets.values() for row in _ending(wallet)}:
            org_ids = arrays.text(sorted({org_id for org_id, *_ in ending}))
            stuck |= {
                org_id for org_id, *_ in ending.difference(connection.execute(_LOCK_ENDING_THAT_CAN_BE, [org_ids]))
            }
        return stuck

    @staticmethod
    def create(connection: Connection, org_ids: Collection[str]) -> None:
        """Create wallets in a transaction of its own: creating them while holding others could deadlock."""
        if not org_ids:
            return
        with connection.pipeline():
            _begin(connection)
            execute(connection, *_CREATE_WALLETS.of([Wallet(org_id) for org_id in org_ids]))
            connection.execute("COMMIT")

    @classmethod
    def can_create(cls, connection: Connection, org_id: str) -> bool:
        """Create a wallet. False: somebody else is creating it, and takes too long."""
        _begin(connection)
        connection.execute(_clock(SHORT_PATIENCE_S))
        try:
            execute(connection, *_CREATE_WALLETS.of([Wallet(org_id)]))
        except (LockNotAvailable, QueryCanceled):
            connection.execute("ROLLBACK")
            return False
        connection.execute("COMMIT")
        return True

    def load_named(self, connection: Connection, messages: Sequence[AnyMessage]) -> None:
        """Load the records that `messages` name, besides their wallets, which are locked."""
        named = _Named(messages)
        with connection.pipeline():
            workflows = find(connection, Workflow, _WORKFLOWS, named.workflows)
            posted = find(connection, PostedMessage, _POSTED, named.posted)
            subscriptions = find(
                connection, Subscription, _SUBSCRIPTIONS, self._with_the_wallets_own(named.subscriptions)
            )
        self._keep_loaded(workflows(), posted(), subscriptions())

    def _with_the_wallets_own(self, named: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """The subscriptions that are `named`, and those that their wallets have now or have scheduled."""
        org_ids = {org_id for org_id, _ in named}
        return named | _own_subscriptions(self.wallets[org_id] for org_id in org_ids & self.wallets.keys())

    def _keep_loaded(
        self,
        workflows: Iterable[Workflow] = (),
        posted: Iterable[PostedMessage] = (),
        subscriptions: Iterable[Subscription] = (),
    ) -> None:
        _add(workflows, _WORKFLOW_KEY, self._loaded_workflows, self.workflows)
        _add(posted, _POSTED_KEY, self._loaded_posted, self.posted)
        _add(subscriptions, _SUBSCRIPTION_KEY, self._loaded_subscriptions, self.subscriptions)

    def _post_due(self, connection: Connection, named_subscriptions: set[tuple[str, str]]) -> None:
        """Post what is due, before any message. Load the subscriptions that this or a message needs."""
        due = [wallet.org_id for wallet in self.wallets.values() if wallet.is_due(self.now[wallet.org_id])]
        with_ending = [wallet.org_id for wallet in self.wallets.values() if wallet.has_ending]
        if not due and not named_subscriptions and not with_ending:
            return
        current = _own_subscriptions(self.wallets[org_id] for org_id in due)
        holding = [org_id for org_id in due if self.wallets[org_id].next_hold_expiry is not None]
        holding_at = [arrays.text(holding), arrays.timestamptz([self.now[org_id] for org_id in holding])]
        with connection.pipeline():
            named = self._with_the_wallets_own(named_subscriptions)
            subscriptions = find(connection, Subscription, _SUBSCRIPTIONS, current | named)
            ending = found = next_expiry = None
            if with_ending:
                ending = select(connection, EndingCredits, _ENDING, [arrays.text(with_ending)])
            if holding:
                found = select(connection, Workflow, _EXPIRED_HOLDS, holding_at)
                next_expiry = execute(connection, _NEXT_HOLD_EXPIRY, holding_at)
        expired = [] if found is None else found.fetchall()
        expired.sort(key=lambda workflow: (workflow.expires_at, workflow.workflow_id))
        self._keep_loaded(expired, subscriptions=subscriptions())
        self._keep_ending([] if ending is None else ending.fetchall())
        for org_id in due:
            self._begin_due(org_id)
        # Periods first: while more of them are due, a wallet's reservations are released in a later transaction.
        overdue = {org_id for org_id, wallet in self.wallets.items() if self._more_is_due(wallet)}
        for workflow in expired:
            if len(self.events) >= MOST_DUE:
                overdue.add(workflow.org_id)
            elif workflow.org_id not in overdue:
                self._release_expired(workflow)
        if next_expiry is not None and len(expired) < MOST_DUE:  # otherwise, there may be more of them
            for org_id, expires_at in next_expiry.fetchall():
                if org_id not in overdue:
                    self._keep(self.wallets[org_id]._replace(next_hold_expiry=expires_at), ())
        for org_id, wallet in self.wallets.items():
            if wallet.is_due(self.now[org_id]):
                self.reasons_to_wait[org_id] = MUCH_DUE

    def _keep_ending(self, loaded: Sequence[EndingCredits]) -> None:
        rows: dict[str, list[EndingCredits]] = {}
        for row in loaded:  # in the order of use
            rows.setdefault(row.org_id, []).append(row)
        for org_id, known in rows.items():
            covers: Any = self.wallets[org_id].covers  # JSON
            self._loaded_wallets[org_id] = self.wallets[org_id] = self.wallets[org_id]._replace(
                covers=covers and tuple(Cover(datetime.fromisoformat(until), *rest) for until, *rest in covers),
                ending=tuple(row for row in known if not row.is_from_subscription),
                set_aside=tuple(row for row in known if row.is_from_subscription),
            )

    def _more_is_due(self, wallet: Wallet) -> bool:
        return wallet._replace(next_hold_expiry=None).is_due(self.now[wallet.org_id])

    def _begin_due(self, org_id: str) -> None:
        wallet, subscriptions, events = rules.begin_due(
            self.wallets[org_id],
            self._subscriptions_of(self.wallets[org_id]),
            self.now[org_id],
            most_events=max(0, MOST_DUE - len(self.events)),
        )
        self._keep(wallet, events, subscriptions=subscriptions)

    def _subscriptions_of(self, wallet: Wallet, named: str | None = None) -> dict[str, Subscription]:
        """The subscription that is `named`, and those that the wallet has now or has scheduled, by id."""
        ids = (wallet.subscription_id, wallet.scheduled_id, named)
        keys = [(wallet.org_id, subscription_id) for subscription_id in ids if subscription_id is not None]
        return {key[1]: self.subscriptions[key] for key in keys if key in self.subscriptions}

    def _release_expired(self, workflow: Workflow) -> None:
        org_id = workflow.org_id
        wallet, workflow, events = rules.release_expired(
            self.wallets[org_id], workflow, self.now[org_id], most_events=max(0, MOST_DUE - len(self.events))
        )
        self._keep(wallet, events, workflow=workflow)

    def wait_until(self, at: datetime, org_id: str) -> datetime | None:
        """Let time pass for `org_id`, at most until now. If something is due by then, return when, and do nothing."""
        now, wallet = max(min(at, self._latest), self.now[org_id]), self.wallets[org_id]
        if wallet.is_due(now):
            due = (wallet.next_period_at, wallet.next_hold_expiry, wallet.next_ending_at, wallet.scheduled_at)
            return min(moment for moment in due if moment is not None)
        self.now[org_id] = now
        return None

    def decide(self, messages: Sequence[AnyMessage | InvalidMessage]) -> list[Decided]:
        """Decide `messages` in order. Those that have to wait change nothing."""
        if not self.reasons_to_wait:  # as nearly always
            return [message if isinstance(message, InvalidMessage) else self.apply(message) for message in messages]
        return [self._decide(message) for message in messages]

    def _decide(self, message: AnyMessage | InvalidMessage) -> Decided:
        org_id = message.org_id or waiting.NOBODY
        if org_id in self.reasons_to_wait:
            return Waits(org_id, self.reasons_to_wait[org_id])
        return message if isinstance(message, InvalidMessage) else self.apply(message)

    def apply(self, message: AnyMessage) -> Result | Refusal:
        """Decide `message` on the state after the messages before it."""
        org_id, key = message.org_id, message.workflow_key
        wallet, subscription_key = self.wallets[org_id], message.subscription_key
        named: dict[str, Any] = {}
        if isinstance(message, WalletMessage):
            named["posted"] = self.posted.get(message.posted_key)
            if subscription_key is not None:
                named["subscriptions"] = self._subscriptions_of(wallet, subscription_key[1])
            if isinstance(message, Reverse):
                named["purchase"] = self.posted.get(message.purchase_key)
        workflow = None if key is None else self.workflows.get(key)
        decision = rules.decide(wallet, message, self.now[org_id], workflow=workflow, **named)
        if decision.refusal is not None:
            return decision.refusal
        if not decision.duplicate:
            self._keep(decision.wallet, decision.events, decision.workflow, decision.subscriptions, decision.posted)
        workflow = None if key is None else self.workflows[key]
        return Result(
            decision.outcome,
            decision.reason,
            decision.duplicate,
            org_id,
            None if key is None else key[1],
            None if workflow is None else workflow.state,
            tuple([event.seq for event in decision.events]),
            decision.wallet.available,
            decision.limit,
            decision.shortfall,
        )

    def _keep(
        self,
        wallet: Wallet,
        events: Sequence[Event],
        workflow: Workflow | None = None,
        subscriptions: Sequence[Subscription] = (),
        posted: Sequence[PostedMessage] = (),
    ) -> None:
        self.wallets[wallet.org_id] = wallet
        self.events += events
        if workflow is not None:
            self.workflows[workflow.org_id, workflow.workflow_id] = workflow
        for subscription in subscriptions:
            self.subscriptions[subscription.org_id, subscription.subscription_id] = subscription
        for message in posted:
            self.posted[message.org_id, message.kind, message.message_id] = message

    def write_and_commit(self, connection: Connection) -> None:
        """Write everything that changed, set by set, and commit."""
        # Not psycopg's own `commit()`: it waits for the answers before it has sent everything, so once the sockets'
        # buffers are full it waits forever.
        ended, ending = _changes_of_ending(self.wallets, self._loaded_wallets)
        balances, wallets = _changes_of_wallets(self.wallets, self._loaded_wallets)
        # As nearly always, nothing is written that is not new: each column costs.
        new, changed = _new(self.workflows, self._loaded_workflows), _changed(self.workflows, self._loaded_workflows)
        insert_workflows, update_workflows = _INSERT_WORKFLOWS, _UPDATE_WORKFLOWS
        if any(workflow.paid_by_ending is not None or workflow.rejected_at is not None for workflow in new):
            insert_workflows = _INSERT_WHOLE_WORKFLOWS
        if any(workflow.paid_by_ending is not None for workflow in changed):
            update_workflows = _UPDATE_WHOLE_WORKFLOWS
        with connection.pipeline():
            # PostgreSQL begins while the rest is being encoded, so the largest set comes last.
            for write, rows in (
                (insert_workflows, new),
                (update_workflows, changed),
                (_INSERT_SUBSCRIPTIONS, _new(self.subscriptions, self._loaded_subscriptions)),
                (_UPDATE_SUBSCRIPTIONS, _changed(self.subscriptions, self._loaded_subscriptions)),
                (_DELETE_ENDING, ended),
                (_WRITE_ENDING, ending),
                (_UPDATE_WALLETS, wallets),
                (_UPDATE_BALANCES, balances),
                (_INSERT_POSTED, _new(self.posted, self._loaded_posted)),
                (_UPDATE_POSTED, _changed(self.posted, self._loaded_posted)),
                (_INSERT_EVENTS, self.events),
            ):
                if rows:
                    execute(connection, *write.of(rows))
            committed = connection.execute("COMMIT")
        assert committed.statusmessage == "COMMIT"


def _begin(connection: Connection) -> None:
    connection.execute(BEGIN)
    if connection.is_distributed:
        for setting in (*_SETTINGS_OF_NODES, f"synchronous_commit = {connection.synchronous_commit}"):
            connection.execute(f"SET LOCAL {setting}")


def _lock(connection: Connection, lock: str, org_ids: Sequence[str]) -> Callable[[], Sequence[Wallet]]:
    """Lock wallets. Returns a function that returns them after the round trip."""
    return select(connection, Wallet, lock, [arrays.text(org_ids)]).fetchall if org_ids else tuple


def exists(connection: Connection, org_id: str) -> bool:
    """Whether `org_id` has a wallet, locked or not."""
    return bool(connection.execute(_THERE, [arrays.text([org_id])]).fetchall())


def _new(records: Mapping[Any, Any], loaded: Mapping[Any, Any]) -> list[Any]:
    return [record for key, record in records.items() if key not in loaded]


def _changed(records: Mapping[Any, Any], loaded: Mapping[Any, Any]) -> list[Any]:
    return [records[key] for key, as_loaded in loaded.items() if records[key] is not as_loaded]


def _own_subscriptions(wallets: Iterable[Wallet]) -> set[tuple[str, str]]:
    return {
        (wallet.org_id, subscription_id)
        for wallet in wallets
        for subscription_id in (wallet.subscription_id, wallet.scheduled_id)
        if subscription_id is not None
    }


def _ending(wallet: Wallet) -> tuple[EndingCredits, ...]:
    return (*wallet.ending, *wallet.set_aside)


def _add(found: Iterable[Any], key: Callable[[Any], Any], loaded: dict[Any, Any], current: dict[Any, Any]) -> None:
    """Keep the records that are `found`. One that was loaded before may have changed in this transaction."""
    for record in found:
        if (known_by := key(record)) not in loaded:
            loaded[known_by] = current[known_by] = record


_WORKFLOW_KEY = attrgetter("org_id", "workflow_id")
_SUBSCRIPTION_KEY = attrgetter("org_id", "subscription_id")
_POSTED_KEY = attrgetter("org_id", "kind", "message_id")
_ENDING_KEY = attrgetter("org_id", "origin", "expires_at")


def _changes_of_ending(
    wallets: Mapping[str, Wallet], loaded: Mapping[str, Wallet]
) -> tuple[list[EndingCredits], list[EndingCredits]]:
    """The rows of `ending_credits` to delete, and those to write."""
    ended: list[EndingCredits] = []
    written: list[EndingCredits] = []
    for org_id, as_loaded in loaded.items():
        wallet = wallets[org_id]
        if wallet.ending is not as_loaded.ending or wallet.set_aside is not as_loaded.set_aside:
            before = {_ENDING_KEY(row): row for row in _ending(as_loaded)}
            after = {_ENDING_KEY(row): row for row in _ending(wallet)}
            ended += [row for key, row in before.items() if key not in after]
            written += [row for key, row in after.items() if before.get(key) != row]
    return ended, written


def _changes_of_wallets(
    wallets: Mapping[str, Wallet], loaded: Mapping[str, Wallet]
) -> tuple[list[Wallet], list[Wallet]]:
    """The wallets of which only balances have changed, as nearly always, and the others."""
    balances: list[Wallet] = []
    others: list[Wallet] = []
    for org_id, as_loaded in loaded.items():
        wallet = wallets[org_id]
        if wallet is not as_loaded:
            is_same = wallet[_BALANCES:] == as_loaded[_BALANCES:]
            (balances if is_same else others).append(wallet)
    return balances, others


_BALANCES = Wallet._fields.index("next_hold_expiry") + 1
"""How many fields of a wallet ordinary messages change."""


def _clock(statement_timeout_s: float) -> str:
    # Rows are looked up by their keys. The planner overestimates the cost of that, and would rather read all of a table
    # of some hundred thousand rows.
    settings = {
        "lock_timeout": f"{min(LOCK_TIMEOUT_S, statement_timeout_s / 2)}s",
        "statement_timeout": f"{statement_timeout_s}s",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
    }
    local = [f"set_config('{name}', '{value}', true)" for name, value in settings.items()]
    return f"SELECT clock_timestamp(), EXISTS (SELECT FROM waiting_messages), {', '.join(local)}"


# Whatever the server's default: a row that is read under a lock must be current.
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
# Of what `_clock` sets and of the session's own settings, those that a node has to know. `SET LOCAL` tells it. The last
# one: rather than look up rows by their keys, a node would read its table for all rows of these organizations.
_SETTINGS_OF_NODES = (
    f"lock_timeout = '{LOCK_TIMEOUT_S * 1_000:.0f}ms'",
    "enable_hashjoin = off",
    "enable_mergejoin = off",
    "enable_material = off",
)
# Sent once the locks are held: the time, whether any message waits, and settings for the statements that follow.
_CLOCK = _clock(PATIENCE_S)
_WALLETS = f"SELECT {column_names(tables.wallets, Wallet)} FROM wallets WHERE org_id = ANY(%b::text[])"
_LOCK_WALLETS = f"{_WALLETS} ORDER BY org_id FOR UPDATE"
_LOCK_WALLETS_THAT_CAN_BE = f"{_LOCK_WALLETS} SKIP LOCKED"
_THERE = "SELECT org_id FROM wallets WHERE org_id = ANY(%b::text[])"
_WAITING = "SELECT DISTINCT org_id FROM waiting_messages WHERE org_id = ANY(%b::text[])"
_CREATE_WALLETS = insert(tables.wallets, Wallet, "ON CONFLICT DO NOTHING", have_wallets=False)
_WORKFLOWS = by_key(tables.workflows, Workflow)
_POSTED = by_key(tables.posted_messages, PostedMessage)
_SUBSCRIPTIONS = by_key(tables.subscriptions, Subscription)
# OFFSET 0 keeps this from becoming a join, which would read every organization's open reservations.
_EXPIRED_HOLDS = statement(
    f"""
    SELECT expired.* FROM unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now) CROSS JOIN LATERAL (
        SELECT {column_names(tables.workflows, Workflow)} FROM workflows
        WHERE workflows.org_id = due.org_id AND state = 'reserved' AND expires_at <= due.now
          {{in_shard}}
        ORDER BY expires_at OFFSET 0
    ) AS expired LIMIT {MOST_DUE}
    """,
    "workflows",
)
_ENDING = f"""
    SELECT {column_names(tables.ending_credits, EndingCredits)} FROM ending_credits WHERE org_id = ANY(%b::text[])
    ORDER BY expires_at, NOT starts_with(origin, 'subscription:'), seq, origin
"""
_LOCK_ENDING_THAT_CAN_BE = """
    SELECT org_id, origin, expires_at FROM ending_credits WHERE org_id = ANY(%b::text[])
    FOR NO KEY UPDATE SKIP LOCKED
"""
_LOCK_WORKFLOWS_THAT_CAN_BE = lock_that_can_be(tables.workflows)
_LOCK_SUBSCRIPTIONS_THAT_CAN_BE = lock_that_can_be(tables.subscriptions)
_NEXT_HOLD_EXPIRY = statement(
    """
    SELECT org_id, expires_at FROM unnest(%b::text[], %b::timestamptz[]) AS due (org_id, now) CROSS JOIN LATERAL (
        SELECT min(expires_at) AS expires_at FROM workflows
        WHERE workflows.org_id = due.org_id AND state = 'reserved' AND expires_at > due.now{in_shard}
    ) AS following
    """,
    "workflows",
)
_UPDATE_WALLETS = update(tables.wallets, Wallet)
_UPDATE_BALANCES = update(tables.wallets, Wallet, until="next_hold_expiry")
_INSERT_WORKFLOWS = insert(tables.workflows, Workflow, until="reserved_seq")
_UPDATE_WORKFLOWS = update(tables.workflows, Workflow, until="activity_name")
_INSERT_WHOLE_WORKFLOWS = insert(tables.workflows, Workflow)
_UPDATE_WHOLE_WORKFLOWS = update(tables.workflows, Workflow)
_INSERT_SUBSCRIPTIONS = insert(tables.subscriptions, Subscription)
_UPDATE_SUBSCRIPTIONS = update(tables.subscriptions, Subscription)
_INSERT_POSTED = insert(tables.posted_messages, PostedMessage)
_UPDATE_POSTED = change(
    tables.posted_messages,
    PostedMessage,
    "UPDATE posted_messages AS old SET reversed = new.reversed FROM {rows}"
    " WHERE old.org_id = new.org_id AND old.kind = new.kind AND old.message_id = new.message_id",
    "old",
)
_WRITE_ENDING = insert(
    tables.ending_credits,
    EndingCredits,
    "ON CONFLICT ON CONSTRAINT ending_credits_pkey DO UPDATE SET remaining = excluded.remaining, seq = excluded.seq",
)
_DELETE_ENDING = change(
    tables.ending_credits,
    EndingCredits,
    "DELETE FROM ending_credits AS old USING {rows}"
    " WHERE old.org_id = new.org_id AND old.origin = new.origin AND old.expires_at = new.expires_at",
    "old",
)
_INSERT_EVENTS = insert(tables.credit_events, Event)
