"""`holdfast totals`: sums over all organizations, for finance and for comparing with another system."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ledger.totals import Totals, read
from ledger.wording import counted
from worker.cli.tables import Column, properties, table
from worker.cli.terminal import AsJson, console, open_ledger, print_json, time_range

app = typer.Typer()

_COLUMNS = (
    Column("event_type", keeps_line=True),
    Column("reason", keeps_line=True),
    Column("events", is_amount=True),
    Column("credits", is_amount=True),
)


@app.command(epilog="Example: holdfast totals --from 2026-01-01 --to 2026-01-31")
def totals(
    first: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Events from this day or moment on (ISO 8601, UTC).")
    ] = None,
    last: Annotated[
        str | None,
        typer.Option("--to", metavar="TIME", help="Events to this day, or before this moment (ISO 8601, UTC)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the balances of all organizations together, as they are now, and their events by type.

    Without --from and --to these are all events ever, whose credits add up to what is available.
    """
    created_from, created_before = time_range(first, last)
    with open_ledger() as engine:
        found = read(engine, created_from=created_from, created_before=created_before)
    if as_json:
        print_json(asdict(found))
    else:
        _print(found)


def _print(found: Totals) -> None:
    console.print(
        properties(
            f"{'All ' * (found.wallets > 1)}{counted(found.wallets, 'wallet')}",
            [
                ("at", found.at),
                ("available", found.available),
                ("reserved", found.reserved_credits),
                ("balance", found.balance),
                ("prepaid", found.prepaid_balance),
                ("subscription left", found.subscription_balance),
            ],
            amounts=True,
        )
    )
    rows: list[dict[str, Any]] = [asdict(each) for each in found.events]
    every = {"events": sum(each.events for each in found.events), "credits": sum(each.credits for each in found.events)}
    rows.append({"event_type": "all", "reason": None, **every})
    begin = "" if found.created_from is None else f" from {found.created_from.isoformat()}"
    end = "" if found.created_before is None else f" to before {found.created_before.isoformat()}"
    console.print(table(f"Events{begin}{end}" if begin or end else "All events", _COLUMNS, rows))
