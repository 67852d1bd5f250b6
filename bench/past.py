"""The past of a ledger before a measurement, written set by set, as its messages would have left it.

The invariants hold: after the measurement, `verify` runs on every ledger that was filled here.
"""

from sqlalchemy import Engine, text

from bench.workload import FUNDS

PLAN_CREDITS = 1_000
PROJECTS = 5
EVENTS_PER_WORKFLOW, CREDITS_PER_WORKFLOW = 3, 7


def workflows_each(events: int, *, organizations: int) -> int:
    """The number of finished workflows of each organization that gives about so many events in all."""
    return (events // organizations - 1) // EVENTS_PER_WORKFLOW


def fill(engine: Engine, *, organizations: int, workflows_each: int) -> None:
    """Write `organizations` with FUNDS and `workflows_each` finished workflows, evenly over the last 300 days."""
    sizes = {"organizations": organizations, "workflows": workflows_each, "funds": FUNDS, "projects": PROJECTS}
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in (_PAST_WALLETS, _PAST_GRANTS, _PAST_WORKFLOWS, _PAST_EVENTS):
            connection.execute(text(statement), sizes)


def fill_due(engine: Engine, *, organizations: int) -> None:
    """Write `organizations` whose subscription period is over, with all of its credits unused, and the next one due."""
    sizes = {"organizations": organizations, "plan_credits": PLAN_CREDITS}
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in (_DUE_WALLETS, _DUE_SUBSCRIPTIONS, _DUE_MESSAGES, _DUE_EVENTS):
            connection.execute(text(statement), sizes)


def fill_naive(engine: Engine, *, organizations: int) -> None:
    """Write `organizations` with FUNDS into the tables of the naive way."""
    with engine.begin() as connection:
        connection.execute(text(_NAIVE_WALLETS), {"organizations": organizations, "funds": FUNDS})


# An organization's events are: a grant, then for each workflow 10 credits reserved, released, and 7 used.
_PAST_WALLETS = """
    INSERT INTO wallets (org_id, last_seq, last_event_at, prepaid_balance, subscription_balance, reserved,
                         period_usage, credit_limit, config_version)
    SELECT 'org-' || org, 1 + 3 * :workflows, date_trunc('hour', now()) - interval '1 hour', :funds - 7 * :workflows,
           0, 0, 7 * :workflows, 0, 0
    FROM generate_series(0, :organizations - 1) AS org
"""
_PAST_GRANTS = """
    INSERT INTO posted_messages (org_id, kind, message_id, terms, outcome)
    SELECT org_id, 'grant', 'funds', jsonb_build_object('credits', CAST(:funds AS bigint), 'reason', NULL), 'posted'
    FROM wallets
"""
_PAST_WORKFLOWS = """
    INSERT INTO workflows (org_id, workflow_id, state, start_credits, start_answer, expires_at, finish_credits,
                           refunded, project_id, activity_name)
    SELECT org_id, 'old-' || number, 'settled', 10, 'reserved', now(), 7, 0, 'project-' || number % :projects,
           'Weekly report'
    FROM generate_series(1, :workflows) AS number CROSS JOIN wallets
"""
_PAST_EVENTS = """
    INSERT INTO credit_events (org_id, seq, created_at, event_type, source, workflow_id, project_id, activity_name,
                               credits, prepaid_balance_after, subscription_balance_after, reserved_after,
                               period_usage_after, idempotency_key, metadata)
    SELECT org_id, seq, last_event_at - interval '300 days' * (CAST(last_seq - seq AS float) / last_seq),
           event_type, source, workflow_id, project_id, activity_name,
           credits, :funds - used, 0, reserved, used, concat(key, workflow_id), metadata
    FROM (
        SELECT org_id, 3 * number - 1 AS seq, 'reservation' AS event_type, 'workflow-engine' AS source,
               -10 AS credits, 10 AS reserved, 7 * number - 7 AS used, 'start:' AS key,
               jsonb_build_object('expires_at', now()) AS metadata, workflow_id, project_id, activity_name
        FROM (SELECT *, substr(workflow_id, 5)::bigint AS number FROM workflows) AS past
        UNION ALL
        SELECT org_id, 3 * number, 'reservation_released', 'workflow-engine',
               10, 0, 7 * number - 7, 'release:',
               '{"reason": "settled"}', workflow_id, project_id, activity_name
        FROM (SELECT *, substr(workflow_id, 5)::bigint AS number FROM workflows) AS past
        UNION ALL
        SELECT org_id, 3 * number + 1, 'usage', 'workflow-engine',
               -7, 0, 7 * number, 'finish:',
               '{}', workflow_id, project_id, activity_name
        FROM (SELECT *, substr(workflow_id, 5)::bigint AS number FROM workflows) AS past
        UNION ALL
        SELECT org_id, 1, 'grant', 'admin', :funds, 0, 0, 'grant:funds', '{}', NULL, NULL, NULL FROM wallets
    ) AS event
    JOIN (SELECT org_id, last_seq, last_event_at FROM wallets) AS wallet USING (org_id)
    ORDER BY seq, org_id
"""

# Period 0 began a month and an hour ago, so period 1 is due.
_DUE_WALLETS = """
    INSERT INTO wallets (org_id, last_seq, last_event_at, prepaid_balance, subscription_balance, reserved,
                         period_usage, credit_limit, config_version, subscription_id, next_period_at)
    SELECT 'org-' || org, 1, begun_at, 0, :plan_credits, 0, 0, 0, 0, 'sub', begun_at + interval '1 month'
    FROM (SELECT date_trunc('hour', now()) - interval '1 month 1 hour' AS begun_at) AS period,
         generate_series(0, :organizations - 1) AS org
"""
_DUE_SUBSCRIPTIONS = """
    INSERT INTO subscriptions (org_id, subscription_id, version, active, plan, monthly_credits, rollover_limit,
                               anchor, period, period_granted)
    SELECT org_id, 'sub', 1, true, 'team', :plan_credits, 0, last_event_at, 0, :plan_credits FROM wallets
"""
_DUE_MESSAGES = """
    INSERT INTO posted_messages (org_id, kind, message_id, terms, outcome)
    SELECT org_id, 'subscribe', 'sub:1', '{}', 'posted' FROM wallets
"""
_DUE_EVENTS = """
    INSERT INTO credit_events (org_id, seq, created_at, event_type, source, credits,
                               prepaid_balance_after, subscription_balance_after, reserved_after, period_usage_after,
                               idempotency_key, metadata)
    SELECT org_id, 1, last_event_at, 'subscription_credit', 'billing', :plan_credits, 0, :plan_credits, 0, 0,
           'subscription:sub:0',
           jsonb_build_object('subscription_id', 'sub', 'plan', 'team', 'period_start', last_event_at,
                              'period_end', next_period_at)
    FROM wallets
"""
_NAIVE_WALLETS = """
    INSERT INTO wallets (org_id, prepaid_balance, reserved, period_usage)
    SELECT 'org-' || org, :funds, 0, 0 FROM generate_series(0, :organizations - 1) AS org
"""
