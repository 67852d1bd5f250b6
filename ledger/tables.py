"""The tables, for SQLAlchemy Core. `migrations/` creates them, and a test compares the two.

Every CHECK restates a rule of the ledger, so the database, too, refuses a row that the rules cannot make. Every key
begins with `org_id`, so the tables can be distributed by it. Only dead letters, which may name no organization, and the
last verification have a number of their own.
"""

from typing import Any, assert_never, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.types import TypeEngine

from holdfast_client.messages import ID_CHARACTERS, MAX_CREDITS, MAX_ID_LENGTH
from holdfast_client.results import OutcomeName, WorkflowState
from ledger.state import EventType, StepAnswer

metadata = MetaData()


def _check(name: str, rule: str) -> CheckConstraint:
    return CheckConstraint(rule, name=name)


def _one_of(column: str, choices: object) -> str:
    return f"{column} IN ({', '.join(repr(choice) for choice in get_args(choices))})"


def _column(name: str, column_type: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, column_type, nullable=False)


def _optional(name: str, column_type: TypeEngine[Any] | type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, column_type, nullable=True)


Timestamp = TIMESTAMP(timezone=True)


def _ids(*columns: str) -> str:
    # Not one pattern with a bound, for which PostgreSQL takes 25 times as long, on every row that is written.
    return " AND ".join(
        f"length({column}) BETWEEN 1 AND {MAX_ID_LENGTH} AND {column} !~ '[^{ID_CHARACTERS}]'" for column in columns
    )


# The bounds of a wallet's balances, in the table of wallets and after every event.
_BALANCE_RULES = {
    "balance_upper_bound": f"prepaid_balance{{0}} + subscription_balance{{0}} <= {MAX_CREDITS}",
    "available_lower_bound": f"prepaid_balance{{0}} - reserved{{0}} >= -{MAX_CREDITS}",
    "subscription_balance_range": f"subscription_balance{{0}} BETWEEN 0 AND {MAX_CREDITS}",
    "reserved_range": f"reserved{{0}} BETWEEN 0 AND {MAX_CREDITS}",
    "period_usage_range": f"period_usage{{0}} BETWEEN 0 AND {MAX_CREDITS}",
}

wallets = Table(
    "wallets",
    metadata,
    _column("org_id", Text),
    _column("last_seq", BigInteger),
    _optional("last_event_at", Timestamp),
    _column("prepaid_balance", BigInteger),
    _column("subscription_balance", BigInteger),
    _column("reserved", BigInteger),
    _column("period_usage", BigInteger),
    _column("credit_limit", BigInteger),
    _optional("period_cap", BigInteger),
    _column("config_version", BigInteger),
    _optional("subscription_id", Text),
    _optional("next_period_at", Timestamp),
    _optional("next_hold_expiry", Timestamp),
    Column("plan_version", BigInteger, nullable=False, server_default=text("0")),
    _optional("scheduled_id", Text),
    _optional("scheduled_at", Timestamp),
    _optional("next_ending_at", Timestamp),
    Column("held_past_end", BigInteger, nullable=False, server_default=text("0")),
    _optional("covers", JSONB),
    PrimaryKeyConstraint("org_id", name="wallets_pkey"),
    *(_check(f"wallets_{name}", rule.format("")) for name, rule in _BALANCE_RULES.items()),
    _check("wallets_org_id", _ids("org_id")),
    _check("wallets_last_seq", "last_seq >= 0 AND (last_seq = 0) = (last_event_at IS NULL)"),
    _check("wallets_credit_limit", f"credit_limit BETWEEN 0 AND {MAX_CREDITS}"),
    _check("wallets_period_cap", f"period_cap BETWEEN 0 AND {MAX_CREDITS}"),
    _check("wallets_config_version", f"config_version BETWEEN 0 AND {MAX_CREDITS}"),
    _check("wallets_subscription", "(subscription_id IS NULL) = (next_period_at IS NULL)"),
    _check("wallets_next_hold_expiry", "reserved = 0 OR next_hold_expiry IS NOT NULL"),
    _check("wallets_scheduled", "(scheduled_id IS NULL) = (scheduled_at IS NULL)"),
    _check("wallets_held_past_end", "held_past_end = 0 OR held_past_end BETWEEN 0 AND reserved"),
    _check("wallets_plan_version", f"plan_version BETWEEN 0 AND {MAX_CREDITS}"),
    # The scheduler finds due wallets by these two.
    Index("wallets_due_periods", "next_period_at", "org_id", postgresql_where=text("next_period_at IS NOT NULL")),
    Index(
        "wallets_due_holds",
        "next_hold_expiry",
        "org_id",
        postgresql_where=text("next_hold_expiry IS NOT NULL"),
    ),
)

workflows = Table(
    "workflows",
    metadata,
    _column("org_id", Text),
    _column("workflow_id", Text),
    _column("state", Text),
    _optional("start_credits", BigInteger),
    _optional("start_answer", Text),
    _optional("expires_at", Timestamp),
    _optional("finish_credits", BigInteger),
    _optional("cancel_answer", Text),
    _optional("fail_answer", Text),
    _column("refunded", BigInteger),
    _optional("project_id", Text),
    _optional("activity_name", Text),
    _optional("reserved_seq", BigInteger),
    _optional("paid_by_ending", JSONB),
    _optional("rejected_at", Timestamp),
    PrimaryKeyConstraint("org_id", "workflow_id", name="workflows_pkey"),
    _check("workflows_ids", _ids("org_id", "workflow_id", "project_id")),
    _check("workflows_state", _one_of("state", WorkflowState)),
    _check("workflows_start_credits", f"start_credits BETWEEN 0 AND {MAX_CREDITS}"),
    _check("workflows_finish_credits", f"finish_credits BETWEEN 0 AND {MAX_CREDITS}"),
    _check("workflows_start", "(start_credits IS NULL) = (start_answer IS NULL)"),
    _check("workflows_start_answer", _one_of("start_answer", StepAnswer)),
    _check("workflows_cancel_answer", _one_of("cancel_answer", StepAnswer)),
    _check("workflows_fail_answer", _one_of("fail_answer", StepAnswer)),
    _check("workflows_settled", "(state = 'settled') = (finish_credits IS NOT NULL)"),
    _check("workflows_hold", "COALESCE(start_answer = 'reserved', false) = (expires_at IS NOT NULL)"),
    _check("workflows_reserved", "state NOT IN ('reserved', 'expired') OR expires_at IS NOT NULL"),
    _check("workflows_refunded", "refunded BETWEEN 0 AND COALESCE(finish_credits, 0)"),
    # What a customer is told of first is found through this.
    Index("workflows_rejected", "org_id", "rejected_at", postgresql_where=text("state = 'rejected'")),
    Index("workflows_open_holds", "org_id", "expires_at", postgresql_where=text("state = 'reserved'")),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    _column("org_id", Text),
    _column("subscription_id", Text),
    _column("version", BigInteger),
    _column("active", Boolean),
    _optional("plan", Text),
    _column("monthly_credits", BigInteger),
    _column("rollover_limit", BigInteger),
    _optional("anchor", Timestamp),
    _optional("period", Integer),
    _column("period_granted", BigInteger),
    Column("first_lacks", BigInteger, nullable=False, server_default=text("0")),
    _optional("first_period", Integer),
    _optional("period_plan", Text),
    PrimaryKeyConstraint("org_id", "subscription_id", name="subscriptions_pkey"),
    _check("subscriptions_ids", _ids("org_id", "subscription_id")),
    _check("subscriptions_version", f"version BETWEEN 1 AND {MAX_CREDITS}"),
    _check("subscriptions_monthly_credits", f"monthly_credits BETWEEN 0 AND {MAX_CREDITS}"),
    _check("subscriptions_rollover_limit", f"rollover_limit BETWEEN 0 AND {MAX_CREDITS}"),
    _check("subscriptions_period_granted", f"period_granted BETWEEN 0 AND {MAX_CREDITS}"),
    _check("subscriptions_active", "NOT active OR (plan IS NOT NULL AND anchor IS NOT NULL)"),
    _check("subscriptions_period", "period IS NULL OR (period >= 0 AND anchor IS NOT NULL)"),
    _check("subscriptions_first_lacks", f"first_lacks BETWEEN 0 AND {MAX_CREDITS}"),
    # Those that a wallet has scheduled are among them.
    Index(
        "subscriptions_to_begin",
        "anchor",
        "org_id",
        postgresql_where=text("active AND period IS NULL"),
    ),
)

ending_credits = Table(
    "ending_credits",
    metadata,
    _column("org_id", Text),
    _column("origin", Text),
    _column("expires_at", Timestamp),
    _column("seq", BigInteger),
    _column("remaining", BigInteger),
    _optional("plan", Text),
    PrimaryKeyConstraint("org_id", "origin", "expires_at", name="ending_credits_pkey"),
    _check("ending_credits_origin", "origin ~ '^(grant|purchase|refund|subscription):'"),
    _check("ending_credits_plan", "(plan IS NOT NULL) = starts_with(origin, 'subscription:')"),
    _check("ending_credits_seq", "seq >= 1"),
    _check("ending_credits_remaining", f"remaining BETWEEN 1 AND {MAX_CREDITS}"),
    # What time alone ends is found through this.
    Index("ending_credits_due", "expires_at", "org_id"),
)

posted_messages = Table(
    "posted_messages",
    metadata,
    _column("org_id", Text),
    _column("kind", Text),
    _column("message_id", Text),
    _column("terms", JSONB),
    _column("outcome", Text),
    _optional("reason", Text),
    Column("reversed", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("org_id", "kind", "message_id", name="posted_messages_pkey"),
    _check("posted_messages_terms", "jsonb_typeof(terms) = 'object'"),
    _check("posted_messages_outcome", _one_of("outcome", OutcomeName)),
    _check("posted_messages_reversed", "reversed = 0 OR reversed BETWEEN 0 AND (terms ->> 'credits')::bigint"),
    # A purchase, a refund and so on is found through this, whoever's it is. A version of limits has no name of its own.
    Index("posted_messages_of_all", "message_id", postgresql_where=text("kind <> 'configure'")),
    # The refunds of a workflow are found through this.
    Index(
        "posted_messages_refunds",
        "org_id",
        text("(terms ->> 'workflow_id')"),
        postgresql_where=text("kind = 'refund'"),
    ),
)


def _sign(event_type: EventType) -> str:
    match event_type:
        case "reservation" | "usage":
            return "credits <= 0"
        case "reservation_released" | "subscription_credit":
            return "credits >= 0"
        case "prepaid_purchase" | "grant" | "refund":
            return "credits > 0"
        case "adjustment":
            return "credits <> 0"
        case "billing":
            return "true"
        case _:
            assert_never(event_type)


_SIGNS = " ".join(f"WHEN '{event_type}' THEN {_sign(event_type)}" for event_type in get_args(EventType))
_WORKFLOW_EVENTS = "('reservation', 'reservation_released', 'usage')"

credit_events = Table(
    "credit_events",
    metadata,
    _column("org_id", Text),
    _column("seq", BigInteger),
    _column("created_at", Timestamp),
    _column("event_type", Text),
    _column("source", Text),
    _optional("workflow_id", Text),
    _optional("project_id", Text),
    _optional("activity_name", Text),
    _column("credits", BigInteger),
    _column("prepaid_balance_after", BigInteger),
    _column("subscription_balance_after", BigInteger),
    _column("reserved_after", BigInteger),
    _column("period_usage_after", BigInteger),
    _column("idempotency_key", Text),
    _column("metadata", JSONB),
    # Includes the columns of the filters, so that they read matching events only.
    PrimaryKeyConstraint("org_id", "seq", name="credit_events_pkey", postgresql_include=["event_type", "project_id"]),
    UniqueConstraint("org_id", "idempotency_key", name="credit_events_idempotency_key"),
    *(_check(f"credit_events_{name}", rule.format("_after")) for name, rule in _BALANCE_RULES.items()),
    _check("credit_events_seq", "seq >= 1"),
    _check("credit_events_source", "length(source) BETWEEN 1 AND 64"),
    _check("credit_events_credits", f"credits BETWEEN -{MAX_CREDITS} AND {MAX_CREDITS}"),
    _check("credit_events_sign", f"CASE event_type {_SIGNS} ELSE false END"),
    # A refund may name one; those that were written before revision 0017 do not.
    _check(
        "credit_events_workflow_id",
        f"(workflow_id IS NOT NULL) = (event_type IN {_WORKFLOW_EVENTS}) OR event_type = 'refund'",
    ),
    _check(
        "credit_events_overdraft",
        "event_type <> 'billing' OR credits >= 0 OR prepaid_balance_after >= 0"
        " OR starts_with(idempotency_key, 'reversal:')",
    ),
    _check("credit_events_usage", "event_type <> 'usage' OR period_usage_after >= -credits"),
    _check("credit_events_hold", "event_type <> 'reservation' OR reserved_after >= -credits"),
    _check("credit_events_metadata", "jsonb_typeof(metadata) = 'object'"),
    _check(
        "credit_events_release_reason",
        "event_type <> 'reservation_released'"
        " OR COALESCE(metadata ->> 'reason' IN ('settled', 'cancelled', 'failed', 'expired'), false)",
    ),
    # What operators did is found through this. Other events are not in it, and cost it nothing.
    Index("credit_events_of_operators", "created_at", "org_id", "seq", postgresql_where=text("source = 'operator'")),
)

# For each UTC day, the sums of the events up to `daily_sums_through.seq`. An empty text stands for none.
daily_sums = Table(
    "daily_sums",
    metadata,
    _column("org_id", Text),
    _column("day", Date),
    _column("event_type", Text),
    _column("project_id", Text),
    _column("activity_name", Text),
    _column("source", Text),
    _column("events", BigInteger),
    _column("credits", Numeric),
    _column("first_seq", BigInteger),
    _column("last_seq", BigInteger),
    PrimaryKeyConstraint(
        "org_id", "day", "event_type", "project_id", "activity_name", "source", name="daily_sums_pkey"
    ),
    _check("daily_sums_events", "events BETWEEN 1 AND last_seq - first_seq + 1"),
    _check("daily_sums_first_seq", "first_seq >= 1"),
)

daily_sums_through = Table(
    "daily_sums_through",
    metadata,
    _column("org_id", Text),
    _column("seq", BigInteger),
    PrimaryKeyConstraint("org_id", name="daily_sums_through_pkey"),
    _check("daily_sums_through_seq", "seq >= 0"),
)

# Up to which event the history of a wallet is in the archive, the balances after that event, and what `ledger.audit`
# needs of the archived events: the sums of reservations, releases, usage, messages with credits and reversals, and by
# how much the prepaid credits with an end changed.
archived = Table(
    "archived",
    metadata,
    _column("org_id", Text),
    _column("seq", BigInteger),
    _column("created_at", Timestamp),
    _column("prepaid_balance", BigInteger),
    _column("subscription_balance", BigInteger),
    _column("reserved", BigInteger),
    _column("period_usage", BigInteger),
    _column("held", Numeric),
    _column("released", Numeric),
    _column("used", Numeric),
    _column("posted", Numeric),
    _column("reversed", Numeric),
    _column("ending", Numeric),
    PrimaryKeyConstraint("org_id", name="archived_pkey"),
    _check("archived_seq", "seq >= 1"),
)

# One row, once something was archived: whose archive it is, and the last entry of its manifest.
archive_head = Table(
    "archive_head",
    metadata,
    Column("number", BigInteger, nullable=False, server_default=text("1")),
    _column("installation", Text),
    _column("head", Text),
    PrimaryKeyConstraint("number", name="archive_head_pkey"),
    _check("archive_head_number", "number = 1"),
)

# Whose free text was erased, up to which event, by whom and why.
erasures = Table(
    "erasures",
    metadata,
    _column("org_id", Text),
    _column("erased_at", Timestamp),
    _column("seq", BigInteger),
    _column("erased_by", Text),
    _column("why", Text),
    PrimaryKeyConstraint("org_id", "erased_at", name="erasures_pkey"),
    _check("erasures_seq", "seq >= 0"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("status", Text, nullable=False, server_default="open"),
    _column("task", Text),
    _optional("org_id", Text),
    _column("body", LargeBinary),
    _column("body_sha256", LargeBinary),  # of its arguments, if it has any: see `dead_letters.record`
    _column("error_code", Text),
    _column("error", Text),
    _optional("traceback", Text),
    _column("attempts", BigInteger),
    Column("first_failed_at", Timestamp, nullable=False, server_default=func.clock_timestamp()),
    Column("last_failed_at", Timestamp, nullable=False, server_default=func.clock_timestamp()),
    _optional("resolved_at", Timestamp),
    _optional("resolved_by", Text),
    _optional("resolution", Text),
    # See `causes.cause_of`; empty if an older version wrote the letter, until its message fails again.
    Column("cause", Text, nullable=False, server_default=""),
    _optional("traceparent", Text),
    PrimaryKeyConstraint("id", name="dead_letters_pkey"),
    _check("dead_letters_status", "status IN ('open', 'replayed', 'discarded')"),
    _check("dead_letters_attempts", "attempts >= 1"),
    _check("dead_letters_times", "last_failed_at >= first_failed_at"),
    _check(
        "dead_letters_resolved",
        "CASE WHEN status = 'open' THEN resolved_at IS NULL AND resolved_by IS NULL AND resolution IS NULL"
        " ELSE resolved_at IS NOT NULL AND resolved_by IS NOT NULL AND resolution IS NOT NULL END",
    ),
    # A message that fails again is another attempt of its open dead letter.
    Index(
        "dead_letters_open_message",
        "task",
        "body_sha256",
        unique=True,
        postgresql_where=text("status = 'open'"),
    ),
    # Letters are grouped through this alone, without a look at what they hold.
    Index(
        "dead_letters_causes",
        *("status", "org_id", "task", "error_code", "cause", "id"),
        postgresql_include=["first_failed_at", "last_failed_at"],
    ),
)

# One row: how many invariants the last `holdfast verify` found broken.
last_verification = Table(
    "last_verification",
    metadata,
    Column("number", BigInteger, nullable=False, server_default=text("1")),
    _column("ended_at", Timestamp),
    _column("broken", BigInteger),
    PrimaryKeyConstraint("number", name="last_verification_pkey"),
    _check("last_verification_number", "number = 1"),
    _check("last_verification_broken", "broken >= 0"),
)

waiting_messages = Table(
    "waiting_messages",
    metadata,
    _column("org_id", Text),  # empty: the message names none
    Column("number", BigInteger, Identity(always=True), nullable=False),
    _column("task", Text),
    _column("body", LargeBinary),
    _optional("answer_to", Text),
    _optional("error_code", Text),  # why it will be a dead letter, if that is known
    _optional("error", Text),
    _column("reason", Text),
    Column("waiting_since", Timestamp, nullable=False, server_default=func.clock_timestamp()),
    Column("attempts", BigInteger, nullable=False, server_default=text("0")),
    _optional("replay_of", BigInteger),  # the dead letter whose message this is, sent again
    _optional("traceparent", Text),
    PrimaryKeyConstraint("org_id", "number", name="waiting_messages_pkey"),
    _check("waiting_messages_error", "(error_code IS NULL) = (error IS NULL)"),
    _check("waiting_messages_attempts", "attempts >= 0"),
)
