"""`holdfast migrate` and `holdfast verify`: the schema, and the invariants of the ledger."""

from pathlib import Path
from typing import Annotated

import typer
from psycopg.errors import RaiseException
from rich.text import Text
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from ledger import audit, distribution, migrations, roles
from ledger.faults import describe
from ledger.readable import escaped
from worker.cli.terminal import AsJson, console, fail, open_ledger, print_json, say, warn

app = typer.Typer()


@app.command(epilog="Example: HOLDFAST_DATABASE_URL=postgresql+psycopg://… holdfast migrate")
def migrate(
    to: Annotated[
        str | None,
        typer.Option(metavar="REVISION", help="Go back to this older revision, for an older version of Holdfast."),
    ] = None,
    with_roles: Annotated[
        bool,
        typer.Option(
            "--roles",
            help=f"Also grant the roles {roles.WORKER} and {roles.READER} what workers and the API need, and no more.",
        ),
    ] = False,
) -> None:
    """Bring the schema of the database up to date, while workers run. Does nothing if it is up to date."""
    known = migrations.revisions()
    after = known[-1] if to is None else to
    if after not in known:
        raise typer.BadParameter(f"{escaped(after)} is not one of {', '.join(known)}", param_hint="--to")
    with open_ledger() as engine:
        if with_roles:
            with engine.connect() as connection:
                roles.refuse_unprepared(connection)  # before anything is changed
        before = migrations.current_revision(engine)
        takes_back = before in known and known.index(before) > known.index(after)
        try:
            (migrations.downgrade if takes_back else migrations.upgrade)(engine, after, say=say)
        except DBAPIError as error:
            if not isinstance(error.orig, RaiseException):  # raised by a migration that must not be taken back
                raise
            fail(describe(error))
        with engine.connect() as connection:
            places = distribution.described(connection)
        too_much = migrations.grant(engine, say=say) if with_roles else {}
    console.print(f"The database was at {after} already." if before == after else f"The database is at {after} now.")
    if places is not None:
        console.print(f"Its tables are distributed by organization: {places}.")
    if with_roles:
        console.print(f"{roles.WORKER} and {roles.READER} have the privileges that they need.")
    for role, excess in too_much.items():
        warn(f"warning: {role} has more privileges, which were not granted here: {excess}")


@app.command(epilog="Example: holdfast verify --json")
def verify(
    folder: Annotated[
        Path | None,
        typer.Option("--archive", metavar="FOLDER", help="Also check the archive there, and the events in it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every invariant of the ledger on the live database. Repairs nothing. Exit code 1 if one is broken.

    Keeps the result for monitoring. Warns if it cannot, and if the connection may do more to the tables than it needs.
    """
    with open_ledger() as engine:
        verdict = audit.verify(engine) if folder is None else _with_archive(engine, folder)
        try:
            audit.record(engine, verdict)
        except DBAPIError as error:  # such as on a replica
            warn(f"warning: the result is not kept for monitoring: {migrations.described(error, engine)}")
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
                "archived_events": verdict.archived,
                "open_dead_letters": verdict.open_dead_letters,
                "checks": [
                    {"name": finding.check.name, "rule": finding.check.rule, "offenders": finding.offenders}
                    for finding in verdict.findings
                ],
            }
        )
    else:
        print_verdict(verdict)
    raise typer.Exit(0 if verdict.is_clean else 1)


def _with_archive(engine: Engine, folder: Path) -> audit.Verdict:
    from ledger import archive  # needs the extra `archive`

    return archive.verify(engine, folder)


def print_verdict(verdict: audit.Verdict) -> None:
    """Print each check with its offenders, and how much was checked."""
    for finding in verdict.findings:
        mark = Text("✗ broken", style="bold red") if finding.offenders else Text("✓", style="green")
        console.print(mark, Text(finding.check.rule))
        for org_id, offender in finding.offenders:
            console.print(Text(f"    {org_id}: {offender}"))
    in_archive = f", in the archive: {verdict.archived:,}" if verdict.archived else ""
    looked_at = (
        f"wallets: {verdict.wallets:,}, events: {verdict.events:,}{in_archive}, "
        f"open dead letters: {verdict.open_dead_letters:,}"
    )
    if verdict.is_clean:
        console.print(f"[bold green]Verified:[/] every invariant holds ({looked_at}).")
    else:
        console.print(f"[bold red]Not clean:[/] see the offenders above ({looked_at}).")
