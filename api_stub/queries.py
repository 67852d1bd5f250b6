"""Refuses parameters that an address does not take: ignoring them would return more than was asked for."""

import difflib
from collections.abc import Collection, Iterator
from http import HTTPStatus
from itertools import islice
from typing import get_args, get_origin

from fastapi import Request
from fastapi.dependencies.models import Dependant
from starlette.datastructures import QueryParams

from api_stub.problems import Problem
from holdfast_client.messages import MAX_PROBLEMS
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
    """Answer 422 if the query has a parameter that the route does not take, or repeats one that has one value."""
    taken = dict(_taken(request.scope["route"].dependant))
    repeatable = [name for name, annotation in taken.items() if _is_list(annotation)]
    if found := problems(request.query_params, taken, repeatable=repeatable):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(found.values()))


def _taken(dependant: Dependant) -> Iterator[tuple[str, object]]:
    """The parameters of the query that a handler and its dependencies take, each with its annotation."""
    for each in dependant.dependencies:
        yield from _taken(each)
    for field in dependant.query_params:
        yield field.alias, field.field_info.annotation


def _is_list(annotation: object) -> bool:
    return any(get_origin(each) is list for each in (annotation, *get_args(annotation)))


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
