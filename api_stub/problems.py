"""The errors of requests: a status, and one clear sentence. `api_stub.errors` turns them into answers."""

from http import HTTPStatus
from typing import Any

BUSY = "The ledger is busy at the moment; try again."
RETRY = {"Retry-After": "5"}


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """An error of a request, with its status and headers. `further` are more members of the problem's JSON object."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None, **further: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}
        self.further = further
