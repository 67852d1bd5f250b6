"""Which wallets are due: the conditions in SQL, for the scheduler and for monitoring."""

from datetime import datetime

from sqlalchemy import ColumnElement, Table, func, select, true

from ledger.tables import ending_credits, subscriptions, wallets

POST_DUE, RELEASE_EXPIRED = "subscriptions.post_due", "reservations.release_expired"


def _named_by(table: Table, at: ColumnElement[datetime], *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Wallets with a due row in `table`, which has an index for it; `wallets` has none."""
    return wallets.c.org_id.in_(select(table.c.org_id).where(at <= func.clock_timestamp(), *conditions))


_BEGINS = _named_by(subscriptions, subscriptions.c.anchor, subscriptions.c.active, subscriptions.c.period.is_(None))
_ENDS = _named_by(ending_credits, ending_credits.c.expires_at)

DUE: dict[str, tuple[tuple[ColumnElement[datetime], ColumnElement[bool]], ...]] = {
    POST_DUE: (
        (wallets.c.next_period_at, true()),
        (wallets.c.scheduled_at, _BEGINS),
        (wallets.c.next_ending_at, _ENDS),
    ),
    RELEASE_EXPIRED: ((wallets.c.next_hold_expiry, true()),),
}
"""For each run of the scheduler: when something is due in a wallet, and which wallets have such a time at all."""
