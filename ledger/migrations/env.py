"""Alembic's entry: runs the revisions in the transaction that `ledger.migrations` has opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
