"""Whose tokens are accepted: those signed by the key that is configured, with the one algorithm that fits it."""

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from api_stub.auth import LEEWAY_S, Authenticator, InvalidTokenError
from ledger.settings import Settings, SettingsError

KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
SECRET = "a secret of at least thirty-two characters"


def pem(private_key: Any) -> str:
    text: bytes = private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return text.decode()


def token(key: Any, algorithm: str, **claims: object) -> str:
    expires_at = datetime.now(UTC) + timedelta(minutes=5)
    return jwt.encode({"sub": "ann", "orgs": ["acme"], "exp": expires_at, **claims}, key, algorithm=algorithm)


def settings(**given: Any) -> Settings:
    return Settings(**given)


@pytest.mark.parametrize("algorithm", KEYS)
def test_only_who_has_the_private_key_signs(algorithm: str) -> None:
    public_key = pem(KEYS[algorithm])
    reader = Authenticator.from_settings(settings(jwt_public_key=public_key))
    assert reader.read(token(KEYS[algorithm], algorithm)).subject == "ann"
    others = {name: token(key, name) for name, key in KEYS.items() if name != algorithm}
    with_the_public_key_as_secret = jwt.api_jws.PyJWS()
    with_the_public_key_as_secret._algorithms["HS256"].prepare_key = str.encode  # type: ignore[method-assign,assignment]
    others["HS256"] = with_the_public_key_as_secret.encode(b"{}", public_key, "HS256")
    others["none"] = jwt.encode({"sub": "ann"}, None, algorithm="none")  # type: ignore[arg-type]
    head, _, signature = token(KEYS[algorithm], algorithm).split(".")
    others["changed"] = ".".join([head, token(KEYS[algorithm], algorithm, orgs="*").split(".")[1], signature])
    others |= {f"{name}, not signed": f"{made.rpartition('.')[0]}." for name, made in others.items()}
    for made in others.values():
        with pytest.raises(InvalidTokenError, match="the token is not valid"):
            reader.read(made)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("-----BEGIN PUBLIC KEY-----\ngarbage\n-----END PUBLIC KEY-----", "cannot be read"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "must be an RSA, a P-256 or an Ed25519 key"),
        (pem(rsa.generate_private_key(65537, 1024)), "must have at least 2,048 bits as an RSA key; it has 1,024"),
    ],
    ids=["garbage", "P-384", "RSA-1024"],
)
def test_a_key_that_is_no_good_is_refused_at_the_start(key: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=f"^HOLDFAST_JWT_PUBLIC_KEY {problem}[^\n]*$"):
        Authenticator.from_settings(settings(jwt_public_key=key))


def test_the_public_key_goes_before_the_secret() -> None:
    both = Authenticator.from_settings(settings(jwt_secret=SECRET, jwt_public_key=pem(KEYS["RS256"])))
    assert both.read(token(KEYS["RS256"], "RS256")).subject == "ann"
    with pytest.raises(InvalidTokenError):
        both.read(token(SECRET, "HS256"))


def test_while_keys_change_tokens_of_both_are_accepted_and_no_others() -> None:
    new, old, stranger = (ed25519.Ed25519PrivateKey.generate() for _ in range(3))
    both = Authenticator.from_settings(settings(jwt_public_key=pem(new) + pem(old)))
    for key in (new, old):
        assert both.read(token(key, "EdDSA")).subject == "ann"
        with pytest.raises(InvalidTokenError, match="the token has expired"):
            both.read(token(key, "EdDSA", exp=1))
    with pytest.raises(InvalidTokenError, match="the token is not valid"):
        both.read(token(stranger, "EdDSA"))
    of_two_kinds = f"the new one\n{pem(KEYS['ES256'])}\r\n{pem(old)}"
    other_kind = Authenticator.from_settings(settings(jwt_public_key=of_two_kinds))
    for made in (token(KEYS["ES256"], "ES256"), token(old, "EdDSA")):
        assert other_kind.read(made).subject == "ann"
    for made in (token(KEYS["RS256"], "RS256"), token(stranger, "EdDSA"), token(SECRET, "HS256")):
        with pytest.raises(InvalidTokenError, match="the token is not valid"):
            other_kind.read(made)


def test_one_of_two_keys_that_is_no_good_is_refused_at_the_start() -> None:
    good, bad = pem(KEYS["RS256"]), "-----BEGIN PUBLIC KEY-----\n"
    for both in (good + bad, bad + good):
        with pytest.raises(SettingsError, match="cannot be read"):
            Authenticator.from_settings(settings(jwt_public_key=both))


@pytest.mark.parametrize(
    ("claims", "problem"),
    [
        ({"exp": None}, 'the token has no "exp"'),
        ({"exp": "tomorrow"}, "the token is not valid"),
        ({"exp": float("inf")}, "the token is not valid"),
        ({"exp": True}, "the token has expired"),
        ({"sub": 7}, "the token is not valid"),
        ({"sub": "a\nb"}, 'the token\'s "sub" must not contain control characters'),
        ({"orgs": "acme"}, 'the token\'s "orgs" must be a list of organizations, or "\\*"'),
        ({"orgs": ["acme", 7]}, 'the token\'s "orgs" must be a list of organizations, or "\\*"'),
        ({"orgs": None}, 'the token\'s "orgs" must be a list of organizations, or "\\*"'),
        ({"orgs": {"acme": 1}}, 'the token\'s "orgs" must be a list of organizations, or "\\*"'),
        ({"scope": ["credits:read"]}, 'the token\'s "scope" must be a string'),
        ({"scope": None}, 'the token\'s "scope" must be a string'),
    ],
    ids=str,
)
def test_a_claim_of_the_wrong_type_is_refused(claims: dict[str, Any], problem: str) -> None:
    reader = Authenticator.from_settings(settings(jwt_secret=SECRET))
    with pytest.raises(InvalidTokenError, match=f"^{problem}$"):
        reader.read(token(SECRET, "HS256", **claims))


def test_what_a_token_leaves_out_gives_no_right() -> None:
    reader = Authenticator.from_settings(settings(jwt_secret=SECRET))
    nobody = reader.read(jwt.encode({"exp": datetime.now(UTC) + timedelta(minutes=5)}, SECRET))
    assert (nobody.subject, nobody.orgs, nobody.scopes) == ("unknown", frozenset(), frozenset())

    star_in_a_list = reader.read(token(SECRET, "HS256", orgs=["*"]))
    assert not star_in_a_list.may_see("acme")


@pytest.mark.parametrize(
    ("scope", "rights"),
    [
        ("operator", {"operator", "operator:read"}),
        ("operator:read", {"operator:read"}),
        ("credits:read operators", {"credits:read", "operators"}),
        ("wallet:write workflows:write", {"wallet:write", "workflows:write"}),
    ],
)
def test_whoever_may_act_as_an_operator_may_see_what_operators_see(scope: str, rights: set[str]) -> None:
    reader = Authenticator.from_settings(settings(jwt_secret=SECRET))
    assert reader.read(token(SECRET, "HS256", scope=scope)).scopes == rights


@pytest.mark.parametrize(
    ("claim", "off_s", "problem"),
    [
        ("nbf", LEEWAY_S - 10, None),
        ("iat", LEEWAY_S - 10, None),
        ("exp", 10 - LEEWAY_S, None),
        ("nbf", LEEWAY_S + 10, "the token is not valid yet"),
        ("iat", LEEWAY_S + 10, "the token is not valid yet"),
        ("exp", -LEEWAY_S - 10, "the token has expired"),
    ],
)
def test_clocks_may_differ_a_little(claim: str, off_s: int, problem: str | None) -> None:
    reader = Authenticator.from_settings(settings(jwt_secret=SECRET))
    made = token(SECRET, "HS256", **{claim: datetime.now(UTC) + timedelta(seconds=off_s)})
    with nullcontext() if problem is None else pytest.raises(InvalidTokenError, match=f"^{problem}$"):
        reader.read(made)


@pytest.mark.parametrize("nobody", ["", " "])
def test_what_is_done_is_done_by_somebody(nobody: str) -> None:
    authenticator = Authenticator.from_settings(settings(jwt_secret=SECRET))
    with pytest.raises(InvalidTokenError, match="must not be empty"):
        authenticator.read(token(SECRET, "HS256", sub=nobody))


@pytest.mark.parametrize("algorithm", ["HS256", "ES256"])
@pytest.mark.parametrize(
    "repeated", ['"orgs": "*"', '"\\u006frgs": "*"', '"exp": 9999999999', '"more": [{"a": 1, "a": 1}]']
)
def test_a_token_that_names_a_claim_twice_says_nothing(algorithm: str, repeated: str) -> None:
    key = SECRET if algorithm == "HS256" else KEYS[algorithm]
    given = settings(jwt_secret=SECRET) if algorithm == "HS256" else settings(jwt_public_key=pem(key))
    reader = Authenticator.from_settings(given)
    claims = '{"sub": "ann", "orgs": ["acme"], "exp": 9999999999'
    assert reader.read(jwt.api_jws.encode(f"{claims}}}".encode(), key, algorithm)).orgs == frozenset({"acme"})
    with pytest.raises(InvalidTokenError, match=r"^the token names a claim more than once$"):
        reader.read(jwt.api_jws.encode(f"{claims}, {repeated}}}".encode(), key, algorithm))


@pytest.mark.parametrize("payload", ["[]", "1", "{", "[" * 100_000])
def test_a_token_whose_payload_is_no_object_is_not_valid(payload: str) -> None:
    reader = Authenticator.from_settings(settings(jwt_secret=SECRET))
    with pytest.raises(InvalidTokenError, match=r"^the token is not valid$"):
        reader.read(jwt.api_jws.encode(payload.encode(), SECRET, "HS256"))
