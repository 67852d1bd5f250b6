"""Filters of the templates, for times and metadata; those that the terminal has too are in `ledger.wording`."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any

from ledger.state import EventType
from ledger.wording import Fact, day, facts, in_words, near_day

SHORT_METADATA = 120
"""The longest metadata, in characters, that a page shows without a click."""
MOST_FACTS = 5
"""The most entries of metadata that it shows so."""


def share(part: int, whole: int) -> str:
    """43 %; under 1 % if it is little, but not nothing."""
    percent = round(100 * part / whole) if whole else 0
    return f"{percent} %" if percent or not part else "under 1 %"


def days(begin: datetime, end: datetime, now: datetime) -> str:
    """The days, in UTC, from `begin` to before `end`: 10–20 Nov. With the year, unless it is that of `now`."""
    first = begin.astimezone(UTC)
    last = max(first, end.astimezone(UTC) - timedelta(microseconds=1)) if end > begin else first
    if first.date() == last.date():
        return near_day(first, now)
    if (first.year, first.month) == (last.year, last.month):
        return f"{first.day}–{near_day(last, now)}"
    if first.year == last.year:
        return f"{first.day} {first:%b} – {near_day(last, now)}"
    return f"{day(first)} – {day(last)}"


def written_day(text: str) -> date:
    """The day that a person writes as 31 Jan 2026 or 31 January 2026. Raises ValueError."""
    for form in ("%d %b %Y", "%d %B %Y"):
        with suppress(ValueError):
            return datetime.strptime(text, form).date()  # noqa: DTZ007 - a day has no time zone
    raise ValueError("no such day")


def iso(moment: datetime) -> str:
    """2026-11-02T14:05:33Z: for machines."""
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def pairs(metadata: Mapping[str, Any], event_type: EventType, source: str) -> list[Fact] | None:
    """The metadata of an event in words, or None if it is too long to be shown without a click."""
    shown = facts(event_type, metadata, source)
    as_they_are = [metadata[fact.name] for fact in shown if fact.name in metadata]
    parts = [part for value in as_they_are for part in (value.values() if isinstance(value, dict) else [value])]
    if any(isinstance(part, dict | list) for part in parts) or max(len(shown), len(parts)) > MOST_FACTS:
        return None
    return shown if sum(len(str(fact)) for fact in shown) <= SHORT_METADATA else None


def said(value: object) -> str:
    """A JSON value in a table: an amount, the text itself, or JSON."""
    return "nothing" if value is None else in_words(value)
