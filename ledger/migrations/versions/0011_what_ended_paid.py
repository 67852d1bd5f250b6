"""A workflow remembers its reservation's event, and what credits with an end paid of its usage.

So nothing that ended before its reservation stays because of it, and a refund gives back what was paid.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE workflows ADD COLUMN reserved_seq BIGINT")
    op.execute("ALTER TABLE workflows ADD COLUMN paid_by_ending JSONB")


def downgrade() -> None:
    op.execute("ALTER TABLE workflows DROP COLUMN reserved_seq, DROP COLUMN paid_by_ending")
