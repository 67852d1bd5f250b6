"""`holdfast send`: one message, given as fields, or a file of messages."""

import io
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.client import Client, ClientError, DeadLetteredError
from holdfast_client.messages import MESSAGES, InvalidMessage, parse
from ledger.dead_letters import described
from ledger.message_lines import strict_json
from ledger.settings import Settings
from ledger.wording import counted
from worker.cli.terminal import LONGEST_WAIT_S, AsJson, fail, print_json, say, warn
from worker.cli.transfer import PIECE_BYTES, Transfer

WAIT_S = 10.0
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""

app = typer.Typer()


@app.command(epilog="Example: holdfast send wallet.grant org_id=acme grant_id=welcome credits=500 --wait")
def send(
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help=f"The message's task: {', '.join(MESSAGES)}.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Argument(metavar="FIELD=VALUE", help="Its fields, as credits=500 or metadata='{\"ticket\": 7}'."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help='Instead: a file with one message a line, as {"task": "wallet.grant", "org_id": …}; - is standard '
            "input. Valid messages are sent, even if others are not.",
        ),
    ] = None,
    from_line: Annotated[int, typer.Option(min=1, help="With --file: skip the lines before this one.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every message. Send nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answer, and show what the message did.")] = False,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0.1, max=LONGEST_WAIT_S, help="How many seconds --wait waits.")
    ] = WAIT_S,
    as_json: AsJson = False,
) -> None:
    """Send a message to the ledger, or a file of messages. A message that is sent again changes nothing.

    Sends to HOLDFAST_BROKER_URL; if only HOLDFAST_ENGINE_BROKER_URL is set, to the queue of engines.
    Exit code 1 if a line of the file is invalid, or if a message with --wait was rejected or could not be applied.
    """
    if not wait and wait_s != WAIT_S:
        raise typer.BadParameter("needs --wait", param_hint="--wait-s")
    if (task is None) == (file is None):
        raise typer.BadParameter("give either a task and its fields, or --file", param_hint="TASK")
    if file is not None:
        if wait:
            raise typer.BadParameter("only one message can be waited for, not a file", param_hint="--wait")
        _send_file(file, Transfer(None, dry_run, from_line), as_json=as_json)
        return
    assert task is not None
    if from_line > 1:
        raise typer.BadParameter("needs --file", param_hint="--from-line")
    message = message_of(task, fields or [])
    with _sender(is_needed=not dry_run) as client:
        if client is None or dry_run:
            if client is not None:
                client.refuse_invalid(task, message)
            _tell("valid", "The message is valid. Nothing was sent.", as_json=as_json)
        elif wait:
            _send_and_wait(client, task, message, wait_s, as_json=as_json)
        else:
            client.send(task, message)
            _tell("sent", f"Sent to the queue {client.queue}.", as_json=as_json)


# One message


def message_of(task: str, given: list[str]) -> dict[str, Any]:
    """The message of `task` with the fields that are `given`, each as name=value. Exits if it is not valid."""
    message: dict[str, Any] = {}
    for one in given:
        name, separator, value = one.partition("=")
        if not separator:
            fail(f"{one!a} is not a field and its value, such as credits=500")
        if name in message:
            fail(f"{task}: {name} is given more than once")
        message[name] = _value(task, name, value)
    found = parse(task, message)
    if isinstance(found, InvalidMessage):
        fail(found.error)
    return message


def _value(task: str, name: str, value: str) -> Any:
    """`value` as the field takes it: a text as it is, anything else as JSON."""
    model = MESSAGES.get(task)
    schema = {} if model is None else model.model_json_schema()["properties"].get(name, {})
    kinds = {kind.get("type", "string") for kind in schema.get("anyOf", [schema])}
    if "string" in kinds:
        return value
    try:
        return strict_json(value.encode(errors="surrogateescape"))
    except ValueError as error:
        if "object" in kinds:
            fail(f"{task}: {name} must be a JSON object: {error}")
        return value  # the message's error says what it must be


def _send_and_wait(client: Client, task: str, message: dict[str, Any], wait_s: float, *, as_json: bool) -> None:
    if not client.keeps_answers:
        fail("this broker keeps no answers: set HOLDFAST_RESULT_URL, or leave out --wait")
    try:
        answer = client.send(task, message, wait_s=wait_s)
    except DeadLetteredError as error:
        fail(str(error), code=1)
    assert answer is not None
    if as_json:
        print_json({**answer._asdict(), "limit": answer.limit and answer.limit._asdict()})
    else:
        say(f"{described(answer)}; {answer.available:,} available")
    if answer.outcome == "rejected":
        raise typer.Exit(1)


def _tell(outcome: str, sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"outcome": outcome})
    else:
        say(sentence)


@contextmanager
def _sender(*, is_needed: bool) -> Iterator[Client | None]:
    """A producer for the broker that the settings name; None if they name none and none is needed."""
    settings = Settings.load()
    is_engine = settings.broker_url is None and settings.engine_broker_url is not None
    if is_needed and not is_engine:
        settings = Settings.load("broker_url")
    url = settings.engine_broker_url if is_engine else settings.broker_url
    if url is None:
        yield None
        return
    with Client(url, queue=ENGINE_QUEUE if is_engine else QUEUE, result_url=settings.result_url) as client:
        yield client


# A file of messages


def _send_file(path: Path, transfer: Transfer, *, as_json: bool) -> None:
    began_at = time.monotonic()
    code = 0
    try:
        with _opened(path) as file, _sender(is_needed=not transfer.dry_run) as client, _shown(transfer, file):
            transfer.client = client
            transfer.run(iter(lambda: file.read(PIECE_BYTES), b""))
    except KeyboardInterrupt:
        code = INTERRUPTED
        warn("interrupted")
    except ClientError as error:
        code = 2
        warn(str(error))
    except OSError as error:
        code = 2
        warn(f"cannot read {path}: {error.strerror}")
    took_s = time.monotonic() - began_at
    for number, problem in transfer.problems:
        warn(f"line {number}: {problem}")
    if transfer.invalid > len(transfer.problems):
        warn(f"… and {counted(transfer.invalid - len(transfer.problems), 'invalid line')} more")
    if as_json:
        print_json(_figures(transfer))
    else:
        say(_summary(transfer, took_s))
    if code and transfer.valid and not transfer.dry_run:
        warn(f"to go on, add --from-line {transfer.next_line}; sending everything again is safe, too")
    raise typer.Exit(code or (1 if transfer.invalid else 0))


def _figures(transfer: Transfer) -> dict[str, Any]:
    return {
        "valid": transfer.valid,
        "sent": 0 if transfer.dry_run else transfer.valid,
        "invalid": transfer.invalid,
        "next_line": transfer.next_line,
        "problems": [{"line": number, "error": problem} for number, problem in transfer.problems],
    }


def _summary(transfer: Transfer, took_s: float) -> str:
    invalid = f"; {transfer.invalid:,} invalid" if transfer.invalid else ""
    if transfer.dry_run or not transfer.valid:
        return f"Valid: {transfer.valid:,}{invalid}. Nothing was sent."
    return f"Sent: {transfer.valid:,}{invalid}. That took {took_s:.1f} s, {transfer.valid / took_s:,.0f} a second."


@contextmanager
def _opened(path: Path) -> Iterator[io.FileIO]:
    """The file without a buffer: a read returns what is there, and waits only if nothing is. Exits if there is none."""
    try:
        file = io.FileIO(0, closefd=False) if path == Path("-") else io.FileIO(path)
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    with file:
        yield file


@contextmanager
def _shown(transfer: Transfer, file: io.FileIO) -> Iterator[None]:
    """Show the progress of `transfer` on standard error while the block runs: a bar, if that is a terminal."""
    about = os.fstat(file.fileno())
    size = about.st_size if stat.S_ISREG(about.st_mode) else None
    terminal = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]:,.0f} a second"),
        TimeRemainingColumn(),
        console=terminal,
        disable=not terminal.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=size, rate=0)
    began_at = time.monotonic()
    has_waited = False

    def show() -> None:
        nonlocal has_waited
        if transfer.waiting and not has_waited:
            has_waited = True
            warn(f"{transfer.waiting:,} messages wait for a worker; sending goes on when it has taken some")
        verb = "Valid" if transfer.dry_run else "Sent"
        invalid = f", {transfer.invalid:,} invalid" if transfer.invalid else ""
        bar.update(
            task,
            completed=transfer.read_bytes,
            description=f"{verb}: {transfer.valid:,}{invalid}",
            rate=transfer.valid / (time.monotonic() - began_at),
        )

    transfer.progress = show
    with bar:
        yield
