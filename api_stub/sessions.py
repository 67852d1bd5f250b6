"""Signing in and out of the pages. The browser keeps the token in a cookie that only pages read.

docs/signing-in.md is the contract with whoever signs the tokens. The cookie lives as long as the token. No script can
read it, and no other site can make the browser send it with a form. Every form also carries a value that only a page of
ours knows (see `form_token`). Over https the cookie's name, `__Host-…`, keeps other hosts of the domain from setting
it. The JSON API never reads the cookie. Nothing is stored on the server: signing out removes the cookie, but the token
stays valid until it expires.
"""

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated
from urllib.parse import quote

import jwt
from fastapi import APIRouter, Depends, Form, Request, Response

from api_stub.auth import LEEWAY_S, EarlyTokenError, ExpiredTokenError, InvalidTokenError, Principal
from api_stub.problems import OnPage, Problem
from api_stub.rendering import NotSignedInError, PageRoute, page, see_other
from api_stub.rights import bearer
from api_stub.services import Services, Using

COOKIE = "holdfast_session"
FORM_COOKIE = "holdfast_signin"
MAX_COOKIE_BYTES = 4_000
"""Browsers silently drop a cookie of more than 4,096 bytes, its name and attributes included."""
MAX_COOKIE_AGE_S = 400 * 86_400
"""Browsers keep no cookie for longer."""

_LOCAL_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]*")
"""A path on this site: printable ASCII, no backslash, and not `//host`, which is another site."""

router = APIRouter(route_class=PageRoute, include_in_schema=False)


FOR_STAFF = OnPage("This page is for staff", "You are signed in, but not as staff. Ask your administrator for access.")
FOR_OPERATORS = OnPage(
    "This is for operators", "You may see this page, but change nothing here: that is for operators."
)
_OLD_FORM = OnPage("This page is out of date", "This form is not from a page of your session. Reload the page.")


@dataclass(frozen=True, slots=True)
class Session:
    """The principal who is signed in, and the token."""

    principal: Principal
    token: str

    @property
    def form_token(self) -> str:
        """The value that every form of this session carries."""
        return form_token(self.token)

    @property
    def is_staff(self) -> bool:
        """Whether the pages of operators are for this session."""
        return "operator:read" in self.principal.scopes

    @property
    def may_act(self) -> bool:
        """Whether the pages of operators have forms for this session."""
        return "operator" in self.principal.scopes


def signed_in(request: Request, using: Using) -> Session:
    """The session of a request for a page, from the cookie or, for scripts, from the Authorization header.

    Otherwise the answer is the form for signing in, which leads back here.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":  # any other scheme is for a proxy in front of us
        session = Session(bearer(request, using), token.strip())
    else:
        token = _kept(request, COOKIE)
        try:
            session = Session(using.authenticator.read(token), token)
        except InvalidTokenError:
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            # A form cannot be posted again after signing in, so it does not lead back here.
            raise NotSignedInError(
                f"/signin?next={quote(here, safe='')}" if request.method == "GET" else "/signin"
            ) from None
    request.state.session = session
    return session


SignedIn = Annotated[Session, Depends(signed_in)]


def operator_reads(session: SignedIn) -> Session:
    """A dependency: the session, if it may see the pages of operators. Otherwise 403."""
    if not session.is_staff:
        raise Problem(HTTPStatus.FORBIDDEN, FOR_STAFF.sentence, on_page=FOR_STAFF)
    return session


def operator_acts(session: Annotated[Session, Depends(operator_reads)]) -> Session:
    """A dependency: the session, if it may act on the pages of operators. Otherwise 403."""
    if not session.may_act:
        raise Problem(HTTPStatus.FORBIDDEN, FOR_OPERATORS.sentence, on_page=FOR_OPERATORS)
    return session


Operator = Annotated[Session, Depends(operator_acts)]


def form_token(secret: str) -> str:
    """The value that proves that a form is from our page: computing it takes the cookie `secret`."""
    digest = hmac.digest(secret.encode(), b"a form of Holdfast", hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def is_form_of(secret: str, given: str) -> bool:
    """Whether a form that carries `given` is from a page for `secret`."""
    return bool(secret) and hmac.compare_digest(form_token(secret).encode(), given.encode(errors="replace"))


def checked_form(session: SignedIn, form: Annotated[str, Form()] = "") -> Session:
    """A dependency of every change: the form must be from a page of this session. Otherwise 403."""
    if not is_form_of(session.token, form):
        raise Problem(HTTPStatus.FORBIDDEN, _OLD_FORM.sentence, on_page=_OLD_FORM)
    return session


OwnForm = Annotated[Session, Depends(checked_form)]


def local_path(text: str) -> str:
    """`text` if it is a path on this site, otherwise the start page, so that no link leads to another site."""
    return text if _LOCAL_PATH.fullmatch(text) else "/"


@router.get("/signin")
def ask(request: Request, using: Using, next: str = "", token: str = "") -> Response:
    """Show the form. With `token`, as in the link that `holdfast up` prints, sign in at once.

    The answer to that link is a redirection, so the token is not in the browser's history. `access_log` keeps it out of
    the log. An attacker may send such a link to make a visitor work in the attacker's session. So a page asks, instead
    of the redirection, before a link replaces a session, and before one on another site begins one.
    """
    if not token:
        return _form(request, HTTPStatus.OK, next=next)
    try:
        other = _usable(using, token)
    except InvalidTokenError as error:
        return _form(request, HTTPStatus.UNAUTHORIZED, next=next, error=_about_the_link(error))
    present = _principal(using, _kept(request, COOKIE))
    if present != other and (present is not None or _is_of_another_site(request)):
        names = {"present": "" if present is None else present.subject, "other": other.subject}
        return _form(request, HTTPStatus.OK, next=next, template="other_session.html", token=token, **names)
    return _sign_in(request, token=token, next=next)


@router.post("/signin")
def sign_in(
    request: Request,
    using: Using,
    token: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "",
    form: Annotated[str, Form()] = "",
) -> Response:
    """Keep the token in the cookie, and redirect to `next`."""
    if not is_form_of(_kept(request, FORM_COOKIE), form):
        return _form(request, HTTPStatus.FORBIDDEN, next=next, error="The form is out of date. Try again.")
    token = token.strip()
    try:
        _usable(using, token)
    except InvalidTokenError as error:
        return _form(request, HTTPStatus.UNAUTHORIZED, next=next, error=f"{str(error).capitalize()}.")
    return _sign_in(request, token=token, next=next)


@router.post("/signout")
def sign_out(request: Request, _: OwnForm) -> Response:
    """Remove the cookie."""
    response = see_other("/signin")
    response.delete_cookie(_named(request, COOKIE), httponly=True, secure=_is_encrypted(request), samesite="lax")
    return response


def _usable(using: Services, token: str) -> Principal:
    """The principal of a token that a browser can keep. Raises InvalidTokenError."""
    principal = using.authenticator.read(token)
    if len(token) > MAX_COOKIE_BYTES:
        raise InvalidTokenError(f"the token is longer than a browser can keep ({MAX_COOKIE_BYTES:,} bytes)")
    return principal


def _about_the_link(error: InvalidTokenError) -> str:
    """What is wrong with a link, for a customer, who knows nothing of tokens."""
    match error:
        case ExpiredTokenError():
            return "This link has expired. Get a new one where you got it."
        case EarlyTokenError():
            return (
                "This link is not valid yet: the clock of the site that gave it to you, or ours, is wrong. "
                "Try again in a few minutes."
            )
    return f"This link does not sign you in: {error}. Get a new one where you got it."


def _sign_in(request: Request, *, token: str, next: str) -> Response:
    # The token was verified. Decoded again, as a Principal has no expiry.
    expiry = int(jwt.decode(token, options={"verify_signature": False})["exp"])
    response = see_other(local_path(next))
    response.set_cookie(
        _named(request, COOKIE),
        token,
        max_age=min(expiry + LEEWAY_S - int(datetime.now(UTC).timestamp()), MAX_COOKIE_AGE_S),
        httponly=True,
        secure=_is_encrypted(request),
        samesite="lax",  # with strict, a link in a mail would require to sign in again
    )
    return response


def _form(
    request: Request,
    status: HTTPStatus,
    *,
    next: str,
    error: str | None = None,
    template: str = "signin.html",
    **values: str,
) -> Response:
    secret = _kept(request, FORM_COOKIE) or secrets.token_urlsafe(32)
    values |= {"next": local_path(next), "form_token": form_token(secret)}
    response = page(request, template, status, error=error, **values)
    name = _named(request, FORM_COOKIE)
    response.set_cookie(name, secret, httponly=True, secure=_is_encrypted(request), samesite="strict")
    return response


def _principal(using: Services, token: str) -> Principal | None:
    """The principal of `token`, or None if it is not valid."""
    try:
        return using.authenticator.read(token)
    except InvalidTokenError:
        return None


def _is_of_another_site(request: Request) -> bool:
    """Whether a page of another site has led here, according to the browser."""
    led_by = request.headers.get("sec-fetch-site")
    if led_by is not None:
        return led_by not in ("none", "same-origin")
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != request.headers.get("host", "").lower()


def _named(request: Request, name: str) -> str:
    """The cookie's full name: over https with a prefix that lets only this host set it."""
    return f"__Host-{name}" if _is_encrypted(request) else name


def _kept(request: Request, name: str) -> str:
    """The value of the cookie `name`; empty if there is none."""
    return request.cookies.get(_named(request, name), "")


def _is_encrypted(request: Request) -> bool:
    """Whether the browser's connection is encrypted, by this server's connection or a proxy's header.

    The header is trusted from anybody: a false one only restricts the sender's own cookie to encrypted connections.
    """
    said = request.headers.get("x-forwarded-proto", "").split(",")[0]  # of the first proxy, next to the browser
    return "https" in (request.scope["scheme"], said.strip().lower())
