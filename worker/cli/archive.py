"""`holdfast archive` and `holdfast erase`: what leaves a ledger that has grown for years, or that has to forget."""

from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from ledger import erasing
from ledger.erasing import Erased
from worker.cli.terminal import By, Organization, Why, confirm, open_ledger, say, this_person, when

app = typer.Typer()


@app.command("archive", epilog="Example: holdfast archive --before 2026-01-01 --to /srv/archive")
def archive_events(
    before: Annotated[
        str, typer.Option("--before", metavar="DATE", help="Events of this UTC day and later ones stay.")
    ],
    folder: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", help="The folder of the archive; for a new one, an empty folder.")
    ],
) -> None:
    """Move the closed events of past days out of the database, into Parquet files. Balances and usage stay exact.

    Needs the owner of the tables, and the extra `archive`. Killed at any time, it goes on when it is run again.
    """
    from ledger import archive  # needs the extra `archive`

    events = 0
    with open_ledger() as engine:
        for moved in archive.archive(engine, _day(before), folder):
            events += moved.events
            say(f"{moved.entry.file}: {_counted(moved.events)} left the database.")
    say(f"{_counted(events)} of before {before} left in all." if events else f"No day before {before} is closed.")


def _counted(events: int) -> str:
    return "1 event" if events == 1 else f"{events:,} events"


def _day(text: str) -> date:
    given = when(text, "--before")
    assert given is not None
    if given.begin == given.end:
        raise typer.BadParameter("must be a day such as 2026-01-31", param_hint="--before")
    return given.begin.date()


@app.command(epilog='Example: holdfast erase acme --why "asked for by letter of 3 March"')
def erase(
    org_id: Organization,
    why: Why,
    by: By = this_person(),  # noqa: B008 # who started the program stays the same
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be erased. Erase nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase the free text of an organization: names of activities, metadata of senders, and reasons. Sums stay.

    Needs the owner of the tables. It cannot be taken back. Archived events keep their text: the last line names them.
    """
    with open_ledger() as engine:
        if dry_run or not yes:
            found = erasing.erase(engine, org_id, by=by, why=why, dry_run=True)
            say(f"To be erased: {_told(found)}.")
        if dry_run:
            return
        if not yes:
            confirm(f"Erase the free text of {org_id}? This cannot be taken back.", nothing="nothing was erased")
        found = erasing.erase(engine, org_id, by=by, why=why)
    say(f"Erased: {_told(found)}.")
    if found.archived_days is not None:
        first, last = found.archived_days
        which = "event, which is" if found.archived_events == 1 else f"{found.archived_events:,} events, which are"
        say(f"Not erased: its first {which} in the archive: in files of {first} to {last}. Nor are backups.")


def _told(found: Erased) -> str:
    counted = {
        "event": found.events,
        "run": found.workflows,
        "message": found.messages,
        "closed dead letter": found.dead_letters,
    }
    return "the text of " + ", ".join(f"{number:,} {name}{'s' * (number != 1)}" for name, number in counted.items())
