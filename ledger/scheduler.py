"""Does what is due in wallets that get no message: begins periods, ends credits, releases reservations.

Every message first does the same for its own wallet. So a run may come late, twice, or beside another one, and the
ledger ends up the same. A run is a series of steps of a few transactions each, so that other work can run in between.
"""

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import ColumnElement, Engine, select, tuple_

from ledger import daily_sums
from ledger.due import DUE, POST_DUE, RELEASE_EXPIRED
from ledger.store import catch_up
from ledger.tables import wallets

CHUNK = 500
"""The most wallets that one transaction catches up."""


def post_due(engine: Engine) -> int:
    """Begin the subscription periods and end the credits that are due. Returns the number of events written.

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
    if task == daily_sums.SUM_UP:
        yield from daily_sums.steps(engine)
        return
    for due_at, is_due in DUE[task]:
        yield from _steps(engine, task, due_at, is_due)


def _steps(engine: Engine, task: str, due_at: ColumnElement[datetime], is_due: ColumnElement[bool]) -> Iterator[int]:
    due = select(due_at, wallets.c.org_id).where(is_due).order_by(due_at, wallets.c.org_id)
    after: tuple[datetime, str] | None = None
    while True:
        page = due if after is None else due.where(tuple_(due_at, wallets.c.org_id) > tuple_(*after))
        with engine.connect() as connection:
            rows = connection.execute(page.limit(CHUNK)).all()
        if not rows:
            return
        yield from catch_up(engine, [org_id for _, org_id in rows], task=task)
        after = tuple(rows[-1])
