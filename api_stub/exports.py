"""The credit history as CSV (RFC 4180, UTF-8), piece by piece, so that its length costs no memory."""

import csv
import io
from collections.abc import Iterable, Iterator
from datetime import datetime

from sqlalchemy import RowMapping

from ledger.history import CUSTOMER_COLUMNS
from ledger.readable import as_json

COLUMNS = (*CUSTOMER_COLUMNS, "id", "workflow_id")
PIECE_CHARACTERS = 64 * 1024
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""A spreadsheet takes a text that begins like this for a formula."""


def pieces(events: Iterable[RowMapping]) -> Iterator[str]:
    """The lines of the file, some at a time."""
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(COLUMNS)
    for event in events:
        writer.writerow([cell(event["seq" if name == "id" else name]) for name in COLUMNS])
        if written.tell() >= PIECE_CHARACTERS:
            yield written.getvalue()
            written.seek(0)
            written.truncate()
    yield written.getvalue()


def cell(value: object) -> str | int:
    """A value as it stands in the file; no text of it is taken for a formula."""
    match value:
        case None:
            return ""
        case int():
            return value
        case datetime():
            return value.isoformat()
        case dict():
            return as_json(value)
        case _:
            text = str(value)
            return f"'{text}" if text.startswith(FORMULA_STARTS) else text
