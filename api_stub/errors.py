"""Turns every error into an answer with one clear sentence: problem details (RFC 9457) for programs, a page for people.

The texts of the database, and tracebacks, go to the log only.
"""

import logging
import re
from collections.abc import Mapping
from http import HTTPMethod, HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from api_stub.problems import BUSY, NO_PAGE, ON_PAGE_BUSY, RETRY, OnPage, Problem
from api_stub.rendering import FOR_ALL, NotSignedInError, error_page, to_sign_in
from holdfast_client.messages import named
from ledger import migrations
from ledger.faults import WrongClockError, describe, is_about_schema, is_transient, took_too_long

MEDIA_TYPE = "application/problem+json"

_PROBLEM: dict[str, Any] = {
    MEDIA_TYPE: {
        "schema": {
            "type": "object",
            "required": ["type", "title", "status", "detail"],
            "properties": {
                "type": {"type": "string"},
                "title": {"type": "string", "description": "The name of the status."},
                "status": {"type": "integer", "description": "The status of the response."},
                "detail": {"type": "string", "description": "What is wrong, in one sentence for a person."},
                "dead_letter": {"type": "integer", "description": "The number of the dead letter, if there is one."},
                "code": {"type": "string", "description": "Of a dead letter: what is wrong, in one word."},
                "lines": {
                    "type": "array",
                    "description": "Of a batch: what is wrong with each line.",
                    "items": {
                        "type": "object",
                        "required": ["line", "detail"],
                        "properties": {"line": {"type": "integer"}, "detail": {"type": "string"}},
                    },
                },
            },
        }
    }
}

RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error, as problem details (RFC 9457).",
        "content": _PROBLEM,
    }
}
"""Errors in the description of the API."""

READ_RESPONSES: dict[int | str, dict[str, Any]] = {
    HTTPStatus.TOO_MANY_REQUESTS.value: {
        "description": "Too many requests of this token are in progress; send it again later.",
        "headers": {"Retry-After": {"description": "How many seconds to wait.", "schema": {"type": "integer"}}},
        "content": _PROBLEM,
    }
}
"""Further errors of requests that read."""


def of_messages(own: Mapping[HTTPStatus, str]) -> dict[int | str, dict[str, Any]]:
    """The errors of requests that send messages, in the description of the API. `own`: some more, or in other words."""
    said = {
        HTTPStatus.BAD_REQUEST: "The body cannot be read.",
        HTTPStatus.UNAUTHORIZED: "There is no token, or it is not valid.",
        HTTPStatus.FORBIDDEN: "The token lacks the scope.",
        HTTPStatus.NOT_FOUND: "There is no such organization, or it is not the token's.",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too large.",
        HTTPStatus.SERVICE_UNAVAILABLE: "The broker cannot be reached; send it again.",
        **own,
    }
    return {status.value: {"description": words, "content": _PROBLEM} for status, words in sorted(said.items())}


FOR_PROGRAMS = re.compile(r"/(api|healthz|readyz|metrics|openapi\.json)(/.*)?", re.DOTALL)
"""The paths for programs. All others are for people, also those that lead nowhere."""

TOO_LONG = "The query takes too long; ask for a shorter range of time (date_from, date_to), or try again."

_TOO_LONG = OnPage(
    "This takes too long",
    "The credit history is long, or many people read theirs. Choose a shorter time, or try again.",
)
_NO_ANSWER = OnPage(
    "The credits cannot be read right now",
    "The database does not answer. No credits are lost, and runs are still charged once: only this page has to wait.",
)
_BEING_UPDATED = OnPage(
    "The credits cannot be read right now", "An update is under way, or not finished. Try again in some minutes."
)
_FOR_FORMS = OnPage(
    "This is not an address to open", "A button of another page leads here. Go back, and use that button."
)
_DEFECT = OnPage(
    "Something went wrong", "This page could not be made. If it happens again, tell whoever runs this site, and when."
)

log = logging.getLogger("uvicorn.error")  # the server has set up its format and its file


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this way."""
    app.add_exception_handler(NotSignedInError, to_sign_in)
    of_the_ledger = DBAPIError, PoolTimeoutError, WrongClockError
    for kind in (Problem, RequestValidationError, HTTPException, *of_the_ledger, Exception):
        app.add_exception_handler(kind, answer)


async def answer(request: Request, error: Exception) -> Response:
    """Return the response that says what is wrong."""
    if isinstance(error, DBAPIError | PoolTimeoutError | WrongClockError):
        is_fault = isinstance(error, PoolTimeoutError) or is_transient(error)
        log.error("The ledger could not be read: %s", describe(error), exc_info=None if is_fault else error)
    problem = _problem(request, error)
    if isinstance(error, DBAPIError) and is_about_schema(error):
        told = await run_in_threadpool(migrations.described, error, request.app.state.services.probe)
        problem = Problem(
            HTTPStatus.SERVICE_UNAVAILABLE, f"{told[:1].upper()}{told[1:]}.", RETRY, on_page=_BEING_UPDATED
        )
    if not FOR_PROGRAMS.fullmatch(request.scope["path"]):
        return error_page(request, problem)
    title, status = problem.status.phrase, problem.status.value
    body = {"type": "about:blank", "title": title, "status": status, "detail": problem.detail, **problem.further}
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=FOR_ALL | problem.headers)


def _problem(request: Request, error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case RequestValidationError():
            return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, named(map(_sentence, error.errors())))
        case HTTPException():
            return _of_the_framework(request, error)
        case PoolTimeoutError():
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, BUSY, RETRY, on_page=ON_PAGE_BUSY)
        case DBAPIError() if took_too_long(error):
            # 503, not 4xx: the same query may be quick when the database is less busy.
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, TOO_LONG, RETRY, on_page=_TOO_LONG)
        case DBAPIError() | WrongClockError() if is_transient(error):
            detail = "The ledger does not answer at the moment; try again."
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, RETRY, on_page=_NO_ANSWER)
        case _:
            detail = "Something went wrong on the server; its log says what."
            # uvicorn closes the connection after a 500; say so, or the client's next request is lost.
            return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail, {"Connection": "close"}, on_page=_DEFECT)


def _of_the_framework(request: Request, error: HTTPException) -> Problem:
    headers = dict(error.headers or {})
    detail, on_page = error.detail, None
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail, on_page = "There is nothing at this address.", NO_PAGE
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = _allowed(request, headers["Allow"])
        headers["Allow"] = ", ".join(allowed)
        detail, on_page = f"This address takes {' or '.join(allowed)}, not {request.method}.", _FOR_FORMS
    return Problem(HTTPStatus(error.status_code), detail, headers, on_page=on_page)


def _allowed(request: Request, by_one_route: str) -> list[str]:
    """The methods of all routes to the address. The framework names only those `by_one_route`."""
    allowed = set(by_one_route.split(", "))
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]  # a Mount matches any method
    for method in HTTPMethod:
        # Not the request's own scope, which routing has changed.
        scope = {"type": "http", "path": request.scope["path"], "method": method.value}
        if any(route.matches(scope)[0] is Match.FULL for route in routes):
            allowed.add(method.value)
    if "GET" in allowed:
        allowed.add("HEAD")
    return sorted(allowed)


def _sentence(error: dict[str, Any]) -> str:
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), "the request")
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] in ("int_parsing", "int_parsing_size"):
        return f"{name} must be an integer"
    problem = error["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should ", "must ", 1)
    return f"{name} {problem[0].lower()}{problem[1:]}"
