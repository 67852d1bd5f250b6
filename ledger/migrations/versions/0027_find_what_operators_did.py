"""The index through which the events of operators are found. No other event is in it."""

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS credit_events_of_operators")
        op.execute(
            "CREATE INDEX CONCURRENTLY credit_events_of_operators ON credit_events (created_at, org_id, seq) WHERE source = 'operator'"
        )


def downgrade() -> None:
    op.execute("DROP INDEX credit_events_of_operators")
