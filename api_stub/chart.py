"""The course of a balance as the shapes of a step chart. Pure: amounts in, coordinates out.

The drawing is 1,000 wide and 100 high, to be stretched. Labels are evenly spaced text beside it.
"""

import math
from dataclasses import dataclass
from datetime import datetime

from ledger.history import Course

WIDTH, HEIGHT = 1_000, 100
INTERVALS = 4
"""The approximate number of intervals between the grid lines."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A step chart, ready to be drawn."""

    line: str
    """The path of the balance."""
    area: str
    """The path of the area between the balance and zero."""
    grid: list[float]
    """The positions of the horizontal lines, from the top."""
    zero: float
    """The position of zero."""
    values: list[str]
    """The labels of the lines, from the top."""
    times: list[datetime]
    """The times at evenly spaced places on the horizontal axis, from the left."""
    first: int
    last: int
    extremes: tuple[int, int] | None
    """The lowest and the highest balance. None: not known."""


def step_chart(course: Course) -> Chart:
    """The chart of `course`, whose points may leave out the extremes."""
    points, ends, extremes = course.points, course.ends, course.extremes
    begins = points[0][0]
    length_s = max((ends - begins).total_seconds(), 1e-6)
    amounts = [amount for _, amount in points]
    lowest, highest = min(0, *amounts, *(extremes or ())), max(0, *amounts, *(extremes or ()))
    step, top, bottom = scale(lowest, highest)

    def x(moment: datetime) -> str:
        share = min(max((moment - begins).total_seconds() / length_s, 0), 1)
        return f"{share * WIDTH:.1f}"

    def y(amount: int) -> str:
        return f"{(top - amount / step) / (top - bottom) * HEIGHT:.2f}"

    line = f"M0 {y(amounts[0])}" + "".join(f"H{x(moment)}V{y(amount)}" for moment, amount in points[1:]) + f"H{WIDTH}"
    return Chart(
        line=line,
        area=f"{line}V{y(0)}H0Z",
        grid=[HEIGHT * index / (top - bottom) for index in range(top - bottom + 1)],
        zero=float(y(0)),
        values=[short(number * step) for number in range(top, bottom - 1, -1)],
        times=[begins + (ends - begins) * index / 2 for index in range(3)],
        first=amounts[0],
        last=amounts[-1],
        extremes=extremes,
    )


def scale(lowest: int, highest: int) -> tuple[int, int, int]:
    """The step between grid lines, and how many steps above zero the first and the last of them are."""
    step = _step((highest - lowest) / INTERVALS)
    top, bottom = math.ceil(highest / step), math.floor(lowest / step)
    return step, max(top, bottom + 1), bottom


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is not less than `least`."""
    magnitude = 10 ** max(0, math.floor(math.log10(least))) if least > 1 else 1
    return next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least)


def short(amount: int) -> str:
    """A round amount in few characters: 950, 12k, 1.5M, 9B."""
    for size, unit in ((10**15, "Q"), (10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(amount) >= max(size, 10_000):
            return f"{amount / size:,.4g}{unit}".replace("-", "\N{MINUS SIGN}")
    return f"{amount:,}".replace("-", "\N{MINUS SIGN}")
