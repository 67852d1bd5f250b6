"""A purchase remembers how much of it was reversed."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE posted_messages ADD COLUMN reversed BIGINT DEFAULT 0 NOT NULL")
    op.execute("""
        ALTER TABLE posted_messages ADD CONSTRAINT posted_messages_reversed
        CHECK (reversed = 0 OR reversed BETWEEN 0 AND (terms ->> 'credits')::bigint) NOT VALID
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE posted_messages DROP COLUMN reversed")
