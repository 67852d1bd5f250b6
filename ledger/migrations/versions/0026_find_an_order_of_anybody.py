"""The index through which a purchase, a refund and so on is found, whoever's it is."""

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # nobody waits behind these two
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS posted_messages_of_all")
        op.execute(
            "CREATE INDEX CONCURRENTLY posted_messages_of_all ON posted_messages (message_id) WHERE kind <> 'configure'"
        )


def downgrade() -> None:
    op.execute("DROP INDEX posted_messages_of_all")
