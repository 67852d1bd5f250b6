"""What a subscription gives its first period, and the plan of its current one."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE subscriptions ADD COLUMN first_lacks BIGINT DEFAULT 0 NOT NULL")
    op.execute("ALTER TABLE subscriptions ADD COLUMN first_period INTEGER")
    op.execute("ALTER TABLE subscriptions ADD COLUMN period_plan TEXT")
    op.execute("""
        ALTER TABLE subscriptions
        ADD CONSTRAINT subscriptions_first_lacks CHECK (first_lacks BETWEEN 0 AND 9007199254740991) NOT VALID
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE subscriptions DROP COLUMN first_lacks, DROP COLUMN first_period, DROP COLUMN period_plan")
