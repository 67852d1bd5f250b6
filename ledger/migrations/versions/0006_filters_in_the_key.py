"""An index that includes the type and the project of each event. 0007 makes it the primary key."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS credit_events_filters")
        op.execute("""
            CREATE UNIQUE INDEX CONCURRENTLY credit_events_filters ON credit_events (org_id, seq)
            INCLUDE (event_type, project_id)
        """)


def downgrade() -> None:
    op.execute("DROP INDEX credit_events_filters")
