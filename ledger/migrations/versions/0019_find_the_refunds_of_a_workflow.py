"""The index through which the refunds of a workflow are found, also those whose events do not name it."""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS posted_messages_refunds")
        op.execute("""
            CREATE INDEX CONCURRENTLY posted_messages_refunds ON posted_messages (org_id, (terms ->> 'workflow_id'))
            WHERE kind = 'refund'
        """)


def downgrade() -> None:
    op.execute("DROP INDEX posted_messages_refunds")
