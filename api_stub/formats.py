"""Filters of the templates, for times and metadata; those that the terminal has too are in `ledger.wording`."""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Any

from ledger.readable import as_json
from ledger.wording import amount, clock, day, near_day

SHORT_METADATA = 60
"""The longest metadata, in characters, that a page shows without a click."""

_MOMENT = re.compile(r"20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d(\.\d{1,6})?\+00:00", re.ASCII)
"""A moment as the ledger itself writes it in metadata."""


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


def pairs(metadata: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """The names and values of `metadata`, or None if they are too long to be shown without a click."""
    parts = [part for value in metadata.values() for part in (value.values() if isinstance(value, dict) else [value])]
    if any(isinstance(part, dict | list) for part in parts) or max(len(metadata), len(parts)) > 4:
        return None
    shown = [(name, _readable(value)) for name, value in metadata.items()]
    return shown if sum(len(name) + len(value) for name, value in shown) <= SHORT_METADATA else None


def said(value: object) -> str:
    """A JSON value in a table: an amount, the text itself, or JSON."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and not isinstance(value, bool):
        return amount(value)
    return _readable(value)


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items())
    if not isinstance(value, str):
        return as_json(value)
    if not _MOMENT.fullmatch(value):
        return value
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:  # the 31st of February
        return value
    return f"{day(moment)} {clock(moment)}"
