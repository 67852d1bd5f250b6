"""How many workers have ended while they applied a message that waits."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE waiting_messages ADD COLUMN attempts BIGINT DEFAULT 0 NOT NULL")
    op.execute("ALTER TABLE waiting_messages ADD CONSTRAINT waiting_messages_attempts CHECK (attempts >= 0) NOT VALID")


def downgrade() -> None:
    op.execute("ALTER TABLE waiting_messages DROP COLUMN attempts")
