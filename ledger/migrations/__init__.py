"""The schema's history as Alembic revisions, and how to bring a database to one of them.

Guarantee: a migration stops nobody. Each revision after 0002 is one short transaction, or builds one index without one:

- It changes a table that is in use by statements of one action each, which read no row: a CHECK or a foreign key is
  `NOT VALID`, a column's default is a constant. It changes no second table.
- `VALIDATE CONSTRAINT` is the only statement of the next revision, and runs while others read and write. So does
  `CREATE INDEX CONCURRENTLY`, in an `autocommit_block`. Before it, `DROP INDEX CONCURRENTLY IF EXISTS` removes what a
  failed attempt has left. Nobody waits behind these, so their revisions begin with `SET lock_timeout = 0`.
- Every other statement waits for a lock for at most LOCK_WAIT_S, gives up, lets the others through, and tries again.

tests/integration/test_migrations.py checks the statements of each revision. Two migrations at once run one after the
other. One that ends early has done whole revisions only; the next one continues from there.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from ledger import distribution, roles
from ledger.faults import describe, is_about_schema

LOCK_WAIT_S = 0.2
"""How long a change waits for a lock, and others behind it: less than the patience of workers."""

PAUSE_S = 1.0
"""How long the others are let through before the next try."""

VACUUM_WAIT_S = 5.0
"""How long to wait for a vacuum to end. PostgreSQL ends it after its `deadlock_timeout`, a second by default."""

PATIENCE_S = 300.0
"""How long one revision is tried."""

Say = Callable[[str], object]

_DISTRIBUTED_SINCE = "0034"
"""Older versions know nothing of distributed tables."""

_LOCK_ID = 4_877_001
_logger = logging.getLogger(__name__)

# Whatever the defaults of the server or of `database`: validating a large table may take any time.
_WITHOUT_TIMEOUTS = text("""
    SELECT set_config(name, '0', false) FROM pg_settings
    WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')
""")


class LockedError(Exception):
    """A migration did not get a lock that it needs; the text says what to do. The revisions before stay."""


class NewerSchemaError(Exception):
    """The database is at a revision that this version of Holdfast does not know: a newer one has migrated it."""

    def __init__(self, current: str) -> None:
        head = head_revision()
        super().__init__(
            f"the database is at revision {current}, and this version of Holdfast knows none after {head}: run the "
            f"newer version, or first use it to take the database back, with `holdfast migrate --to {head}`"
        )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


def head_revision() -> str:
    """The newest revision that this version of Holdfast knows."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def revisions() -> list[str]:
    """Every revision that this version of Holdfast knows, the oldest first."""
    scripts = ScriptDirectory.from_config(_config()).walk_revisions()
    return [script.revision for script in scripts][::-1]


def current_revision(engine: Engine) -> str | None:
    """The database's revision. None: it was never migrated."""
    with engine.connect() as connection:
        return _revision(connection)


def problem(engine: Engine) -> str | None:
    """What is wrong with the database's schema, and what to run. None: it is the one that this version needs."""
    current, head = current_revision(engine), head_revision()
    if current is None:
        return "the database is not migrated yet: run `holdfast migrate`"
    if current not in revisions():
        return str(NewerSchemaError(current))
    if current != head:
        return f"the database is at revision {current}, and this version needs {head}: run `holdfast migrate`"
    return None


def described(error: BaseException, engine: Engine) -> str:
    """The error of a statement on `engine` in one line, for a person. If it is about the schema: what to run."""
    if not is_about_schema(error):
        return describe(error)
    try:
        return problem(engine) or describe(error)
    except DBAPIError:  # such as a role that may not read the revision, as it was granted less
        return f"{describe(error)}: the database is not migrated for this version; run `holdfast migrate --roles`"


def upgrade(engine: Engine, revision: str = "head", *, say: Say = _logger.warning) -> None:
    """Bring the database up to `revision`. Does nothing if it is there.

    Then distributes its tables, if it has the extension Citus: see `ledger.distribution`. `say` gets a line when it has
    to wait. Raises NewerSchemaError, and LockedError after PATIENCE_S.
    """
    _run(engine, command.upgrade, "+1", revision, say)


def downgrade(engine: Engine, revision: str, *, say: Say = _logger.warning) -> None:
    """Take the database down to `revision` (`base`: drop everything, data included). Waits and raises as `upgrade`.

    Before it goes to one that knows nothing of distributed tables, they are put back on the coordinator.
    """
    _run(engine, command.downgrade, "-1", revision, say)


def grant(engine: Engine, *, say: Say = _logger.warning) -> dict[str, str]:
    """Grant the worker's and the reader's role what they need. Waits for other migrations as `upgrade` does.

    Returns for each role what it may still do beyond that, in words: the tables' owner cannot revoke it. Raises
    roles.NotGrantedError.
    """
    with _alone(engine, say) as connection:
        roles.grant(connection)
        connection.commit()
        found = {role: roles.excess(connection, role) for role in roles.PRIVILEGES}
    return {role: excess for role, excess in found.items() if excess is not None}


def _revision(connection: Connection) -> str | None:
    revision = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()
    return revision


def _run(engine: Engine, migrate: Callable[[Config, str], None], step: str, target: str, say: Say) -> None:
    config = _config()
    last = ScriptDirectory.from_config(config).as_revision_number(target)
    knows_of_nodes = last in revisions()[revisions().index(_DISTRIBUTED_SINCE) :]
    with _alone(engine, say) as connection:
        current = _revision(connection)
        if current is not None and current not in revisions():
            raise NewerSchemaError(current)
        config.attributes["connection"] = connection
        if not knows_of_nodes:
            _patiently(connection, lambda: distribution.gather(connection), say)
        while _revision(connection) != last:
            _patiently(connection, lambda: migrate(config, step), say)
        if knows_of_nodes:
            _patiently(connection, lambda: distribution.distribute(connection), say)


@contextmanager
def _alone(engine: Engine, say: Say) -> Iterator[Connection]:
    """A connection that only one migration has at a time."""
    with engine.connect() as connection:
        try:
            _take_turn(connection, say)
            connection.execute(_WITHOUT_TIMEOUTS)
            distribution.allow_triggers(connection)
            distribution.limit_lock_waits(connection, LOCK_WAIT_S)
            connection.commit()
            yield connection
        finally:
            connection.invalidate()  # ends its lock and its settings


def _take_turn(connection: Connection, say: Say) -> None:
    is_told = False
    # Polls: a waiting statement would be an open transaction, for which CREATE INDEX CONCURRENTLY waits.
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:id)"), {"id": _LOCK_ID}):
        connection.rollback()
        if not is_told:
            say("Another migration is running: this one waits until it has ended.")
        is_told = True
        time.sleep(PAUSE_S)


def _patiently(connection: Connection, migrate: Callable[[], object], say: Say) -> None:
    """One revision, tried until it gets its locks."""
    deadline, is_told = time.monotonic() + PATIENCE_S, False
    while True:
        connection.execute(
            text("SELECT set_config('lock_timeout', :wait, false)"), {"wait": f"{LOCK_WAIT_S * 1e3:.0f}"}
        )
        connection.commit()
        try:
            migrate()
        except OperationalError as error:
            connection.rollback()
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            statement = error.statement or ""
        else:
            return
        if time.monotonic() > deadline:
            raise LockedError(
                f"for {PATIENCE_S:g} seconds, somebody's open transaction has locked a table that the migration "
                "changes; end that transaction (pg_stat_activity shows it), and run `holdfast migrate` again"
            )
        if not is_told:
            say(
                "Somebody's open transaction has locked a table that the migration changes: trying again every "
                f"{PAUSE_S:g} s, for at most {PATIENCE_S:g} s."
            )
        is_told = True
        time.sleep(PAUSE_S)
        _end_vacuum(connection, statement)


def _end_vacuum(connection: Connection, statement: str) -> None:
    """Have PostgreSQL end an autovacuum of the table that `statement` changes.

    PostgreSQL does so for a statement that waits for the lock, but only after longer than a change may wait. The lock
    requested here blocks neither readers nor writers.
    """
    changed, mode = re.match(r"\s*(?:ALTER|DROP) TABLE (\w+)", statement), "SHARE UPDATE EXCLUSIVE"
    if changed is not None:
        with suppress(OperationalError), connection.begin():
            connection.execute(text(f"SET LOCAL lock_timeout = {VACUUM_WAIT_S * 1_000:.0f}"))
            connection.execute(text(f"LOCK TABLE {changed[1]} IN {mode} MODE"))
            distribution.lock_shards(connection, changed[1], mode, VACUUM_WAIT_S)
