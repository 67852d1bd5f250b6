"""The web pages, served for real, on a real ledger: who sees what, what is on them, and what they refuse."""

import asyncio
import csv
import io
import json
import logging
import math
import re
import socket
import string
import time
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, date, datetime, timedelta
from html import unescape
from itertools import count
from typing import Any
from urllib.parse import quote

import httpx
import jwt
import pytest
from sqlalchemy import Engine

from api_stub import exports, operators
from api_stub.auth import LEEWAY_S
from api_stub.pages import PLACES
from api_stub.rendering import pairs
from ledger import history
from ledger.readable import escaped, readable_json, span
from ledger.store import apply_batch
from tests.acceptance.installation import Installation, installed
from tests.acceptance.website import (
    FUTURE,
    HISTORY,
    LETTERS,
    Visitor,
    app,
    form_token,
    operator_token,
    served,
    serving,
    token,
)
from tests.support import delivery, eventually, sql
from worker.local.embedded import Embedded

SESSION = "holdfast_session"
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
COLUMNS = (
    "created_at,event_type,source,project_id,activity_name,credits,prepaid_balance_after,period_usage_after,metadata"
)
_numbers = count(1)


@pytest.fixture(scope="module")
def ledger(services: Embedded) -> Iterator[Installation]:
    """A ledger of this module's own, without a worker; every test has organizations of its own."""
    with installed(services) as own:
        yield own


@pytest.fixture(scope="module")
def address(ledger: Installation) -> Iterator[str]:
    with served(ledger.database_url, ledger.broker_url) as address:
        yield address


@pytest.fixture
def visitor(address: str) -> Iterator[Visitor]:
    """Somebody who is not signed in."""
    with Visitor(base_url=address) as visitor:
        yield visitor


@pytest.fixture
def org_id() -> str:
    return f"org-{next(_numbers)}"


@pytest.fixture
def customer(visitor: Visitor, org_id: str) -> Visitor:
    """Somebody who may read the credits of `org_id`."""
    assert visitor.sign_in(token(orgs=[org_id])).status_code == 303
    return visitor


@pytest.fixture
def operator(visitor: Visitor) -> Visitor:
    assert visitor.sign_in(operator_token()).status_code == 303
    return visitor


@pytest.fixture
def letter(ledger: Installation, org_id: str) -> str:
    """The address of a dead letter that is this test's own."""
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p1", "credits": 0}))
    [(number,)] = sql(ledger.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id", org_id=org_id)
    return f"{LETTERS}/{number}"


def write(engine: Engine, org_id: str, *messages: tuple[str, dict[str, Any]]) -> None:
    apply_batch(engine, [delivery(task, org_id=org_id, **fields) for task, fields in messages])


def history_of(org_id: str) -> str:
    return f"/organizations/{org_id}/credit-history"


def figures(page: httpx.Response) -> dict[str, str]:
    return dict(re.findall(r'data-figure="(\w+)">.*?<strong>([^<]*)</strong>', page.text, re.DOTALL))


def text_of(fragment: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", fragment)).split())


def rows(page: httpx.Response) -> list[list[str]]:
    """The cells of the events that the page shows."""
    found = re.findall(r'<tr role="row" data-event="\d+">(.*?)</tr>', page.text, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in found]


def shown(page: httpx.Response) -> list[int]:
    """The numbers of the events that the page shows."""
    return [int(number) for number in re.findall(r'data-event="(\d+)"', page.text)]


def link(page: httpx.Response, text: str) -> str | None:
    """Where the link with this text leads."""
    found = re.search(rf'<a href="([^"]*)"[^>]*>{text}</a>', page.text)
    return None if found is None else unescape(found[1])


# Signing in and out


def test_who_is_not_signed_in_is_asked_to_and_led_back(visitor: Visitor) -> None:
    asked = visitor.get(f"{HISTORY}?event_type=usage&limit=5")
    assert asked.status_code == 303
    form = visitor.get(asked.headers["location"])
    assert (form.status_code, "<h1>Sign in</h1>" in form.text) == (200, True)
    assert f'name="next" value="{HISTORY}?event_type=usage&amp;limit=5"' in form.text
    signed_in = visitor.post(
        "/signin", data={"form": form_token(form), "next": f"{HISTORY}?event_type=usage&limit=5", "token": token()}
    )
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, f"{HISTORY}?event_type=usage&limit=5")
    assert visitor.get(signed_in.headers["location"]).status_code == 200


def test_the_cookie_is_kept_from_scripts_and_other_sites_and_ends_with_the_token(visitor: Visitor) -> None:
    signed_at = int(time.time())
    answer = visitor.sign_in(token(exp=signed_at + 600))
    [cookie] = [line for line in answer.headers.get_list("set-cookie") if line.startswith(SESSION)]
    attributes = cookie.split("; ")[1:]
    [age] = [int(name.removeprefix("Max-Age=")) for name in attributes if name.startswith("Max-Age=")]
    assert 600 - math.ceil(time.time() - signed_at) <= age - LEEWAY_S <= 600
    assert sorted(name for name in attributes if "Max-Age" not in name) == ["HttpOnly", "Path=/", "SameSite=lax"]


@pytest.mark.parametrize(
    ("said", "is_secure"),
    [
        ("https", True),
        ("HTTPS", True),
        ("https, http", True),
        ("http, https", False),
        ("http", False),
        ("", False),
        ("https:", False),
    ],
)
def test_behind_a_proxy_with_a_certificate_cookies_are_for_encrypted_connections(
    address: str, said: str, is_secure: bool
) -> None:
    with Visitor(base_url=address, headers={"X-Forwarded-Proto": said}) as visitor:
        for name, answer in (
            (SESSION, visitor.get("/signin", params={"token": token()})),
            ("holdfast_signin", visitor.get("/signin")),
        ):
            cookie, *attributes = answer.headers["set-cookie"].split("; ")
            assert cookie.startswith(f"__Host-{name}=" if is_secure else f"{name}=")
            assert ("Secure" in attributes, "Path=/" in attributes) == (is_secure, True)
            assert not any(attribute.startswith("Domain") for attribute in attributes)


def test_over_https_a_cookie_that_another_host_may_have_set_is_not_read(address: str) -> None:
    with Visitor(base_url=address, cookies={SESSION: token()}) as visitor:
        assert visitor.get(HISTORY).status_code == 200
        assert visitor.get(HISTORY, headers={"X-Forwarded-Proto": "https"}).status_code == 303


def test_over_https_itself_cookies_are_for_encrypted_connections(ledger: Installation) -> None:
    transport = httpx.ASGITransport(app(ledger.database_url, ledger.broker_url))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="https://credits.example") as client:
            return await client.get("/signin", params={"token": token()})

    cookie, *attributes = asyncio.run(ask()).headers["set-cookie"].split("; ")
    assert (cookie, "Secure" in attributes) == (f"__Host-{SESSION}={token()}", True)


def test_behind_a_proxy_a_person_signs_in_does_things_and_signs_out(address: str, letter: str) -> None:
    # What nginx sends on: the name of the site, the browser's own headers, and how the browser is connected.
    headers = {
        "Host": "credits.example",
        "X-Forwarded-Proto": "https",
        "Origin": "https://credits.example",
        "Sec-Fetch-Site": "same-origin",
    }
    with Visitor(base_url=address, headers=headers) as visitor:
        asked = visitor.get(letter)
        form = visitor.get(asked.headers["location"])
        secret = re.search("__Host-holdfast_signin=([^;]+)", form.headers["set-cookie"])
        assert secret is not None
        # As a browser has it, for which all this is https.
        visitor.headers["Cookie"] = f"__Host-holdfast_signin={secret[1]}"
        fields = {"form": form_token(form), "next": letter, "token": operator_token()}
        signed_in = visitor.post("/signin", data=fields)
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, letter)
        visitor.headers["Cookie"] = signed_in.headers["set-cookie"].partition(";")[0]
        fields = {"form": form_token(visitor.get(letter))}
        done = visitor.post(f"{letter}/discard", data={**fields, "reason": "a test"})
        assert (done.status_code, done.headers["location"]) == (303, letter)
        signed_out = visitor.post("/signout", data=fields)
        assert signed_out.headers["location"] == "/signin"
        assert signed_out.headers["set-cookie"].startswith(f"__Host-{SESSION}=")
        assert {"Secure", "Max-Age=0", "Path=/"} <= set(signed_out.headers["set-cookie"].split("; "))


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "/\t/evil.example",
        "javascript:alert(1)",
        "evil",
        "/a b",
        "",
    ],
)
def test_signing_in_never_leads_to_another_site(visitor: Visitor, elsewhere: str) -> None:
    assert visitor.sign_in(token(), next=elsewhere).headers["location"] == "/"
    assert visitor.get("/signin", params={"token": token(), "next": elsewhere}).headers["location"] == "/"


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (token(exp=1), "The token has expired."),
        ("nonsense", "The token is not valid."),
        ("", "The token is not valid."),
        (token(orgs="acme"), "The token&#39;s &#34;orgs&#34; must be a list of organizations, or &#34;*&#34;."),
        (token(orgs=["x" * 120] * 40), "The token is longer than a browser can keep (4,000 bytes)."),
    ],
    ids=["expired", "no token", "nothing", "strange", "long"],
)
def test_a_token_that_cannot_be_used_is_refused_in_a_sentence(visitor: Visitor, bad: str, sentence: str) -> None:
    refused = visitor.sign_in(bad, next=HISTORY)
    assert refused.status_code == 401
    assert f'<p id="wrong">{sentence}</p>' in refused.text
    assert f'name="next" value="{HISTORY}"' in refused.text
    assert not bad or bad not in refused.text
    assert SESSION not in visitor.cookies


def test_a_form_of_another_site_signs_nobody_in(visitor: Visitor) -> None:
    assert visitor.post("/signin", data={"token": token()}).status_code == 403
    visitor.get("/signin")
    refused = visitor.post("/signin", data={"token": token(), "form": "guessed"})
    assert (refused.status_code, SESSION in visitor.cookies) == (403, False)
    assert "The form is out of date. Try again." in refused.text


def test_a_link_with_a_token_signs_in_without_a_page_that_holds_it(visitor: Visitor) -> None:
    answer = visitor.get("/signin", params={"token": token(), "next": HISTORY}, headers={"Sec-Fetch-Site": "none"})
    assert (answer.status_code, answer.headers["location"], answer.text) == (303, HISTORY, "")
    assert visitor.get(HISTORY).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},  # another port
    ],
    ids=str,
)
def test_a_link_with_a_token_on_another_site_is_refused(visitor: Visitor, headers: dict[str, str]) -> None:
    answer = visitor.get("/signin", params={"token": token()}, headers=headers)
    assert (answer.status_code, SESSION in visitor.cookies, token() in answer.text) == (403, False, False)
    assert (
        "The link is on another site, so it does not sign you in. Open it directly, or enter the token here."
        in answer.text
    )


def test_a_link_of_this_site_signs_in(visitor: Visitor, address: str) -> None:
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": address}):
        assert visitor.get("/signin", params={"token": token()}, headers=headers).status_code == 303


def test_a_link_asks_before_it_replaces_a_session(customer: Visitor, org_id: str) -> None:
    before = customer.cookies[SESSION]
    link = {"token": token(sub="<b>eve</b>"), "next": f"{HISTORY}?limit=5"}
    asked = customer.get("/signin", params=link, headers={"Sec-Fetch-Site": "none"})
    assert (asked.status_code, customer.cookies[SESSION]) == (200, before)
    assert "You are signed in as ann. The link signs you in as &lt;b&gt;eve&lt;/b&gt; instead." in asked.text
    fields = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', asked.text))
    assert (fields["token"], unescape(fields["next"])) == (link["token"], link["next"])
    assert customer.post("/signin", data={**fields, "form": "guessed"}).status_code == 403
    assert customer.cookies[SESSION] == before
    done = customer.post("/signin", data={**fields, "next": unescape(fields["next"])})
    assert (done.status_code, done.headers["location"]) == (303, link["next"])
    assert customer.cookies[SESSION] == link["token"]


@pytest.mark.parametrize(
    "kept",
    [
        token(exp=1),
        jwt.encode({"sub": "eve", "orgs": "*", "exp": FUTURE}, "the secret of what ran on this port before"),
        token(exp=FUTURE - 1),
        "nonsense",
    ],
    ids=["expired", "signed elsewhere", "of the same person", "no token"],
)
def test_a_link_that_replaces_nobodys_session_signs_in_at_once(address: str, kept: str) -> None:
    with Visitor(base_url=address, cookies={SESSION: kept}) as visitor:
        answer = visitor.get("/signin", params={"token": token(), "next": HISTORY})
        assert (answer.status_code, answer.headers["location"]) == (303, HISTORY)
        assert f"{SESSION}={token()}" in answer.headers["set-cookie"]


def test_a_link_with_a_bad_token_leaves_the_session_as_it_is(customer: Visitor, org_id: str) -> None:
    assert customer.get("/signin", params={"token": "nonsense"}).status_code == 401
    assert customer.get(history_of(org_id)).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/signin?next=/&token=TOKEN", "/signin?token=TOKEN&next=/", f"{HISTORY}?limit=5&token=TOKEN&token=TOKEN"],
)
def test_the_log_of_the_server_does_not_have_the_token(address: str, path: str) -> None:
    for _ in range(5):
        of_token = path.replace("TOKEN", token())
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 1, "%s %s", ("GET", of_token), None)
        assert logging.getLogger("uvicorn.access").filter(record)
        assert record.getMessage() == f"GET {path.replace('TOKEN', '…')}"
        path = f"/signin?next={quote(path, safe='')}"


@pytest.mark.parametrize("name", ["%74oken=", "t%6Fken%3D", "Token%253d", "%2574oken%253D"])
def test_however_the_name_of_the_token_is_written_the_log_does_not_have_it(address: str, name: str) -> None:
    path = f"/signin?next=%2F%3F{name}{token()}"
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 1, "%s", (path,), None)
    assert logging.getLogger("uvicorn.access").filter(record)
    assert record.getMessage() == f"/signin?next=%2F%3F{name}…"


@pytest.mark.parametrize(
    "path", ["/?access_token=TOKEN", "/?TOKEN", "/TOKEN", "/api/organizations/TOKEN/credits", "/signin;token=TOKEN#x"]
)
def test_a_token_that_somebody_has_put_elsewhere_is_not_in_the_log(address: str, path: str) -> None:
    for given in (token(), token().replace(".", "%2E")):
        record = logging.LogRecord("uvicorn.access", logging.INFO, "", 1, "%s", (path.replace("TOKEN", given),), None)
        assert logging.getLogger("uvicorn.access").filter(record)
        assert record.getMessage() == path.replace("TOKEN", "…")


def test_the_json_api_does_not_read_the_cookie(customer: Visitor, org_id: str) -> None:
    assert customer.get(history_of(org_id)).status_code == 200
    assert customer.get(f"/api/organizations/{org_id}/credits").status_code == 401


def test_signing_out_removes_the_cookie(customer: Visitor, org_id: str) -> None:
    form = form_token(customer.get(history_of(org_id)))
    assert customer.post("/signout", data={"form": form}).headers["location"] == "/signin"
    assert SESSION not in customer.cookies
    assert customer.get(history_of(org_id)).status_code == 303


def test_another_site_cannot_sign_anybody_out(customer: Visitor, org_id: str) -> None:
    for form in ({}, {"form": ""}, {"form": "wrong"}, {"form": "é"}):
        assert customer.post("/signout", data=form).status_code == 403
    assert customer.get(history_of(org_id)).status_code == 200


def test_a_script_may_send_the_token_as_it_does_to_the_api(visitor: Visitor) -> None:
    header = {"Authorization": f"Bearer {token()}"}
    assert visitor.get(HISTORY, headers=header).status_code == 200
    refused = visitor.get(HISTORY, headers={"Authorization": "Bearer nonsense"})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')


def test_what_a_proxy_in_front_of_us_wants_is_not_for_us(customer: Visitor, org_id: str) -> None:
    assert customer.get(history_of(org_id), headers={"Authorization": "Basic YW5uOnNlY3JldA=="}).status_code == 200


def test_the_start_page_leads_on(visitor: Visitor) -> None:
    assert visitor.get("/").headers["location"] == "/signin?next=%2F"
    visitor.sign_in(token())
    assert visitor.get("/").headers["location"] == HISTORY
    visitor.sign_in(token(orgs=["b", "a"]))
    assert re.findall(r'href="(/organizations/[^"]*)"', visitor.get("/").text) == [history_of("a"), history_of("b")]
    for strange in ("日本", "é", "a b"):
        visitor.sign_in(token(orgs=[strange]))
        page = visitor.get("/")
        assert (page.status_code, "The token names no organization." in page.text) == (200, True)
    visitor.sign_in(token(orgs="*"))
    assert visitor.get("/", params={"organization": "acme"}).headers["location"] == HISTORY
    assert visitor.get("/", params={"organization": "<b>"}).status_code == 404
    visitor.sign_in(operator_token())
    assert visitor.get("/").headers["location"] == LETTERS
    visitor.sign_in(token(scope="credits:read operator"))
    assert link(visitor.get("/"), "Dead letters") == LETTERS
    visitor.sign_in(token(orgs=["b", "a"], scope="workflows:write operator"))
    assert visitor.get("/").headers["location"] == LETTERS
    for orgs in (["a"], ["b", "a"], "*"):
        visitor.sign_in(token(orgs=orgs, scope="workflows:write"))
        refused = visitor.get("/")
        assert (refused.status_code, "The token lacks the scope credits:read." in refused.text) == (403, True)
        assert "/organizations/" not in refused.text


# Who sees what


@pytest.mark.parametrize("suffix", ["", ".csv"])
@pytest.mark.parametrize(
    ("claims", "status", "sentence"),
    [
        ({"orgs": ["other"]}, 404, "There is no such organization."),
        ({"scope": "workflows:write"}, 403, "The token lacks the scope credits:read."),
        ({"orgs": ["other"], "scope": ""}, 404, "There is no such organization."),
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
    assert (refused.status_code, "<h1>Not Found</h1>" in refused.text) == (404, True)
    assert "<b>" not in refused.text


@pytest.mark.parametrize(
    "path", ["/signin", HISTORY, f"{HISTORY}.csv", f"{HISTORY}?limit=0", "/organizations/x", LETTERS]
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
            for path in (HISTORY, f"{HISTORY}.csv"):
                failed = visitor.get(path)
                assert (failed.status_code, failed.headers["retry-after"]) == (503, "5")
                assert "The ledger does not answer at the moment; try again." in failed.text
                assert "sekrit" not in failed.text


# The credit history


def test_the_page_shows_the_wallet(ledger: Installation, customer: Visitor, org_id: str) -> None:
    anchor = datetime.now(UTC) - timedelta(days=3)
    write(
        ledger.engine,
        org_id,
        (
            "wallet.subscribe",
            {
                "subscription_id": "s",
                "version": 1,
                "plan": "Team & Co",
                "monthly_credits": 1_000,
                "anchor": anchor.isoformat(),
            },
        ),
        ("wallet.purchase", {"purchase_id": "p", "credits": 25_000}),
        ("workflow.finish", {"workflow_id": "w1", "credits": 1_234}),
        ("workflow.start", {"workflow_id": "w2", "credits": 300, "project_id": "web", "activity_name": "Crawl"}),
    )
    page = customer.get(history_of(org_id))
    assert figures(page) == {
        "available": "24,466",
        "prepaid": "24,766",
        "subscription": "0",
        "reserved": "300",
        "used": "1,234",
    }
    assert "of 1,000 included" in page.text
    assert 'plan <span class="plan">Team &amp; Co</span>' in page.text
    assert f"{anchor.day} {anchor:%b %Y} – " in page.text
    assert "holding 300 credits" in page.text
    assert re.search(r'scope="row" class="mono">w2</th>.*?>web<.*?>Crawl<.*?>300<.*?>\d+ s ago<', page.text, re.DOTALL)
    assert "in 23 h 59 min" in page.text


def test_the_page_shows_the_nine_columns_in_the_order_of_the_contract(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 5_000}),
        ("workflow.finish", {"workflow_id": "w", "credits": 1_250, "project_id": "web", "activity_name": "Crawl"}),
    )
    page = customer.get(history_of(org_id))
    assert ",".join(re.findall(r'data-column="(\w+)"', page.text)) == COLUMNS
    usage, purchase = rows(page)
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]{2} 20\d\d \d\d:\d\d:\d\d", usage[0])
    assert usage[1:] == ["Usage", "workflow-engine", "web", "Crawl", "−1,250", "3,750", "1,250", "unreserved true"]
    assert purchase[1:] == ["Prepaid purchase", "billing", "", "", "+5,000", "5,000", "0", "purchase_id p"]


def test_markup_in_the_data_is_text(ledger: Installation, customer: Visitor, org_id: str) -> None:
    markup = "<b onclick='x'>&amp;\"</b>"
    write(
        ledger.engine,
        org_id,
        (
            "workflow.start",
            {"workflow_id": "w", "credits": 0, "activity_name": markup, "source": markup, "metadata": {markup: markup}},
        ),
        ("workflow.cancel", {"workflow_id": "w", "reason": markup}),
    )
    page = customer.get(history_of(org_id))
    assert "<b" not in page.text.replace("<body", "").replace("<button", "")
    released, reserved = rows(page)
    assert (reserved[2], reserved[4], released[8]) == (markup, markup, f"reason cancelled given_reason {markup}")


def test_an_empty_history_says_how_it_begins(customer: Visitor, org_id: str) -> None:
    page = customer.get(history_of(org_id))
    assert page.status_code == 200
    assert set(figures(page).values()) == {"0"}
    assert "No events yet." in page.text
    assert "<figure" not in page.text
    assert ".csv" not in page.text


def test_events_can_be_filtered_by_type_project_and_day(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500}),
        ("workflow.start", {"workflow_id": "w1", "credits": 10, "project_id": "web"}),
        ("workflow.start", {"workflow_id": "w2", "credits": 10, "project_id": "crm"}),
        ("workflow.finish", {"workflow_id": "w1", "credits": 10}),
    )
    today = datetime.now(UTC).date()

    def found(**params: Any) -> list[int]:
        return shown(customer.get(history_of(org_id), params=params))

    assert found() == [5, 4, 3, 2, 1]
    assert found(event_type=["usage", "prepaid_purchase"]) == [5, 1]
    assert found(project_id="crm") == [3]
    assert found(project_id="crm", event_type="usage", date_from="", date_to="") == []
    assert found(date_from=today - timedelta(days=1), date_to=today) == [5, 4, 3, 2, 1]
    assert found(date_to=today - timedelta(days=2)) == []
    assert found(date_from=today - timedelta(days=1), date_to="9999-12-31") == [5, 4, 3, 2, 1]
    page = customer.get(history_of(org_id), params={"project_id": "nobody", "event_type": "refund"})
    assert "No event matches the filter." in page.text
    assert 'value="nobody"' in page.text
    assert re.findall(r'value="(\w+)" checked', page.text) == ["refund"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("date_from=31.01.2026", "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z."),
        ("date_from=2026-02-31", "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z."),
        ("date_from=2026-11-23&date_to=2026-11-22", "date_to must not be before date_from."),
        ("date_from=2026-02-01&date_to=2026-01-01", "date_to must not be before date_from."),
        ("event_type=usage&event_type=gift", "event_type must be one of usage, prepaid_purchase, "),
        (
            "project_id=a%00b",
            "project_id must have 1 to 128 characters, and only letters, digits and _ . : - among them.",
        ),
        ("limit=101", "limit must be a number from 1 to 100."),
        ("limit=٣", "limit must be a number from 1 to 100."),
        ("reservations_after=-1", "reservations_after must be a number from 1 to 9,007,199,254,740,991."),
        ("before=0", "before must be a number from 1 to 9,007,199,254,740,991."),
    ],
)
def test_a_filter_that_makes_no_sense_is_explained_beside_what_was_typed(
    customer: Visitor, org_id: str, query: str, sentence: str
) -> None:
    page = customer.get(f"{history_of(org_id)}?{query}")
    assert (page.status_code, sentence in page.text) == (422, True)
    typed = httpx.QueryParams(query).multi_items()
    for name, value in typed:
        assert name in PLACES or f'value="{escaped(value)}"' in page.text
        assert not re.search(rf'type="date" value="{re.escape(value)}"', page.text) or date.fromisoformat(value)
    assert '<section class="card" aria-labelledby="events">' not in page.text
    file = customer.get(f"{history_of(org_id)}.csv?{query}")
    assert (file.status_code, sentence in file.text) == (422, True)


def test_pages_continue_one_another_while_events_are_added(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(ledger.engine, org_id, *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(250)))
    first = customer.get(history_of(org_id))
    assert (shown(first), "1–100 of 250" in first.text) == (list(range(250, 150, -1)), True)
    assert (link(first, "Newest"), link(first, "← Newer")) == (None, None)
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "late", "credits": 1}))
    second = customer.get(str(link(first, "Older →")))
    assert (shown(second), "102–201 of 251" in second.text) == (list(range(150, 50, -1)), True)
    third = customer.get(str(link(second, "Older →")))
    assert (shown(third), "202–251 of 251" in third.text) == (list(range(50, 0, -1)), True)
    assert link(third, "Older →") is None
    assert shown(customer.get(str(link(third, "← Newer")))) == shown(second)
    newer = customer.get(str(link(second, "← Newer")))
    assert (shown(newer), "2–101 of 251" in newer.text) == (list(range(250, 150, -1)), True)
    assert shown(customer.get(str(link(newer, "← Newer")))) == list(range(251, 151, -1))
    assert shown(customer.get(str(link(third, "Newest")))) == list(range(251, 151, -1))


def test_the_links_of_a_filtered_page_keep_the_filter(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(ledger.engine, org_id, *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(5)))
    write(ledger.engine, org_id, *(("wallet.refund", {"refund_id": f"r{number}", "credits": 1}) for number in range(5)))
    first = customer.get(history_of(org_id), params={"event_type": ["grant", "usage"], "limit": 2})
    second = customer.get(str(link(first, "Older →")))
    assert (shown(second), "3–4 of 5" in second.text) == ([3, 2], True)
    [file] = re.findall(r'href="([^"]*\.csv[^"]*)"', second.text)
    assert customer.get(unescape(file)).text.count("\r\n") == 6
    nothing = customer.get(history_of(org_id), params={"before": 1})
    assert "There are no older events." in nothing.text


def test_long_metadata_can_be_opened_and_is_bounded(ledger: Installation, customer: Visitor, org_id: str) -> None:
    largest = {"text": "<" * 4_000, "list": [0] * 2_000}
    write(
        ledger.engine,
        org_id,
        *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1, "metadata": largest}) for number in range(100)),
    )
    page = customer.get(history_of(org_id))
    assert page.text.count('<summary>3 entries<span class="unseen"> of metadata</span></summary>') == 100
    assert len(page.content) < 5_000_000


def test_the_chart_shows_the_balance_in_the_range_and_says_it_in_words(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 1_000}),
        ("workflow.finish", {"workflow_id": "w", "credits": 750}),
    )
    page = customer.get(history_of(org_id))
    words = "From 1,000 to 250 credits; lowest 250, highest 1,000."
    assert words in page.text
    assert '<title id="chart-title">Step chart of the available balance</title>' in page.text
    [(moment,)] = sql(ledger.engine, "SELECT max(created_at) FROM credit_events WHERE org_id = :org_id", org_id=org_id)
    later = customer.get(history_of(org_id), params={"date_from": (moment + timedelta(microseconds=1)).isoformat()})
    assert "From 250 to 250 credits; lowest 250, highest 250." in later.text
    earlier = customer.get(history_of(org_id), params={"date_to": "2020-01-01"})
    assert "<figure" not in earlier.text
    last = customer.get(history_of(org_id), params={"date_from": moment.isoformat()})
    assert "From 1,000 to 250 credits; lowest 250, highest 1,000." in last.text


def test_the_chart_is_told_truly_however_many_events_there_are(
    ledger: Installation, customer: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        (f"workflow.{step}", {"workflow_id": f"w{number}"} | ({"credits": number} if step == "start" else {}))
        for number in range(600)
        for step in ("start", "cancel")
    ]
    purchase = ("wallet.purchase", {"purchase_id": "p", "credits": 1_000})
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "g", "credits": 7}), purchase, *runs)
    page = customer.get(history_of(org_id))
    assert "From 7 to 1,007 credits; lowest 7, highest 1,007." in page.text
    assert re.search(r"From 7 credits on [^<]* to 1,007 on [^<]*, between 7 and 1,007\.</desc>", page.text)
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "h", "credits": 1}))
    monkeypatch.setattr(history, "MAX_COMPARED", 1_202)
    page = customer.get(history_of(org_id))
    assert "From 7 to 1,008 credits. The line shows some of the events; a shorter time shows more." in page.text
    assert re.search(r"From 7 credits on [^<,]* to 1,008 on [^<,]*\.</desc>", page.text)
    assert "lowest" not in page.text


@pytest.mark.parametrize(
    ("number", "words", "pages"),
    [
        (0, None, []),
        (1, "1, holding 3 credits", []),
        (100, "100, holding 300 credits", []),
        (101, "the 100 oldest of 101, which hold 303 credits in all", [1]),
        (250, "the 100 oldest of 250, which hold 750 credits in all", [100, 50]),
    ],
)
def test_all_open_reservations_can_be_reached(
    ledger: Installation, customer: Visitor, org_id: str, number: int, words: str | None, pages: list[int]
) -> None:
    names = [f"run-{each:03}" for each in range(number)]
    starts = [("workflow.start", {"workflow_id": name, "credits": 3}) for name in names]
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 1_000}), *starts)
    page = customer.get(history_of(org_id), params={"event_type": "reservation", "limit": 1})
    assert said_of_reservations(page) == words
    seen = held_by(page)
    for size in pages:
        page = customer.get(str(link(page, "More →")))
        assert (len(held_by(page)), len(shown(page)), said_of_reservations(page)) == (
            size,
            1,
            f"{len(seen) + 1}–{len(seen) + size} of {number}, oldest first, which hold {3 * number} credits in all",
        )
        seen += held_by(page)
    assert seen == names
    assert link(page, "More →") is None
    if pages:
        assert held_by(customer.get(str(link(page, "Oldest")))) == names[:100]
        beyond = customer.get(history_of(org_id), params={"reservations_after": number})
        assert "There are no newer reservations." in beyond.text
        assert said_of_reservations(beyond) == f"0 of {number}, which hold {3 * number} credits in all"


def said_of_reservations(page: httpx.Response) -> str | None:
    found = re.search(r'Open reservations</h2>\s*<p class="note">(.*?)</p>', page.text, re.DOTALL)
    return None if found is None else text_of(found[1])


def held_by(page: httpx.Response) -> list[str]:
    """The workflows whose reservations the page shows."""
    return re.findall(r'<th role="rowheader" scope="row" class="mono">([^<]*)</th>', page.text)


# The file


def test_the_file_has_every_event_that_matches(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500, "metadata": {"note": 'é, "quoted"\nand more'}}),
        ("workflow.finish", {"workflow_id": "w", "credits": 120, "project_id": "web", "activity_name": "Crawl"}),
        *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(200)),
    )
    answer = customer.get(f"{history_of(org_id)}.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == f'attachment; filename="credit-history-{org_id}.csv"'
    header, *lines = csv.reader(io.StringIO(answer.content.decode("utf-8"), newline=""))
    assert ",".join(header) == f"{COLUMNS},id,workflow_id"
    assert [line[9] for line in lines] == [str(number) for number in range(202, 0, -1)]
    usage, purchase = (dict(zip(header, line, strict=True)) for line in lines[-2:])
    assert datetime.fromisoformat(usage.pop("created_at")).tzinfo is not None
    assert usage == {
        "event_type": "usage",
        "source": "workflow-engine",
        "project_id": "web",
        "activity_name": "Crawl",
        "credits": "-120",
        "prepaid_balance_after": "380",
        "period_usage_after": "120",
        "metadata": '{"unreserved":true}',
        "id": "2",
        "workflow_id": "w",
    }
    assert json.loads(purchase["metadata"]) == {"note": 'é, "quoted"\nand more', "purchase_id": "p"}
    filtered = customer.get(f"{history_of(org_id)}.csv", params={"event_type": "usage"})
    assert filtered.text.count("\r\n") == 2


FORMULAS = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\uff1dcmd", "\uff0b1", "\uff0d1", "\uff20SUM(1)")
BEFORE = (
    *("", " ", "\t", "\r", "\n", "\xa0", "\u3000", "\ufeff", "\u200b", "\u200d", '"', "\x1b[0m", "\u202e"),
    *(" \ufeff\t\xa0", "x;", "x; ", 'x;"', 'x; ""', 'x,";', '",;', "x;\ufeff", "x;y;\xa0", "x;\u200d\u3000"),
    *("x\t", "x\n", "x\r\n", "x\u2028", "x\x85", "x\x0b"),
)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_no_cell_of_the_file_is_a_formula(ledger: Installation, customer: Visitor, org_id: str, separator: str) -> None:
    texts = [f"{before}{formula}" for before in BEFORE for formula in FORMULAS]
    finishes = [
        {"workflow_id": f"-w{number}", "credits": 7, "activity_name": text, "source": text, "metadata": {text: [text]}}
        for number, text in enumerate(texts)
    ]
    write(ledger.engine, org_id, *(("workflow.finish", {"project_id": "-p", **fields}) for fields in finishes))
    file = customer.get(f"{history_of(org_id)}.csv").text
    assert {character for character in file if not character.isprintable()} <= {"\r", "\n", "\xa0", "\u3000", "\u200d"}
    lines = list(csv.reader(io.StringIO(file, newline=""), delimiter=separator))
    assert [cell for line in lines for cell in line if is_formula(cell)] == []
    assert len(lines) == 1 + len(texts)
    if separator == ",":
        events = [dict(zip(exports.COLUMNS, line, strict=True)) for line in reversed(lines[1:])]
        assert [json.loads(event["metadata"])[text] for text, event in zip(texts, events, strict=True)] == [
            [text] for text in texts
        ]
        assert {(event["project_id"], event["credits"]) for event in events} == {("'-p", "-7")}
        assert events[0]["activity_name"] == f"'{texts[0]}"


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet that overlooks as much as it can takes `cell` for one; a number is none."""
    begins = cell.lstrip(string.whitespace + '\xa0\u3000\ufeff\u200b\u200d\u202e\x1b"')
    return unicodedata.normalize("NFKC", begins[:1]) in tuple("=+-@") and not re.fullmatch("-[0-9]+", cell)


def test_text_of_the_file_that_is_no_formula_is_as_it_was(ledger: Installation, customer: Visitor, org_id: str) -> None:
    emoji, persian = "\U0001f469\u200d\U0001f4bb", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    texts = ["Crawl; then = and - and @", "a;b", "1+1", "x-y", 'é, "quoted"', emoji, persian]
    write(
        ledger.engine,
        org_id,
        *(
            ("workflow.finish", {"workflow_id": f"w{number}", "credits": 7, "activity_name": text})
            for number, text in enumerate(texts)
        ),
    )
    answer = customer.get(f"{history_of(org_id)}.csv")
    _, *lines = csv.reader(io.StringIO(answer.text, newline=""))
    assert [line[exports.COLUMNS.index("activity_name")] for line in reversed(lines)] == texts


def test_no_text_on_the_page_turns_round_or_hides_what_is_beside_it(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    unseen, seen = "\x1b[2J\x07\x9b\u202e\u200b\u2066", "\U0001f469\u200d\U0001f4bb"
    text = f"a{unseen}b{seen}"
    fields = {"credits": 7, "source": text, "activity_name": text, "metadata": {text: text, "deep": [text]}}
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 50}),
        ("workflow.finish", {"workflow_id": "w", **fields}),
        ("workflow.finish", {"workflow_id": "x", **fields, "metadata": {text: text}}),
        ("workflow.start", {"workflow_id": "y", "credits": 1, "activity_name": text}),
    )
    page = customer.get(history_of(org_id)).text
    assert not set(unseen[0:1] + unseen[4:]).intersection(page)
    assert page.count(f"a\\x1b[2J\\x07\\x9b\\u202e\\u200b\\u2066b{seen}") >= 7


def test_the_json_of_the_api_has_every_text_exactly(ledger: Installation, visitor: Visitor, org_id: str) -> None:
    texts = [f"{before}=1" for before in BEFORE]
    write(
        ledger.engine,
        org_id,
        *(
            ("workflow.finish", {"workflow_id": f"w{number}", "credits": 7, "source": text, "metadata": {text: text}})
            for number, text in enumerate(texts)
        ),
    )
    header = {"Authorization": f"Bearer {token(orgs=[org_id])}"}
    items = visitor.get(f"/api/organizations/{org_id}/credit-events", headers=header).json()["items"]
    assert [item["source"] for item in reversed(items)] == texts
    assert [item["metadata"][text] for text, item in zip(texts, reversed(items), strict=True)] == texts


def test_a_download_that_nobody_reads_holds_no_connection_to_the_database(ledger: Installation, org_id: str) -> None:
    long = {"note": "x" * 8_000}
    write(
        ledger.engine,
        org_id,
        *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1, "metadata": long}) for number in range(3_000)),
    )
    serving_app = app(ledger.database_url, ledger.broker_url)
    in_use = serving_app.state.services.engine.pool.checkedout
    headers = [{"Authorization": f"Bearer {token(orgs=[org_id], sub=f'reader-{number}')}"} for number in range(20)]
    with serving(serving_app) as address, Visitor(base_url=address) as visitor, ExitStack() as stack:
        downloads = [
            stack.enter_context(visitor.stream("GET", f"{history_of(org_id)}.csv", headers=header))
            for header in headers
        ]
        assert {download.status_code for download in downloads} == {200}
        # 24 MB each are more than what lies between the server and who does not read.
        eventually(lambda: in_use() == 0)
        assert visitor.get(history_of(org_id), headers=headers[0]).status_code == 200
        write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "late", "credits": 1}))
        _, *lines = csv.reader(downloads[7].iter_lines())
        assert [int(line[9]) for line in lines] == list(range(3_000, 0, -1))


def test_who_asks_only_for_the_headers_of_the_file_has_no_event_read(
    ledger: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = map(str, range(100))
    monkeypatch.setattr(exports, "pieces", lambda _: pieces)
    transport = httpx.ASGITransport(app(ledger.database_url, ledger.broker_url))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://credits.example") as client:
            return await client.head(f"{HISTORY}.csv", headers={"Authorization": f"Bearer {token()}"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["content-type"][:8]) == (200, "text/csv")
    assert next(pieces) == "1"  # the first is read before the answer begins


# Size


def test_a_history_of_100_000_events_is_shown_page_by_page(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    sql(
        ledger.engine,
        """
        INSERT INTO credit_events
        SELECT :org_id, n, TIMESTAMPTZ '2026-01-01Z' + n * INTERVAL '1 minute', 'grant', 'admin', NULL, 'web', 'Import',
               1, n, 0, 0, 0, 'grant:' || n, '{}'
        FROM generate_series(1, 100000) n
        """,
        org_id=org_id,
    )
    newest = customer.get(history_of(org_id))
    assert (len(shown(newest)), "1–100 of 100,000" in newest.text) == (100, True)
    assert len(newest.content) < 200_000
    middle = customer.get(history_of(org_id), params={"before": 50_001, "project_id": "web"})
    assert (shown(middle)[0], "50,001–50,100 of 100,000" in middle.text) == (50_000, True)
    with customer.stream("GET", f"{history_of(org_id)}.csv") as file:
        assert sum(1 for _ in file.iter_lines()) == 100_001


# Operators


def test_the_pages_of_operators_are_for_operators(customer: Visitor, letter: str) -> None:
    for path in (LETTERS, letter, f"{LETTERS}/none", "/operators/else"):
        refused = customer.get(path)
        assert (refused.status_code, "the token lacks the scope operator" in refused.text) == (403, True)
    for action in ("replay", "discard"):
        assert customer.post(f"{letter}/{action}", data={"reason": "x"}).status_code == 403


def test_an_operator_reads_what_is_wrong(operator: Visitor, letter: str, org_id: str) -> None:
    listed = operator.get(LETTERS)
    assert f'<a href="{letter}">' in listed.text
    page = operator.get(letter)
    assert "wallet.purchase: credits must be greater than 0, got 0" in page.text
    message = re.search(r"<pre[^>]*>(.*?)</pre>", page.text, re.DOTALL)
    assert message is not None
    assert json.loads(unescape(message[1])) == {"org_id": org_id, "purchase_id": "p1", "credits": 0}
    assert operator.get(f"{LETTERS}/999999").status_code == 404
    assert operator.get(f"{LETTERS}/{10**20}").status_code == 404
    assert operator.get(f"{LETTERS}/one").status_code == 404


def test_dead_letters_can_be_filtered_and_paged(ledger: Installation, operator: Visitor, org_id: str) -> None:
    write(ledger.engine, org_id, *((f"{org_id}.task", {"number": number}) for number in range(operators.PAGE + 5)))
    first = operator.get(LETTERS, params={"task": f"{org_id}.task", "code": "unknown_task", "status": "all"})
    assert first.text.count('scope="row"') == operators.PAGE
    second = operator.get(str(link(first, "Older →")))
    assert second.text.count('scope="row"') == 5
    assert link(second, "Older →") is None
    assert link(second, "Newest") == f"{LETTERS}?status=all&code=unknown_task&task={org_id}.task"
    none = operator.get(LETTERS, params={"task": f"{org_id}.task", "code": "conflict"})
    assert "No dead letters match the filter." in none.text
    past = operator.get(LETTERS, params={"task": f"{org_id}.task", "before_id": "1"})
    assert "There are no older dead letters." in past.text
    assert "No dead letters" not in past.text
    assert link(past, "Back to the newest") == f"{LETTERS}?status=open&task={org_id}.task"
    for name, value in (("status", "gone"), ("before_id", "x"), ("task", "a\0b")):
        refused = operator.get(LETTERS, params={name: value})
        assert (refused.status_code, f"<li>{name} must " in refused.text) == (422, True)


@pytest.mark.parametrize("action", ["replay", "discard"])
@pytest.mark.parametrize("form", [{}, {"form": ""}, {"form": "wrong"}])
def test_a_form_of_another_site_changes_no_letter(
    ledger: Installation, operator: Visitor, letter: str, action: str, form: dict[str, str]
) -> None:
    refused = operator.post(f"{letter}/{action}", data={"reason": "a test", **form})
    assert refused.status_code == 403
    assert "This form is not from a page of your session. Reload the page." in refused.text
    assert sql(ledger.engine, "SELECT status FROM dead_letters WHERE id = :id", id=int(letter.rpartition("/")[2])) == [
        ("open",)
    ]


def test_a_form_of_another_session_changes_no_letter(operator: Visitor, letter: str) -> None:
    form = form_token(operator.get(letter))
    operator.sign_in(token(sub="oscar", scope="operator"))
    assert operator.post(f"{letter}/discard", data={"reason": "a test", "form": form}).status_code == 403


def test_discarding_needs_a_reason_and_keeps_who_did_it(operator: Visitor, letter: str) -> None:
    form = form_token(operator.get(letter))
    for reason in ("", "   ", "x" * 501, "a\0b"):
        refused = operator.post(f"{letter}/discard", data={"form": form, "reason": reason})
        assert (refused.status_code, "reason must be a text of 1 to 500 characters." in refused.text) == (422, True)
    done = operator.post(f"{letter}/discard", data={"form": form, "reason": "sent by <b>mistake</b>"})
    assert (done.status_code, done.headers["location"]) == (303, letter)
    page = operator.get(letter)
    assert '<dd id="resolved-by">olga</dd>' in page.text
    assert '<dd id="resolution">sent by &lt;b&gt;mistake&lt;/b&gt;</dd>' in page.text
    assert "<form" not in page.text.partition("<main")[2]
    again = operator.post(f"{letter}/discard", data={"form": form, "reason": "again"})
    replayed = operator.post(f"{letter}/replay", data={"form": form})
    assert (again.status_code, replayed.status_code) == (409, 409)
    assert "was discarded by olga: sent by &lt;b&gt;mistake&lt;/b&gt;" in again.text


def test_replaying_without_a_worker_says_that_no_answer_came(
    operator: Visitor, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "ANSWER_TIMEOUT_S", 0.2)
    form = form_token(operator.get(letter))
    assert operator.post(f"{letter}/replay", data={"form": form}).status_code == 303
    page = operator.get(letter)
    assert '<dd id="resolved-by">olga</dd>' in page.text
    assert "no answer came within 0.2 s" in page.text


def test_what_is_no_message_is_shown_as_it_arrived_and_cannot_be_replayed(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    [(number,)] = sql(
        ledger.engine,
        """
        INSERT INTO dead_letters (task, body, body_sha256, org_id, error_code, error, traceback, attempts)
        VALUES ('', :body, :body, :org_id, 'undecodable', E'no JSON: \x7f', E'Traceback …\n\x1b[0m', 1) RETURNING id
        """,
        body=b"\xff<b>\x00\n" + b"x" * 100_000,
        org_id=org_id,
    )
    page = operator.get(f"{LETTERS}/{number}")
    assert "\\xff&lt;b&gt;\\x00\nxxx" in page.text
    rest = f"The command `holdfast failed show {number} --json` prints all that is kept."
    assert f"… and 34,473 characters more. {rest}" in page.text
    assert "no JSON: \\x7f" in page.text
    assert "Traceback …\n\\x1b[0m" in page.text
    assert re.search(r"<dt>Task</dt><dd[^>]*>unknown</dd>", page.text)
    assert f"Dead letter {number} holds no message that could be sent again." in page.text
    assert "Replay the message" not in page.text
    refused = operator.post(f"{LETTERS}/{number}/replay", data={"form": form_token(page)})
    assert refused.status_code == 409
    assert f"Dead letter {number} holds no message that could be sent again." in refused.text


def test_however_long_a_text_is_pages_show_its_beginning(ledger: Installation, operator: Visitor, letter: str) -> None:
    sql(
        ledger.engine,
        "UPDATE dead_letters SET body = :body, error = :text, traceback = :text WHERE id = :id",
        body=b'[[{"text": "' + "\u200b".encode() * 2_000_000 + b'"}], {}, {}]',
        text="<" * 2_000_000,
        id=int(letter.rpartition("/")[2]),
    )
    [listed, page] = [operator.get(LETTERS), operator.get(letter)]
    assert (f'<a href="{letter}">' in listed.text, "&lt;&lt;&lt;…</span>" in listed.text) == (True, True)
    assert "&lt;&lt;&lt;…</p>" in page.text
    assert (len(listed.content) < 200_000, len(page.content) < 700_000) == (True, True)


# Words and figures


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (timedelta(seconds=-5), "0 s"),
        (timedelta(seconds=59), "59 s"),
        (timedelta(minutes=5, seconds=30), "5 min"),
        (timedelta(hours=2, minutes=3), "2 h 3 min"),
        (timedelta(days=29, hours=23, minutes=59), "29 d 23 h"),
    ],
)
def test_a_length_of_time_is_told_in_its_two_largest_units(length: timedelta, words: str) -> None:
    assert span(length) == words


def test_short_metadata_is_read_in_passing_and_long_metadata_is_not() -> None:
    assert pairs({}) == []
    assert pairs({"reason": "settled", "count": 3, "last": True, "none": None}) == [
        ("reason", "settled"),
        ("count", "3"),
        ("last", "true"),
        ("none", "null"),
    ]
    moments = {"expires_at": "2026-11-03T09:05:33.081662+00:00", "until": "2026-02-31T00:00:00+00:00"}
    assert pairs(moments) == [("expires_at", "3 Nov 2026 09:05:33"), ("until", "2026-02-31T00:00:00+00:00")]
    assert pairs({"note": "x" * 100}) is None
    assert pairs({"list": []}) is None


def test_json_is_spread_over_lines_unless_that_makes_it_several_times_as_long() -> None:
    assert readable_json({"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'
    assert readable_json({"é": "\ud800"}) == '{\n  "é": "\\ud800"\n}'
    assert "\n" not in readable_json([[[[[[[[[[0] * 100]]]]]]]]])
