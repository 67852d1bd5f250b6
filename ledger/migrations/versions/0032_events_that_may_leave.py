"""The trigger looks at each event that is to be changed or deleted: see 0031."""

from alembic import op

revision = "0032"
down_revision = "0031"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("DROP TRIGGER credit_events_append_only ON credit_events")
    op.execute("""
        CREATE TRIGGER credit_events_append_only BEFORE UPDATE OR DELETE ON credit_events
            FOR EACH ROW EXECUTE FUNCTION credit_events_refuse_change()
    """)
    op.execute("""
        CREATE TRIGGER credit_events_no_truncate BEFORE TRUNCATE ON credit_events
            FOR EACH STATEMENT EXECUTE FUNCTION credit_events_refuse_change()
    """)


def downgrade() -> None:
    op.execute("DROP TRIGGER credit_events_no_truncate ON credit_events")
    op.execute("DROP TRIGGER credit_events_append_only ON credit_events")
    op.execute("""
        CREATE TRIGGER credit_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_events
            FOR EACH STATEMENT EXECUTE FUNCTION credit_events_refuse_change()
    """)
