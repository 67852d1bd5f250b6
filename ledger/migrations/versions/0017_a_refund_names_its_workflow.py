"""A refund's event may name its workflow. Those that are there already do not: events never change."""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE credit_events DROP CONSTRAINT credit_events_workflow_id")
    op.execute("""
        ALTER TABLE credit_events ADD CONSTRAINT credit_events_workflow_id CHECK (
            (workflow_id IS NOT NULL) = (event_type IN ('reservation', 'reservation_released', 'usage'))
            OR event_type = 'refund'
        ) NOT VALID
    """)


def downgrade() -> None:
    # No worker runs during a downgrade, so this may take long.
    op.execute("""
        DO $$ BEGIN
            IF EXISTS (SELECT 1 FROM credit_events WHERE event_type = 'refund' AND workflow_id IS NOT NULL) THEN
                RAISE EXCEPTION 'there are refunds that name a workflow, which 0016 does not know: stay at this version';
            END IF;
        END $$
    """)
    op.execute("""
        ALTER TABLE credit_events
        DROP CONSTRAINT credit_events_workflow_id,
        ADD CONSTRAINT credit_events_workflow_id CHECK (
            (workflow_id IS NOT NULL) = (event_type IN ('reservation', 'reservation_released', 'usage'))
        )
    """)
