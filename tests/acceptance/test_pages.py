"""What all web pages have in common: who sees what, what they load, and what they refuse."""

import re
import socket
from html import unescape
from typing import Any

import pytest
from markupsafe import escape

from api_stub.sessions import form_token
from tests.acceptance.website import HISTORY, LETTERS, Visitor, history_of, served, token
from tests.installation import Installation
from worker.local.embedded import Embedded

POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@pytest.mark.parametrize("suffix", ["", ".csv"])
@pytest.mark.parametrize(
    ("claims", "status", "sentence"),
    [
        ({"orgs": ["other"]}, 404, "There is no such organization, or it is not yours"),
        ({"scope": "workflows:write"}, 403, "You may not see credits"),
        (
            {"orgs": ["other"], "scope": ""},
            404,
            "There is no such organization, or it is not yours",
        ),
    ],
)
def test_a_page_that_is_not_for_the_token_says_so(
    visitor: Visitor, claims: dict[str, Any], status: int, sentence: str, suffix: str
) -> None:
    visitor.sign_in(token(**claims))
    refused = visitor.get(HISTORY + suffix)
    assert (refused.status_code, sentence in refused.text) == (status, True)
    assert refused.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("strange", ["%00", "%3Cb%3E", "%ff", "a%20b", "x" * 129, "acme/else"])
def test_what_cannot_be_an_organization_does_not_exist(visitor: Visitor, strange: str) -> None:
    visitor.sign_in(token(orgs="*"))
    refused = visitor.get(f"/organizations/{strange}/credit-history")
    assert (refused.status_code, "<h1>There is no such " in refused.text) == (404, True)
    assert "<b>" not in refused.text


@pytest.mark.parametrize(
    "path", ["/signin", HISTORY, f"{HISTORY}.csv", f"{HISTORY}?limit=0", "/organizations/x", "/operators", LETTERS]
)
def test_every_answer_allows_no_script_and_is_kept_by_nobody(visitor: Visitor, path: str) -> None:
    for signed_in in (False, True):
        if signed_in:
            visitor.sign_in(token(scope="credits:read operator"))
        headers = visitor.get(path).headers
        assert headers["content-security-policy"] == POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_a_page_loads_nothing_from_elsewhere_and_what_it_loads_is_there(customer: Visitor, org_id: str) -> None:
    page = customer.get(history_of(org_id))
    loaded = re.findall(r'(?:src|href|action)="([^"]*)"', page.text)
    assert [address for address in loaded if not address.startswith(("/", "#"))] == []
    assert "<script" not in page.text
    assert "style=" not in page.text
    for address in (address for address in loaded if address.startswith("/static/")):
        asset = customer.get(address)
        assert asset.status_code == 200
        assert asset.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert asset.headers["x-content-type-options"] == "nosniff"
        assert "http" not in asset.text.replace("http://www.w3.org/2000/svg", "")


def test_a_form_that_is_too_large_or_of_unknown_length_is_refused(visitor: Visitor) -> None:
    assert visitor.post("/signin", data={"token": "x" * 70_000}).status_code == 413
    assert visitor.post("/signin", content=iter([b"token=x"])).status_code == 411


def test_without_its_database_a_page_asks_to_try_again(services: Embedded) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://user:sekrit@127.0.0.1:{bound.getsockname()[1]}/none"
        with served(url, services.broker_url) as address, Visitor(base_url=address) as visitor:
            visitor.sign_in(token())
            for path in (HISTORY, f"{HISTORY}.csv", f"{HISTORY}?event_type=usage&amp;limit=5"):
                failed = visitor.get(unescape(path))
                assert (failed.status_code, failed.headers["retry-after"]) == (503, "5")
                assert "No credits are lost" in failed.text
                assert f'<a href="{path}">Try again</a>' in failed.text
                assert "sekrit" not in failed.text
            staff = token(scope="operator")
            visitor.sign_in(staff)
            failed = visitor.post(f"{LETTERS}/1/discard", data={"form": form_token(staff), "reason": "a test"})
            assert (failed.status_code, "Try again" in failed.text) == (503, False)


@pytest.mark.parametrize("name", ['Acme <b>Credits</b> & "Söhne"', "{{ 7 * 7 }}", "x" * 40])
def test_every_page_has_the_name_of_the_product_as_text(ledger: Installation, name: str) -> None:
    with (
        served(ledger.database_url, ledger.broker_url, product_name=name) as address,
        Visitor(base_url=address) as visitor,
    ):
        form = visitor.get("/signin")
        as_text = str(escape(name))
        assert f"<h1>Sign in to {as_text}</h1>" in form.text
        visitor.sign_in(token(orgs=["acme", "other"], scope="credits:read operator"))
        pages = [visitor.get(path) for path in ("/operators", "/?organization=x", HISTORY, LETTERS, "/nowhere")]
        for page in [form, *pages]:
            assert re.findall(r"<title>[^<]+ · ([^<]*)</title>", page.text) == [as_text]
            assert re.findall(r'<a class="brand".*</svg>([^<]*)</a>', page.text) == [as_text]
            assert "Holdfast" not in page.text
