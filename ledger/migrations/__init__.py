"""The schema's history, as Alembic revisions, and how to bring a database to one of them.

Guarantee: a migration stops nobody. Each revision after 0002 is one short transaction, or builds one index without one:

- A table that is in use is changed by statements of one action each, which look at no row: a CHECK or a foreign key is
  `NOT VALID`, a column's default is a constant. No second table is changed in the same revision.
- The next revision says `VALIDATE CONSTRAINT` and nothing else, while everybody reads and writes. So does the one that
  says `CREATE INDEX CONCURRENTLY`, in an `autocommit_block`, after `DROP INDEX CONCURRENTLY IF EXISTS`: what an attempt
  that failed has left. Nobody waits behind these two, so both begin with `SET lock_timeout = 0`.
- Everything else waits for a lock no longer than LOCK_WAIT_S, gives up, lets the others through, and tries again.

tests/integration/test_migrations.py reads what each revision sends for it. Two migrations at once are one after the
other. One that ends early has done some of the revisions, each of them whole; the next one goes on from there.
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
from sqlalchemy.exc import OperationalError

from ledger import roles

LOCK_WAIT_S = 0.2
"""How long a change waits for a lock, and everybody else behind it: less than workers have patience for."""

PAUSE_S = 1.0
"""How long the others are let through before it is tried again."""

VACUUM_WAIT_S = 5.0
"""How long to wait for a vacuum to give way; PostgreSQL asks it to after its `deadlock_timeout`, a second."""

PATIENCE_S = 300.0
"""How long one revision is tried."""

Say = Callable[[str], object]

_LOCK_ID = 4_877_001
_logger = logging.getLogger(__name__)

# Whatever the server's or our own defaults are: to validate a large table takes as long as it takes.
_WITHOUT_TIMEOUTS = text("""
    SELECT set_config(name, '0', false) FROM pg_settings
    WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')
""")


class LockedError(Exception):
    """A migration did not get a lock that it needs; the text says what to do. What it had done before stays."""


class NewerSchemaError(Exception):
    """The database is at a revision that this version of Holdfast does not know: a newer one has migrated it."""

    def __init__(self, current: str) -> None:
        head = head_revision()
        super().__init__(
            f"the database is at revision {current}, and this version of Holdfast knows none after {head}: run the "
            f"newer version again, or have it take the database back first, with `holdfast migrate --to {head}`"
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


def upgrade(engine: Engine, revision: str = "head", *, say: Say = _logger.warning) -> None:
    """Bring the database up to `revision`. Does nothing if it is there.

    `say` gets a line when it has to wait. Raises NewerSchemaError, and LockedError after PATIENCE_S.
    """
    _run(engine, command.upgrade, "+1", revision, say)


def downgrade(engine: Engine, revision: str, *, say: Say = _logger.warning) -> None:
    """Take the database down to `revision` (`base`: drop everything, data included). Waits and raises as `upgrade`."""
    _run(engine, command.downgrade, "-1", revision, say)


def grant(engine: Engine, *, say: Say = _logger.warning) -> dict[str, str]:
    """Give the worker's and the reader's role what they need. Waits for other migrations as `upgrade` does.

    Returns what a role may still do beyond that, in words, as the tables' owner cannot take it. Raises
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
    with _alone(engine, say) as connection:
        current = _revision(connection)
        if current is not None and current not in revisions():
            raise NewerSchemaError(current)
        config.attributes["connection"] = connection
        while _revision(connection) != last:
            _patiently(connection, lambda: migrate(config, step), say)


@contextmanager
def _alone(engine: Engine, say: Say) -> Iterator[Connection]:
    """A connection for as long as no other migration has one."""
    with engine.connect() as connection:
        try:
            _take_turn(connection, say)
            connection.execute(_WITHOUT_TIMEOUTS)
            connection.commit()
            yield connection
        finally:
            connection.invalidate()  # what it holds, and what is set on it, ends with it


def _take_turn(connection: Connection, say: Say) -> None:
    is_told = False
    # In tries: a statement that waits would be an open transaction, for which CREATE INDEX CONCURRENTLY waits.
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:id)"), {"id": _LOCK_ID}):
        connection.rollback()
        if not is_told:
            say("Another migration is running: this one waits until it has ended.")
        is_told = True
        time.sleep(PAUSE_S)


def _patiently(connection: Connection, migrate: Callable[[], None], say: Say) -> None:
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
    """Have PostgreSQL end a vacuum that it runs by itself on the table that `statement` changes.

    It does so for a statement that waits for its lock, but only after a longer time than a change may wait. This one
    holds up neither readers nor writers.
    """
    changed = re.match(r"\s*ALTER TABLE (\w+)", statement)
    if changed is not None:
        with suppress(OperationalError), connection.begin():
            connection.execute(text(f"SET LOCAL lock_timeout = {VACUUM_WAIT_S * 1_000:.0f}"))
            connection.execute(text(f"LOCK TABLE {changed[1]} IN SHARE UPDATE EXCLUSIVE MODE"))
