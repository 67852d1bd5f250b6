"""Credits with an end: the order of use, what ends when, and where refunds and reversals go."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from holdfast_client.messages import MAX_AMOUNT
from ledger import rules
from ledger.state import Decision, Event, Refusal, Wallet
from tests.memory import MemoryLedger, row, rows

NOW = datetime(2026, 1, 1, 9, tzinfo=UTC)
SOON, LATER = "2026-01-15T00:00:00+00:00", "2026-06-01T00:00:00+00:00"
MAX = 2**53 - 1


def grant(ledger: MemoryLedger, grant_id: str, credits: int, expires_at: str | None) -> Decision:
    return ledger.send("wallet.grant", grant_id=grant_id, credits=credits, expires_at=expires_at)


def buy(ledger: MemoryLedger, credits: int, purchase_id: str = "p", **fields: Any) -> Decision:
    return ledger.send("wallet.purchase", purchase_id=purchase_id, credits=credits, **fields)


def subscribe(ledger: MemoryLedger, credits: int, **fields: Any) -> Decision:
    terms = {"subscription_id": "s1", "version": 1, "plan": "pro", "monthly_credits": credits, **fields}
    return ledger.send("wallet.subscribe", **terms)


def start(ledger: MemoryLedger, workflow_id: str, credits: int) -> Decision:
    return ledger.send("workflow.start", workflow_id=workflow_id, credits=credits, expires_in_s=2_592_000)


def finish(ledger: MemoryLedger, workflow_id: str, credits: int) -> Decision:
    return ledger.send("workflow.finish", workflow_id=workflow_id, credits=credits)


def refund(ledger: MemoryLedger, workflow_id: str, credits: int, refund_id: str = "r") -> Decision:
    return ledger.send("wallet.refund", refund_id=refund_id, workflow_id=workflow_id, credits=credits)


def reverse(ledger: MemoryLedger, reversal_id: str = "v", **fields: Any) -> Decision:
    return ledger.send(
        "wallet.reverse", **{"reversal_id": reversal_id, "purchase_id": "p", "reason": "disputed", **fields}
    )


def ends(ledger: MemoryLedger) -> dict[str, int]:
    return {row.origin: row.remaining for row in ledger.wallet.ending}


# The order of use


def test_what_ends_first_is_used_first() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 100)
    grant(ledger, "later", 50, LATER)
    subscribe(ledger, 30)  # until 1 February
    grant(ledger, "soon", 20, SOON)
    uses = [finish(ledger, f"w{used}", used).events[0].metadata for used in (15, 40, 50, 100)]
    assert [use["paid_by"] for use in uses] == [
        {"ending": 15},
        {"subscription": 30, "ending": 10},
        {"ending": 45, "prepaid": 5},
        {"prepaid": 100},
    ]
    assert [use.get("overrun") for use in uses] == [None, None, None, 5]
    assert ledger.wallet.prepaid_balance == -5
    assert ledger.wallet.ending == ()


def test_at_a_tie_the_subscription_goes_first_and_then_the_older_credits() -> None:
    ledger = MemoryLedger(NOW)
    end = "2026-02-01T09:00:00+00:00"
    grant(ledger, "z", 10, end)
    grant(ledger, "a", 10, end)
    subscribe(ledger, 10)
    finish(ledger, "w", 15)
    assert ledger.wallet.subscription_balance == 0
    assert ends(ledger) == {"grant:z": 5, "grant:a": 10}


def test_a_usage_of_nothing_is_paid_by_nothing() -> None:
    ledger = MemoryLedger(NOW)
    assert finish(ledger, "w", 0).events[0].metadata == {"unreserved": True}


def test_a_correction_takes_what_ends_first() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 10)
    grant(ledger, "g", 10, SOON)
    subscribe(ledger, 10)
    decision = ledger.send("wallet.adjust", adjustment_id="a", credits=-12, reason="typing error")
    assert rows(decision) == [("adjustment", -12, 8, 10, 0, 0)]
    assert decision.events[0].metadata["from_ending"] == 10
    assert ledger.wait_until(datetime(2026, 1, 20, tzinfo=UTC)) == []


# Ends


def test_what_is_left_of_a_grant_ends_at_its_end() -> None:
    ledger = MemoryLedger(NOW)
    grant(ledger, "welcome", 100, SOON)
    finish(ledger, "w", 30)
    end = datetime.fromisoformat(SOON)
    assert ledger.wait_until(end - timedelta(microseconds=1)) == []
    [event] = ledger.wait_until(end)
    assert row(event) == ("adjustment", -70, 0, 0, 0, 30)
    assert event.metadata == {"reason": "grant_expired", "grant_id": "welcome", "expires_at": SOON}
    assert (event.source, event.idempotency_key) == ("scheduler", "grant:welcome/ended/3")
    assert ledger.wallet.is_due(datetime(2999, 1, 1, tzinfo=UTC)) is False


def test_an_end_in_the_past_is_told_and_ends_at_once() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 50)
    start(ledger, "w", 50)
    decision = grant(ledger, "late", 20, "2025-12-31T00:00:00Z")
    assert rows(decision) == [("grant", 20, 70, 0, 50, 0), ("adjustment", -20, 50, 0, 50, 0)]
    assert ledger.wallet.ending == ()


def test_a_purchase_may_end_too() -> None:
    ledger = MemoryLedger(NOW)
    [bought] = buy(ledger, 50, expires_at="2026-01-15T01:00:00+01:00").events
    assert bought.metadata == {"purchase_id": "p", "expires_at": SOON}
    [event] = ledger.wait_until(datetime(2026, 2, 1, tzinfo=UTC))
    assert event.metadata == {"reason": "purchase_expired", "purchase_id": "p", "expires_at": SOON}


def test_a_periods_end_takes_nothing_from_under_a_reservation() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 1_000)
    ledger.wait(days=30)
    start(ledger, "w", 1_000)
    assert [row(event) for event in ledger.wait(days=1)] == [("subscription_credit", 1_000, 0, 2_000, 1_000, 0)]
    settled = finish(ledger, "w", 900)
    assert rows(settled) == [
        ("reservation_released", 1_000, 0, 2_000, 0, 0),
        ("usage", -900, 0, 1_100, 0, 900),
        ("adjustment", -100, 0, 1_000, 0, 900),
    ]
    assert settled.events[2].metadata == {
        "reason": "subscription_expired",
        "subscription_id": "s1",
        "plan": "pro",
        "expires_at": "2026-02-01T09:00:00+00:00",
    }


def test_a_workflow_admitted_before_an_unsubscription_ends_is_not_settled_into_a_debt() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 1_000)
    start(ledger, "w", 1_000)
    ledger.send("wallet.unsubscribe", subscription_id="s1", version=2)
    assert ledger.wait_until(datetime(2026, 1, 31, tzinfo=UTC)) == []
    ledger.now = datetime(2026, 1, 31, 8, tzinfo=UTC)
    finish(ledger, "w", 1_000)
    assert (ledger.wallet.prepaid_balance, ledger.wallet.subscription_balance) == (0, 0)


def test_what_a_reservation_no_longer_needs_ends_with_it() -> None:
    ledger = MemoryLedger(NOW)
    grant(ledger, "g", 100, SOON)
    start(ledger, "a", 60)
    start(ledger, "b", 40)
    assert ledger.wait_until(datetime(2026, 1, 16, tzinfo=UTC)) == []
    assert (ledger.wallet.held_past_end, ledger.wallet.next_ending_at) == (100, None)
    assert rows(ledger.send("workflow.cancel", workflow_id="a")) == [
        ("reservation_released", 60, 100, 0, 40, 0),
        ("adjustment", -60, 40, 0, 40, 0),
    ]
    released, ended = ledger.wait_until(datetime(2026, 3, 1, tzinfo=UTC))
    assert (released.event_type, row(ended)) == ("reservation_released", ("adjustment", -40, 0, 0, 0, 0))


def test_a_reservation_that_is_made_after_an_end_keeps_nothing() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 1_000)
    grant(ledger, "g", 100, SOON)
    start(ledger, "old", 100)
    ledger.wait_until(datetime(2026, 1, 16, tzinfo=UTC))
    start(ledger, "new", 500)
    assert [event.credits for event in ledger.send("workflow.cancel", workflow_id="old").events] == [100, -100]
    assert (ledger.wallet.available, ledger.wallet.reserved) == (500, 500)


def test_each_end_is_covered_by_the_reservations_before_it() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 1_000)
    grant(ledger, "first", 100, SOON)
    grant(ledger, "second", 80, "2026-01-17T00:00:00Z")
    start(ledger, "a", 100)
    ledger.wait_until(datetime(2026, 1, 16, tzinfo=UTC))
    start(ledger, "b", 60)
    assert [event.credits for event in ledger.wait_until(datetime(2026, 1, 18, tzinfo=UTC))] == [-20]
    assert ends(ledger) == {"grant:first": 80, "grant:second": 80}
    # What is left for `a` alone to cover ends with it; `b` was there before the second end.
    assert [event.credits for event in ledger.send("workflow.cancel", workflow_id="a").events] == [100, -80, -20]
    assert ends(ledger) == {"grant:second": 60}
    assert [event.credits for event in ledger.send("workflow.cancel", workflow_id="b").events] == [60, -60]


def test_what_is_used_past_its_end_is_what_is_held() -> None:
    ledger = MemoryLedger(NOW)
    grant(ledger, "g", 100, SOON)
    buy(ledger, 100)
    start(ledger, "a", 40)
    start(ledger, "b", 60)
    ledger.wait_until(datetime(2026, 1, 16, tzinfo=UTC))
    assert [event.credits for event in finish(ledger, "a", 30).events] == [40, -30, -10]
    assert (ledger.wallet.held_past_end, ends(ledger)) == (60, {"grant:g": 60})
    assert [event.credits for event in finish(ledger, "b", 60).events] == [60, -60]
    assert (ledger.wallet.covers, ledger.wallet.prepaid_balance) == (None, 100)


def test_ends_done_a_few_at_a_time_are_the_same_as_all_at_once() -> None:
    ledger = MemoryLedger(NOW)
    for number in range(5):
        grant(ledger, f"g{number}", 10, SOON)
    now = datetime(2026, 2, 1, tzinfo=UTC)
    at_once = rules.begin_due(ledger.wallet, {}, now)
    wallet = ledger.wallet
    events: list[Event] = []
    while wallet.is_due(now):
        wallet, _, ended = rules.begin_due(wallet, {}, now, most_events=2)
        assert 1 <= len(ended) <= 2
        events += ended
    assert (wallet, tuple(events)) == (at_once[0], at_once[2])


# Refunds


def test_a_refund_goes_back_where_the_credits_came_from() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 1_000)
    finish(ledger, "w", 1_000)
    [event] = refund(ledger, "w", 1_000).events
    until = (NOW + timedelta(days=31)).isoformat()  # the period's own end: that is later than in 30 days
    assert event.metadata["ending"] == [{"credits": 1_000, "expires_at": until}]
    [ended, _] = ledger.wait_until(datetime.fromisoformat(until))
    assert (ended.credits, ended.metadata["reason"], ended.metadata["refund_id"]) == (-1_000, "refund_expired", "r")


def test_a_refund_lasts_for_thirty_days_at_least() -> None:
    ledger = MemoryLedger(NOW)
    grant(ledger, "g", 10, SOON)
    finish(ledger, "w", 10)
    ledger.wait(days=100)
    [event] = refund(ledger, "w", 10).events
    assert event.metadata["ending"] == [{"credits": 10, "expires_at": (ledger.now + timedelta(days=30)).isoformat()}]


def test_refunds_in_parts_give_what_one_gives() -> None:
    together, in_parts = MemoryLedger(NOW), MemoryLedger(NOW)
    for ledger in (together, in_parts):
        buy(ledger, 5)
        grant(ledger, "soon", 20, SOON)
        grant(ledger, "later", 30, LATER)
        assert finish(ledger, "w", 55).events[0].metadata["paid_by"] == {"ending": 50, "prepaid": 5}
    refund(together, "w", 50)
    for part in (3, 1, 40, 6):
        refund(in_parts, "w", part, f"r{part}")

    def left(ledger: MemoryLedger) -> tuple[int, dict[datetime, int]]:
        by_end: dict[datetime, int] = {}
        for part in ledger.wallet.ending:
            by_end[part.expires_at] = by_end.get(part.expires_at, 0) + part.remaining
        return ledger.wallet.prepaid_balance, by_end

    assert left(together) == left(in_parts)
    assert left(together) == (
        50,
        {NOW + timedelta(days=30): 15, datetime.fromisoformat(LATER): 30},
    )


def test_a_refund_that_names_no_workflow_never_ends() -> None:
    ledger = MemoryLedger(NOW)
    ledger.send("wallet.refund", refund_id="r", credits=10)
    assert ledger.wait(days=10_000) == []
    assert ledger.wallet.prepaid_balance == 10


# Debts


def test_an_allocation_settles_a_debt_first() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 1_000)
    finish(ledger, "w", 1_500)
    [credit] = ledger.wait(days=31)
    assert (row(credit), credit.metadata["debt_settled"]) == (("subscription_credit", 1_000, 0, 500, 0, 0), 500)
    assert start(ledger, "x", 500).outcome == "reserved"
    ledger.send("workflow.cancel", workflow_id="x")
    expired, credit = ledger.wait(days=28)
    assert (expired.credits, row(credit)) == (-500, ("subscription_credit", 1_000, 0, 1_000, 0, 0))
    assert sum(event.credits for event in ledger.events) == ledger.wallet.available


def test_a_debt_takes_of_what_ends_only_what_it_needs() -> None:
    ledger = MemoryLedger(NOW)
    finish(ledger, "w", 30)
    [event] = grant(ledger, "g", 100, SOON).events
    assert event.metadata == {"grant_id": "g", "debt_settled": 30, "expires_at": SOON}
    assert ends(ledger) == {"grant:g": 70}
    [ended] = ledger.wait(days=30)
    assert row(ended) == ("adjustment", -70, 0, 0, 0, 30)


def test_a_refund_says_what_the_debt_has_left_of_what_ends() -> None:
    ledger = MemoryLedger(NOW)
    grant(ledger, "g", 100, LATER)
    finish(ledger, "w", 130)
    [event] = refund(ledger, "w", 100).events
    assert (event.metadata["debt_settled"], event.metadata["ending"]) == (30, [{"credits": 70, "expires_at": LATER}])
    assert ends(ledger) == {"refund:r": 70}


# Bounds


def test_a_finish_is_charged_however_much_was_used_before() -> None:
    ledger = MemoryLedger(NOW)
    ledger.wallet = Wallet("acme", prepaid_balance=500, period_usage=MAX - 400)
    start(ledger, "w", 500)
    assert rows(finish(ledger, "w", 401)) == [
        ("reservation_released", 500, 500, 0, 0, MAX - 400),
        ("usage", -401, 99, 0, 0, MAX),
    ]


def test_a_debt_stops_at_the_bound_and_says_what_was_not_charged() -> None:
    ledger = MemoryLedger(NOW)
    ledger.wallet = Wallet("acme", prepaid_balance=10 - MAX)
    decision = finish(ledger, "w", MAX_AMOUNT)
    assert rows(decision) == [("usage", -10, -MAX, 0, 0, 10)]
    assert decision.events[0].metadata["not_charged"] == MAX_AMOUNT - 10
    assert finish(ledger, "w", MAX_AMOUNT).duplicate


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("workflow.start", {"workflow_id": "w"}),
        ("workflow.finish", {"workflow_id": "w"}),
        ("wallet.purchase", {"purchase_id": "p"}),
        ("wallet.bill", {"billing_id": "b"}),
    ],
)
def test_one_message_moves_at_most_a_million_millions(task: str, fields: dict[str, Any]) -> None:
    ledger = MemoryLedger(NOW)
    assert ledger.send(task, credits=MAX_AMOUNT + 1, **fields).refusal == Refusal(
        "invalid_message", f"{task}: credits must be less than or equal to 1000000000000, got 1000000000001"
    )
    assert ledger.send(task, credits=MAX_AMOUNT, **fields).refusal is None


# What a workflow holds


@pytest.mark.parametrize("task", ["wallet.bill", "wallet.adjust"])
def test_what_a_workflow_holds_is_not_taken_from_under_it(task: str) -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 100)
    start(ledger, "w", 90)
    fields = {"billing_id": "b"} if task == "wallet.bill" else {"adjustment_id": "a", "reason": "x"}
    assert ledger.send(task, credits=-11, **fields).refusal == Refusal(
        "insufficient_credits", f"{task}: -11 would take what is available, 10, below zero"
    )
    assert ledger.send(task, credits=-10, **fields).outcome == "posted"


def test_a_rejected_start_names_the_limit_and_what_counts() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 100)
    ledger.send("wallet.configure", version=1, period_cap=50, credit_limit=5)
    finish(ledger, "a", 20)
    start(ledger, "b", 10)
    assert start(ledger, "c", 21).limit == ("period_cap", 50, 20, 10, None)  # a cap for life: there is no period
    assert start(ledger, "d", 76).limit == ("insufficient_credits", 85, 0, 10, None)
    subscribe(ledger, 0)
    assert start(ledger, "e", 41).limit == ("period_cap", 50, 0, 10, datetime(2026, 2, 1, 9, tzinfo=UTC))
    assert start(ledger, "e", 41).limit is None  # a repetition


# Reversals


def test_a_reversal_takes_a_purchase_back_even_below_zero() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 100)
    finish(ledger, "w", 70)
    decision = reverse(ledger)
    assert rows(decision) == [("billing", -100, -70, 0, 0, 70)]
    assert decision.events[0].metadata == {"reversal_id": "v", "purchase_id": "p", "reason": "disputed"}
    assert start(ledger, "x", 1).reason == "insufficient_credits"
    assert reverse(ledger).duplicate


def test_reversals_together_take_no_more_than_was_bought() -> None:
    ledger = MemoryLedger(NOW)
    buy(ledger, 100)
    reverse(ledger, "v1", credits=60)
    assert reverse(ledger, "v2", credits=41).refusal == Refusal(
        "reversal_exceeds_purchase",
        "wallet.reverse: purchase p brought 100 credits and 60 of them were reversed already, so 41 cannot be reversed",
    )
    assert rows(reverse(ledger, "v3")) == [("billing", -40, 0, 0, 0, 0)]
    refusal = reverse(ledger, "v4").refusal
    assert refusal is not None
    assert refusal.code == "reversal_exceeds_purchase"


def test_a_reversal_takes_what_is_left_of_its_own_purchase_first() -> None:
    ledger = MemoryLedger(NOW)
    grant(ledger, "g", 50, SOON)
    buy(ledger, 100, expires_at=LATER)
    decision = reverse(ledger, credits=80)
    assert decision.events[0].metadata["from_ending"] == 80
    assert ends(ledger) == {"grant:g": 50, "purchase:p": 20}
    finish(ledger, "w", 60)
    reverse(ledger, "v2")
    assert (ends(ledger), ledger.wallet.prepaid_balance) == ({}, -10)


def test_a_reversal_of_an_unknown_purchase_is_applied_when_it_comes_again() -> None:
    ledger = MemoryLedger(NOW)
    assert reverse(ledger).refusal == Refusal(
        "unknown_purchase",
        "wallet.reverse: there is no purchase p; if it is still to come, replay this after it",
    )
    buy(ledger, 10)
    assert reverse(ledger).outcome == "posted"
