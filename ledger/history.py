"""Reading the credit history: pages, exports, and the course of the balances. Never writes.

The events of an organization are numbered without a gap, and their times never decrease. So a range of time is a range
of numbers, found by binary search. Counting it, or beginning a page in it, is arithmetic. The events of a workflow are
few, and found by their idempotency keys. Only a filter by type, project or activity reads the events of the range one
by one; for types and projects, only their entries in the primary key, which includes both.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Self

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    Text,
    and_,
    any_,
    bindparam,
    case,
    func,
    literal,
    select,
    text,
    true,
)

from ledger.filters import EVERY_EVENT, EventFilter
from ledger.state import Event
from ledger.tables import credit_events

MAX_PAGE = 100
"""The most events of one page."""

EXPORT_STEP = 1_000
"""How many events an export reads in one transaction."""

MAX_COMPARED = 20_000
"""The most events of which the lowest and the highest balance are computed, as that reads all of them."""

_NOT_FOR_CUSTOMERS = frozenset(
    {"org_id", "seq", "workflow_id", "subscription_balance_after", "reserved_after", "idempotency_key"}
)
CUSTOMER_COLUMNS = tuple(name for name in Event._fields if name not in _NOT_FOR_CUSTOMERS)
"""The columns of an event that a customer sees, in this order."""
TABLE_COLUMNS = tuple(name for name in Event._fields if name in CUSTOMER_COLUMNS or name == "workflow_id")
"""The same with the workflow, as tables for people show them."""

_available = (
    credit_events.c.prepaid_balance_after + credit_events.c.subscription_balance_after - credit_events.c.reserved_after
)


def as_item(event: RowMapping) -> dict[str, Any]:
    """An event as a customer sees it, as JSON values: its number as `id`, the workflow, and CUSTOMER_COLUMNS."""
    columns = {name: event[name] for name in CUSTOMER_COLUMNS}
    columns["created_at"] = event["created_at"].isoformat()
    return {"id": event["seq"], "workflow_id": event["workflow_id"], **columns}


@dataclass(frozen=True, slots=True)
class Page:
    """A page of events, newest first, and the number of all matching events."""

    events: list[RowMapping]
    total: int
    next_before_seq: int | None
    """The `before_seq` of the next page; None: this is the last one."""


@dataclass(frozen=True, slots=True)
class Balances:
    """A wallet's balances at a time, in credits. All are 0 before its first event."""

    available: int
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    used_this_period: int


@dataclass(frozen=True, slots=True)
class Course:
    """The course of the available balance during a range of time."""

    points: list[tuple[datetime, int]]
    """Steps, oldest first: a time, and the balance from then on. The first is at the range's begin or first event."""
    ends: datetime
    extremes: tuple[int, int] | None
    """The lowest and the highest balance; None: there are too many events to compute them."""


def find(connection: Connection, org_id: str, matching: EventFilter = EVERY_EVENT) -> "Found":
    """The matching events of `org_id` that exist now. Finds the ends of the time range, but reads no event yet."""
    created_at, first = credit_events.c.created_at, 1
    if matching.created_from is not None:
        first = _first_not(connection, org_id, created_at < matching.created_from)
    if matching.created_before is None:
        end = number_of_events(connection, org_id) + 1
    else:
        end = _first_not(connection, org_id, created_at < matching.created_before)
    found = Found(org_id, first, end, matching.created_from, matching.created_before, matching.conditions())
    if matching.workflow_id is None:
        return found
    numbers = [seq for seq in numbers_of_workflow(connection, org_id, matching.workflow_id) if first <= seq < end]
    is_one = credit_events.c.seq == any_(literal(numbers, ARRAY(BigInteger)))
    return replace(found, conditions=(is_one, *found.conditions), numbers=tuple(numbers))


def events(
    connection: Connection,
    org_id: str,
    matching: EventFilter = EVERY_EVENT,
    *,
    limit: int = MAX_PAGE,
    offset: int = 0,
    before_seq: int | None = None,
) -> Page:
    """A page of the credit history of `org_id`: see `Found.page`."""
    return find(connection, org_id, matching).page(connection, limit=limit, offset=offset, before_seq=before_seq)


@dataclass(frozen=True, slots=True)
class Found:
    """The events of one organization that are numbered from `first` to before `end` and meet all `conditions`.

    With `numbers`, rising, one of the conditions is that the event has one of them.
    """

    org_id: str
    first: int
    end: int
    created_from: datetime | None
    created_before: datetime | None
    conditions: tuple[ColumnElement[bool], ...] = ()
    numbers: tuple[int, ...] | None = None

    def since(self, seq: int) -> Self:
        """The part that begins at `seq`."""
        return replace(self, first=max(self.first, seq))

    def before(self, seq: int) -> Self:
        """The part that ends before `seq`."""
        return replace(self, end=min(self.end, seq))

    def parts(self, most: int) -> Iterator[Self]:
        """Yield the parts, newest first, that have at most `most` events each before the conditions."""
        if self.numbers is None:
            for end in range(self.end, self.first, -most):
                yield self.since(end - most).before(end)
        else:
            for end in range(len(self.numbers), 0, -most):
                numbers = self.numbers[max(0, end - most) : end]
                yield self.since(numbers[0]).before(numbers[-1] + 1)

    def select(self) -> Select[Any]:
        """The events, newest first."""
        columns = credit_events.c
        numbered = and_(columns.org_id == self.org_id, columns.seq >= self.first, columns.seq < self.end)
        return select(credit_events).where(numbered, *self.conditions).order_by(columns.seq.desc())

    def count(self, connection: Connection) -> int:
        """The number of these events."""
        if not self.conditions:
            return max(0, self.end - self.first)
        counted = self.select().order_by(None).with_only_columns(func.count())
        return connection.scalar(counted) or 0

    def credits(self, connection: Connection) -> int:
        """The sum of the credits of these events: by how much they changed the available balance."""
        if self.conditions:
            summed = self.select().order_by(None).with_only_columns(func.sum(credit_events.c.credits))
            return int(connection.scalar(summed) or 0)
        if self.first >= self.end:
            return 0
        before, after = (balances_after(connection, self.org_id, seq) for seq in (self.first - 1, self.end - 1))
        return after.available - before.available

    def page(
        self, connection: Connection, *, limit: int = MAX_PAGE, offset: int = 0, before_seq: int | None = None
    ) -> Page:
        """A page of these events: `limit` of them (1-100), newest first.

        It begins after the `offset` newest or, with `before_seq`, with the newest event before that number. Pages that
        continue one another by `before_seq` neither skip nor repeat an event while new ones are added.
        """
        assert 1 <= limit <= MAX_PAGE
        assert offset >= 0
        page = self if before_seq is None else self.before(before_seq)
        columns = credit_events.c
        total = None
        if page.conditions:
            # Skips, and perhaps sorts, the newer events by their numbers alone, as rows can be long. Not a subquery,
            # which the planner may run again for every row.
            numbers = connection.scalars(
                page.select().with_only_columns(columns.seq).offset(offset).limit(limit + 1)
            ).all()
            query = page.select().where(columns.seq.in_(numbers))
            if before_seq is None and len(numbers) <= limit and (numbers or not offset):
                total = offset + len(numbers)  # every match was read, so no second query
        else:
            query = page.before(page.end - offset).select()
        rows = list(connection.execute(query.limit(limit + 1)).mappings())  # one more: whether there is a next page
        shown = rows[:limit]
        if total is None:
            total = self.count(connection)
        return Page(shown, total, shown[-1]["seq"] if len(rows) > limit else None)

    def newer(self, connection: Connection, *, limit: int, before_seq: int) -> tuple[int, int | None]:
        """The events that are newer than the page with `before_seq`.

        Returns how many match, and the `before_seq` of the page of `limit` events just before this one. None: that is
        the newest page, which may overlap this one.
        """
        found = self.since(before_seq)
        if not found.conditions:
            begins = found.first + limit
            return found.count(connection), begins if begins < found.end else None
        upwards = found.select().order_by(None).order_by(credit_events.c.seq).with_only_columns(credit_events.c.seq)
        return found.count(connection), connection.scalar(upwards.offset(limit).limit(1))

    def course(self, connection: Connection, *, points: int, now: datetime) -> Course | None:
        """The course of the available balance in the time range, until `now` at most, in about `points` steps.

        The conditions do not apply to it. None: there was no event by then.
        """
        in_range = replace(self, conditions=())
        steps, extremes = in_range.steps(connection, points=points), in_range.lowest_and_highest(connection)
        if self.created_from is not None and self.first > 1:
            begun_with = balances_after(connection, self.org_id, self.first - 1).available
            # Without an event in the range, the balance at its begin is the only one.
            if extremes is not None or not steps:
                lowest, highest = extremes or (begun_with, begun_with)
                extremes = min(lowest, begun_with), max(highest, begun_with)
            steps = [(self.created_from, begun_with), *steps]
        ends = now if self.created_before is None else min(now, self.created_before)
        if not steps or ends < steps[0][0]:
            return None
        return Course(steps, max(ends, steps[-1][0]), extremes)  # the database's clock may be ahead of ours

    def steps(self, connection: Connection, *, points: int) -> list[tuple[datetime, int]]:
        """The available balance after the first event, and after the last one of each equal share of the others.

        At most `points` in all, oldest first, each with its time.
        """
        assert points >= 2
        columns = credit_events.c
        others = max(0, self.end - self.first - 1)
        shares = min(points - 1, others)
        chosen = [self.first, *(self.first + others * share // shares for share in range(1, shares + 1))]
        steps = self.select().where(columns.seq.in_(chosen)).with_only_columns(columns.created_at, _available)
        return [(row[0], row[1]) for row in connection.execute(steps.order_by(None).order_by(columns.seq))]

    def lowest_and_highest(self, connection: Connection) -> tuple[int, int] | None:
        """The lowest and the highest available balance after any event.

        None: there is no event, or more than `MAX_COMPARED`.
        """
        if not 1 <= self.end - self.first <= MAX_COMPARED:
            return None
        ends = self.select().order_by(None).with_only_columns(func.min(_available), func.max(_available))
        row = connection.execute(ends).one()
        return row[0], row[1]


def balances_at(connection: Connection, org_id: str, moment: datetime) -> Balances:
    """The balances of `org_id` after the last event that is not later than `moment`; all 0 before the first."""
    return balances_after(connection, org_id, _first_not(connection, org_id, credit_events.c.created_at <= moment) - 1)


def balances_after(connection: Connection, org_id: str, seq: int) -> Balances:
    """The balances of `org_id` after its event number `seq`; all 0 if there is none."""
    columns = credit_events.c
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


def all_events(engine: Engine, org_id: str, matching: EventFilter) -> Iterator[RowMapping]:
    """Yield every matching event that exists when iteration begins, newest first, for exports of any size.

    Reads `EXPORT_STEP` event numbers at a time and holds no connection in between, however slow the consumer is. The
    result is still that of one moment: events never change, and new ones have higher numbers.
    """
    with engine.connect() as connection:
        found = find(connection, org_id, matching)
    for part in found.parts(EXPORT_STEP):
        with engine.connect() as connection:
            step = connection.execute(part.select()).mappings().all()
        yield from step


# Names in constants what the index `posted_messages_refunds` names: a parameter would not be recognized.
_REFUNDS = text("""
    SELECT concat('refund:', message_id), terms ->> 'workflow_id' FROM posted_messages
    WHERE org_id = :org_id AND kind = 'refund' AND terms ->> 'workflow_id' = ANY(:workflow_ids)
""")
_NUMBERS = (
    select(credit_events.c.seq)
    .where(
        credit_events.c.org_id == bindparam("org_id"),
        credit_events.c.idempotency_key == any_(bindparam("keys", type_=ARRAY(Text))),
    )
    .order_by(credit_events.c.seq)
)


def keys_of_workflows(connection: Connection, org_id: str, workflow_ids: Collection[str]) -> dict[str, str]:
    """The idempotency keys of all events that these workflows can have, refunds included, each with its workflow.

    The refunds are found by their messages: until revision 0017, their events did not name the workflow in its column.
    """
    keys = {f"{step}:{each}": each for each in workflow_ids for step in ("start", "release", "finish")}
    refunds = connection.execute(_REFUNDS, {"org_id": org_id, "workflow_ids": list(workflow_ids)})
    return keys | {row[0]: row[1] for row in refunds}


def numbers_of_workflow(connection: Connection, org_id: str, workflow_id: str) -> list[int]:
    """The numbers of a workflow's events and of its refunds, rising."""
    keys = list(keys_of_workflows(connection, org_id, [workflow_id]))
    return list(connection.scalars(_NUMBERS, {"org_id": org_id, "keys": keys}))


def event_by_key(connection: Connection, org_id: str, idempotency_key: str) -> RowMapping | None:
    """The event of `org_id` that has this cause, such as `grant:welcome`, or None."""
    columns = credit_events.c
    query = select(credit_events).where(columns.org_id == org_id, columns.idempotency_key == idempotency_key)
    return connection.execute(query).mappings().first()


def activities_with(connection: Connection, org_id: str, text: str, *, most: int) -> list[str]:
    """The names of activities that contain `text`, in whatever case: at most `most` of them. Reads every event."""
    name = credit_events.c.activity_name
    found = select(name).where(credit_events.c.org_id == org_id, name.icontains(text, autoescape=True))
    return list(connection.scalars(found.distinct().limit(most)))


def number_of_events(connection: Connection, org_id: str) -> int:
    """The number of events in the credit history of `org_id`."""
    return connection.scalar(select(func.max(credit_events.c.seq)).where(credit_events.c.org_id == org_id)) or 0


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
