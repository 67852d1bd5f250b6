"""Month arithmetic: clamped ends of months, boundaries, long spans."""

from datetime import UTC, datetime, timedelta

import pytest

from ledger.periods import period_at, period_start


def at(year: int, month: int, day: int, hour: int = 9) -> datetime:
    return datetime(year, month, day, hour, tzinfo=UTC)


@pytest.mark.parametrize(
    ("anchor", "k", "start"),
    [
        (at(2026, 1, 31), 0, at(2026, 1, 31)),
        (at(2026, 1, 31), 1, at(2026, 2, 28)),
        (at(2026, 1, 31), 2, at(2026, 3, 31)),
        (at(2026, 1, 31), 3, at(2026, 4, 30)),
        (at(2026, 1, 31), 11, at(2026, 12, 31)),
        (at(2026, 1, 31), 12, at(2027, 1, 31)),
        (at(2026, 1, 31), 25, at(2028, 2, 29)),
        (at(2026, 1, 30), 1, at(2026, 2, 28)),
        (at(2026, 1, 30), 2, at(2026, 3, 30)),
        (at(2026, 1, 29), 1, at(2026, 2, 28)),
        (at(2028, 1, 29), 1, at(2028, 2, 29)),
        (at(2028, 1, 31), 1, at(2028, 2, 29)),
        (at(2028, 2, 29), 12, at(2029, 2, 28)),
        (at(2028, 2, 29), 48, at(2032, 2, 29)),
        (at(2100, 1, 31), 1, at(2100, 2, 28)),
        (at(2000, 1, 31), 1, at(2000, 2, 29)),
        (at(2026, 12, 31), 1, at(2027, 1, 31)),
        (at(2026, 12, 31), 2, at(2027, 2, 28)),
        (at(2026, 11, 15), 2, at(2027, 1, 15)),
        (at(2026, 2, 28), 1, at(2026, 3, 28)),
        (at(1971, 1, 31), 12_345, at(2999, 10, 31)),
    ],
)
def test_a_period_starts_that_many_months_after_the_anchor(anchor: datetime, k: int, start: datetime) -> None:
    assert period_start(anchor, k) == start


def test_a_period_starts_at_the_very_time_of_day_of_the_anchor() -> None:
    anchor = datetime(2026, 1, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert period_start(anchor, 1) == datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("anchor", "now", "k"),
    [
        (at(2026, 1, 31), at(2026, 1, 31), 0),
        (at(2026, 1, 31), at(2026, 2, 1), 0),
        (at(2026, 1, 31), at(2026, 2, 28, 8), 0),
        (at(2026, 1, 31), at(2026, 2, 28), 1),
        (at(2026, 1, 31), at(2026, 3, 30), 1),
        (at(2026, 1, 31), at(2026, 3, 31, 8), 1),
        (at(2026, 1, 31), at(2026, 3, 31), 2),
        (at(2026, 12, 15), at(2027, 1, 14), 0),
        (at(2026, 12, 15), at(2027, 1, 15), 1),
        (at(2028, 2, 29), at(2029, 2, 28), 12),
        (at(2028, 2, 29), at(2029, 2, 28, 8), 11),
        (at(1971, 1, 31), at(2999, 10, 31), 12_345),
        (at(1971, 1, 31), at(2999, 10, 31, 8), 12_344),
        (at(2026, 1, 31), at(2026, 1, 31, 8), None),
        (at(2026, 1, 31), at(2020, 5, 5), None),
    ],
)
def test_an_instant_is_in_the_period_that_began_last(anchor: datetime, now: datetime, k: int | None) -> None:
    assert period_at(anchor, now) == k


@pytest.mark.parametrize("day", [1, 28, 29, 30, 31])
def test_a_period_begins_at_its_first_instant_and_not_before(day: int) -> None:
    anchor = at(2023, 12, day)
    for k in range(1, 60):
        begins = period_start(anchor, k)
        assert period_at(anchor, begins - timedelta(microseconds=1)) == k - 1
        assert period_at(anchor, begins) == k
