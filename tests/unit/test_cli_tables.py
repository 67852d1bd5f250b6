"""The tables of the command line."""

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


def test_metadata_is_told_in_words_and_what_is_deep_in_json() -> None:
    metadata = {"reason": "settled", "paid_by": {"ending": 5, "prepaid": 75}, "ending": [{"credits": 5}]}
    shown = printed(table("", [Column("metadata")], [{"metadata": metadata}]))
    assert 'reason: settled, paid_by: {"ending":5,"prepaid":75}, ending: [{"credits":5}]' in shown


def test_a_wallet_tells_the_next_ends_and_that_there_are_more() -> None:
    past, later = datetime.now(UTC) - timedelta(days=1), datetime(2999, 1, 31, tzinfo=UTC)
    ending = (Ending(7, past, "grant:g0"), *(Ending(5, later, f"grant:g{n}") for n in range(1, 5)))
    held = printed(wallet_table(WalletView("acme", reserved_credits=7, ending=ending)))
    assert "kept past their end" in held
    assert held.count("ends 2999-01-31") == 2
    assert "2 more" in held
    assert "ends now" in printed(wallet_table(WalletView("acme", ending=ending[:1])))
