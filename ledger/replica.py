"""Reads from a replica of the database, and knows how old that may be. Nothing that decides may be read here.

Two things tell a time, by the primary's own clock, until which a replica has everything that was committed:

- the newest commit that it has replayed: everything committed before that one is there;
- the primary's position in its write-ahead log, which is asked for every LOOK_AT_PRIMARY_S. A replica that has replayed
  to that position has everything that was committed when it was asked, although nothing may have been committed since.

The later one is what `AsOf` says. So what was read may be newer, but never older. It holds also while the primary is
away: then neither grows.

A thread looks at both servers all the time. No reader waits for a replica that is away, frozen, not migrated, of
another ledger, or much behind: NotReadableError says so, and the primary has to answer. Those that are reading when a
replica freezes are told within two looks.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ledger import migrations
from ledger.database import break_connections, connect, read_only
from ledger.faults import describe, is_lost_connection, is_transient, took_too_long

LOOK_EVERY_S = 2.0
"""How often the replica is looked at."""

CONNECT_TIMEOUT_S = 2
"""How long a new connection to it may take."""

LOOK_AT_PRIMARY_S = 10.0
"""How often the primary is asked for its position."""

MOST_BEHIND_S = 60.0
"""How far a replica may be behind. One that is further behind is not read."""

KEPT_POSITIONS = 30
"""How many of the primary's positions are kept: some minutes of them, which a replica may be behind."""

_NOT_YET = "it has not been looked at yet"

Value = TypeVar("Value")

_PRIMARY = text("""
    SELECT now(), CAST(pg_current_wal_flush_lsn() - '0/0' AS bigint), current_database(), system_identifier,
           (SELECT version_num FROM alembic_version)
    FROM pg_control_system()
""")
_REPLICA = text("""
    SELECT pg_is_in_recovery(), CAST(pg_last_wal_replay_lsn() - '0/0' AS bigint), pg_last_xact_replay_timestamp(),
           current_database(), system_identifier, (SELECT version_num FROM alembic_version)
    FROM pg_control_system()
""")


class NotReadableError(Exception):
    """The replica cannot be read now; the message says why."""


class AsOf(NamedTuple):
    """How new a replica is: it has everything that was committed until `time`, and may have more."""

    time: datetime
    position: int
    """In the write-ahead log."""


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What the primary and each of its replicas have in common."""

    database: str
    system_identifier: int
    revision: str


class Replica:
    """The replica of a ledger at `url`. Opens no connection before `start`, and cannot be read before its first look.

    `primary`: an engine that opens a new connection for each use, so that it does not hang with the database.
    `answer_timeout_s`: how long the replica may take for one statement. `log` gets a line when it is no longer read,
    or read again. Raises DatabaseURLError.
    """

    def __init__(self, url: str, primary: Engine, *, answer_timeout_s: int, log: logging.Logger) -> None:
        self._engine = connect(url, answer_timeout_s=answer_timeout_s, connect_timeout_s=CONNECT_TIMEOUT_S)
        self._probe = connect(url, keeps_connections=False, connect_timeout_s=CONNECT_TIMEOUT_S)
        self._primary = primary
        self._log = log
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="replica", daemon=True)
        self._problem: str | None = _NOT_YET
        self._head = migrations.head_revision()
        self._ledger: _Ledger | None = None
        self._positions = deque[AsOf](maxlen=KEPT_POSITIONS)
        """Of the primary, the newest last."""

    def start(self) -> None:
        """Begin to look at both servers."""
        self._thread.start()

    def close(self) -> None:
        """Close all connections."""
        self._is_over.set()
        break_connections(self._engine)
        self._engine.dispose()

    @property
    def is_readable(self) -> bool:
        """Whether it can be read, as far as is known."""
        return self._problem is None

    def read(
        self, read: Callable[[Connection], Value], *, since: int = 0, keeps_connections: bool = True
    ) -> tuple[Value, AsOf]:
        """What `read` returns, given one snapshot, and how new that is. It has at least the position `since`.

        Without `keeps_connections`, it is read on a new one, also when all others are in use, and may take longer.
        Raises NotReadableError. Then `read` may have been called.
        """
        if self._problem is not None:
            raise NotReadableError(self._problem)
        try:
            with (self._engine if keeps_connections else self._probe).connect() as connection:
                # Before the snapshot, which is then at least as new.
                as_of = self._as_of(connection.execution_options(isolation_level="AUTOCOMMIT"))
                if as_of.position < since:
                    raise NotReadableError("it is not as new as another replica that was read before")
                connection.rollback()
                return read(read_only(connection)), as_of
        except DBAPIError as error:
            if took_too_long(error) or not is_transient(error):
                raise
            if error.orig is not None and is_lost_connection(error.orig):
                self._tell(describe(error))
            raise NotReadableError(describe(error)) from error

    def _as_of(self, connection: Connection) -> AsOf:
        """How new the replica is now. Raises NotReadableError if it must not be read."""
        row = connection.execute(_REPLICA).one()
        is_replica, position, newest_commit = row[:3]
        if not is_replica:
            raise NotReadableError("it is no replica, but a database on its own")
        ledger = _Ledger(*row[3:])
        if self._ledger is None:
            if ledger.revision != self._head:
                raise NotReadableError("the primary has not been seen, and its schema is another version's")
        elif ledger != self._ledger:
            raise NotReadableError(_difference(ledger, self._ledger))
        reached = [each.time for each in list(self._positions) if each.position <= position]
        times = [each for each in (*reached, newest_commit) if each is not None]
        if not times:
            raise NotReadableError("it does not say how new it is")
        as_of = AsOf(max(times), position)
        if self._positions and self._positions[-1].time - as_of.time > timedelta(seconds=MOST_BEHIND_S):
            raise NotReadableError(f"it is more than {MOST_BEHIND_S:.0f} s behind")
        return as_of

    def _watch(self) -> None:
        look_at_primary_at = time.monotonic()
        while not self._is_over.is_set():
            if time.monotonic() >= look_at_primary_at:
                self._look_at_primary()
                look_at_primary_at = time.monotonic() + LOOK_AT_PRIMARY_S
            self._look()
            self._is_over.wait(LOOK_EVERY_S)

    def _look(self) -> None:
        try:
            with self._probe.connect() as connection:
                self._as_of(connection)
        except NotReadableError as error:
            self._tell(str(error))
        except SQLAlchemyError as error:
            self._tell(describe(error))
            # Whoever waits for a frozen replica is told.
            break_connections(self._engine)
            break_connections(self._probe)
        else:
            self._tell(None)

    def _look_at_primary(self) -> None:
        try:
            with self._primary.connect() as connection:
                row = connection.execute(_PRIMARY).one()
        except SQLAlchemyError:
            return  # what is known of it stays true
        self._positions.append(AsOf(*row[:2]))
        self._ledger = _Ledger(*row[2:])

    def _tell(self, problem: str | None) -> None:
        """Keep what is wrong with the replica, and log it once."""
        if self._problem is _NOT_YET or (problem is None) != (self._problem is None):
            if problem is None:
                self._log.info("The replica for reading is read")
            else:
                self._log.error("The replica for reading is not read, and the primary answers: %s", problem)
        self._problem = problem


def _difference(found: _Ledger, expected: _Ledger) -> str:
    if (found.database, found.system_identifier) != (expected.database, expected.system_identifier):
        return "it is no replica of HOLDFAST_DATABASE_URL's database, but of another one"
    return f"its schema is at revision {found.revision}, and the primary's at {expected.revision}"
