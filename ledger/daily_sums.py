"""The daily sums: how many events there were, and of how many credits, by UTC day, type, project, activity and source.

The scheduler makes them from the events, so that the history of years is counted and added up in some rows. Whoever
reads them adds the events that are newer, and those of days that begin or end outside the range. So the result is
exact, and never depends on when the scheduler came by.

Guarantee: the sums of an organization have each event up to one number exactly once, whatever is killed and however
many schedulers there are. They can be made anew from the events at any time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Engine, Select, func, select, text
from sqlalchemy.sql import visitors

from ledger.tables import daily_sums, daily_sums_through, wallets

SUM_UP = "events.sum_up"
"""The scheduler's run that keeps the sums."""

NOT_SUMMED = 10_000
"""The fewest new events of an organization that the scheduler sums; fewer are read one by one, as quickly."""

STEP = 50_000
"""The most events that one transaction of the scheduler sums."""


@dataclass(frozen=True, slots=True)
class Days:
    """UTC days of an organization that are in the sums, and their events: from number `first` to before `end`.

    The events after the summed ones of the last day are not among them.
    """

    org_id: str
    first_day: date
    last_day: date
    first: int
    end: int

    def select(self, conditions: Sequence[ColumnElement[bool]] = ()) -> Select[Any]:
        """The sums of these days that meet `conditions`, which are conditions on events."""
        in_range = _sums.c.day.between(self.first_day, self.last_day)
        return select(_sums).where(_sums.c.org_id == self.org_id, in_range, *map(_on_sums, conditions))


_sums = select(
    daily_sums.c.org_id,
    daily_sums.c.day,
    daily_sums.c.event_type,
    func.nullif(daily_sums.c.project_id, "").label("project_id"),
    func.nullif(daily_sums.c.activity_name, "").label("activity_name"),
    daily_sums.c.source,
    daily_sums.c.events,
    daily_sums.c.credits,
    daily_sums.c.first_seq,
    daily_sums.c.last_seq,
).subquery("sums")


def _on_sums(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """The condition on events as one on their sums."""

    def column_of_sums(element: Any, **_: Any) -> Any:
        return _sums.c[element.name] if isinstance(element, Column) else None

    return visitors.replacement_traverse(condition, {}, column_of_sums)


def whole_days(connection: Connection, org_id: str, first: int, end: int) -> Days | None:
    """The days in the sums all of whose summed events are numbered from `first` to before `end`. None: there is none.

    What is selected of them later agrees with this only within one snapshot of the ledger.
    """
    if first >= end:
        return None
    found = connection.execute(_WHOLE_DAYS, {"org_id": org_id, "first": first, "end": end}).one_or_none()
    return None if found is None else Days(org_id, *found)


_WHOLE_DAYS = text("""
    WITH event AS (
        SELECT seq, CAST(timezone('UTC', created_at) AS date) AS day FROM credit_events
        WHERE org_id = :org_id AND seq IN (:first - 1, :end)
    ), in_archive AS ( -- ranges begin and end between its days
        SELECT number AS seq, (SELECT max(day) FROM daily_sums WHERE org_id = :org_id AND first_seq <= number) AS day
        FROM archived CROSS JOIN (VALUES (CAST(:first AS bigint) - 1), (:end)) AS wanted (number)
        WHERE org_id = :org_id AND number BETWEEN 1 AND seq
    ), around AS (
        SELECT max(day) FILTER (WHERE seq < :end) AS before_first, max(day) FILTER (WHERE seq = :end) AS after_last
        FROM (SELECT * FROM event UNION ALL SELECT * FROM in_archive) AS ends
    ), limits AS (
        SELECT COALESCE(before_first, '-infinity') AS day_before, COALESCE(after_last, 'infinity') AS day_after
        FROM around
    ), days AS ( -- each by a look-up, not by reading all of them
        SELECT (
            SELECT day FROM daily_sums WHERE org_id = :org_id AND day > day_before AND day < day_after
            ORDER BY day LIMIT 1
        ) AS first_day, (
            SELECT day FROM daily_sums WHERE org_id = :org_id AND day > day_before AND day < day_after
            ORDER BY day DESC LIMIT 1
        ) AS last_day
        FROM limits
    )
    SELECT first_day, last_day,
        (SELECT min(first_seq) FROM daily_sums WHERE org_id = :org_id AND day = first_day),
        (SELECT max(last_seq) + 1 FROM daily_sums WHERE org_id = :org_id AND day = last_day)
    FROM days WHERE first_day IS NOT NULL
""")


def sum_up(engine: Engine) -> int:
    """Sum the events that are new. Returns their number. Raises transient database errors."""
    return sum(steps(engine))


def steps(engine: Engine) -> Iterator[int]:
    """The same, step by step. Yields the number of events that each step has summed, in a transaction of its own."""
    behind = (
        select(wallets.c.org_id)
        .outerjoin(daily_sums_through, daily_sums_through.c.org_id == wallets.c.org_id)
        .where(wallets.c.last_seq - func.coalesce(daily_sums_through.c.seq, 0) >= NOT_SUMMED)
        .where(wallets.c.last_seq >= NOT_SUMMED)  # tells the planner that these are few
        .order_by(wallets.c.org_id)
    )
    with engine.connect() as connection:
        org_ids = list(connection.scalars(behind))
    for org_id in org_ids:
        yield from steps_of(engine, org_id)


def steps_of(engine: Engine, org_id: str) -> Iterator[int]:
    """The same for one organization, however few of its events are new."""
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
        found = {**about, "after": after, "through": through}
        connection.execute(_SUM, found)
        connection.execute(_SUMMED, found)
    return int(through - after)


# Archived events can be summed no more.
_BEGIN = text("""
    INSERT INTO daily_sums_through (org_id, seq)
    SELECT org_id, COALESCE(archived.seq, 0) FROM wallets LEFT JOIN archived USING (org_id) WHERE org_id = :org_id
    ON CONFLICT DO NOTHING
""")
# An event is there, for every later statement, once its wallet says so.
_NEXT = text("""
    SELECT seq, LEAST(seq + :step, last_seq) FROM daily_sums_through JOIN wallets USING (org_id)
    WHERE org_id = :org_id AND seq < last_seq FOR NO KEY UPDATE OF daily_sums_through SKIP LOCKED
""")
_SUM = text("""
    INSERT INTO daily_sums AS sums (
        org_id, day, event_type, project_id, activity_name, source, events, credits, first_seq, last_seq
    )
    SELECT org_id, CAST(timezone('UTC', created_at) AS date), event_type, COALESCE(project_id, ''),
           COALESCE(activity_name, ''), source, count(*), sum(credits), min(seq), max(seq)
    FROM credit_events
    WHERE org_id = :org_id AND seq > :after AND seq <= :through
    GROUP BY 1, 2, 3, 4, 5, 6
    ON CONFLICT (org_id, day, event_type, project_id, activity_name, source)
    DO UPDATE SET events = sums.events + excluded.events, credits = sums.credits + excluded.credits,
                  last_seq = excluded.last_seq
""")
_SUMMED = text("UPDATE daily_sums_through SET seq = :through WHERE org_id = :org_id")
