"""The credit history as CSV (RFC 4180, UTF-8), piece by piece, so that its length costs no memory.

It is for spreadsheets. No text of it is taken for a formula, whether they take a comma or a semicolon for what
separates cells: an apostrophe stands before what would be one. Control characters, and others that nobody sees, are
written as escapes. The API's JSON has every text as it is.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from datetime import datetime

from sqlalchemy import RowMapping

from ledger.history import CUSTOMER_COLUMNS
from ledger.readable import JOINERS, as_json, escaped, escaped_json

COLUMNS = (*CUSTOMER_COLUMNS, "id", "workflow_id")
PIECE_CHARACTERS = 64 * 1024

_FORMULA = re.compile(rf"""(^|;)(?=[\s"{JOINERS}]*[=+\-@＝＋－＠﹦﹢﹣﹫])""")
"""Where a formula may begin: spreadsheets overlook space and quotes before one, and some take wide signs."""


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
            # A semicolon is only within strings, and so is the same value as an escape.
            return escaped_json(as_json(value)).replace(";", "\\u003b")
        case _:
            return _FORMULA.sub(r"\1'", escaped(str(value), keep=JOINERS))
