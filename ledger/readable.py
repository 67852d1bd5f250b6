"""Text for people, on pages and in terminals: JSON, lengths of time, and text without hidden characters."""

import json
import unicodedata
from datetime import timedelta


def escaped(text: str, *, keep: str = "") -> str:
    """`text` with every control character, except those of `keep`, written as an escape such as \\x1b."""
    if text.isprintable():  # the fast path
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _is_control(character) and character not in keep else character
        for character in text
    )


JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Not hidden: some scripts and emoji need them to look right."""


def escaped_json(text: str) -> str:
    """JSON text in which every control character but the line break is written as JSON does: \\u001b."""
    if text.isprintable():
        return text
    return "".join(
        json.dumps(character)[1:-1] if _is_control(character) and character != "\n" else character for character in text
    )


def beginning(text: str, most: int) -> str:
    """`text`, cut to `most` characters; the last one of a cut text is an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shortened(text: str, most: int, rest: str) -> str:
    """The first `most` characters of `text`. If there are more: how many, and `rest`, which says how to see them."""
    left_out = len(text) - most
    return text if left_out <= 0 else f"{text[:most]}\n… and {left_out:,} characters more. {rest}"


def _is_control(character: str) -> bool:
    # Includes formats such as the right-to-left override, halves of surrogate pairs, and the two line separators.
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")


def as_json(value: object, *, indent: int | None = None) -> str:
    """`value` as JSON for a person: readable characters, and nothing that UTF-8 cannot encode."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
    return text.encode("utf-8", "backslashreplace").decode()


def readable_json(value: object) -> str:
    """`value` as JSON over several lines, unless deep nesting would make that several times as long."""
    compact, spread = as_json(value), as_json(value, indent=2)
    return spread if len(spread) <= 4 * len(compact) else compact


def span(length: timedelta) -> str:
    """A length of time in its two largest units: 3 d 4 h, 12 min, 0 s. Never less than 0 s."""
    seconds = max(0, int(length.total_seconds()))
    days, hours, minutes = seconds // 86_400, seconds // 3_600 % 24, seconds // 60 % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    shown = [f"{number} {unit}" for number, unit in parts if number][:2]
    return " ".join(shown) or f"{seconds} s"
