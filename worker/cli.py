"""The command line, `holdfast`.

Exit codes: 0 all is well; 1 the answer is no (an invariant is broken, an organization is unknown); 2 the command could
not be carried out (a wrong setting, a service that does not answer).
"""

import shutil
import signal
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer
from celery.utils.nodenames import default_nodename
from psycopg.errors import RaiseException
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError

from ledger import audit, history, migrations, roles
from ledger.database import UnsuitableDatabaseError, connect, describe
from ledger.dead_letters import described
from ledger.history import EventFilter, Page, WalletView
from ledger.readable import escaped
from ledger.settings import Settings, SettingsError
from ledger.state import EventType, Result
from worker import demo as story
from worker import failed_cli, holds_cli, publishing, token_cli
from worker.broker import create_celery, queues
from worker.client import Client, DeadLetteredError, InvalidMessageError, NoAnswerError, NotSentError
from worker.embedded import default_data_dir
from worker.process import ServiceError
from worker.system import System
from worker.terminal import (
    AsJson,
    Column,
    Organization,
    console,
    fail,
    open_ledger,
    print_json,
    properties,
    say,
    table,
    warn,
    when,
)

app = typer.Typer(
    help="A credit ledger: what workflows reserve and use, exactly once.",
    epilog="Example: holdfast demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; every error is one line and an exit code."""
    try:
        app()
    except (
        SettingsError,
        ServiceError,
        migrations.LockedError,
        migrations.NewerSchemaError,
        roles.NotGrantedError,
        NotSentError,
        NoAnswerError,
        DeadLetteredError,
        InvalidMessageError,
    ) as error:
        fail(str(error))
    except DBAPIError as error:
        if isinstance(error.orig, UnsuitableDatabaseError):
            fail(str(error.orig))
        fail(f"the database does not answer as it should: {describe(error)}")


@app.command(epilog="Example: HOLDFAST_DATABASE_URL=postgresql+psycopg://… holdfast migrate")
def migrate(
    to: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Take it back to this older revision, for an older version of Holdfast."),
    ] = None,
    with_roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help=f"Also give the roles {roles.WORKER} and {roles.READER} what workers and the API need, and no more.",
        ),
    ] = False,
) -> None:
    """Bring the database's schema up to date, while workers run. Does nothing if it is."""
    known = migrations.revisions()
    after = known[-1] if to is None else to
    if after not in known:
        raise typer.BadParameter(f"{escaped(after)} is none of {', '.join(known)}", param_hint="--to")
    with open_ledger() as engine:
        if with_roles:
            with engine.connect() as connection:
                roles.refuse_unprepared(connection)  # before anything is changed
        before = migrations.current_revision(engine)
        takes_back = before in known and known.index(before) > known.index(after)
        try:
            (migrations.downgrade if takes_back else migrations.upgrade)(engine, after, say=say)
        except DBAPIError as error:
            if not isinstance(error.orig, RaiseException):  # how a migration says that it must not be taken back
                raise
            fail(describe(error))
        too_much = migrations.grant(engine, say=say) if with_roles else {}
    console.print(f"The database was at {after} already." if before == after else f"The database is at {after} now.")
    if with_roles:
        console.print(f"{roles.WORKER} and {roles.READER} may do what they need.")
    for role, excess in too_much.items():
        warn(f"warning: {role} may do more, which was not granted here: {excess}")


@app.command(epilog="Example: holdfast up --data-dir /srv/holdfast")
def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything is kept. Default: HOLDFAST_DATA_DIR, or .holdfast in the current folder."),
    ] = None,
) -> None:
    """Start PostgreSQL, a broker, the worker, the beat and the API, until Ctrl-C. Needs nothing installed."""
    folder = data_dir or Settings.load().data_dir or default_data_dir(Path.cwd())
    _stop_on_signals()
    try:
        with System(folder, progress=_step) as system:
            console.print(
                "[bold green]Holdfast is ready.[/] Ctrl-C stops it.\n\n"
                f"The credit history of the demo organization, {story.ORGANIZATION}, in a browser:\n"
                f"  {story.sign_in_link(system)}\n\n"
                "In another terminal, for the other commands and for engines:\n"
                f'  export HOLDFAST_DATABASE_URL="{system.embedded.reader_url}"\n'
                f'  export HOLDFAST_BROKER_URL="{system.embedded.broker_url}"\n'
                f'  export HOLDFAST_ENGINE_BROKER_URL="{system.embedded.engine_broker_url}"\n'
                f'  export HOLDFAST_JWT_SECRET="{system.jwt_secret}"\n'
                f'  export API_URL="{system.url}"\n\n'
                f"Figures for Prometheus: {' and '.join(system.metrics_urls)}\n"
                f"Data and logs are in {system.embedded.data_dir}",
                soft_wrap=True,
            )
            try:
                system.supervise(until=_stop.is_set)
            finally:
                _progress("Stopping everything …")
    except KeyboardInterrupt:
        pass
    console.print("Everything is stopped.")


@app.command(epilog="Example: holdfast consuming celery@host-1")
def consuming(
    worker: Annotated[str, typer.Argument(help="Its name. Default: the worker of this host.")] = default_nodename(None),
    wait_s: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How long it may take to answer.")] = 10,
) -> None:
    """Ask a worker whether it takes messages from all queues of the ledger. Exit code 1 if not."""
    url = Settings.load("broker_url").broker_url
    assert url is not None
    try:
        with create_celery("holdfast-asks", url, None) as asking, asking.connection_for_write() as connection:
            publishing.connect(connection)
            about = {"destination": [worker], "reply": True, "timeout": wait_s, "limit": 1}
            replies = asking.control.broadcast("consuming", connection=connection, **about)
    except publishing.BROKER_ERRORS as error:
        fail(f"the broker does not answer: {error}", code=1)
    if not replies:
        fail(f"{worker} does not answer", code=1)
    missing = [queue.name for queue in queues(url) if queue.name not in replies[0][worker]]
    if missing:
        fail(f"{worker} answers, and takes nothing from {', '.join(missing)}", code=1)
    console.print(f"{worker} takes messages.")


@app.command(epilog="Example: holdfast demo")
def demo() -> None:
    """Start everything in a temporary folder, send a story through it, show what became of it, and stop."""
    _stop_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as an account that has to pass through
    try:
        with System(folder, progress=_step) as system, Client(system.embedded.broker_url) as client:
            console.print("\n[bold]What is sent through the broker, and what comes of it[/]")
            for words, answer in story.tell(client):
                if _stop.is_set():
                    raise KeyboardInterrupt
                console.print(_told(words, answer))
            engine = connect(system.embedded.reader_url)
            with engine.connect() as connection:
                wallet = history.wallet(connection, story.ORGANIZATION)
                page = history.events(connection, story.ORGANIZATION)
            assert wallet is not None
            console.print(_wallet_table(wallet), _history_table(page, story.ORGANIZATION))
            verdict = audit.verify(engine)
            engine.dispose()
            is_same = story.fetch_events(system) == [history.as_item(event) for event in page.events]
            console.print(f"Over HTTP it is {'the same' if is_same else 'NOT the same'}: {story.events_url(system)}\n")
            _print_verdict(verdict)
            _progress("Stopping everything …")
    except KeyboardInterrupt:
        fail("interrupted; everything is stopped")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(0 if verdict.is_clean and is_same else 1)


@app.command(epilog="Example: holdfast verify --json")
def verify(as_json: AsJson = False) -> None:
    """Check every invariant of the ledger on the live database. Repairs nothing. Exit code 1 if one is broken.

    Warns if the connection may do more to the tables than it needs.
    """
    with open_ledger() as engine:
        verdict = audit.verify(engine)
        with engine.connect() as connection:
            excess = roles.own_excess(connection)
    if excess is not None:
        warn(f"warning: {excess}")
    if as_json:
        print_json(
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
    with open_ledger() as engine, engine.connect() as connection:
        view = history.wallet(connection, org_id)
    if view is None:
        fail(f"{org_id} has no wallet: no message has named it yet", code=1)
    if as_json:
        print_json(asdict(view))
    else:
        console.print(_wallet_table(view))


def _project(text: str | None) -> str | None:
    try:
        return None if text is None else history.project(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("history", epilog="Example: holdfast history acme --type usage --type refund --from 2026-01-01")
def show_history(
    org_id: Organization,
    first: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="First day, or first moment (ISO 8601, UTC).")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="Last day, or the moment before which (ISO 8601, UTC).")
    ] = None,
    event_type: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help=f"Repeatable: {', '.join(get_args(EventType))}.")
    ] = None,
    project_id: Annotated[
        str | None, typer.Option("--project", metavar="ID", help="Only this project.", callback=_project)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=history.MAX_PAGE, help="How many events.")] = history.MAX_PAGE,
    offset: Annotated[int, typer.Option(min=0, max=2**62, help="How many newer events to leave out.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show an organization's credit history, newest first."""
    for name in event_type or ():
        if name not in get_args(EventType):
            known = ", ".join(get_args(EventType))
            raise typer.BadParameter(f"{escaped(name)} is none of {known}", param_hint="--type")
    try:
        created_from, created_before = history.time_range(when(first, "--from"), when(last, "--to"))
    except ValueError:
        raise typer.BadParameter("must not be before --from", param_hint="--to") from None
    matching = EventFilter(
        created_from=created_from,
        created_before=created_before,
        event_types=event_type or (),  # type: ignore[arg-type] # checked above
        project_id=project_id,
    )
    with open_ledger() as engine, engine.connect() as connection:
        page = history.events(connection, org_id, matching, limit=limit, offset=offset)
    if as_json:
        items = [history.as_item(event) for event in page.events]
        print_json({"items": items, "total": page.total, "limit": limit, "offset": offset})
    elif page.events:
        console.print(_history_table(page, org_id))
    else:
        console.print("No events.")


for operators in (failed_cli.app, holds_cli.app, token_cli.app):
    app.add_typer(operators)


_stop = threading.Event()


def _stop_on_signals() -> None:
    """Make SIGINT (Ctrl-C), SIGTERM and SIGHUP stop the children in order."""

    def interrupt(_number: int, _frame: object) -> None:
        # Python drops an exception that is raised where none can be handled, such as a weak reference's callback: so
        # whoever works in steps looks at the event too.
        _stop.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _step(line: str) -> None:
    """Say what is done next, unless it is time to stop."""
    if _stop.is_set():
        raise KeyboardInterrupt
    _progress(line)


# What is printed


def _progress(line: str) -> None:
    console.print(line, style="dim")


def _told(words: str, answer: Result) -> str:
    return f"  {words:<52} → {described(answer)}; {answer.available:,} available"


def _wallet_table(view: WalletView) -> Table:
    return properties(
        f"Wallet of {view.org_id}",
        [
            ("available", view.available),
            ("prepaid", view.prepaid_balance),
            ("subscription left", view.subscription_balance),
            ("reserved", view.reserved_credits),
            ("used this period", view.used_this_period),
            ("included this period", view.included_this_period),
            ("plan", view.plan or "none"),
            ("period ends", view.current_period_end),
            ("credit limit", view.credit_limit),
            ("period cap", "none" if view.period_cap is None else view.period_cap),
        ],
        amounts=True,
    )


_HISTORY_COLUMNS = (
    Column("created_at", keeps_line=True),
    Column("event_type", keeps_line=True),
    Column("source", needs_width=130),
    Column("project_id", needs_width=90),
    Column("activity_name", needs_width=110),
    Column("credits", is_amount=True),
    Column("prepaid_balance_after", needs_width=40, is_amount=True),
    Column("period_usage_after", needs_width=50, is_amount=True),
    Column("metadata", needs_width=160),
)


def _history_table(page: Page, org_id: str) -> Table:
    shown = f"{len(page.events)} of {page.total} events" if len(page.events) < page.total else f"{page.total} events"
    return table(f"Credit history of {org_id}, newest first: {shown}", _HISTORY_COLUMNS, page.events)


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
        console.print(f"[bold green]Verified:[/] every invariant holds ({looked_at}).")
    else:
        console.print(f"[bold red]Not clean:[/] see the offenders above ({looked_at}).")
