"""The input and output of commands: options, sentences and JSON.

Text from messages is data: it is never read as markup, and none of its control characters reaches the terminal.
"""

import getpass
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from sqlalchemy import Engine

from holdfast_client.client import Client
from holdfast_client.messages import MAX_REASON_LENGTH
from ledger import filters
from ledger.database import connect
from ledger.readable import escaped, escaped_json
from ledger.settings import Settings


class _Console(Console):
    """Never cuts off the end of a line: the terminal itself wraps one that is too long."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"crop": False, **options})


# A pipe has no width of its own.
console = _Console(width=None if sys.stdout.isatty() else 180, highlight=False)

LONGEST_WAIT_S = 3600


def one_line(value: str | None) -> str | None:
    """Return `value` if it is one line of printable text. Raises typer.BadParameter."""
    if value is not None and (not value.strip() or escaped(value) != value):
        raise typer.BadParameter("must be one line of printable text")
    return value


def reason(value: str) -> str:
    """Return `value` if it is one line of at most MAX_REASON_LENGTH characters. Raises typer.BadParameter."""
    one_line(value)
    if len(value) > MAX_REASON_LENGTH:
        raise typer.BadParameter(f"must not be longer than {MAX_REASON_LENGTH} characters")
    return value


def this_person() -> str:
    """The user who gives the command, as the operating system knows them: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Organization = Annotated[str, typer.Argument(metavar="ORG", help="The organization's id.", callback=one_line)]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="Your name, for the record.", callback=one_line)]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="The reason, in a sentence.", callback=reason)]
WaitS = Annotated[
    float, typer.Option("--wait-s", min=0.1, max=LONGEST_WAIT_S, help="How many seconds to wait for an answer.")
]


def when(text: str | None, option: str) -> filters.When | None:
    """The date or time that was given as `option`. Raises typer.BadParameter."""
    if text is None:
        return None
    try:
        return filters.when(text)
    except ValueError as error:
        problem = str(error).replace("must be", "is not", 1)
        raise typer.BadParameter(f"{escaped(text)} {problem}", param_hint=option) from None


def moment(text: str | None, option: str) -> datetime | None:
    """The moment that was given as `option`, or the first one of the day. Raises typer.BadParameter."""
    given = when(text, option)
    return None if given is None else given.begin


def time_range(first: str | None, last: str | None) -> tuple[datetime | None, datetime | None]:
    """The range that was given as --from and --to: its first moment, and the one before which it ends.

    Raises typer.BadParameter.
    """
    try:
        return filters.time_range(when(first, "--from"), when(last, "--to"))
    except ValueError:
        raise typer.BadParameter("must not be before --from", param_hint="--to") from None


@contextmanager
def open_ledger() -> Iterator[Engine]:
    """The database that the settings name. Raises SettingsError."""
    url = Settings.load("database_url").database_url
    assert url is not None
    engine = connect(url, checks_connections=True)  # a connection may be idle while a person or a worker answers
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


def confirm(question: str, *, nothing: str) -> None:
    """Ask for a yes. A no ends the command with exit code 1, and says that `nothing` was done."""
    if not sys.stdin.isatty():
        fail("cannot ask without a terminal: check with --dry-run, then give --yes")
    if not typer.confirm(question):
        fail(nothing, code=1)


def _json_value(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def print_json(value: object) -> None:
    """Print `value` as JSON for people and programs: indented, with every control character escaped."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=_json_value)
    except RecursionError:  # nested so deeply that nobody could read it indented either
        text = json.dumps(value, ensure_ascii=False, default=_json_value)
    print(escaped_json(text))


def say(line: str) -> None:
    """Print a sentence on one line, however long."""
    console.print(Text(escaped(line)), soft_wrap=True)


def warn(line: str) -> None:
    """Print an error or a warning to standard error."""
    print(f"holdfast: {escaped(line)}", file=sys.stderr)


def fail(line: str, *, code: int = 2) -> NoReturn:
    """Print an error to standard error, and exit with `code`."""
    warn(line)
    raise SystemExit(code)
