"""A workflow's life: what each message does in each state, and what its events say."""

from datetime import UTC, datetime
from typing import Any

import pytest

from holdfast_client.messages import Cancel, Message, WalletMessage, WorkflowMessage
from holdfast_client.results import Limit
from ledger import rules
from ledger.state import Event, Quote, Refusal, Wallet, Workflow
from tests.memory import MemoryLedger, Row, row, rows

NOW = datetime(2026, 1, 31, 9, tzinfo=UTC)
MAX = 9_007_199_254_740_991
AMOUNT = 1_000_000_000_000
"""The most credits that one message moves."""


def ledger_with(prepaid: int = 100, **limits: Any) -> MemoryLedger:
    """A ledger with that many prepaid credits; the purchase is event 1."""
    ledger = MemoryLedger(NOW)
    if limits:
        ledger.send("wallet.configure", version=1, **limits)
    if prepaid:
        ledger.send("wallet.purchase", purchase_id="p1", credits=prepaid)
    return ledger


# The table. A wallet of 100 credits; the workflow starts with 40 (or asks for 400, which is rejected) and uses 30.

Step = tuple[str, dict[str, Any]]
STEPS: dict[str, Step] = {
    "start 40": ("workflow.start", {"credits": 40}),
    "start 400": ("workflow.start", {"credits": 400}),
    "finish 30": ("workflow.finish", {"credits": 30}),
    "finish 31": ("workflow.finish", {"credits": 31}),
    "cancel": ("workflow.cancel", {}),
    "fail": ("workflow.fail", {}),
}
HISTORIES: dict[str, list[str]] = {
    "none": [],
    "reserved": ["start 40"],
    "rejected": ["start 400"],
    "cancelled": ["start 40", "cancel"],
    "cancelled, never started": ["cancel"],
    "cancelled, started later": ["cancel", "start 40"],
    "failed": ["start 40", "fail"],
    "failed, never started": ["fail"],
    "failed, started later": ["fail", "start 40"],
    "expired": ["start 40", "expiry"],
    "settled": ["start 40", "finish 30"],
    "settled, never started": ["finish 30"],
    "settled, started later": ["finish 30", "start 40"],
    "settled, was rejected": ["start 400", "finish 30"],
    "settled, was cancelled": ["start 40", "cancel", "finish 30"],
    "settled, cancelled first": ["cancel", "finish 30"],
    "settled, was failed": ["start 40", "fail", "finish 30"],
    "settled, was expired": ["start 40", "expiry", "finish 30"],
}
# What an answer says: outcome, reason, duplicate.
RESERVED = ("reserved", None, False)
RESERVED_AGAIN = ("reserved", None, True)
REJECTED = ("rejected", "insufficient_credits", False)
REJECTED_AGAIN = ("rejected", "insufficient_credits", True)
SETTLED = ("settled", None, False)
SETTLED_AGAIN = ("settled", None, True)
RELEASED = ("released", None, False)
RELEASED_AGAIN = ("released", None, True)
NOT_STARTED = ("ignored", "not_started", False)
NOT_STARTED_AGAIN = ("ignored", "not_started", True)
ENDED = ("ignored", "already_ended", False)
ENDED_AGAIN = ("ignored", "already_ended", True)
CONFLICT = ("conflict",)

RESERVATION: Row = ("reservation", -40, 100, 0, 40, 0)
RELEASE: Row = ("reservation_released", 40, 100, 0, 0, 0)
USAGE: Row = ("usage", -30, 70, 0, 0, 30)
USAGE_31: Row = ("usage", -31, 69, 0, 0, 31)

# state, message, answer, events, state afterwards
CELLS: list[tuple[str, str, tuple[Any, ...], list[Row], str]] = [
    ("none", "start 40", RESERVED, [RESERVATION], "reserved"),
    ("none", "start 400", REJECTED, [], "rejected"),
    ("none", "finish 30", SETTLED, [USAGE], "settled"),
    ("none", "cancel", NOT_STARTED, [], "cancelled"),
    ("none", "fail", NOT_STARTED, [], "failed"),
    ("reserved", "start 40", RESERVED_AGAIN, [], "reserved"),
    ("reserved", "start 400", CONFLICT, [], "reserved"),
    ("reserved", "finish 30", SETTLED, [RELEASE, USAGE], "settled"),
    ("reserved", "finish 31", SETTLED, [RELEASE, USAGE_31], "settled"),
    ("reserved", "cancel", RELEASED, [RELEASE], "cancelled"),
    ("reserved", "fail", RELEASED, [RELEASE], "failed"),
    ("rejected", "start 400", REJECTED_AGAIN, [], "rejected"),
    ("rejected", "start 40", CONFLICT, [], "rejected"),
    ("rejected", "finish 30", SETTLED, [USAGE], "settled"),
    ("rejected", "cancel", ENDED, [], "rejected"),
    ("rejected", "fail", ENDED, [], "rejected"),
    ("cancelled", "start 40", RESERVED_AGAIN, [], "cancelled"),
    ("cancelled", "start 400", CONFLICT, [], "cancelled"),
    ("cancelled", "finish 30", SETTLED, [USAGE], "settled"),
    ("cancelled", "cancel", RELEASED_AGAIN, [], "cancelled"),
    ("cancelled", "fail", ENDED, [], "cancelled"),
    ("cancelled, never started", "start 40", ENDED, [], "cancelled"),
    ("cancelled, never started", "start 400", ENDED, [], "cancelled"),
    ("cancelled, never started", "finish 30", SETTLED, [USAGE], "settled"),
    ("cancelled, never started", "cancel", NOT_STARTED_AGAIN, [], "cancelled"),
    ("cancelled, never started", "fail", ENDED, [], "cancelled"),
    ("cancelled, started later", "start 40", ENDED_AGAIN, [], "cancelled"),
    ("cancelled, started later", "start 400", CONFLICT, [], "cancelled"),
    ("cancelled, started later", "finish 30", SETTLED, [USAGE], "settled"),
    ("cancelled, started later", "cancel", NOT_STARTED_AGAIN, [], "cancelled"),
    ("cancelled, started later", "fail", ENDED, [], "cancelled"),
    ("failed", "start 40", RESERVED_AGAIN, [], "failed"),
    ("failed", "start 400", CONFLICT, [], "failed"),
    ("failed", "finish 30", SETTLED, [USAGE], "settled"),
    ("failed", "cancel", ENDED, [], "failed"),
    ("failed", "fail", RELEASED_AGAIN, [], "failed"),
    ("failed, never started", "start 40", ENDED, [], "failed"),
    ("failed, never started", "start 400", ENDED, [], "failed"),
    ("failed, never started", "finish 30", SETTLED, [USAGE], "settled"),
    ("failed, never started", "cancel", ENDED, [], "failed"),
    ("failed, never started", "fail", NOT_STARTED_AGAIN, [], "failed"),
    ("failed, started later", "start 40", ENDED_AGAIN, [], "failed"),
    ("failed, started later", "start 400", CONFLICT, [], "failed"),
    ("failed, started later", "finish 30", SETTLED, [USAGE], "settled"),
    ("failed, started later", "cancel", ENDED, [], "failed"),
    ("failed, started later", "fail", NOT_STARTED_AGAIN, [], "failed"),
    ("expired", "start 40", RESERVED_AGAIN, [], "expired"),
    ("expired", "start 400", CONFLICT, [], "expired"),
    ("expired", "finish 30", SETTLED, [USAGE], "settled"),
    ("expired", "cancel", ENDED, [], "expired"),
    ("expired", "fail", ENDED, [], "expired"),
    ("settled", "start 40", RESERVED_AGAIN, [], "settled"),
    ("settled", "start 400", CONFLICT, [], "settled"),
    ("settled", "finish 30", SETTLED_AGAIN, [], "settled"),
    ("settled", "finish 31", CONFLICT, [], "settled"),
    ("settled", "cancel", ENDED, [], "settled"),
    ("settled", "fail", ENDED, [], "settled"),
    ("settled, never started", "start 40", ENDED, [], "settled"),
    ("settled, never started", "start 400", ENDED, [], "settled"),
    ("settled, never started", "finish 30", SETTLED_AGAIN, [], "settled"),
    ("settled, never started", "finish 31", CONFLICT, [], "settled"),
    ("settled, never started", "cancel", ENDED, [], "settled"),
    ("settled, never started", "fail", ENDED, [], "settled"),
    ("settled, started later", "start 40", ENDED_AGAIN, [], "settled"),
    ("settled, started later", "start 400", CONFLICT, [], "settled"),
    ("settled, was rejected", "start 400", REJECTED_AGAIN, [], "settled"),
    ("settled, was rejected", "start 40", CONFLICT, [], "settled"),
    ("settled, was rejected", "finish 30", SETTLED_AGAIN, [], "settled"),
    ("settled, was rejected", "finish 31", CONFLICT, [], "settled"),
    ("settled, was rejected", "cancel", ENDED, [], "settled"),
    ("settled, was rejected", "fail", ENDED, [], "settled"),
    ("settled, was cancelled", "start 40", RESERVED_AGAIN, [], "settled"),
    ("settled, was cancelled", "finish 30", SETTLED_AGAIN, [], "settled"),
    ("settled, was cancelled", "finish 31", CONFLICT, [], "settled"),
    ("settled, was cancelled", "cancel", RELEASED_AGAIN, [], "settled"),
    ("settled, was cancelled", "fail", ENDED, [], "settled"),
    ("settled, cancelled first", "start 40", ENDED, [], "settled"),
    ("settled, cancelled first", "cancel", NOT_STARTED_AGAIN, [], "settled"),
    ("settled, was failed", "start 40", RESERVED_AGAIN, [], "settled"),
    ("settled, was failed", "fail", RELEASED_AGAIN, [], "settled"),
    ("settled, was failed", "cancel", ENDED, [], "settled"),
    ("settled, was expired", "start 40", RESERVED_AGAIN, [], "settled"),
    ("settled, was expired", "finish 30", SETTLED_AGAIN, [], "settled"),
    ("settled, was expired", "finish 31", CONFLICT, [], "settled"),
]


def in_state(history: str) -> MemoryLedger:
    ledger = ledger_with(100)
    for step in HISTORIES[history]:
        if step == "expiry":
            ledger.wait(days=1)
        else:
            task, fields = STEPS[step]
            ledger.send(task, workflow_id="w1", **fields)
    return ledger


@pytest.mark.parametrize(("history", "step", "answer", "events", "state"), CELLS)
def test_a_message_does_to_a_workflow_what_the_table_says(
    history: str, step: str, answer: tuple[Any, ...], events: list[Row], state: str
) -> None:
    ledger = in_state(history)
    task, fields = STEPS[step]
    decision = ledger.send(task, workflow_id="w1", **fields)
    if answer == CONFLICT:
        assert decision.refusal is not None
        assert decision.refusal.code == "conflict"
    else:
        assert decision.refusal is None
        assert (decision.outcome, decision.reason, decision.duplicate) == answer
    assert rows(decision) == events
    assert ledger.workflows["w1"].state == state


@pytest.mark.parametrize(("history", "step", "answer", "events", "state"), CELLS)
def test_a_message_of_the_table_repeated_has_the_first_outcome(
    history: str, step: str, answer: tuple[Any, ...], events: list[Row], state: str
) -> None:
    ledger = in_state(history)
    task, fields = STEPS[step]
    first = ledger.send(task, workflow_id="w1", **fields)
    balances = ledger.wallet
    again = ledger.send(task, workflow_id="w1", **fields)
    assert (again.outcome, again.reason, again.refusal) == (first.outcome, first.reason, first.refusal)
    assert again.duplicate == (first.refusal is None)
    assert ledger.wallet == balances


@pytest.mark.parametrize("history", [history for history in HISTORIES if history != "reserved"])
def test_a_workflow_that_holds_nothing_does_not_expire(history: str) -> None:
    assert in_state(history).wait(days=31) == []


def test_a_reservation_expires_at_its_instant_and_not_before() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=40, expires_in_s=60)
    assert ledger.wait(seconds=59.999999) == []
    [event] = ledger.wait(seconds=0.000001)
    assert row(event) == ("reservation_released", 40, 100, 0, 0, 0)
    assert (event.source, event.metadata) == ("scheduler", {"reason": "expired"})
    assert ledger.workflows["w1"].state == "expired"
    assert ledger.wallet.next_hold_expiry is None


def test_a_hold_that_has_expired_stops_counting_before_any_sweep() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=100, expires_in_s=60)
    ledger.now = datetime(2026, 1, 31, 9, 1, tzinfo=UTC)
    decision = ledger.send("workflow.start", workflow_id="w2", credits=100)
    assert (decision.outcome, rows(decision)) == ("reserved", [("reservation", -100, 100, 0, 100, 0)])


def test_the_wallet_remembers_its_earliest_expiry() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=10, expires_in_s=600)
    assert ledger.wallet.next_hold_expiry == datetime(2026, 1, 31, 9, 10, tzinfo=UTC)
    ledger.send("workflow.start", workflow_id="w2", credits=10, expires_in_s=60)
    assert ledger.wallet.next_hold_expiry == datetime(2026, 1, 31, 9, 1, tzinfo=UTC)
    ledger.send("workflow.start", workflow_id="w3", credits=10)
    assert ledger.wallet.next_hold_expiry == datetime(2026, 1, 31, 9, 1, tzinfo=UTC)


def test_a_reservation_of_nothing_is_a_reservation() -> None:
    ledger = ledger_with(0)
    assert rows(ledger.send("workflow.start", workflow_id="w1", credits=0)) == [("reservation", 0, 0, 0, 0, 0)]
    assert rows(ledger.send("workflow.finish", workflow_id="w1", credits=0)) == [
        ("reservation_released", 0, 0, 0, 0, 0),
        ("usage", 0, 0, 0, 0, 0),
    ]


# What the events say


def test_a_reservation_says_everything_about_itself() -> None:
    ledger = ledger_with(100)
    decision = ledger.send(
        "workflow.start",
        workflow_id="w1",
        credits=40,
        project_id="proj",
        activity_name="Résumé",
        expires_in_s=60,
        source="engine-7",
        occurred_at="2026-01-31T09:00:00+02:00",
        metadata={"run": 7, "expires_at": "never", "occurred_at": "long ago"},
    )
    assert decision.events == (
        Event(
            org_id="acme",
            seq=2,
            created_at=NOW,
            event_type="reservation",
            source="engine-7",
            workflow_id="w1",
            project_id="proj",
            activity_name="Résumé",
            credits=-40,
            prepaid_balance_after=100,
            subscription_balance_after=0,
            reserved_after=40,
            period_usage_after=0,
            idempotency_key="start:w1",
            metadata={
                "run": 7,
                "expires_at": "2026-01-31T09:01:00+00:00",
                "occurred_at": "2026-01-31T07:00:00+00:00",
            },
        ),
    )


def test_a_finish_releases_and_then_charges_in_one_go() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=40, project_id="proj", activity_name="Résumé")
    decision = ledger.send("workflow.finish", workflow_id="w1", credits=30, metadata={"reason": "mine", "run": 7})
    common: dict[str, Any] = {
        "org_id": "acme",
        "created_at": NOW,
        "source": "workflow-engine",
        "workflow_id": "w1",
        "prepaid_balance_after": 100,
        "subscription_balance_after": 0,
        "reserved_after": 0,
        "period_usage_after": 0,
        "project_id": "proj",
        "activity_name": "Résumé",
    }
    released = Event(
        **common,
        seq=3,
        event_type="reservation_released",
        credits=40,
        idempotency_key="release:w1",
        metadata={"run": 7, "reason": "settled"},
    )
    used = Event(
        **{**common, "prepaid_balance_after": 70, "period_usage_after": 30},
        seq=4,
        event_type="usage",
        credits=-30,
        idempotency_key="finish:w1",
        metadata={"run": 7, "reason": "mine", "paid_by": {"prepaid": 30}},
    )
    assert decision.events == (released, used)
    assert decision.wallet == ledger.wallet
    assert (ledger.wallet.last_seq, ledger.wallet.last_event_at) == (4, NOW)
    assert (ledger.wallet.balance, ledger.wallet.available, ledger.wallet.reserved) == (70, 70, 0)


@pytest.mark.parametrize(("task", "reason"), [("workflow.cancel", "cancelled"), ("workflow.fail", "failed")])
def test_a_release_says_why_and_keeps_the_reason_that_was_given(task: str, reason: str) -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=40)
    given = {"reason": "out of memory", "source": "ops", "metadata": {"reason": "mine", "given_reason": "no", "n": 1}}
    [event] = ledger.send(task, workflow_id="w1", **given).events
    assert event.metadata == {"n": 1, "given_reason": "out of memory", "reason": reason}
    assert (event.source, event.idempotency_key) == ("ops", "release:w1")


def test_a_finish_may_name_another_project_than_the_start() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=40, project_id="old", activity_name="Old")
    released, used = ledger.send("workflow.finish", workflow_id="w1", credits=30, project_id="new").events
    assert (released.project_id, released.activity_name) == ("old", "Old")
    assert (used.project_id, used.activity_name) == ("new", "Old")
    [used] = ledger.send("workflow.finish", workflow_id="w2", credits=1, activity_name="Only").events
    assert (used.project_id, used.activity_name) == (None, "Only")


@pytest.mark.parametrize(
    ("history", "unreserved"),
    [
        ("none", True),
        ("rejected", True),
        ("reserved", None),
        ("cancelled", None),
        ("failed", None),
        ("expired", None),
    ],
)
def test_usage_that_nobody_reserved_says_so(history: str, unreserved: bool | None) -> None:
    decision = in_state(history).send("workflow.finish", workflow_id="w1", credits=30, metadata={"n": 1})
    expected = {"n": 1, "paid_by": {"prepaid": 30}, **({} if unreserved is None else {"unreserved": True})}
    assert decision.events[-1].metadata == expected


@pytest.mark.parametrize(
    ("used", "usage", "own"),
    [
        (0, ("usage", 0, 50, 30, 0, 0), {}),
        (20, ("usage", -20, 50, 10, 0, 20), {"paid_by": {"subscription": 20}}),
        (30, ("usage", -30, 50, 0, 0, 30), {"paid_by": {"subscription": 30}}),
        (31, ("usage", -31, 49, 0, 0, 31), {"paid_by": {"subscription": 30, "prepaid": 1}}),
        (80, ("usage", -80, 0, 0, 0, 80), {"paid_by": {"subscription": 30, "prepaid": 50}}),
        (81, ("usage", -81, -1, 0, 0, 81), {"paid_by": {"subscription": 30, "prepaid": 51}, "overrun": 1}),
        (200, ("usage", -200, -120, 0, 0, 200), {"paid_by": {"subscription": 30, "prepaid": 170}, "overrun": 120}),
    ],
)
def test_usage_draws_the_subscription_first_and_is_charged_in_full(used: int, usage: Row, own: dict[str, Any]) -> None:
    ledger = ledger_with(50)
    ledger.send("wallet.subscribe", subscription_id="s1", version=1, plan="pro", monthly_credits=30)
    ledger.send("workflow.start", workflow_id="w1", credits=10)
    released, event = ledger.send("workflow.finish", workflow_id="w1", credits=used).events
    assert row(released) == ("reservation_released", 10, 50, 30, 0, 0)
    assert row(event) == usage
    assert event.metadata == own


def test_an_overrun_counts_what_this_usage_took_too_much() -> None:
    ledger = ledger_with(10)
    ledger.send("workflow.finish", workflow_id="w1", credits=25)
    [event] = ledger.send("workflow.finish", workflow_id="w2", credits=7, metadata={"overrun": 1}).events
    assert row(event) == ("usage", -7, -22, 0, 0, 32)
    assert event.metadata == {"unreserved": True, "overrun": 7, "paid_by": {"prepaid": 7}}


def test_an_overrun_does_not_touch_what_others_have_reserved() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=60)
    ledger.send("workflow.start", workflow_id="w2", credits=40)
    assert rows(ledger.send("workflow.finish", workflow_id="w2", credits=90)) == [
        ("reservation_released", 40, 100, 0, 60, 0),
        ("usage", -90, 10, 0, 60, 90),
    ]
    assert ledger.wallet.available == -50
    assert ledger.send("workflow.start", workflow_id="w3", credits=0).reason == "insufficient_credits"
    assert ledger.send("workflow.start", workflow_id="w1", credits=60).outcome == "reserved"


# Limits of a start


@pytest.mark.parametrize(
    ("credits", "limits", "answer"),
    [
        (100, {}, ("reserved", None)),
        (101, {}, ("rejected", "insufficient_credits")),
        (150, {"credit_limit": 50}, ("reserved", None)),
        (151, {"credit_limit": 50}, ("rejected", "insufficient_credits")),
        (60, {"period_cap": 60}, ("reserved", None)),
        (61, {"period_cap": 60}, ("rejected", "period_cap")),
        (0, {"period_cap": 0}, ("reserved", None)),
        (1, {"period_cap": 0}, ("rejected", "period_cap")),
        (101, {"period_cap": 60}, ("rejected", "insufficient_credits")),
        (120, {"period_cap": 60, "credit_limit": 50}, ("rejected", "period_cap")),
    ],
)
def test_a_start_needs_credits_and_room_under_the_cap(
    credits: int, limits: dict[str, int], answer: tuple[str, str | None]
) -> None:
    decision = ledger_with(100, **limits).send("workflow.start", workflow_id="w1", credits=credits)
    assert (decision.outcome, decision.reason) == answer
    assert len(decision.events) == (1 if answer[0] == "reserved" else 0)


def test_the_cap_counts_what_was_used_and_what_is_reserved() -> None:
    ledger = ledger_with(100, period_cap=60)
    ledger.send("workflow.finish", workflow_id="w1", credits=20)
    ledger.send("workflow.start", workflow_id="w2", credits=25)
    assert ledger.send("workflow.start", workflow_id="w3", credits=16).reason == "period_cap"
    assert ledger.send("workflow.start", workflow_id="w4", credits=15).outcome == "reserved"
    ledger.send("workflow.cancel", workflow_id="w2")
    assert ledger.send("workflow.start", workflow_id="w5", credits=25).outcome == "reserved"
    assert ledger.send("workflow.start", workflow_id="w3", credits=16).reason == "period_cap"


def test_a_rejected_start_is_told_the_limit_and_what_counts() -> None:
    ledger = ledger_with(100, period_cap=60, credit_limit=10)
    ledger.send("workflow.finish", workflow_id="w1", credits=20)
    ledger.send("workflow.start", workflow_id="w2", credits=25)
    funds = Limit("insufficient_credits", limit=90, used=0, reserved=25, resets_at=None)
    cap = Limit("period_cap", limit=60, used=20, reserved=25, resets_at=None)
    started = [("w3", 66, funds, 1), ("w4", 65, cap, 50), ("w4", 65, None, None), ("w5", 15, None, None)]
    for workflow_id, wanted, limit, shortfall in started:
        quote = rules.quote(ledger.wallet, wanted)
        decision = ledger.send("workflow.start", workflow_id=workflow_id, credits=wanted)
        assert (decision.limit, decision.shortfall) == (limit, shortfall)
        if not decision.duplicate:
            assert (quote.outcome, quote.reason, quote.shortfall) == (decision.outcome, decision.reason, shortfall)
            assert (quote.limits, quote.available, quote.as_of_seq) == ((funds, cap), 55, 3)
    assert [limit.remaining for limit in (funds, cap)] == [65, 15]


def test_a_quote_changes_nothing_and_has_the_limits_that_there_are() -> None:
    empty = Wallet("acme")
    nothing = Limit("insufficient_credits", limit=0, used=0, reserved=0, resets_at=None)
    assert rules.quote(empty, 0) == Quote("reserved", None, 0, None, (nothing,), 0)
    assert rules.quote(empty, 7) == Quote("rejected", "insufficient_credits", 0, 7, (nothing,), 0)
    capped = ledger_with(100, period_cap=0).wallet
    assert rules.quote(capped, 0).outcome == "reserved"
    assert rules.quote(capped, 1).reason == "period_cap"


def test_the_cap_of_a_period_ends_with_it_and_without_a_subscription_never() -> None:
    ledger = ledger_with(200, period_cap=60)
    ledger.send("workflow.finish", workflow_id="w1", credits=60)
    ledger.wait(days=400)
    assert ledger.send("workflow.start", workflow_id="w2", credits=1).reason == "period_cap"
    ledger.send("wallet.subscribe", subscription_id="s1", version=1, plan="pro", monthly_credits=30)
    ledger.send("workflow.finish", workflow_id="w3", credits=60)
    limit = ledger.send("workflow.start", workflow_id="w4", credits=1).limit
    assert limit == Limit("period_cap", limit=60, used=60, reserved=0, resets_at=ledger.wallet.next_period_at)
    assert limit is not None
    assert limit.resets_at is not None
    ledger.wait_until(limit.resets_at)
    assert ledger.send("workflow.start", workflow_id="w5", credits=60).outcome == "reserved"


def test_a_rejection_stands_although_credits_came_later() -> None:
    ledger = ledger_with(0)
    ledger.send("workflow.start", workflow_id="w1", credits=40)
    ledger.send("wallet.purchase", purchase_id="p1", credits=500)
    again = ledger.send("workflow.start", workflow_id="w1", credits=40)
    assert (again.outcome, again.reason, again.duplicate) == ("rejected", "insufficient_credits", True)


# Conflicts


def test_a_conflict_says_what_was_said_before() -> None:
    ledger = in_state("settled")
    assert ledger.send("workflow.start", workflow_id="w1", credits=41).refusal == Refusal(
        "conflict", "workflow.start: w1 was started with 40 credits, so this message contradicts it"
    )
    assert ledger.send("workflow.finish", workflow_id="w1", credits=31).refusal == Refusal(
        "conflict", "workflow.finish: w1 was finished with 30 credits, so this message contradicts it"
    )


@pytest.mark.parametrize(
    ("task", "first", "again"),
    [
        ("workflow.start", {"credits": 40, "project_id": "a"}, {"credits": 40, "project_id": "b", "expires_in_s": 60}),
        ("workflow.finish", {"credits": 40}, {"credits": 40, "activity_name": "Late"}),
        ("workflow.cancel", {}, {"reason": "twice"}),
        ("workflow.fail", {"reason": "a"}, {"reason": "b", "source": "other", "metadata": {"n": 1}}),
    ],
)
def test_only_another_amount_is_a_conflict(task: str, first: dict[str, Any], again: dict[str, Any]) -> None:
    ledger = ledger_with(100)
    outcome = ledger.send(task, workflow_id="w1", **first).outcome
    decision = ledger.send(task, workflow_id="w1", **again)
    assert (decision.outcome, decision.duplicate, decision.refusal) == (outcome, True, None)


# Bounds


def test_a_finish_is_charged_down_to_the_deepest_debt_and_says_what_was_not() -> None:
    ledger = ledger_with(0)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=30 - MAX)
    decision = ledger.send("workflow.finish", workflow_id="w1", credits=50)
    assert rows(decision) == [("usage", -30, -MAX, 0, 0, 30)]
    own = {"unreserved": True, "overrun": 30, "not_charged": 20, "paid_by": {"prepaid": 30}}
    assert decision.events[0].metadata == own
    [usage] = ledger.send("workflow.finish", workflow_id="w2", credits=1).events
    assert (row(usage), usage.metadata["not_charged"]) == (("usage", 0, -MAX, 0, 0, 30), 1)
    assert ledger.send("workflow.finish", workflow_id="w1", credits=50).duplicate
    assert ledger.send("workflow.finish", workflow_id="w1", credits=30).refusal is not None


def test_what_others_hold_counts_for_the_deepest_debt() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=60)
    ledger.send("workflow.start", workflow_id="w2", credits=40)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=70 - MAX)
    assert rows(ledger.send("workflow.finish", workflow_id="w1", credits=50)) == [
        ("reservation_released", 60, 70 - MAX, 0, 40, 0),
        ("usage", -30, 40 - MAX, 0, 40, 30),
    ]
    assert ledger.wallet.available == -MAX


def test_the_usage_of_a_period_stays_at_the_bound() -> None:
    ledger = ledger_with(500)
    ledger.wallet = ledger.wallet._replace(period_usage=MAX - 10)
    assert rows(ledger.send("workflow.finish", workflow_id="w1", credits=401)) == [("usage", -401, 99, 0, 0, MAX)]
    assert rows(ledger.send("workflow.finish", workflow_id="w2", credits=9)) == [("usage", -9, 90, 0, 0, MAX)]


def test_a_reservation_beyond_the_bound_is_refused() -> None:
    ledger = ledger_with(0, credit_limit=MAX)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=MAX)
    ledger.send("workflow.start", workflow_id="w1", credits=AMOUNT)
    ledger.wallet = ledger.wallet._replace(reserved=MAX)
    decision = ledger.send("workflow.start", workflow_id="w2", credits=1)
    assert decision.refusal is not None
    assert decision.refusal.code == "balance_out_of_range"


# What never happens, is not survived in silence


def test_a_message_without_a_rule_is_an_error() -> None:
    fields: dict[str, Any] = {"org_id": "acme", "source": "x"}

    class Unruled(Message):
        task = "unruled"

    class UnruledStep(WorkflowMessage):
        task = "unruled.step"

    class UnruledChange(WalletMessage):
        task = "unruled.change"

    for message in (Unruled(**fields), UnruledStep(**fields, workflow_id="w1"), UnruledChange(**fields)):
        with pytest.raises(AssertionError, match="unreachable, but got: Unruled"):
            rules.decide(Wallet("acme"), message, NOW)  # type: ignore[arg-type]


def test_what_is_due_comes_before_any_message() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=40, expires_in_s=60)
    message = Cancel(org_id="acme", workflow_id="w1")
    with pytest.raises(AssertionError):
        rules.decide(ledger.wallet, message, datetime(2026, 1, 31, 9, 1, tzinfo=UTC))


def test_another_organizations_wallet_or_an_earlier_clock_is_an_error() -> None:
    message = Cancel(org_id="acme", workflow_id="w1")
    with pytest.raises(AssertionError):
        rules.decide(Wallet("other"), message, NOW)
    with pytest.raises(AssertionError):
        rules.decide(Wallet("acme", last_event_at=datetime(2026, 1, 31, 10, tzinfo=UTC)), message, NOW)


def test_only_an_open_hold_that_is_due_is_released() -> None:
    held = Workflow("acme", "w1", "reserved", start_credits=4, start_answer="reserved", expires_at=NOW)
    wallet = Wallet("acme", prepaid_balance=9, reserved=4, next_hold_expiry=NOW)
    assert rules.release_expired(wallet, held, NOW)[0].reserved == 0
    for workflow in (held._replace(state="expired"), held._replace(expires_at=None)):
        with pytest.raises(AssertionError):
            rules.release_expired(wallet, workflow, NOW)
    with pytest.raises(AssertionError):
        rules.release_expired(wallet, held, datetime(2026, 1, 31, 8, 59, tzinfo=UTC))


def test_a_message_cannot_say_in_the_ledgers_own_words_what_the_ledger_does_not_say() -> None:
    ledger = ledger_with(prepaid=100)
    ledger.send("workflow.start", workflow_id="w1", credits=40)
    claims = {"overrun": 5, "unreserved": True, "not_charged": 5, "paid_by": {"ending": 5}, "reason": "mine"}
    released, usage = ledger.send("workflow.finish", workflow_id="w1", credits=40, metadata=claims).events
    assert released.metadata["reason"] == "settled"
    assert usage.metadata == {"reason": "mine", "paid_by": {"prepaid": 40}}
