"""A reversal may take the prepaid balance below zero; no other billing entry may."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE credit_events DROP CONSTRAINT credit_events_overdraft")
    op.execute("""
        ALTER TABLE credit_events ADD CONSTRAINT credit_events_overdraft CHECK (
            event_type <> 'billing' OR credits >= 0 OR prepaid_balance_after >= 0
            OR starts_with(idempotency_key, 'reversal:')
        ) NOT VALID
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE credit_events DROP CONSTRAINT credit_events_overdraft")
    # There is no reversal: 0016 has refused that. On the way back nobody is at work, so this may take its time.
    op.execute("""
        ALTER TABLE credit_events ADD CONSTRAINT credit_events_overdraft
        CHECK (event_type <> 'billing' OR credits >= 0 OR prepaid_balance_after >= 0)
    """)
