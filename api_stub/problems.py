"""The errors of requests: a status, and one clear sentence. `api_stub.errors` turns them into answers."""

from http import HTTPStatus
from typing import Any, NamedTuple

BUSY = "The ledger is busy at the moment; try again."
RETRY = {"Retry-After": "5"}


class OnPage(NamedTuple):
    """What the page about a problem says, to people who know nothing of statuses and tokens."""

    heading: str
    sentence: str


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """An error of a request, with its status and headers. `further` are more members of the problem's JSON object.

    `on_page`: what people read instead of `detail`, if that is for programs.
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        headers: dict[str, str] | None = None,
        *,
        on_page: OnPage | None = None,
        **further: Any,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}
        self.on_page = on_page or OnPage(_HEADINGS.get(status, "Something is wrong"), detail)
        self.further = further


_HEADINGS = {
    HTTPStatus.UNAUTHORIZED: "Sign in first",
    HTTPStatus.FORBIDDEN: "You may not do this",
    HTTPStatus.NOT_FOUND: "There is no such page",
    HTTPStatus.METHOD_NOT_ALLOWED: "This is not an address to open",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "This is too much at once",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Something in the address is wrong",
    HTTPStatus.TOO_MANY_REQUESTS: "Too much at once",
    HTTPStatus.INTERNAL_SERVER_ERROR: "Something went wrong",
    HTTPStatus.SERVICE_UNAVAILABLE: "Please try again",
}

ON_PAGE_BUSY = OnPage("Many people are here right now", "The page had to wait for too long. Try again in a moment.")
NO_PAGE = OnPage("There is no such page", "Check the address. If a link led you here, tell whoever gave it to you.")
