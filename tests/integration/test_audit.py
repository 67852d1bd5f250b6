"""The checker is checked: it finds nothing in a ledger that is well, and every harm that is planted into one."""

from dataclasses import dataclass, field
from typing import get_args

import pytest
from sqlalchemy import Engine, text

from holdfast_client.messages import MESSAGES
from ledger import audit
from ledger.figures import system_figures
from ledger.state import EventType
from ledger.store import Delivery, apply_batch
from ledger.tables import metadata
from tests.messages import delivery
from tests.support import another_past, begin_schedules, moved, sql


def acme(task: str, **fields: object) -> Delivery:
    return delivery(task, org_id="acme", **fields)


def globex(task: str, **fields: object) -> Delivery:
    return delivery(task, org_id="globex", **fields)


def umbrella(task: str, **fields: object) -> Delivery:
    return delivery(task, org_id="umbrella", **fields)


# Every message and every type of event; with the numbers of Acme's events.
LEDGER = [
    acme(
        "wallet.subscribe", subscription_id="s1", version=1, plan="team", monthly_credits=200
    ),  # 1 subscription_credit
    acme("wallet.subscribe", subscription_id="s1", version=2, plan="big", monthly_credits=300),  # 2 plan_change
    acme("wallet.purchase", purchase_id="p1", credits=500),  # 3 prepaid_purchase
    acme("wallet.grant", grant_id="g1", credits=50, reason="welcome"),  # 4 grant
    acme("wallet.adjust", adjustment_id="a1", credits=-20, reason="typo"),  # 5 adjustment
    acme("wallet.bill", billing_id="b1", credits=0),  # 6 billing
    acme("workflow.start", workflow_id="settled", credits=75),  # 7 reservation
    acme("workflow.finish", workflow_id="settled", credits=80),  # 8 reservation_released, 9 usage
    acme("wallet.refund", refund_id="r1", credits=10, workflow_id="settled"),  # 10 refund
    acme("workflow.start", workflow_id="cancelled", credits=30),  # 11 reservation
    acme("workflow.cancel", workflow_id="cancelled"),  # 12 reservation_released
    acme("workflow.finish", workflow_id="unreserved", credits=5),  # 13 usage
    acme("workflow.start", workflow_id="open", credits=60),  # 14 reservation
    acme("workflow.start", workflow_id="rejected", credits=5_000),
    acme("workflow.fail", workflow_id="never-started"),
    acme("wallet.configure", version=1, credit_limit=10, period_cap=10_000),
    acme("wallet.unsubscribe", subscription_id="never-subscribed", version=3),
    # Globex has overrun its credits, lost a hold to time and the rest of its subscription to the next period.
    globex(
        "wallet.subscribe",
        subscription_id="s1",
        version=1,
        plan="team",
        monthly_credits=10,
        anchor="2999-01-01T00:00:00Z",
    ),
    globex("wallet.purchase", purchase_id="p1", credits=40),
    globex("workflow.start", workflow_id="expired", credits=20),
    # Umbrella has credits with an end, of which some were used, some have ended and some were taken back.
    umbrella("wallet.purchase", purchase_id="p1", credits=100, expires_at="2999-01-01T00:00:00Z"),  # 1 prepaid_purchase
    umbrella("wallet.grant", grant_id="g1", credits=10, expires_at="2020-01-01T00:00:00Z"),  # 2 grant, 3 adjustment
    umbrella("workflow.finish", workflow_id="used", credits=30),  # 4 usage
    umbrella("wallet.refund", refund_id="r1", credits=5, workflow_id="used"),  # 5 refund
    umbrella("wallet.reverse", reversal_id="v1", purchase_id="p1", credits=20, reason="disputed"),  # 6 billing
    umbrella("wallet.bill", billing_id="b1", credits=-5),  # 7 billing
    umbrella("wallet.subscribe", subscription_id="s1", version=1, plan="team", monthly_credits=10),  # 8
    umbrella("wallet.subscribe", subscription_id="s2", version=2, plan="big", monthly_credits=20),  # 9
    umbrella(
        "wallet.subscribe",
        subscription_id="s3",
        version=3,
        plan="next",
        monthly_credits=1,
        anchor="2999-01-01T00:00:00Z",
    ),
    umbrella("wallet.configure", version=1, credit_limit=5, reason="as agreed"),  # 10 billing
    # Initech has a wallet and no event.
    delivery("workflow.start", org_id="initech", workflow_id="rejected", credits=1),
]


@pytest.fixture
def ledger(engine: Engine) -> Engine:
    """A realistic ledger."""
    apply_batch(engine, LEDGER)
    begin_schedules(engine, "CASE org_id WHEN 'globex' THEN now() - interval '40 days' ELSE anchor END")
    sql(engine, f"UPDATE workflows SET expires_at = {moved('expires_at', '-9 days')} WHERE org_id = 'globex'")
    sql(engine, "UPDATE wallets SET next_hold_expiry = now() - interval '8 days' WHERE org_id = 'globex'")
    apply_batch(engine, [globex("workflow.finish", workflow_id="w1", credits=70)])
    return engine


def change(engine: Engine, statements: str) -> None:
    """Do what the database refuses, and leave everything as it was that refuses it."""
    with another_past(engine) as connection:
        for statement in statements.split(";"):
            connection.execute(text(statement))


def found(engine: Engine) -> dict[str, list[tuple[str, str]]]:
    """The offenders by the name of the check that names them; once, what is so in the shards, too."""
    return {
        finding.check.name: list(dict.fromkeys((of, what.split(" in shard ")[0]) for of, what in finding.offenders))
        for finding in audit.verify(engine).findings
        if finding.offenders
    }


def test_a_ledger_that_is_well_is_clean(ledger: Engine) -> None:
    verdict = audit.verify(ledger)
    assert found(ledger) == {}
    assert verdict.is_clean
    assert (verdict.wallets, verdict.events, verdict.open_dead_letters) == (4, 31, 0)
    assert [finding.check for finding in verdict.findings] == list(audit.CHECKS)
    types = {event_type for (event_type,) in sql(ledger, "SELECT DISTINCT event_type FROM credit_events")}
    assert (types, {sent.task for sent in LEDGER}) == (set(get_args(EventType)), set(MESSAGES))
    # The numbers that the harms below count on.
    assert sql(ledger, "SELECT seq, event_type FROM credit_events WHERE org_id = 'acme' ORDER BY seq") == [
        (1, "subscription_credit"),
        (2, "subscription_credit"),
        (3, "prepaid_purchase"),
        (4, "grant"),
        (5, "adjustment"),
        (6, "billing"),
        (7, "reservation"),
        (8, "reservation_released"),
        (9, "usage"),
        (10, "refund"),
        (11, "reservation"),
        (12, "reservation_released"),
        (13, "usage"),
        (14, "reservation"),
    ]
    assert sql(
        ledger, "SELECT seq, event_type, metadata ->> 'reason' FROM credit_events WHERE org_id = 'globex' ORDER BY seq"
    ) == [
        (1, "prepaid_purchase", None),
        (2, "reservation", None),
        (3, "subscription_credit", None),
        (4, "subscription_credit", None),
        (5, "reservation_released", "expired"),
        (6, "adjustment", "subscription_expired"),
        (7, "usage", None),
    ]


def test_an_empty_ledger_is_clean(engine: Engine) -> None:
    verdict = audit.verify(engine)
    assert verdict.is_clean
    assert (verdict.wallets, verdict.events, verdict.open_dead_letters) == (0, 0, 0)


@dataclass(frozen=True)
class Harm:
    """A harm, the check that has to find it, and its offenders."""

    check: str
    plant: str
    offenders: list[tuple[str, str]]
    drop: tuple[str, ...] = ()
    """The constraints (table constraint) that would refuse the harm."""
    also: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """What other checks unavoidably find."""


def wallet(change: str) -> str:
    return f"UPDATE wallets SET {change} WHERE org_id = 'acme'"


def event(seq: int, change: str) -> str:
    return f"UPDATE credit_events SET {change} WHERE org_id = 'acme' AND seq = {seq}"


def workflow(workflow_id: str, change: str) -> str:
    return f"UPDATE workflows SET {change} WHERE org_id = 'acme' AND workflow_id = '{workflow_id}'"


HARMS = {
    "an event is missing": Harm(
        "numbering",
        "DELETE FROM credit_events WHERE org_id = 'acme' AND seq = 6",  # billing of 0 credits
        [("acme", "event 7")],
        also={"messages": [("acme", "billing:b1")]},
    ),
    "the first event is missing": Harm(
        "numbering",
        "UPDATE credit_events SET seq = seq + 1000 WHERE org_id = 'acme';"
        "UPDATE credit_events SET seq = seq - 999 WHERE org_id = 'acme';" + wallet("last_seq = last_seq + 1"),
        [("acme", "event 2")],
    ),
    "the wallet counts an event too many": Harm(
        "numbering", wallet("last_seq = 15"), [("acme", "wallet says 15, its last event is 14")]
    ),
    "the wallet of an organization without events counts some": Harm(
        "numbering",
        "UPDATE wallets SET last_seq = 2, last_event_at = now() WHERE org_id = 'initech'",
        [("initech", "wallet says 2, its last event is 0")],
    ),
    "a wallet is missing": Harm(
        "owner",
        "DELETE FROM wallets WHERE org_id = 'acme'",
        [("acme", "its events have no wallet"), ("acme", "its workflows have no wallet")],
        also={"ending": [("acme", "its credits with an end have no wallet")]},
    ),
    "an event is older than the one before": Harm(
        "clock", event(5, f"created_at = {moved('created_at', '-1 second')}"), [("acme", "event 5")]
    ),
    "what expires is not the subscription's": Harm(
        "arithmetic",
        "UPDATE credit_events SET prepaid_balance_after = 30, subscription_balance_after = 20"
        " WHERE org_id = 'globex' AND seq = 6",
        [("globex", "event 6, adjustment")],
    ),
    "a new period does not reset the period usage": Harm(
        "arithmetic",
        "UPDATE credit_events SET period_usage_after = period_usage_after + 3 WHERE org_id = 'globex' AND seq >= 4;"
        "UPDATE wallets SET period_usage = period_usage + 3 WHERE org_id = 'globex'",
        [("globex", "event 4, subscription_credit")],
    ),
    "credits appear in a wallet without an event": Harm(
        "sum",
        "UPDATE wallets SET prepaid_balance = 5 WHERE org_id = 'initech'",
        [("initech", "events add up to 0, available is 5")],
    ),
    "credits appear in a wallet with events": Harm(
        "sum",
        wallet("prepaid_balance = prepaid_balance + 5"),
        [("acme", "events add up to 695, available is 700")],
        also={"balances": [("acme", "wallet and event 14 differ")]},
    ),
    "an event says other credits than it moved": Harm(
        "sum",
        event(3, "credits = 501"),
        [("acme", "events add up to 696, available is 695")],
        also={"arithmetic": [("acme", "event 3, prepaid_purchase")], "messages": [("acme", "purchase:p1")]},
    ),
    **{
        f"the wallet is not what its last event left: {change}": Harm(
            "balances", wallet(change), [("acme", "wallet and event 14 differ")], drop=("wallets wallets_last_seq",)
        )
        for change in (
            "prepaid_balance = prepaid_balance + 1, subscription_balance = subscription_balance - 1",
            "period_usage = period_usage + 1",
            f"last_event_at = {moved('last_event_at', '1 microsecond')}",
            "last_event_at = NULL",
        )
    },
    "more is reserved than the reservations hold": Harm(
        "reserved",
        wallet("reserved = reserved + 1, prepaid_balance = prepaid_balance + 1"),
        [("acme", "reserved is 61, open reservations add up to 60")],
        also={"balances": [("acme", "wallet and event 14 differ")]},
    ),
    "a workflow holds what was never reserved": Harm(
        "reserved",
        workflow("rejected", "state = 'reserved'"),
        [("acme", "reserved is 60, open reservations add up to 5060")],
        drop=("workflows workflows_reserved",),
    ),
    "a hold expires before the wallet expects it to": Harm(
        "expiry", wallet(f"next_hold_expiry = {moved('next_hold_expiry', '1 second')}"), [("acme", "workflow open")]
    ),
    "a wallet expects no hold to expire": Harm(
        "expiry",
        wallet("next_hold_expiry = NULL"),
        [("acme", "workflow open")],
        drop=("wallets wallets_next_hold_expiry",),
    ),
    "a workflow was charged otherwise than it finished": Harm(
        "workflows", workflow("settled", "finish_credits = 81"), [("acme", "workflow settled")]
    ),
    "a workflow was charged and did not finish": Harm(
        "workflows",
        workflow("unreserved", "state = 'cancelled', finish_credits = NULL"),
        [("acme", "workflow unreserved")],
    ),
    "a workflow finished and was not charged": Harm(
        "workflows",
        workflow("never-started", "state = 'settled', finish_credits = 0"),
        [("acme", "workflow never-started")],
    ),
    "a workflow reserved otherwise than it started": Harm(
        "workflows", workflow("settled", "start_credits = 76"), [("acme", "workflow settled")]
    ),
    "a workflow reserved and says that it was rejected": Harm(
        "workflows",
        workflow("settled", "start_answer = 'period_cap', expires_at = NULL"),
        [("acme", "workflow settled")],
    ),
    "a workflow says that it reserved and did not": Harm(
        "workflows",
        workflow("rejected", "state = 'expired', start_answer = 'reserved', expires_at = now()"),
        [("acme", "workflow rejected")],
    ),
    "a workflow was released and is still reserved": Harm(
        "workflows",
        workflow("cancelled", "state = 'reserved'"),
        [("acme", "workflow cancelled")],
        also={"reserved": [("acme", "reserved is 60, open reservations add up to 90")]},
    ),
    "a workflow was released for another reason": Harm(
        "workflows", workflow("cancelled", "state = 'failed'"), [("acme", "workflow cancelled")]
    ),
    "a workflow was released otherwise than it reserved": Harm(
        "workflows",
        event(12, "credits = 29"),
        [("acme", "workflow cancelled")],
        also={
            "arithmetic": [("acme", "event 12, reservation_released")],
            "sum": [("acme", "events add up to 694, available is 695")],
        },
    ),
    "a workflow was charged twice": Harm(
        "workflows",
        "INSERT INTO credit_events SELECT org_id, 15, created_at, event_type, source, workflow_id, project_id,"
        " activity_name, 0, (SELECT prepaid_balance_after FROM credit_events WHERE org_id = 'acme' AND seq = 14),"
        " subscription_balance_after, 60, period_usage_after, 'finish:again', metadata"
        " FROM credit_events WHERE org_id = 'acme' AND seq = 13;" + wallet("last_seq = 15"),
        [("acme", "workflow unreserved")],
    ),
    "a workflow is missing": Harm(
        "workflows",
        "DELETE FROM workflows WHERE org_id = 'acme' AND workflow_id = 'unreserved'",
        [("acme", "workflow unreserved")],
    ),
    "a refund is forgotten": Harm("refunds", workflow("settled", "refunded = 0"), [("acme", "workflow settled")]),
    "a refund is remembered that nobody asked for": Harm(
        "refunds", workflow("unreserved", "refunded = 5"), [("acme", "workflow unreserved")]
    ),
    "more was refunded than was used": Harm(
        "refunds",
        workflow("settled", "finish_credits = 9, refunded = 10"),
        [("acme", "workflow settled")],
        drop=("workflows workflows_refunded",),
        also={"workflows": [("acme", "workflow settled")]},
    ),
    "a refund names a workflow that does not exist": Harm(
        "refunds",
        'UPDATE posted_messages SET terms = terms || \'{"workflow_id": "unknown"}\''
        " WHERE kind = 'refund' AND org_id = 'acme'",
        [("acme", "refund:r1 names settled"), ("acme", "workflow settled"), ("acme", "workflow unknown")],
    ),
    "the event of a refund names another workflow": Harm(
        "refunds", event(10, "workflow_id = 'unreserved'"), [("acme", "refund:r1 names unreserved")]
    ),
    **{
        f"a {kind} has an event and no message": Harm(
            "messages",
            f"DELETE FROM posted_messages WHERE org_id = 'acme' AND kind = '{kind}'",
            [("acme", f"{kind}:{message_id}")],
            also={"refunds": [("acme", "workflow settled")]} if kind == "refund" else {},
        )
        for kind, message_id in (
            ("purchase", "p1"),
            ("grant", "g1"),
            ("adjustment", "a1"),
            ("refund", "r1"),
            ("billing", "b1"),
        )
    },
    **{
        f"a {kind} has a message and no event": Harm(
            "messages",
            f"INSERT INTO posted_messages VALUES ('acme', '{kind}', 'm9', '{{\"credits\": 7}}', 'posted', NULL)",
            [("acme", f"{kind}:m9")],
        )
        for kind in ("purchase", "grant", "adjustment", "refund", "billing")
    },
    "a message asked for other credits than were posted": Harm(
        "messages",
        "UPDATE posted_messages SET terms = terms || '{\"credits\": 49}' WHERE kind = 'grant' AND org_id = 'acme'",
        [("acme", "grant:g1")],
    ),
    "an event of a message has another key": Harm(
        "messages", event(4, "idempotency_key = 'grant:g2'"), [("acme", "grant:g1"), ("acme", "grant:g2")]
    ),
    "other credits paid for a workflow than its usage says": Harm(
        "refunds",
        "UPDATE workflows SET paid_by_ending = '{}' WHERE org_id = 'umbrella'",
        [("umbrella", "workflow used was paid by other credits")],
    ),
    "a reversal has an event and no message": Harm(
        "messages",
        "DELETE FROM posted_messages WHERE kind = 'reversal'",
        [("umbrella", "reversal:v1")],
        also={"reversals": [("umbrella", "purchase p1")]},
    ),
    "a reversal is forgotten": Harm(
        "reversals",
        "UPDATE posted_messages SET reversed = 0 WHERE org_id = 'umbrella'",
        [("umbrella", "purchase p1")],
    ),
    "a wallet does not know when its next credits end": Harm(
        "ending",
        "UPDATE wallets SET next_ending_at = NULL WHERE org_id = 'umbrella'",
        [("umbrella", "its credits with an end")],
    ),
    "credits with an end come from nowhere": Harm(
        "origins",
        "UPDATE ending_credits SET origin = 'purchase:p9' WHERE org_id = 'umbrella' AND origin = 'purchase:p1'",
        [("umbrella", "purchase:p9")],
    ),
    "a credit with an end is lost": Harm(
        "uses",
        "UPDATE ending_credits SET remaining = remaining - 1 WHERE org_id = 'umbrella' AND origin = 'purchase:p1'",
        [("umbrella", "came in and left: 50, there are 49")],
    ),
    "events are summed that are not there": Harm(
        "daily sums",
        "INSERT INTO daily_sums VALUES ('acme', '2026-01-31', 'usage', '', '', 'workflow-engine', 1, -5, 1, 1)",
        [("acme", "the sums of 2026-01-31")],
    ),
    "the subscription that is scheduled is unknown": Harm(
        "periods",
        "UPDATE wallets SET scheduled_id = 's9' WHERE org_id = 'umbrella'",
        [("umbrella", "scheduled subscription s9")],
    ),
    "the subscription that is scheduled was called off": Harm(
        "periods",
        "UPDATE subscriptions SET active = false WHERE org_id = 'umbrella' AND subscription_id = 's3'",
        [("umbrella", "scheduled subscription s3")],
    ),
    "the subscription that allocates is unknown": Harm(
        "periods", wallet("subscription_id = 's9'"), [("acme", "subscription s9")]
    ),
    "the period that a subscription is in never began": Harm(
        "periods",
        "UPDATE subscriptions SET period = 1 WHERE org_id = 'acme' AND subscription_id = 's1'",
        [("acme", "subscription s1")],
    ),
}


def plant(engine: Engine, harm: Harm) -> None:
    for constraint in harm.drop:
        table, name = constraint.split()
        sql(engine, f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    change(engine, harm.plant)


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_a_planted_harm_is_found_by_its_check(ledger: Engine, harm: Harm) -> None:
    plant(ledger, harm)
    dropped = [(table, f"{name} is missing") for table, name in map(str.split, harm.drop)]
    also = {**harm.also, **({"constraints": dropped} if dropped else {})}
    assert found(ledger) == {harm.check: harm.offenders, **also}
    assert not audit.verify(ledger).is_clean


ARITHMETIC_HARMS = {
    "counts usage that is none": {"period_usage": 1},
    "moves a credit from the subscription to the prepaid balance": {"prepaid_balance": 1, "subscription_balance": -1},
    "reserves a credit that it takes from nowhere": {"prepaid_balance": 1, "reserved": 1},
}


@pytest.mark.parametrize("changes", ARITHMETIC_HARMS.values(), ids=ARITHMETIC_HARMS.keys())
def test_an_event_of_any_type_that_changes_a_balance_by_one_too_many_is_found(
    ledger: Engine, changes: dict[str, int]
) -> None:
    def change_balances(seq: int, sign: int) -> None:
        """From the event on, and in the wallet too: so only this one event is wrong."""
        after = ", ".join(f"{name}_after = {name}_after + {sign * by}" for name, by in changes.items())
        now = ", ".join(f"{name} = {name} + {sign * by}" for name, by in changes.items())
        change(ledger, f"UPDATE credit_events SET {after} WHERE org_id = 'acme' AND seq >= {seq}; {wallet(now)}")

    offenders = []
    for seq in range(1, 11):
        change_balances(seq, 1)
        offenders += found(ledger)["arithmetic"]
        change_balances(seq, -1)
    assert offenders == [
        ("acme", "event 1, subscription_credit"),
        ("acme", "event 2, subscription_credit"),
        ("acme", "event 3, prepaid_purchase"),
        ("acme", "event 4, grant"),
        ("acme", "event 5, adjustment"),
        ("acme", "event 6, billing"),
        ("acme", "event 7, reservation"),
        ("acme", "event 8, reservation_released"),
        ("acme", "event 9, usage"),
        ("acme", "event 10, refund"),
    ]
    assert found(ledger) == {}


ANOTHER_TRIGGER = """
    DROP TRIGGER credit_events_append_only ON credit_events;
    CREATE TRIGGER credit_events_append_only BEFORE {} ON credit_events
        FOR EACH {} EXECUTE FUNCTION credit_events_refuse_change()
"""
FOR_BOTH = (
    "ALTER TABLE credit_events DISABLE TRIGGER USER",
    "DROP FUNCTION credit_events_refuse_change CASCADE",
    "CREATE OR REPLACE FUNCTION credit_events_refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
)
REPLACED = (
    ANOTHER_TRIGGER.format("UPDATE", "ROW"),
    ANOTHER_TRIGGER.format("UPDATE OR DELETE", "STATEMENT"),
    ANOTHER_TRIGGER.format("UPDATE OF credits OR DELETE", "ROW"),
    ANOTHER_TRIGGER.format("UPDATE OR DELETE", "ROW WHEN (OLD.seq > 1)"),
    FOR_BOTH[-1],
)
UNGUARDED = {
    "ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only": "disabled",
    "ALTER TABLE credit_events DISABLE TRIGGER USER": "disabled",
    "ALTER TABLE credit_events ENABLE REPLICA TRIGGER credit_events_append_only": "disabled",
    "DROP TRIGGER credit_events_append_only ON credit_events": "missing",
    "DROP FUNCTION credit_events_refuse_change CASCADE": "missing",
    "ALTER TRIGGER credit_events_append_only ON credit_events RENAME TO other": "missing",
    **dict.fromkeys(REPLACED, "not the one that holdfast migrate creates"),
}
"""What a tables' owner can do so that events can be changed, and what is said of the trigger then."""


@pytest.mark.parametrize("statement", UNGUARDED)
def test_a_history_that_can_be_changed_is_found(ledger: Engine, statement: str) -> None:
    for each in statement.split(";"):
        sql(ledger, each)
    names = ["credit_events_append_only", *["credit_events_no_truncate"] * (statement in FOR_BOTH)]
    assert found(ledger) == {
        "append-only": [("credit_events", f"the trigger {name} is {UNGUARDED[statement]}") for name in names]
    }


def test_a_history_that_can_be_emptied_is_found(ledger: Engine) -> None:
    sql(ledger, "DROP TRIGGER credit_events_no_truncate ON credit_events")
    assert found(ledger) == {
        "append-only": [("credit_events", "the trigger credit_events_no_truncate is missing")],
    }


def test_a_trigger_that_refuses_replicas_too_is_as_good(ledger: Engine) -> None:
    sql(ledger, "ALTER TABLE credit_events ENABLE ALWAYS TRIGGER credit_events_append_only")
    assert found(ledger) == {}


def test_a_constraint_that_is_missing_or_was_not_validated_is_found(ledger: Engine) -> None:
    sql(ledger, "ALTER TABLE credit_events DROP CONSTRAINT credit_events_idempotency_key")
    sql(ledger, "ALTER TABLE credit_events DROP CONSTRAINT credit_events_sign")
    sql(ledger, "ALTER TABLE credit_events ADD CONSTRAINT credit_events_sign CHECK (credits <> 0) NOT VALID")
    sql(ledger, "ALTER TABLE dead_letters DROP CONSTRAINT dead_letters_status")
    assert found(ledger) == {
        "constraints": [
            ("credit_events", "credit_events_idempotency_key is missing"),
            ("credit_events", "credit_events_sign is not validated"),
            ("dead_letters", "dead_letters_status is missing"),
        ]
    }


def test_every_check_of_the_rows_has_a_harm_that_it_finds() -> None:
    of_the_database = {"append-only", "constraints"}  # which have tests of their own
    assert {harm.check for harm in HARMS.values()} | of_the_database == {check.name for check in audit.CHECKS}


def test_a_harm_in_one_wallet_accuses_no_other(ledger: Engine) -> None:
    sql(ledger, "UPDATE wallets SET period_usage = period_usage + 1 WHERE org_id IN ('acme', 'globex')")
    assert found(ledger) == {
        "balances": [("acme", "wallet and event 14 differ"), ("globex", "wallet and event 7 differ")]
    }


def test_no_more_than_twenty_offenders_are_named_in_order(engine: Engine) -> None:
    apply_batch(
        engine,
        [delivery("wallet.purchase", org_id=f"org-{n:02}", purchase_id="p1", credits=5) for n in range(25)],
    )
    sql(engine, "UPDATE wallets SET period_usage = 1")
    assert found(engine) == {"balances": [(f"org-{n:02}", "wallet and event 1 differ") for n in range(20)]}


def test_words_of_a_message_do_not_mislead_the_checker(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            acme("wallet.purchase", purchase_id="p1", credits=9, metadata={"reason": "subscription_expired"}),
            acme("wallet.grant", grant_id="g1", credits=9, reason="subscription_expired"),
            acme("wallet.bill", billing_id="b1", credits=9, metadata={"reason": "plan_change"}),
            acme("wallet.refund", refund_id="r1", credits=9, metadata={"reason": "subscription_expired"}),
        ],
    )
    assert found(engine) == {}


def test_what_passed_the_highest_balance_is_clean(engine: Engine) -> None:
    purchases = [acme("wallet.purchase", purchase_id=f"p{number}", credits=10**12) for number in range(9_007)]
    subscribe = acme("wallet.subscribe", subscription_id="s1", version=1, plan="team", monthly_credits=10**12)
    apply_batch(engine, [*purchases, subscribe])
    assert sql(engine, "SELECT prepaid_balance + subscription_balance FROM wallets") == [(2**53 - 1,)]
    assert found(engine) == {}


def test_open_dead_letters_are_counted(engine: Engine) -> None:
    apply_batch(engine, [acme("wallet.grant", grant_id="g1", credits=0), acme("wallet.grant", grant_id="g2")])
    sql(
        engine,
        "UPDATE dead_letters SET status = 'discarded', resolved_at = now(), resolved_by = 'ann', resolution = 'test'"
        " WHERE id = 1",
    )
    verdict = audit.verify(engine)
    assert (verdict.open_dead_letters, verdict.is_clean) == (1, True)


def test_verify_neither_writes_nor_waits_for_a_writer(ledger: Engine) -> None:
    sql(ledger, wallet("period_usage = period_usage + 1"))
    tables = [table.name for table in metadata.sorted_tables]
    # A new row version would have a new xmin or ctid.
    contents = [f"SELECT xmin::text, ctid::text, t.* FROM {table} AS t" for table in tables]
    before = [sorted(sql(ledger, query), key=str) for query in contents]
    with ledger.connect() as writer:
        for org_id in ("acme", "globex", "umbrella", "initech"):
            writer.execute(text("SELECT * FROM wallets WHERE org_id = :org_id FOR UPDATE"), {"org_id": org_id})
        writer.execute(text("UPDATE wallets SET period_usage = 0"))
        assert found(ledger) == {"balances": [("acme", "wallet and event 14 differ")]}
        writer.rollback()
    assert [sorted(sql(ledger, query), key=str) for query in contents] == before


def test_verify_works_where_nothing_may_be_written(ledger: Engine) -> None:
    [(database,)] = sql(ledger, "SELECT current_database()")
    sql(ledger, f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    ledger.dispose()  # the setting is of new sessions
    assert sql(ledger, "SHOW transaction_read_only") == [("on",)]
    assert audit.verify(ledger).is_clean


def test_the_last_result_is_kept_for_monitoring(ledger: Engine) -> None:
    def told() -> tuple[float, float]:
        with ledger.connect() as connection:
            figures = system_figures(connection)
        return figures["verify_timestamp_seconds"][1], figures["verify_broken_invariants"][1]

    assert told() == (0, 0)
    [(before,)] = sql(ledger, "SELECT extract(epoch FROM clock_timestamp())")
    sql(ledger, wallet("period_usage = period_usage + 1"))
    audit.record(ledger, audit.verify(ledger))
    failed_at, broken = told()
    assert (failed_at >= before, broken) == (True, 1)
    sql(ledger, wallet("period_usage = period_usage - 1"))
    audit.record(ledger, audit.verify(ledger))
    ended_at, broken = told()
    assert (ended_at > failed_at, broken) == (True, 0)
