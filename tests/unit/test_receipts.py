"""What happened to the balance, in everyday words."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api_stub.receipts import more, outcome, standing, told, told_step
from holdfast_client.results import Reason, WorkflowState
from ledger.receipts import Receipt, Step
from ledger.state import EventType
from ledger.views import WorkflowView
from tests.memory import MemoryLedger

NOW = datetime(2026, 11, 24, 12, 2, tzinfo=UTC)
PLAN = {"subscription_id": "s", "plan": "Team", "monthly_credits": 5_000, "rollover_limit": 0}


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ("wallet.purchase", {"purchase_id": "ord-1", "credits": 5}, "Purchase · ord-1"),
        ("wallet.grant", {"grant_id": "g", "credits": 5}, "Grant · g"),
        ("wallet.grant", {"grant_id": "g", "credits": 5, "reason": "welcome"}, "Grant · welcome"),
        ("wallet.refund", {"refund_id": "r", "credits": 5}, "Refund · r"),
        (
            "wallet.refund",
            {"refund_id": "r", "credits": 5, "metadata": {"reason": "goodwill SUP-8821"}},
            "Refund · goodwill SUP-8821",
        ),
        ("wallet.refund", {"refund_id": "r", "credits": 5, "metadata": {"reason": 7}}, "Refund · r"),
        ("wallet.adjust", {"adjustment_id": "a", "credits": 5, "reason": "moved"}, "Adjustment · moved"),
        ("wallet.bill", {"billing_id": "b", "credits": 0, "invoice_id": "INV-2026-1201"}, "Invoice INV-2026-1201"),
        ("wallet.bill", {"billing_id": "b", "credits": 0}, "Billing · b"),
        ("wallet.subscribe", PLAN | {"version": 1}, "Plan Team · credits until 24 Dec 2026"),
        ("workflow.finish", {"workflow_id": "w", "credits": 5}, "Used"),
        ("workflow.start", {"workflow_id": "w", "credits": 0}, "Held"),
    ],
)
def test_an_event_is_told_in_everyday_words(task: str, fields: dict[str, Any], words: str) -> None:
    ledger = MemoryLedger(NOW)
    ledger.send(task, **fields)
    assert [told(event._asdict()) for event in ledger.events] == [words]


def test_a_plan_that_changes_and_credits_that_end_are_told() -> None:
    ledger = MemoryLedger(NOW)
    ledger.send("wallet.subscribe", **PLAN, version=1)
    ledger.send("wallet.subscribe", **PLAN | {"plan": "Big", "monthly_credits": 6_000}, version=2)
    ledger.send("wallet.purchase", purchase_id="ord-1", credits=70, expires_at="2026-11-25T00:00:00Z")
    ledger.send("wallet.reverse", reversal_id="x", purchase_id="ord-1", credits=20, reason="disputed")
    ledger.now = NOW + timedelta(days=31)
    ledger.catch_up()
    assert [told(event._asdict()) for event in ledger.events] == [
        "Plan Team · credits until 24 Dec 2026",
        "Plan changed to Big",
        "Purchase · ord-1",
        "Purchase ord-1 was disputed",
        "50 unused credits of purchase ord-1 ended",
        "6,000 unused credits of Big ended",
        "Plan Big · credits until 24 Jan 2027",
    ]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"plan": "Team"}, "Plan Team"),
        ({"plan": "Team", "period_end": "soon"}, "Plan Team"),
        ({"plan": "Team", "period_end": 7}, "Plan Team"),
    ],
)
def test_a_plan_of_an_older_version_is_told_without_its_end(metadata: dict[str, Any], words: str) -> None:
    assert told({"event_type": "subscription_credit", "metadata": metadata}) == words


def test_what_an_older_version_ended_is_told_without_the_plan() -> None:
    event = {"event_type": "adjustment", "credits": -35, "metadata": {"reason": "subscription_expired"}}
    assert told(event) == "35 unused credits of an earlier plan ended"


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("settled", "Returned"),
        ("cancelled", "Returned, as the run was cancelled"),
        ("failed", "Returned, as the run failed"),
        ("expired", "Returned, as the run did not end in time"),
    ],
)
def test_why_a_reservation_ended_is_told(reason: str, words: str) -> None:
    assert told_step(step("reservation_released", 5, reason)) == words


def test_what_is_told_already_is_not_told_again() -> None:
    metadata = {"reason": "crashed", "workflow_id": "w", "ticket": "SUP-9", "refund_id": "r"}
    assert more({"metadata": metadata}) == {"ticket": "SUP-9", "refund_id": "r"}


def step(event_type: EventType, credits: int, reason: str | None = None) -> Step:
    expires_at = "2026-11-25T12:02:00+00:00" if event_type == "reservation" else None
    return Step(1, NOW, event_type, "engine", "web", "Crawl", credits, reason, expires_at)


HELD, USED = step("reservation", -129), step("usage", -66)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([HELD], "holds 129 until 25 Nov 12:02"),
        ([HELD, step("reservation_released", 129, "settled"), USED], "used 66 of 129 held"),
        ([HELD, step("reservation_released", 129, "failed"), USED], "used 66 of 129 held"),
        ([USED], "used 66, nothing was held"),
        ([USED, step("refund", 4), step("refund", 2)], "used 66, nothing was held, 6 refunded"),
        ([HELD, step("reservation_released", 129, "cancelled")], "cancelled, 129 returned"),
        ([step("reservation", 0), step("reservation_released", 0, "expired")], "expired"),
    ],
)
def test_what_became_of_a_run_is_told_in_a_line(steps: list[Step], words: str) -> None:
    assert outcome(Receipt.of_run("w", steps, NOW), NOW, before=None) == words


def test_what_a_run_held_when_a_range_of_the_past_ended_is_told_as_past() -> None:
    receipt = Receipt.of_run("w", [HELD], NOW)
    assert outcome(receipt, NOW, before=NOW) == "still held 129 then"
    assert outcome(receipt, NOW, before=NOW + timedelta(seconds=1)) == "holds 129 until 25 Nov 12:02"


@pytest.mark.parametrize(
    ("state", "held", "used", "reason", "sentence"),
    [
        ("reserved", 129, None, None, "It holds 129 until it ends, until 24 Nov 2026 12:03:00 at the longest."),
        (
            "rejected",
            None,
            None,
            "insufficient_credits",
            "It was refused. It asked for 129, which was more than was available.",
        ),
        (
            "rejected",
            None,
            None,
            "period_cap",
            "It was refused. It asked for 129, which was more than the cap of the period allowed.",
        ),
        ("settled", 129, 66, None, "It used 66 of the 129 that were held for it."),
        ("settled", None, 66, None, "It used 66. Nothing was held for it."),
        ("settled", None, 66, "already_ended", "It used 66. Nothing was held for it."),
        (
            "settled",
            None,
            66,
            "insufficient_credits",
            "It used 66. Nothing was held for it. It asked for 129, which was more than was available.",
        ),
        ("cancelled", 129, None, None, "It was cancelled. The 129 that were held for it came back."),
        ("failed", None, None, None, "It failed. Nothing was held, and nothing was used."),
        ("expired", 129, None, None, "It did not end in time. The 129 that were held for it came back."),
    ],
)
def test_how_a_run_stands_is_told_in_sentences(
    state: WorkflowState, held: int | None, used: int | None, reason: Reason | None, sentence: str
) -> None:
    run = WorkflowView("w", state, None, None, 129, reason, held, NOW + timedelta(minutes=1), used, 0, False, [])
    assert standing(run, NOW) == sentence


def test_a_hold_whose_time_is_over_says_so() -> None:
    run = WorkflowView("w", "reserved", None, None, 129, None, 129, NOW, None, 0, False, [])
    assert standing(run, NOW) == "It holds 129. The time of its hold is over, so they come back with the next change."
