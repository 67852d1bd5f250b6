"""The body of a message, as Celery sends it: the arguments of its task as JSON, [args, kwargs, embed].

The first version of Celery's protocol has an object instead, {"args": …, "kwargs": …}.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ledger.messages import InvalidMessage

Arguments = tuple[list[Any], dict[str, Any]]
"""The positional and the named arguments of a task."""


def arguments(body: bytes) -> Arguments | None:
    """The arguments that a message was sent with; None: this is no message of Celery's."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    match message:
        case [list(args), dict(kwargs), _]:
            return args, kwargs
        case {"args": list(args), "kwargs": dict(kwargs)}:
            return args, kwargs
        case _:
            return None


def strict_arguments(value: object) -> Arguments | None:
    """The arguments in a body that was read already, if it is exactly what Celery sends now."""
    match value:
        case [list(args), dict(kwargs), dict() | None]:
            return args, kwargs
        case _:
            return None


def written(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """The body with these arguments. What JSON does not know is written as text."""
    return json.dumps([args, kwargs, {}], default=str).encode()


def only_argument(task: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """The one argument that a task was sent with, or the InvalidMessage that says it was sent otherwise."""
    if len(args) == 1 and not kwargs:
        return args[0]
    sent = f"{len(args)} positional and {len(kwargs)} named"
    error = f"{task} takes one positional argument, the message as a JSON object; got {sent}"
    return InvalidMessage("invalid_message", error, None)
