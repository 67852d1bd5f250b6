"""Between the commands and a person: what is typed, and what is printed, in tables that fit the terminal or as JSON.

Text from messages is data: nothing in it is taken for markup, and no control character of it reaches the terminal.
"""

import getpass
import json
import os
import socket
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine

from ledger import history
from ledger.database import connect
from ledger.settings import Settings
from worker.client import Client

# A pipe has no width of its own: there, lines are as long as they need to be.
console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)

LONGEST_WAIT_S = 3600


def one_line(value: str | None) -> str | None:
    """What is typed has to be something that can be printed, stored and sent. Raises typer.BadParameter."""
    if value is not None and (not value.strip() or escaped(value) != value):
        raise typer.BadParameter("must be one line of printable text")
    return value


def this_person() -> str:
    """Who gives the command, as the operating system knows them: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Organization = Annotated[str, typer.Argument(metavar="ORG", help="The organization's id.", callback=one_line)]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="Who you are.", callback=one_line)]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="The reason, in a sentence.", callback=one_line)]
WaitS = Annotated[
    float, typer.Option("--wait-s", min=0.1, max=LONGEST_WAIT_S, help="How many seconds to wait for an answer.")
]


def moment(text: str | None, option: str, *, ends_range: bool = False) -> datetime | None:
    """The date or time that was given as `option`. Raises typer.BadParameter."""
    if text is None:
        return None
    try:
        return history.moment(text, ends_range=ends_range)
    except ValueError as error:
        raise typer.BadParameter(f"{text} {str(error).replace('must be', 'is not', 1)}", param_hint=option) from None


@contextmanager
def open_ledger() -> Iterator[Engine]:
    """The database that the settings name. Raises SettingsError."""
    url = Settings.load("database_url").database_url
    assert url is not None
    engine = connect(url)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def open_client() -> Iterator[Client]:
    """A producer for the broker that the settings name. Raises SettingsError."""
    settings = Settings.load("broker_url")
    assert settings.broker_url is not None
    with Client(settings.broker_url, result_url=settings.result_url) as client:
        yield client


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; `name` is its heading, and the key of its value in a row."""

    name: str
    needs_width: int = 0
    """How many columns of characters the terminal needs for this one to be shown too."""
    is_amount: bool = False
    keeps_line: bool = False
    """Its values are never broken into lines."""


def table(title: str, columns: Sequence[Column], rows: Iterable[Mapping[Any, Any]]) -> Table:
    """A table of `rows`, without the columns for which the terminal is too narrow; it says which those are."""
    shown = [column for column in columns if console.width >= column.needs_width]
    drawn = Table(title=Text(escaped(title)), title_justify="left", box=box.SIMPLE_HEAD)
    if left_out := [column.name for column in columns if column not in shown]:
        drawn.caption = f"Not shown, as the terminal is narrow: {', '.join(left_out)}. Use --json to see everything."
        drawn.caption_justify = "left"
    for column in shown:
        drawn.add_column(
            column.name.replace("_", "\n") if column.is_amount else column.name,
            justify="right" if column.is_amount else "left",
            no_wrap=column.is_amount or column.keeps_line,
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(_cell(row[column.name], is_amount=column.is_amount) for column in shown))
    return drawn


def properties(title: str, rows: Iterable[tuple[str, Any]], *, amounts: bool) -> Table:
    """A table of names and their values, which are `amounts` or texts."""
    drawn = Table(title=Text(escaped(title)), title_justify="left", show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(justify="right" if amounts else "left", overflow="fold")
    for name, value in rows:
        drawn.add_row(name, _cell(value, is_amount=amounts))
    return drawn


def _cell(value: Any, *, is_amount: bool) -> Text:
    match value:
        case None:
            return Text("")
        case int() if is_amount:
            return Text(f"{value:,}")
        case datetime():
            return Text(value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"))
        case dict():
            return Text(escaped(", ".join(f"{name}: {item}" for name, item in value.items())))
        case _:
            return Text(escaped(str(value)))


def escaped(text: str, *, keep: str = "") -> str:
    """`text` with every control character, except those of `keep`, written as an escape such as \\x1b."""
    return "".join(
        character.encode("unicode_escape").decode() if _is_control(character) and character not in keep else character
        for character in text
    )


def _is_control(character: str) -> bool:
    # Formats such as the right-to-left override and halves of surrogate pairs among them; and the two line separators.
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")


def as_json(value: object) -> str:
    """`value` as JSON for people and programs: indented, in which every control character is escaped."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=_json_value)
    except RecursionError:  # nested so deep that no one could read it indented either
        text = json.dumps(value, ensure_ascii=False, default=_json_value)
    return "".join(
        json.dumps(character)[1:-1] if _is_control(character) and character != "\n" else character for character in text
    )


def _json_value(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def print_json(value: object) -> None:
    """Print `value` as JSON."""
    print(as_json(value))


def say(line: str) -> None:
    """Print a sentence as it is, however long."""
    console.print(Text(escaped(line)), soft_wrap=True)


def warn(line: str) -> None:
    """Say on standard error what did not work."""
    print(f"holdfast: {escaped(line)}", file=sys.stderr)


def fail(line: str, *, code: int = 2) -> NoReturn:
    """Say why, and exit with `code`."""
    warn(line)
    raise SystemExit(code)
