"""Tables that fit the terminal: of rows, and of names with their values. No amount is ever cut.

Text from messages is data: it is never read as markup, and none of its control characters reaches the terminal.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from ledger.readable import escaped
from worker.cli.terminal import console

NARROWEST = 10
"""The fewest characters to which a column of text may shrink."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; `name` is its heading, and the key of its value in a row."""

    name: str
    needs_width: int = 0
    """The width of the terminal, in characters, from which on this column is shown; 0: always."""
    is_amount: bool = False
    is_change: bool = False
    """Of an amount: whether it is shown with its sign."""
    keeps_line: bool = False
    """Whether its values are wrapped only if there is no room, and only between words."""

    def widths(self, cells: Iterable[Text]) -> tuple[int, int]:
        """The least width, in characters, and the width that is enough. An amount is never cut."""
        shown = [Text(self.heading), *cells]
        enough = max(line.cell_len for cell in shown for line in cell.split())
        if self.is_amount or self.keeps_line:
            return max(cell_len(word) for cell in shown for word in cell.plain.split() or [""]), enough
        return min(enough, NARROWEST), enough

    @property
    def heading(self) -> str:
        """The name; for an amount on several lines, as its values are short."""
        return self.name.replace("_", "\n") if self.is_amount else self.name


def table(title: str, columns: Sequence[Column], rows: Iterable[Mapping[Any, Any]]) -> Table:
    """A table of `rows`. Leaves out, and names, the columns for which the terminal is too narrow.

    If the columns that are always shown need more room, the table is wider than the terminal: no amount is ever cut.
    """
    lines = [{column: _of(row, column) for column in columns} for row in rows]
    widths = {column: column.widths(line[column] for line in lines) for column in columns}
    shown = [column for column in columns if console.width >= column.needs_width]

    def room() -> int:
        """The width left if each column has its least width, with 3 characters between columns and 1 at both edges."""
        return console.width - sum(widths[column][0] + 3 for column in shown) + 1

    while room() < 0 and (optional := [column for column in shown if column.needs_width]):
        shown.remove(max(optional, key=lambda column: column.needs_width))
    given = _shared(max(0, room()), {column: widths[column] for column in shown})
    drawn = Table(
        title=Text(escaped(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        width=sum(width + 3 for width in given.values()) - 1,
    )
    if left_out := [column.name for column in columns if column not in shown]:
        drawn.caption = f"Not shown, as the terminal is narrow: {', '.join(left_out)}. Use --json to see everything."
        drawn.caption_justify = "left"
    for column in shown:
        drawn.add_column(
            column.heading, justify="right" if column.is_amount else "left", width=given[column], overflow="fold"
        )
    for line in lines:
        drawn.add_row(*(line[column] for column in shown))
    return drawn


def _shared(room: int, widths: Mapping[Column, tuple[int, int]]) -> dict[Column, int]:
    """The width of each column: its least width, and a part of `room`.

    Columns that keep their lines come first, and get the width that is enough if there is room. The others share the
    rest equally.
    """
    given = {column: least for column, (least, _) in widths.items()}
    missing = {column: enough - least for column, (least, enough) in widths.items()}
    for column in widths:
        if column.keeps_line and missing[column] <= room:
            given[column] += missing[column]
            room -= missing[column]
    texts = sorted((column for column in widths if not column.keeps_line), key=lambda column: missing[column])
    for place, column in enumerate(texts):
        share = min(missing[column], room // (len(texts) - place))
        given[column] += share
        room -= share
    return given


def properties(title: str, rows: Iterable[tuple[str, Any]], *, amounts: bool) -> Table:
    """A table of names and values; `amounts`: the values are amounts. Neither a name nor an amount is ever cut."""
    cells = [(name, _cell(value, is_amount=amounts), isinstance(value, int)) for name, value in rows]
    drawn = Table(title=Text(escaped(title)), title_justify="left", show_header=False)
    drawn.add_column(style="bold", min_width=max(len(name) for name, _, _ in cells), no_wrap=True)
    drawn.add_column(
        justify="right" if amounts else "left",
        min_width=max((value.cell_len for _, value, is_number in cells if is_number), default=None),
        overflow="fold",
    )
    for name, value, _ in cells:
        drawn.add_row(name, value)
    return drawn


def _of(row: Mapping[Any, Any], column: Column) -> Text:
    value = row[column.name]
    if column.is_change and value > 0:
        return Text(f"+{value:,}")
    return _cell(value, is_amount=column.is_amount)


def _cell(value: Any, *, is_amount: bool) -> Text:
    match value:
        case None:
            return Text("")
        case int() if is_amount:
            return Text(f"{value:,}")
        case datetime():
            return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"))
        case _:
            return Text(escaped(str(value)))
