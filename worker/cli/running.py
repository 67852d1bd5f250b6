"""`holdfast up`, `holdfast demo` and `holdfast consuming`: start everything here, and check a worker."""

import shlex
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from celery.utils.nodenames import default_nodename

from holdfast_client import publishing
from holdfast_client.client import Client
from holdfast_client.results import Result
from ledger import audit, history, views
from ledger.database import connect
from ledger.dead_letters import described
from ledger.readable import escaped
from ledger.settings import Settings
from worker.broker import create_celery, queues
from worker.cli import story
from worker.cli.database import print_verdict
from worker.cli.terminal import console, fail
from worker.cli.wallet import history_table, wallet_table
from worker.local import weeks
from worker.local.embedded import default_data_dir
from worker.local.system import System

app = typer.Typer()


@app.command(epilog="Example: holdfast up --data-dir /srv/holdfast")
def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The data folder. Default: HOLDFAST_DATA_DIR, or .holdfast in the current folder."),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="New ports, passwords and secrets, instead of those of earlier starts. Keeps the data."
        ),
    ] = False,
    empty: Annotated[
        bool,
        typer.Option("--empty", help="A new ledger is empty, instead of beginning with three weeks of a customer."),
    ] = False,
) -> None:
    """Run PostgreSQL, a broker, the worker, the beat and the API, until Ctrl-C. Needs nothing else installed.

    Every start on a data folder has the same URLs, passwords and secrets. A ledger that has events stays as it is.
    """
    settings = Settings.load()
    folder = data_dir or settings.data_dir or default_data_dir(Path.cwd())
    _stop_on_signals()
    shown = {"product_name": settings.product_name, "buy_credits_url": settings.buy_credits_url}
    try:
        with System(folder, fresh=fresh, **shown, with_weeks=not empty, progress=_step) as system:
            console.print("[bold green]Holdfast is ready.[/] Ctrl-C stops it.")
            print(_how_to_reach(system), flush=True)
            try:
                system.supervise(until=_stop.is_set)
            finally:
                _progress("Stopping everything …")
    except KeyboardInterrupt:
        pass
    console.print("Everything is stopped.")


@app.command(epilog="Example: holdfast demo")
def demo() -> None:
    """Start everything in a temporary folder, send sample messages, show their results, and stop."""
    _stop_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="holdfast-demo-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as an account that has to pass through
    try:
        with System(folder, progress=_step) as system, Client(system.embedded.broker_url) as client:
            console.print("\n[bold]Messages sent through the broker, and their results[/]")
            for words, answer in story.tell(client):
                if _stop.is_set():
                    raise KeyboardInterrupt
                console.print(_told(words, answer))
            engine = connect(system.embedded.reader_url)
            with engine.connect() as connection:
                wallet = views.wallet(connection, story.ORGANIZATION)
                page = history.events(connection, story.ORGANIZATION)
            assert wallet is not None
            console.print(wallet_table(wallet), history_table(page, story.ORGANIZATION))
            verdict = audit.verify(engine)
            engine.dispose()
            is_same = story.fetch_events(system) == [history.as_item(event) for event in page.events]
            same = "the same" if is_same else "NOT the same"
            console.print(f"Over HTTP the history is {same}: {story.events_url(system)}\n")
            print_verdict(verdict)
            _progress("Stopping everything …")
    except KeyboardInterrupt:
        fail("interrupted; everything is stopped")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(0 if verdict.is_clean and is_same else 1)


@app.command(epilog="Example: holdfast consuming celery@host-1")
def consuming(
    worker: Annotated[
        str, typer.Argument(metavar="WORKER", help="Its name. Default: the worker of this host.")
    ] = default_nodename(None),
    wait_s: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How long to wait for its answer.")] = 10,
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
        fail(f"{worker} answers, but takes no messages from {', '.join(missing)}", code=1)
    console.print(f"{worker} takes messages.")


def _how_to_reach(system: System) -> str:
    settings = {
        "HOLDFAST_DATABASE_URL": system.embedded.reader_url,
        "HOLDFAST_BROKER_URL": system.embedded.broker_url,
        "HOLDFAST_ENGINE_BROKER_URL": system.embedded.engine_broker_url,
        "HOLDFAST_JWT_SECRET": system.jwt_secret,
        "API_URL": system.url,
        "WORKER_METRICS": urlsplit(system.metrics_urls[1]).netloc,
    }
    exports = [f'  export {name}="{value}"' for name, value in settings.items()]
    exports.append(f'  export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    lines = [
        "",
        *_what_to_see(system),
        "",
        "In another terminal, for the other commands and for engines:",
        *exports,
        "",
        f"Metrics for Prometheus: {' and '.join(system.metrics_urls)}",
        f"Data and logs are in {escaped(str(system.embedded.data_dir))}",
    ]
    return "\n".join(lines)


def _what_to_see(system: System) -> list[str]:
    engine = connect(system.embedded.reader_url)
    with engine.connect() as connection:
        has_weeks = views.wallet(connection, weeks.ORGANIZATION) is not None
    engine.dispose()
    if not has_weeks:
        link = story.sign_in_link(system, story.ORGANIZATION)
        return [f"The credit history of the demo organization, {story.ORGANIZATION}, in a browser:", f"  {link}"]
    return [
        f"Three weeks of a customer, {weeks.ORGANIZATION}, in a browser:",
        f"  {story.sign_in_link(system, weeks.ORGANIZATION)}",
        f"Another one, {weeks.OVERDRAWN}, owes credits, and its refunds came too early: see the page Dead letters.",
    ]


_stop = threading.Event()


def _stop_on_signals() -> None:
    """Make SIGINT (Ctrl-C), SIGTERM and SIGHUP stop the children in order."""

    def interrupt(_number: int, _frame: object) -> None:
        # Python drops an exception that is raised where none can be handled, such as in a weak reference's callback. So
        # work in steps checks the event, too.
        _stop.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)


def _step(line: str) -> None:
    """Print the next step, unless it is time to stop."""
    if _stop.is_set():
        raise KeyboardInterrupt
    _progress(line)


def _progress(line: str) -> None:
    console.print(line, style="dim")


def _told(words: str, answer: Result) -> str:
    return f"  {words:<52} → {described(answer)}; {answer.available:,} available"
