"""Alembic's entry: runs revisions on the connection that `ledger.migrations` has opened, each in a transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=True)
context.run_migrations()
