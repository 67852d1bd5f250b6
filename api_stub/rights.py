"""The principal of a request, by its token, and whether it has a scope for an organization."""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPBearer

from api_stub.auth import InvalidTokenError, Principal, Scope
from api_stub.problems import OnPage, Problem
from api_stub.queries import refuse_others
from api_stub.services import Using
from holdfast_client.messages import ID_PATTERN, WORKFLOW_TASKS

NO_ORGANIZATION = "There is no such organization, or this token does not name it (orgs)."
"""One sentence for both, so that nobody learns which organizations exist."""

_NOT_YOURS = OnPage(
    "There is no such organization, or it is not yours",
    "Check the address. If it is your organization, ask whoever gave you the link for one that opens it.",
)
NO_ACCESS = OnPage(
    "You may not see credits", "You are signed in, but without that right. Ask whoever gave you the link for it."
)


def bearer(request: Request, using: Using) -> Principal:
    """The principal of the token in the Authorization header. Otherwise the answer is 401."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Problem(HTTPStatus.UNAUTHORIZED, "Send a token: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})
    try:
        return using.authenticator.read(token.strip())
    except InvalidTokenError as error:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise Problem(HTTPStatus.UNAUTHORIZED, f"{str(error).capitalize()}.", challenge) from None


def require(principal: Principal, org_id: str, scope: Scope) -> None:
    """Answer 404 for an organization that is not the principal's, and 403 if the scope is missing."""
    if not re.fullmatch(ID_PATTERN, org_id) or not principal.may_see(org_id):
        raise Problem(HTTPStatus.NOT_FOUND, NO_ORGANIZATION, on_page=_NOT_YOURS)
    if scope not in principal.scopes:
        raise Problem(HTTPStatus.FORBIDDEN, f"The token lacks the scope {scope}.", on_page=NO_ACCESS)


IS_AN_ID = {"pattern": f"^{ID_PATTERN}$"}
"""For the API's description only: an invalid id is answered like one that does not exist."""

OrgId = Annotated[str, Path(alias="orgId", description="The organization's id.", json_schema_extra=IS_AN_ID)]


_SCHEME = HTTPBearer(
    scheme_name="token",
    bearerFormat="JWT",
    description="A JSON Web Token: `orgs`, `scope`, `exp`.",
    auto_error=False,  # it only describes what `bearer` does
)


def organization(scope: Scope) -> Callable[..., str]:
    """A dependency: the organization in the path, for a token with `scope` there. Refuses unknown parameters."""

    def checked(
        request: Request,
        org_id: OrgId,
        principal: Annotated[Principal, Depends(bearer)],
        _: Annotated[object, Security(_SCHEME)],
    ) -> str:
        require(principal, org_id, scope)
        refuse_others(request)
        return org_id

    return checked


def anybody(
    request: Request, principal: Annotated[Principal, Depends(bearer)], _: Annotated[object, Security(_SCHEME)]
) -> Principal:
    """A dependency: the principal, for a request that names no organization in its path. Refuses unknown parameters."""
    refuse_others(request)
    return principal


Caller = Annotated[Principal, Depends(bearer)]
ReadableOrg = Annotated[str, Depends(organization("credits:read"))]
Anybody = Annotated[Principal, Depends(anybody)]


def scope_of(task: str) -> Scope:
    """The scope that a token needs to send a message to `task`."""
    return "workflows:write" if task in WORKFLOW_TASKS else "wallet:write"
