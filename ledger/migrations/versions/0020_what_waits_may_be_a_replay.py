"""Of a message that waits, the dead letter that it replays."""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE waiting_messages ADD COLUMN replay_of BIGINT")


def downgrade() -> None:
    op.execute("ALTER TABLE waiting_messages DROP COLUMN replay_of")
