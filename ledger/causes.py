"""Why messages become dead letters: the cause that those of one incident share, and what each code means and asks for.

Pure: reads neither the database nor a clock.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from holdfast_client.messages import DELIVERY_LIMIT, MAX_BODY_BYTES
from ledger.readable import beginning, escaped

MAX_CAUSE_LENGTH = 200
"""The most characters of a cause; an index has it."""

_READ = 1_000
"""How many characters of an error are looked at: it may be long, and hostile."""

_REST = "…"

# In this order: each leaves out what differs from one message of an incident to the next.
_LEFT_OUT = (
    (re.compile(r"\A[a-z]+\.[a-z_]+: "), ""),  # the task, which is known
    (re.compile(r"must be 1-\d+ characters of A-Z a-z 0-9 _ \. : -"), "must be an id"),
    (re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""), _REST),
    (re.compile(r"\{.*\}|\[.*\]"), _REST),
    (re.compile(r"[,;] got .*?(?=; |\Z)"), ""),
    (re.compile(r"\A\S+ (?=was (?:applied|started|finished) with |has its anchor )"), f"{_REST} "),
    (re.compile(r"(?<![\w.])(workflow|purchase) \S+(?<![,;])"), rf"\1 {_REST}"),
    # A number, or a word with one; but not a bound, as in "less than 500".
    (re.compile(r"(?<!than )(?<!to )(?<!most )(?<!least )(?<![\w.:,^+-])[\w.:^+-]*\d[\w.:,^+-]*(?<![,:.])"), _REST),
    (re.compile(rf"{_REST}(?:[\s,]*{_REST})+"), _REST),
)


def cause_of(error: str) -> str:
    """What the errors of one incident have in common: `error` without numbers, ids and quoted values.

    One line of 1 to MAX_CAUSE_LENGTH printable characters.
    """
    cause = " ".join(error[:_READ].split())
    for pattern, instead in _LEFT_OUT:
        cause = pattern.sub(instead, cause)
    return beginning(escaped(cause.strip()), MAX_CAUSE_LENGTH) or _REST


@dataclass(frozen=True, slots=True)
class Code:
    """What a code of dead letters means, in words for a person. What stands between backticks is code."""

    meaning: str
    cure: str
    likely: Literal["replay", "discard"]
    """What an operator does with such a letter in the end, as a rule."""


CODES: Mapping[str, Code] = {
    "invalid_message": Code(
        "A field is missing, unknown or invalid, or the task was not sent with one JSON object.",
        "Correct the sender and send a new message; discard this one.",
        "discard",
    ),
    "too_large": Code(
        (
            f"Its body is larger than {MAX_BODY_BYTES:,} bytes, or its entry in Redis than {4 * MAX_BODY_BYTES:,}. "
            "Only the first part is kept. The error says which of the two it is, its size, and the SHA-256 of the "
            "whole body or the SHA-1 of the whole entry."
        ),
        "Correct the sender and send a new message. Discard this one; it cannot be replayed.",
        "discard",
    ),
    "not_allowed": Code(
        "It came from the queue `credits.engine` and is not about a workflow, or cannot be read.",
        "If it is intended, a sender with that right sends it to `credits`. Discard this one; it cannot be replayed.",
        "discard",
    ),
    "delivery_limit": Code(
        f"{DELIVERY_LIMIT} workers died while they held it, or while they applied it after it had waited.",
        "Replay it. If workers die of it again, report it.",
        "replay",
    ),
    "undecodable_message": Code(
        "It is not what Celery sends: it names no task, or its headers or its body (JSON) cannot be read.",
        "Correct the sender, which must use JSON, and send a new message; discard this one.",
        "discard",
    ),
    "unknown_task": Code(
        "No message has this name.",
        "Correct the name and send it again. Or, if a newer version of Holdfast has it, update and replay.",
        "discard",
    ),
    "conflict": Code(
        (
            "A message with the same id came before and said something else, or a subscription was to change its "
            "anchor. What came first stands."
        ),
        (
            "If the difference is intended, send it with an id of its own (for usage: `wallet.adjust`; for another "
            "anchor: a new `subscription_id`, which replaces the old subscription). Discard this one."
        ),
        "discard",
    ),
    "insufficient_credits": Code(
        "An adjustment or a billing entry would take the prepaid balance below zero, or what a workflow holds.",
        "Replay it once there are credits; or send the adjustment with `allow_negative` and a new id.",
        "replay",
    ),
    "refund_exceeds_usage": Code(
        "Together with earlier refunds, it is more than the workflow used; or the workflow has not finished yet.",
        "Replay it after the finish; or refund less, with a new id.",
        "replay",
    ),
    "unknown_purchase": Code(
        "A reversal names a purchase that has not come.",
        "Replay it once the purchase is there; if its id is wrong, send the right one under a new id and discard this.",
        "replay",
    ),
    "reversal_exceeds_purchase": Code(
        "With the reversals before it, more would be taken back than the purchase brought.",
        "Reverse less, under a new id; discard this one.",
        "discard",
    ),
    "balance_out_of_range": Code(
        "A balance, or what is reserved, would exceed ±(2^53−1).",
        "The amount is wrong: send the right one, and discard this one.",
        "discard",
    ),
    "unexpected_error": Code(
        "A defect of Holdfast. The traceback is kept. Nothing of the message was applied; no other message waits.",
        "Report it; replay it with the version that fixes it.",
        "replay",
    ),
}
"""Every `ErrorCode`. docs/messages.md and the pages say the same."""
