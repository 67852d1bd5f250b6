"""What used the credits of an organization: the sums of its usage, by project, activity, source, day or month.

Exact, and quick for years of events, because it is added up from the daily sums (`ledger.daily_sums`).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from typing import Any, Literal

from sqlalchemy import (
    CompoundSelect,
    Connection,
    Subquery,
    Text,
    case,
    cast,
    func,
    literal,
    null,
    select,
    tuple_,
    union_all,
)

from ledger import history
from ledger.filters import EventFilter

Group = Literal["project", "activity", "source", "day", "month"]
"""What usage can be grouped by. `day` and `month` are those of UTC."""

Stack = Literal["project", "activity"]
"""What the bars of a breakdown are stacked by."""

MOST_GROUPED_BY = 2
"""The most of them at once."""

MOST_GROUPS = 1_000
"""The most groups of one result, unless more are asked for."""

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
    matching = EventFilter(created_from=created_from, created_before=created_before)
    sums = history.find(connection, org_id, usage_of(matching)).sums(connection).c
    by = [_GROUPS[name](sums).label(name) for name in group_by]
    used, runs = func.sum(-sums.credits).label("credits"), func.sum(sums.events).label("runs")
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


def usage_of(matching: EventFilter) -> EventFilter:
    """The events of usage in the range of time of `matching`, of its project and its activities, if it names any."""
    return replace(matching, event_types=("usage",), workflow_id=None)


def breakdown(
    connection: Connection, found: history.Found, *, stacked_by: Stack, each: Literal["day", "month"], most: int
) -> Breakdown:
    """What used credits, of the usage that was `found`.

    The `most` largest projects and activities, and the usage of `each` day or month by those of `stacked_by`.
    """
    rows = connection.execute(_broken_down(found.sums(connection), stacked_by, each, most)).all()
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


def _broken_down(sums: Subquery, stacked_by: Stack, each: Group, most: int) -> CompoundSelect[Any]:
    """The total, the largest projects and activities, and the bars: one pass over the sums."""
    day, columns = sums.c.day, {"project": sums.c.project_id, "activity": sums.c.activity_name}
    sets = [tuple_(column) for column in columns.values()] + [tuple_(day, columns[stacked_by])]
    summed = (
        select(
            func.grouping(day).label("is_of_all_days"),
            func.grouping(columns["project"]).label("is_of_all_projects"),
            *(column.label(name) for name, column in {"day": day, **columns}.items()),
            func.sum(-sums.c.credits).label("credits"),
            func.sum(sums.c.events).label("runs"),
        )
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
    of_bar = _GROUPS[each](summed.c)
    credits_, runs = func.sum(summed.c.credits), func.sum(summed.c.runs)
    nothing, no = cast(null(), Text), literal(False)
    return union_all(
        select(
            *(literal("all").label("what"), nothing.label("time"), nothing.label("name"), no.label("is_other")),
            *(credits_.label("credits"), runs.label("runs")),
        ).where(of_all_days, of_each["project"]),
        *(select(literal(what), nothing, of.c.name, no, of.c.credits, of.c.runs) for what, of in largest.items()),
        select(literal("bar"), of_bar, name, is_other, credits_, runs)
        .select_from(summed.outerjoin(large, is_it))
        .where(summed.c.is_of_all_days == 0)
        .group_by(of_bar, name, is_other),
    )


def rate(connection: Connection, org_id: str, *, available: int, now: datetime) -> Rate | None:
    """How quickly `org_id` uses credits, and how long those that are `available` last. None: it is too new to say."""
    began_at = history.began_at(connection, org_id)
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


_GROUPS: dict[Group, Any] = {
    "project": lambda sums: sums.project_id,
    "activity": lambda sums: sums.activity_name,
    "source": lambda sums: sums.source,
    "day": lambda sums: func.to_char(sums.day, "YYYY-MM-DD"),
    "month": lambda sums: func.to_char(sums.day, "YYYY-MM"),
}
