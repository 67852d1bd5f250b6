"""Which wallets are due: the conditions in SQL, for the scheduler and for monitoring."""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Table, and_, func, select, union

from ledger.tables import ending_credits, subscriptions, wallets

POST_DUE, RELEASE_EXPIRED = "subscriptions.post_due", "reservations.release_expired"


def _by_now(at: ColumnElement[datetime]) -> ColumnElement[bool]:
    return at <= func.clock_timestamp()


def _named_by(table: Table, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Wallets with a due row in `table`, which has an index for it; `wallets` has none."""
    return wallets.c.org_id.in_(select(table.c.org_id).where(*conditions))


_BEGINS = _named_by(
    subscriptions, _by_now(subscriptions.c.anchor), subscriptions.c.active, subscriptions.c.period.is_(None)
)
_ENDS = _named_by(ending_credits, _by_now(ending_credits.c.expires_at))

DUE: dict[str, tuple[tuple[ColumnElement[datetime], ColumnElement[bool]], ...]] = {
    POST_DUE: (
        (wallets.c.next_period_at, _by_now(wallets.c.next_period_at)),
        (wallets.c.scheduled_at, and_(_by_now(wallets.c.scheduled_at), _BEGINS)),
        (wallets.c.next_ending_at, and_(_by_now(wallets.c.next_ending_at), _ENDS)),
    ),
    RELEASE_EXPIRED: ((wallets.c.next_hold_expiry, _by_now(wallets.c.next_hold_expiry)),),
}
"""For each run of the scheduler: when something is due in a wallet, and in which wallets it is by now."""


def overdue(task: str) -> CompoundSelect[Any]:
    """The ids of the wallets in which `task` has something to do."""
    return union(*(select(wallets.c.org_id).where(is_due) for _, is_due in DUE[task]))
