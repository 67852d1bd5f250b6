"""Messages as JSON Lines, in a file or a batch over HTTP: one JSON object a line, which also names its task.

    {"task": "workflow.finish", "org_id": "acme", "workflow_id": "run-1", "credits": 80}

The text is UTF-8. Blank lines are skipped, but counted. A line ends with LF or CRLF, and the last one need not end.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from holdfast_client.messages import MAX_BODY_BYTES, InvalidMessage, parse

MAX_LINE_BYTES = MAX_BODY_BYTES
"""The longest line. A valid message is at most half as long."""

_BOM = b"\xef\xbb\xbf"
_UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_BLANK = b" \t\r" + _BOM


@dataclass(frozen=True, slots=True)
class MessageLine:
    """A valid message: the name of its task, and the JSON object that the task takes."""

    task: str
    message: dict[str, Any]


def numbered_lines(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1. `pieces` are the text, cut anywhere.

    Keeps one piece and one line in memory, and of a line that is too long only as much as `read_line` needs.
    """
    number, line = 1, bytearray()
    for piece in pieces:
        rest, *others = piece.split(b"\n")
        line += rest[: MAX_LINE_BYTES + 1 - len(line)]
        for other in others:
            if line.strip(_BLANK):
                yield number, bytes(line)
            number += 1
            line = bytearray(other[: MAX_LINE_BYTES + 1])
    if line.strip(_BLANK):
        yield number, bytes(line)


def read_line(line: bytes) -> MessageLine | InvalidMessage:
    """Read one line, with or without its end. Checks the message completely, as `parse` does. Never raises."""
    line = line.rstrip(b"\r\n").removeprefix(_BOM)
    if len(line) > MAX_LINE_BYTES:
        return InvalidMessage("too_large", f"the line has more than {MAX_LINE_BYTES:,} bytes", None)
    try:
        message = strict_json(line)
    except ValueError as error:
        return InvalidMessage("undecodable_message", str(error), None)
    if not isinstance(message, dict):
        problem = "the line must be a JSON object: one message, with no list around the lines"
        return InvalidMessage("invalid_message", problem, None)
    if "task" not in message:
        return InvalidMessage("invalid_message", "task is missing, such as workflow.finish", None)
    task = message.pop("task")
    if not isinstance(task, str):
        return InvalidMessage("invalid_message", "task must be a string, such as workflow.finish", None)
    found = parse(task, message)
    return found if isinstance(found, InvalidMessage) else MessageLine(task, message)


def strict_json(text: bytes) -> Any:
    """Parse JSON, but refuse an object that gives a name twice, as it is unknown which of the values was meant.

    Raises ValueError: the text says what is wrong, and where.
    """
    if text.startswith(_UTF_16_BOMS):
        raise ValueError("the text is UTF-16: save it as UTF-8")
    try:
        return json.loads(text.decode(), object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as error:
        place = f"the byte 0x{text[error.start]:02x} at position {error.start + 1}"
        raise ValueError(f"{place} is not UTF-8: save the text as UTF-8") from None
    except json.JSONDecodeError as error:
        if not error.doc[error.pos :].strip() and error.doc.lstrip().startswith(("{", "[")):
            raise ValueError("the JSON has no end: it must be complete, on one line") from None
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{ascii(name)[1:-1][:64]} is given more than once in the same object")
        found[name] = value
    return found


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than 4,300 digits
        raise ValueError(f"an integer must not have {len(digits.lstrip('-')):,} digits") from None
