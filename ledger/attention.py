"""What needs somebody now, over all organizations: overdue wallets and wallets below zero. Only reads."""

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from ledger.due import DUE, overdue
from ledger.tables import wallets


@dataclass(frozen=True, slots=True)
class Owing:
    """A wallet whose balance is below zero."""

    org_id: str
    balance: int


def overdue_wallets(connection: Connection) -> dict[str, tuple[int, str | None]]:
    """For each run of the scheduler, in how many wallets it has something to do, and one of them."""
    found = {}
    for task in DUE:
        wallet = overdue(task).subquery()
        count, first = connection.execute(select(func.count(), func.min(wallet.c.org_id))).one()
        found[task] = (count, first)
    return found


def owing(connection: Connection, *, limit: int) -> tuple[list[Owing], int]:
    """The wallets whose balance is furthest below zero, at most `limit`, and how many are below zero."""
    balance = wallets.c.prepaid_balance + wallets.c.subscription_balance
    query = select(wallets.c.org_id, balance, func.count().over()).where(balance < 0)
    rows = connection.execute(query.order_by(balance, wallets.c.org_id).limit(limit)).all()
    return [Owing(*row[:2]) for row in rows], rows[0][2] if rows else 0
