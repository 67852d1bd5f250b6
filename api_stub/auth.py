"""Authentication and authorization: a JSON Web Token in the Authorization header or, for pages, in a cookie.

A token names organizations (`orgs`: a list, or "*") and scopes (`scope`: separated by spaces). Any other organization
does not exist for it. The audience (`aud`) and the issuer (`iss`) of a token are checked only if the settings name
them. An identity provider that signs for several services with one key requires that.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from ledger.settings import Settings, SettingsError

Scope = Literal["credits:read", "workflows:write", "wallet:write", "operator:read", "operator"]
"""The rights of a token: to read credits, to send the messages of workflows, to send those of wallets, to see the pages
of operators, or to act there, for all organizations. `operator` includes `operator:read`; no other includes another."""

_INCLUDED: dict[str, Scope] = {"operator": "operator:read"}
"""The scope that another one includes."""

LEEWAY_S = 30
"""The largest difference between our clock and that of the signer of tokens."""

MIN_RSA_BITS = 2_048
"""The shortest RSA key that RFC 7518, section 3.3, allows."""

_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters and halves of surrogate pairs, which neither a page nor the database can hold."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The user or system that a valid token is for, with its rights."""

    subject: str
    orgs: frozenset[str] | Literal["*"]
    scopes: frozenset[str]
    """Those that the token names, and those that they include."""

    def may_see(self, org_id: str) -> bool:
        """Whether the organization exists for this principal."""
        return self.orgs == "*" or org_id in self.orgs


class InvalidTokenError(Exception):
    """The token is missing, malformed, expired, not for us or not signed for us. The text does not contain it."""


class ExpiredTokenError(InvalidTokenError):
    """The token is no longer valid."""


class EarlyTokenError(InvalidTokenError):
    """The token is not valid yet: its signer's clock, or ours, is wrong by more than LEEWAY_S."""


class _PyJWT(jwt.PyJWT):
    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        """As the base class, which intends this override, but refuses a name that occurs twice in an object."""
        try:
            payload = json.loads(decoded["payload"], object_pairs_hook=_claims)
        except (ValueError, RecursionError):
            raise jwt.DecodeError from None
        if not isinstance(payload, dict):
            raise jwt.DecodeError
        return payload


def _claims(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # the issuer may have meant another of the values than we would read
        raise InvalidTokenError("the token names a claim more than once")
    return found


def _with_included(scopes: list[str]) -> frozenset[str]:
    return frozenset(scopes).union(_INCLUDED[scope] for scope in scopes if scope in _INCLUDED)


_JWT = _PyJWT()

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Authenticator:
    """Reads tokens signed with a shared secret (HS256) or with the private half of a public key."""

    keys: tuple[tuple[str | PublicKey, str], ...]
    """Each with its only algorithm: with a choice, anybody could sign with the public key as a secret."""
    audience: str | None = None
    """The value that `aud` must be or contain; None: not checked."""
    issuer: str | None = None
    """The value that `iss` must be; None: not checked."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Use `jwt_public_key`, else `jwt_secret`. Raises SettingsError if neither is set, or a key is unsuitable."""
        keys: tuple[tuple[str | PublicKey, str], ...]
        if settings.jwt_public_key is not None:
            keys = tuple(map(_public_key, _BEFORE_A_KEY.split(settings.jwt_public_key)[1:]))
        elif settings.jwt_secret is not None:
            keys = ((settings.jwt_secret.get_secret_value(), "HS256"),)
        else:
            raise SettingsError("HOLDFAST_JWT_SECRET is not set, nor HOLDFAST_JWT_PUBLIC_KEY: set one of them")
        return cls(keys, settings.jwt_audience, settings.jwt_issuer)

    def read(self, token: str) -> Principal:
        """Return the principal of a token. Raises InvalidTokenError."""
        try:
            claims = self._verified(token)
        except jwt.ExpiredSignatureError:
            raise ExpiredTokenError("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise EarlyTokenError("the token is not valid yet") from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidTokenError(f'the token has no "{error.claim}"') from None
        except jwt.InvalidAudienceError:
            raise InvalidTokenError('the token is for another service: its "aud" is not the expected one') from None
        except jwt.InvalidIssuerError:
            raise InvalidTokenError('the token is of another issuer: its "iss" is not the expected one') from None
        except jwt.InvalidTokenError:
            raise InvalidTokenError("the token is not valid") from None
        subject = str(claims.get("sub", "unknown"))
        if not subject.strip():
            raise InvalidTokenError('the token\'s "sub" must not be empty')
        if _UNWRITABLE.search(subject):
            raise InvalidTokenError('the token\'s "sub" must not contain control characters')
        orgs = claims.get("orgs", [])
        if orgs != "*" and not (isinstance(orgs, list) and all(isinstance(org_id, str) for org_id in orgs)):
            raise InvalidTokenError('the token\'s "orgs" must be a list of organizations, or "*"')
        if any(map(_UNWRITABLE.search, orgs)):
            raise InvalidTokenError('the token\'s "orgs" must not contain control characters')
        scope = claims.get("scope", "")
        if not isinstance(scope, str):
            raise InvalidTokenError('the token\'s "scope" must be a string')
        return Principal(
            subject=subject,
            orgs="*" if orgs == "*" else frozenset(orgs),
            scopes=_with_included(scope.split()),
        )

    def _verified(self, token: str) -> dict[str, Any]:
        """The claims of a token that one of the keys has signed, and that is for us now. Raises InvalidTokenError."""
        strange = jwt.InvalidTokenError()
        for key, algorithm in self.keys:
            try:
                return _JWT.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    leeway=LEEWAY_S,
                    audience=self.audience,
                    issuer=self.issuer,
                    # By default, PyJWT refuses every audience if none is expected.
                    options={"require": ["exp"], "verify_aud": self.audience is not None},
                )
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError) as error:
                strange = error
        raise strange


_BEFORE_A_KEY = re.compile("(?=-----BEGIN)")


def _public_key(pem: str) -> tuple[PublicKey, str]:
    """The key, and the algorithm of its signatures. Raises SettingsError."""
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError("HOLDFAST_JWT_PUBLIC_KEY cannot be read: it is not a public key in PEM format") from None
    match key:
        case RSAPublicKey() if key.key_size < MIN_RSA_BITS:
            bits = f"at least {MIN_RSA_BITS:,} bits as an RSA key; it has {key.key_size:,}"
            raise SettingsError(f"HOLDFAST_JWT_PUBLIC_KEY must have {bits}")
        case RSAPublicKey():
            return key, "RS256"
        case EllipticCurvePublicKey(curve=SECP256R1()):
            return key, "ES256"
        case Ed25519PublicKey():
            return key, "EdDSA"
    raise SettingsError("HOLDFAST_JWT_PUBLIC_KEY must be an RSA, a P-256 or an Ed25519 key")


def sign(
    secret: str,
    *,
    orgs: list[str] | Literal["*"],
    scopes: list[str],
    subject: str,
    expires_in_s: int,
    audience: str | None = None,
    issuer: str | None = None,
) -> str:
    """A token for development, signed with the shared secret."""
    claims: dict[str, Any] = {
        "sub": subject,
        "orgs": orgs,
        "scope": " ".join(scopes),
        "exp": datetime.now(UTC) + timedelta(seconds=expires_in_s),
    }
    claims |= {name: value for name, value in (("aud", audience), ("iss", issuer)) if value is not None}
    return jwt.encode(claims, secret, algorithm="HS256")
