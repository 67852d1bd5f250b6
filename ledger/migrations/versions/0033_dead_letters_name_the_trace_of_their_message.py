"""Of a dead letter, the `traceparent` that its message came with, if it had one."""

from alembic import op

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE dead_letters ADD COLUMN traceparent TEXT")


def downgrade() -> None:
    op.execute("ALTER TABLE dead_letters DROP COLUMN traceparent")
