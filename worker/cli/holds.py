"""Open reservations and waiting messages: `holdfast holds`, `holdfast release` and `holdfast waiting`."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from holdfast_client.messages import OPERATOR, Cancel
from ledger import views
from ledger import waiting as ledger_waiting
from ledger.dead_letters import described
from ledger.readable import escaped, span
from ledger.wording import counted
from worker.cli.tables import Column, table
from worker.cli.terminal import (
    AsJson,
    By,
    Organization,
    WaitS,
    Why,
    console,
    fail,
    one_line,
    open_client,
    open_ledger,
    print_json,
    say,
    this_person,
)

MAX_LISTED = 1_000

app = typer.Typer()

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

_WAITING_COLUMNS = (
    Column("age", keeps_line=True),
    Column("org_id"),
    Column("messages", is_amount=True),
    Column("reason"),
)

_COLUMNS = (
    Column("age", keeps_line=True),
    Column("org_id"),
    Column("workflow_id"),
    Column("credits", is_amount=True),
    Column("expires_at", keeps_line=True),
    Column("project_id", needs_width=100),
    Column("activity_name", needs_width=120),
    Column("reserved_at", keeps_line=True, needs_width=140),
)


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{escaped(text)} is not a time such as 90s, 15m, 2h or 3d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


@app.command(epilog="Example: holdfast holds acme --older-than 2h")
def holds(
    org_id: Annotated[
        str | None, typer.Argument(metavar="ORG", help="Only this organization.", callback=one_line)
    ] = None,
    older_than: Annotated[
        timedelta | None,
        typer.Option("--older-than", metavar="AGE", parser=_duration, help="Only older ones: 90s, 15m, 2h, 3d."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LISTED, help="How many, at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List open reservations, oldest first. A workflow that never ended holds its credits until they expire."""
    with open_ledger() as engine, engine.connect() as connection:
        found = views.open_reservations(connection, org_id=org_id, older_than=older_than, limit=limit + 1)
    shown = found[:limit]
    if as_json:
        print_json({"items": [asdict(reservation) for reservation in shown], "has_more": len(found) > limit})
    elif shown:
        count = f"the oldest {limit}, of more" if len(found) > limit else str(len(shown))
        now = datetime.now(UTC)
        rows = [_row(asdict(reservation), now) for reservation in shown]
        console.print(table(f"Open reservations, oldest first: {count}", _COLUMNS, rows))
    else:
        say("No open reservations." if org_id is None and older_than is None else "No open reservation matches.")


@app.command(epilog='Example: holdfast release acme run-7 --why "the engine lost this run"')
def release(
    org_id: Organization,
    workflow_id: Annotated[str, typer.Argument(metavar="WORKFLOW", help="The workflow's id.", callback=one_line)],
    why: Why,
    by: By = this_person(),  # noqa: B008 # who started the program stays the same
    wait_s: WaitS = 10,
    as_json: AsJson = False,
) -> None:
    """Release the reservation of a workflow that never ended, by cancelling the workflow.

    The credit history shows the release, with the reason and your name. If the workflow finishes later, it is charged
    as usual.
    Exit code 1 if it holds no reservation.
    """
    with open_ledger() as engine, engine.connect() as connection:
        workflow = views.workflow(connection, org_id, workflow_id)
    if workflow is None:
        fail(f"{org_id} has no workflow {workflow_id}: no message has named it yet", code=1)
    if workflow.state != "reserved":
        fail(f"workflow {workflow_id} of {org_id} is {workflow.state}: it holds no reservation", code=1)
    with open_client() as client:
        who = {"source": OPERATOR, "metadata": {"by": by}}
        message = {"org_id": org_id, "workflow_id": workflow_id, "reason": why, **who}
        answer = client.send(Cancel.task, message, wait_s=wait_s if client.keeps_answers else None)
    if answer is not None and answer.outcome != "released":
        fail(f"workflow {workflow_id} of {org_id} ended meanwhile: {described(answer)}", code=1)
    if as_json:
        outcome, available = ("sent", None) if answer is None else (answer.outcome, answer.available)
        released = {"outcome": outcome, "credits": workflow.reserved_credits, "available": available}
        print_json({"org_id": org_id, "workflow_id": workflow_id, **released})
    elif answer is None:
        say(f"Asked to cancel {workflow_id} of {org_id}; this broker keeps no answers, so check `holdfast holds`.")
    else:
        held, verb = counted(workflow.reserved_credits or 0, "credit"), "is" if answer.available == 1 else "are"
        say(f"Released {held} of {org_id}; {answer.available:,} {verb} available.")


@app.command(epilog="Example: holdfast waiting")
def waiting(as_json: AsJson = False) -> None:
    """List the organizations whose messages wait, the longest wait first, and why.

    The messages are applied in order, as soon as possible. No other organization waits for them.
    """
    with open_ledger() as engine, engine.connect() as connection:
        found = ledger_waiting.counted(connection, ledger_waiting.organizations(connection))
    found.sort(key=lambda organization: organization.since)
    items = [{**asdict(organization), "org_id": organization.org_id or None} for organization in found]
    if as_json:
        print_json({"items": items})
    elif found:
        now = datetime.now(UTC)
        rows = [{**item, "age": span(now - item["since"])} for item in items]
        title = f"Organizations whose messages wait, the longest wait first: {len(found)}"
        console.print(table(title, _WAITING_COLUMNS, rows))
    else:
        say("No message waits for its organization.")


def _row(reservation: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    return {**reservation, "age": span(now - reservation["reserved_at"])}
