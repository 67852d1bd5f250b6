"""The rule of 0004 holds for messages that waited before it, too."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = 0")  # nobody waits behind it
    op.execute("ALTER TABLE waiting_messages VALIDATE CONSTRAINT waiting_messages_attempts")


def downgrade() -> None:
    pass  # a rule that was checked holds in 0004 as well
