"""Who asks, and what they may see: a JSON Web Token in the Authorization header or, for pages, in a cookie.

A token names organizations (`orgs`: a list, or "*") and scopes (`scope`: separated by spaces). An organization that is
not the token's does not exist for it.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

import jwt

from ledger.settings import Settings, SettingsError

Scope = Literal["credits:read", "workflows:write", "operator"]
"""What a token lets its bearer do: read credits, report workflows, or see and mend what failed in all organizations."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a valid token speaks for."""

    subject: str
    orgs: frozenset[str] | Literal["*"]
    scopes: frozenset[str]

    def may_see(self, org_id: str) -> bool:
        """Whether the organization exists for this principal."""
        return self.orgs == "*" or org_id in self.orgs


class InvalidTokenError(Exception):
    """The token is missing, malformed, expired, or not signed by us; the text says which, without the token."""


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Reads tokens signed with a shared secret (HS256) or with the private half of a public key."""

    key: str
    algorithms: tuple[str, ...]

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """With `jwt_public_key` or else `jwt_secret`. Raises SettingsError if neither is set."""
        if settings.jwt_public_key is not None:
            # Only asymmetric ones: with HS256 in the list, anybody could sign with the public key.
            return cls(settings.jwt_public_key, ("RS256", "ES256", "EdDSA"))
        if settings.jwt_secret is None:
            raise SettingsError("HOLDFAST_JWT_SECRET is not set (nor HOLDFAST_JWT_PUBLIC_KEY): nobody could sign in")
        return cls(settings.jwt_secret.get_secret_value(), ("HS256",))

    def read(self, token: str) -> Principal:
        """Who the token speaks for. Raises InvalidTokenError."""
        try:
            claims = jwt.decode(token, self.key, algorithms=list(self.algorithms), options={"require": ["exp"]})
        except jwt.ExpiredSignatureError:
            raise InvalidTokenError("the token has expired") from None
        except jwt.InvalidTokenError:
            raise InvalidTokenError("the token is not valid") from None
        orgs = claims.get("orgs", [])
        if orgs != "*" and not (isinstance(orgs, list) and all(isinstance(org_id, str) for org_id in orgs)):
            raise InvalidTokenError('the token\'s "orgs" must be a list of organizations, or "*"')
        scope = claims.get("scope", "")
        if not isinstance(scope, str):
            raise InvalidTokenError('the token\'s "scope" must be a string')
        return Principal(
            subject=str(claims.get("sub", "unknown")),
            orgs="*" if orgs == "*" else frozenset(orgs),
            scopes=frozenset(scope.split()),
        )


def sign(secret: str, *, orgs: list[str] | Literal["*"], scopes: list[str], subject: str, expires_in_s: int) -> str:
    """A token for development, signed with the shared secret."""
    claims: dict[str, Any] = {
        "sub": subject,
        "orgs": orgs,
        "scope": " ".join(scopes),
        "exp": datetime.now(UTC) + timedelta(seconds=expires_in_s),
    }
    return jwt.encode(claims, secret, algorithm="HS256")
