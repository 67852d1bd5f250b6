"""Reading the ledger: wallets, workflows, reservations and the credit history. Never writes."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, select
from sqlalchemy.dialects.postgresql import distinct_on

from ledger.state import EventType, WorkflowState
from ledger.tables import credit_events, dead_letters, subscriptions, wallets, workflows

MAX_PAGE = 100
"""The most events of one page."""

CUSTOMER_COLUMNS = (
    "created_at",
    "event_type",
    "source",
    "project_id",
    "activity_name",
    "credits",
    "prepaid_balance_after",
    "period_usage_after",
    "metadata",
)
"""What a customer sees of an event, in this order."""


@dataclass(frozen=True, slots=True)
class WalletView:
    """An organization's wallet, as it was written last: what is due but not yet posted is not in it."""

    org_id: str
    balance: int = 0
    available: int = 0
    prepaid_balance: int = 0
    subscription_balance: int = 0
    reserved_credits: int = 0
    credit_limit: int = 0
    period_cap: int | None = None
    used_this_period: int = 0
    included_this_period: int = 0
    plan: str | None = None
    current_period_start: datetime | None = None
    current_period_end: datetime | None = None


# The event that a workflow's reservation is.
_started = and_(
    credit_events.c.org_id == workflows.c.org_id,
    credit_events.c.idempotency_key == func.concat("start:", workflows.c.workflow_id),
)


def as_item(event: RowMapping) -> dict[str, Any]:
    """An event as a customer sees it, as JSON values: its number as `id`, the workflow, and the nine columns."""
    columns = {name: event[name] for name in CUSTOMER_COLUMNS}
    columns["created_at"] = event["created_at"].isoformat()
    return {"id": event["seq"], "workflow_id": event["workflow_id"], **columns}


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events: every condition that is given holds. `created_from` is inclusive, `created_before` is not."""

    created_from: datetime | None = None
    created_before: datetime | None = None
    event_types: Collection[EventType] = ()
    project_id: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some events of a history, newest first, and how many match in all."""

    events: list[RowMapping]
    total: int
    next_before_seq: int | None
    """What continues the page (see `events`); None: there is no more."""


@dataclass(frozen=True, slots=True)
class Balances:
    """A wallet's balances, in credits, as they were at some time. An organization that had none has 0."""

    available: int
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    used_this_period: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """An open reservation."""

    org_id: str
    workflow_id: str
    project_id: str | None
    activity_name: str | None
    credits: int
    reserved_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class WorkflowView:
    """What the ledger knows of one workflow, and its events, oldest first."""

    workflow_id: str
    state: WorkflowState
    project_id: str | None
    activity_name: str | None
    reserved_credits: int | None
    expires_at: datetime | None
    used_credits: int | None
    refunded_credits: int
    events: list[RowMapping]


def moment(text: str, *, ends_range: bool = False) -> datetime:
    """A date or time as a person writes it (ISO 8601; UTC unless it says otherwise), as one end of a range.

    A date without a time means the whole UTC day: its first moment or, where it ends a range, the first one after it.
    Raises ValueError, whose text completes a sentence that begins with the parameter's name.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text)
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, OverflowError):
            raise ValueError("must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z") from None
    try:
        return datetime.combine(day, time.min, UTC) + timedelta(days=1 if ends_range else 0)
    except OverflowError:
        raise ValueError("must be before the year 9999") from None


def wallet(connection: Connection, org_id: str) -> WalletView | None:
    """The wallet of `org_id`, or None if no message has ever named it."""
    current = and_(
        subscriptions.c.org_id == wallets.c.org_id,
        subscriptions.c.subscription_id == wallets.c.subscription_id,
    )
    period_start = (
        select(credit_events.c.metadata["period_start"].astext)
        .where(
            credit_events.c.org_id == wallets.c.org_id,
            credit_events.c.idempotency_key
            == func.concat("subscription:", subscriptions.c.subscription_id, ":", subscriptions.c.period),
        )
        .scalar_subquery()
    )
    query = select(wallets, subscriptions.c.plan, subscriptions.c.period_granted, period_start.label("period_start"))
    row = connection.execute(
        query.select_from(wallets.outerjoin(subscriptions, current)).where(wallets.c.org_id == org_id)
    ).first()
    if row is None:
        return None
    balance = row.prepaid_balance + row.subscription_balance
    return WalletView(
        org_id=row.org_id,
        balance=balance,
        available=balance - row.reserved,
        prepaid_balance=row.prepaid_balance,
        subscription_balance=row.subscription_balance,
        reserved_credits=row.reserved,
        credit_limit=row.credit_limit,
        period_cap=row.period_cap,
        used_this_period=row.period_usage,
        included_this_period=row.period_granted or 0,
        plan=row.plan,
        current_period_start=None if row.period_start is None else datetime.fromisoformat(row.period_start),
        current_period_end=None if row.period_start is None else row.next_period_at,
    )


def balances_at(connection: Connection, org_id: str, moment: datetime) -> Balances:
    """The balances of `org_id` after the last event that is not later than `moment`; all 0 before the first."""
    columns = credit_events.c
    last = select(credit_events).where(columns.org_id == org_id, columns.created_at <= moment)
    row = connection.execute(last.order_by(columns.seq.desc()).limit(1)).first()
    if row is None:
        return Balances(0, 0, 0, 0, 0)
    return Balances(
        available=row.prepaid_balance_after + row.subscription_balance_after - row.reserved_after,
        prepaid_balance=row.prepaid_balance_after,
        subscription_balance=row.subscription_balance_after,
        reserved_credits=row.reserved_after,
        used_this_period=row.period_usage_after,
    )


def events(
    connection: Connection,
    org_id: str,
    matching: EventFilter = EventFilter(),
    *,
    limit: int = MAX_PAGE,
    offset: int = 0,
    before_seq: int | None = None,
) -> Page:
    """A page of the credit history of `org_id`: `limit` events (1-100), newest first.

    It begins after the `offset` newest, or, with `before_seq`, at the first event older than that: pages that continue
    one another in this way neither skip nor repeat an event while new ones are added.
    """
    assert 1 <= limit <= MAX_PAGE
    assert offset >= 0
    conditions = _conditions(org_id, matching)
    page = select(credit_events).where(*conditions).order_by(credit_events.c.seq.desc()).offset(offset)
    if before_seq is not None:
        page = page.where(credit_events.c.seq < before_seq)
    rows = list(connection.execute(page.limit(limit + 1)).mappings())  # one more tells whether there is more
    shown = rows[:limit]
    total = connection.scalar(select(func.count()).select_from(credit_events).where(*conditions))
    return Page(shown, total or 0, shown[-1]["seq"] if len(rows) > limit else None)


def newer(
    connection: Connection, org_id: str, matching: EventFilter, *, limit: int, before_seq: int
) -> tuple[int, int | None]:
    """What is newer than the page that begins before `before_seq`: how many matching events, and which page of `limit`
    events comes just before it, as its `before_seq`. None: the newest page, which may overlap this one.
    """
    conditions = [*_conditions(org_id, matching), credit_events.c.seq >= before_seq]
    count = connection.scalar(select(func.count()).select_from(credit_events).where(*conditions))
    begins = select(credit_events.c.seq).where(*conditions).order_by(credit_events.c.seq).offset(limit).limit(1)
    return count or 0, connection.scalar(begins)


def all_events(connection: Connection, org_id: str, matching: EventFilter) -> Iterator[RowMapping]:
    """Every matching event, newest first, fetched in pieces: for exports of any size."""
    query = select(credit_events).where(*_conditions(org_id, matching)).order_by(credit_events.c.seq.desc())
    yield from connection.execution_options(stream_results=True, yield_per=1_000).execute(query).mappings()


def first_event_at(connection: Connection, org_id: str) -> datetime | None:
    """When the credit history of `org_id` begins. None: it has no events."""
    first = select(credit_events.c.created_at).where(credit_events.c.org_id == org_id, credit_events.c.seq == 1)
    return connection.scalar(first)


def available_over_time(
    connection: Connection, org_id: str, matching: EventFilter, *, points: int
) -> list[tuple[datetime, int]]:
    """The available balance of `org_id` over the time range of `matching`, as at most `points` steps, oldest first.

    Each step is the last event of an equal share of the range's events.
    """
    columns = credit_events.c
    in_range = _conditions(org_id, EventFilter(matching.created_from, matching.created_before))
    share = func.ntile(points).over(order_by=columns.seq).label("share")
    available = columns.prepaid_balance_after + columns.subscription_balance_after - columns.reserved_after
    numbered = select(share, columns.seq, columns.created_at, available.label("available")).where(*in_range).subquery()
    last = (
        select(numbered.c.created_at, numbered.c.available)
        .ext(distinct_on(numbered.c.share))
        .order_by(numbered.c.share, numbered.c.seq.desc())
    )
    return [(row.created_at, row.available) for row in connection.execute(last)]


def open_reservations(
    connection: Connection, *, org_id: str | None = None, older_than: timedelta | None = None, limit: int = MAX_PAGE
) -> list[Reservation]:
    """The open reservations, oldest first, of one organization or of all.

    One that has expired is among them until the next message for its wallet, or the beat, releases it.
    """
    query = (
        select(workflows, credit_events.c.created_at)
        .select_from(workflows.join(credit_events, _started))
        .where(workflows.c.state == "reserved")
        .order_by(credit_events.c.created_at, workflows.c.org_id, workflows.c.workflow_id)
        .limit(limit)
    )
    if org_id is not None:
        query = query.where(workflows.c.org_id == org_id)
    if older_than is not None:
        query = query.where(credit_events.c.created_at < func.clock_timestamp() - older_than)
    return [
        Reservation(
            org_id=row.org_id,
            workflow_id=row.workflow_id,
            project_id=row.project_id,
            activity_name=row.activity_name,
            credits=row.start_credits,
            reserved_at=row.created_at,
            expires_at=row.expires_at,
        )
        for row in connection.execute(query)
    ]


def workflow(connection: Connection, org_id: str, workflow_id: str) -> WorkflowView | None:
    """The workflow `workflow_id` of `org_id`, or None if no message has named it."""
    known = select(workflows).where(workflows.c.org_id == org_id, workflows.c.workflow_id == workflow_id)
    row = connection.execute(known).first()
    if row is None:
        return None
    keys = [f"{step}:{workflow_id}" for step in ("start", "release", "finish")]
    written = select(credit_events).where(credit_events.c.org_id == org_id, credit_events.c.idempotency_key.in_(keys))
    return WorkflowView(
        workflow_id=row.workflow_id,
        state=row.state,
        project_id=row.project_id,
        activity_name=row.activity_name,
        reserved_credits=row.start_credits if row.start_answer == "reserved" else None,
        expires_at=row.expires_at,
        used_credits=row.finish_credits,
        refunded_credits=row.refunded,
        events=list(connection.execute(written.order_by(credit_events.c.seq)).mappings()),
    )


def _conditions(org_id: str, matching: EventFilter) -> list[ColumnElement[Any]]:
    columns = credit_events.c
    conditions: list[ColumnElement[Any]] = [columns.org_id == org_id]
    if matching.created_from is not None:
        conditions.append(columns.created_at >= matching.created_from)
    if matching.created_before is not None:
        conditions.append(columns.created_at < matching.created_before)
    if matching.event_types:
        conditions.append(columns.event_type.in_(matching.event_types))
    if matching.project_id is not None:
        conditions.append(columns.project_id == matching.project_id)
    return conditions


def system_figures(connection: Connection) -> dict[str, tuple[str, float]]:
    """Figures about the whole ledger for monitoring: by name, what they mean and their value."""
    oldest_hold = (
        select(func.min(credit_events.c.created_at))
        .select_from(workflows.join(credit_events, _started))
        .where(workflows.c.state == "reserved")
    )
    now = func.clock_timestamp()
    row = connection.execute(
        select(
            select(func.count()).select_from(dead_letters).where(dead_letters.c.status == "open").scalar_subquery(),
            func.coalesce(func.extract("epoch", now - oldest_hold.scalar_subquery()), 0),
            select(func.count()).select_from(wallets).where(wallets.c.next_period_at <= now).scalar_subquery(),
            select(func.count()).select_from(wallets).where(wallets.c.next_hold_expiry <= now).scalar_subquery(),
        )
    ).one()
    return {
        "dead_letters_open": ("Dead letters that nobody has dealt with.", float(row[0])),
        "oldest_hold_age_seconds": ("Age of the oldest open reservation; 0 if there is none.", float(row[1])),
        "wallets_overdue_period": ("Wallets whose next period should have begun.", float(row[2])),
        "wallets_overdue_hold": ("Wallets in which a reservation may have expired.", float(row[3])),
    }
