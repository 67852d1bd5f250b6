"""The index through which the last workflows of an organization that were rejected are found."""

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS workflows_rejected")
        op.execute("""
            CREATE INDEX CONCURRENTLY workflows_rejected ON workflows (org_id, rejected_at) WHERE state = 'rejected'
        """)


def downgrade() -> None:
    op.execute("DROP INDEX workflows_rejected")
