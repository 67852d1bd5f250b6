"""Sums of all events for each day, which the scheduler makes, instead of those of usage alone.

It makes them anew, from the first event on.
"""

from alembic import op

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE daily_sums (
            org_id TEXT NOT NULL,
            day DATE NOT NULL,
            event_type TEXT NOT NULL,
            project_id TEXT NOT NULL,
            activity_name TEXT NOT NULL,
            source TEXT NOT NULL,
            events BIGINT NOT NULL,
            credits NUMERIC NOT NULL,
            first_seq BIGINT NOT NULL,
            last_seq BIGINT NOT NULL,
            CONSTRAINT daily_sums_pkey PRIMARY KEY (org_id, day, event_type, project_id, activity_name, source),
            CONSTRAINT daily_sums_events CHECK (events BETWEEN 1 AND last_seq - first_seq + 1),
            CONSTRAINT daily_sums_first_seq CHECK (first_seq >= 1)
        )
    """)
    op.execute("""
        CREATE TABLE daily_sums_through (
            org_id TEXT NOT NULL,
            seq BIGINT NOT NULL,
            CONSTRAINT daily_sums_through_pkey PRIMARY KEY (org_id),
            CONSTRAINT daily_sums_through_seq CHECK (seq >= 0)
        )
    """)
    op.execute("DROP TABLE usage_days")


def downgrade() -> None:
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
    op.execute("DROP TABLE daily_sums, daily_sums_through")
