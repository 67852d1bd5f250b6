"""What of each wallet's history is in the archive, and whose free text was erased.

An event may then be deleted, if it is in the archive, and lose free text, if its organization's was erased. Until 0032
the trigger refuses both all the same, because it looks at no row.
"""

from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None

_REFUSE_CHANGE = """
CREATE OR REPLACE FUNCTION credit_events_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    blanked credit_events;
BEGIN
    IF TG_OP = 'DELETE' AND EXISTS (SELECT FROM archived WHERE org_id = OLD.org_id AND seq >= OLD.seq) THEN
        RETURN OLD;
    END IF;
    IF TG_OP = 'UPDATE' AND EXISTS (SELECT FROM erasures WHERE org_id = OLD.org_id AND seq >= OLD.seq) THEN
        blanked := OLD;
        blanked.activity_name := NULL;
        blanked.metadata := NEW.metadata;
        IF NEW IS NOT DISTINCT FROM blanked AND NEW.metadata <@ OLD.metadata THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'credit_events is append-only: % is refused', TG_OP USING ERRCODE = 'restrict_violation';
END
$$
"""
_REFUSE_EVERY_CHANGE = """
CREATE OR REPLACE FUNCTION credit_events_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'credit_events is append-only: % is refused', TG_OP USING ERRCODE = 'restrict_violation';
END
$$
"""
_REFUSE_LOSS = """
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM archived) OR EXISTS (SELECT 1 FROM erasures) THEN
        RAISE EXCEPTION 'an older version knows neither archived events nor erased text: keep this one, or restore a backup that was made before';
    END IF;
END
$$
"""


def upgrade() -> None:
    op.execute("""
        CREATE TABLE archived (
            org_id TEXT NOT NULL,
            seq BIGINT NOT NULL,
            created_at TIMESTAMP WITH TIME ZONE NOT NULL,
            prepaid_balance BIGINT NOT NULL,
            subscription_balance BIGINT NOT NULL,
            reserved BIGINT NOT NULL,
            period_usage BIGINT NOT NULL,
            held NUMERIC NOT NULL,
            released NUMERIC NOT NULL,
            used NUMERIC NOT NULL,
            posted NUMERIC NOT NULL,
            reversed NUMERIC NOT NULL,
            ending NUMERIC NOT NULL,
            CONSTRAINT archived_pkey PRIMARY KEY (org_id),
            CONSTRAINT archived_seq CHECK (seq >= 1)
        )
    """)
    op.execute("""
        CREATE TABLE archive_head (
            number BIGINT DEFAULT 1 NOT NULL,
            installation TEXT NOT NULL,
            head TEXT NOT NULL,
            CONSTRAINT archive_head_pkey PRIMARY KEY (number),
            CONSTRAINT archive_head_number CHECK (number = 1)
        )
    """)
    op.execute("""
        CREATE TABLE erasures (
            org_id TEXT NOT NULL,
            erased_at TIMESTAMP WITH TIME ZONE NOT NULL,
            seq BIGINT NOT NULL,
            erased_by TEXT NOT NULL,
            why TEXT NOT NULL,
            CONSTRAINT erasures_pkey PRIMARY KEY (org_id, erased_at),
            CONSTRAINT erasures_seq CHECK (seq >= 0)
        )
    """)
    op.execute(_REFUSE_CHANGE)


def downgrade() -> None:
    op.execute(_REFUSE_LOSS)
    op.execute(_REFUSE_EVERY_CHANGE)
    op.execute("DROP TABLE archived, archive_head, erasures")
