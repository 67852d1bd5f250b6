"""Signing in and out of the pages: the token, kept by the browser in a cookie that only pages read.

The cookie lives as long as the token. No script can read it, and no other site can make the browser send it with a
form; every form carries, besides, a value that only a page of ours knows (see `form_token`). Over https its name,
`__Host-…`, tells browsers to keep other hosts of the domain from setting it. The JSON API never reads the cookie.
Nothing is stored on the server: signing out removes the cookie, the token itself ends when it expires.
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

from api_stub.auth import LEEWAY_S, InvalidTokenError, Principal
from api_stub.problems import Problem
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


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who is signed in, and the token that says so."""

    principal: Principal
    token: str

    @property
    def form_token(self) -> str:
        """What a form of this session has to carry."""
        return form_token(self.token)


def signed_in(request: Request, using: Using) -> Session:
    """Who asks for a page, by the cookie or, for scripts, by a bearer token in the Authorization header.

    Otherwise the answer is the form for signing in, which leads back here.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":  # any other is of a proxy in front of us
        session = Session(bearer(request, using), token.strip())
    else:
        token = _kept(request, COOKIE)
        try:
            session = Session(using.authenticator.read(token), token)
        except InvalidTokenError:
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            # A form cannot be posted again after signing in: go back to the page that it was on.
            raise NotSignedInError(
                f"/signin?next={quote(here, safe='')}" if request.method == "GET" else "/signin"
            ) from None
    request.state.session = session
    return session


SignedIn = Annotated[Session, Depends(signed_in)]


def form_token(secret: str) -> str:
    """What proves that a form comes from a page of ours: only who can read the cookie `secret` can compute it."""
    digest = hmac.digest(secret.encode(), b"a form of Holdfast", hashlib.sha256)
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def is_form_of(secret: str, given: str) -> bool:
    """Whether a form that carries `given` comes from a page that was made for `secret`."""
    return bool(secret) and hmac.compare_digest(form_token(secret).encode(), given.encode(errors="replace"))


def checked_form(session: SignedIn, form: Annotated[str, Form()] = "") -> Session:
    """A dependency of everything that changes something: the form is from a page of this session. Otherwise 403."""
    if not is_form_of(session.token, form):
        raise Problem(HTTPStatus.FORBIDDEN, "This form is not from a page of your session. Reload the page.")
    return session


OwnForm = Annotated[Session, Depends(checked_form)]


def local_path(text: str) -> str:
    """`text` if it is a path on this site; otherwise the start page. So no link of ours leads to another site."""
    return text if _LOCAL_PATH.fullmatch(text) else "/"


@router.get("/signin")
def ask(request: Request, using: Using, next: str = "", token: str = "") -> Response:
    """The form. With `token`, as in the link that `holdfast up` prints, signs in right away.

    The answer to that link is a redirection, so that the token is in no history of the browser; and `access_log`
    keeps it out of the log. Anybody may send such a link, to have a visitor work in a session that is not their own:
    on another site it does nothing, and it asks, by a page with a button, before it replaces somebody's session.
    """
    if not token:
        return _form(request, HTTPStatus.OK, next=next)
    if _is_of_another_site(request):
        error = "The link is on another site, so it signs nobody in. Open it by itself, or give the token here."
        return _form(request, HTTPStatus.FORBIDDEN, next=next, error=error)
    present, other = _principal(using, _kept(request, COOKIE)), _principal(using, token)
    if present is not None and other is not None and present != other:
        names = {"present": present.subject, "other": other.subject}
        return _form(request, HTTPStatus.OK, next=next, template="other_session.html", token=token, **names)
    return _sign_in(request, using, token=token, next=next)


@router.post("/signin")
def sign_in(
    request: Request,
    using: Using,
    token: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "",
    form: Annotated[str, Form()] = "",
) -> Response:
    """Keep the token in the cookie, and go on to `next`."""
    if not is_form_of(_kept(request, FORM_COOKIE), form):
        return _form(request, HTTPStatus.FORBIDDEN, next=next, error="The form was out of date. Please try once more.")
    return _sign_in(request, using, token=token.strip(), next=next)


@router.post("/signout")
def sign_out(request: Request, _: OwnForm) -> Response:
    """Remove the cookie."""
    response = see_other("/signin")
    response.delete_cookie(_named(request, COOKIE), httponly=True, secure=_is_encrypted(request), samesite="lax")
    return response


def _sign_in(request: Request, using: Services, *, token: str, next: str) -> Response:
    try:
        using.authenticator.read(token)
    except InvalidTokenError as error:
        return _form(request, HTTPStatus.UNAUTHORIZED, next=next, error=f"{str(error).capitalize()}.")
    if len(token) > MAX_COOKIE_BYTES:
        sentence = f"The token is longer than a browser can keep ({MAX_COOKIE_BYTES:,} bytes)."
        return _form(request, HTTPStatus.UNAUTHORIZED, next=next, error=sentence)
    # It has just been verified, and a Principal does not say when it ends.
    expiry = int(jwt.decode(token, options={"verify_signature": False})["exp"])
    response = see_other(local_path(next))
    response.set_cookie(
        _named(request, COOKIE),
        token,
        max_age=min(expiry + LEEWAY_S - int(datetime.now(UTC).timestamp()), MAX_COOKIE_AGE_S),
        httponly=True,
        secure=_is_encrypted(request),
        samesite="lax",  # strict would ask whoever follows a link from a mail to sign in again
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
    """Whoever `token` speaks for, if it is valid."""
    try:
        return using.authenticator.read(token)
    except InvalidTokenError:
        return None


def _is_of_another_site(request: Request) -> bool:
    """Whether a page that is not ours has led here, as far as the browser tells."""
    led_by = request.headers.get("sec-fetch-site")
    if led_by is not None:
        return led_by not in ("none", "same-origin")
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != request.headers.get("host", "").lower()


def _named(request: Request, name: str) -> str:
    """What the cookie `name` is called: over https as browsers take it from this host alone."""
    return f"__Host-{name}" if _is_encrypted(request) else name


def _kept(request: Request, name: str) -> str:
    """What the browser keeps in the cookie `name`; empty: nothing."""
    return request.cookies.get(_named(request, name), "")


def _is_encrypted(request: Request) -> bool:
    """Whether the browser's connection is encrypted, as this server sees it or as a proxy in front of it says.

    Anybody's word is taken for that: a cookie that is sent over encrypted connections alone harms only who lied.
    """
    said = request.headers.get("x-forwarded-proto", "").split(",")[0]  # the first proxy's word: the browser's end
    return "https" in (request.scope["scheme"], said.strip().lower())
