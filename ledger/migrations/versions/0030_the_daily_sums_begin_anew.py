"""How far usage had been summed: nothing asks for it any more, see 0029."""

from alembic import op

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("DROP TABLE usage_summed")


def downgrade() -> None:
    op.execute("""
        CREATE TABLE usage_summed (
            org_id TEXT NOT NULL,
            seq BIGINT NOT NULL,
            CONSTRAINT usage_summed_pkey PRIMARY KEY (org_id),
            CONSTRAINT usage_summed_seq CHECK (seq >= 0)
        )
    """)
