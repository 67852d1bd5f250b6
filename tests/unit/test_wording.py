"""How amounts, times and names are written."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from docs.generate_messages import EVENTS
from ledger.state import EventType
from ledger.wording import NAMES, amount, change, clock, counted, day, during, facts, label, near_day, share


def test_amounts_have_separators_and_a_true_minus_sign() -> None:
    assert [amount(number) for number in (12_345, 0, -12_345)] == ["12,345", "0", "−12,345"]
    assert [change(number) for number in (12_345, 0, -12_345)] == ["+12,345", "0", "−12,345"]


def test_one_of_a_thing_is_not_several() -> None:
    assert [counted(number, "wallet") for number in (0, 1, 2_000)] == ["0 wallets", "1 wallet", "2,000 wallets"]


def test_a_share_is_a_whole_percentage_and_never_nothing_of_something() -> None:
    assert [share(part, 1_000) for part in (0, 4, 6, 426, 1_000)] == ["0 %", "<1 %", "1 %", "43 %", "100 %"]


def test_days_and_times_are_those_of_utc() -> None:
    late = datetime(2025, 12, 31, 23, 30, 5, tzinfo=timezone(-timedelta(hours=1)))
    assert (day(late), clock(late)) == ("1 Jan 2026", "00:30:05")


def test_a_day_of_the_same_year_needs_no_year() -> None:
    now = datetime(2026, 11, 26, tzinfo=UTC)
    days = [near_day(moment, now) for moment in (datetime(2026, 1, 2, tzinfo=UTC), datetime(2027, 1, 2, tzinfo=UTC))]
    assert days == ["2 Jan", "2 Jan 2027"]


def test_a_range_of_days_ends_with_its_last_day() -> None:
    tenth, twentieth = datetime(2026, 11, 10, tzinfo=UTC), datetime(2026, 11, 20, tzinfo=UTC)
    end = twentieth + timedelta(days=1)
    assert during(tenth, end) == "10 Nov 2026 – 20 Nov 2026"
    assert during(twentieth, end) == "20 Nov 2026"
    assert (during(None, end), during(tenth, None), during(None, None)) == (
        "until 20 Nov 2026",
        "from 10 Nov 2026",
        "all time",
    )
    noon = timedelta(hours=12)
    assert during(tenth + noon, twentieth + noon) == "10 Nov 2026 12:00:00 – 20 Nov 2026 12:00:00"


def test_a_name_becomes_words() -> None:
    assert label("prepaid_purchase") == "Prepaid purchase"


def said(event_type: EventType, source: str = "billing", **metadata: Any) -> str:
    return " · ".join(str(fact) for fact in facts(event_type, metadata, source))


def test_every_key_that_the_ledger_writes_has_words() -> None:
    assert {event_type: set(own) for event_type, (_, _, own) in EVENTS.items()} == {
        event_type: set(names) for event_type, names in NAMES.items()
    }


LATER = "2026-12-17T09:05:33.081662+00:00"


@pytest.mark.parametrize(
    ("event_type", "metadata", "words"),
    [
        ("reservation", {"expires_at": LATER}, "Held until 17 Dec 2026 09:05"),
        ("reservation_released", {"reason": "settled"}, "The run finished"),
        (
            "reservation_released",
            {"given_reason": "out of memory", "reason": "failed"},
            "The run failed · Reason: out of memory",
        ),
        ("reservation_released", {"reason": "cancelled"}, "The run was cancelled"),
        ("reservation_released", {"reason": "expired"}, "The run never ended, so the reservation expired"),
        ("reservation_released", {"reason": "another"}, "Run ended: another"),
        (
            "usage",
            {"paid_by": {"subscription": 1_250, "ending": 4, "prepaid": 2}},
            "Paid by plan 1,250, credits with an end 4, prepaid 2",
        ),
        ("usage", {"overrun": 1_212, "not_charged": 3}, "More than there was: 1,212 · Not charged: 3"),
        ("usage", {"unreserved": True}, "Nothing was reserved"),
        ("usage", {"unreserved": False}, "Without a reservation: false"),
        (
            "subscription_credit",
            {"plan": "Team", "period_start": "2026-11-17T00:00:00+00:00", "period_end": LATER, "subscription_id": "s1"},
            "Plan Team · Period 17 Nov 2026 – 17 Dec 2026 · Subscription s1",
        ),
        ("subscription_credit", {"period_start": 1, "period_end": 2}, "Begins 1"),
        ("subscription_credit", {"period_end": LATER}, "Ends 17 Dec 2026 09:05"),
        (
            "subscription_credit",
            {"reason": "plan_change", "plan": "Pro", "replaced_plan": "Team"},
            "The plan was changed · Plan Pro · Before: Team",
        ),
        (
            "subscription_credit",
            {"monthly_credits": 200, "effective_at": LATER, "debt_settled": 500, "not_granted": 7},
            "A month: 200 · From 17 Dec 2026 09:05 · Settled a debt of 500 · Not granted: 7",
        ),
        (
            "prepaid_purchase",
            {"purchase_id": "order-1", "expires_at": LATER},
            "Ends 17 Dec 2026 09:05 · Purchase order-1",
        ),
        (
            "grant",
            {"grant_id": "g1", "reason": "welcome", "by": "ann"},
            "Reason: welcome · By, as its sender says: ann · Grant g1",
        ),
        (
            "refund",
            {"refund_id": "r1", "workflow_id": "w1", "ending": [{"credits": 1_120, "expires_at": LATER}]},
            "Run w1 · Ends: 1,120 on 17 Dec 2026 · Refund r1",
        ),
        (
            "adjustment",
            {"reason": "subscription_expired", "plan": "Team", "subscription_id": "s1", "expires_at": LATER},
            "Unused credits of the plan ended · Plan Team · Ended 17 Dec 2026 09:05 · Subscription s1",
        ),
        ("adjustment", {"reason": "grant_expired", "grant_id": "g1"}, "Credits of a grant ended · Grant g1"),
        ("adjustment", {"reason": "purchase_expired"}, "Credits of a purchase ended"),
        ("adjustment", {"reason": "refund_expired"}, "Credits of a refund ended"),
        (
            "adjustment",
            {"reason": "counted twice", "adjustment_id": "a1", "from_ending": 5},
            "Reason: counted twice · Of them with an end: 5 · Correction a1",
        ),
        (
            "billing",
            {"billing_id": "b1", "invoice_id": "INV-1", "description": "Priority support"},
            "Invoice INV-1 · Priority support · Entry b1",
        ),
        (
            "billing",
            {"reversal_id": "v1", "purchase_id": "p1", "reason": "disputed"},
            "The payment was disputed · Reversal v1 · Purchase p1",
        ),
        ("billing", {"reason": "refunded"}, "The payment was refunded"),
    ],
)  # fmt: skip
def test_what_the_ledger_writes_is_said_in_words(event_type: EventType, metadata: dict[str, Any], words: str) -> None:
    assert said(event_type, **metadata) == words


def test_what_only_the_sender_knows_stays_as_it_is() -> None:
    assert said("refund", reason="goodwill", ticket="SUP-8821") == "Reason: goodwill · ticket SUP-8821"
    assert said("usage", occurred_at=LATER, region="eu") == "Happened 17 Dec 2026 09:05 · region eu"
    assert said("usage", until="2026-02-31T00:00:00+00:00") == "until 2026-02-31T00:00:00+00:00"
    assert said("usage", expires_at=LATER) == "expires_at 17 Dec 2026 09:05"
    assert said("usage", parts={"a": 1, "b": None}, list=[1, {"c": "d"}], on=True) == (
        'parts a 1, b null · list [1,{"c":"d"}] · on true'
    )


def test_only_an_operator_is_named_as_the_one_who_did_it() -> None:
    assert said("grant", "operator", by="olga") == "By olga"
    assert said("grant", "billing", by="olga") == "By, as its sender says: olga"


@pytest.mark.parametrize("event_type", NAMES)
@pytest.mark.parametrize("value", [None, True, -3, 1.5, "", "x", [], {}, [{"credits": 1}], {"a": {"b": []}}])
def test_whatever_a_sender_gives_is_said(event_type: EventType, value: Any) -> None:
    keys = {"reason", "description", "by", "paid_by", "period_start", "expires_at", "x"}
    assert len(facts(event_type, dict.fromkeys(keys, value), "billing")) == len(keys)
