"""Of a message that waits, the `traceparent` that it came with, if it had one."""

from alembic import op

revision = "0034"
down_revision = "0033"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE waiting_messages ADD COLUMN traceparent TEXT")


def downgrade() -> None:
    op.execute("ALTER TABLE waiting_messages DROP COLUMN traceparent")
