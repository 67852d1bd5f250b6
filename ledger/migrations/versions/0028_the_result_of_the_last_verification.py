"""The result of the last `holdfast verify`, for monitoring."""

from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE last_verification (
            number BIGINT DEFAULT 1 NOT NULL,
            ended_at TIMESTAMP WITH TIME ZONE NOT NULL,
            broken BIGINT NOT NULL,
            CONSTRAINT last_verification_pkey PRIMARY KEY (number),
            CONSTRAINT last_verification_number CHECK (number = 1),
            CONSTRAINT last_verification_broken CHECK (broken >= 0)
        )
    """)


def downgrade() -> None:
    op.execute("DROP TABLE last_verification")
