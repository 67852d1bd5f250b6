"""Figures about the whole ledger, for monitoring. Only reads."""

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from ledger.database import has_nodes
from ledger.due import DUE, overdue
from ledger.faults import is_about_a_node, took_too_long
from ledger.tables import credit_events, dead_letters, last_verification, waiting_messages, workflows
from ledger.views import STARTED


def system_figures(connection: Connection) -> dict[str, tuple[str, float]]:
    """The help text and the value of each figure, by its name.

    While a node of a distributed ledger is away or hangs, there are no figures of all wallets.
    """
    is_distributed = has_nodes(connection)
    found = _of_messages(connection)
    try:
        found |= _of_wallets(connection)
    except DBAPIError as error:
        if not is_distributed or not (took_too_long(error) or is_about_a_node(error)):
            raise
    return found


def _of_messages(connection: Connection) -> dict[str, tuple[str, float]]:
    """What waits, what failed, and the last verification."""
    longest_wait = select(func.min(waiting_messages.c.waiting_since))
    verified_at = select(func.extract("epoch", last_verification.c.ended_at))
    letters, messages, waiting_s, verified, broken = connection.execute(
        select(
            select(func.count()).select_from(dead_letters).where(dead_letters.c.status == "open").scalar_subquery(),
            select(func.count()).select_from(waiting_messages).scalar_subquery(),
            func.coalesce(func.extract("epoch", func.clock_timestamp() - longest_wait.scalar_subquery()), 0),
            func.coalesce(verified_at.scalar_subquery(), 0),
            func.coalesce(select(last_verification.c.broken).scalar_subquery(), 0),
        )
    ).one()
    return {
        "dead_letters_open": ("Open dead letters.", float(letters)),
        "waiting_messages": ("Messages that wait for their organization.", float(messages)),
        "waiting_oldest_age_seconds": ("Age of the oldest waiting message; 0 if there is none.", float(waiting_s)),
        "verify_timestamp_seconds": (
            "When `holdfast verify` ended last, in seconds since 1970; 0: never.",
            float(verified),
        ),
        "verify_broken_invariants": ("Invariants that `holdfast verify` found broken then.", float(broken)),
    }


def _of_wallets(connection: Connection) -> dict[str, tuple[str, float]]:
    oldest_hold = (
        select(func.min(credit_events.c.created_at))
        .select_from(workflows.join(credit_events, STARTED))
        .where(workflows.c.state == "reserved")
    )
    hold_s, periods, holds = connection.execute(
        select(
            func.coalesce(func.extract("epoch", func.clock_timestamp() - oldest_hold.scalar_subquery()), 0),
            *(select(func.count()).select_from(overdue(task).subquery()).scalar_subquery() for task in DUE),
        )
    ).one()
    return {
        "oldest_hold_age_seconds": ("Age of the oldest open reservation; 0 if there is none.", float(hold_s)),
        "wallets_overdue_period": (
            "Wallets in which a period should have begun, or credits have ended.",
            float(periods),
        ),
        "wallets_overdue_hold": ("Wallets in which a reservation may have expired.", float(holds)),
    }
