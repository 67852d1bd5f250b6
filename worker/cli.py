"""The command line, `holdfast`.

Exit codes: 0 all is well; 1 the answer is no (an invariant is broken, an organization is unknown); 2 the command could
not be carried out (a wrong setting, a service that does not answer).
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from ledger import audit, history, migrations
from ledger.database import connect, describe
from ledger.history import EventFilter, Page, WalletView
from ledger.settings import Settings, SettingsError
from ledger.state import EventType, Result
from worker import demo as story
from worker.client import Client, DeadLetteredError, NoAnswerError, NotSentError
from worker.embedded import default_data_dir
from worker.process import ServiceError
from worker.system import System

app = typer.Typer(
    help="A credit ledger: what workflows reserve and use, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# A pipe has no width of its own: there, lines are as long as they need to be.
console = Console(width=None if sys.stdout.isatty() else 180)

NEEDED_WIDTH = {"project_id": 90, "activity_name": 110, "source": 130, "metadata": 160}
"""How many columns a terminal needs for these to be shown too."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Organization = Annotated[str, typer.Argument(metavar="ORG", help="The organization's id.")]


def main() -> None:
    """Run the command line; every error is one line and an exit code."""
    try:
        app()
    except (SettingsError, ServiceError, NotSentError, NoAnswerError, DeadLetteredError) as error:
        _fail(str(error))
    except DBAPIError as error:
        _fail(f"the database does not answer as it should: {describe(error)}")


@app.command(epilog="Example: HOLDFAST_DATABASE_URL=postgresql+psycopg://… holdfast migrate")
def migrate() -> None:
    """Bring the database's schema up to date. Does nothing if it is."""
    with _engine() as engine:
        before = migrations.current_revision(engine)
        migrations.upgrade(engine)
    after = migrations.head_revision()
    console.print(f"The database was at {after} already." if before == after else f"The database is at {after} now.")


@app.command(epilog="Example: holdfast up --data-dir /srv/holdfast")
def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything is kept. Default: HOLDFAST_DATA_DIR, or .holdfast in the current folder."),
    ] = None,
) -> None:
    """Start PostgreSQL, a broker, the worker and the beat, until Ctrl-C. Needs nothing installed."""
    folder = data_dir or Settings.load().data_dir or default_data_dir(Path.cwd())
    _stop_on_signals()
    try:
        with System(folder, progress=_progress) as system:
            console.print(
                "[bold green]Holdfast is ready.[/] Ctrl-C stops it.\n\n"
                "In another terminal, for `holdfast wallet`, `history` and `verify`, and for engines:\n"
                f'  export HOLDFAST_DATABASE_URL="{system.embedded.database_url}"\n'
                f'  export HOLDFAST_BROKER_URL="{system.embedded.broker_url}"\n\n'
                f"Data and logs are in {system.embedded.data_dir}",
                highlight=False,
                soft_wrap=True,
            )
            try:
                system.supervise()
            finally:
                _progress("Stopping everything …")
    except KeyboardInterrupt:
        console.print("Everything is stopped.")


@app.command(epilog="Example: holdfast demo")
def demo() -> None:
    """Start everything in a temporary folder, send a story through it, show what became of it, and stop."""
    _stop_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as an account that has to pass through
    try:
        with System(folder, progress=_progress) as system, Client(system.embedded.broker_url) as client:
            console.print("\n[bold]What is sent through the broker, and what comes of it[/]")
            for words, answer in story.tell(client):
                console.print(_told(words, answer), highlight=False)
            engine = connect(system.embedded.database_url)
            with engine.connect() as connection:
                wallet = history.wallet(connection, story.ORGANIZATION)
                page = history.events(connection, story.ORGANIZATION)
            assert wallet is not None
            console.print(_wallet_table(wallet), _history_table(page, story.ORGANIZATION))
            verdict = audit.verify(engine)
            engine.dispose()
            _print_verdict(verdict)
            _progress("Stopping everything …")
    except KeyboardInterrupt:
        _fail("interrupted; everything is stopped")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(0 if verdict.is_clean else 1)


@app.command(epilog="Example: holdfast verify --json")
def verify(as_json: AsJson = False) -> None:
    """Check every invariant of the ledger on the live database. Repairs nothing. Exit code 1 if one is broken."""
    with _engine() as engine:
        verdict = audit.verify(engine)
    if as_json:
        _print_json(
            {
                "clean": verdict.is_clean,
                "wallets": verdict.wallets,
                "events": verdict.events,
                "open_dead_letters": verdict.open_dead_letters,
                "checks": [
                    {"name": finding.check.name, "rule": finding.check.rule, "offenders": finding.offenders}
                    for finding in verdict.findings
                ],
            }
        )
    else:
        _print_verdict(verdict)
    raise typer.Exit(0 if verdict.is_clean else 1)


@app.command(epilog="Example: holdfast wallet acme")
def wallet(org_id: Organization, as_json: AsJson = False) -> None:
    """Show an organization's balances. Exit code 1 if it has no wallet yet."""
    with _engine() as engine, engine.connect() as connection:
        view = history.wallet(connection, org_id)
    if view is None:
        _fail(f"{org_id} has no wallet: no message has named it yet", code=1)
    if as_json:
        _print_json(asdict(view))
    else:
        console.print(_wallet_table(view))


@app.command("history", epilog="Example: holdfast history acme --type usage --type refund --from 2026-01-01")
def show_history(
    org_id: Organization,
    created_from: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="First day, or first moment (ISO 8601, UTC).")
    ] = None,
    created_to: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="Last day, or the moment before which (ISO 8601, UTC).")
    ] = None,
    event_type: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help=f"Repeatable: {', '.join(get_args(EventType))}.")
    ] = None,
    project_id: Annotated[str | None, typer.Option("--project", metavar="ID", help="Only this project.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=history.MAX_PAGE, help="How many events.")] = history.MAX_PAGE,
    offset: Annotated[int, typer.Option(min=0, max=2**62, help="How many newer events to leave out.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show an organization's credit history, newest first."""
    for name in event_type or ():
        if name not in get_args(EventType):
            raise typer.BadParameter(f"{name} is none of {', '.join(get_args(EventType))}", param_hint="--type")
    matching = EventFilter(
        created_from=_moment(created_from, "--from"),
        created_before=_moment(created_to, "--to", end_of_day=True),
        event_types=event_type or (),  # type: ignore[arg-type] # checked above
        project_id=project_id,
    )
    with _engine() as engine, engine.connect() as connection:
        page = history.events(connection, org_id, matching, limit=limit, offset=offset)
    if as_json:
        items = [history.as_item(event) for event in page.events]
        _print_json({"items": items, "total": page.total, "limit": limit, "offset": offset})
    elif page.events:
        console.print(_history_table(page, org_id))
    else:
        console.print("No events.")


@contextmanager
def _engine() -> Iterator[Engine]:
    url = Settings.load("database_url").database_url
    assert url is not None
    engine = connect(url)
    try:
        yield engine
    finally:
        engine.dispose()


def _moment(text: str | None, option: str, *, end_of_day: bool = False) -> datetime | None:
    """A day is its first moment, or, as the end of a range, the first moment of the next day."""
    if text is None:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise typer.BadParameter(f"{text} is not a date or time such as 2026-01-31", param_hint=option) from None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return datetime.combine(day, time.min, UTC) + timedelta(days=1 if end_of_day else 0)


def _stop_on_signals() -> None:
    """Make SIGTERM and SIGHUP stop the children in order, as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


# What is printed


def _progress(line: str) -> None:
    console.print(line, style="dim", highlight=False)


def _fail(line: str, *, code: int = 2) -> NoReturn:
    print(f"holdfast: {line}", file=sys.stderr)
    raise SystemExit(code)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _told(words: str, answer: Result) -> str:
    outcome = answer.outcome if answer.reason is None else f"{answer.outcome} ({answer.reason})"
    repeated = ", a duplicate: nothing changes" if answer.duplicate else ""
    return f"  {words:<52} → {outcome}{repeated}; {answer.available:,} available"


def _wallet_table(view: WalletView) -> Table:
    table = Table(title=f"Wallet of {view.org_id}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows: list[tuple[str, object]] = [
        ("available", view.available),
        ("prepaid", view.prepaid_balance),
        ("subscription left", view.subscription_balance),
        ("reserved", view.reserved_credits),
        ("used this period", view.used_this_period),
        ("included this period", view.included_this_period),
        ("plan", view.plan or "none"),
        ("period ends", _shown_time(view.current_period_end)),
        ("credit limit", view.credit_limit),
        ("period cap", "none" if view.period_cap is None else view.period_cap),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    return table


def _history_table(page: Page, org_id: str) -> Table:
    shown = f"{len(page.events)} of {page.total} events" if len(page.events) < page.total else f"{page.total} events"
    table = Table(title=f"Credit history of {org_id}, newest first: {shown}", title_justify="left", box=box.SIMPLE_HEAD)
    names = [name for name in history.CUSTOMER_COLUMNS if console.width >= NEEDED_WIDTH.get(name, 0)]
    if left_out := [name for name in history.CUSTOMER_COLUMNS if name not in names]:
        table.caption = f"Not shown, as the terminal is narrow: {', '.join(left_out)}. Use --json to see everything."
        table.caption_justify = "left"
    for name in names:
        is_amount = name in ("credits", "prepaid_balance_after", "period_usage_after")
        table.add_column(
            name.replace("_", "\n") if is_amount else name,
            justify="right" if is_amount else "left",
            no_wrap=is_amount or name in ("created_at", "event_type"),
            overflow="fold",
        )
    for event in page.events:
        table.add_row(*(_cell(event[name]) for name in names))
    return table


def _cell(value: Any) -> Text:
    # As Text, so that nothing in it is taken for markup.
    match value:
        case None:
            return Text("")
        case int():
            return Text(f"{value:,}")
        case datetime():
            return Text(_shown_time(value))
        case dict():
            return Text(", ".join(f"{name}: {item}" for name, item in value.items()))
        case _:
            return Text(str(value))


def _shown_time(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _print_verdict(verdict: audit.Verdict) -> None:
    for finding in verdict.findings:
        mark = Text("✗ broken", style="bold red") if finding.offenders else Text("✓", style="green")
        console.print(mark, Text(finding.check.rule))
        for org_id, offender in finding.offenders:
            console.print(Text(f"    {org_id}: {offender}"))
    looked_at = (
        f"{verdict.wallets:,} wallets, {verdict.events:,} events, {verdict.open_dead_letters:,} open dead letters"
    )
    if verdict.is_clean:
        console.print(f"[bold green]Verified:[/] every invariant holds ({looked_at}).", highlight=False)
    else:
        console.print(f"[bold red]Not clean:[/] see the offenders above ({looked_at}).", highlight=False)
