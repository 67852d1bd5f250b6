"""The tables of the command line."""

import re
from datetime import UTC, datetime, timedelta

from rich.console import Console
from rich.table import Table

from ledger.views import Ending, WalletView
from worker.cli.tables import Column, table
from worker.cli.wallet import wallet_table


def printed(shown: Table) -> str:
    console = Console(width=200, record=True, file=None)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_a_change_is_shown_with_its_sign_and_a_balance_as_it_is() -> None:
    columns = [Column("credits", is_amount=True, is_change=True), Column("balance", is_amount=True)]
    lines = printed(table("", columns, [{"credits": change, "balance": 1_234} for change in (1_200, 0, -5)]))
    assert re.findall(r"^ *(\S+) +1,234", lines, re.MULTILINE) == ["+1,200", "0", "-5"]


def test_a_wallet_tells_the_next_ends_and_how_much_ends_in_all() -> None:
    past, later = datetime.now(UTC) - timedelta(days=1), datetime(2999, 1, 31, tzinfo=UTC)
    ending = (Ending(7, past, "grant:g0"), Ending(3, later, "subscription:s1:0"), *[Ending(5, later, "grant:g1")] * 3)
    held = printed(wallet_table(WalletView("acme", reserved_credits=7, ending=ending, prepaid_ending=1_234)))
    assert re.findall(r"│ (.*?) +│ +([\d,]+) │", held)[6:10] == [
        ("prepaid that ends", "1,234"),
        ("kept past their end", "7"),
        ("of an earlier plan, ends 2999-01-31", "3"),
        ("ends 2999-01-31", "5"),
    ]
    for fewer in (0, 6):  # a run keeps no more than it holds
        assert "ends now" in printed(wallet_table(WalletView("acme", reserved_credits=fewer, ending=ending[:1])))
