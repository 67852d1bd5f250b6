"""docs/signing-in.md is a contract: its program signs in to the real API, and each of its tables is as the code is."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import jwt
import pytest

from api_stub import auth
from api_stub.auth import LEEWAY_S, Authenticator, InvalidTokenError, Scope
from api_stub.sessions import MAX_COOKIE_BYTES
from ledger.settings import MAX_PRODUCT_NAME, Settings
from tests.acceptance.website import HISTORY, SECRET, SESSION, Visitor, history_of, served, token
from tests.installation import Installation
from tests.support import PATIENCE_S

PAGE = (Path(__file__).parents[2] / "docs" / "signing-in.md").read_text()
PROGRAM, WITH_A_SECRET = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
[MAKING_KEYS] = re.findall(r"^```shell\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(heading: str, number: int = 0) -> dict[str, str]:
    """The first column of a table, and the rest of each row."""
    tables = re.findall(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", section(heading), re.MULTILINE)
    rows = [row.strip("| ").split(" | ", 1) for row in tables[number].splitlines()]
    return {first.replace("`", ""): rest for first, rest in rows}


def make_keys(folder: Path) -> str:
    """The public key of a pair that is made as the page says."""
    subprocess.run(["sh", "-euc", MAKING_KEYS], cwd=folder, check=True, capture_output=True)
    return (folder / "public-key.pem").read_text()


def links(program: str, folder: Path, address: str) -> list[str]:
    """What the program prints."""
    env = {**os.environ, "API_URL": address, "HOLDFAST_JWT_SECRET": SECRET}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


def assert_it_signs_in(link: str, address: str) -> None:
    with Visitor(base_url=address) as visitor:
        signed_in = visitor.get(link)
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, HISTORY)
        page = visitor.get(HISTORY)
        assert (page.status_code, "Signed in as </span>ann@acme.example" in page.text) == (200, True)
        assert visitor.get(history_of("other")).status_code == 404
        header = {"Authorization": f"Bearer {visitor.cookies[SESSION]}"}
        assert visitor.get("/api/organizations/acme/credits", headers=header).status_code == 200
        assert visitor.get("/api/organizations/other/credits", headers=header).status_code == 404
        assert visitor.post("/api/organizations/acme/workflows/run/cancel", json={}, headers=header).status_code == 403


def test_the_program_is_an_identity_provider_of_twenty_lines(ledger: Installation, tmp_path: Path) -> None:
    assert len([line for line in PROGRAM.splitlines() if line]) <= 20
    public_key = make_keys(tmp_path)
    with served(ledger.database_url, ledger.broker_url, jwt_public_key=public_key) as address:
        [link] = links(PROGRAM, tmp_path, address)
        assert_it_signs_in(link, address)


def test_with_the_other_line_it_works_with_a_secret(address: str, tmp_path: Path) -> None:
    program, replaced = re.subn(r"^KEY, ALGORITHM = .*\n", WITH_A_SECRET, PROGRAM, flags=re.MULTILINE)
    assert replaced == 1
    [link] = links(program, tmp_path, address)
    assert_it_signs_in(link, address)


def test_keys_change_and_nobody_signs_in_again(ledger: Installation, tmp_path: Path) -> None:
    kept = []
    keys = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        keys.append(make_keys(tmp_path / name))
        [link] = links(PROGRAM, tmp_path / name, "http://site")
        kept.append({SESSION: re.findall("token=([^&]+)", link)[0]})
    old, new = keys
    for accepted, statuses in ((old, (200, 303)), (new + old, (200, 200)), (new, (303, 200))):
        with served(ledger.database_url, ledger.broker_url, jwt_public_key=accepted) as address:
            for cookies, status in zip(kept, statuses, strict=True):
                with Visitor(base_url=address, cookies=cookies) as visitor:
                    assert visitor.get(HISTORY).status_code == status


WRONG: dict[str, Any] = {
    "The token has expired.": {"exp": int(time.time()) - LEEWAY_S - 5},
    "The token is not valid yet.": {"iat": int(time.time()) + 3_600},
    'The token has no "exp".': {"exp": None},
    'The token is for another service: its "aud" is not the expected one.': {"aud": "another"},
    'The token is of another issuer: its "iss" is not the expected one.': {"iss": "another"},
    'The token\'s "orgs" must be a list of organizations, or "*".': {"orgs": "acme"},
    'The token\'s "scope" must be a string.': {"scope": ["credits:read"]},
    'The token\'s "sub" must not be empty.': {"sub": " "},
    'The token\'s "sub" must not contain control characters.': {"sub": "a\nb"},
    "The token is not valid.": {"sub": 7},
}
"""Claims that lead to the sentence."""

ELSEWHERE = {
    "The token names a claim more than once.",  # tests/unit/test_auth.py
    "The token is longer than a browser can keep (4,000 bytes).",  # test_sessions.py
}


def test_every_sentence_of_a_refusal_is_that_of_the_api(ledger: Installation) -> None:
    sentences = table("What is refused")
    assert set(sentences) == set(WRONG) | ELSEWHERE
    settings = {"jwt_audience": "credits", "jwt_issuer": "https://login.example"}
    right = {"aud": ["credits", "more"], "iss": "https://login.example"}
    with served(ledger.database_url, ledger.broker_url, **settings) as address, Visitor(base_url=address) as visitor:

        def ask(**claims: Any) -> Any:
            header = {"Authorization": f"Bearer {token(**{**right, **claims})}"}
            return visitor.get("/api/organizations/acme/credits", headers=header)

        assert ask().status_code == 200
        assert {sentence: ask(**claims).json()["detail"] for sentence, claims in WRONG.items()} == {
            sentence: sentence for sentence in WRONG
        }
        assert ask(scope="workflows:write").status_code == 403
        assert ask(orgs=["other"]).status_code == 404


def test_the_scopes_are_those_of_the_code() -> None:
    assert set(get_args(Scope)) <= set(table("The token", 1)) <= {*get_args(Scope), "wallet:write"}


def test_the_claims_are_those_that_are_read() -> None:
    read = set(re.findall(r'claims\.get\("(\w+)"', Path(auth.__file__).read_text()))
    documented = {name for names in table("The token") for name in names.split(", ")}
    assert documented == read | {"exp", "iat", "nbf", "aud", "iss"}


def test_what_the_page_says_of_bounds_and_settings_is_so() -> None:
    assert f"differ by {LEEWAY_S} seconds" in PAGE
    assert f"at most {MAX_COOKIE_BYTES:,} bytes" in PAGE
    assert f"at most {MAX_PRODUCT_NAME} characters" in PAGE
    settings = {f"HOLDFAST_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"HOLDFAST_\w+", PAGE)) <= settings
    reader = Authenticator.from_settings(Settings(jwt_secret=SECRET))
    star = reader.read(jwt.encode({"exp": 4e9, "orgs": "*"}, SECRET))
    assert star.may_see("acme")
    with pytest.raises(InvalidTokenError):
        reader.read(jwt.encode({"exp": 4e9}, SECRET * 2, algorithm="HS512"))
