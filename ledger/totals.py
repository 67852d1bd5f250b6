"""Sums over all organizations, in one snapshot: the balances now, and the events of a range of time. Only reads.

Reads every wallet, and every event of the range, so that it needs no index and no table of its own. Of events in the
archive it reads the daily sums: of the UTC days that are completely in the range.
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, get_args

from sqlalchemy import Date, Engine, and_, case, cast, func, literal, or_, select, text

from holdfast_client.messages import OWN_REASONS
from ledger.state import EventType
from ledger.tables import archived, credit_events, daily_sums, wallets

ARCHIVED = "archived"
"""Instead of the reasons of adjustments in the archive, which no sum knows."""


@dataclass(frozen=True, slots=True)
class EventTotal:
    """The events of one type: how many, and the sum of their credits."""

    event_type: EventType
    reason: str | None
    """Of adjustments that the ledger made: what ended, not among the others. `ARCHIVED`: of all in the archive."""
    events: int
    credits: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums in credits over all wallets. They may be larger than a wallet's can be, and are exact."""

    at: datetime
    wallets: int
    balance: int
    available: int
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    created_from: datetime | None
    created_before: datetime | None
    events: tuple[EventTotal, ...]
    """For every type, even if it has no events, and for every reason that occurs."""


def read(engine: Engine, *, created_from: datetime | None = None, created_before: datetime | None = None) -> Totals:
    """The totals now, and of the events from `created_from` to before `created_before`.

    Without a range, the credits of all events add up to what is available.
    """
    with engine.connect() as connection:
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        now = connection.execute(_BALANCES).one()
        found: defaultdict[tuple[Any, Any], tuple[int, int]] = defaultdict(lambda: (0, 0))
        for query in (_events(created_from, created_before), _archived(created_from, created_before)):
            for row in connection.execute(query):
                number, credits_ = found[row.event_type, row.reason]
                found[row.event_type, row.reason] = number + int(row.number), credits_ + int(row.credits)
    kinds = [(event_type, None) for event_type in get_args(EventType)]
    kinds += sorted(found.keys() - kinds)
    balance = int(now.prepaid + now.subscription)
    return Totals(
        at=now.at,
        wallets=now.number,
        balance=balance,
        available=balance - int(now.reserved),
        prepaid_balance=int(now.prepaid),
        subscription_balance=int(now.subscription),
        reserved_credits=int(now.reserved),
        created_from=created_from,
        created_before=created_before,
        events=tuple(EventTotal(*kind, *found[kind]) for kind in kinds),
    )


def _sum(column: Any) -> Any:
    return func.coalesce(func.sum(column), 0)


_BALANCES = select(
    func.now().label("at"),
    func.count().label("number"),
    _sum(wallets.c.prepaid_balance).label("prepaid"),
    _sum(wallets.c.subscription_balance).label("subscription"),
    _sum(wallets.c.reserved).label("reserved"),
)


def _events(created_from: datetime | None, created_before: datetime | None) -> Any:
    columns = credit_events.c
    given = columns.metadata["reason"].astext
    reason = case((and_(columns.event_type == "adjustment", given.in_(sorted(OWN_REASONS))), given))
    query = (
        select(
            columns.event_type,
            reason.label("reason"),
            func.count().label("number"),
            _sum(columns.credits).label("credits"),
        )
        .outerjoin_from(credit_events, archived, archived.c.org_id == columns.org_id)
        .where(or_(archived.c.org_id.is_(None), _day(columns.created_at) > _day(archived.c.created_at)))
        .group_by(columns.event_type, reason)
    )
    if created_from is not None:
        query = query.where(columns.created_at >= created_from)
    if created_before is not None:
        query = query.where(columns.created_at < created_before)
    return query


def _archived(created_from: datetime | None, created_before: datetime | None) -> Any:
    """The same of the archived days of each wallet."""
    columns = daily_sums.c
    reason = case((columns.event_type == "adjustment", literal(ARCHIVED)))
    query = (
        select(
            columns.event_type,
            reason.label("reason"),
            _sum(columns.events).label("number"),
            _sum(columns.credits).label("credits"),
        )
        .join_from(daily_sums, archived, archived.c.org_id == columns.org_id)
        .where(columns.day <= _day(archived.c.created_at))
        .group_by(columns.event_type, reason)
    )
    if created_from is not None:
        query = query.where(columns.day >= _midnight_after(created_from))
    if created_before is not None:
        query = query.where(columns.day < created_before.astimezone(UTC).date())
    return query


def _midnight_after(moment: datetime) -> date:
    return (moment.astimezone(UTC) + timedelta(days=1, microseconds=-1)).date()


def _day(moment: Any) -> Any:
    return cast(func.timezone("UTC", moment), Date)
