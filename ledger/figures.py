"""Figures about the whole ledger, for monitoring. Only reads."""

from sqlalchemy import Connection, func, select

from ledger.due import DUE, overdue
from ledger.tables import credit_events, dead_letters, last_verification, waiting_messages, workflows
from ledger.views import STARTED


def system_figures(connection: Connection) -> dict[str, tuple[str, float]]:
    """The help text and the value of each figure, by its name."""
    oldest_hold = (
        select(func.min(credit_events.c.created_at))
        .select_from(workflows.join(credit_events, STARTED))
        .where(workflows.c.state == "reserved")
    )
    longest_wait = select(func.min(waiting_messages.c.waiting_since))
    verified_at = select(func.extract("epoch", last_verification.c.ended_at))
    now = func.clock_timestamp()
    row = connection.execute(
        select(
            select(func.count()).select_from(dead_letters).where(dead_letters.c.status == "open").scalar_subquery(),
            func.coalesce(func.extract("epoch", now - oldest_hold.scalar_subquery()), 0),
            *(select(func.count()).select_from(overdue(task).subquery()).scalar_subquery() for task in DUE),
            select(func.count()).select_from(waiting_messages).scalar_subquery(),
            func.coalesce(func.extract("epoch", now - longest_wait.scalar_subquery()), 0),
            func.coalesce(verified_at.scalar_subquery(), 0),
            func.coalesce(select(last_verification.c.broken).scalar_subquery(), 0),
        )
    ).one()
    return {
        "dead_letters_open": ("Open dead letters.", float(row[0])),
        "oldest_hold_age_seconds": ("Age of the oldest open reservation; 0 if there is none.", float(row[1])),
        "wallets_overdue_period": (
            "Wallets in which a period should have begun, or credits have ended.",
            float(row[2]),
        ),
        "wallets_overdue_hold": ("Wallets in which a reservation may have expired.", float(row[3])),
        "waiting_messages": ("Messages that wait for their organization.", float(row[4])),
        "waiting_oldest_age_seconds": ("Age of the oldest waiting message; 0 if there is none.", float(row[5])),
        "verify_timestamp_seconds": (
            "When `holdfast verify` ended last, in seconds since 1970; 0: never.",
            float(row[6]),
        ),
        "verify_broken_invariants": ("Invariants that `holdfast verify` found broken then.", float(row[7])),
    }
