"""Subscriptions: which periods begin when, what they grant, what expires."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ledger import rules
from ledger.state import Decision, Event, Refusal, Subscription, Wallet
from tests.memory import MemoryLedger, Row, row, rows

NOW = datetime(2026, 1, 31, 9, tzinfo=UTC)
MAX = 9_007_199_254_740_991
AMOUNT = 1_000_000_000_000
"""The most credits that one message moves."""


def at(month: int, day: int, hour: int = 9, year: int = 2026) -> datetime:
    return datetime(year, month, day, hour, tzinfo=UTC)


def subscribe(ledger: MemoryLedger, version: int = 1, monthly_credits: int = 100, **fields: Any) -> Decision:
    return ledger.send(
        "wallet.subscribe",
        **{
            "subscription_id": "s1",
            "version": version,
            "plan": "pro",
            "monthly_credits": monthly_credits,
            **fields,
        },
    )


def unsubscribe(ledger: MemoryLedger, version: int, subscription_id: str = "s1") -> Decision:
    return ledger.send("wallet.unsubscribe", subscription_id=subscription_id, version=version)


def use(ledger: MemoryLedger, credits: int) -> None:
    ledger.send("workflow.finish", workflow_id=f"w{len(ledger.workflows)}", credits=credits)


def answer(decision: Decision) -> tuple[str, str | None]:
    assert decision.refusal is None
    assert not decision.duplicate
    return decision.outcome, decision.reason


def keys(events: list[Event]) -> list[str]:
    return [event.idempotency_key for event in events]


# Subscribing


def test_subscribing_posts_the_period_that_begins_now() -> None:
    ledger = MemoryLedger(NOW)
    decision = subscribe(ledger)
    assert answer(decision) == ("posted", None)
    assert rows(decision) == [("subscription_credit", 100, 0, 100, 0, 0)]
    assert keys(ledger.events) == ["subscription:s1:0"]
    assert decision.events[0].metadata == {
        "subscription_id": "s1",
        "plan": "pro",
        "period_start": "2026-01-31T09:00:00+00:00",
        "period_end": "2026-02-28T09:00:00+00:00",
    }
    assert ledger.subscriptions["s1"] == Subscription(
        "acme",
        "s1",
        1,
        active=True,
        plan="pro",
        monthly_credits=100,
        anchor=NOW,
        period=0,
        period_granted=100,
        first_period=0,
        period_plan="pro",
    )
    assert (ledger.wallet.subscription_id, ledger.wallet.next_period_at) == ("s1", at(2, 28))


def test_the_credit_of_a_subscribe_message_carries_its_source_and_metadata() -> None:
    # The default source of wallet.subscribe is billing, and its metadata is kept on the event.
    [event] = subscribe(MemoryLedger(NOW), metadata={"contract": "c7", "plan": "mine"}).events
    assert event.source == "billing"
    assert (event.metadata["contract"], event.metadata["plan"]) == ("c7", "pro")


@pytest.mark.parametrize(
    ("anchor", "key", "next_period_at"),
    [
        ("2026-01-31T09:00:00Z", "subscription:s1:0", at(2, 28)),
        ("2025-12-31T09:00:00Z", "subscription:s1:1", at(2, 28)),
        ("2025-12-31T10:00:00Z", "subscription:s1:0", at(1, 31, 10)),
        ("2025-11-05T00:00:00Z", "subscription:s1:2", at(2, 5, 0)),
        ("2020-02-29T00:00:00Z", "subscription:s1:71", at(2, 28, 0)),
    ],
)
def test_an_anchor_in_the_past_posts_only_the_period_of_now(anchor: str, key: str, next_period_at: datetime) -> None:
    ledger = MemoryLedger(NOW)
    assert rows(subscribe(ledger, anchor=anchor)) == [("subscription_credit", 100, 0, 100, 0, 0)]
    assert keys(ledger.events) == [key]
    assert ledger.wallet.next_period_at == next_period_at


def test_an_anchor_in_the_future_posts_nothing_until_then() -> None:
    ledger = MemoryLedger(NOW)
    decision = subscribe(ledger, anchor="2026-02-10T00:00:00+01:00")
    assert (answer(decision), decision.events) == (("posted", None), ())
    assert ledger.wait_until(at(2, 9, 22)) == []
    [event] = ledger.wait_until(at(2, 9, 23))
    assert row(event) == ("subscription_credit", 100, 0, 100, 0, 0)
    assert (event.idempotency_key, event.source) == ("subscription:s1:0", "scheduler")
    assert ledger.wallet.next_period_at == at(3, 9, 23)


def test_a_subscription_of_nothing_still_begins_its_periods() -> None:
    ledger = MemoryLedger(NOW)
    assert rows(subscribe(ledger, monthly_credits=0)) == [("subscription_credit", 0, 0, 0, 0, 0)]
    use(ledger, 5)
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == [("subscription_credit", 0, -5, 0, 0, 0)]


# Periods


def test_periods_begin_at_the_clamped_ends_of_months() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, rollover_limit=MAX)
    for k, begins in enumerate([at(2, 28), at(3, 31), at(4, 30), at(5, 31)], start=1):
        assert ledger.wait_until(begins - timedelta(microseconds=1)) == []
        [event] = ledger.wait_until(begins)
        assert event.idempotency_key == f"subscription:s1:{k}"
        assert event.metadata["period_start"] == begins.isoformat()


def test_a_period_begins_by_whatever_message_comes_first_and_only_once() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    ledger.now = at(2, 28)
    assert ledger.send("workflow.start", workflow_id="w1", credits=100).outcome == "reserved"
    assert [row(event) for event in ledger.events] == [
        ("subscription_credit", 100, 0, 100, 0, 0),
        ("adjustment", -100, 0, 0, 0, 0),
        ("subscription_credit", 100, 0, 100, 0, 0),
        ("reservation", -100, 0, 100, 100, 0),
    ]
    assert ledger.catch_up() == []


def test_missed_periods_are_posted_one_by_one_in_order() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, rollover_limit=30)
    use(ledger, 80)
    events = ledger.wait_until(at(4, 30))
    assert [row(event) for event in events] == [
        ("subscription_credit", 100, 0, 120, 0, 0),
        ("adjustment", -90, 0, 30, 0, 0),
        ("subscription_credit", 100, 0, 130, 0, 0),
        ("adjustment", -100, 0, 30, 0, 0),
        ("subscription_credit", 100, 0, 130, 0, 0),
    ]
    assert keys(events) == [
        "subscription:s1:1",
        "subscription:s1:1/ended/4",
        "subscription:s1:2",
        "subscription:s1:2/ended/6",
        "subscription:s1:3",
    ]
    assert [event.metadata.get("period_start") for event in events] == [
        "2026-02-28T09:00:00+00:00",
        None,
        "2026-03-31T09:00:00+00:00",
        None,
        "2026-04-30T09:00:00+00:00",
    ]
    assert [event.seq for event in events] == [3, 4, 5, 6, 7]
    assert {event.created_at for event in events} == {at(4, 30)}
    assert (ledger.subscriptions["s1"].period, ledger.wallet.next_period_at) == (3, at(5, 31))


@pytest.mark.parametrize(
    ("rollover_limit", "events"),
    [
        (0, [("adjustment", -60, 50, 0, 0, 40), ("subscription_credit", 100, 50, 100, 0, 0)]),
        (25, [("adjustment", -35, 50, 25, 0, 40), ("subscription_credit", 100, 50, 125, 0, 0)]),
        (60, [("subscription_credit", 100, 50, 160, 0, 0)]),
        (500, [("subscription_credit", 100, 50, 160, 0, 0)]),
    ],
)
def test_what_exceeds_the_rollover_limit_expires_first(rollover_limit: int, events: list[Row]) -> None:
    ledger = MemoryLedger(NOW)
    ledger.send("wallet.purchase", purchase_id="p1", credits=50)
    subscribe(ledger, rollover_limit=rollover_limit)
    use(ledger, 40)
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == events


def test_what_expires_says_so() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    expired, _ = ledger.wait_until(at(2, 28))
    assert expired == Event(
        org_id="acme",
        seq=2,
        created_at=at(2, 28),
        event_type="adjustment",
        source="scheduler",
        workflow_id=None,
        project_id=None,
        activity_name=None,
        credits=-100,
        prepaid_balance_after=0,
        subscription_balance_after=0,
        reserved_after=0,
        period_usage_after=0,
        idempotency_key="subscription:s1:0/ended/2",
        metadata={
            "reason": "subscription_expired",
            "subscription_id": "s1",
            "plan": "pro",
            "expires_at": "2026-02-28T09:00:00+00:00",
        },
    )


def test_credits_outlive_their_period_under_the_hold_that_was_made_on_them() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, monthly_credits=100)
    ledger.send("workflow.start", workflow_id="w1", credits=100, expires_in_s=2_592_000)
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == [("subscription_credit", 100, 0, 200, 100, 0)]
    assert rows(ledger.send("workflow.finish", workflow_id="w1", credits=70)) == [
        ("reservation_released", 100, 0, 200, 0, 0),
        ("usage", -70, 0, 130, 0, 70),
        ("adjustment", -30, 0, 100, 0, 70),
    ]
    assert ledger.events[-2].metadata["paid_by"] == {"subscription": 70}


def test_a_period_begins_before_the_holds_that_expired_are_released() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    ledger.send("workflow.start", workflow_id="w1", credits=10)
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == [
        ("adjustment", -90, 0, 10, 10, 0),
        ("subscription_credit", 100, 0, 110, 10, 0),
        ("reservation_released", 10, 0, 110, 0, 0),
        ("adjustment", -10, 0, 100, 0, 0),
    ]


def test_the_cap_is_for_one_period() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    ledger.send("wallet.configure", version=1, period_cap=50)
    use(ledger, 50)
    assert ledger.send("workflow.start", workflow_id="a", credits=1).reason == "period_cap"
    ledger.now = at(2, 28)
    assert ledger.send("workflow.start", workflow_id="b", credits=50).outcome == "reserved"


# Plan changes


def test_a_higher_plan_adds_the_difference_now() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    use(ledger, 40)
    decision = subscribe(ledger, 2, 150, plan="max", source="shop", metadata={"n": 1, "reason": "mine"})
    assert rows(decision) == [("subscription_credit", 50, 0, 110, 0, 40)]
    [event] = decision.events
    assert (event.source, event.idempotency_key) == ("shop", "subscription:s1:0/v2")
    assert event.metadata == {
        "n": 1,
        "reason": "plan_change",
        "subscription_id": "s1",
        "plan": "max",
        "replaced_plan": "pro",
    }


def test_a_plan_raised_twice_adds_each_difference() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    assert rows(subscribe(ledger, 2, 150)) == [("subscription_credit", 50, 0, 150, 0, 0)]
    assert rows(subscribe(ledger, 5, 160)) == [("subscription_credit", 10, 0, 160, 0, 0)]
    assert keys(ledger.events) == ["subscription:s1:0", "subscription:s1:0/v2", "subscription:s1:0/v5"]


def test_a_lower_plan_begins_with_the_next_period() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    decision = subscribe(ledger, 2, 60, plan="min")
    assert rows(decision) == [("subscription_credit", 0, 0, 100, 0, 0)]
    assert decision.events[0].metadata == {
        "reason": "plan_change",
        "subscription_id": "s1",
        "plan": "min",
        "replaced_plan": "pro",
        "monthly_credits": 60,
        "effective_at": "2026-02-28T09:00:00+00:00",
    }
    ended, begun = ledger.wait_until(at(2, 28))
    assert row(ended) == ("adjustment", -100, 0, 0, 0, 0)
    assert row(begun) == ("subscription_credit", 60, 0, 60, 0, 0)
    assert (ended.metadata["plan"], begun.metadata["plan"]) == ("pro", "min")


def test_toggling_plans_mints_nothing() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    for version, monthly_credits in enumerate([10, 100, 0, 100, 99, 100], start=2):
        assert rows(subscribe(ledger, version, monthly_credits)) == [("subscription_credit", 0, 0, 100, 0, 0)]
    assert rows(subscribe(ledger, 8, 101)) == [("subscription_credit", 1, 0, 101, 0, 0)]


def test_a_plan_raised_after_a_period_counts_from_that_periods_grant() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, 60)
    ledger.wait_until(at(2, 28))
    assert rows(subscribe(ledger, 3, 100)) == [("subscription_credit", 40, 0, 100, 0, 0)]


def test_a_new_rollover_limit_counts_at_the_next_period() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, rollover_limit=70)
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == [
        ("adjustment", -30, 0, 70, 0, 0),
        ("subscription_credit", 100, 0, 170, 0, 0),
    ]


# Versions


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_or_equal_version_is_ignored(version: int) -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 3)
    before = ledger.wallet, ledger.subscriptions["s1"]
    assert answer(unsubscribe(ledger, version)) == ("ignored", "stale_version")
    if version < 3:
        assert answer(subscribe(ledger, version, 500)) == ("ignored", "stale_version")
        again = subscribe(ledger, version, 500)
        assert (again.outcome, again.reason, again.duplicate) == ("ignored", "stale_version", True)
    assert (ledger.wallet, ledger.subscriptions["s1"]) == before


def test_the_same_version_again_is_a_duplicate_whatever_came_since() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, 150)
    unsubscribe(ledger, 3)
    for again in (subscribe(ledger), subscribe(ledger, 2, 150), unsubscribe(ledger, 3)):
        assert (again.outcome, again.reason, again.duplicate) == ("posted", None, True)


def test_the_versions_of_an_organizations_subscriptions_are_one_sequence() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 9)
    assert answer(subscribe(ledger, 8, subscription_id="s2")) == ("ignored", "stale_version")
    assert ledger.wallet.subscription_id == "s1"
    assert answer(subscribe(ledger, 10, subscription_id="s2")) == ("posted", None)
    assert ledger.wallet.subscription_id == "s2"


def test_a_subscription_keeps_its_anchor() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, anchor="2026-01-15T00:00:00Z")
    assert subscribe(ledger, 2, anchor="2026-01-16T00:00:00Z").refusal == Refusal(
        "conflict",
        "wallet.subscribe: s1 has its anchor at 2026-01-15T00:00:00+00:00, which cannot change; "
        "another anchor needs another subscription_id",
    )
    assert answer(subscribe(ledger, 2, anchor="2026-01-15T01:00:00+01:00")) == ("posted", None)
    assert answer(subscribe(ledger, 3)) == ("posted", None)
    assert ledger.subscriptions["s1"].anchor == at(1, 15, 0)


# Unsubscribing


def test_what_is_left_after_an_unsubscription_expires_when_the_period_ends() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, rollover_limit=500)
    use(ledger, 40)
    decision = unsubscribe(ledger, 2)
    assert (answer(decision), decision.events) == (("posted", None), ())
    assert ledger.send("workflow.start", workflow_id="w", credits=60, expires_in_s=60).outcome == "reserved"
    ledger.send("workflow.cancel", workflow_id="w")
    assert ledger.wait_until(at(2, 28, 8)) == []
    [event] = ledger.wait_until(at(2, 28))
    assert row(event) == ("adjustment", -60, 0, 0, 0, 40)
    assert event.idempotency_key == "subscription:s1:0/ended/5"
    assert (ledger.wallet.subscription_id, ledger.wallet.next_period_at) == (None, None)
    assert ledger.wait_until(at(1, 31, year=2030)) == []


def test_nothing_is_left_to_expire_when_all_was_used() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    use(ledger, 100)
    unsubscribe(ledger, 2)
    assert ledger.wait_until(at(2, 28)) == []
    assert ledger.wallet.subscription_id is None


def test_subscribing_again_within_the_period_grants_nothing_twice() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    use(ledger, 90)
    unsubscribe(ledger, 2)
    assert rows(subscribe(ledger, 3)) == []
    assert rows(subscribe(ledger, 4, 130)) == [("subscription_credit", 30, 0, 40, 0, 90)]
    assert [event.credits for event in ledger.wait_until(at(2, 28))] == [-40, 130]


def test_subscribing_again_after_the_period_counts_from_the_old_anchor() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    unsubscribe(ledger, 2)
    ledger.wait_until(at(3, 10))
    assert rows(subscribe(ledger, 3)) == [("subscription_credit", 100, 0, 100, 0, 0)]
    assert keys(ledger.events) == ["subscription:s1:0", "subscription:s1:0/ended/2", "subscription:s1:1"]
    assert ledger.wallet.next_period_at == at(3, 31)


def test_an_unsubscription_that_comes_first_undoes_the_older_subscription() -> None:
    ledger = MemoryLedger(NOW)
    decision = unsubscribe(ledger, 2)
    assert (answer(decision), decision.events) == (("ignored", "not_subscribed"), ())
    assert answer(subscribe(ledger, 1)) == ("ignored", "stale_version")
    assert ledger.wallet.subscription_id is None
    assert rows(subscribe(ledger, 3)) == [("subscription_credit", 100, 0, 100, 0, 0)]
    assert ledger.subscriptions["s1"].anchor == NOW


def test_a_subscription_undone_before_it_began_never_begins() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, anchor="2026-03-01T00:00:00Z")
    unsubscribe(ledger, 2)
    assert ledger.wait_until(at(6, 1)) == []
    assert (ledger.wallet.subscription_id, ledger.wallet.next_period_at) == (None, None)
    assert rows(subscribe(ledger, 3)) == [("subscription_credit", 100, 0, 100, 0, 0)]
    assert ledger.events[-1].idempotency_key == "subscription:s1:3"


# More than one subscription


def test_another_subscription_takes_the_place_of_the_first_whose_credits_end_with_their_period() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    use(ledger, 40)
    ledger.wait(days=5)
    assert rows(subscribe(ledger, 2, 300, subscription_id="s2", plan="max", rollover_limit=10)) == [
        ("subscription_credit", 300, 0, 360, 0, 0)
    ]
    [event] = ledger.wait_until(at(2, 28))
    assert (row(event), event.idempotency_key) == (("adjustment", -60, 0, 300, 0, 0), "subscription:s1:0/ended/4")
    assert (event.metadata["subscription_id"], event.metadata["plan"]) == ("s1", "pro")
    events = ledger.wait_until(at(3, 5))
    assert keys(events) == ["subscription:s2:0/ended/5", "subscription:s2:1"]
    assert [event.credits for event in events] == [-290, 300]


def test_going_back_and_forth_between_subscriptions_mints_nothing() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, 300, subscription_id="s2")
    use(ledger, 300)
    for version in (3, 5, 7):
        assert rows(subscribe(ledger, version)) == []
        assert ledger.wallet.subscription_id == "s1"
        assert rows(subscribe(ledger, version + 1, 300, subscription_id="s2")) == []
        assert ledger.wallet.subscription_id == "s2"
    assert ledger.wallet.available == 100


def test_going_back_after_some_periods_posts_only_the_one_of_now() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    ledger.wait(days=5)
    subscribe(ledger, 2, 300, subscription_id="s2")
    ledger.wait_until(at(4, 2))
    use(ledger, 300)
    assert rows(subscribe(ledger, 3)) == [("subscription_credit", 100, 0, 100, 0, 0)]
    assert ledger.events[-1].idempotency_key == "subscription:s1:2"
    assert ledger.wallet.next_period_at == at(4, 30)


def test_unsubscribing_what_was_replaced_leaves_the_other_alone() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, subscription_id="s2")
    wallet = ledger.wallet
    assert answer(unsubscribe(ledger, 3)) == ("ignored", "not_subscribed")
    assert ledger.wallet == wallet
    assert [event.credits for event in ledger.wait_until(at(2, 28))] == [-100, -100, 100]


def test_calling_off_what_is_scheduled_leaves_the_current_one_as_it_is() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, subscription_id="s2", anchor="2026-02-10T00:00:00Z")
    assert answer(unsubscribe(ledger, 3, "s2")) == ("posted", None)
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == [
        ("adjustment", -100, 0, 0, 0, 0),
        ("subscription_credit", 100, 0, 100, 0, 0),
    ]
    assert ledger.wallet.subscription_id == "s1"


def test_the_current_one_goes_on_until_the_one_that_is_scheduled_begins() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    subscribe(ledger, 2, subscription_id="s2", anchor="2026-04-10T00:00:00Z", rollover_limit=500)
    assert keys(ledger.wait_until(at(4, 9))) == [
        "subscription:s1:0/ended/2",
        "subscription:s1:1",
        "subscription:s1:1/ended/4",
        "subscription:s1:2",
    ]
    assert [row(event) for event in ledger.wait_until(at(4, 10))] == [("subscription_credit", 100, 0, 200, 0, 0)]
    assert keys(ledger.wait_until(at(4, 30))) == ["subscription:s1:2/ended/7"]
    assert [row(event) for event in ledger.wait_until(at(5, 10))] == [("subscription_credit", 100, 0, 200, 0, 0)]


def test_nothing_rolls_over_into_another_subscription() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, rollover_limit=500)
    subscribe(ledger, 2, subscription_id="s2", anchor="2026-02-10T00:00:00Z", rollover_limit=500)
    assert [row(event) for event in ledger.wait_until(at(2, 10))] == [("subscription_credit", 100, 0, 200, 0, 0)]
    assert [row(event) for event in ledger.wait_until(at(2, 28))] == [("adjustment", -100, 0, 100, 0, 0)]


def test_no_two_subscriptions_share_an_idempotency_key() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, 1, 10, subscription_id="s", anchor="2025-12-31T00:00:00Z")
    subscribe(ledger, 2, 20, subscription_id="s")
    subscribe(ledger, 3, 10, subscription_id="s:1", anchor="2025-11-30T00:00:00Z")
    ledger.wait_until(at(3, 10))
    assert len(set(keys(ledger.events))) == len(ledger.events) == 6


def test_no_message_says_what_only_the_ledger_says_of_a_subscription_credit() -> None:
    ledger = MemoryLedger(NOW)
    of_all = ("not_granted", "debt_settled", "reason", "period_start", "period_end", "plan", "subscription_id")
    of_changes = ("replaced_plan", "monthly_credits", "effective_at")
    claims = {**dict.fromkeys(of_all + of_changes, "mine"), "n": 1}
    [begun] = subscribe(ledger, 1, 100, metadata=claims).events
    assert begun.metadata == {
        "n": 1,
        "subscription_id": "s1",
        "plan": "pro",
        "period_start": "2026-01-31T09:00:00+00:00",
        "period_end": "2026-02-28T09:00:00+00:00",
    }
    [raised] = subscribe(ledger, 2, 150, metadata=claims).events
    assert raised.metadata == {"n": 1, "subscription_id": "s1", "plan": "pro", "reason": "plan_change"}


# Bounds


def test_a_full_wallet_takes_what_fits_and_says_what_did_not() -> None:
    ledger = MemoryLedger(NOW)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=MAX - 60)
    decision = subscribe(ledger)
    assert rows(decision) == [("subscription_credit", 60, MAX - 60, 60, 0, 0)]
    assert decision.events[0].metadata["not_granted"] == 40


def test_no_period_that_is_due_ever_sticks() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, monthly_credits=AMOUNT, rollover_limit=MAX)
    ledger.wallet = ledger.wallet._replace(subscription_balance=MAX)
    events = ledger.wait_until(at(3, 31))
    assert [row(event) for event in events] == [("subscription_credit", 0, 0, MAX, 0, 0)] * 2
    assert [event.metadata["not_granted"] for event in events] == [AMOUNT, AMOUNT]
    assert ledger.send("workflow.start", workflow_id="w1", credits=1).outcome == "reserved"


def test_a_full_subscription_balance_does_not_keep_a_debt_from_being_settled() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, monthly_credits=AMOUNT, rollover_limit=MAX)
    ledger.wallet = ledger.wallet._replace(subscription_balance=MAX, prepaid_balance=-500)
    [event] = ledger.wait_until(at(2, 28))
    assert row(event) == ("subscription_credit", 500, 0, MAX, 0, 0)
    assert (event.metadata["debt_settled"], event.metadata["not_granted"]) == (500, AMOUNT - 500)


def test_a_plan_raised_in_a_full_wallet_takes_what_fits() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=MAX - 130)
    decision = subscribe(ledger, 2, 200)
    assert rows(decision) == [("subscription_credit", 30, MAX - 130, 130, 0, 0)]
    assert decision.events[0].metadata["not_granted"] == 70


def test_nothing_is_taken_from_under_a_hold_when_the_last_period_ends() -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger, monthly_credits=AMOUNT)
    ledger.send("workflow.start", workflow_id="w1", credits=AMOUNT, expires_in_s=2_592_000)
    unsubscribe(ledger, 2)
    assert ledger.wait_until(at(2, 28)) == []
    assert (ledger.wallet.available, ledger.wallet.subscription_balance) == (0, AMOUNT)
    assert [row(event) for event in ledger.wait_until(at(3, 2))] == [
        ("reservation_released", AMOUNT, 0, AMOUNT, 0, 0),
        ("adjustment", -AMOUNT, 0, 0, 0, 0),
    ]


def test_periods_begin_only_for_the_wallets_own_subscription() -> None:
    other = Subscription("acme", "s2", 1, active=True, plan="pro", anchor=NOW)
    with pytest.raises(KeyError):
        rules.begin_due(Wallet("acme", subscription_id="s1", next_period_at=NOW), {"s2": other}, NOW)


@pytest.mark.parametrize("most_events", [0, 1, 2, 3, 100])
def test_periods_begun_a_few_at_a_time_are_the_same_as_all_at_once(most_events: int) -> None:
    ledger = MemoryLedger(NOW)
    subscribe(ledger)
    known, now = dict(ledger.subscriptions), at(12, 31)
    at_once = rules.begin_due(ledger.wallet, known, now)
    events: list[Event] = []
    wallet, steps = ledger.wallet, 0
    while wallet.is_due(now) and steps < 100:
        wallet, changed, begun = rules.begin_due(wallet, known, now, most_events=most_events)
        known |= {subscription.subscription_id: subscription for subscription in changed}
        assert len(begun) <= most_events + 1
        events += begun
        steps += 1
    if most_events == 0:
        assert (wallet, events) == (ledger.wallet, [])
    else:
        assert (wallet, tuple(known.values()), tuple(events)) == at_once
        assert len(events) > 10
