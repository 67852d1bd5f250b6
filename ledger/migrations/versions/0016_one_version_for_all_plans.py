"""The rules of 0010 to 0014 hold for what was there before, and each wallet knows the newest version of its plans.

A subscription that has not begun becomes a scheduled one. Wallets are changed a thousand at a time, so that nobody
waits long for one of them; doing it again changes nothing.
"""

from alembic import op
from sqlalchemy import text

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

RULES = {
    "wallets": ("wallets_scheduled", "wallets_held_past_end", "wallets_plan_version"),
    "subscriptions": ("subscriptions_first_lacks",),
    "posted_messages": ("posted_messages_reversed",),
    "credit_events": ("credit_events_overdraft",),
}

NEXT_WALLETS = "SELECT org_id FROM wallets WHERE org_id > :after ORDER BY org_id LIMIT 1000"

# In the order in which workers lock wallets, so that neither can wait for the other.
LOCKED = "locked AS MATERIALIZED (SELECT org_id FROM wallets WHERE org_id = ANY(:org_ids) ORDER BY org_id FOR UPDATE)"

PLAN_VERSIONS = f"""
    WITH {LOCKED}
    UPDATE wallets SET plan_version = newest.version
    FROM (
        SELECT org_id, max(version) AS version FROM subscriptions JOIN locked USING (org_id)
        WHERE plan IS NOT NULL GROUP BY org_id
    ) AS newest
    WHERE wallets.org_id = newest.org_id AND wallets.plan_version < newest.version
"""

# A wallet names a subscription that has not begun. If one before it has credits left, that is the current one until its
# period ends, and not longer: it was replaced.
SCHEDULES = f"""
    WITH {LOCKED}, changed AS (
        SELECT org_id, known.subscription_id, known.anchor, known.active, subscription_balance > 0 AS has_left
        FROM locked JOIN wallets USING (org_id) JOIN subscriptions AS known USING (org_id, subscription_id)
        WHERE known.period IS NULL
    ), before AS (
        SELECT changed.org_id, last.subscription_id, last.period_end FROM changed CROSS JOIN LATERAL (
            SELECT metadata ->> 'subscription_id' AS subscription_id,
                   (metadata ->> 'period_end')::timestamptz AS period_end
            FROM credit_events
            WHERE credit_events.org_id = changed.org_id AND event_type = 'subscription_credit' AND metadata ? 'period_end'
            ORDER BY seq DESC LIMIT 1
        ) AS last WHERE has_left
    ), ended AS (
        UPDATE subscriptions SET active = false FROM before
        WHERE subscriptions.org_id = before.org_id AND subscriptions.subscription_id = before.subscription_id
    )
    UPDATE wallets SET
        scheduled_id = CASE WHEN changed.active THEN changed.subscription_id END,
        scheduled_at = CASE WHEN changed.active THEN changed.anchor END,
        subscription_id = before.subscription_id,
        next_period_at = before.period_end
    FROM changed LEFT JOIN before USING (org_id) WHERE wallets.org_id = changed.org_id
"""


def upgrade() -> None:
    with op.get_context().autocommit_block():
        connection = op.get_bind()
        after = ""
        while org_ids := list(connection.scalars(text(NEXT_WALLETS), {"after": after})):
            for statement in (PLAN_VERSIONS, SCHEDULES):
                connection.execute(text(statement), {"org_ids": org_ids})
            after = org_ids[-1]
    op.execute("SET LOCAL lock_timeout = 0")  # nobody waits behind these
    for table, rules in RULES.items():
        for rule in rules:
            op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {rule}")


def downgrade() -> None:
    # Before anything is taken back. What is not refused here is in columns and rules that the revisions below take.
    op.execute("""
        DO $$ BEGIN
            IF EXISTS (SELECT 1 FROM ending_credits) OR EXISTS (SELECT 1 FROM wallets WHERE scheduled_id IS NOT NULL)
                OR EXISTS (SELECT 1 FROM posted_messages WHERE reversed > 0)
            THEN
                RAISE EXCEPTION 'there are credits with an end, scheduled subscriptions or reversals, which 0009 does not'
                    ' know: stay at this version';
            END IF;
        END $$
    """)
