"""The indexes through which operators find an order, and what they did."""

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

INDEXES = {
    "posted_messages_of_all": "posted_messages (message_id) WHERE kind <> 'configure'",
    "credit_events_of_operators": "credit_events (created_at, org_id, seq) WHERE source = 'operator'",
    "dead_letters_resolved": "dead_letters (resolved_at, id) WHERE resolved_at IS NOT NULL",
}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these
        for name, of in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {of}")


def downgrade() -> None:
    op.execute(f"DROP INDEX {', '.join(INDEXES)}")
