"""`holdfast archive`: moves the events of past days into files."""

from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from worker.cli.terminal import fail, open_ledger, say, when

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
    from ledger import archive
    from ledger.archive_files import ArchiveError

    events = 0
    try:
        with open_ledger() as engine:
            for moved in archive.archive(engine, _day(before), folder):
                events += moved.events
                say(f"{moved.entry.file}: {moved.events:,} events left the database.")
    except ArchiveError as error:
        fail(str(error))
    say(
        f"{events:,} events of before {before} are in the archive now."
        if events
        else f"No day before {before} is closed."
    )


def _day(text: str) -> date:
    given = when(text, "--before")
    assert given is not None
    if given.begin == given.end:
        raise typer.BadParameter("must be a day such as 2026-01-31", param_hint="--before")
    return given.begin.date()
