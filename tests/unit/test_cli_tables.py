"""The tables of the command line."""

from rich.console import Console

from worker.cli.tables import Column, table


def test_metadata_is_told_in_words_and_what_is_deep_in_json() -> None:
    metadata = {"reason": "settled", "paid_by": {"ending": 5, "prepaid": 75}, "ending": [{"credits": 5}]}
    console = Console(width=200, record=True, file=None)
    with console.capture() as shown:
        console.print(table("", [Column("metadata")], [{"metadata": metadata}]))
    assert 'reason: settled, paid_by: {"ending":5,"prepaid":75}, ending: [{"credits":5}]' in shown.get()
