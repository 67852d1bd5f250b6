"""`holdfast failed …`: operators list, replay and discard dead letters. None is deleted; each records who did what."""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, get_args

import typer
from sqlalchemy import Connection, Engine

from holdfast_client.results import ErrorCode
from ledger import bodies, dead_letters, traces
from ledger.causes import CODES
from ledger.dead_letters import (
    MAX_ERROR_LENGTH,
    Groups,
    KeptLetter,
    LetterFilter,
    ListedLetter,
    NotOpenError,
    NotReplayableError,
    StillFailsError,
    UnknownLetterError,
)
from ledger.readable import beginning, escaped, shortened
from ledger.waiting import NOBODY
from worker.cli.tables import Column, properties, table
from worker.cli.terminal import (
    AsJson,
    By,
    WaitS,
    Why,
    confirm,
    console,
    fail,
    moment,
    one_line,
    open_client,
    open_ledger,
    print_json,
    say,
    this_person,
    warn,
)
from worker.cli.wording import did_you_mean
from worker.replaying import Replayer
from worker.tasks import TASKS

MAX_LISTED = 1_000
ERROR_LISTED = 300
"""The most characters of an error in the table of `list`."""
MESSAGE_SHOWN, TRACEBACK_SHOWN = 2_000, 20_000
"""The most characters that `show` prints; `--json` prints all."""

app = typer.Typer(
    name="failed",
    help="Dead letters: see, replay or discard messages that could not be applied.",
    epilog="Example: holdfast failed list",
    no_args_is_help=True,
)


class Status(StrEnum):
    """The status of a dead letter, as a filter."""

    OPEN = "open"
    REPLAYED = "replayed"
    DISCARDED = "discarded"
    ALL = "all"


LetterId = Annotated[int, typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="The dead letter's number.")]
Task = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="Only this task, as wallet.refund.", callback=one_line)
]
Org = Annotated[str | None, typer.Option("--org", metavar="ORG", help="Only this organization.", callback=one_line)]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="Only those that last failed at or after this (ISO 8601, UTC)."),
]

_CODES = "conflict, invalid_message, refund_exceeds_usage, …"


def _each_once(letter_ids: list[int] | None) -> list[int] | None:
    return letter_ids and list(dict.fromkeys(letter_ids))


def _known_code(code: str | None) -> str | None:
    """Return `code` if there is such an error. Raises typer.BadParameter."""
    if one_line(code) is not None and code not in get_args(ErrorCode):
        assert code is not None
        codes = ", ".join(get_args(ErrorCode))
        hint = did_you_mean(code, get_args(ErrorCode)) or f"; the codes are {codes}"
        raise typer.BadParameter(f"{escaped(code)} is no error of a dead letter{hint}")
    return code


# The error is what a person looks for; it begins with the task.
_COLUMNS = (
    Column("id", keeps_line=True),
    Column("last_failed_at", keeps_line=True, needs_width=60),
    Column("status", keeps_line=True, needs_width=120),
    Column("attempts", needs_width=120, is_amount=True),
    Column("org_id", keeps_line=True, needs_width=70),
    Column("task", needs_width=110),
    Column("error_code", needs_width=100),
    Column("error"),
)
_CAUSE_COLUMNS = (
    Column("count", is_amount=True),
    Column("org_id", keeps_line=True),
    Column("task", needs_width=70),
    Column("error_code", needs_width=110),
    Column("cause"),
    Column("first_failed_at", keeps_line=True, needs_width=90),
    Column("last_failed_at", keeps_line=True, needs_width=120),
)
NARROW = 100
"""A terminal of fewer characters gets times without seconds, and only the beginning of ids."""
SHORT_ID = 16


@app.command("list", epilog="Example: holdfast failed list --error conflict --since 2026-01-31")
def list_letters(
    code: Annotated[
        str | None, typer.Option("--error", metavar="CODE", help=f"Only this error: {_CODES}", callback=_known_code)
    ] = None,
    task: Task = None,
    org_id: Org = None,
    since: Since = None,
    status: Annotated[Status, typer.Option(help="Only this status.")] = Status.OPEN,
    by_cause: Annotated[
        bool, typer.Option("--by-cause", help="One line for each cause of an organization, the most letters first.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LISTED, help="How many, at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first: the open ones, unless --status says otherwise. `show` has the messages."""
    matching = LetterFilter(None if status is Status.ALL else status, code, task, org_id, moment(since, "--since"))
    with open_ledger() as engine, engine.connect() as connection:
        _refuse_unknown_task(connection, task)
        if by_cause:
            _print_groups(dead_letters.groups(connection, matching, limit=limit), status, as_json=as_json)
            return
        found = dead_letters.letters(connection, matching, limit=limit + 1)
        is_told = org_id is not None and not as_json
        nameless = _without_organization(connection, matching) if is_told else 0
    shown = found[:limit]
    if as_json:
        print_json({"items": [_fields(letter) for letter in shown], "has_more": len(found) > limit})
    elif shown:
        count = f"the newest {limit}, of more" if len(found) > limit else str(len(shown))
        rows = [_narrowed(asdict(letter) | {"error": beginning(letter.error, ERROR_LISTED)}) for letter in shown]
        console.print(table(f"{_which(status)}, newest first: {count}", _COLUMNS, rows))
    else:
        say("No dead letters." if matching == LetterFilter(None) else "No dead letters match.")
    if nameless:
        say(f"Also {_counted(nameless)} without an organization: list {_them(nameless)} without --org.")


def _print_groups(found: Groups, status: Status, *, as_json: bool) -> None:
    has_more = found.total > len(found.listed)
    if as_json:
        print_json({"items": [asdict(group) for group in found.listed], "has_more": has_more})
    elif found.listed:
        count = f"the largest {len(found.listed)} of {found.total:,}" if has_more else f"{found.total:,}"
        organizations = "1 organization" if found.organizations == 1 else f"{found.organizations:,} organizations"
        letters = f"{_counted(found.letters)} of {organizations}"
        rows = [_narrowed(asdict(group) | {"cause": group.cause or group.error_code}) for group in found.listed]
        console.print(table(f"{_which(status)} by cause: {count}, {letters}", _CAUSE_COLUMNS, rows))
    else:
        say("No dead letters match.")


def _which(status: Status) -> str:
    return "Dead letters" if status is Status.ALL else f"{status.capitalize()} dead letters"


def _narrowed(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a narrow terminal shows it, so that there is room for the error."""
    if console.width >= NARROW:
        return row
    times = {
        name: f"{value.astimezone(UTC):%Y-%m-%d %H:%M}" for name, value in row.items() if name.endswith("_failed_at")
    }
    return row | times | {"org_id": row["org_id"] and beginning(row["org_id"], SHORT_ID)}


@app.command(epilog="Example: holdfast failed show 7")
def show(letter_id: LetterId, as_json: AsJson = False) -> None:
    """Show everything about one dead letter. Exit code 1 if there is none with this number."""
    with open_ledger() as engine, engine.connect() as connection:
        try:
            letter = dead_letters.letter(connection, letter_id)
        except UnknownLetterError as error:
            fail(str(error), code=1)
    if as_json:
        print_json(_item(letter))
        return
    names = [name for name in asdict(letter) if name not in ("id", "body", "traceback", "cause", "traceparent")]
    values = asdict(letter) | {"error": beginning(letter.error, MAX_ERROR_LENGTH)}
    values["trace_id"] = traces.trace_id(letter.traceparent)
    rows = [(name, values[name]) for name in (*names, "trace_id") if values[name] is not None]
    if letter.status == "open" and letter.error_code in CODES:
        rows.append(("what_to_do", CODES[letter.error_code].cure))
    console.print(properties(f"Dead letter {letter.id}", rows, amounts=False))
    _show_text("Message", dead_letters.readable(letter.body, MESSAGE_SHOWN, _REST))
    if letter.traceback is not None:
        _show_text("Traceback", escaped(shortened(letter.traceback, TRACEBACK_SHOWN, _REST), keep="\n"))


@app.command(epilog="Example: holdfast failed replay --all --error refund_exceeds_usage --dry-run")
def replay(
    letter_ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="The dead letters' numbers.", callback=_each_once),
    ] = None,
    all_matching: Annotated[bool, typer.Option("--all", help="Every open dead letter that matches.")] = False,
    code: Annotated[
        str | None,
        typer.Option("--error", metavar="CODE", help=f"With --all, only this error: {_CODES}", callback=_known_code),
    ] = None,
    task: Task = None,
    org_id: Org = None,
    since: Since = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent. Send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --all, replay without asking.")] = False,
    by: By = this_person(),  # noqa: B008 # who started the program stays the same
    wait_s: WaitS = 10,
    as_json: AsJson = False,
) -> None:
    """Send messages again, unchanged, once the cause of their failure is fixed.

    They keep their ids, so nothing is applied twice. Exit code 1 if a message failed again: it stays a dead letter.
    """
    matching = LetterFilter("open", code, task, org_id, moment(since, "--since"))
    if not letter_ids and not all_matching and matching != LetterFilter("open"):
        raise typer.BadParameter(
            "is missing: without it, --error, --task, --org and --since choose nothing. With --all --dry-run you see"
            " which dead letters would be replayed",
            param_hint="--all",
        )
    if bool(letter_ids) == all_matching:
        raise typer.BadParameter("give either dead letters or --all", param_hint="ID")
    if letter_ids and matching != LetterFilter("open"):
        raise typer.BadParameter("--error, --task, --org and --since need --all", param_hint="ID")
    tell = (lambda _line: None) if as_json else say
    done: list[Done] = []
    with open_ledger() as engine, _printed(done, as_json=as_json):
        with engine.connect() as connection:
            _refuse_unknown_task(connection, task)
        chosen = letter_ids or _all_matching(engine, matching, tell)
        if not chosen:
            tell("No open dead letter matches.")
            return
        if dry_run:
            done += [_would_replay(engine, letter_id) for letter_id in chosen]
            tell(f"Would replay {_counted(_well(done))}. Nothing was sent.")
        else:
            if all_matching and not yes:
                confirm(f"Replay {_counted(len(chosen))}?", nothing="nothing was sent")
            with open_client() as client:
                replayer = Replayer(engine, client, by=by, wait_s=wait_s)
                for letter_id in chosen:
                    done.append(_replay_one(engine, letter_id, replayer))
                    if done[-1].error is None:
                        tell(f"Dead letter {letter_id}: {done[-1].outcome}.")
            if len(chosen) > 1:
                tell(f"{_well(done):,} of {_counted(len(chosen))} replayed.")
    raise typer.Exit(0 if _well(done) == len(chosen) else 1)


@app.command(epilog='Example: holdfast failed discard 7 8 --why "sent twice by mistake, see ticket 42"')
def discard(
    letter_ids: Annotated[
        list[int],
        typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="The dead letters' numbers.", callback=_each_once),
    ],
    why: Why,
    by: By = this_person(),  # noqa: B008 # who started the program stays the same
    as_json: AsJson = False,
) -> None:
    """Discard open dead letters, and record why. They are kept, but cannot be replayed any more."""
    done: list[Done] = []
    with open_ledger() as engine, _printed(done, as_json=as_json):
        for letter_id in letter_ids:
            try:
                dead_letters.discard(engine, letter_id, by=by, why=why)
                done.append(Done(letter_id, "discarded"))
                if not as_json:
                    say(f"Dead letter {letter_id} is discarded.")
            except (UnknownLetterError, NotOpenError) as error:
                done.append(_refused(letter_id, str(error)))
    raise typer.Exit(0 if _well(done) == len(letter_ids) else 1)


def _without_organization(connection: Connection, matching: LetterFilter) -> int:
    found = dead_letters.counts(connection, replace(matching, org_id=NOBODY))
    return sum(count for status, count in found.items() if matching.status in (None, status))


def _refuse_unknown_task(connection: Connection, task: str | None) -> None:
    """Raise typer.BadParameter if neither Holdfast nor any dead letter knows the task."""
    if task is None or task in TASKS or dead_letters.letters(connection, LetterFilter(None, task=task), limit=1):
        return
    hint = did_you_mean(task, TASKS) or f"; the tasks are {', '.join(sorted(TASKS))}"
    raise typer.BadParameter(f"there is no task {escaped(task)}, nor a dead letter of it{hint}", param_hint="--task")


# Results, one for each dead letter


@dataclass(frozen=True, slots=True)
class Done:
    """The result for one dead letter: the outcome, or the error."""

    id: int
    outcome: str | None = None
    error: str | None = None


@contextmanager
def _printed(done: list[Done], *, as_json: bool) -> Iterator[None]:
    """With `as_json`, print the results at the end, also after an error."""
    try:
        yield
    finally:
        if as_json:
            print_json({"items": [asdict(one) for one in done]})


def _refused(letter_id: int, error: str) -> Done:
    warn(error)
    return Done(letter_id, error=error)


def _well(done: list[Done]) -> int:
    return sum(one.error is None for one in done)


# Replaying


def _replay_one(engine: Engine, letter_id: int, replayer: Replayer) -> Done:
    try:
        return Done(letter_id, replayer.replay(letter_id))
    except (UnknownLetterError, NotReplayableError) as error:
        return _refused(letter_id, str(error))
    except StillFailsError as error:
        with engine.connect() as connection:
            letter = dead_letters.letter(connection, letter_id)
        state = f"{letter.status}, attempts: {letter.attempts}"
        return _refused(letter_id, f"dead letter {letter_id} failed again and is {state}: {error}")


def _would_replay(engine: Engine, letter_id: int) -> Done:
    try:
        with engine.connect() as connection:
            dead_letters.sent_with(dead_letters.letter(connection, letter_id))
    except (UnknownLetterError, NotReplayableError) as error:
        return _refused(letter_id, str(error))
    return Done(letter_id, "would be replayed")


def _all_matching(engine: Engine, matching: LetterFilter, tell: Callable[[str], None]) -> list[int]:
    """The numbers of all that match, oldest first. Prints how many there are of each kind."""
    ids: list[int] = []
    kinds: Counter[tuple[str, str]] = Counter()
    with engine.connect() as connection:
        while page := dead_letters.letters(connection, matching, limit=MAX_LISTED, before_id=ids[-1] if ids else None):
            ids += [letter.id for letter in page]
            kinds.update((letter.error_code, letter.task) for letter in page)
    for (code, task), count in sorted(kinds.items()):
        tell(f"{count:>7,} × {code}, {task}")
    return ids[::-1]


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _counted(count: int) -> str:
    return "1 dead letter" if count == 1 else f"{count:,} dead letters"


# Showing


def _fields(letter: ListedLetter) -> dict[str, Any]:
    """A dead letter as JSON values, without its message and traceback, which may be large."""
    values = {name: value for name, value in asdict(letter).items() if name not in ("body", "traceback", "traceparent")}
    times = {name: value.isoformat() for name, value in values.items() if isinstance(value, datetime)}
    return {**values, **times}


def _item(letter: KeptLetter) -> dict[str, Any]:
    """A whole dead letter as JSON values: the message's arguments, if it has any, and its bytes in any case."""
    args, kwargs = bodies.arguments(letter.body) or (None, None)
    body = base64.b64encode(letter.body).decode()
    told = {**_fields(letter), "trace_id": traces.trace_id(letter.traceparent), "traceback": letter.traceback}
    return {**told, "args": args, "kwargs": kwargs, "body_base64": body}


_REST = "Use --json to see all that is kept."


def _show_text(title: str, text: str) -> None:
    console.print(f"[bold]{title}[/]")
    print(text)
