"""What time alone does, for wallets that nothing else touches: periods begin, reservations expire.

Every message does the same for its own wallet first, so these runs may come late, twice or at once: the ledger ends up
the same.
"""

from datetime import datetime

from sqlalchemy import ColumnElement, Engine, func, select, tuple_

from ledger.store import catch_up
from ledger.tables import wallets

CHUNK = 500
"""The most wallets that one transaction catches up."""


def post_due(engine: Engine) -> int:
    """Begin the subscription periods that are due. Answers with the number of events written.

    Raises a database error that is transient.
    """
    return _catch_up_due(engine, wallets.c.next_period_at, task="subscriptions.post_due")


def release_expired(engine: Engine) -> int:
    """Release the reservations that have expired. Answers with the number of events written.

    Raises a database error that is transient.
    """
    return _catch_up_due(engine, wallets.c.next_hold_expiry, task="reservations.release_expired")


def _catch_up_due(engine: Engine, due_at: ColumnElement[datetime], *, task: str) -> int:
    due = select(due_at, wallets.c.org_id).where(due_at <= func.clock_timestamp()).order_by(due_at, wallets.c.org_id)
    after: tuple[datetime, str] | None = None
    written = 0
    while True:
        page = due if after is None else due.where(tuple_(due_at, wallets.c.org_id) > tuple_(*after))
        with engine.connect() as connection:
            rows = connection.execute(page.limit(CHUNK)).all()
        if not rows:
            return written
        written += catch_up(engine, [org_id for _, org_id in rows], task=task)
        after = tuple(rows[-1])
