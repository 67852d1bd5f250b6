"""The `source` that a message may name over HTTP, by the scope of its token: nobody can pass for somebody else."""

import re
from collections.abc import Sequence
from typing import get_args

from api_stub.auth import Scope
from api_stub.rights import scope_of
from holdfast_client.messages import OPERATOR, AnyMessage, AnyWalletMessage
from ledger.rules import SCHEDULER

SOURCE_PATTERN = "[ -~]+"
"""The characters of a `source` over HTTP. In all of Unicode, too many look like others."""

_BILLING = {model.model_fields["source"].default for model in get_args(AnyWalletMessage)}

OTHERS_SOURCES: dict[Scope, Sequence[str]] = {
    "workflows:write": sorted({*_BILLING, OPERATOR, SCHEDULER}),
    "wallet:write": sorted({OPERATOR, SCHEDULER}),
}
"""Sources of messages that come in other ways than with the scope. In the credit history they must not look alike."""


def refused_source(message: AnyMessage) -> str | None:
    """Why the message must not name its `source`, or None."""
    if not re.fullmatch(SOURCE_PATTERN, message.source):
        return f"{message.task}: source must be printable ASCII over HTTP, got {message.source!a}"
    others = OTHERS_SOURCES[scope_of(message.task)]
    if _as_it_looks(message.source) in map(_as_it_looks, others):
        return f"{message.task}: source must not be {one_of(others)}: these are reserved"
    return None


def one_of(words: Sequence[str]) -> str:
    """The words in a sentence."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _as_it_looks(source: str) -> str:
    """`source` without differences that a reader hardly sees: spaces, capitals, and similar letters."""
    return source.lower().replace(" ", "").replace("rn", "m").translate(str.maketrans("i1|0", "lllo"))
