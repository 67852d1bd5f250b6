"""Usage by day or month as the shapes of a stacked bar chart. Pure: amounts in, coordinates out.

The drawing is 1,000 wide and 100 high, to be stretched, as that of `chart`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from api_stub.chart import HEIGHT, WIDTH, scale, short
from ledger.usage import Bar, Share

MOST_DAYS = 92
"""The longest time that is drawn day by day; a longer one is drawn month by month."""
LEAST = timedelta(days=1)
"""A shorter time has no chart: it would be a single bar."""
GAP = 0.2
"""The share of a bar's place that stays empty."""
OTHER = "other"

Each = Literal["day", "month"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one project or activity used, within a bar."""

    series: str
    """Its place among the largest: 0, 1, …; or OTHER."""
    line: str
    """The path around it."""


@dataclass(frozen=True, slots=True)
class Column:
    """One day or month."""

    label: str
    credits: int
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class BarChart:
    """A stacked bar chart, ready to be drawn."""

    each: Each
    columns: list[Column]
    highest: Column
    grid: list[float]
    """The positions of the horizontal lines, from the top."""
    values: list[str]
    """The labels of the lines, from the top."""


def each_of(begin: datetime, end: datetime) -> Each:
    """What a bar stands for in a chart of this range of time."""
    return "day" if end - begin <= timedelta(days=MOST_DAYS) else "month"


def bar_chart(bars: Sequence[Bar], largest: Sequence[Share], begin: datetime, end: datetime) -> BarChart | None:
    """The chart of `bars` from `begin` to before `end`, stacked by the `largest`.

    None: the time is too short, or nothing was used.
    """
    each = each_of(begin, end)
    used: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    places = {share.name: str(number) for number, share in enumerate(largest)}
    for bar in bars:
        used[bar.time][OTHER if bar.is_other else places[bar.name]] += bar.credits
    highest = max((sum(of.values()) for of in used.values()), default=0)
    if end - begin < LEAST or not highest:
        return None
    step, top, _ = scale(0, highest)
    times = list(_times(begin, end, each))
    place = WIDTH / len(times)
    width = f"{place * (1 - GAP):.2f}"
    columns = []
    for number, (key, label) in enumerate(times):
        of, y, pieces = used.get(key, {}), float(HEIGHT), []
        x = f"{(number + GAP / 2) * place:.2f}"
        for series in (*places.values(), OTHER):
            if of.get(series):
                height = of[series] / (top * step) * HEIGHT
                y -= height
                pieces.append(Piece(series, f"M{x} {y:.2f}h{width}v{height:.2f}h-{width}Z"))
        columns.append(Column(label, sum(of.values()), pieces))
    return BarChart(
        each=each,
        columns=columns,
        highest=max(columns, key=lambda column: column.credits),
        grid=[HEIGHT * number / top for number in range(top + 1)],
        values=[short(number * step) for number in range(top, -1, -1)],
    )


def _times(begin: datetime, end: datetime, each: Each) -> Iterator[tuple[str, str]]:
    """Every day or month of the range: as in `Bar.time`, and for people."""
    first, last = begin.astimezone(UTC).date(), (end - timedelta(microseconds=1)).astimezone(UTC).date()
    if each == "day":
        for number in range((last - first).days + 1):
            day = first + timedelta(days=number)
            yield day.isoformat(), f"{day.day} {day:%b}"
        return
    month = first.replace(day=1)
    while month <= last:
        yield f"{month:%Y-%m}", f"{month:%b %Y}"
        month = (month + timedelta(days=31)).replace(day=1)
