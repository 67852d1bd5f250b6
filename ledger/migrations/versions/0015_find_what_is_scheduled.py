"""The index through which scheduled subscriptions are found when they begin."""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS subscriptions_to_begin")
        op.execute("""
            CREATE INDEX CONCURRENTLY subscriptions_to_begin ON subscriptions (anchor, org_id)
            WHERE active AND period IS NULL
        """)


def downgrade() -> None:
    op.execute("DROP INDEX subscriptions_to_begin")
