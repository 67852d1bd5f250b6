"""Renders pages: templates, and every error as a page in the same design.

Pages need no script, and load nothing from other sites; the Content-Security-Policy of every answer says so. Templates
escape every value.
"""

import hashlib
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from api_stub.formats import days, iso, pairs, said, share
from api_stub.problems import OnPage, Problem
from api_stub.receipts import more, outcome, standing, told, told_step
from ledger.readable import JOINERS, beginning, escaped, readable_json, span
from ledger.wording import amount, change, clock, day, during, in_the_archive, label, near_day

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"

MAX_FORM_BYTES = 64 * 1024
"""The largest form that is read."""

FOR_ALL = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
"""The headers of every answer, which it may override."""

HEADERS = FOR_ALL | {
    # No script-src, font-src, connect-src …: default-src forbids whatever is not named.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
"""The headers of every page, download and redirection."""


_UNREADABLE = OnPage("This could not be read", "The form did not say how long it is. Go back, and send it again.")
_TOO_LARGE = OnPage("This is too long", f"A form may have {MAX_FORM_BYTES // 1024} KB. Go back, and enter less.")


class NotSignedInError(Exception):
    """The page needs a session: the answer is a redirection to `location`, the form for signing in."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class PageRoute(APIRoute):
    """A route whose answers all have `HEADERS`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which refuses large forms and adds the headers."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            _refuse_large_form(request)
            response = await handle(request)
            response.headers.update(HEADERS)
            return response

        return answer


class _Assets(StaticFiles):
    """The stylesheet and the icon. Their addresses change with their content, so browsers may keep them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


def add_assets(app: FastAPI) -> None:
    """Serve the stylesheet and the icon at /static."""
    app.mount("/static", _Assets(directory=_STATIC), name="static")


def page(request: Request, template: str, status: HTTPStatus = HTTPStatus.OK, /, **values: Any) -> HTMLResponse:
    """Render `template` with `values`."""
    session, product = getattr(request.state, "session", None), request.app.state.services.product_name
    text = _templates.get_template(template).render(session=session, path=request.url.path, product=product, **values)
    return HTMLResponse(text, status)


def error_page(request: Request, problem: Problem) -> HTMLResponse:
    """A page that says what is wrong. If it will pass, and the page only shows something, with a link to try again."""
    again = ""
    if "Retry-After" in problem.headers and request.method == "GET":
        again = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    response = page(request, "error.html", problem.status, **problem.on_page._asdict(), again=again)
    response.headers.update({**HEADERS, **problem.headers})
    return response


async def to_sign_in(_: Request, visitor: Exception) -> Response:
    """Redirect a visitor who is not signed in."""
    assert isinstance(visitor, NotSignedInError)
    response = see_other(visitor.location)
    response.headers.update(HEADERS)
    return response


def see_other(location: str) -> Response:
    """Redirect to `location`, with GET."""
    return Response(status_code=HTTPStatus.SEE_OTHER, headers={"Location": location})


def _refuse_large_form(request: Request) -> None:
    if request.method != "POST":
        return
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise Problem(HTTPStatus.LENGTH_REQUIRED, "The form must have a Content-Length.", on_page=_UNREADABLE)
    if int(length) > MAX_FORM_BYTES:
        raise Problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The form is larger than {MAX_FORM_BYTES:,} bytes.",
            on_page=_TOO_LARGE,
        )


def _version(name: str) -> str:
    return hashlib.sha256((_STATIC / name).read_bytes()).hexdigest()[:12]


def _visible(value: object) -> object:
    """Escape control characters in `value`, so that no text can reverse, hide or overwrite its surroundings."""
    return escaped(value, keep=f"\n{JOINERS}") if type(value) is str else value  # our own markup stays


_templates = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    finalize=_visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    function.__name__: function
    for function in (
        *(amount, change, share, day, near_day, days, during, clock, iso, span, label),
        *(pairs, said, readable_json, beginning, in_the_archive),
        *(more, outcome, standing, told, told_step),
    )
}
_templates.globals |= {"asset": {name: f"/static/{name}?v={_version(name)}" for name in ("holdfast.css", "icon.svg")}}
