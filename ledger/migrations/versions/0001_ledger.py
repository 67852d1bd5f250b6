"""The ledger: wallets, workflows, subscriptions, posted messages, credit events, dead letters."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_TABLES = """
CREATE TABLE credit_events (
    org_id TEXT NOT NULL,
    seq BIGINT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    event_type TEXT NOT NULL,
    source TEXT NOT NULL,
    workflow_id TEXT,
    project_id TEXT,
    activity_name TEXT,
    credits BIGINT NOT NULL,
    prepaid_balance_after BIGINT NOT NULL,
    subscription_balance_after BIGINT NOT NULL,
    reserved_after BIGINT NOT NULL,
    period_usage_after BIGINT NOT NULL,
    idempotency_key TEXT NOT NULL,
    metadata JSONB NOT NULL,
    CONSTRAINT credit_events_pkey PRIMARY KEY (org_id, seq),
    CONSTRAINT credit_events_idempotency_key UNIQUE (org_id, idempotency_key),
    CONSTRAINT credit_events_balance_upper_bound CHECK (prepaid_balance_after + subscription_balance_after <= 9007199254740991),
    CONSTRAINT credit_events_available_lower_bound CHECK (prepaid_balance_after - reserved_after >= -9007199254740991),
    CONSTRAINT credit_events_subscription_balance_range CHECK (subscription_balance_after BETWEEN 0 AND 9007199254740991),
    CONSTRAINT credit_events_reserved_range CHECK (reserved_after BETWEEN 0 AND 9007199254740991),
    CONSTRAINT credit_events_period_usage_range CHECK (period_usage_after BETWEEN 0 AND 9007199254740991),
    CONSTRAINT credit_events_seq CHECK (seq >= 1),
    CONSTRAINT credit_events_event_type CHECK (event_type IN ('usage', 'prepaid_purchase', 'subscription_credit', 'billing', 'adjustment', 'grant', 'refund', 'reservation', 'reservation_released')),
    CONSTRAINT credit_events_source CHECK (length(source) BETWEEN 1 AND 64),
    CONSTRAINT credit_events_credits CHECK (credits BETWEEN -9007199254740991 AND 9007199254740991),
    CONSTRAINT credit_events_sign CHECK (CASE event_type WHEN 'reservation' THEN credits <= 0 WHEN 'usage' THEN credits <= 0 WHEN 'reservation_released' THEN credits >= 0 WHEN 'subscription_credit' THEN credits >= 0 WHEN 'adjustment' THEN credits <> 0 WHEN 'billing' THEN true ELSE credits > 0 END),
    CONSTRAINT credit_events_workflow_id CHECK ((workflow_id IS NOT NULL) = (event_type IN ('reservation', 'reservation_released', 'usage'))),
    CONSTRAINT credit_events_overdraft CHECK (event_type <> 'billing' OR credits >= 0 OR prepaid_balance_after >= 0),
    CONSTRAINT credit_events_usage CHECK (event_type <> 'usage' OR period_usage_after >= -credits),
    CONSTRAINT credit_events_hold CHECK (event_type <> 'reservation' OR reserved_after >= -credits),
    CONSTRAINT credit_events_metadata CHECK (jsonb_typeof(metadata) = 'object'),
    CONSTRAINT credit_events_release_reason CHECK (event_type <> 'reservation_released' OR COALESCE(metadata ->> 'reason' IN ('settled', 'cancelled', 'failed', 'expired'), false))
);
CREATE TABLE dead_letters (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    status TEXT DEFAULT 'open' NOT NULL,
    task TEXT NOT NULL,
    org_id TEXT,
    body BYTEA NOT NULL,
    body_sha256 BYTEA NOT NULL,
    error_code TEXT NOT NULL,
    error TEXT NOT NULL,
    traceback TEXT,
    attempts BIGINT NOT NULL,
    first_failed_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    last_failed_at TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
    resolved_at TIMESTAMP WITH TIME ZONE,
    resolved_by TEXT,
    resolution TEXT,
    CONSTRAINT dead_letters_pkey PRIMARY KEY (id),
    CONSTRAINT dead_letters_status CHECK (status IN ('open', 'replayed', 'discarded')),
    CONSTRAINT dead_letters_attempts CHECK (attempts >= 1),
    CONSTRAINT dead_letters_times CHECK (last_failed_at >= first_failed_at),
    CONSTRAINT dead_letters_resolved CHECK (CASE WHEN status = 'open' THEN resolved_at IS NULL AND resolved_by IS NULL AND resolution IS NULL ELSE resolved_at IS NOT NULL AND resolved_by IS NOT NULL AND resolution IS NOT NULL END)
);
CREATE UNIQUE INDEX dead_letters_open_message ON dead_letters (task, body_sha256) WHERE status = 'open';
CREATE TABLE posted_messages (
    org_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    message_id TEXT NOT NULL,
    terms JSONB NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT,
    CONSTRAINT posted_messages_pkey PRIMARY KEY (org_id, kind, message_id),
    CONSTRAINT posted_messages_terms CHECK (jsonb_typeof(terms) = 'object'),
    CONSTRAINT posted_messages_outcome CHECK (outcome IN ('reserved', 'rejected', 'settled', 'released', 'posted', 'ignored'))
);
CREATE TABLE subscriptions (
    org_id TEXT NOT NULL,
    subscription_id TEXT NOT NULL,
    version BIGINT NOT NULL,
    active BOOLEAN NOT NULL,
    plan TEXT,
    monthly_credits BIGINT NOT NULL,
    rollover_limit BIGINT NOT NULL,
    anchor TIMESTAMP WITH TIME ZONE,
    period INTEGER,
    period_granted BIGINT NOT NULL,
    CONSTRAINT subscriptions_pkey PRIMARY KEY (org_id, subscription_id),
    CONSTRAINT subscriptions_ids CHECK (org_id ~ '^[A-Za-z0-9_.:-]{1,128}$' AND subscription_id ~ '^[A-Za-z0-9_.:-]{1,128}$'),
    CONSTRAINT subscriptions_version CHECK (version BETWEEN 1 AND 9007199254740991),
    CONSTRAINT subscriptions_monthly_credits CHECK (monthly_credits BETWEEN 0 AND 9007199254740991),
    CONSTRAINT subscriptions_rollover_limit CHECK (rollover_limit BETWEEN 0 AND 9007199254740991),
    CONSTRAINT subscriptions_period_granted CHECK (period_granted BETWEEN 0 AND 9007199254740991),
    CONSTRAINT subscriptions_active CHECK (NOT active OR (plan IS NOT NULL AND anchor IS NOT NULL)),
    CONSTRAINT subscriptions_period CHECK (period IS NULL OR (period >= 0 AND anchor IS NOT NULL))
);
CREATE TABLE wallets (
    org_id TEXT NOT NULL,
    last_seq BIGINT NOT NULL,
    last_event_at TIMESTAMP WITH TIME ZONE,
    prepaid_balance BIGINT NOT NULL,
    subscription_balance BIGINT NOT NULL,
    reserved BIGINT NOT NULL,
    period_usage BIGINT NOT NULL,
    credit_limit BIGINT NOT NULL,
    period_cap BIGINT,
    config_version BIGINT NOT NULL,
    subscription_id TEXT,
    next_period_at TIMESTAMP WITH TIME ZONE,
    next_hold_expiry TIMESTAMP WITH TIME ZONE,
    CONSTRAINT wallets_pkey PRIMARY KEY (org_id),
    CONSTRAINT wallets_balance_upper_bound CHECK (prepaid_balance + subscription_balance <= 9007199254740991),
    CONSTRAINT wallets_available_lower_bound CHECK (prepaid_balance - reserved >= -9007199254740991),
    CONSTRAINT wallets_subscription_balance_range CHECK (subscription_balance BETWEEN 0 AND 9007199254740991),
    CONSTRAINT wallets_reserved_range CHECK (reserved BETWEEN 0 AND 9007199254740991),
    CONSTRAINT wallets_period_usage_range CHECK (period_usage BETWEEN 0 AND 9007199254740991),
    CONSTRAINT wallets_org_id CHECK (org_id ~ '^[A-Za-z0-9_.:-]{1,128}$'),
    CONSTRAINT wallets_last_seq CHECK (last_seq >= 0 AND (last_seq = 0) = (last_event_at IS NULL)),
    CONSTRAINT wallets_credit_limit CHECK (credit_limit BETWEEN 0 AND 9007199254740991),
    CONSTRAINT wallets_period_cap CHECK (period_cap BETWEEN 0 AND 9007199254740991),
    CONSTRAINT wallets_config_version CHECK (config_version BETWEEN 0 AND 9007199254740991),
    CONSTRAINT wallets_subscription CHECK ((subscription_id IS NULL) = (next_period_at IS NULL)),
    CONSTRAINT wallets_next_hold_expiry CHECK (reserved = 0 OR next_hold_expiry IS NOT NULL)
);
CREATE INDEX wallets_due_holds ON wallets (next_hold_expiry, org_id) WHERE next_hold_expiry IS NOT NULL;
CREATE INDEX wallets_due_periods ON wallets (next_period_at, org_id) WHERE next_period_at IS NOT NULL;
CREATE TABLE workflows (
    org_id TEXT NOT NULL,
    workflow_id TEXT NOT NULL,
    state TEXT NOT NULL,
    start_credits BIGINT,
    start_answer TEXT,
    expires_at TIMESTAMP WITH TIME ZONE,
    finish_credits BIGINT,
    cancel_answer TEXT,
    fail_answer TEXT,
    refunded BIGINT NOT NULL,
    project_id TEXT,
    activity_name TEXT,
    CONSTRAINT workflows_pkey PRIMARY KEY (org_id, workflow_id),
    CONSTRAINT workflows_ids CHECK (org_id ~ '^[A-Za-z0-9_.:-]{1,128}$' AND workflow_id ~ '^[A-Za-z0-9_.:-]{1,128}$' AND project_id ~ '^[A-Za-z0-9_.:-]{1,128}$'),
    CONSTRAINT workflows_state CHECK (state IN ('reserved', 'rejected', 'settled', 'cancelled', 'failed', 'expired')),
    CONSTRAINT workflows_start_credits CHECK (start_credits BETWEEN 0 AND 9007199254740991),
    CONSTRAINT workflows_finish_credits CHECK (finish_credits BETWEEN 0 AND 9007199254740991),
    CONSTRAINT workflows_start CHECK ((start_credits IS NULL) = (start_answer IS NULL)),
    CONSTRAINT workflows_start_answer CHECK (start_answer IN ('reserved', 'insufficient_credits', 'period_cap', 'released', 'not_started', 'already_ended')),
    CONSTRAINT workflows_cancel_answer CHECK (cancel_answer IN ('reserved', 'insufficient_credits', 'period_cap', 'released', 'not_started', 'already_ended')),
    CONSTRAINT workflows_fail_answer CHECK (fail_answer IN ('reserved', 'insufficient_credits', 'period_cap', 'released', 'not_started', 'already_ended')),
    CONSTRAINT workflows_settled CHECK ((state = 'settled') = (finish_credits IS NOT NULL)),
    CONSTRAINT workflows_hold CHECK (COALESCE(start_answer = 'reserved', false) = (expires_at IS NOT NULL)),
    CONSTRAINT workflows_reserved CHECK (state NOT IN ('reserved', 'expired') OR expires_at IS NOT NULL),
    CONSTRAINT workflows_refunded CHECK (refunded BETWEEN 0 AND COALESCE(finish_credits, 0))
);
CREATE INDEX workflows_open_holds ON workflows (org_id, expires_at) WHERE state = 'reserved';
"""

_APPEND_ONLY = """
CREATE FUNCTION credit_events_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'credit_events is append-only: % is refused', TG_OP USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER credit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_events
    FOR EACH STATEMENT EXECUTE FUNCTION credit_events_refuse_change();
"""


def upgrade() -> None:
    op.execute(_TABLES)
    op.execute(_APPEND_ONLY)


def downgrade() -> None:
    op.execute("DROP TABLE dead_letters, credit_events, posted_messages, subscriptions, workflows, wallets")
    op.execute("DROP FUNCTION credit_events_refuse_change()")
