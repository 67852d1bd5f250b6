"""The constraint of 0017 is validated for older events."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = 0")  # nobody waits behind it
    op.execute("ALTER TABLE credit_events VALIDATE CONSTRAINT credit_events_workflow_id")


def downgrade() -> None:
    pass  # a validated constraint is valid in 0017 too
