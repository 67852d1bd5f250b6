"""The bars of usage: every credit has its place, and no day is left out."""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from api_stub.bars import OTHER, BarChart, Piece, bar_chart, each_of
from ledger.usage import Bar, Share

BEGIN = datetime(2026, 11, 10, 9, tzinfo=UTC)
LARGEST = [Share("web", 60, 2), Share(None, 40, 1)]


def drawn(bars: list[Bar], days: float, largest: list[Share] = LARGEST) -> BarChart:
    chart = bar_chart(bars, largest, BEGIN, BEGIN + timedelta(days=days))
    assert chart is not None
    return chart


def test_what_the_largest_used_is_stacked_and_all_others_are_on_top() -> None:
    chart = drawn(
        [
            Bar("2026-11-10", "web", False, 40),
            Bar("2026-11-10", None, False, 40),
            Bar("2026-11-10", None, True, 20),
            Bar("2026-11-12", "web", False, 20),
        ],
        2,
    )
    first, second, third = chart.columns
    assert first.pieces == [
        Piece("0", "M33.33 60.00h266.67v40.00h-266.67Z"),
        Piece("1", "M33.33 20.00h266.67v40.00h-266.67Z"),
        Piece(OTHER, "M33.33 0.00h266.67v20.00h-266.67Z"),
    ]
    assert (second.credits, second.pieces) == (0, [])
    assert third.pieces == [Piece("0", "M700.00 80.00h266.67v20.00h-266.67Z")]
    assert [column.label for column in chart.columns] == ["10 Nov", "11 Nov", "12 Nov"]
    assert chart.highest is first
    assert chart.values == ["100", "50", "0"]
    assert chart.grid == [0, 50, 100]


def test_the_columns_are_within_the_drawing_and_do_not_touch() -> None:
    days = [f"2026-11-{day}" for day in range(10, 31)]
    columns = drawn([Bar(day, "web", False, 1) for day in days], 20).columns
    [*places] = (re.match(r"M([\d.]+) [\d.]+h([\d.]+)v", column.pieces[0].line) for column in columns)
    ends = [(float(place[1]), float(place[1]) + float(place[2])) for place in places if place]
    assert len(ends) == 21
    assert all(left_ends < right_begins for (_, left_ends), (right_begins, _) in pairwise(ends))
    assert ends[0][0] > 0
    assert ends[-1][1] < 1_000


def test_an_end_at_midnight_begins_no_day() -> None:
    end = datetime(2026, 11, 13, tzinfo=UTC)
    chart = bar_chart([Bar("2026-11-11", "web", False, 1)], LARGEST, BEGIN, end)
    assert chart is not None
    assert [column.label for column in chart.columns] == ["10 Nov", "11 Nov", "12 Nov"]


def test_a_long_time_is_drawn_month_by_month() -> None:
    chart = drawn([Bar("2026-11", "web", False, 5), Bar("2027-02", "web", False, 1)], 93)
    assert [(column.label, column.credits) for column in chart.columns] == [
        ("Nov 2026", 5),
        ("Dec 2026", 0),
        ("Jan 2027", 0),
        ("Feb 2027", 1),
    ]
    assert chart.each == "month"


@pytest.mark.parametrize(("days", "each"), [(1, "day"), (92, "day"), (93, "month")])
def test_a_bar_is_a_day_for_three_months(days: int, each: str) -> None:
    assert each_of(BEGIN, BEGIN + timedelta(days=days)) == each


@pytest.mark.parametrize(("hours", "bars"), [(23, [Bar("2026-11-10", "web", False, 9)]), (48, [])])
def test_less_than_a_day_and_nothing_are_not_drawn(hours: int, bars: list[Bar]) -> None:
    assert bar_chart(bars, LARGEST, BEGIN, BEGIN + timedelta(hours=hours)) is None
