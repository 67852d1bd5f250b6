"""Messages that wait for their organization, while others go on."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE waiting_messages (
            org_id TEXT NOT NULL,
            number BIGINT GENERATED ALWAYS AS IDENTITY,
            task TEXT NOT NULL,
            body BYTEA NOT NULL,
            answer_to TEXT,
            error_code TEXT,
            error TEXT,
            reason TEXT NOT NULL,
            waiting_since TIMESTAMP WITH TIME ZONE DEFAULT clock_timestamp() NOT NULL,
            CONSTRAINT waiting_messages_pkey PRIMARY KEY (org_id, number),
            CONSTRAINT waiting_messages_error CHECK ((error_code IS NULL) = (error IS NULL))
        )
    """)


def downgrade() -> None:
    # A message that waits was acknowledged: it is nowhere else.
    op.execute("""
        DO $$ BEGIN
            LOCK TABLE waiting_messages;
            IF EXISTS (SELECT 1 FROM waiting_messages) THEN
                RAISE EXCEPTION 'messages still wait in waiting_messages: let the workers apply them first';
            END IF;
            DROP TABLE waiting_messages;
        END $$
    """)
