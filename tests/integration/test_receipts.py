"""The credit history by run: what each receipt says, in which order they come, and that they add up."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from ledger import history, receipts
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.receipts import Page, Place, Receipt
from ledger.store import Delivery, apply_batch
from tests.messages import delivery
from tests.support import another_past, sql


def acme(task: str, **fields: Any) -> Delivery:
    return delivery(task, org_id="acme", **fields)


def start(workflow_id: str, credits: int = 10, **fields: Any) -> Delivery:
    return acme("workflow.start", workflow_id=workflow_id, credits=credits, **fields)


def finish(workflow_id: str, credits: int = 10, **fields: Any) -> Delivery:
    return acme("workflow.finish", workflow_id=workflow_id, credits=credits, **fields)


def refund(refund_id: str, workflow_id: str | None, credits: int = 1) -> Delivery:
    return acme("wallet.refund", refund_id=refund_id, workflow_id=workflow_id, credits=credits)


def grant(grant_id: str, credits: int = 1) -> Delivery:
    return acme("wallet.grant", grant_id=grant_id, credits=credits)


PURCHASE = acme("wallet.purchase", purchase_id="p1", credits=1_000)


def page(engine: Engine, matching: EventFilter = EVERY_EVENT, *, limit: int = 100, place: Place | None = None) -> Page:
    with engine.connect() as connection:
        return receipts.page(connection, "acme", matching, limit=limit, place=place)


def pages(engine: Engine, matching: EventFilter = EVERY_EVENT, *, limit: int = 100) -> Iterator[list[Receipt]]:
    """Each page's receipts."""
    place = None
    while True:
        found = page(engine, matching, limit=limit, place=place)
        yield found.receipts
        if found.next is None:
            return
        place = Place.of(str(found.next))


def every(engine: Engine, matching: EventFilter = EVERY_EVENT, *, limit: int = 100) -> list[Receipt]:
    return [receipt for each in pages(engine, matching, limit=limit) for receipt in each]


def names(found: list[Receipt]) -> list[str]:
    """What each receipt is about: a workflow, or the type of an event."""
    return [receipt.workflow_id or str(receipt.event and receipt.event["event_type"]) for receipt in found]


def refund_as_before_0017(engine: Engine, refund_id: str, workflow_id: str, credits: int) -> None:
    """A refund whose event names its workflow only in its message."""
    apply_batch(engine, [refund(refund_id, workflow_id, credits)])
    named = "workflow_id = NULL, project_id = NULL, activity_name = NULL"
    with another_past(engine) as connection:
        older = text(f"UPDATE credit_events SET {named} WHERE idempotency_key = :key")
        connection.execute(older, {"key": f"refund:{refund_id}"})


def test_a_run_is_one_receipt_with_what_was_held_used_and_refunded(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            PURCHASE,
            start("w1", 129, project_id="churn", activity_name="Train"),
            finish("w1", 66),
            refund("r1", "w1", 6),
        ],
    )
    of_run, of_purchase = page(engine).receipts
    assert (of_run.workflow_id, of_run.event, of_run.state) == ("w1", None, "settled")
    assert (of_run.project_id, of_run.activity_name) == ("churn", "Train")
    assert (of_run.reserved_credits, of_run.used_credits, of_run.refunded_credits, of_run.credits) == (129, 66, 6, -60)
    assert [(step.seq, step.event_type, step.credits) for step in of_run.steps] == [
        (2, "reservation", -129),
        (3, "reservation_released", 129),
        (4, "usage", -66),
        (5, "refund", 6),
    ]
    assert (of_run.began_at, of_run.changed_at) == (of_run.steps[0].created_at, of_run.steps[-1].created_at)
    assert (of_run.placed_at, of_run.last_seq, of_run.expires_at) == (of_run.changed_at, 5, None)
    assert of_purchase.event is not None
    assert (of_purchase.event["seq"], of_purchase.credits, of_purchase.workflow_id) == (1, 1_000, None)


def test_a_run_says_how_it_stands(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            PURCHASE,
            start("open", 7),
            start("cancelled", 5),
            acme("workflow.cancel", workflow_id="cancelled"),
            start("failed", 5),
            acme("workflow.fail", workflow_id="failed"),
            start("late", 5),
            acme("workflow.fail", workflow_id="late"),
            finish("late", 3),
            finish("unreserved", 4),
            start("rejected", 100_000),
            start("rejected-and-finished", 100_000),
            finish("rejected-and-finished", 9),
        ],
    )
    found = {receipt.workflow_id: receipt for receipt in page(engine).receipts}
    said = {
        name: (of.state, of.reserved_credits, of.used_credits, of.credits, of.expires_at is not None)
        for name, of in found.items()
        if name is not None
    }
    assert said == {
        "open": ("reserved", 7, None, -7, True),
        "cancelled": ("cancelled", 5, None, 0, False),
        "failed": ("failed", 5, None, 0, False),
        "late": ("settled", 5, 3, -3, False),
        "unreserved": ("settled", None, 4, -4, False),
        "rejected-and-finished": ("settled", None, 9, -9, False),
    }


def test_what_belongs_to_no_run_is_a_receipt_of_its_own(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            PURCHASE,
            grant("g1"),
            refund("r1", None, 3),
            acme("wallet.adjust", adjustment_id="a1", credits=-4, reason="moved"),
            acme("wallet.bill", billing_id="b1", credits=0),
            acme("wallet.subscribe", subscription_id="s1", version=1, plan="Team", monthly_credits=200),
        ],
    )
    found = page(engine).receipts
    expected = ["subscription_credit", "billing", "adjustment", "refund", "grant", "prepaid_purchase"]
    assert names(found) == expected
    assert [receipt.refunded_credits for receipt in found] == [0, 0, 0, 3, 0, 0]


def test_a_refund_brings_its_run_back_to_the_top(engine: Engine) -> None:
    apply_batch(engine, [PURCHASE, finish("old"), finish("new"), grant("g1")])
    assert names(page(engine).receipts) == ["grant", "new", "old", "prepaid_purchase"]
    apply_batch(engine, [refund("r1", "old")])
    assert names(page(engine).receipts) == ["old", "grant", "new", "prepaid_purchase"]


def test_a_refund_that_only_its_message_ties_to_the_run_counts_there(engine: Engine) -> None:
    apply_batch(engine, [PURCHASE, finish("w1", 40, project_id="red"), grant("g1")])
    refund_as_before_0017(engine, "r1", "w1", 15)
    of_run, of_grant, of_purchase = page(engine).receipts
    assert names([of_run, of_grant, of_purchase]) == ["w1", "grant", "prepaid_purchase"]
    assert (of_run.refunded_credits, of_run.credits, of_run.project_id, of_run.last_seq) == (15, -25, "red", 4)
    assert names(page(engine, limit=1).receipts) == ["w1"]


@pytest.mark.parametrize(
    ("matching", "expected"),
    [
        (EventFilter(event_types=("refund",)), ["w1", "refund"]),
        (EventFilter(event_types=("reservation",)), ["w2", "w1"]),
        (EventFilter(event_types=("prepaid_purchase", "usage")), ["w1", "prepaid_purchase"]),
        (EventFilter(project_id="red"), ["w1"]),
        (EventFilter(project_id="red", event_types=("grant",)), []),
        (EventFilter(workflow_id="w1"), ["w1"]),
        (EventFilter(workflow_id="w1", event_types=("usage",)), ["w1"]),
        (EventFilter(workflow_id="nobody"), []),
        (EventFilter(created_before=datetime(2026, 1, 4, tzinfo=UTC)), ["w2", "w1", "prepaid_purchase"]),
        (EventFilter(created_from=datetime(2026, 1, 4, tzinfo=UTC)), ["w1", "refund"]),
    ],
)
def test_a_receipt_matches_if_one_of_its_events_does(
    engine: Engine, matching: EventFilter, expected: list[str]
) -> None:
    apply_batch(
        engine,
        [
            PURCHASE,  # 1 January
            start("w1", 20, project_id="red"),  # 2
            start("w2", 5),  # 3
            finish("w1", 10),  # 4 and 5
            refund("r1", None),  # 6
            refund("r2", "w1"),  # 7
        ],
    )
    with another_past(engine) as connection:
        connection.execute(text("UPDATE credit_events SET created_at = to_timestamp(1767182400 + seq * 86400)"))
    assert names(every(engine, matching)) == expected
    assert names(every(engine, matching, limit=1)) == expected


def test_with_an_end_of_the_range_receipts_are_as_they_were_then(engine: Engine) -> None:
    apply_batch(engine, [PURCHASE, start("w1", 20)])
    [(moment,)] = sql(engine, "SELECT max(created_at) FROM credit_events")
    apply_batch(engine, [finish("w1", 8)])
    then, _ = page(engine, EventFilter(created_before=moment + timedelta(microseconds=1))).receipts
    assert (then.state, then.credits, then.used_credits) == ("reserved", -20, None)
    now, _ = page(engine).receipts
    assert (now.state, now.credits, now.used_credits) == ("settled", -8, 8)


def test_pages_are_of_one_moment_while_events_are_added(engine: Engine) -> None:
    apply_batch(engine, [PURCHASE, *(start(f"w{number}", 10) for number in range(9))])
    seen: list[Receipt] = []
    for number, each in enumerate(pages(engine, limit=2)):
        seen += each
        # The next run that a page would show changes now, and there is a new one.
        apply_batch(engine, [finish(f"w{8 - 2 * (number + 1)}", 4), start(f"new{number}", 1)])
    assert names(seen) == [*(f"w{number}" for number in range(8, -1, -1)), "prepaid_purchase"]
    assert [receipt.credits for receipt in seen] == [-10] * 9 + [1_000]


def test_a_run_whose_events_are_on_both_sides_of_a_border_is_on_one_page(engine: Engine) -> None:
    steps = [step for number in range(5) for step in (start(f"w{number}"), grant(f"g{number}"))]
    apply_batch(engine, [PURCHASE, *steps, *(finish(f"w{number}", number) for number in range(5))])
    expected = [*(f"w{number}" for number in range(4, -1, -1)), *["grant"] * 5, "prepaid_purchase"]
    for limit in range(1, 12):
        assert names(every(engine, limit=limit)) == expected, limit


def test_thousands_of_refunds_of_one_run_are_in_one_receipt(engine: Engine) -> None:
    apply_batch(engine, [PURCHASE, finish("before", 1), finish("w1", 5_000)])
    for first in range(0, 3_000, 500):
        apply_batch(engine, [refund(f"r{number}", "w1") for number in range(first, first + 500)])
    of_run, *others = every(engine, limit=1)
    assert (of_run.refunded_credits, of_run.credits, len(of_run.steps)) == (3_000, -2_000, 3_001)
    assert names(others) == ["before", "prepaid_purchase"]


def test_a_page_that_finds_too_little_is_shorter_and_leads_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "MOST_EVENTS", 8)
    runs = [f"w{number}" for number in range(20)]
    apply_batch(
        engine, [PURCHASE, *(start(run) for run in runs), *(acme("workflow.cancel", workflow_id=r) for r in runs)]
    )
    found = list(pages(engine, limit=5))
    assert [len(each) for each in found].count(0) >= 2
    assert names([receipt for each in found for receipt in each]) == [*reversed(runs), "prepaid_purchase"]


@pytest.mark.parametrize("workflow_id", [".", "..", "a:b", "-", "start:w", "Z09_.:-" + "x" * 121])
def test_odd_but_legal_ids_have_their_receipts(engine: Engine, workflow_id: str) -> None:
    apply_batch(engine, [PURCHASE, start(workflow_id), finish(workflow_id, 3), refund("r1", workflow_id), start("w")])
    other, of_run, _ = page(engine).receipts
    assert (other.workflow_id, other.credits) == ("w", -10)
    assert (of_run.workflow_id, of_run.credits, len(of_run.steps)) == (workflow_id, -2, 4)


def test_an_unknown_organization_has_no_receipts(engine: Engine) -> None:
    apply_batch(engine, [delivery("wallet.grant", org_id="other", grant_id="g1", credits=1)])
    assert page(engine) == Page([], 0, 0, None, None)


def test_a_page_has_at_most_a_hundred(engine: Engine) -> None:
    apply_batch(engine, [grant(f"g{number}") for number in range(101)])
    assert [len(each) for each in pages(engine)] == [100, 1]
    for limit in (0, 101):
        with pytest.raises(AssertionError):
            page(engine, limit=limit)


@pytest.mark.parametrize("text", ["", "7", "7-", "-7", "7-3-1", "a-b", "٣-1", f"{10**17}-1"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be the next_cursor of a page that is grouped by workflow"):
        Place.of(text)


# Many histories, against the same told in another way.


def random_messages(chance: random.Random, number: int) -> list[Delivery]:
    """A batch in which runs begin, end, fail and are refunded in any order, and other things happen."""
    run = f"w{chance.randrange(12)}"
    return chance.choices(
        [
            start(run, chance.choice([0, 5, 60])),
            finish(run, chance.choice([0, 4, 90])),
            acme("workflow.cancel", workflow_id=run),
            acme("workflow.fail", workflow_id=run),
            refund(f"r{number}", run, chance.choice([1, 2])),
            refund(f"s{number}", None),
            grant(f"g{number}", 30),
            acme("wallet.bill", billing_id=f"b{number}", credits=0),
        ],
        k=3,
    )


def told_naively(engine: Engine) -> list[tuple[str, int, int]]:
    """Each receipt's workflow or event number, its credits and its last event, newest first."""
    with engine.connect() as connection:
        told: dict[str, tuple[str, int, int]] = {}
        for event in reversed(history.events(connection, "acme", limit=100).events):
            name = event["workflow_id"] or event["metadata"].get("workflow_id") or str(event["seq"])
            before = told.get(name, (name, 0, 0))
            told[name] = (name, before[1] + event["credits"], event["seq"])
    return sorted(told.values(), key=lambda each: -each[2])


@pytest.mark.parametrize("seed", range(6))
def test_receipts_are_the_whole_history_and_add_up(engine: Engine, seed: int) -> None:
    chance = random.Random(seed)
    apply_batch(engine, [acme("wallet.purchase", purchase_id="p1", credits=100)])
    for number in range(25):
        apply_batch(engine, random_messages(chance, number))
        settled = sql(engine, "SELECT workflow_id FROM workflows WHERE finish_credits - refunded >= 2 ORDER BY 1")
        if settled and number % 3 == 0:
            refund_as_before_0017(engine, f"old{number}", chance.choice(settled)[0], 2)
    limit = chance.randrange(1, 8)
    found = every(engine, limit=limit)
    said = [(each.workflow_id or str(each.last_seq), each.credits, each.last_seq) for each in found]
    assert said == told_naively(engine)
    [(available,)] = sql(engine, "SELECT prepaid_balance + subscription_balance - reserved FROM wallets")
    assert sum(each.credits for each in found) == available
    states = dict(sql(engine, "SELECT workflow_id, state FROM workflows"))
    assert all(each.state == states[each.workflow_id] for each in found if each.workflow_id)
