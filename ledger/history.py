"""Reading the ledger: wallets, workflows, reservations and the credit history. Never writes.

The events of an organization are numbered without a gap and their times never decrease, so a range of time is a range
of numbers, found by binary search: counting it, or beginning a page anywhere in it, is arithmetic. Only what filters by
type or project looks at the events of the range one by one, to count them: at their entries in the primary key, which
has both.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Self

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    and_,
    case,
    func,
    literal,
    select,
    true,
)

from ledger.messages import ID_PATTERN
from ledger.state import EventType, WorkflowState
from ledger.tables import (
    credit_events,
    dead_letters,
    posted_messages,
    subscriptions,
    waiting_messages,
    wallets,
    workflows,
)

MAX_PAGE = 100
"""The most events of one page."""

EXPORT_STEP = 1_000
"""How many events an export looks at in one transaction."""

MAX_COMPARED = 200_000
"""The most events among which the lowest and the highest balance are looked for: every one of them is read."""

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


_available = (
    credit_events.c.prepaid_balance_after + credit_events.c.subscription_balance_after - credit_events.c.reserved_after
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

    @property
    def looks_at_each(self) -> bool:
        """Whether every event of the range has to be looked at, to tell which ones match."""
        return bool(self.event_types) or self.project_id is not None


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


@dataclass(frozen=True, slots=True)
class When:
    """A whole UTC day, which ends with the first moment after it; or one moment, which is both."""

    begin: datetime
    end: datetime


def when(text: str) -> When:
    """A date or time as a person writes it: ISO 8601; UTC unless it says otherwise.

    In a query, a `+` that is not escaped arrives as a space: before an offset, that is read as the `+`.
    Raises ValueError, whose text completes a sentence that begins with the parameter's name.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(_OFFSET_WITHOUT_SIGN.sub(r"\1+\2", text))
            at = (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
        except (ValueError, OverflowError):
            raise ValueError("must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z") from None
        return When(at, at)
    begin = datetime.combine(day, time.min, UTC)
    return When(begin, begin + timedelta(days=1) if day < date.max else datetime.max.replace(tzinfo=UTC))


_OFFSET_WITHOUT_SIGN = re.compile(r"([T ][0-9:.,]+) ([0-9]{2}:[0-9]{2})\Z")


def moment(text: str) -> datetime:
    """The moment, or the first one of the day, that a person writes. Raises ValueError, as `when` does."""
    return when(text).begin


def time_range(first: When | None, last: When | None) -> tuple[datetime | None, datetime | None]:
    """The range that begins with `first`, and ends with the whole of the day `last` or before the moment `last`.

    Raises ValueError if `last` is before `first`.
    """
    if first is not None and last is not None and last.begin < first.begin and last.end <= first.begin:
        raise ValueError("the range ends before it begins")
    return None if first is None else first.begin, None if last is None else last.end


def project(text: str) -> str:
    """A project's id as a person writes it. Raises ValueError, as `when` does."""
    if not re.fullmatch(ID_PATTERN, text):
        raise ValueError("must have 1 to 128 characters, and only letters, digits and _ . : - among them")
    return text


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
    seq = _first_not(connection, org_id, columns.created_at <= moment) - 1
    row = connection.execute(select(credit_events).where(columns.org_id == org_id, columns.seq == seq)).first()
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
    found = _range(connection, org_id, matching)
    page = found if before_seq is None else found.before(before_seq)
    columns = credit_events.c
    total = None
    if page.sieve:
        # Passing over the newer events, and perhaps sorting them, by their numbers alone: rows can be long. A query of
        # its own, as within one the planner may do it again for every row.
        numbers = connection.scalars(page.select().with_only_columns(columns.seq).offset(offset).limit(limit + 1)).all()
        query = page.select().where(columns.seq.in_(numbers))
        if before_seq is None and len(numbers) <= limit and (numbers or not offset):
            total = offset + len(numbers)  # all were passed over: no need to do it again
    else:
        query = page.before(page.end - offset).select()
    rows = list(connection.execute(query.limit(limit + 1)).mappings())  # one more tells whether there is more
    shown = rows[:limit]
    if total is None:
        total = found.count(connection)
    return Page(shown, total, shown[-1]["seq"] if len(rows) > limit else None)


def newer(
    connection: Connection, org_id: str, matching: EventFilter, *, limit: int, before_seq: int
) -> tuple[int, int | None]:
    """What is newer than the page that begins before `before_seq`: how many matching events, and which page of `limit`
    events comes just before it, as its `before_seq`. None: the newest page, which may overlap this one.
    """
    found = _range(connection, org_id, matching).since(before_seq)
    if not found.sieve:
        begins = found.first + limit
        return found.count(connection), begins if begins < found.end else None
    upwards = found.select().order_by(None).order_by(credit_events.c.seq).with_only_columns(credit_events.c.seq)
    return found.count(connection), connection.scalar(upwards.offset(limit).limit(1))


def all_events(engine: Engine, org_id: str, matching: EventFilter) -> Iterator[RowMapping]:
    """Every matching event that there is when the first one is asked for, newest first: for exports of any size.

    They are read `EXPORT_STEP` numbers at a time, with no connection held in between, however long the reader takes.
    The result is still that of one moment: events never change, and one that is added has a higher number.
    """
    with engine.connect() as connection:
        found = _range(connection, org_id, matching)
    for end in range(found.end, found.first, -EXPORT_STEP):
        with engine.connect() as connection:
            step = connection.execute(found.since(end - EXPORT_STEP).before(end).select()).mappings().all()
        yield from step


def number_of_events(connection: Connection, org_id: str) -> int:
    """How many events the credit history of `org_id` has."""
    return connection.scalar(select(func.max(credit_events.c.seq)).where(credit_events.c.org_id == org_id)) or 0


def first_event_at(connection: Connection, org_id: str) -> datetime | None:
    """When the credit history of `org_id` begins. None: it has no events."""
    first = select(credit_events.c.created_at).where(credit_events.c.org_id == org_id, credit_events.c.seq == 1)
    return connection.scalar(first)


def available_over_time(
    connection: Connection, org_id: str, matching: EventFilter, *, points: int
) -> list[tuple[datetime, int]]:
    """The available balance of `org_id` over the time range of `matching`, as at most `points` steps, oldest first.

    They are the range's first event, and the last one of each equal share of the others.
    """
    assert points >= 2
    columns = credit_events.c
    in_range = _range(connection, org_id, EventFilter(matching.created_from, matching.created_before))
    others = max(0, in_range.count(connection) - 1)
    shares = min(points - 1, others)
    chosen = [in_range.first, *(in_range.first + others * share // shares for share in range(1, shares + 1))]
    steps = in_range.select().where(columns.seq.in_(chosen)).with_only_columns(columns.created_at, _available)
    return [(row[0], row[1]) for row in connection.execute(steps.order_by(None).order_by(columns.seq))]


def lowest_and_highest(connection: Connection, org_id: str, matching: EventFilter) -> tuple[int, int] | None:
    """The lowest and the highest available balance of `org_id` after any event in the time range of `matching`.

    None: the range has no event, or more than `MAX_COMPARED`.
    """
    in_range = _range(connection, org_id, EventFilter(matching.created_from, matching.created_before))
    if not 1 <= in_range.count(connection) <= MAX_COMPARED:
        return None
    ends = in_range.select().order_by(None).with_only_columns(func.min(_available), func.max(_available))
    row = connection.execute(ends).one()
    return row[0], row[1]


def open_reservations(
    connection: Connection,
    *,
    org_id: str | None = None,
    older_than: timedelta | None = None,
    limit: int = MAX_PAGE,
    offset: int = 0,
) -> list[Reservation]:
    """The open reservations, oldest first, of one organization or of all: `limit` after the `offset` oldest.

    One that has expired is among them until the next message for its wallet, or the beat, releases it.
    """
    query = (
        select(workflows, credit_events.c.created_at)
        .select_from(workflows.join(credit_events, _started))
        .where(workflows.c.state == "reserved")
        .order_by(credit_events.c.created_at, workflows.c.org_id, workflows.c.workflow_id)
        .limit(limit)
        .offset(offset)
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


def reservations_held(connection: Connection, org_id: str) -> tuple[int, int]:
    """How many open reservations `org_id` has, and the credits that they hold together."""
    held = select(func.count(), func.coalesce(func.sum(workflows.c.start_credits), 0))
    row = connection.execute(held.where(workflows.c.org_id == org_id, workflows.c.state == "reserved")).one()
    return row[0], int(row[1])


def workflow(connection: Connection, org_id: str, workflow_id: str) -> WorkflowView | None:
    """The workflow `workflow_id` of `org_id`, or None if no message has named it."""
    known = select(workflows).where(workflows.c.org_id == org_id, workflows.c.workflow_id == workflow_id)
    row = connection.execute(known).first()
    if row is None:
        return None
    keys = [f"{step}:{workflow_id}" for step in ("start", "release", "finish")]
    if row.refunded:
        keys += _refund_keys(connection, org_id, workflow_id)
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


def _refund_keys(connection: Connection, org_id: str, workflow_id: str) -> list[str]:
    """The idempotency keys of a workflow's refunds: which they are, their messages say and not their metadata."""
    columns = posted_messages.c
    refunds = select(func.concat("refund:", columns.message_id)).where(
        columns.org_id == org_id,
        columns.kind == "refund",
        columns.outcome == "posted",
        columns.terms["workflow_id"].astext == workflow_id,
    )
    return list(connection.scalars(refunds))


@dataclass(frozen=True, slots=True)
class _Range:
    """The events of one organization that are numbered from `first` to before `end` and that `sieve` lets through."""

    org_id: str
    first: int
    end: int
    sieve: tuple[ColumnElement[bool], ...]

    def since(self, seq: int) -> Self:
        """The part that begins at `seq`."""
        return replace(self, first=max(self.first, seq))

    def before(self, seq: int) -> Self:
        """The part that ends before `seq`."""
        return replace(self, end=min(self.end, seq))

    def select(self) -> Select[Any]:
        """The events, newest first."""
        columns = credit_events.c
        numbered = and_(columns.org_id == self.org_id, columns.seq >= self.first, columns.seq < self.end)
        return select(credit_events).where(numbered, *self.sieve).order_by(columns.seq.desc())

    def count(self, connection: Connection) -> int:
        """How many they are."""
        if not self.sieve:
            return max(0, self.end - self.first)
        counted = self.select().order_by(None).with_only_columns(func.count())
        return connection.scalar(counted) or 0


def _range(connection: Connection, org_id: str, matching: EventFilter) -> _Range:
    """The events of `org_id` that match and are there now."""
    columns = credit_events.c
    sieve: list[ColumnElement[bool]] = []
    if matching.event_types:
        sieve.append(columns.event_type.in_(matching.event_types))
    if matching.project_id is not None:
        sieve.append(columns.project_id == matching.project_id)
    first = 1
    if matching.created_from is not None:
        first = _first_not(connection, org_id, columns.created_at < matching.created_from)
    if matching.created_before is None:
        end = number_of_events(connection, org_id) + 1
    else:
        end = _first_not(connection, org_id, columns.created_at < matching.created_before)
    return _Range(org_id, first, end, tuple(sieve))


def _first_not(connection: Connection, org_id: str, is_early: ColumnElement[bool]) -> int:
    """The number of the first event of `org_id` that is not early, or the number after its last event.

    `is_early` is a condition on `created_at` that holds up to some event and for none after it. A binary search: one
    statement, in which each halving is one look-up in the primary key.
    """
    columns = credit_events.c
    low = literal(1, BigInteger).label("low")
    high = (func.coalesce(func.max(columns.seq), 0) + 1).label("high")
    search = select(low, high).where(columns.org_id == org_id).cte("search", recursive=True)
    middle = (search.c.low + search.c.high) // 2
    from_middle = select(is_early.label("is_early")).where(columns.org_id == org_id, columns.seq >= middle)
    event = from_middle.order_by(columns.seq).limit(1).lateral("event")
    halved = select(
        case((event.c.is_early, middle + 1), else_=search.c.low),
        case((event.c.is_early, search.c.high), else_=middle),
    ).where(search.c.low < search.c.high)
    search = search.union_all(halved.select_from(search.join(event, true())))
    found: int = connection.execute(select(search.c.low).where(search.c.low == search.c.high)).scalar_one()
    return found


def system_figures(connection: Connection) -> dict[str, tuple[str, float]]:
    """Figures about the whole ledger for monitoring: by name, what they mean and their value."""
    oldest_hold = (
        select(func.min(credit_events.c.created_at))
        .select_from(workflows.join(credit_events, _started))
        .where(workflows.c.state == "reserved")
    )
    longest_wait = select(func.min(waiting_messages.c.waiting_since))
    now = func.clock_timestamp()
    row = connection.execute(
        select(
            select(func.count()).select_from(dead_letters).where(dead_letters.c.status == "open").scalar_subquery(),
            func.coalesce(func.extract("epoch", now - oldest_hold.scalar_subquery()), 0),
            select(func.count()).select_from(wallets).where(wallets.c.next_period_at <= now).scalar_subquery(),
            select(func.count()).select_from(wallets).where(wallets.c.next_hold_expiry <= now).scalar_subquery(),
            select(func.count()).select_from(waiting_messages).scalar_subquery(),
            func.coalesce(func.extract("epoch", now - longest_wait.scalar_subquery()), 0),
        )
    ).one()
    return {
        "dead_letters_open": ("Dead letters that nobody has dealt with.", float(row[0])),
        "oldest_hold_age_seconds": ("Age of the oldest open reservation; 0 if there is none.", float(row[1])),
        "wallets_overdue_period": ("Wallets whose next period should have begun.", float(row[2])),
        "wallets_overdue_hold": ("Wallets in which a reservation may have expired.", float(row[3])),
        "waiting_messages": ("Messages that wait for their own organization, and for nobody else.", float(row[4])),
        "waiting_oldest_age_seconds": ("How long the oldest of them waits; 0 if there is none.", float(row[5])),
    }
