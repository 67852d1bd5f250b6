"""Reads for an answer that only informs: from a replica that can be read, or else from the primary.

What decides anything, or is asked before something is decided, reads with `Services.reading` instead.
"""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, func, select

from api_stub.services import Services
from ledger import history
from ledger.database import snapshot
from ledger.filters import EventFilter
from ledger.receipts import Place
from ledger.replica import NotReadableError, Replica

MANY_EVENTS = 20_000
"""Readers of more events than this, or of as many sums of them, take turns. Reading fewer takes a few milliseconds."""

Value = TypeVar("Value")


class Reader:
    """The reads of one answer. Each sees at least what those before it have seen, whichever server answers.

    So once the primary has answered, it answers the others, too. `from_primary`: it answers all of them. Without
    `keeps_connections`, each read opens a new connection, as probes do.
    """

    def __init__(self, using: Services, *, from_primary: bool = False, keeps_connections: bool = True) -> None:
        self._using = using
        self._replica: Replica | None = None if from_primary else using.replica
        self._keeps_connections = keeps_connections
        self._position = 0
        self._as_of: datetime | None = None

    @property
    def as_of(self) -> datetime:
        """The answer has everything that was committed until then, by the database's clock. It may have more."""
        assert self._as_of is not None, "nothing was read"
        return self._as_of

    @property
    def is_from_replica(self) -> bool:
        """Whether the replica has given the whole answer."""
        return self._replica is not None

    def go_on_from(self, org_id: str, cursor: int | Place | None) -> None:
        """A page begins at `cursor`, which another server may have given.

        A replica that is behind would skip the events that it lacks: then the primary answers.
        """
        if cursor is None or self._replica is None:
            return
        last = (cursor.end if isinstance(cursor, Place) else cursor) - 1
        if self._read(lambda ledger: history.number_of_events(ledger, org_id)) < last:
            self._replica = None

    def read(
        self,
        read: Callable[[Connection], Value],
        *,
        through: tuple[str, EventFilter] | None = None,
    ) -> Value:
        """What `read` returns, given a connection that only reads: one snapshot of the ledger. It may be called twice.

        A reader that adds up the matching events of an organization, by their daily sums, goes `through` them: it waits
        for a turn if the sums are many, or the events that are in none. All such readers together use at most half of
        one processor of the database; the workers have the rest. Raises Problem if no turn comes.
        """
        takes_long = through is not None and self._read(
            lambda ledger: history.find(ledger, *through).reads_more_than(ledger, MANY_EVENTS)
        )
        with self._using.taking_turns() if takes_long else nullcontext():
            return self._read(read)

    def _read(self, read: Callable[[Connection], Value]) -> Value:
        if self._replica is not None:
            try:
                value, as_of = self._replica.read(read, since=self._position, keeps_connections=self._keeps_connections)
            except NotReadableError:
                self._replica = None
            else:
                self._position = max(self._position, as_of.position)
                self._as_of = self._as_of or as_of.time
                return value
        with snapshot(self._using.engine if self._keeps_connections else self._using.probe) as ledger:
            if self._as_of is None:
                self._as_of = ledger.execute(select(func.now())).scalar_one()  # when the transaction began
            return read(ledger)
