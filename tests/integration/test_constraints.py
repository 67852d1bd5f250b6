"""The database refuses, by itself, every row that the ledger could not have made.

One good row a table, and for each constraint the changes of it that this constraint refuses. A bad row usually breaks
only the one; PostgreSQL looks at CHECKs in the order of their names, so where a row has to break two, ours comes first.
"""

import json
import re
from typing import Any, get_args

import pytest
from psycopg.errors import NullValueNotAllowed
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, IntegrityError

from ledger.faults import describe
from ledger.state import EventType
from tests.support import sql

MAX = 9_007_199_254_740_991
OVER = MAX + 1
NOW = "2026-01-31T09:00:00Z"
BAD_IDS = ["", "x" * 129, "a b", "a/b", "é", "a\n", "a\tb"]

Row = dict[str, Any]

GOOD: dict[str, Row] = {
    "wallets": {
        "org_id": "acme",
        "last_seq": 1,
        "last_event_at": NOW,
        "prepaid_balance": 0,
        "subscription_balance": 0,
        "reserved": 0,
        "period_usage": 0,
        "credit_limit": 0,
        "period_cap": None,
        "config_version": 0,
        "subscription_id": "s1",
        "next_period_at": NOW,
        "next_hold_expiry": None,
        "plan_version": 1,
        "scheduled_id": None,
        "scheduled_at": None,
        "next_ending_at": None,
        "held_past_end": 0,
        "covers": None,
    },
    "workflows": {
        "org_id": "acme",
        "workflow_id": "w1",
        "state": "settled",
        "start_credits": 75,
        "start_answer": "reserved",
        "expires_at": NOW,
        "finish_credits": 80,
        "cancel_answer": None,
        "fail_answer": None,
        "refunded": 5,
        "project_id": "project-7",
        "activity_name": None,
        "reserved_seq": None,
        "paid_by_ending": None,
        "rejected_at": None,
    },
    "subscriptions": {
        "org_id": "acme",
        "subscription_id": "s1",
        "version": 1,
        "active": True,
        "plan": "team",
        "monthly_credits": 100,
        "rollover_limit": 0,
        "anchor": NOW,
        "period": 0,
        "period_granted": 100,
        "first_lacks": 40,
        "first_period": 0,
        "period_plan": "team",
    },
    "ending_credits": {
        "org_id": "acme",
        "origin": "grant:g1",
        "expires_at": NOW,
        "seq": 1,
        "remaining": 5,
        "plan": None,
    },
    "daily_sums": {
        "org_id": "acme",
        "day": "2026-01-31",
        "event_type": "usage",
        "project_id": "",
        "activity_name": "",
        "source": "workflow-engine",
        "events": 2,
        "credits": -5,
        "first_seq": 3,
        "last_seq": 6,
    },
    "daily_sums_through": {"org_id": "acme", "seq": 1},
    "archived": {
        "org_id": "acme",
        "seq": 5,
        "created_at": NOW,
        "prepaid_balance": 5,
        "subscription_balance": 0,
        "reserved": 0,
        **dict.fromkeys(("period_usage", "held", "released", "used", "posted", "reversed", "ending"), 0),
    },
    "archive_head": {"number": 1, "installation": "4f1c", "head": "9e2b"},
    "erasures": {"org_id": "acme", "erased_at": NOW, "seq": 5, "erased_by": "ann", "why": "asked for"},
    "last_verification": {"number": 1, "ended_at": NOW, "broken": 0},
    "posted_messages": {
        "org_id": "acme",
        "kind": "purchase",
        "message_id": "p1",
        "terms": '{"credits": 5}',
        "outcome": "posted",
        "reason": None,
        "reversed": 0,
    },
    "credit_events": {
        "org_id": "acme",
        "seq": 1,
        "created_at": NOW,
        "event_type": "grant",
        "source": "admin",
        "workflow_id": None,
        "project_id": None,
        "activity_name": None,
        "credits": 5,
        "prepaid_balance_after": 5,
        "subscription_balance_after": 0,
        "reserved_after": 0,
        "period_usage_after": 0,
        "idempotency_key": "grant:g1",
        "metadata": "{}",
    },
    "dead_letters": {
        "id": 1,
        "status": "open",
        "task": "workflow.start",
        "org_id": None,
        "body": b"{",
        "body_sha256": b"digest",
        "error_code": "undecodable",
        "error": "not JSON",
        "cause": "not JSON",
        "traceback": None,
        "attempts": 1,
        "first_failed_at": NOW,
        "last_failed_at": NOW,
        "resolved_at": None,
        "resolved_by": None,
        "resolution": None,
        "traceparent": None,
    },
    "waiting_messages": {
        "org_id": "acme",
        "number": 1,
        "task": "workflow.start",
        "body": b"{",
        "answer_to": None,
        "error_code": None,
        "error": None,
        "reason": "its wallet is locked",
        "waiting_since": NOW,
        "attempts": 0,
        "replay_of": None,
        "traceparent": None,
    },
}

# Workflows and events of other kinds, as changes of the good row.
REJECTED = {
    "state": "rejected",
    "start_answer": "period_cap",
    "expires_at": None,
    "finish_credits": None,
    "refunded": 0,
}
RESERVED = {"state": "reserved", "finish_credits": None, "refunded": 0}
NEVER_STARTED = {"start_credits": None, "start_answer": None, "expires_at": None}
USAGE = {"event_type": "usage", "workflow_id": "w1", "credits": -5, "period_usage_after": 5}
RESERVATION = {"event_type": "reservation", "workflow_id": "w1", "credits": -5, "reserved_after": 5}
RELEASED = {"event_type": "reservation_released", "workflow_id": "w1", "metadata": '{"reason": "settled"}'}
BILLING = {"event_type": "billing", "credits": -5, "prepaid_balance_after": 0}
DISCARDED = {"status": "discarded", "resolved_at": NOW, "resolved_by": "ann", "resolution": "a test message"}


def balance_changes(after: str) -> dict[str, list[Row]]:
    prepaid, subscription, reserved = (
        f"{name}{after}" for name in ("prepaid_balance", "subscription_balance", "reserved")
    )
    held = {"next_hold_expiry": NOW} if after == "" else {}
    return {
        "balance_upper_bound": [{prepaid: OVER}, {subscription: OVER}, {prepaid: MAX, subscription: 1}],
        "available_lower_bound": [{prepaid: -OVER}, {prepaid: -1, reserved: MAX, **held}],
        "subscription_balance_range": [{subscription: -1}, {subscription: OVER, prepaid: -1}],
        "reserved_range": [{reserved: -1, **held}, {reserved: OVER, prepaid: 1, **held}],
        "period_usage_range": [{f"period_usage{after}": -1}, {f"period_usage{after}": OVER}],
    }


BAD: dict[str, dict[str, list[Row]]] = {
    "wallets": {
        "wallets_pkey": [{}, {"last_seq": 2}],
        **{f"wallets_{name}": changes for name, changes in balance_changes("").items()},
        "wallets_org_id": [{"org_id": bad} for bad in BAD_IDS],
        "wallets_last_seq": [{"last_seq": -1}, {"last_seq": 0}, {"last_event_at": None}],
        "wallets_credit_limit": [{"credit_limit": -1}, {"credit_limit": OVER}],
        "wallets_period_cap": [{"period_cap": -1}, {"period_cap": OVER}],
        "wallets_config_version": [{"config_version": -1}, {"config_version": OVER}],
        "wallets_subscription": [{"subscription_id": None}, {"next_period_at": None}],
        "wallets_next_hold_expiry": [{"reserved": 1}],
        "wallets_scheduled": [{"scheduled_id": "s2"}, {"scheduled_at": NOW}],
        "wallets_held_past_end": [{"held_past_end": -1}, {"held_past_end": 1}],
        "wallets_plan_version": [{"plan_version": -1}, {"plan_version": OVER}],
    },
    "workflows": {
        "workflows_pkey": [{}, REJECTED],
        "workflows_ids": [{column: bad} for column in ("org_id", "workflow_id", "project_id") for bad in BAD_IDS],
        "workflows_state": [{**REJECTED, "state": "lost"}, {**REJECTED, "state": ""}],
        "workflows_start_credits": [{"start_credits": -1}, {"start_credits": OVER}],
        "workflows_finish_credits": [{"finish_credits": -1, "refunded": 0}, {"finish_credits": OVER}],
        "workflows_start": [{"start_credits": None}, {**REJECTED, "start_answer": None}],
        "workflows_start_answer": [{**REJECTED, "start_answer": "maybe"}],
        "workflows_cancel_answer": [{"cancel_answer": "maybe"}],
        "workflows_fail_answer": [{"fail_answer": "maybe"}],
        "workflows_settled": [{"finish_credits": None, "refunded": 0}, {"state": "cancelled"}],
        "workflows_hold": [{"expires_at": None}, {"start_answer": "period_cap"}, {**REJECTED, "expires_at": NOW}],
        "workflows_reserved": [
            {**REJECTED, "state": "reserved"},
            {**RESERVED, **NEVER_STARTED},
            {**RESERVED, **NEVER_STARTED, "state": "expired"},
        ],
        "workflows_refunded": [{"refunded": -1}, {"refunded": 81}, {**RESERVED, "refunded": 1}],
    },
    "subscriptions": {
        "subscriptions_pkey": [{}, {"version": 2}],
        "subscriptions_ids": [{column: bad} for column in ("org_id", "subscription_id") for bad in BAD_IDS],
        "subscriptions_version": [{"version": 0}, {"version": OVER}],
        "subscriptions_monthly_credits": [{"monthly_credits": -1}, {"monthly_credits": OVER}],
        "subscriptions_rollover_limit": [{"rollover_limit": -1}, {"rollover_limit": OVER}],
        "subscriptions_period_granted": [{"period_granted": -1}, {"period_granted": OVER}],
        "subscriptions_active": [{"plan": None}, {"anchor": None, "period": None}],
        "subscriptions_period": [{"period": -1}, {"active": False, "anchor": None}],
        "subscriptions_first_lacks": [{"first_lacks": -1}, {"first_lacks": OVER}],
    },
    "ending_credits": {
        "ending_credits_pkey": [{}, {"seq": 2, "remaining": 1}],
        "ending_credits_origin": [{"origin": bad} for bad in ("", "g1", "adjustment:a1", " grant:g1")],
        "ending_credits_plan": [{"plan": "team"}, {"origin": "subscription:s1:0"}],
        "ending_credits_seq": [{"origin": "grant:g2", "seq": 0}],
        "ending_credits_remaining": [{"origin": "grant:g2", "remaining": bad} for bad in (0, -1, OVER)],
    },
    "daily_sums": {
        "daily_sums_pkey": [{}, {"events": 1}],
        "daily_sums_events": [
            {"day": "2026-02-01", "events": 0},
            {"day": "2026-02-01", "events": 5},
            {"day": "2026-02-01", "first_seq": 7},
        ],
        "daily_sums_first_seq": [{"day": "2026-02-01", "first_seq": 0}],
    },
    "daily_sums_through": {
        "daily_sums_through_pkey": [{}],
        "daily_sums_through_seq": [{"org_id": "globex", "seq": -1}],
    },
    "archived": {"archived_pkey": [{}, {"seq": 6}], "archived_seq": [{"org_id": "globex", "seq": 0}]},
    "archive_head": {
        "archive_head_pkey": [{}, {"head": "a7c0"}],
        "archive_head_number": [{"number": 0}, {"number": 2}],
    },
    "erasures": {"erasures_pkey": [{}, {"seq": 6}], "erasures_seq": [{"org_id": "globex", "seq": -1}]},
    "last_verification": {
        "last_verification_pkey": [{}, {"broken": 1}],
        "last_verification_number": [{"number": 0}, {"number": 2}],
        "last_verification_broken": [{"broken": -1}],
    },
    "posted_messages": {
        "posted_messages_pkey": [{}, {"terms": '{"credits": 1}'}],
        "posted_messages_terms": [{"terms": bad} for bad in ("[]", "null", "1", '"text"')],
        "posted_messages_outcome": [{"outcome": "done"}],
        "posted_messages_reversed": [{"reversed": -1}, {"reversed": 6}],
    },
    "credit_events": {
        "credit_events_pkey": [{"idempotency_key": "grant:g2"}],
        "credit_events_idempotency_key": [{"seq": 2}],
        **{f"credit_events_{name}": changes for name, changes in balance_changes("_after").items()},
        "credit_events_seq": [{"seq": 0}, {"seq": -1}],
        "credit_events_source": [{"source": ""}, {"source": "x" * 65}],
        "credit_events_credits": [{"credits": OVER}, {"event_type": "billing", "credits": -OVER}],
        "credit_events_sign": [
            {"credits": 0},
            {"credits": -1},
            {"event_type": "prepaid_purchase", "credits": 0},
            {"event_type": "refund", "credits": 0},
            {"event_type": "refund", "credits": -5},
            {"event_type": "adjustment", "credits": 0},
            {"event_type": "subscription_credit", "credits": -1},
            {**USAGE, "credits": 1},
            {**RESERVATION, "credits": 1},
            {**RELEASED, "credits": -1},
            {"event_type": "gift"},
            {"event_type": ""},
        ],  # billing may have any sign
        "credit_events_workflow_id": [
            {"workflow_id": "w1"},
            {**BILLING, "workflow_id": "w1"},
            {**USAGE, "workflow_id": None},
            {**RESERVATION, "workflow_id": None},
            {**RELEASED, "workflow_id": None},
        ],
        "credit_events_overdraft": [{**BILLING, "prepaid_balance_after": -1}],
        "credit_events_usage": [{**USAGE, "period_usage_after": 4}],
        "credit_events_hold": [{**RESERVATION, "reserved_after": 4}],
        "credit_events_metadata": [{"metadata": bad} for bad in ("[]", "null", "1", '"text"')],
        "credit_events_release_reason": [
            {**RELEASED, "metadata": json.dumps(bad)}
            for bad in ({}, {"reason": None}, {"reason": "bored"}, {"reason": ["settled"]})
        ],
    },
    "dead_letters": {
        "dead_letters_pkey": [{"body_sha256": b"another"}],
        "dead_letters_open_message": [{"id": 2}],
        "dead_letters_status": [{**DISCARDED, "id": 2, "status": "lost"}],
        "dead_letters_attempts": [{"id": 2, "attempts": 0}],
        "dead_letters_times": [{"id": 2, "last_failed_at": "2026-01-31T08:59:59Z"}],
        "dead_letters_resolved": [
            {"id": 2, "status": "discarded"},
            {"id": 2, "status": "replayed"},
            *({**DISCARDED, "id": 2, column: None} for column in ("resolved_at", "resolved_by", "resolution")),
            *({"id": 2, column: DISCARDED[column]} for column in ("resolved_at", "resolved_by", "resolution")),
        ],
    },
    "waiting_messages": {
        "waiting_messages_pkey": [{"task": "workflow.finish"}],
        "waiting_messages_error": [{"number": 2, "error_code": "undecodable"}, {"number": 2, "error": "not JSON"}],
        "waiting_messages_attempts": [{"number": 2, "attempts": -1}],
    },
}

# What is not the good row, and as good: the constraints refuse no more than they should.
ALSO_GOOD: dict[str, list[Row]] = {
    "wallets": [
        {"org_id": "Z09_.:-" + "x" * 121},
        {"org_id": "new", "last_seq": 0, "last_event_at": None, "subscription_id": None, "next_period_at": None},
        {"org_id": "full", "prepaid_balance": MAX, "reserved": MAX, "next_hold_expiry": NOW, "period_cap": MAX},
        {"org_id": "indebted", "prepaid_balance": -MAX, "subscription_balance": MAX, "period_usage": MAX},
        {"org_id": "settings", "credit_limit": MAX, "config_version": MAX, "period_cap": 0},
        {"org_id": "scheduled", "scheduled_id": "s2", "scheduled_at": NOW, "plan_version": MAX},
        {"org_id": "held", "reserved": 5, "next_hold_expiry": NOW, "held_past_end": 5, "next_ending_at": NOW},
    ],
    "workflows": [
        {"workflow_id": "w2", **REJECTED},
        {"workflow_id": "w3", **RESERVED, "project_id": None},
        {"workflow_id": "w4", **RESERVED, "state": "expired", "cancel_answer": "already_ended"},
        {"workflow_id": "w5", **REJECTED, **NEVER_STARTED, "state": "cancelled", "cancel_answer": "not_started"},
        {"workflow_id": "w6", **NEVER_STARTED},
        {"workflow_id": "w7", "finish_credits": MAX, "refunded": MAX},
        {"workflow_id": "w8", "paid_by_ending": json.dumps({NOW: 80})},
    ],
    "subscriptions": [
        {"subscription_id": "s2", "active": False, "plan": None, "anchor": None, "period": None},
        {"subscription_id": "s3", "period": None, "version": MAX, "monthly_credits": MAX, "rollover_limit": MAX},
        {"subscription_id": "s4", "first_period": None, "period_plan": None},
        {"subscription_id": "s6", "first_lacks": 0},
    ],
    "ending_credits": [
        {"expires_at": "2026-02-28T09:00:00Z"},
        {"origin": "purchase:p1", "remaining": MAX},
        {"origin": "refund:r1"},
        {"origin": "subscription:s1:0", "plan": "team"},
        {"org_id": "globex"},
    ],
    "daily_sums": [
        {"day": "2026-02-01", "credits": 5, "events": 4},
        {"event_type": "refund", "credits": 0},
        {"project_id": "p1", "events": 1, "last_seq": 3},
        {"activity_name": "Crawl"},
    ],
    "daily_sums_through": [{"org_id": "globex", "seq": 0}],
    "archived": [{"org_id": "globex", "seq": 1}],
    "archive_head": [],
    "erasures": [{"org_id": "globex", "seq": 0}],
    "last_verification": [],
    "posted_messages": [
        {"message_id": "p2", "outcome": "ignored", "reason": "stale_version"},
        {"message_id": "p3", "terms": "{}"},
        {"message_id": "p4", "reversed": 5},
    ],
    "credit_events": [
        {"seq": 2, "idempotency_key": "2", **USAGE, "prepaid_balance_after": -5},
        {"seq": 3, "idempotency_key": "3", **RESERVATION},
        {"seq": 4, "idempotency_key": "4", **RELEASED},
        {"seq": 5, "idempotency_key": "5", **BILLING},
        {"seq": 6, "idempotency_key": "6", **BILLING, "credits": 0, "prepaid_balance_after": -1},
        {"seq": 7, "idempotency_key": "7", "event_type": "subscription_credit", "credits": 0},
        {"seq": 8, "idempotency_key": "8", "event_type": "adjustment", "credits": -MAX, "source": "é" * 64},
        {"seq": 9, "idempotency_key": "9", **USAGE, "credits": 0, "period_usage_after": 0},
        {"seq": 10, "idempotency_key": "reversal:v1", **BILLING, "prepaid_balance_after": -5},
        {"seq": 11, "idempotency_key": "refund:r1", "event_type": "refund"},
        {"seq": 12, "idempotency_key": "refund:r2", "event_type": "refund", "workflow_id": "w1"},
    ],
    "dead_letters": [
        {"id": 2, **DISCARDED},
        {"id": 3, **DISCARDED, "status": "replayed"},
        {"id": 4, "task": "workflow.finish", "attempts": 1_000},
    ],
    "waiting_messages": [
        {"number": 2, "attempts": 20},
        {"org_id": "globex"},
        {"org_id": "", "error_code": "undecodable", "error": "not JSON", "answer_to": "somebody"},
    ],
}

OPTIONAL_COLUMNS = {
    "wallets": {
        "last_event_at",
        "period_cap",
        "subscription_id",
        "next_period_at",
        "next_hold_expiry",
        "covers",
        "scheduled_id",
        "scheduled_at",
        "next_ending_at",
    },
    "workflows": {
        "start_credits",
        "start_answer",
        "expires_at",
        "finish_credits",
        "cancel_answer",
        "fail_answer",
        "project_id",
        "activity_name",
        "reserved_seq",
        "paid_by_ending",
        "rejected_at",
    },
    "subscriptions": {"plan", "anchor", "period", "first_period", "period_plan"},
    "ending_credits": {"plan"},
    "daily_sums": set(),
    "daily_sums_through": set(),
    "archived": set(),
    "archive_head": set(),
    "erasures": set(),
    "last_verification": set(),
    "posted_messages": {"reason"},
    "credit_events": {"workflow_id", "project_id", "activity_name"},
    "dead_letters": {"org_id", "traceback", "resolved_at", "resolved_by", "resolution", "traceparent"},
    "waiting_messages": {"answer_to", "error_code", "error", "replay_of", "traceparent"},
}


def insert(connection: Connection, table: str, row: Row) -> None:
    columns, values = ", ".join(row), ", ".join(f":{column}" for column in row)
    connection.execute(text(f"INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE VALUES ({values})"), row)


def refusal(connection: Connection, table: str, row: Row) -> str:
    """The constraint, or the column that must not be NULL, by which the database refuses `row`."""
    try:
        with connection.begin_nested():
            insert(connection, table, row)
    except DataError as error:
        if not isinstance(error.orig, NullValueNotAllowed):
            raise
        return "org_id is NULL"  # says Citus, to which this column names the shard
    except IntegrityError as error:
        # From the text, as Citus passes on nothing else. There, the name of a key ends with the number of the shard.
        of_key = r'constraint "(\w+?)(?:_\d{6,})?"$'
        [refused] = re.findall(rf'{of_key}|null value in column "(\w+)" ', describe(error))
        return refused[0] or f"{refused[1]} is NULL"
    return "accepted"


@pytest.mark.parametrize("table", BAD)
def test_a_bad_row_is_refused_by_exactly_its_constraint(engine: Engine, table: str) -> None:
    with engine.connect() as connection:
        insert(connection, table, GOOD[table])
        refused = [
            (constraint, changes, refusal(connection, table, GOOD[table] | changes))
            for constraint, rows in BAD[table].items()
            for changes in rows
        ]
    assert [wrong for wrong in refused if wrong[0] != wrong[2]] == []


def test_the_sign_of_every_type_of_event_is_tried_here() -> None:
    tried = {changes.get("event_type", "grant") for changes in BAD["credit_events"]["credit_events_sign"]}
    assert tried - {"gift", ""} == set(get_args(EventType)) - {"billing"}


@pytest.mark.parametrize("table", ALSO_GOOD)
def test_a_row_at_the_edge_is_accepted(engine: Engine, table: str) -> None:
    with engine.connect() as connection:
        insert(connection, table, GOOD[table])
        for changes in ALSO_GOOD[table]:
            insert(connection, table, GOOD[table] | changes)


@pytest.mark.parametrize("table", GOOD)
def test_a_column_that_is_not_optional_refuses_null(engine: Engine, table: str) -> None:
    required = set(GOOD[table]) - OPTIONAL_COLUMNS[table]
    with engine.connect() as connection:
        refused = {column: refusal(connection, table, GOOD[table] | {column: None}) for column in required}
    assert refused == {column: f"{column} is NULL" for column in required}


def test_every_constraint_of_the_database_is_tried_here(engine: Engine) -> None:
    constraints = sql(
        engine,
        """
        SELECT conrelid::regclass::text, conname FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype <> 'n' AND conrelid <> 0
          AND conrelid <> 'alembic_version'::regclass
        UNION
        SELECT indrelid::regclass::text, indexrelid::regclass::text FROM pg_index
        WHERE indisunique AND indrelid::regclass::text = ANY(:tables)
        """,
        tables=list(GOOD),
    )
    assert sorted(constraints) == sorted((table, name) for table, rows in BAD.items() for name in rows)
    columns = sql(
        engine,
        """
        SELECT relname, attname, attnotnull FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
          AND relname <> 'alembic_version'
        """,
    )
    assert sorted(columns) == sorted(
        (table, column, column not in OPTIONAL_COLUMNS[table]) for table, row in GOOD.items() for column in row
    )


def test_events_cannot_be_changed_deleted_or_truncated(engine: Engine) -> None:
    with engine.begin() as connection:
        insert(connection, "credit_events", GOOD["credit_events"])
    for statement in (
        "UPDATE credit_events SET credits = 6",
        "UPDATE credit_events SET credits = 6 WHERE seq = 1",
        "DELETE FROM credit_events",
        "DELETE FROM credit_events WHERE seq = 1",
        "TRUNCATE credit_events",
        "TRUNCATE wallets, credit_events",
    ):
        with pytest.raises(IntegrityError) as refused:
            sql(engine, statement)
        operation = statement.split()[0]
        assert str(refused.value.orig).splitlines()[0] == f"credit_events is append-only: {operation} is refused"
    assert sql(engine, "SELECT credits FROM credit_events") == [(5,)]


def test_an_upsert_cannot_change_an_event_either(engine: Engine) -> None:
    with engine.begin() as connection:
        insert(connection, "credit_events", GOOD["credit_events"])
    with pytest.raises(IntegrityError, match="credit_events is append-only: UPDATE is refused"):
        sql(
            engine,
            "INSERT INTO credit_events SELECT * FROM credit_events ON CONFLICT (org_id, seq) DO UPDATE SET credits = 6",
        )


def test_events_are_refused_to_the_owner_of_the_table(engine: Engine) -> None:
    owner = "SELECT tableowner = current_user FROM pg_tables WHERE tablename = 'credit_events'"
    assert sql(engine, owner) == [(True,)]  # so the tests above are tests of the owner
