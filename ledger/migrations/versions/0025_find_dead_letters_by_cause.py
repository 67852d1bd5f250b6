"""The index through which dead letters are grouped by their cause."""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS dead_letters_causes")
        op.execute("""
            CREATE INDEX CONCURRENTLY dead_letters_causes
            ON dead_letters (status, org_id, task, error_code, cause, id) INCLUDE (first_failed_at, last_failed_at)
        """)


def downgrade() -> None:
    op.execute("DROP INDEX dead_letters_causes")
