"""Credits with an end of their own, and what a wallet has to know of them and of its plans."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


MAX_CREDITS = 2**53 - 1


def upgrade() -> None:
    op.execute(f"""
        CREATE TABLE ending_credits (
            org_id TEXT NOT NULL,
            origin TEXT NOT NULL,
            expires_at TIMESTAMP WITH TIME ZONE NOT NULL,
            seq BIGINT NOT NULL,
            remaining BIGINT NOT NULL,
            plan TEXT,
            CONSTRAINT ending_credits_pkey PRIMARY KEY (org_id, origin, expires_at),
            CONSTRAINT ending_credits_origin CHECK (origin ~ '^(grant|purchase|refund|subscription):'),
            CONSTRAINT ending_credits_plan CHECK ((plan IS NOT NULL) = starts_with(origin, 'subscription:')),
            CONSTRAINT ending_credits_seq CHECK (seq >= 1),
            CONSTRAINT ending_credits_remaining CHECK (remaining BETWEEN 1 AND {MAX_CREDITS})
        )
    """)
    op.execute("CREATE INDEX ending_credits_due ON ending_credits (expires_at, org_id)")
    op.execute("ALTER TABLE wallets ADD COLUMN plan_version BIGINT DEFAULT 0 NOT NULL")
    op.execute("ALTER TABLE wallets ADD COLUMN scheduled_id TEXT")
    op.execute("ALTER TABLE wallets ADD COLUMN scheduled_at TIMESTAMP WITH TIME ZONE")
    op.execute("ALTER TABLE wallets ADD COLUMN next_ending_at TIMESTAMP WITH TIME ZONE")
    op.execute("ALTER TABLE wallets ADD COLUMN held_past_end BIGINT DEFAULT 0 NOT NULL")
    op.execute("ALTER TABLE wallets ADD COLUMN covers JSONB")
    for rule in (
        "wallets_scheduled CHECK ((scheduled_id IS NULL) = (scheduled_at IS NULL))",
        "wallets_held_past_end CHECK (held_past_end = 0 OR held_past_end BETWEEN 0 AND reserved)",
        f"wallets_plan_version CHECK (plan_version BETWEEN 0 AND {MAX_CREDITS})",
    ):
        op.execute(f"ALTER TABLE wallets ADD CONSTRAINT {rule} NOT VALID")


def downgrade() -> None:
    # What these remember is nowhere else. 0016 has asked before; somebody may have been at work since.
    op.execute("""
        DO $$ BEGIN
            LOCK TABLE wallets, ending_credits;
            IF EXISTS (SELECT 1 FROM ending_credits)
                OR EXISTS (SELECT 1 FROM wallets WHERE scheduled_id IS NOT NULL) THEN
                RAISE EXCEPTION 'there are credits with an end or scheduled subscriptions, which 0009 does not know';
            END IF;
        END $$
    """)
    op.execute("""
        ALTER TABLE wallets
        DROP COLUMN plan_version, DROP COLUMN scheduled_id, DROP COLUMN scheduled_at, DROP COLUMN next_ending_at,
        DROP COLUMN held_past_end, DROP COLUMN covers
    """)
    op.execute("DROP TABLE ending_credits")
