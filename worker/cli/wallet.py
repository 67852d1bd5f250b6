"""`holdfast wallet` and `holdfast history`: a customer's balances and credit history in a terminal."""

from datetime import UTC, datetime
from typing import Annotated, NoReturn, get_args

import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy import Connection, RowMapping

from ledger import archived, directory, filters, history, receipts, views
from ledger.archived import Archived
from ledger.database import snapshot
from ledger.filters import EventFilter
from ledger.history import Page
from ledger.outlook import outlook
from ledger.readable import escaped
from ledger.receipts import Place, Receipt
from ledger.state import EventType
from ledger.usage import rate
from ledger.views import Ending, WalletView
from ledger.wording import amount, facts, in_the_archive
from worker.cli.tables import Column, properties, table
from worker.cli.terminal import AsJson, Organization, console, fail, open_ledger, print_json, say, time_range

app = typer.Typer()


@app.command(epilog="Example: holdfast wallet acme")
def wallet(org_id: Organization, as_json: AsJson = False) -> None:
    """Show an organization's balances, how long they last and what comes next. Exit code 1 if it has no wallet yet."""
    with open_ledger() as engine, engine.connect() as connection:
        view = views.wallet(connection, org_id)
        if view is None:
            _fail_without_wallet(connection, org_id)
        now = datetime.now(UTC)
        speed = rate(connection, org_id, available=view.available, now=now)
    if as_json:
        print_json(views.as_item(view))
    else:
        found = outlook(view, speed, now)
        for sentence in (f"{amount(found.available)} available = {found.arithmetic}", *found.sentences):
            console.print(Text(escaped(sentence)))
        console.print(wallet_table(view))


def _fail_without_wallet(connection: Connection, org_id: str) -> NoReturn:
    similar = directory.similar(connection, org_id)
    hint = f"; similar: {', '.join(similar)}" if similar else ""
    fail(f"{org_id} has no wallet: no message has named it yet{hint}", code=1)


def _identifier(text: str | None) -> str | None:
    try:
        return None if text is None else filters.identifier(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _activities(names: list[str] | None) -> list[str]:
    try:
        return [filters.activity_name(name) for name in names or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("history", epilog="Example: holdfast history acme --type usage --type refund --from 2026-01-01")
def show_history(
    org_id: Organization,
    first: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="First day, or first moment (ISO 8601, UTC).")
    ] = None,
    last: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="Last day, or the moment before which to end (ISO 8601, UTC)."),
    ] = None,
    event_type: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help=f"Repeatable: {', '.join(get_args(EventType))}.")
    ] = None,
    project_id: Annotated[
        str | None, typer.Option("--project", metavar="ID", help="Only this project.", callback=_identifier)
    ] = None,
    activity_names: Annotated[
        list[str] | None,
        typer.Option("--activity", metavar="NAME", help="Repeatable: any of these activities.", callback=_activities),
    ] = None,
    workflow_id: Annotated[
        str | None,
        typer.Option("--workflow", metavar="ID", help="Only this workflow and its refunds.", callback=_identifier),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=history.MAX_PAGE, help="How many events.")] = history.MAX_PAGE,
    offset: Annotated[int, typer.Option(min=0, max=2**62, help="How many newer events to skip.")] = 0,
    by_run: Annotated[
        bool, typer.Option("--by-run", help="One line for each run, and one for what belongs to none.")
    ] = False,
    cursor: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --by-run: the next_cursor of the lines before.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show an organization's credit history, newest first. Without --json, exit code 1 if it has no wallet yet."""
    place, (created_from, created_before) = _place(cursor, offset, by_run=by_run), time_range(first, last)
    matching = EventFilter(
        created_from=created_from,
        created_before=created_before,
        event_types=_event_types(event_type or []),
        project_id=project_id,
        activity_names=tuple(activity_names or ()),
        workflow_id=workflow_id,
    )
    if by_run:
        with open_ledger() as engine, snapshot(engine) as connection:
            shown = receipts.page(connection, org_id, matching, limit=limit, place=place)
            if not (as_json or shown.receipts or views.wallet(connection, org_id)):
                _fail_without_wallet(connection, org_id)
        _show_receipts(shown, org_id, limit=limit, as_json=as_json)
        return
    with open_ledger() as engine, snapshot(engine) as connection:
        page = history.events(connection, org_id, matching, limit=limit, offset=offset)
        if not (as_json or page.events or views.wallet(connection, org_id)):
            _fail_without_wallet(connection, org_id)
    _show_events(page, org_id, limit=limit, offset=offset, as_json=as_json)


def _show_events(page: Page, org_id: str, *, limit: int, offset: int, as_json: bool) -> None:
    if as_json:
        items = [history.as_item(event) for event in page.events]
        totals = {"total": page.total, "credits": page.credits, "limit": limit, "offset": offset}
        print_json({"items": items, **totals, "archived": archived.as_item(page.archived)})
    else:
        console.print(history_table(page, org_id) if page.events else "No events.")
        if page.next_before_seq is None:
            _say_archived(page.archived)


def _say_archived(older: Archived | None) -> None:
    if older is not None:
        say(in_the_archive(older.events, older.through))


def _event_types(names: list[str]) -> tuple[EventType, ...]:
    for name in names:
        if name not in get_args(EventType):
            known = ", ".join(get_args(EventType))
            raise typer.BadParameter(f"{escaped(name)} is not one of {known}", param_hint="--type")
    return tuple(names)  # type: ignore[arg-type] # checked above


def _place(cursor: str | None, offset: int, *, by_run: bool) -> Place | None:
    """Where the lines of --by-run begin."""
    if by_run and offset:
        raise typer.BadParameter("cannot be combined with --by-run: use --cursor", param_hint="--offset")
    if cursor is not None and not by_run:
        raise typer.BadParameter("needs --by-run", param_hint="--cursor")
    try:
        return None if cursor is None else Place.of(cursor)
    except ValueError:
        raise typer.BadParameter(
            "must be the next_cursor of lines that --by-run shows", param_hint="--cursor"
        ) from None


def _show_receipts(page: receipts.Page, org_id: str, *, limit: int, as_json: bool) -> None:
    if as_json:
        next_cursor = None if page.next is None else str(page.next)
        items = [receipts.as_item(receipt) for receipt in page.receipts]
        older = archived.as_item(page.archived)
        print_json({"items": items, "limit": limit, "next_cursor": next_cursor, "archived": older})
        return
    console.print(receipts_table(page, org_id) if page.receipts else "No events.")
    if page.next is not None:
        console.print(f"Older: --cursor {page.next}")
    else:
        _say_archived(page.archived)


_RECEIPT_COLUMNS = (
    Column("changed_at", keeps_line=True),
    Column("what"),
    Column("state", needs_width=60),
    Column("project_id", needs_width=120),
    Column("activity_name", needs_width=110),
    Column("reserved_credits", needs_width=90, is_amount=True),
    Column("used_credits", needs_width=70, is_amount=True),
    Column("refunded_credits", needs_width=100, is_amount=True),
    Column("credits", is_amount=True),
)


def receipts_table(page: receipts.Page, org_id: str) -> Table:
    """A page of receipts, newest first."""
    lines = [
        {**receipts.as_item(each), "changed_at": each.changed_at, "what": each.workflow_id or _type_of(each)}
        for each in page.receipts
    ]
    return table(f"Credit history of {org_id} by run, newest first: {len(lines)}", _RECEIPT_COLUMNS, lines)


def _type_of(receipt: Receipt) -> str:
    assert receipt.event is not None
    return str(receipt.event["event_type"])


def wallet_table(view: WalletView) -> Table:
    """The balances of a wallet."""
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
            ("period ends" if view.plan_ends_at is None else "plan ends", view.current_period_end),
            *((f"plan from {part.starts_at:%Y-%m-%d}", part.plan) for part in [view.next_plan] if part is not None),
            *(("prepaid that ends", view.prepaid_ending) for _ in range(view.prepaid_ending > 0)),
            *((_end_of(part, view), part.credits) for part in view.ending[:3]),
            ("credit limit", view.credit_limit),
            ("period cap", "none" if view.period_cap is None else view.period_cap),
        ],
        amounts=True,
    )


def _end_of(part: Ending, view: WalletView) -> str:
    of = "of an earlier plan, " if part.is_from_subscription else ""
    if part.expires_at > datetime.now(UTC):
        return f"{of}ends {part.expires_at:%Y-%m-%d}"
    return f"{of}kept past their end" if view.reserved_credits >= part.credits else f"{of}ends now"


# Any other column is text, and is shown on a wide terminal only.
_COLUMNS = (
    Column("created_at", keeps_line=True),
    Column("event_type", keeps_line=True),
    Column("source", needs_width=140),
    Column("workflow_id", needs_width=60),
    Column("project_id", needs_width=90),
    Column("activity_name", needs_width=110),
    Column("credits", is_amount=True, is_change=True),
    Column("prepaid_balance_after", needs_width=65, is_amount=True),
    Column("period_usage_after", needs_width=75, is_amount=True),
)
_BY_NAME = {column.name: column for column in _COLUMNS}
_HISTORY_COLUMNS = [_BY_NAME.get(name, Column(name, needs_width=160)) for name in history.TABLE_COLUMNS]


def history_table(page: Page, org_id: str) -> Table:
    """A page of events, newest first."""
    shown = f"{len(page.events)} of {page.total}" if len(page.events) < page.total else str(page.total)
    rows = [{**event, "metadata": _in_words(event)} for event in page.events]
    return table(f"Credit history of {org_id}, newest first: {shown}", _HISTORY_COLUMNS, rows)


def _in_words(event: RowMapping) -> str:
    return " · ".join(map(str, facts(event["event_type"], event["metadata"], event["source"])))
