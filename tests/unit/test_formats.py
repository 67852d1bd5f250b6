"""How the pages write values."""

from datetime import UTC, date, datetime

import pytest

from api_stub.formats import days, pairs, share, written_day
from ledger.wording import Fact


def test_short_metadata_is_read_in_passing_and_long_metadata_is_not() -> None:
    assert pairs({}, "usage", "billing") == []
    assert pairs({"reason": "settled", "count": 3, "last": True, "none": None}, "reservation_released", "engine") == [
        Fact("", "The run finished"),
        Fact("count", "3"),
        Fact("last", "true"),
        Fact("none", "null"),
    ]
    assert pairs({"note": "x" * 120}, "usage", "billing") is None
    assert pairs({"list": []}, "usage", "billing") is None
    assert pairs({"deep": {"er": {}}}, "usage", "billing") is None
    assert pairs({"parts": dict.fromkeys("abcdef", 1)}, "usage", "billing") is None
    assert pairs(dict.fromkeys("abcdef", 1), "usage", "billing") is None


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        ("2026-11-10", "2026-11-21", "10–20 Nov"),
        ("2026-11-10T09:00", "2026-11-20T00:00:00.000001", "10–20 Nov"),
        ("2026-11-10T09:00", "2026-11-10T10:00", "10 Nov"),
        ("2026-11-10T00:00", "2026-11-10T00:00", "10 Nov"),
        ("2026-10-28", "2026-11-21", "28 Oct – 20 Nov"),
        ("2025-12-28", "2026-01-02", "28 Dec 2025 – 1 Jan 2026"),
        ("2025-11-10", "2025-11-21", "10–20 Nov 2025"),
        ("2025-10-10", "2025-11-21", "10 Oct – 20 Nov 2025"),
        ("2025-11-10", "2025-11-11", "10 Nov 2025"),
        ("2026-11-10T23:00-05:00", "2026-11-12T23:00-05:00", "11–13 Nov"),
    ],
)
def test_a_range_ends_with_its_last_day(begin: str, end: str, words: str) -> None:
    first, last = (datetime.fromisoformat(text) for text in (begin, end))
    first, last = (each if each.tzinfo else each.replace(tzinfo=UTC) for each in (first, last))
    assert days(first, last, NOW) == words


@pytest.mark.parametrize("text", ["31 Jan 2026", "31 January 2026", "31 jan 2026"])
def test_a_person_writes_a_day_in_words(text: str) -> None:
    assert written_day(text) == date(2026, 1, 31)


@pytest.mark.parametrize("text", ["31 Feb 2026", "31.01.2026", "Jan 31", "31 Jan 26", ""])
def test_what_is_no_day_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no such day"):
        written_day(text)


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [(43, 100, "43 %"), (1, 3, "33 %"), (1, 1_000, "under 1 %"), (0, 1_000, "0 %"), (0, 0, "0 %"), (5, 5, "100 %")],
)
def test_a_share_is_a_whole_percentage(part: int, whole: int, words: str) -> None:
    assert share(part, whole) == words
