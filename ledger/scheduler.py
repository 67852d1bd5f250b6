"""Begins the periods and releases the reservations that are due, in wallets that get no message.

Every message first does the same for its own wallet. So a run may come late, twice, or beside another one, and the
ledger ends up the same. A run is a series of steps of a few transactions each, so that other work can run in between.
"""

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import ColumnElement, Engine, func, select, tuple_

from ledger.store import catch_up
from ledger.tables import wallets

CHUNK = 500
"""The most wallets that one transaction catches up."""

POST_DUE, RELEASE_EXPIRED = "subscriptions.post_due", "reservations.release_expired"


def post_due(engine: Engine) -> int:
    """Begin the subscription periods that are due. Returns the number of events written.

    Raises transient database errors.
    """
    return sum(steps(engine, POST_DUE))


def release_expired(engine: Engine) -> int:
    """Release the reservations that have expired. Returns the number of events written.

    Raises transient database errors.
    """
    return sum(steps(engine, RELEASE_EXPIRED))


def steps(engine: Engine, task: str) -> Iterator[int]:
    """Run `task` step by step. Yields the number of events that each step wrote.

    Raises transient database errors; the steps yielded before are committed.
    """
    due_at = _DUE_AT[task]
    due = select(due_at, wallets.c.org_id).where(due_at <= func.clock_timestamp()).order_by(due_at, wallets.c.org_id)
    after: tuple[datetime, str] | None = None
    while True:
        page = due if after is None else due.where(tuple_(due_at, wallets.c.org_id) > tuple_(*after))
        with engine.connect() as connection:
            rows = connection.execute(page.limit(CHUNK)).all()
        if not rows:
            return
        yield from catch_up(engine, [org_id for _, org_id in rows], task=task)
        after = tuple(rows[-1])


_DUE_AT: dict[str, ColumnElement[datetime]] = {
    POST_DUE: wallets.c.next_period_at,
    RELEASE_EXPIRED: wallets.c.next_hold_expiry,
}
