"""Signing in and out, as a browser does it: who is asked, what the cookie allows, and which sites may not."""

import asyncio
import logging
import math
import re
import time
from html import unescape
from urllib.parse import quote

import httpx
import jwt
import pytest

from api_stub.auth import LEEWAY_S
from tests.acceptance.website import (
    FUTURE,
    HISTORY,
    LETTERS,
    SESSION,
    Visitor,
    app,
    form_token,
    history_of,
    link,
    operator_token,
    token,
)
from tests.installation import Installation


def test_who_is_not_signed_in_is_asked_to_and_led_back(visitor: Visitor) -> None:
    asked = visitor.get(f"{HISTORY}?event_type=usage&limit=5")
    assert asked.status_code == 303
    form = visitor.get(asked.headers["location"])
    assert (form.status_code, "<h1>Sign in to Holdfast</h1>" in form.text) == (200, True)
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
def test_a_link_with_a_token_on_another_site_asks_first(visitor: Visitor, headers: dict[str, str]) -> None:
    link = {"token": token(sub="<b>eve</b>"), "next": f"{HISTORY}?limit=5"}
    asked = visitor.get("/signin", params=link, headers=headers)
    assert (asked.status_code, SESSION in visitor.cookies) == (200, False)
    assert "The link signs you in as &lt;b&gt;eve&lt;/b&gt;. It is on another site." in asked.text
    assert "Stay signed in" not in asked.text
    done = confirmed(visitor, asked)
    assert (done.status_code, done.headers["location"]) == (303, link["next"])
    assert visitor.cookies[SESSION] == link["token"]
    # It is the person who is signed in: nothing is left to ask.
    again = visitor.get("/signin", params={"token": token(sub="<b>eve</b>", exp=FUTURE - 1)}, headers=headers)
    assert (again.status_code, visitor.cookies[SESSION]) == (303, token(sub="<b>eve</b>", exp=FUTURE - 1))


def confirmed(visitor: Visitor, asked: httpx.Response, **changed: str) -> httpx.Response:
    """The answer to the form of a page that asks."""
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', asked.text)
    return visitor.post("/signin", data={name: unescape(value) for name, value in fields} | changed)


def test_a_link_of_this_site_signs_in(visitor: Visitor, address: str) -> None:
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": address}):
        assert visitor.get("/signin", params={"token": token()}, headers=headers).status_code == 303


def test_a_link_asks_before_it_replaces_a_session(customer: Visitor, org_id: str) -> None:
    before = customer.cookies[SESSION]
    link = {"token": token(sub="<b>eve</b>"), "next": f"{HISTORY}?limit=5"}
    asked = customer.get("/signin", params=link, headers={"Sec-Fetch-Site": "none"})
    assert (asked.status_code, customer.cookies[SESSION]) == (200, before)
    assert "You are signed in as ann. The link signs you in as &lt;b&gt;eve&lt;/b&gt; instead." in asked.text
    assert confirmed(customer, asked, form="guessed").status_code == 403
    assert customer.cookies[SESSION] == before
    done = confirmed(customer, asked)
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


WRONG_CLOCK = "the clock of the site that gave it to you, or ours, is wrong."
TOO_LONG = "longer than a browser can keep (4,000 bytes)"


@pytest.mark.parametrize("site", ["none", "cross-site"])
@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (token(exp=int(time.time()) - 366 * 86_400), "This link has expired. Get a new one where you got it."),
        (
            token(iat=int(time.time()) + 3_600),
            f"This link is not valid yet: {WRONG_CLOCK} Try again in a few minutes.",
        ),
        (
            token()[:-9],
            "This link does not sign you in: the token is not valid. Get a new one where you got it.",
        ),
        (
            token(orgs=["x" * 120] * 40),
            f"This link does not sign you in: the token is {TOO_LONG}. Get a new one where you got it.",
        ),
    ],
    ids=["a year old", "of a wrong clock", "cut off", "too long"],
)
def test_a_link_that_cannot_sign_in_says_what_a_customer_can_do(
    visitor: Visitor, bad: str, sentence: str, site: str
) -> None:
    refused = visitor.get("/signin", params={"token": bad, "next": HISTORY}, headers={"Sec-Fetch-Site": site})
    assert (refused.status_code, f'<p id="wrong">{sentence}</p>' in refused.text) == (401, True)
    assert (SESSION in visitor.cookies, bad in refused.text) == (False, False)


def test_who_has_no_session_any_more_is_told_how_to_get_one(visitor: Visitor) -> None:
    visitor.cookies[SESSION] = token(exp=int(time.time()) - 3_600)
    asked = visitor.get(HISTORY)
    assert asked.headers["location"] == f"/signin?next={quote(HISTORY, safe='')}"
    page = visitor.get(asked.headers["location"])
    assert "If your session has ended, get a new one where you got it." in page.text


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
        assert (page.status_code, "for no organization" in page.text) == (200, True)
    visitor.sign_in(token(orgs="*"))
    assert visitor.get("/", params={"organization": "acme"}).headers["location"] == HISTORY
    assert visitor.get("/", params={"organization": "<b>"}).status_code == 404
    for scope in ("operator", "operator:read", "credits:read operator", "workflows:write operator:read"):
        visitor.sign_in(token(scope=scope))
        assert visitor.get("/").headers["location"] == "/operators"
    visitor.sign_in(token(scope="credits:read operator"))
    assert visitor.get("/", params={"organization": "acme"}).headers["location"] == HISTORY
    assert link(visitor.get("/operators"), "Dead letters") == LETTERS
    for orgs in (["a"], ["b", "a"], "*"):
        visitor.sign_in(token(orgs=orgs, scope="workflows:write"))
        refused = visitor.get("/")
        assert (refused.status_code, "You may not see credits" in refused.text) == (403, True)
        assert "/organizations/" not in refused.text
