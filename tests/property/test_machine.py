"""Every kind of message in every order, with time passing, against the naive model: first the rules, then PostgreSQL.

PostgreSQL says what time it is, so in the database of this test `clock_timestamp()` is ours: a function of that name,
in a schema that is searched before `pg_catalog`. Nothing of the ledger is changed for it.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import pytest
from hypothesis import find, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, select, text

from holdfast_client import messages
from holdfast_client.messages import InvalidMessage
from holdfast_client.results import Result
from ledger import audit, clocks, quotes, receipts, scheduler, store, tables
from ledger.state import EndingCredits, Event, Refusal
from tests.memory import MemoryLedger
from tests.messages import delivery
from tests.property.model import Answer, Model, check_history
from tests.support import is_distributed, on_every_server, sql

NOW = datetime(2026, 1, 30, 9, tzinfo=UTC)

Sent = tuple[str, dict[str, Any]]
Told = tuple[Answer, int | None, bool]
"""What the sender is told: the answer, what is available (None if the message was refused), and if credits are held."""


class Driver(Protocol):
    """A ledger for one organization, whose time is what it is told."""

    def at(self, now: datetime) -> None: ...
    def send(self, messages: Sequence[Sent]) -> list[Told]: ...
    def beat(self) -> None: ...
    def wallet(self) -> dict[str, Any]: ...
    def ending(self) -> Sequence[EndingCredits]: ...
    def events(self) -> Sequence[Event]: ...
    def check(self) -> None: ...


class RulesDriver:
    """The pure rules."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger(NOW)

    def at(self, now: datetime) -> None:
        self.ledger.now = now

    def send(self, messages: Sequence[Sent]) -> list[Told]:
        told: list[Told] = []
        for task, fields in messages:
            decision = self.ledger.send(task, **fields)
            if decision.refusal is not None:
                told.append((("refused", decision.refusal.code, False), None, False))
            else:
                workflow = self.ledger.workflows.get(fields.get("workflow_id", ""))
                holds = workflow is not None and workflow.state == "reserved"
                told.append(((decision.outcome, decision.reason, decision.duplicate), decision.wallet.available, holds))
        return told

    def beat(self) -> None:
        self.ledger.catch_up()

    def wallet(self) -> dict[str, Any]:
        wallet = self.ledger.wallet
        return {name: getattr(wallet, name) for name in WALLET}

    def ending(self) -> Sequence[EndingCredits]:
        return (*self.ledger.wallet.ending, *self.ledger.wallet.set_aside)

    def events(self) -> Sequence[Event]:
        return self.ledger.events

    def check(self) -> None:
        pass


class PostgresDriver:
    """The store, on a PostgreSQL database that it empties first, so that every example can be repeated on its own."""

    org_id = "acme"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE credit_events DISABLE TRIGGER USER"))
            connection.execute(text(f"TRUNCATE {', '.join(tables.metadata.tables)}"))
            connection.execute(text("ALTER TABLE credit_events ENABLE TRIGGER USER"))

    def at(self, now: datetime) -> None:
        on_every_server(self.engine, f"UPDATE our.clock SET now = '{now.isoformat()}' RETURNING now")

    def send(self, messages: Sequence[Sent]) -> list[Told]:
        deliveries = [delivery(task, org_id=self.org_id, **fields) for task, fields in messages]
        told: list[Told] = []
        for answer in store.apply_batch(self.engine, deliveries):
            assert isinstance(answer, Result | store.DeadLettered)
            told.append(_told(answer))
        return told

    def beat(self) -> None:
        scheduler.post_due(self.engine)
        scheduler.release_expired(self.engine)

    def wallet(self) -> dict[str, Any]:
        query = select(*(tables.wallets.c[name] for name in WALLET)).where(tables.wallets.c.org_id == self.org_id)
        with self.engine.connect() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return EMPTY if row is None else dict(row)

    def ending(self) -> Sequence[EndingCredits]:
        rows = tables.ending_credits
        with self.engine.connect() as connection:
            found = connection.execute(select(rows).where(rows.c.org_id == self.org_id)).mappings()
            return [EndingCredits(**row) for row in found]

    def events(self) -> Sequence[Event]:
        events = tables.credit_events
        with self.engine.connect() as connection:
            rows = connection.execute(select(events).where(events.c.org_id == self.org_id).order_by(events.c.seq))
            return [Event(**row) for row in rows.mappings()]

    def check(self) -> None:
        verdict = audit.verify(self.engine)
        assert verdict.is_clean, [finding for finding in verdict.findings if finding.offenders]
        assert self.receipts() == sorted(self.by_run().values(), reverse=True)

    def receipts(self) -> list[tuple[int, int]]:
        """The last event and the credits of each receipt, page by page."""
        found, place = [], None
        with self.engine.connect() as connection:
            while True:
                page = receipts.page(connection, self.org_id, limit=5, place=place)
                found += [(each.last_seq, each.credits) for each in page.receipts]
                if (place := page.next) is None:
                    return found

    def by_run(self) -> dict[str, tuple[int, int]]:
        """The same, told from the events one by one."""
        runs: dict[str, tuple[int, int]] = {}
        for event in self.events():
            run = event.workflow_id or f"event {event.seq}"
            runs[run] = event.seq, runs.get(run, (0, 0))[1] + event.credits
        return runs


def _told(answer: Result | Refusal | store.DeadLettered) -> Told:
    if isinstance(answer, Result):
        return (answer.outcome, answer.reason, answer.duplicate), answer.available, answer.holds
    return ("refused", answer.code, False), None, False


class PreviewingDriver(PostgresDriver):
    """The same, message by message, each after a preview that says what comes of it."""

    def send(self, messages: Sequence[Sent]) -> list[Told]:
        told: list[Told] = []
        for sent in messages:
            foreseen = self.preview(*sent)
            told += super().send([sent])
            assert _told(foreseen.answer) == told[-1]
            assert list(foreseen.events) == self.events()[foreseen.before.last_seq :]
            assert {name: getattr(foreseen.after, name) for name in WALLET} == self.wallet()
        return told

    def preview(self, task: str, fields: dict[str, Any]) -> quotes.Preview:
        message = messages.parse(task, {"org_id": self.org_id, **fields})
        assert not isinstance(message, InvalidMessage)
        before = self.events(), self.wallet()
        with self.engine.connect() as opened:
            found = quotes.preview(
                opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True), message
            )
        assert (self.events(), self.wallet()) == before
        return found


WALLET = (
    "prepaid_balance",
    "subscription_balance",
    "reserved",
    "period_usage",
    "credit_limit",
    "period_cap",
    "subscription_id",
    "scheduled_id",
    "plan_version",
)
EMPTY = {**dict.fromkeys(WALLET, 0), "period_cap": None, "subscription_id": None, "scheduled_id": None}


OWN_REASONS = ("subscription_expired", "plan_change", "settled")
"""What only the ledger should be believed to say."""

# Few ids and few amounts: repetitions and contradictions come by themselves.


def _sent(task: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Sent]:
    metadata = st.sampled_from([{}, *({"reason": reason, "period_start": "x"} for reason in OWN_REASONS)])
    return st.tuples(st.just(task), st.fixed_dictionaries({**fields, "metadata": metadata}))


some_id = st.sampled_from(["a", "b", "c"])
version = st.integers(1, 5)
some_credits = st.sampled_from([0, 7, 40, 60])
more_credits = st.sampled_from([1, 30, 250])
signed_credits = st.sampled_from([-120, -30, -1, 1, 50])
workflow_id = st.sampled_from([f"w{number}" for number in range(1, 10)])
anchor = st.sampled_from(
    [None, None, "2026-01-31T00:00:00Z", "2025-12-31T09:00:00Z", "2025-08-29T12:00:00Z", "2026-03-31T00:00:00Z"]
)
end = st.sampled_from(
    [
        None,
        "2026-01-01T00:00:00Z",
        "2026-01-31T00:00:00Z",
        "2026-02-09T09:00:00Z",
        "2026-03-01T00:00:00Z",
        "2026-05-01T00:00:00Z",
    ]
)
SUBSCRIPTION_MESSAGES = st.one_of(
    _sent(
        "wallet.subscribe",
        subscription_id=some_id,
        version=version,
        plan=st.sampled_from(["basic", "pro"]),
        monthly_credits=st.sampled_from([0, 50, 80, 200]),
        rollover_limit=st.sampled_from([0, 20, 1_000]),
        anchor=anchor,
        first_credits=st.sampled_from([None, None, 0, 30]),
    ).filter(lambda sent: (sent[1]["first_credits"] or 0) <= sent[1]["monthly_credits"]),
    _sent("wallet.unsubscribe", subscription_id=some_id, version=version),
)
MESSAGES = st.one_of(
    _sent("workflow.start", workflow_id=workflow_id, credits=some_credits, expires_in_s=st.sampled_from([60, 86_400])),
    _sent("workflow.start", workflow_id=workflow_id, credits=some_credits, expires_in_s=st.just(2_592_000)),
    _sent("workflow.finish", workflow_id=workflow_id, credits=some_credits),
    _sent("workflow.cancel", workflow_id=workflow_id),
    _sent("workflow.fail", workflow_id=workflow_id),
    _sent("wallet.purchase", purchase_id=some_id, credits=more_credits, expires_at=end),
    _sent("wallet.grant", grant_id=some_id, credits=more_credits, expires_at=end),
    _sent("wallet.grant", grant_id=workflow_id, credits=more_credits, expires_at=end),
    _sent(
        "wallet.reverse",
        reversal_id=some_id,
        purchase_id=some_id,
        credits=st.sampled_from([None, 1, 20]),
        reason=st.just("refunded"),
    ),
    _sent(
        "wallet.adjust",
        adjustment_id=some_id,
        credits=signed_credits,
        reason=st.just("test"),
        allow_negative=st.booleans(),
    ),
    _sent("wallet.refund", refund_id=some_id, credits=more_credits, workflow_id=st.none()),
    _sent("wallet.refund", refund_id=workflow_id, credits=st.sampled_from([4, 30]), workflow_id=workflow_id),
    _sent("wallet.refund", refund_id=some_id, credits=st.sampled_from([3, 10]), workflow_id=workflow_id),
    _sent("wallet.bill", billing_id=some_id, credits=signed_credits | st.just(0)),
    SUBSCRIPTION_MESSAGES,
    _sent(
        "wallet.configure",
        version=version,
        credit_limit=st.sampled_from([0, 60]),
        period_cap=st.sampled_from([None, 0, 90, 300]),
        reason=st.sampled_from([None, None, "test"]),
    ),
)


@pytest.mark.parametrize("task", messages.MESSAGES)
def test_the_machine_sends_every_message(task: str) -> None:
    find(MESSAGES, lambda sent: sent[0] == task, settings=settings(max_examples=1_000, database=None))


class LedgerMachine(RuleBasedStateMachine):
    """Sends messages to a ledger and to the model, lets time pass, and compares."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver
        self.model = Model()
        self.now = NOW
        self.sent: list[Sent] = []
        self.is_current = True

    @initialize(prepaid=st.sampled_from([0, 40, 400]), period_cap=st.sampled_from([None, None, 90, 150]))
    def begin(self, prepaid: int, period_cap: int | None) -> None:
        """Most wallets have credits and some a cap, before anything else happens."""
        self.driver.at(self.now)
        limits = {"version": 1, "credit_limit": 0, "period_cap": period_cap, "reason": None}
        messages: list[Sent] = [("wallet.configure", limits)]
        if prepaid:
            messages.append(("wallet.purchase", {"purchase_id": "first", "credits": prepaid, "expires_at": None}))
        self.deliver(messages)

    @rule(messages=st.lists(MESSAGES, min_size=1, max_size=8))
    def deliver(self, messages: list[Sent]) -> None:
        expected: list[Told] = []
        for task, fields in messages:
            answer = self.model.receive(task, fields, self.now)
            if answer[0] == "refused":
                expected.append((answer, None, False))
            else:
                expected.append((answer, self.model.available, self.model.holds(fields.get("workflow_id"))))
        assert self.driver.send(messages) == expected
        self.sent += messages
        self.is_current = True

    @rule(message=SUBSCRIPTION_MESSAGES)
    def change_subscription(self, message: Sent) -> None:
        """With the next version, as billing would: this one has an effect."""
        task, fields = message
        highest = max((fields["version"] for task, fields in self.sent if "subscription_id" in fields), default=0)
        self.deliver([(task, {**fields, "version": highest + 1})])

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.lists(st.sampled_from(self.sent), min_size=1, max_size=5)))

    @rule(
        duration=st.sampled_from(
            [{"seconds": 59}, {"minutes": 1}, {"hours": 20}, {"days": 9}, {"days": 33}, {"days": 95}]
        )
    )
    def wait(self, duration: dict[str, float]) -> None:
        self._wait_until(self.now + timedelta(**duration))

    @precondition(lambda self: (self.model.next_due() or NOW) > self.now)
    @rule(early=st.sampled_from([timedelta(0), timedelta(microseconds=1)]))
    def wait_until_something_is_due(self, early: timedelta) -> None:
        due = self.model.next_due()
        assert due is not None
        self._wait_until(max(self.now, due - early))

    def _wait_until(self, now: datetime) -> None:
        self.now = now
        self.driver.at(now)
        self.is_current = False

    @rule()
    def beat(self) -> None:
        self.driver.beat()
        self.model.catch_up(self.now)
        self.is_current = True

    @precondition(lambda self: self.is_current)
    @invariant()
    def the_wallet_is_the_models(self) -> None:
        balances = self.model.balances
        assert self.driver.wallet() == {
            "prepaid_balance": balances["prepaid"],
            "subscription_balance": balances["subscription"],
            "reserved": balances["reserved"],
            "period_usage": balances["usage"],
            "credit_limit": self.model.limits["credit_limit"],
            "period_cap": self.model.limits["period_cap"],
            "subscription_id": self.model.current,
            "scheduled_id": self.model.scheduled,
            "plan_version": self.model.plan_version,
        }
        ending: dict[tuple[datetime, bool], int] = {}
        for row in self.driver.ending():
            key = row.expires_at, row.is_from_subscription
            ending[key] = ending.get(key, 0) + row.remaining
        assert ending == self.model.ending

    def teardown(self) -> None:
        check_history(self.driver.events())
        self.driver.check()


@pytest.fixture
def clocked_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The test's own database, in which it is whatever time `our.clock` says, and nobody doubts it."""
    monkeypatch.setattr(clocks, "MOST_APART_S", float("inf"))
    with engine.begin() as connection:
        for statement in (
            "CREATE SCHEMA our",
            "CREATE TABLE our.clock AS SELECT pg_catalog.clock_timestamp() AS now",
            "CREATE FUNCTION our.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT now FROM our.clock'",
            f"ALTER DATABASE {engine.url.database} SET search_path = our, pg_catalog, public",
        ):
            connection.execute(text(statement))
    if is_distributed(engine):  # the nodes have the schema and the function already
        made = "SELECT bool_and(success) FROM run_command_on_workers('CREATE TABLE our.clock AS SELECT now()')"
        assert sql(engine, made) == [(True,)]
    engine.dispose()
    return engine


def test_the_database_tells_the_time_that_it_is_told(clocked_engine: Engine) -> None:
    PostgresDriver(clocked_engine).at(NOW)
    store.apply_batch(clocked_engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5)])
    with clocked_engine.connect() as connection:
        assert connection.scalar(select(tables.credit_events.c.created_at)) == NOW


@pytest.mark.timeout(1_800)
def test_the_rules_do_what_the_model_does() -> None:
    _run(RulesDriver, share=3.0)


@pytest.mark.timeout(1_800)
def test_the_ledger_in_postgresql_does_what_the_model_does(clocked_engine: Engine) -> None:
    _run(lambda: PostgresDriver(clocked_engine), share=1.0)


@pytest.mark.timeout(1_800)
def test_a_preview_says_what_then_happens_and_changes_nothing(clocked_engine: Engine) -> None:
    _run(lambda: PreviewingDriver(clocked_engine), share=0.2)


def _run(driver: Callable[[], Driver], *, share: float) -> None:
    """Run the machine on new drivers, for this share of the usual number of examples."""
    run_state_machine_as_test(
        lambda: LedgerMachine(driver()),  # type: ignore[arg-type]  # it takes more than the class that it asks for
        settings=settings(max_examples=int(settings().max_examples * share)),
    )
