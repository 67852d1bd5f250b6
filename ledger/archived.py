"""What the database still knows of events that are in the archive: how many they are, their days, and their sums."""

from datetime import UTC, datetime, time, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, Connection, Date, Text, any_, cast, func, literal, select

from ledger.tables import archived, credit_events, daily_sums, workflows


class Archived(NamedTuple):
    """The older events of an organization, which are in the archive."""

    events: int
    through: datetime
    """The time of the last of them."""


def as_item(older: Archived | None) -> dict[str, Any] | None:
    """The same as JSON values."""
    return None if older is None else {"events": older.events, "through": older.through.isoformat()}


def archived_events(connection: Connection, org_id: str) -> Archived | None:
    """The events of `org_id` that are in the archive; None: it has none there."""
    row = connection.execute(select(archived.c.seq, archived.c.created_at).where(archived.c.org_id == org_id)).first()
    return None if row is None else Archived(*row)


def first_since(connection: Connection, org_id: str, moment: datetime) -> int | None:
    """The number of the first event of the UTC day that has `moment`, or of a later day; None: it is in no sum."""
    columns = daily_sums.c
    days = columns.org_id == org_id, columns.day >= moment.astimezone(UTC).date()
    first: int | None = connection.scalar(select(func.min(columns.first_seq)).where(*days))
    return first


def first_day(connection: Connection, org_id: str) -> datetime | None:
    """When the UTC day of the first event of `org_id` began; None: it is in no sum."""
    day = connection.scalar(select(func.min(daily_sums.c.day)).where(daily_sums.c.org_id == org_id))
    return None if day is None else datetime.combine(day, time.min, UTC)


def has_archived_events(connection: Connection, org_id: str, workflow_id: str) -> bool:
    """Whether events of a workflow are in the archive: it says that it had them, and they are not there."""
    columns = workflows.c
    is_it = columns.org_id == org_id, columns.workflow_id == workflow_id
    row = connection.execute(select(columns.state, columns.start_answer).where(*is_it)).first()
    if row is None:
        return False
    expected = [f"start:{workflow_id}"] if row.start_answer == "reserved" else []
    if row.state == "settled":
        expected.append(f"finish:{workflow_id}")
    events, keys = credit_events.c, literal(expected, ARRAY(Text))
    there = select(func.count()).where(events.org_id == org_id, events.idempotency_key == any_(keys))
    return (connection.scalar(there) or 0) < len(expected)


def balances_by_day(
    connection: Connection, org_id: str, created_from: datetime | None, created_before: datetime | None
) -> list[tuple[datetime, int]]:
    """The available balance at each midnight (UTC) of the range that is after an archived day, and before the first.

    Oldest first, each with its time.
    """
    columns, old = daily_sums.c, archived.c
    last_day = select(cast(func.timezone("UTC", old.created_at), Date)).where(old.org_id == org_id).scalar_subquery()
    balance = func.sum(func.sum(columns.credits)).over(order_by=columns.day)
    days = select(columns.day, balance).where(columns.org_id == org_id, columns.day <= last_day)
    rows = connection.execute(days.group_by(columns.day).order_by(columns.day)).all()
    if not rows:
        return []
    steps = [(datetime.combine(day, time.min, UTC) + timedelta(days=1), int(after)) for day, after in rows]
    steps.insert(0, (datetime.combine(rows[0][0], time.min, UTC), 0))
    if created_from is not None:
        begin = datetime.combine((created_from + timedelta(days=1, microseconds=-1)).astimezone(UTC), time.min, UTC)
        passed = [balance for at, balance in steps if at <= begin]
        steps = [(begin, passed[-1])] * bool(passed) + [step for step in steps if step[0] > begin]
    return [step for step in steps if created_before is None or step[0] <= created_before]
