"""Reports, in the log and in a metric, that the database does not answer this worker, and when it answers again.

An outage is an error of the database, a failed connection, or silence for `SILENT_S`, as when a commit waits for a
synchronous replica that is gone.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Thread

from psycopg.errors import InsufficientPrivilege
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from ledger.faults import WrongClockError, describe, is_about_a_node, is_about_schema, is_transient
from worker import metrics

logger = logging.getLogger(__name__)

SILENT_S = 10.0
"""After this long without an answer, it is an outage."""

REMINDER_S = 60.0
"""How often the log repeats an outage and its reason."""

_LOOK_EVERY_S = 1.0
_SILENT = f"The database has been silent for more than {SILENT_S:g} s; the messages wait"


class Outage(Thread):
    """Whether the database answers this worker. May be used by several threads."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="outage", daemon=True)
        self._engine = engine
        self._lock = Lock()
        self._asked_at: dict[str, float] = {}
        self._failing: set[str] = set()
        self._since: float | None = None
        self._reminded_at = 0.0

    @contextmanager
    def asking(self, who: str) -> Iterator[None]:
        """Mark a block in which `who` waits for the database."""
        self._asked_at[who] = time.monotonic()
        try:
            yield
        finally:
            del self._asked_at[who]

    def failed(self, who: str, error: Exception) -> None:
        """Record that the database refused a request of `who`, or could not be reached."""
        self._add(who, lambda: self._told(error), time.monotonic())

    def _told(self, error: Exception) -> str:
        original = error.orig if isinstance(error, DBAPIError) else error
        why = describe(error)
        if is_about_a_node(error):
            return f"A node of the database does not answer; its organizations wait: {why}"
        if is_about_schema(error):
            from ledger import migrations  # only here: no other part of a worker needs Alembic

            what, why = "The database cannot be used as it is", migrations.described(error, self._engine)
        elif isinstance(original, InsufficientPrivilege):
            what = "The database cannot be used as it is"
        elif isinstance(error, WrongClockError):
            what = "The database's clock is wrong"
        else:
            what = "The database does not answer" if is_transient(error) else "Nothing can be written"
        return f"{what}; the messages wait: {why}"

    def answered(self, who: str) -> None:
        """Record that the database answered a request of `who`."""
        if who not in self._failing:  # the usual case needs no lock
            return
        with self._lock:
            self._failing.discard(who)
            if not self._failing and self._since is not None:
                logger.warning("The database answers again after %.1f s", time.monotonic() - self._since)
                self._since = None
                metrics.waiting_for_database.set(0)

    def run(self) -> None:
        """Check for requests without an answer, until the process ends."""
        while True:
            time.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            for who, asked_at in list(self._asked_at.items()):
                if now - asked_at > SILENT_S:
                    self._add(who, lambda: _SILENT, asked_at)

    def _add(self, who: str, told: Callable[[], str], since: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._failing.add(who)
            if self._since is None or now - self._reminded_at > REMINDER_S:
                logger.warning("%s", told())
                self._reminded_at = now
                self._since = self._since or since
                metrics.waiting_for_database.set(1)
