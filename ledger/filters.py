"""Filters of the credit history, and how a person writes their values: days, times and ids."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import ColumnElement

from holdfast_client.messages import ID_PATTERN, MAX_ID_LENGTH, MAX_NAME_LENGTH
from ledger.state import EventType
from ledger.tables import credit_events

BY_NUMBER = "created_from", "created_before", "workflow_id"
"""The fields of a filter that select event numbers, so that no event is checked. Numbers are in the order of time."""


def _where(condition: Callable[[Any], ColumnElement[bool]], *, default: Any) -> Any:
    """A field of the filter: any value but the default is a condition on the event."""
    return field(default=default, metadata={"condition": condition})


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Conditions on events. All that are given must hold. `created_from` is inclusive, `created_before` is not."""

    created_from: datetime | None = None
    created_before: datetime | None = None
    event_types: tuple[EventType, ...] = _where(credit_events.c.event_type.in_, default=())
    project_id: str | None = _where(credit_events.c.project_id.__eq__, default=None)
    activity_names: tuple[str, ...] = _where(credit_events.c.activity_name.in_, default=())
    activity_contains: str = _where(
        lambda text: credit_events.c.activity_name.icontains(text, autoescape=True), default=""
    )
    """A part of the activity's name, in whatever case."""
    workflow_id: str | None = None
    """Only the events of this workflow and its refunds."""

    def conditions(self) -> tuple[ColumnElement[bool], ...]:
        """The conditions that an event with one of the selected numbers must meet."""
        given = ((each, getattr(self, each.name)) for each in fields(self) if each.name not in BY_NUMBER)
        return tuple(each.metadata["condition"](value) for each, value in given if value != each.default)

    @property
    def looks_at_each(self) -> bool:
        """Whether every event of the time range has to be checked for a match."""
        return self.workflow_id is None and bool(self.conditions())


EVERY_EVENT = EventFilter()


@dataclass(frozen=True, slots=True)
class When:
    """A UTC day, whose end is the first moment after it; or one moment, which is its own begin and end."""

    begin: datetime
    end: datetime


def when(text: str) -> When:
    """A date or time as a person writes it: ISO 8601; UTC unless it says otherwise.

    In a query string, an unescaped `+` arrives as a space. Before an offset, a space is read as `+`.
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
    """A moment, or the first moment of a day, as a person writes it. Raises ValueError, as `when` does."""
    return when(text).begin


def time_range(first: When | None, last: When | None) -> tuple[datetime | None, datetime | None]:
    """The range from `first` to the end of the day `last`, or to before the moment `last`.

    Raises ValueError if `last` is before `first`.
    """
    if first is not None and last is not None and last.begin < first.begin and last.end <= first.begin:
        raise ValueError("the range ends before it begins")
    return None if first is None else first.begin, None if last is None else last.end


def identifier(text: str) -> str:
    """The id of a project or a workflow as a person writes it. Raises ValueError, as `when` does."""
    if not re.fullmatch(ID_PATTERN, text):
        raise ValueError(f"must have 1 to {MAX_ID_LENGTH} characters, and only letters, digits and _ . : - among them")
    return text


def activity_name(text: str) -> str:
    """The name of an activity as a person writes it. Raises ValueError, as `when` does."""
    if not 1 <= len(text) <= MAX_NAME_LENGTH or re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"must have 1 to {MAX_NAME_LENGTH} characters, and no NUL or invalid character among them")
    return text
