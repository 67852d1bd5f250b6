"""The wallet's own messages: what they post, what they refuse, and how they answer when they come again."""

from datetime import UTC, datetime
from typing import Any

import pytest

from ledger.state import Event, Refusal
from tests.memory import MemoryLedger, rows

NOW = datetime(2026, 1, 31, 9, tzinfo=UTC)
MAX = 9_007_199_254_740_991
AMOUNT = 1_000_000_000_000
"""The most credits that one message moves."""


def ledger_with(prepaid: int = 100) -> MemoryLedger:
    ledger = MemoryLedger(NOW)
    ledger.send("wallet.purchase", purchase_id="p1", credits=prepaid)
    return ledger


def refusal(ledger: MemoryLedger, task: str, **fields: Any) -> Refusal:
    """Why the message is refused; that it changed nothing is asserted too."""
    wallet, events, posted = ledger.wallet, list(ledger.events), dict(ledger.posted)
    decision = ledger.send(task, **fields)
    assert decision.refusal is not None, decision
    assert (ledger.wallet, ledger.events, ledger.posted) == (wallet, events, posted)
    return decision.refusal


# On a wallet of 100 prepaid and 20 subscription credits, 10 of them reserved, 5 used before
POSTED: list[tuple[str, dict[str, Any], str, int, int, str, str, dict[str, Any]]] = [
    # task, fields, event type, credits, prepaid afterwards, source, key, the ledger's own metadata
    (
        "wallet.purchase",
        {"purchase_id": "x1", "credits": 7},
        "prepaid_purchase",
        7,
        107,
        "billing",
        "purchase:x1",
        {"purchase_id": "x1"},
    ),
    ("wallet.grant", {"grant_id": "x1", "credits": 7}, "grant", 7, 107, "admin", "grant:x1", {"grant_id": "x1"}),
    (
        "wallet.grant",
        {"grant_id": "x1", "credits": 7, "reason": "welcome"},
        "grant",
        7,
        107,
        "admin",
        "grant:x1",
        {"grant_id": "x1", "reason": "welcome"},
    ),
    (
        "wallet.adjust",
        {"adjustment_id": "x1", "credits": 7, "reason": "typo"},
        "adjustment",
        7,
        107,
        "admin",
        "adjustment:x1",
        {"adjustment_id": "x1", "reason": "typo"},
    ),
    (
        "wallet.adjust",
        {"adjustment_id": "x1", "credits": -100, "reason": "typo"},
        "adjustment",
        -100,
        0,
        "admin",
        "adjustment:x1",
        {"adjustment_id": "x1", "reason": "typo"},
    ),
    (
        "wallet.adjust",
        {"adjustment_id": "x1", "credits": -101, "reason": "fraud", "allow_negative": True},
        "adjustment",
        -101,
        -1,
        "admin",
        "adjustment:x1",
        {"adjustment_id": "x1", "reason": "fraud"},
    ),
    ("wallet.refund", {"refund_id": "x1", "credits": 7}, "refund", 7, 107, "billing", "refund:x1", {"refund_id": "x1"}),
    (
        "wallet.refund",
        {"refund_id": "x1", "credits": 5, "workflow_id": "used"},
        "refund",
        5,
        105,
        "billing",
        "refund:x1",
        {
            "refund_id": "x1",
            "workflow_id": "used",
            "ending": [{"credits": 5, "expires_at": "2026-03-02T09:00:00+00:00"}],
        },
    ),
    (
        "wallet.bill",
        {"billing_id": "x1", "credits": 0, "invoice_id": "i1"},
        "billing",
        0,
        100,
        "billing",
        "billing:x1",
        {"billing_id": "x1", "invoice_id": "i1"},
    ),
    (
        "wallet.bill",
        {"billing_id": "x1", "credits": 7},
        "billing",
        7,
        107,
        "billing",
        "billing:x1",
        {"billing_id": "x1"},
    ),
    (
        "wallet.bill",
        {"billing_id": "x1", "credits": -100},
        "billing",
        -100,
        0,
        "billing",
        "billing:x1",
        {"billing_id": "x1"},
    ),
    (
        "wallet.reverse",
        {"reversal_id": "x1", "purchase_id": "p1", "reason": "disputed"},
        "billing",
        -100,
        0,
        "billing",
        "reversal:x1",
        {"reversal_id": "x1", "purchase_id": "p1", "reason": "disputed"},
    ),
]


def busy_ledger() -> MemoryLedger:
    ledger = MemoryLedger(NOW)
    ledger.send("wallet.subscribe", subscription_id="s1", version=1, plan="pro", monthly_credits=25)
    ledger.send("workflow.finish", workflow_id="used", credits=5)
    ledger.send("wallet.purchase", purchase_id="p1", credits=100)
    ledger.send("workflow.start", workflow_id="held", credits=10)
    return ledger


@pytest.mark.parametrize(("task", "fields", "event_type", "credits", "prepaid", "source", "key", "own"), POSTED)
def test_a_wallet_message_posts_one_event_to_the_prepaid_balance(
    task: str,
    fields: dict[str, Any],
    event_type: Any,
    credits: int,
    prepaid: int,
    source: str,
    key: str,
    own: dict[str, Any],
) -> None:
    ledger = busy_ledger()
    decision = ledger.send(task, **fields)
    assert (decision.outcome, decision.reason, decision.duplicate, decision.refusal) == ("posted", None, False, None)
    assert decision.events == (
        Event(
            org_id="acme",
            seq=5,
            created_at=NOW,
            event_type=event_type,
            source=source,
            workflow_id=fields.get("workflow_id"),
            project_id=None,
            activity_name=None,
            credits=credits,
            prepaid_balance_after=prepaid,
            subscription_balance_after=20,
            reserved_after=10,
            period_usage_after=5,
            idempotency_key=key,
            metadata=own,
        ),
    )
    assert ledger.wallet.last_seq == 5


def test_the_event_of_a_refund_has_the_columns_of_its_workflow() -> None:
    ledger = MemoryLedger(NOW)
    ledger.send("workflow.finish", workflow_id="run-1", credits=5, project_id="web", activity_name="Crawl")
    [named] = ledger.send("wallet.refund", refund_id="r1", credits=2, workflow_id="run-1").events
    assert (named.workflow_id, named.project_id, named.activity_name) == ("run-1", "web", "Crawl")
    [other] = ledger.send("wallet.refund", refund_id="r2", credits=2, metadata={"workflow_id": "run-1"}).events
    assert (other.workflow_id, other.project_id, other.activity_name) == (None, None, None)


@pytest.mark.parametrize(("task", "fields", "event_type", "credits", "prepaid", "source", "key", "own"), POSTED)
def test_the_messages_metadata_is_kept_under_the_ledgers_own(
    task: str,
    fields: dict[str, Any],
    event_type: Any,
    credits: int,
    prepaid: int,
    source: str,
    key: str,
    own: dict[str, Any],
) -> None:
    metadata = {**dict.fromkeys(own, "mine"), "note": "ü"}
    [event] = (
        busy_ledger()
        .send(task, **fields, source="import", occurred_at="2026-01-01T00:00:00Z", metadata=metadata)
        .events
    )
    assert event.source == "import"
    assert event.metadata == {"note": "ü", **own, "occurred_at": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(("task", "fields", "event_type", "credits", "prepaid", "source", "key", "own"), POSTED)
def test_a_wallet_message_that_comes_again_is_a_duplicate(
    task: str,
    fields: dict[str, Any],
    event_type: Any,
    credits: int,
    prepaid: int,
    source: str,
    key: str,
    own: dict[str, Any],
) -> None:
    ledger = busy_ledger()
    ledger.send(task, **fields)
    for carried in ({}, {"source": "other", "occurred_at": "2026-01-01T00:00:00Z", "metadata": {"n": 1}}):
        again = ledger.send(task, **fields, **carried)
        assert (again.outcome, again.reason, again.duplicate, again.refusal) == ("posted", None, True, None)
    assert ledger.wallet.prepaid_balance == prepaid


def test_the_same_id_of_another_kind_is_another_message() -> None:
    ledger = ledger_with(1)
    ledger.send("wallet.grant", grant_id="p1", credits=2)
    ledger.send("wallet.refund", refund_id="p1", credits=4)
    ledger.send("wallet.bill", billing_id="p1", credits=8)
    ledger.send("wallet.adjust", adjustment_id="p1", credits=16, reason="typo")
    ledger.send("workflow.finish", workflow_id="p1", credits=32)
    assert ledger.wallet.prepaid_balance == -1
    assert [event.seq for event in ledger.events] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("task", "first", "again", "error"),
    [
        (
            "wallet.purchase",
            {"purchase_id": "x1", "credits": 5},
            {"credits": 6},
            "x1 was applied with credits 5, so this message contradicts it",
        ),
        (
            "wallet.grant",
            {"grant_id": "x1", "credits": 5, "reason": "welcome"},
            {"reason": "sorry"},
            'x1 was applied with reason "welcome", so this message contradicts it',
        ),
        (
            "wallet.adjust",
            {"adjustment_id": "x1", "credits": 5, "reason": "typo"},
            {"credits": 6, "reason": "other"},
            'x1 was applied with credits 5, reason "typo", so this message contradicts it',
        ),
        (
            "wallet.refund",
            {"refund_id": "x1", "credits": 5},
            {"credits": 7},
            "x1 was applied with credits 5, so this message contradicts it",
        ),
        (
            "wallet.bill",
            {"billing_id": "x1", "credits": 0, "invoice_id": "i1"},
            {"invoice_id": "i2"},
            'x1 was applied with invoice_id "i1", so this message contradicts it',
        ),
        (
            "wallet.purchase",
            {"purchase_id": "x1", "credits": 5, "expires_at": "2026-12-31T01:00:00+01:00"},
            {"expires_at": "2027-12-31T00:00:00Z"},
            'x1 was applied with expires_at "2026-12-31T00:00:00Z", so this message contradicts it',
        ),
        (
            "wallet.reverse",
            {"reversal_id": "x1", "purchase_id": "p1", "reason": "disputed"},
            {"credits": 50, "reason": "refunded"},
            'x1 was applied with credits null, reason "disputed", so this message contradicts it',
        ),
        (
            "wallet.subscribe",
            {"subscription_id": "x1", "version": 1, "plan": "pro", "monthly_credits": 5},
            {"plan": "max", "monthly_credits": 9},
            'x1:1 was applied with plan "pro", monthly_credits 5, so this message contradicts it',
        ),
        (
            "wallet.configure",
            {"version": 1, "credit_limit": 5},
            {"credit_limit": 6},
            "1 was applied with credit_limit 5, so this message contradicts it",
        ),
    ],
)
def test_the_same_id_with_other_fields_is_a_conflict_that_names_them(
    task: str, first: dict[str, Any], again: dict[str, Any], error: str
) -> None:
    ledger = ledger_with(100)
    ledger.send(task, **first)
    assert refusal(ledger, task, **{**first, **again}) == Refusal("conflict", f"{task}: {error}")
    assert ledger.send(task, **first).duplicate


# Below zero


@pytest.mark.parametrize(("task", "id_field"), [("wallet.adjust", "adjustment_id"), ("wallet.bill", "billing_id")])
def test_nobody_takes_more_than_there_is(task: str, id_field: str) -> None:
    ledger = busy_ledger()
    fields = {id_field: "x1", "credits": -101, **({"reason": "typo"} if task == "wallet.adjust" else {})}
    assert refusal(ledger, task, **fields) == Refusal(
        "insufficient_credits", f"{task}: -101 would take the prepaid balance, 100, below zero"
    )
    ledger.send("wallet.purchase", purchase_id="p2", credits=1)
    assert ledger.send(task, **fields).outcome == "posted"
    assert ledger.wallet.prepaid_balance == 0


def test_what_is_below_zero_may_rise_but_not_sink() -> None:
    ledger = ledger_with(10)
    ledger.send("workflow.finish", workflow_id="w1", credits=30)
    assert refusal(ledger, "wallet.bill", billing_id="b1", credits=-1) == Refusal(
        "insufficient_credits", "wallet.bill: -1 would take the prepaid balance, -20, below zero"
    )
    ledger.send("wallet.bill", billing_id="b2", credits=0)
    ledger.send("wallet.adjust", adjustment_id="a1", credits=5, reason="typo")
    ledger.send("wallet.adjust", adjustment_id="a2", credits=-5, reason="typo", allow_negative=True)
    assert ledger.wallet.prepaid_balance == -20
    assert ledger.send("workflow.start", workflow_id="w2", credits=0).reason == "insufficient_credits"


@pytest.mark.parametrize(("task", "id_field"), [("wallet.adjust", "adjustment_id"), ("wallet.bill", "billing_id")])
def test_nobody_takes_what_a_workflow_holds(task: str, id_field: str) -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.start", workflow_id="w1", credits=90)
    fields = {id_field: "x1", "credits": -11, **({"reason": "typo"} if task == "wallet.adjust" else {})}
    assert refusal(ledger, task, **fields) == Refusal(
        "insufficient_credits", f"{task}: -11 would take what is available, 10, below zero"
    )
    ledger.send("workflow.finish", workflow_id="w1", credits=89)
    assert ledger.send(task, **fields).outcome == "posted"
    assert ledger.wallet.available == 0


# Reversals


def test_reversals_of_a_purchase_never_exceed_it() -> None:
    ledger = ledger_with(100)
    dispute = {"purchase_id": "p1", "reason": "disputed"}
    assert rows(ledger.send("wallet.reverse", reversal_id="r1", credits=30, **dispute)) == [
        ("billing", -30, 70, 0, 0, 0)
    ]
    assert refusal(ledger, "wallet.reverse", reversal_id="r2", credits=71, **dispute) == Refusal(
        "reversal_exceeds_purchase",
        "wallet.reverse: purchase p1 brought 100 credits and 30 of them were reversed already, "
        "so 71 cannot be reversed",
    )
    assert rows(ledger.send("wallet.reverse", reversal_id="r3", **dispute)) == [("billing", -70, 0, 0, 0, 0)]
    assert refusal(ledger, "wallet.reverse", reversal_id="r4", **dispute) == Refusal(
        "reversal_exceeds_purchase",
        "wallet.reverse: purchase p1 brought 100 credits and 100 of them were reversed already, so nothing is left",
    )
    assert ledger.send("wallet.reverse", reversal_id="r1", credits=30, **dispute).duplicate
    assert ledger.send("wallet.reverse", reversal_id="r3", **dispute).duplicate


def test_a_reversal_waits_as_a_dead_letter_for_its_purchase() -> None:
    ledger = ledger_with(100)
    reversal = {"reversal_id": "r1", "purchase_id": "p2", "reason": "refunded"}
    assert refusal(ledger, "wallet.reverse", **reversal) == Refusal(
        "unknown_purchase",
        "wallet.reverse: there is no purchase p2; if it is still to come, replay this after it",
    )
    ledger.send("wallet.purchase", purchase_id="p2", credits=40)
    assert rows(ledger.send("wallet.reverse", **reversal)) == [("billing", -40, 100, 0, 0, 0)]


def test_what_was_used_and_is_reversed_is_a_debt() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.finish", workflow_id="w1", credits=60)
    ledger.send("workflow.start", workflow_id="w2", credits=40)
    ledger.send("wallet.reverse", reversal_id="r1", purchase_id="p1", reason="refunded")
    assert (ledger.wallet.prepaid_balance, ledger.wallet.available) == (-60, -100)
    assert ledger.send("workflow.start", workflow_id="w3", credits=0).reason == "insufficient_credits"


# Refunds


def test_refunds_of_a_workflow_never_exceed_what_it_used() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.finish", workflow_id="w1", credits=30)
    assert ledger.send("wallet.refund", refund_id="r1", credits=20, workflow_id="w1").outcome == "posted"
    assert refusal(ledger, "wallet.refund", refund_id="r2", credits=11, workflow_id="w1") == Refusal(
        "refund_exceeds_usage",
        "wallet.refund: workflow w1 used 30 credits and 20 of them were refunded already, so 11 cannot be",
    )
    assert ledger.send("wallet.refund", refund_id="r3", credits=10, workflow_id="w1").outcome == "posted"
    assert refusal(ledger, "wallet.refund", refund_id="r4", credits=1, workflow_id="w1").code == "refund_exceeds_usage"
    assert ledger.send("wallet.refund", refund_id="r1", credits=20, workflow_id="w1").duplicate
    assert (ledger.wallet.prepaid_balance, ledger.workflows["w1"].refunded) == (100, 30)


@pytest.mark.parametrize("step", [None, "workflow.start", "workflow.cancel"])
def test_a_workflow_that_used_nothing_has_nothing_to_refund(step: str | None) -> None:
    ledger = ledger_with(100)
    if step is not None:
        ledger.send(step, workflow_id="w1", **({"credits": 10} if step == "workflow.start" else {}))
    assert refusal(ledger, "wallet.refund", refund_id="r1", credits=1, workflow_id="w1") == Refusal(
        "refund_exceeds_usage",
        "wallet.refund: workflow w1 used 0 credits and 0 of them were refunded already, so 1 cannot be",
    )


def test_a_refund_of_no_workflow_has_no_such_bound() -> None:
    ledger = ledger_with(1)
    assert rows(ledger.send("wallet.refund", refund_id="r1", credits=500)) == [("refund", 500, 501, 0, 0, 0)]


def test_usage_is_not_counted_down_by_a_refund() -> None:
    ledger = ledger_with(100)
    ledger.send("workflow.finish", workflow_id="w1", credits=30)
    assert rows(ledger.send("wallet.refund", refund_id="r1", credits=30, workflow_id="w1")) == [
        ("refund", 30, 100, 0, 0, 30)
    ]


# Limits


def test_a_configuration_replaces_all_limits_and_posts_nothing() -> None:
    ledger = ledger_with(100)
    decision = ledger.send("wallet.configure", version=3, credit_limit=50, period_cap=70)
    assert (decision.outcome, decision.reason, decision.events) == ("posted", None, ())
    assert (ledger.wallet.credit_limit, ledger.wallet.period_cap, ledger.wallet.config_version) == (50, 70, 3)
    ledger.send("wallet.configure", version=5)
    assert (ledger.wallet.credit_limit, ledger.wallet.period_cap, ledger.wallet.config_version) == (0, None, 5)


def test_a_configuration_with_a_reason_is_an_event_with_the_new_limits() -> None:
    ledger = ledger_with(100)
    told = {"metadata": {"by": "olga", "period_cap": 5, "version": 9}}
    decision = ledger.send("wallet.configure", version=3, credit_limit=50, reason="a deal", **told)
    assert rows(decision) == [("billing", 0, 100, 0, 0, 0)]
    [event] = decision.events
    assert event.idempotency_key == "configure:3"
    assert event.metadata == {"by": "olga", "version": 3, "credit_limit": 50, "reason": "a deal"}
    capped = ledger.send("wallet.configure", version=4, period_cap=70, reason="less")
    assert capped.events[0].metadata == {"version": 4, "credit_limit": 0, "period_cap": 70, "reason": "less"}
    assert ledger.send("wallet.configure", version=4, period_cap=70, reason="less").duplicate
    assert ledger.send("wallet.configure", version=2, reason="late").events == ()


def test_an_older_configuration_is_ignored() -> None:
    ledger = ledger_with(100)
    ledger.send("wallet.configure", version=3, credit_limit=50)
    decision = ledger.send("wallet.configure", version=2, credit_limit=99)
    assert (decision.outcome, decision.reason, decision.duplicate) == ("ignored", "stale_version", False)
    again = ledger.send("wallet.configure", version=2, credit_limit=99)
    assert (again.outcome, again.reason, again.duplicate) == ("ignored", "stale_version", True)
    assert ledger.send("wallet.configure", version=3, credit_limit=50).duplicate
    assert ledger.wallet.credit_limit == 50


# Bounds


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("wallet.purchase", {"purchase_id": "x1", "credits": 1}),
        ("wallet.grant", {"grant_id": "x1", "credits": AMOUNT}),
        ("wallet.adjust", {"adjustment_id": "x1", "credits": 1, "reason": "typo"}),
        ("wallet.refund", {"refund_id": "x1", "credits": 1}),
        ("wallet.bill", {"billing_id": "x1", "credits": 1}),
    ],
)
def test_a_full_wallet_takes_no_more(task: str, fields: dict[str, Any]) -> None:
    ledger = ledger_with(1)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=MAX)
    assert refusal(ledger, task, **fields) == Refusal(
        "balance_out_of_range", f"{task}: a balance would pass 2^53-1 credits"
    )
    ledger.send("workflow.finish", workflow_id="w1", credits=AMOUNT)
    assert ledger.send(task, **fields).outcome == "posted"


DEEP = {"credits": -AMOUNT, "reason": "test", "allow_negative": True}


def test_a_wallet_sinks_no_deeper_than_the_bound() -> None:
    ledger = ledger_with(1)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=AMOUNT - MAX)
    assert ledger.send("wallet.adjust", adjustment_id="a1", **DEEP).outcome == "posted"
    assert ledger.wallet.prepaid_balance == -MAX
    for task, fields in (
        ("wallet.adjust", {**DEEP, "adjustment_id": "a2", "credits": -1}),
        ("wallet.reverse", {"reversal_id": "r1", "purchase_id": "p1", "reason": "refunded"}),
    ):
        assert refusal(ledger, task, **fields) == Refusal(
            "balance_out_of_range", f"{task}: a balance would pass 2^53-1 credits"
        )


def test_what_is_reserved_counts_for_the_lower_bound() -> None:
    ledger = ledger_with(10)
    ledger.send("workflow.start", workflow_id="w1", credits=10)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=10 + AMOUNT - MAX)
    assert ledger.send("wallet.adjust", adjustment_id="a1", **DEEP).outcome == "posted"
    assert ledger.wallet.available == -MAX
    assert refusal(ledger, "wallet.adjust", adjustment_id="a2", **DEEP | {"credits": -1}).code == "balance_out_of_range"
