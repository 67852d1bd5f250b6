"""The step chart: every balance is where it belongs, from the first to the last moment."""

from datetime import UTC, datetime, timedelta

import pytest

from api_stub.chart import step_chart
from ledger.history import Course

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(days: int) -> datetime:
    return BEGIN + timedelta(days=days)


def test_a_balance_holds_until_the_next() -> None:
    chart = step_chart(Course([(at(0), 100), (at(5), 50)], at(10), None))
    assert chart.line == "M0 0.00H500.0V50.00H1000"
    assert chart.area == "M0 0.00H500.0V50.00H1000V100.00H0Z"
    assert chart.values == ["100", "50", "0"]
    assert chart.grid == [0, 50, 100]
    assert chart.times == [at(0), at(5), at(10)]
    assert (chart.first, chart.last, chart.extremes) == (100, 50, None)


def test_what_the_points_leave_out_has_its_place_in_the_chart() -> None:
    chart = step_chart(Course([(at(0), 100), (at(5), 50)], at(10), (-100, 300)))
    assert chart.values == ["300", "200", "100", "0", "−100"]
    assert chart.line == "M0 50.00H500.0V62.50H1000"
    assert chart.extremes == (-100, 300)


def test_zero_is_within_the_chart_when_the_balance_is_below_it() -> None:
    chart = step_chart(Course([(at(0), 30), (at(1), -10)], at(2), None))
    assert chart.values == ["30", "20", "10", "0", "−10"]
    assert chart.zero == 75
    assert chart.line == "M0 0.00H500.0V100.00H1000"


@pytest.mark.parametrize(
    ("amount", "values"),
    [
        (0, ["1", "0"]),
        (3, ["3", "2", "1", "0"]),
        (1_041, ["1,500", "1,000", "500", "0"]),
        (48_000, ["60k", "40k", "20k", "0"]),
        (5_600_000, ["6M", "4M", "2M", "0"]),
        (-7, ["0", "−2", "−4", "−6", "−8"]),
        (2**53 - 1, ["10Q", "5Q", "0"]),
    ],
)
def test_the_lines_of_the_chart_are_at_round_values(amount: int, values: list[str]) -> None:
    assert step_chart(Course([(at(0), amount)], at(1), None)).values == values


def test_a_history_of_one_moment_is_a_level_line() -> None:
    assert step_chart(Course([(at(0), 4)], at(0), None)).line == "M0 0.00H1000"
