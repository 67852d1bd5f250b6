"""The body of a message, as Celery sends it: the arguments of its task as JSON, [args, kwargs, embed].

Version 1 of Celery's protocol sends an object instead: {"args": …, "kwargs": …}.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast_client.messages import InvalidMessage

Arguments = tuple[list[Any], dict[str, Any]]
"""The positional and the named arguments of a task."""


def arguments(body: bytes) -> Arguments | None:
    """The arguments in `body`, or None if it is not the body of a Celery message."""
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
    """The arguments in a decoded body, or None if it differs from Celery's current protocol."""
    match value:
        case [list(args), dict(kwargs), dict() | None]:
            return args, kwargs
        case _:
            return None


def written(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes:
    """The body with these arguments. A value that JSON cannot hold is written as text."""
    return json.dumps([args, kwargs, {}], default=str).encode()


def only_argument(task: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """The task's only positional argument, or an InvalidMessage if it has other arguments."""
    if len(args) == 1 and not kwargs:
        return args[0]
    sent = f"{len(args)} positional and {len(kwargs)} named"
    error = f"{task} takes one positional argument, the message as a JSON object; got {sent}"
    return InvalidMessage("invalid_message", error, None)
