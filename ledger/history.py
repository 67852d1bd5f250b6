"""Reading the credit history: pages, exports, and the course of the balances. Never writes.

The events of an organization are numbered without a gap, and their times never decrease. So a range of time is a range
of numbers, found by binary search. Counting it, or beginning a page in it, is arithmetic. The events of a workflow are
few, and found by their idempotency keys. A filter by type, project or activity adds up the daily sums, which also tell
on which days events match. It reads one by one only the events that are in no sum yet, and the days of its page.

Events in the archive are in every sum, as far as their UTC days are completely in the range of time, and on no page.
`archived` says up to where they are.

What is read for one answer has to be of one snapshot of the ledger: see `ledger.database.snapshot`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Self

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    Subquery,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal,
    select,
    text,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import DATE
from sqlalchemy.types import Numeric

from ledger import daily_sums
from ledger.archived import Archived, archived_events, balances_by_day, first_day, first_since, has_archived_events
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.state import Event
from ledger.tables import archived, credit_events

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
    """A page of events, newest first, and the number and the credits of all matching events."""

    events: list[RowMapping]
    total: int
    credits: int
    next_before_seq: int | None
    """The `before_seq` of the next page; None: this is the last one."""
    archived: Archived | None
    """The archived events, if some may match; they are on no page."""


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


class Totals(NamedTuple):
    """How many events there are, and the sum of their credits."""

    events: int
    credits: int


class Day(NamedTuple):
    """A day on which events match: their lowest and their highest number, how many they are, and their credits."""

    first: int
    last: int
    events: int
    credits: int


def find(connection: Connection, org_id: str, matching: EventFilter = EVERY_EVENT) -> "Found":
    """The matching events of `org_id` that exist now. Finds the ends of the time range, but reads no event yet."""
    first = 1
    if matching.created_from is not None:
        # The first day that is completely in the range, if it is in the archive.
        first = _first_at(connection, org_id, matching.created_from, rounded=timedelta(days=1, microseconds=-1))
    if matching.created_before is None:
        end = number_of_events(connection, org_id) + 1
    else:
        end = _first_at(connection, org_id, matching.created_before)
    found = Found(org_id, first, end, matching.created_from, matching.created_before, matching.conditions())
    if matching.workflow_id is None:
        return found
    numbers = [seq for seq in numbers_of_workflow(connection, org_id, matching.workflow_id) if first <= seq < end]
    is_one = credit_events.c.seq == any_(_bigints(numbers))
    return replace(
        found, conditions=(is_one, *found.conditions), numbers=tuple(numbers), workflow_id=matching.workflow_id
    )


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
    workflow_id: str | None = None
    """The workflow that the numbers are those of."""

    def archived(self, connection: Connection) -> Archived | None:
        """The archived events of the organization, if some of them may match."""
        older = archived_events(connection, self.org_id)
        if older is None or self.first > older.events:
            return None
        if self.workflow_id is not None and not has_archived_events(connection, self.org_id, self.workflow_id):
            return None
        return older

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

    def events(self, connection: Connection) -> Sequence[RowMapping]:
        """The events, newest first."""
        return connection.execute(self.select()).mappings().all()

    def sums(self, connection: Connection) -> Subquery:
        """These events, added up as far as they are in the daily sums: a row for each sum, and for each other event.

        Each row has the columns of `daily_sums`.
        """
        days = None if self.numbers is not None else self._summed(connection)
        if days is None:
            return self.each().subquery()
        newer, older = self.since(days.end), self.before(days.first)
        return union_all(newer.each(), days.select(self.conditions), older.each()).subquery()

    def reads_more_than(self, connection: Connection, rows: int) -> bool:
        """Whether more than so many rows have to be read to add up these events, if these are not all events."""
        days = self._summed(connection)
        if days is None:
            return self.end - self.first > rows
        most = rows - (self.end - days.end) - (days.first - self.first)
        if most < 0:
            return True
        some = days.select().limit(most + 1).with_only_columns(literal(1)).subquery()
        return (connection.scalar(select(func.count()).select_from(some)) or 0) > most

    def _summed(self, connection: Connection) -> daily_sums.Days | None:
        return daily_sums.whole_days(connection, self.org_id, self.first, self.end)

    def each(self) -> Select[Any]:
        """The same columns of each of these events."""
        columns = credit_events.c
        return (
            self.select()
            .order_by(None)
            .with_only_columns(
                columns.org_id,
                cast(func.timezone("UTC", columns.created_at), DATE).label("day"),
                columns.event_type,
                columns.project_id,
                columns.activity_name,
                columns.source,
                literal(1, BigInteger).label("events"),
                cast(columns.credits, Numeric).label("credits"),
                columns.seq.label("first_seq"),
                columns.seq.label("last_seq"),
            )
        )

    def days(self, connection: Connection) -> list[Day]:
        """The days on which events match, newest first."""
        rows = self.sums(connection).c
        first = func.min(rows.first_seq)
        by_day = select(first, func.max(rows.last_seq), func.sum(rows.events), func.sum(rows.credits))
        days = connection.execute(by_day.group_by(rows.day).order_by(first.desc()))
        return [Day(first, last, int(events), int(credits_)) for first, last, events, credits_ in days]

    def totals(self, connection: Connection) -> Totals:
        """The number of these events, and the sum of their credits, which is exact at every moment."""
        if self.conditions:
            return _total(self.days(connection))
        if self.first >= self.end:
            return Totals(0, 0)
        # The credits of an event are its effect on what is available.
        before, after = (balances_after(connection, self.org_id, seq) for seq in (self.first - 1, self.end - 1))
        if before is None or after is None:
            return _total(self.days(connection))
        return Totals(self.end - self.first, after.available - before.available)

    def totals_with(self, connection: Connection, days: list[Day], *, before_seq: int | None) -> Totals:
        """The same, if those before `before_seq` are known: they are on `days`. None: all of them are."""
        older = _total(days)
        newer = Totals(0, 0) if before_seq is None else self.since(before_seq).totals(connection)
        return Totals(newer.events + older.events, newer.credits + older.credits)

    def page(
        self, connection: Connection, *, limit: int = MAX_PAGE, offset: int = 0, before_seq: int | None = None
    ) -> Page:
        """A page of these events: `limit` of them (1-100), newest first.

        It begins after the `offset` newest or, with `before_seq`, with the newest event before that number. Pages that
        continue one another by `before_seq` neither skip nor repeat an event while new ones are added.
        """
        assert 1 <= limit <= MAX_PAGE
        assert offset >= 0
        older = self if before_seq is None else self.before(before_seq)
        if self.conditions:
            days = older.days(connection)
            total = self.totals_with(connection, days, before_seq=before_seq)
            numbers = older.numbers_on(connection, days, offset=offset, limit=limit + 1)
            columns = credit_events.c
            # By their numbers, which are no subquery, as the planner may run that again for every row.
            query = select(credit_events).where(columns.org_id == self.org_id, columns.seq.in_(numbers or [0]))
            query = query.order_by(columns.seq.desc())
        else:
            total = self.totals(connection)
            query = older.before(older.end - offset).select()
        rows = list(connection.execute(query.limit(limit + 1)).mappings())  # one more: whether there is a next page
        shown = rows[:limit]
        next_before_seq = shown[-1]["seq"] if len(rows) > limit else None
        return Page(shown, *total, next_before_seq, self.archived(connection))

    def numbers_on(self, connection: Connection, days: list[Day], *, offset: int, limit: int) -> list[int]:
        """The numbers of `limit` events after the `offset` newest, which are looked for on those of the `days` only."""
        chosen: list[Day] = []
        there = 0
        for day in days:
            if not chosen and day.events <= offset:
                offset -= day.events
                continue
            chosen.append(day)
            there += day.events
            if there >= offset + limit:
                break
        if not chosen:
            return []
        columns = credit_events.c
        firsts, lasts = _bigints(day.first for day in chosen), _bigints(day.last for day in chosen)
        ends = func.unnest(firsts, lasts).table_valued("first", "last", name="ends").render_derived()
        # Each day on its own, and the numbers alone, as rows can be long: so a day is read in the primary key, from its
        # end on, until there are enough.
        of_day = (
            select(columns.seq)
            .where(columns.org_id == self.org_id, columns.seq.between(ends.c.first, ends.c.last), *self.conditions)
            .order_by(columns.seq.desc())
            .limit(offset + limit)
            .lateral("of_day")
        )
        newest = select(of_day.c.seq).select_from(ends.join(of_day, true())).order_by(of_day.c.seq.desc())
        return list(connection.scalars(newest.offset(offset).limit(limit)))

    def newer(self, connection: Connection, *, limit: int, before_seq: int) -> tuple[int, int | None]:
        """The events that are newer than the page with `before_seq`.

        Returns how many match, and the `before_seq` of the page of `limit` events just before this one. None: that is
        the newest page, which may overlap this one.
        """
        found = self.since(before_seq)
        if not found.conditions:
            count, begins = max(0, found.end - found.first), found.first + limit
            return count, begins if begins < found.end else None
        days = found.days(connection)
        count = _total(days).events
        if count <= limit:
            return count, None
        return count, found.numbers_on(connection, days, offset=count - limit - 1, limit=1)[0]

    def course(self, connection: Connection, *, points: int, now: datetime) -> Course | None:
        """The course of the available balance in the time range, until `now` at most, in about `points` steps.

        The conditions do not apply to it. None: there was no event by then.
        """
        older = archived_events(connection, self.org_id)
        in_range = replace(self.since(1 if older is None else older.events + 1), conditions=())
        steps, extremes = in_range.steps(connection, points=points), in_range.lowest_and_highest(connection)
        if older is not None and self.first <= older.events:
            past = balances_by_day(connection, self.org_id, self.created_from, self.created_before)
            past = [step for step in past if not steps or step[0] <= steps[0][0]]
            steps = [*past[:: -(-len(past) // points) or 1], *steps]
            extremes = None  # within a day, nobody knows
        elif self.created_from is not None and self.first > 1:
            begun = balances_after(connection, self.org_id, self.first - 1)
            assert begun is not None
            begun_with = begun.available
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


def _bigints(numbers: Iterable[int]) -> ColumnElement[Any]:
    """An array. As text: psycopg gives the lists of a statement one type, which may be too small for the later ones."""
    return cast(literal(f"{{{','.join(map(str, numbers))}}}", Text), ARRAY(BigInteger))


def _total(days: list[Day]) -> Totals:
    return Totals(sum(day.events for day in days), sum(day.credits for day in days))


def balances_at(connection: Connection, org_id: str, moment: datetime) -> Balances | None:
    """The balances of `org_id` after the last event that is not later than `moment`; all 0 before the first.

    None: that event is in the archive, and not the last one there.
    """
    number, begin = _first_not(connection, org_id, credit_events.c.created_at <= moment)
    if number == begin > 1:
        older = archived_events(connection, org_id)
        if older is not None and moment < older.through:
            return None
    return balances_after(connection, org_id, number - 1)


def balances_after(connection: Connection, org_id: str, seq: int) -> Balances | None:
    """The balances of `org_id` after its event number `seq`; all 0 if that is 0.

    None: the event is in the archive, and not the last one there.
    """
    if seq == 0:
        return Balances(0, 0, 0, 0, 0)
    columns, old = credit_events.c, archived.c
    after_event = select(
        columns.prepaid_balance_after,
        columns.subscription_balance_after,
        columns.reserved_after,
        columns.period_usage_after,
    ).where(columns.org_id == org_id, columns.seq == seq)
    at_the_end = select(old.prepaid_balance, old.subscription_balance, old.reserved, old.period_usage).where(
        old.org_id == org_id, old.seq == seq
    )
    row = connection.execute(union_all(after_event, at_the_end)).first()
    if row is None:
        return None
    return Balances(
        available=row.prepaid_balance_after + row.subscription_balance_after - row.reserved_after,
        prepaid_balance=row.prepaid_balance_after,
        subscription_balance=row.subscription_balance_after,
        reserved_credits=row.reserved_after,
        used_this_period=row.period_usage_after,
    )


def all_events(
    reads: Callable[[Callable[[Connection], Any]], Any], org_id: str, matching: EventFilter
) -> Iterator[RowMapping]:
    """Yield every matching event that exists when iteration begins, newest first, for exports of any size.

    `reads` calls a function with a connection that only reads, and returns what it returns. Each time it reads
    `EXPORT_STEP` event numbers, and no connection is held in between, however slow the consumer is. The result is still
    that of one moment: events never change, and new ones have higher numbers.
    """

    def first(ledger: Connection) -> Found:
        found, older = find(ledger, org_id, matching), archived_events(ledger, org_id)
        return found if older is None else found.since(older.events + 1)

    found = reads(first)
    for part in found.parts(EXPORT_STEP):
        yield from reads(part.events)


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


def began_at(connection: Connection, org_id: str) -> datetime | None:
    """When the first event of `org_id` was, or the day if it is archived; None: there is none."""
    first = select(credit_events.c.created_at).where(credit_events.c.org_id == org_id, credit_events.c.seq == 1)
    found = connection.scalar(first)
    return first_day(connection, org_id) if found is None else found


def number_of_events(connection: Connection, org_id: str) -> int:
    """The number of events in the credit history of `org_id`."""
    return connection.scalar(select(func.max(credit_events.c.seq)).where(credit_events.c.org_id == org_id)) or 0


def _first_at(connection: Connection, org_id: str, moment: datetime, *, rounded: timedelta = timedelta(0)) -> int:
    """The number of the first event of `org_id` that is not before `moment`, or the number after its last event.

    If that is in the archive: of the first one of the day that has the moment `rounded` later, or of a later day.
    """
    number, begin = _first_not(connection, org_id, credit_events.c.created_at < moment)
    older = archived_events(connection, org_id) if number == begin > 1 else None
    if older is None or moment > older.through:
        return number
    return min(begin, first_since(connection, org_id, moment + rounded) or begin)


def _first_not(connection: Connection, org_id: str, is_early: ColumnElement[bool]) -> tuple[int, int]:
    """The number of the first event of `org_id` that is not early, or the number after its last event.

    Events in the archive are not looked at; also returns the number of the first one after them.

    `is_early` is a condition on `created_at` that holds up to some event and for none after it. A binary search: one
    statement, in which each halving is one look-up in the primary key.
    """
    columns = credit_events.c
    older = select(archived.c.seq).where(archived.c.org_id == org_id).scalar_subquery()
    low = (func.coalesce(older, literal(0, BigInteger)) + 1).label("low")
    high = (func.coalesce(func.max(columns.seq), 0) + 1).label("high")
    search = select(low, high, low.label("begin")).where(columns.org_id == org_id).cte("search", recursive=True)
    middle = (search.c.low + search.c.high) // 2
    from_middle = select(is_early.label("is_early")).where(columns.org_id == org_id, columns.seq >= middle)
    event = from_middle.order_by(columns.seq).limit(1).lateral("event")
    halved = select(
        case((event.c.is_early, middle + 1), else_=search.c.low),
        case((event.c.is_early, search.c.high), else_=middle),
        search.c.begin,
    ).where(search.c.low < search.c.high)
    search = search.union_all(halved.select_from(search.join(event, true())))
    found = connection.execute(select(search.c.low, search.c.begin).where(search.c.low == search.c.high)).one()
    return found.low, found.begin
