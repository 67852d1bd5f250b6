"""The credit history as CSV (RFC 4180, UTF-8), piece by piece, so that its length costs no memory; and the usage.

It is for spreadsheets. An apostrophe precedes any text that they would read as a formula, whether a comma or a
semicolon separates cells. Control characters and other invisible ones are written as escapes. The API's JSON has every
text unchanged.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from sqlalchemy import RowMapping

from ledger.archived import Archived
from ledger.history import CUSTOMER_COLUMNS
from ledger.readable import JOINERS, as_json, escaped, escaped_json
from ledger.usage import Group, Usage

COLUMNS = (*CUSTOMER_COLUMNS, "id", "workflow_id")
MEDIA_TYPE = "text/csv; charset=utf-8; header=present"
AS_OF = "Holdfast-As-Of"
DESCRIBED = {
    "content": {"text/csv": {"schema": {"type": "string"}}},
    "headers": {AS_OF: {"description": "As `as_of` in JSON.", "schema": {"type": "string", "format": "date-time"}}},
}
"""A file, in the description of the API."""
PIECE_CHARACTERS = 64 * 1024
MOST_LINES = 100_000
"""The most groups of usage in a file."""

_FORMULA = re.compile(rf"""(^|;)(?=[\s"{JOINERS}]*[=+\-@＝＋－＠﹦﹢﹣﹫])""")
"""Where a formula may begin: spreadsheets skip spaces and quotes before one, and some accept full-width signs."""


def as_file(name: str, as_of: datetime) -> dict[str, str]:
    """The headers of an answer that is kept as a file of this name, in which an id may have a colon.

    `as_of`: see `Reader.as_of`.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    return {"Content-Disposition": f'attachment; filename="{safe}"', AS_OF: as_of.isoformat()}


def archived(older: Archived | None) -> dict[str, str]:
    """The header of a file that lacks archived events: how many the organization has, and until when."""
    if older is None:
        return {}
    return {"Holdfast-Archived": f"events={older.events}; through={older.through.isoformat()}"}


def pieces(events: Iterable[RowMapping]) -> Iterator[str]:
    """Yield the lines of the file, some at a time."""
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


def usage(group_by: Sequence[Group], found: Usage) -> str:
    """The usage as a file: a line a group. Without `group_by`, one line with the sum."""
    names = (*group_by, "credits", "runs")
    groups = found.groups or [{"credits": found.credits, "runs": found.runs}]
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(names)
    writer.writerows([cell(group[name]) for name in names] for group in (groups if found.runs else ()))
    return written.getvalue()


def cell(value: object) -> str | int:
    """A value as it is written to the file, so that no spreadsheet reads it as a formula."""
    match value:
        case None:
            return ""
        case int():
            return value
        case datetime():
            return value.isoformat()
        case dict():
            # In JSON a semicolon is always within a string, where an escape means the same.
            return escaped_json(as_json(value)).replace(";", "\\u003b")
        case _:
            return _FORMULA.sub(r"\1'", escaped(str(value), keep=JOINERS))
