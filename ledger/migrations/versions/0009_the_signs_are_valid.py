"""The constraint of 0008 is validated for older events."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = 0")  # nobody waits behind it
    op.execute("ALTER TABLE credit_events VALIDATE CONSTRAINT credit_events_sign")


def downgrade() -> None:
    pass  # a validated constraint is valid in 0008 too
