"""Refuses parameters that an address does not take: ignoring them would return more than was asked for."""

import difflib
from collections.abc import Collection, Iterator
from http import HTTPStatus
from itertools import islice
from typing import Any

from fastapi import Request
from starlette.datastructures import QueryParams

from api_stub.problems import Problem
from ledger.messages import MAX_PROBLEMS
from ledger.readable import beginning, escaped

MAX_NAME = 64
"""The most characters of a parameter's name that are shown."""


def problems(query: QueryParams, names: Collection[str], *, repeatable: Collection[str] = ()) -> dict[str, str]:
    """What is wrong with the names in a query that takes `names`: by name, a sentence without its full stop.

    The first MAX_PROBLEMS, as looking for similar names takes time.
    """
    return dict(islice(_problems(query, names, repeatable), MAX_PROBLEMS))


def _problems(query: QueryParams, names: Collection[str], repeatable: Collection[str]) -> Iterator[tuple[str, str]]:
    for name in query:
        if name not in names:
            yield name, _unknown(name, names)
        elif name not in repeatable and len(query.getlist(name)) > 1:
            yield name, f"{name} is given more than once"


def complaints(query: QueryParams, names: Collection[str], *, repeatable: Collection[str] = ()) -> dict[str, str]:
    """The same for a page: whole sentences."""
    found = problems(query, names, repeatable=repeatable)
    return {name: problem if problem.endswith("?") else f"{problem}." for name, problem in found.items()}


def refuse_others(request: Request) -> None:
    """Answer 422 if the query has a parameter that the description of this route does not have, or repeats one."""
    described = dict(_described(request))
    repeatable = [name for name, schema in described.items() if schema.get("type") == "array"]
    if found := problems(request.query_params, described, repeatable=repeatable):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(found.values()))


def _described(request: Request) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parameters of the query in the API's description, each with its schema."""
    operation = request.app.openapi()["paths"][request.scope["route"].path_format][request.method.lower()]
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "query":
            yield parameter["name"], parameter["schema"]


def _unknown(name: str, names: Collection[str]) -> str:
    shown = escaped(beginning(name, MAX_NAME)) or '""'
    if not names:
        return f"{shown} is not a parameter; this address takes none"
    what = "filter" if len(names) > 1 else "parameter"
    typed = name[:MAX_NAME].lower()
    similar = [each for each in names if _has_the_words(typed, each) or _has_the_words(each, typed)]
    similar = similar or difflib.get_close_matches(typed, names, n=1)
    if similar:
        return f"{shown} is not a {what}; did you mean {' or '.join(similar)}?"
    return f"{shown} is not a {what}; there {'are' if len(names) > 1 else 'is only'} {', '.join(names)}"


def _has_the_words(one: str, other: str) -> bool:
    # As in `type` and event_type, or `to` and date_to, which are not close enough for difflib.
    return set(one.split("_")) <= set(other.split("_"))
