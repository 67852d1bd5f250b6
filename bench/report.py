"""The report of a run: for each row the median and the spread of its repetitions, and whether every bar is met."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench.measures import Figure
from bench.stand import Stand

NAIVE = "a"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of every repetition."""

    key: str
    what: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The value that a figure, or its ratio to another one, has to reach."""

    what: str
    key: str
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def value(self, rows: dict[str, Row]) -> float:
        """The value that was reached."""
        return rows[self.key].median / (1 if self.over is None else rows[self.over].median)

    def is_met(self, rows: dict[str, Row]) -> bool:
        """Whether the value of `rows` is within the bar."""
        value = self.value(rows)
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


BARS = (
    Bar(what="(b) 1 worker / (a)", key="b-1", over=NAIVE, at_least=25),
    Bar(what="(b) 2 workers / 1 worker", key="b-2", over="b-1", at_least=1.3),
    Bar(what="(c) / (b) 1 worker", key="c", over="b-1", at_least=0.8),
    Bar(what="(e) spread, batches of 200 / (a)", key="e-spread-200", over=NAIVE, at_least=60),
    Bar(what="(g) p50, ms", key="g-p50", at_most=20),
    Bar(what="(g) p99, ms", key="g-p99", at_most=100),
    Bar(what="(i) many events / few", key="i-many", over="i-few", at_least=0.75),
    Bar(what="(j) every event, far / newest", key="j-every-far", over="j-every-newest", at_most=3),
    Bar(what="(j) one event type, far / newest", key="j-type-far", over="j-type-newest", at_most=3),
    Bar(what="(j) one project, far / newest", key="j-project-far", over="j-project-newest", at_most=3),
)


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a run, and its circumstances: machine, date and command."""

    rows: dict[str, Row]
    circumstances: dict[str, str]

    @classmethod
    def of(cls, repetitions: Iterable[Sequence[Figure]], circumstances: dict[str, str]) -> "Report":
        """Make the report of these repetitions, each with the same figures."""
        rows: dict[str, Row] = {}
        for figures in repetitions:
            for figure in figures:
                rows.setdefault(figure.key, Row(figure.key, figure.what, figure.unit, [])).values.append(figure.value)
        in_order = sorted(rows.items(), key=lambda item: item[0][0])  # by their letters
        return cls(dict(in_order), circumstances)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "circumstances": self.circumstances,
            "rows": [{**asdict(row), "median": row.median} for row in self.rows.values()],
            "bars": [{**asdict(bar), "value": bar.value(self.rows), "is_met": bar.is_met(self.rows)} for bar in BARS],
        }

    def as_markdown(self) -> str:
        """The report for people, as in docs/performance.md."""
        naive = self.rows[NAIVE]
        figures = [
            (
                f"({row.key[0]})",
                row.what,
                f"{_number(row.median)} {row.unit}",
                f"{_number(min(row.values))} – {_number(max(row.values))}",
                f"{_number(row.median / naive.median)} ×" if row.unit == naive.unit else "",
            )
            for row in self.rows.values()
        ]
        bars = [
            (
                bar.what,
                f"≥ {bar.at_least:g}" if bar.at_least is not None else f"≤ {bar.at_most:g}",
                _number(bar.value(self.rows)),
                "met" if bar.is_met(self.rows) else "**MISSED**",
            )
            for bar in BARS
        ]
        return "\n\n".join(
            (
                _table(("", ""), list(self.circumstances.items()), "ll"),
                _table(("", "what", "median", "lowest – highest", "to (a)"), figures, "llrrr"),
                _table(("bar", "wanted", "reached", ""), bars, "lrrl"),
                "After every run each message had had its effect, once; the balances were right; every invariant held.",
            )
        )


def describe_machine(stand: Stand) -> dict[str, str]:
    """The date, the machine and the database."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "database": f"{stand.describe_database()}, on {_file_system(stand.embedded.data_dir)}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _file_system(folder: Path) -> str:
    mounted = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    longest = max(mounted, key=lambda part: len(part.mountpoint), default=None)
    return "an unknown file system" if longest is None else longest.fstype


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    rule = ["-" * (width - 1) + (":" if side == "r" else "-") for side, width in zip(alignment, widths, strict=True)]
    return "\n".join(f"| {' | '.join(map(_aligned, row, widths, alignment))} |" for row in (heading, rule, *rows))


def _aligned(cell: str, width: int, side: str) -> str:
    return cell.rjust(width) if side == "r" else cell.ljust(width)
