"""Errors as problem details (RFC 9457): the right status, and one clear sentence."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """Why a request is not answered as asked."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def answer(status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that says so."""
    body = {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=headers)


def install(app: FastAPI) -> None:
    """Make `app` answer every error with problem details."""

    @app.exception_handler(Problem)
    async def of_ours(_: Request, error: Problem) -> JSONResponse:
        return answer(error.status, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(map(_sentence, error.errors())))

    @app.exception_handler(HTTPException)
    async def of_the_framework(_: Request, error: HTTPException) -> JSONResponse:
        return answer(HTTPStatus(error.status_code), str(error.detail), dict(error.headers or {}))

    @app.exception_handler(DBAPIError)
    async def of_the_database(_: Request, error: DBAPIError) -> JSONResponse:
        del error  # what it says is for the log, which has it, and not for a customer
        detail = "The ledger does not answer at the moment; try again."
        return answer(HTTPStatus.SERVICE_UNAVAILABLE, detail, {"Retry-After": "5"})


def _sentence(error: dict[str, Any]) -> str:
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), "the request")
    problem = error["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should ", "must ", 1)
    return f"{name} {problem[0].lower()}{problem[1:]}"
