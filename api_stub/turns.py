"""Limits how much one token reads at once, and how many batches it sends, so that nobody blocks the others.

Further requests wait for WAIT_S, and then get 429. A download counts for as long as it runs. Single messages do not
count: they read nothing, and the broker takes them at once. Nor do health checks and metrics. Each process counts for
itself.
"""

import re
from http import HTTPStatus
from weakref import WeakValueDictionary

from anyio import Semaphore, move_on_after
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api_stub.auth import Authenticator, InvalidTokenError, Principal
from api_stub.errors import answer
from api_stub.problems import OnPage, Problem
from api_stub.sessions import COOKIE

AT_ONCE = 4
"""How many requests of one token are answered at the same time."""

WAIT_S = 1.0
"""How long a further request waits for its turn. Enough for a page that sends ten requests at once."""

BATCHES = "/api/messages"

_READ = re.compile(r"/((api/organizations|organizations|operators)/.*|operators)", re.DOTALL)


class Turns:
    """Middleware: passes on AT_ONCE requests of each token at a time. One that waits longer than WAIT_S gets 429."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator
        self._of = WeakValueDictionary[object, Semaphore]()
        """The turns of every reader that has a request here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reader = self._reader(scope)
        if reader is None:
            await self._app(scope, receive, send)
            return
        # By subject and organizations, not by the token itself: a new token for the same reader gives no more turns.
        turns = self._of.setdefault((reader.subject, reader.orgs), Semaphore(AT_ONCE, fast_acquire=True))
        with move_on_after(WAIT_S) as waiting:
            await turns.acquire()
        if waiting.cancelled_caught:
            refused = await answer(Request(scope), _too_many())
            await refused(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            turns.release()

    def _reader(self, scope: Scope) -> Principal | None:
        """The principal of a request that counts and needs a token, if its token is valid."""
        if scope["type"] != "http":
            return None
        is_read = scope["method"] in ("GET", "HEAD") and _READ.fullmatch(scope["path"])
        if not is_read and (scope["method"], scope["path"]) != ("POST", BATCHES):
            return None
        connection = HTTPConnection(scope)
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            token = connection.cookies.get(COOKIE, "")
        try:
            return self._authenticator.read(token.strip())
        except InvalidTokenError:
            return None  # it will be refused, which costs nothing


def _too_many() -> Problem:
    detail = f"{AT_ONCE} requests of this token are in progress already; try again in a second."
    on_page = OnPage("Too much at once", "Several pages of yours are being made already. Try again in a second.")
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, detail, {"Retry-After": "1"}, on_page=on_page)
