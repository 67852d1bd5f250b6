"""How much one token may read at once, so that nobody's reading keeps others from theirs.

Who sends more waits for a moment, and is then told to come back. A download counts as long as it runs. What engines
report is not counted: it reads nothing, and the broker takes it at once. Neither are health checks and figures. Each
process counts for itself.
"""

import re
from http import HTTPStatus
from weakref import WeakValueDictionary

from anyio import Semaphore, move_on_after
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api_stub.auth import Authenticator, InvalidTokenError, Principal
from api_stub.errors import answer
from api_stub.problems import Problem
from api_stub.sessions import COOKIE

AT_ONCE = 4
"""How many requests of one token are answered at the same time."""

WAIT_S = 1.0
"""How long a further one waits for its turn. A page that asks for ten things at once does not notice."""

_READ = re.compile(r"/(api/organizations|organizations|operators)/.*", re.DOTALL)


class Turns:
    """Middleware: passes on AT_ONCE requests of each token at a time; who waits for longer than WAIT_S gets 429."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator
        self._of = WeakValueDictionary[object, Semaphore]()
        """The turns of everybody who has a request here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer to one request."""
        reader = self._reader(scope)
        if reader is None:
            await self._app(scope, receive, send)
            return
        # By whom the token is for, not by its letters: a new one for the same gives no more turns.
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
        """Who reads, if it is a request for something that a token is needed for, and has one that is good."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or not _READ.fullmatch(scope["path"]):
            return None
        connection = HTTPConnection(scope)
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            token = connection.cookies.get(COOKIE, "")
        try:
            return self._authenticator.read(token.strip())
        except InvalidTokenError:
            return None  # it is refused, for nothing


def _too_many() -> Problem:
    detail = f"{AT_ONCE} requests of this token are being answered already; try again in a second."
    return Problem(HTTPStatus.TOO_MANY_REQUESTS, detail, {"Retry-After": "1"})
