"""The sign of an event's credits has a rule for each type, by its name. The same constraint refuses an unknown type."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE credit_events DROP CONSTRAINT credit_events_event_type")
    op.execute("ALTER TABLE credit_events DROP CONSTRAINT credit_events_sign")
    op.execute("""
        ALTER TABLE credit_events ADD CONSTRAINT credit_events_sign CHECK (
            CASE event_type
                WHEN 'usage' THEN credits <= 0
                WHEN 'prepaid_purchase' THEN credits > 0
                WHEN 'subscription_credit' THEN credits >= 0
                WHEN 'billing' THEN true
                WHEN 'adjustment' THEN credits <> 0
                WHEN 'grant' THEN credits > 0
                WHEN 'refund' THEN credits > 0
                WHEN 'reservation' THEN credits <= 0
                WHEN 'reservation_released' THEN credits >= 0
                ELSE false
            END
        ) NOT VALID
    """)


def downgrade() -> None:
    # No worker runs during a downgrade, so this may take long.
    op.execute("""
        ALTER TABLE credit_events
        DROP CONSTRAINT credit_events_sign,
        ADD CONSTRAINT credit_events_sign CHECK (
            CASE event_type
                WHEN 'reservation' THEN credits <= 0 WHEN 'usage' THEN credits <= 0
                WHEN 'reservation_released' THEN credits >= 0 WHEN 'subscription_credit' THEN credits >= 0
                WHEN 'adjustment' THEN credits <> 0 WHEN 'billing' THEN true ELSE credits > 0
            END
        ),
        ADD CONSTRAINT credit_events_event_type CHECK (
            event_type IN (
                'usage', 'prepaid_purchase', 'subscription_credit', 'billing', 'adjustment', 'grant', 'refund',
                'reservation', 'reservation_released'
            )
        )
    """)
