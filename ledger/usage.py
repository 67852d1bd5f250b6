"""What used the credits of an organization: the sums of its usage, by project, activity, source, day or month.

The scheduler keeps a sum for each UTC day, so that the usage of years is the sum of some rows. Usage that is newer than
these sums, or that begins or ends within a day, is added from the events themselves. So the result is exact, and that
of one moment: it never depends on when the scheduler came by.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    Text,
    case,
    cast,
    func,
    literal,
    null,
    select,
    text,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import DATE
from sqlalchemy.types import BigInteger, Numeric

from ledger import history
from ledger.filters import EventFilter
from ledger.tables import credit_events, usage_days, usage_summed, wallets

SUM_UP = "usage.sum_up"
"""The scheduler's run that keeps the sums."""

Group = Literal["project", "activity", "source", "day", "month"]
"""What usage can be grouped by. `day` and `month` are those of UTC."""

MOST_GROUPED_BY = 2
"""The most of them at once."""

MOST_GROUPS = 1_000
"""The most groups of one result, unless more are asked for."""

NOT_SUMMED = 10_000
"""The fewest new events of an organization that the scheduler sums; fewer are read one by one, as quickly."""

STEP = 50_000
"""The most events that one transaction of the scheduler sums."""

RATE_DAYS, FEWEST_RATE_DAYS = 7, 3
"""The rate is the mean of the last full UTC days: of so many, and of no fewer."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage of an organization in a range of time."""

    groups: list[dict[str, Any]]
    """Each has the values that it is grouped by, its `credits` and its `runs`. By time, and then the largest first."""
    credits: int
    runs: int
    """What all groups together used, and in how many runs: also those that are left out."""
    truncated: bool
    """Whether there are more groups than were asked for, so that the smallest are left out."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one project or activity used."""

    name: str | None
    """None: the usage that names none."""
    credits: int
    runs: int


@dataclass(frozen=True, slots=True)
class Bar:
    """What one of the largest, or all others together, used in a day or month."""

    time: str
    """2026-01-31 or 2026-01."""
    name: str | None
    """As in `Share`."""
    is_other: bool
    credits: int


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The usage of an organization in a range of time: the largest projects and activities, and its course."""

    projects: list[Share]
    activities: list[Share]
    """The largest first."""
    bars: list[Bar]
    """By time."""
    credits: int
    runs: int
    """All of it, the smaller ones included."""


@dataclass(frozen=True, slots=True)
class Rate:
    """How quickly credits are used."""

    credits_per_day: int
    """The mean of the last full days, rounded up."""
    lasts_until: datetime | None
    """When the available credits are used up at this rate. None: never, or not before the year 9999."""


def usage(
    connection: Connection,
    org_id: str,
    group_by: Sequence[Group] = (),
    *,
    created_from: datetime | None = None,
    created_before: datetime | None = None,
    most: int = MOST_GROUPS,
) -> Usage:
    """The usage of `org_id` in a range of time, summed by at most `MOST_GROUPED_BY` different groups."""
    assert len(set(group_by)) == len(group_by) <= MOST_GROUPED_BY
    parts = _parts(connection, org_id, created_from, created_before).subquery()
    by = [_GROUPS[name](parts).label(name) for name in group_by]
    used, runs = func.sum(parts.c.credits).label("credits"), func.sum(parts.c.runs).label("runs")
    of_all = (func.sum(used).over().label("all_credits"), func.sum(runs).over().label("all_runs"))
    summed = select(*by, used, runs, *of_all).group_by(*by).order_by(used.desc(), *by)
    rows = connection.execute(summed.limit(most + 1)).mappings().all()
    if not rows or rows[0]["all_runs"] is None:
        return Usage([], 0, 0, truncated=False)
    groups = [
        {**{name: row[name] for name in group_by}, "credits": int(row["credits"]), "runs": int(row["runs"])}
        for row in (rows[:most] if group_by else ())
    ]
    if in_time := [name for name in group_by if name in ("day", "month")]:
        groups.sort(key=lambda group: [group[name] for name in in_time])
    return Usage(groups, int(rows[0]["all_credits"]), int(rows[0]["all_runs"]), truncated=len(rows) > most)


def breakdown(
    connection: Connection,
    org_id: str,
    matching: EventFilter,
    *,
    stacked_by: Literal["project", "activity"],
    each: Literal["day", "month"],
    most: int,
) -> Breakdown:
    """What used credits: in the range of time of `matching`, of its project and its activities, if it names any.

    The `most` largest projects and activities, and the usage of `each` day or month by those of `stacked_by`.
    """
    parts = _parts(connection, org_id, matching.created_from, matching.created_before).subquery()
    wanted: list[ColumnElement[bool]] = []
    if matching.project_id is not None:
        wanted.append(parts.c.project_id == matching.project_id)
    if matching.activity_names:
        wanted.append(parts.c.activity_name.in_(matching.activity_names))
    day, columns = parts.c.day, {"project": parts.c.project_id, "activity": parts.c.activity_name}
    sets = [tuple_(column) for column in columns.values()] + [tuple_(day, columns[stacked_by])]
    summed = (
        select(
            func.grouping(day).label("is_of_all_days"),
            func.grouping(columns["project"]).label("is_of_all_projects"),
            *(column.label(name) for name, column in {"day": day, **columns}.items()),
            func.sum(parts.c.credits).label("credits"),
            func.sum(parts.c.runs).label("runs"),
        )
        .where(*wanted)
        .group_by(func.grouping_sets(*sets))
        .cte("summed")
    )
    of_all_days = summed.c.is_of_all_days == 1
    of_each = {"project": summed.c.is_of_all_projects == 0, "activity": summed.c.is_of_all_projects == 1}
    largest = {
        what: select(summed.c[what].label("name"), summed.c.credits, summed.c.runs)
        .where(of_all_days, condition)
        .order_by(summed.c.credits.desc(), summed.c[what])
        .limit(most)
        .cte(f"largest_{what}")
        for what, condition in of_each.items()
    }
    large = largest[stacked_by]
    is_it = func.coalesce(large.c.name, "") == func.coalesce(summed.c[stacked_by], "")  # no name is empty
    is_other = large.c.credits.is_(None)
    name = case((is_other, null()), else_=large.c.name)
    time = _GROUPS[each](summed)
    used, ran = func.sum(summed.c.credits), func.sum(summed.c.runs)
    nothing, no = cast(null(), Text), literal(False)
    rows = connection.execute(
        union_all(
            select(
                *(literal("all").label("what"), nothing.label("time"), nothing.label("name"), no.label("is_other")),
                *(used.label("credits"), ran.label("runs")),
            ).where(of_all_days, of_each["project"]),
            *(select(literal(what), nothing, of.c.name, no, of.c.credits, of.c.runs) for what, of in largest.items()),
            select(literal("bar"), time, name, is_other, used, ran)
            .select_from(summed.outerjoin(large, is_it))
            .where(summed.c.is_of_all_days == 0)
            .group_by(time, name, is_other),
        )
    ).all()
    total = next(row for row in rows if row.what == "all")

    def shares(what: str) -> list[Share]:
        found = [Share(row.name, int(row.credits), int(row.runs)) for row in rows if row.what == what]
        return sorted(found, key=lambda share: (-share.credits, share.name or ""))

    bars = [Bar(row.time, row.name, row.is_other, int(row.credits)) for row in rows if row.what == "bar"]
    return Breakdown(
        projects=shares("project"),
        activities=shares("activity"),
        bars=sorted(bars, key=lambda bar: (bar.time, bar.is_other, bar.name or "")),
        credits=int(total.credits or 0),
        runs=int(total.runs or 0),
    )


def rate(connection: Connection, org_id: str, *, available: int, now: datetime) -> Rate | None:
    """How quickly `org_id` uses credits, and how long those that are `available` last. None: it is too new to say."""
    began_at = connection.scalar(
        select(credit_events.c.created_at).where(credit_events.c.org_id == org_id, credit_events.c.seq == 1)
    )
    if began_at is None:
        return None
    today = datetime.combine(now.astimezone(UTC), time.min, UTC)
    days = min(RATE_DAYS, (today - began_at).days)
    if days < FEWEST_RATE_DAYS:
        return None
    used = usage(connection, org_id, created_from=today - timedelta(days=days), created_before=today).credits
    per_day = used / days
    lasts_until = None
    if per_day > 0:
        with suppress(OverflowError):
            lasts_until = now + timedelta(days=max(0, available) / per_day)
    return Rate(-(-used // days), lasts_until)


_DAY = cast(func.timezone("UTC", credit_events.c.created_at), DATE)
_GROUPS: dict[Group, Any] = {
    "project": lambda parts: parts.c.project_id,
    "activity": lambda parts: parts.c.activity_name,
    "source": lambda parts: parts.c.source,
    "day": lambda parts: func.to_char(parts.c.day, "YYYY-MM-DD"),
    "month": lambda parts: func.to_char(parts.c.day, "YYYY-MM"),
}


def _parts(connection: Connection, org_id: str, created_from: datetime | None, created_before: datetime | None) -> Any:
    """The sums of whole days in the range, and each usage of it that is in none of them."""
    first_day, end_day = _first_day(created_from), _end_day(created_before)
    found = history.find(connection, org_id, EventFilter(created_from=created_from, created_before=created_before))
    days = found
    if (first_day, end_day) != (created_from, created_before):
        days = history.find(connection, org_id, EventFilter(created_from=first_day, created_before=end_day))
    summed = connection.scalar(select(usage_summed.c.seq).where(usage_summed.c.org_id == org_id)) or 0
    columns = credit_events.c
    events = select(
        _DAY.label("day"),
        columns.project_id,
        columns.activity_name,
        columns.source,
        cast(-columns.credits, Numeric).label("credits"),
        cast(1, BigInteger).label("runs"),
    ).where(columns.org_id == org_id, columns.event_type == "usage")

    def between(first: int, end: int) -> Select[Any]:
        return events.where(columns.seq >= first, columns.seq < end)

    in_sums_until = min(days.end, summed + 1)
    if days.first >= in_sums_until:  # no event of a whole day is in the sums
        return between(found.first, found.end)
    of_days: list[ColumnElement[bool]] = [usage_days.c.org_id == org_id]
    if first_day is not None:
        of_days.append(usage_days.c.day >= first_day.date())
    if end_day is not None:
        of_days.append(usage_days.c.day < end_day.date())
    sums: Select[Any] = select(
        usage_days.c.day,
        func.nullif(usage_days.c.project_id, "").label("project_id"),
        func.nullif(usage_days.c.activity_name, "").label("activity_name"),
        usage_days.c.source,
        usage_days.c.credits,
        usage_days.c.runs,
    ).where(*of_days)
    return union_all(sums, between(found.first, days.first), between(in_sums_until, found.end))


def _first_day(moment: datetime | None) -> datetime | None:
    """The first midnight, UTC, that is not before `moment`."""
    if moment is None:
        return None
    midnight = datetime.combine(moment.astimezone(UTC), time.min, UTC)
    if midnight == moment:
        return midnight
    try:
        return midnight + timedelta(days=1)
    except OverflowError:
        return moment


def _end_day(moment: datetime | None) -> datetime | None:
    """The last midnight, UTC, that is not after `moment`."""
    return None if moment is None else datetime.combine(moment.astimezone(UTC), time.min, UTC)


def sum_up(engine: Engine) -> int:
    """Sum the usage that is new. Returns the number of events summed. Raises transient database errors."""
    return sum(steps(engine))


def steps(engine: Engine) -> Iterator[int]:
    """The same, step by step. Yields the number of events that each step has summed.

    Each step is a transaction of its own: a sum has an event exactly once, whatever is killed and however many do this.
    """
    behind = (
        select(wallets.c.org_id)
        .outerjoin(usage_summed, usage_summed.c.org_id == wallets.c.org_id)
        .where(wallets.c.last_seq - func.coalesce(usage_summed.c.seq, 0) >= NOT_SUMMED)
        .order_by(wallets.c.org_id)
    )
    with engine.connect() as connection:
        org_ids = list(connection.scalars(behind))
    for org_id in org_ids:
        while summed := _sum_some(engine, org_id):
            yield summed
            if summed < STEP:
                break


def _sum_some(engine: Engine, org_id: str) -> int:
    """Sum the next events of `org_id`, at most `STEP`. Returns how many; 0 also if another worker is at it."""
    about = {"org_id": org_id, "step": STEP}
    with engine.begin() as connection:
        connection.execute(_BEGIN, about)
        range_ = connection.execute(_NEXT, about).first()
        if range_ is None:
            return 0
        after, through = range_
        connection.execute(_SUM, {**about, "after": after, "through": through})
    return int(through - after)


_BEGIN = text("INSERT INTO usage_summed (org_id, seq) VALUES (:org_id, 0) ON CONFLICT DO NOTHING")
# An event is there, for every later statement, once its wallet says so.
_NEXT = text("""
    SELECT seq, LEAST(seq + :step, last_seq) FROM usage_summed JOIN wallets USING (org_id)
    WHERE org_id = :org_id AND seq < last_seq FOR NO KEY UPDATE OF usage_summed SKIP LOCKED
""")
_SUM = text("""
    WITH summed AS (
        INSERT INTO usage_days AS day (org_id, day, project_id, activity_name, source, credits, runs)
        SELECT org_id, CAST(timezone('UTC', created_at) AS date), COALESCE(project_id, ''),
               COALESCE(activity_name, ''), source, sum(-credits), count(*)
        FROM credit_events
        WHERE org_id = :org_id AND seq > :after AND seq <= :through AND event_type = 'usage'
        GROUP BY 1, 2, 3, 4, 5
        ON CONFLICT ON CONSTRAINT usage_days_pkey
        DO UPDATE SET credits = day.credits + excluded.credits, runs = day.runs + excluded.runs
    )
    UPDATE usage_summed SET seq = :through WHERE org_id = :org_id
""")
