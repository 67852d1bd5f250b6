"""Why a request is not answered as asked: a status, and one clear sentence. `api_stub.errors` makes it an answer."""

from http import HTTPStatus

BUSY = "The ledger is busy at the moment; try again."
RETRY = {"Retry-After": "5"}


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """Why a request is not answered as asked."""

    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}
