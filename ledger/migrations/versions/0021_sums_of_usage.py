"""Sums of usage for each day, which the scheduler makes."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE usage_days (
            org_id TEXT NOT NULL,
            day DATE NOT NULL,
            project_id TEXT NOT NULL,
            activity_name TEXT NOT NULL,
            source TEXT NOT NULL,
            credits NUMERIC NOT NULL,
            runs BIGINT NOT NULL,
            CONSTRAINT usage_days_pkey PRIMARY KEY (org_id, day, project_id, activity_name, source),
            CONSTRAINT usage_days_credits CHECK (credits >= 0),
            CONSTRAINT usage_days_runs CHECK (runs >= 1)
        )
    """)
    op.execute("""
        CREATE TABLE usage_summed (
            org_id TEXT NOT NULL,
            seq BIGINT NOT NULL,
            CONSTRAINT usage_summed_pkey PRIMARY KEY (org_id),
            CONSTRAINT usage_summed_seq CHECK (seq >= 0)
        )
    """)


def downgrade() -> None:
    # They can be made again from the events.
    op.execute("DROP TABLE usage_days, usage_summed")
