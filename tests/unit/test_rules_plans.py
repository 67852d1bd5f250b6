"""Plans: the newest version wins, schedules, first credits, and that nothing paid for ends early."""

from datetime import UTC, datetime
from itertools import permutations
from typing import Any

import pytest

from ledger.state import Decision
from tests.memory import MemoryLedger, row, rows

NOW = datetime(2026, 1, 1, 9, tzinfo=UTC)
LATER = "2026-01-20T00:00:00+00:00"


def subscribe(
    ledger: MemoryLedger, subscription_id: str, version: int, credits: int = 1_000, **fields: Any
) -> Decision:
    terms = {"plan": f"plan {subscription_id}", "monthly_credits": credits, **fields}
    return ledger.send("wallet.subscribe", subscription_id=subscription_id, version=version, **terms)


def unsubscribe(ledger: MemoryLedger, subscription_id: str, version: int) -> Decision:
    return ledger.send("wallet.unsubscribe", subscription_id=subscription_id, version=version)


def at(month: int, day: int, hour: int = 9) -> datetime:
    return datetime(2026, month, day, hour, tzinfo=UTC)


def future(ledger: MemoryLedger) -> tuple[str | None, str | None]:
    """The subscription that will go on, and the one that is scheduled."""
    wallet = ledger.wallet
    current = wallet.subscription_id
    return current if current is not None and ledger.subscriptions[current].active else None, wallet.scheduled_id


# The newest version wins


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("s1", 1, None), ("s2", 2, None)], ("s2", None)),
        ([("s1", 1, None), ("s2", 2, None), ("s3", 3, None)], ("s3", None)),
        ([("s1", 1, None), ("s2", 2, None), ("s1", 3, "end")], ("s2", None)),
        ([("s1", 1, None), ("s2", 2, None), ("s2", 3, "end")], (None, None)),
        ([("s1", 1, None), ("s1", 2, "end"), ("s2", 3, None)], ("s2", None)),
        ([("s1", 1, None), ("s2", 2, LATER)], ("s1", "s2")),
        ([("s1", 1, None), ("s2", 2, LATER), ("s2", 3, "end")], ("s1", None)),
        ([("s1", 1, None), ("s2", 2, LATER), ("s3", 3, LATER)], ("s1", "s3")),
        ([("s1", 1, None), ("s2", 2, LATER), ("s1", 3, "end")], (None, "s2")),
        ([("s1", 1, None), ("s2", 2, LATER), ("s3", 3, None), ("s3", 4, "end")], (None, None)),
    ],
)
def test_the_newest_version_wins_in_whatever_order_they_arrive(
    messages: list[tuple[str, int, str | None]], expected: tuple[str | None, str | None]
) -> None:
    has_schedule = any(what == LATER for *_, what in messages)
    for order in permutations(messages):
        ledger = MemoryLedger(NOW)
        for subscription_id, version, what in order:
            if what == "end":
                unsubscribe(ledger, subscription_id, version)
            else:
                subscribe(ledger, subscription_id, version, anchor=what)
        current, scheduled = future(ledger)
        assert scheduled == expected[1], order
        # A plan that arrives after the schedule which follows it never was.
        assert current == expected[0] or (has_schedule and current is None), order


def test_an_older_version_of_another_subscription_is_ignored() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s2", 2)
    for version in (1, 2):
        decision = subscribe(ledger, "s1", version)
        assert (decision.outcome, decision.reason) == ("ignored", "stale_version")
    decision = unsubscribe(ledger, "s9", 2)
    assert (decision.outcome, decision.reason) == ("ignored", "stale_version")
    assert future(ledger) == ("s2", None)


# Schedules


def test_the_current_plan_goes_on_until_the_scheduled_one_begins() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100)
    assert subscribe(ledger, "s2", 2, 500, anchor="2026-03-10T00:00:00Z").events == ()
    assert [row(event) for event in ledger.wait_until(at(3, 2))] == [
        ("adjustment", -100, 0, 0, 0, 0),
        ("subscription_credit", 100, 0, 100, 0, 0),
        ("adjustment", -100, 0, 0, 0, 0),
        ("subscription_credit", 100, 0, 100, 0, 0),
    ]
    [begun] = ledger.wait_until(at(3, 10, 0))
    assert (row(begun), begun.idempotency_key) == (("subscription_credit", 500, 0, 600, 0, 0), "subscription:s2:0")
    [ended] = ledger.wait_until(at(4, 1))  # what was paid for s1 ends with its own period
    assert (ended.credits, ended.metadata["subscription_id"], ended.metadata["plan"]) == (-100, "s1", "plan s1")
    assert [event.credits for event in ledger.wait_until(at(4, 10))] == [-500, 500]


def test_a_schedule_that_begins_with_the_next_period_takes_its_place() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100)
    subscribe(ledger, "s2", 2, 500, anchor="2026-02-01T09:00:00Z")
    ended, begun = ledger.wait_until(at(2, 1))
    assert (ended.credits, ended.metadata["plan"], begun.metadata["plan"]) == (-100, "plan s1", "plan s2")


def test_a_schedule_that_is_called_off_changes_nothing_else() -> None:
    ledger, other = MemoryLedger(NOW), MemoryLedger(NOW)
    for each in (ledger, other):
        subscribe(each, "s1", 1, 100)
    subscribe(ledger, "s2", 2, 500, anchor=LATER)
    assert unsubscribe(ledger, "s2", 3).outcome == "posted"
    for each in (ledger, other):
        each.wait_until(at(6, 1))
    assert [row(event) for event in ledger.events] == [row(event) for event in other.events]


def test_another_schedule_replaces_the_first() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100)
    subscribe(ledger, "s2", 2, 500, anchor=LATER)
    subscribe(ledger, "s3", 3, 300, anchor="2026-02-20T00:00:00Z")
    ledger.wait_until(at(2, 20))
    assert [event.metadata["plan"] for event in ledger.events if event.event_type == "subscription_credit"] == [
        "plan s1",
        "plan s1",
        "plan s3",
    ]


def test_a_schedule_without_a_plan_before_it_begins_by_itself() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100, anchor=LATER)
    assert ledger.wallet.next_period_at is None
    [begun] = ledger.wait_until(at(1, 20))
    assert (begun.credits, begun.source) == (100, "scheduler")


# Nothing that was paid for ends early


def test_a_plan_that_is_replaced_keeps_its_credits_until_its_period_ends() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100)
    ledger.wait_until(at(1, 11))
    assert rows(subscribe(ledger, "s2", 2, 500)) == [("subscription_credit", 500, 0, 600, 0, 0)]
    ledger.send("workflow.finish", workflow_id="w", credits=30)
    [ended] = ledger.wait_until(at(2, 1))
    assert (row(ended), ended.metadata["subscription_id"]) == (("adjustment", -70, 0, 500, 0, 30), "s1")


def test_going_back_within_the_period_takes_back_what_was_left() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100, rollover_limit=60)
    subscribe(ledger, "s2", 2, 500)
    assert rows(subscribe(ledger, "s1", 3, 100, rollover_limit=60)) == []
    assert ledger.wallet.subscription_balance == 600
    assert [(event.credits, event.metadata.get("plan")) for event in ledger.wait_until(at(2, 1))] == [
        (-40, "plan s1"),
        (-500, "plan s2"),
        (100, "plan s1"),
    ]


# Changes within a period


def test_a_downgrade_is_told_at_once_and_comes_with_the_next_period() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 5_000, plan="pro")
    [event] = subscribe(ledger, "s1", 2, 1_000, plan="basic").events
    assert row(event) == ("subscription_credit", 0, 0, 5_000, 0, 0)
    assert event.metadata == {
        "reason": "plan_change",
        "subscription_id": "s1",
        "plan": "basic",
        "replaced_plan": "pro",
        "monthly_credits": 1_000,
        "effective_at": "2026-02-01T09:00:00+00:00",
    }
    assert ledger.subscriptions["s1"].period_plan == "pro"
    ended, credit = ledger.wait_until(at(2, 1))
    assert (ended.metadata["plan"], credit.metadata["plan"], credit.credits) == ("pro", "basic", 1_000)
    assert ledger.subscriptions["s1"].period_plan == "basic"


def test_the_same_terms_again_are_no_event() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1)
    assert subscribe(ledger, "s1", 2, rollover_limit=5).events == ()


# First credits


def test_first_credits_are_for_the_first_period_alone() -> None:
    ledger = MemoryLedger(NOW)
    [event] = subscribe(ledger, "s1", 1, 1_000, first_credits=120).events
    assert event.credits == 120
    assert subscribe(ledger, "s1", 2, 1_000, first_credits=120).events == ()
    assert [event.credits for event in subscribe(ledger, "s1", 3, 1_000, first_credits=150).events] == [30]
    assert [event.credits for event in ledger.wait_until(at(2, 1))] == [-150, 1_000]
    assert [event.credits for event in subscribe(ledger, "s1", 4, 2_000, first_credits=0).events] == [1_000]


def test_a_trial_stays_one_whatever_else_changes() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 1_000, first_credits=100)
    changes = [(2, 1_000, "renamed"), (3, 500, "smaller"), (4, 1_000, "as it was"), (5, 1_200, "larger")]
    for version, size, plan in changes:
        subscribe(ledger, "s1", version, size, plan=plan)
    granted = [event.credits for event in ledger.events if event.event_type == "subscription_credit"]
    assert granted == [100, 0, 0, 0, 200]
    assert [event.credits for event in ledger.wait_until(at(2, 1))] == [-300, 1_200]


def test_moving_in_grants_what_is_left_of_the_period_that_another_system_began() -> None:
    ledger = MemoryLedger(NOW)
    [event] = subscribe(ledger, "s1", 1, 1_000, anchor="2025-10-15T00:00:00Z", first_credits=340).events
    assert (event.credits, event.idempotency_key) == (340, "subscription:s1:2")
    assert [event.credits for event in ledger.wait_until(at(1, 15, 0))] == [-340, 1_000]


def test_first_credits_are_kept_for_a_schedule() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 1_000, anchor=LATER, first_credits=7)
    assert [event.credits for event in ledger.wait_until(at(1, 20))] == [7]
    assert [event.credits for event in ledger.wait_until(at(2, 20))] == [-7, 1_000]


def test_what_a_worker_of_an_older_version_has_scheduled_begins_at_its_anchor() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, "s1", 1, 100)
    subscribe(ledger, "s2", 2, 500, anchor="2026-03-10T00:00:00Z")
    # As it was before there were schedules: what s1 has left ends with its period.
    ledger.wallet = ledger.wallet._replace(subscription_id="s2", scheduled_id=None, scheduled_at=None)
    assert [event.credits for event in ledger.wait_until(at(2, 1))] == [-100]
    assert [event.credits for event in ledger.wait_until(at(3, 10))] == [500]
