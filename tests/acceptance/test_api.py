"""The HTTP API, served for real, on a real ledger: what customers and engines get, and what they get told."""

import asyncio
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, Engine, event, text
from starlette.types import Message

from api_stub.sources import OTHERS_SOURCES
from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client
from holdfast_client.messages import MESSAGES, OPERATOR
from ledger.database import CONNECT_TIMEOUT_S, POOL_TIMEOUT_S, connect
from ledger.roles import READER
from ledger.rules import SCHEDULER
from ledger.store import apply_batch
from tests.acceptance import website
from tests.acceptance.website import FUTURE, HISTORY, SECRET, Patient, served, serving, token
from tests.installation import Installation, installed, log_of
from tests.messages import STEPS, delivery
from tests.support import PATIENCE_S, eventually, sql, suspended
from worker.local.embedded import Embedded

EVENTS = "/api/organizations/acme/credit-events"
USAGE = "/api/organizations/acme/usage"
CREDITS = "/api/organizations/acme/credits"
PAST = {"created_at", "metadata"}
DISGUISES = ("Admin", " billing ", "bill ing", "biIIing", "b1lling", "operat0r", "adrnin", "schedu|er")
NOT_ASCII = (
    " billing\n",
    "admin\x7f",
    "admin\u200b",
    "\ufeffoperator",
    "ａｄｍｉｎ",
    "sched\u00aduler",
    "admin\ufe0f",
    "admin\u3164",  # a Hangul filler, which is a letter
    "admin\u2800",  # Braille without a dot, which is a symbol
    "\u0430dmin",  # Cyrillic
    "adm\u0131n",  # an i without its dot
    "größe",
)
UNSIGNED = jwt.encode({"orgs": "*", "exp": FUTURE}, None, algorithm="none")  # type: ignore[arg-type]
IS_NO_NAME = "activity_name must have 1 to 256 characters, and no NUL or invalid character among them"
IS_NO_ID = "must have 1 to 128 characters, and only letters, digits and _ . : - among them"
MOMENT = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?\+00:00"


HISTORY_OF_ACME = [
    delivery("wallet.subscribe", org_id="acme", subscription_id="s1", version=1, plan="pro", monthly_credits=100),
    delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=500),
    delivery("workflow.start", org_id="acme", workflow_id="w1", credits=75, project_id="web"),
    delivery("workflow.finish", org_id="acme", workflow_id="w1", credits=80),
    delivery("workflow.start", org_id="acme", workflow_id="w2", credits=20, activity_name="Crawl"),
    delivery("wallet.purchase", org_id="other", purchase_id="p1", credits=1),
]


class Api(Patient):
    """The API at its address, asked by somebody who may read the credits of acme."""

    def problem(self, path: str, **params: Any) -> tuple[int, str]:
        response = self.get(path, **params)
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        assert set(body) == {"type", "title", "status", "detail"}
        assert body["status"] == response.status_code
        return response.status_code, body["detail"]


@pytest.fixture(scope="module")
def ledger(services: Embedded) -> Iterator[Installation]:
    """A ledger with some history, which no test changes."""
    with installed(services) as own:
        apply_batch(own.engine, HISTORY_OF_ACME)
        yield own


@pytest.fixture
def api(address: str) -> Iterator[Api]:
    with Api(base_url=address, headers={"Authorization": f"Bearer {token()}"}) as client:
        yield client


@pytest.fixture
def app(database_url: str, broker_url: str) -> FastAPI:
    return website.app(database_url, broker_url)


@pytest.fixture
def own_api(app: FastAPI) -> Iterator[Api]:
    """One on the test's own database, where there is nothing yet."""
    with serving(app) as address, Api(base_url=address, headers={"Authorization": f"Bearer {token()}"}) as client:
        yield client


@pytest.fixture
def history(engine: Engine) -> None:
    apply_batch(engine, HISTORY_OF_ACME)


def test_the_history_has_the_columns_of_the_contract_newest_first(api: Api) -> None:
    body = api.get(EVENTS).json()
    assert (body["total"], body["limit"], body["offset"], body["next_cursor"]) == (6, 100, 0, None)
    assert list(body["items"][0]) == [
        "id",
        "workflow_id",
        "created_at",
        "event_type",
        "source",
        "project_id",
        "activity_name",
        "credits",
        "prepaid_balance_after",
        "period_usage_after",
        "metadata",
    ]
    shown = [{name: value for name, value in item.items() if name not in PAST} for item in body["items"]]
    assert shown[1] == {
        "id": 5,
        "workflow_id": "w1",
        "event_type": "usage",
        "source": "workflow-engine",
        "project_id": "web",
        "activity_name": None,
        "credits": -80,
        "prepaid_balance_after": 500,
        "period_usage_after": 80,
    }
    assert [item["event_type"] for item in shown] == [
        "reservation",
        "usage",
        "reservation_released",
        "reservation",
        "prepaid_purchase",
        "subscription_credit",
    ]


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("event_type=usage&event_type=reservation", [6, 5, 3]),
        ("project_id=web", [5, 4, 3]),
        ("project_id=unknown", []),
        ("activity_name=Crawl", [6]),
        ("activity_name=Import&activity_name=Crawl&event_type=usage&event_type=reservation", [6]),
        ("activity_name=crawl", []),
        ("limit=2&offset=1", [5, 4]),
        ("date_from=2000-01-01&date_to=9999-12-31", [6, 5, 4, 3, 2, 1]),
        ("date_from=2000-01-01T10:00:00+00:00&date_to=2999-12-31T10:00:00+02:00", [6, 5, 4, 3, 2, 1]),
        ("date_to=2000-01-01", []),
        ("date_from=2999-01-01T00:00:00Z", []),
        ("cursor=3", [2, 1]),
    ],
)
def test_the_history_is_filtered_and_paged(api: Api, query: str, ids: list[int]) -> None:
    assert [item["id"] for item in api.get(f"{EVENTS}?{query}").json()["items"]] == ids


@pytest.mark.parametrize(
    ("query", "total", "credits_"),
    [
        ("", 6, 500),
        ("limit=1&offset=3", 6, 500),
        ("event_type=usage&event_type=reservation", 3, -175),
        ("event_type=usage&event_type=reservation&limit=1&cursor=5", 3, -175),
        ("workflow_id=w1", 3, -80),
        ("date_to=2000-01-01", 0, 0),
        ("project_id=unknown", 0, 0),
    ],
)
def test_all_events_that_match_are_counted_and_added_up(api: Api, query: str, total: int, credits_: int) -> None:
    page = api.get(f"{EVENTS}?{query}").json()
    assert (page["total"], page["credits"]) == (total, credits_)


def test_a_cursor_neither_skips_nor_repeats_while_events_are_added(own_api: Api, history: None, engine: Engine) -> None:
    seen: list[int] = []
    cursor = None
    for number in range(3):
        page = own_api.get(EVENTS, params={"limit": 2} | ({} if cursor is None else {"cursor": cursor})).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        apply_batch(engine, [delivery("wallet.grant", org_id="acme", grant_id=f"g{number}", credits=1)])
    assert (seen, cursor) == ([6, 5, 4, 3, 2, 1], None)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("limit=0", "limit must be greater than or equal to 1"),
        ("limit=101", "limit must be less than or equal to 100"),
        ("limit=ten", "limit must be an integer"),
        ("offset=-1", "offset must be greater than or equal to 0"),
        (f"offset={10**30}", "offset must be less than or equal to 9007199254740991"),
        ("date_from=yesterday", "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z"),
        ("date_to=2026-02-30", "date_to must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z"),
        ("limit=1.5", "limit must be an integer"),
        (f"limit={'9' * 5_000}", "limit must be an integer"),
        ("date_from=2026-02-01&date_to=2026-01-01", "date_to must not be before date_from"),
        ("date_from=2026-11-23&date_to=2026-11-22", "date_to must not be before date_from"),
        ("cursor=x", "cursor must be an integer"),
        ("cursor=0", "cursor must be from 1 to 9007199254740991"),
        (f"cursor={'9' * 5_000}", "cursor must be from 1 to 9007199254740991"),
        ("cursor=3&offset=1", "cursor cannot be combined with offset"),
        ("group_by=project", "group_by must be 'workflow'"),
        ("group_by=workflow&offset=1", "offset cannot be combined with group_by: follow next_cursor"),
        ("group_by=workflow&cursor=3", "cursor must be of a page with the same group_by"),
        ("cursor=7-3", "cursor must be of a page with the same group_by"),
        *(
            (f"{name}={typed}", f"{name} {IS_NO_ID}")
            for name in ("project_id", "workflow_id")
            for typed in ("", "%00", "a%20b", "x" * 129)
        ),
        *((f"activity_name=Crawl&activity_name={typed}", IS_NO_NAME) for typed in ("", "a%00", "x" * 257)),
        ("type=usage", "type is not a filter; did you mean event_type?"),
        (
            "limit=5&Event-Type=usage&limit=7",
            "limit is given more than once; Event-Type is not a filter; did you mean event_type?",
        ),
    ],
)
def test_a_bad_parameter_is_named_in_a_sentence(api: Api, query: str, detail: str) -> None:
    assert api.problem(f"{EVENTS}?{query}") == (422, detail)


READS = (
    (EVENTS, "type=usage", "type is not a filter; did you mean event_type?"),
    (CREDITS, "att=2026-01-01", "att is not a parameter; did you mean at?"),
    (CREDITS, "date_from=2026-01-01", "date_from is not a parameter; there is only at"),
    (CREDITS, "at=2026-01-01&at=2026-01-02", "at is given more than once"),
    ("/api/organizations/acme/workflows/w1", "limit=1", "limit is not a parameter; this address takes none"),
)


@pytest.mark.parametrize(("path", "query", "detail"), READS)
def test_a_parameter_that_an_address_does_not_take_is_refused(api: Api, path: str, query: str, detail: str) -> None:
    assert api.get(path).status_code == 200
    assert api.problem(f"{path}?{query}") == (422, detail)
    others = {"Authorization": f"Bearer {token(orgs=['other'])}"}
    told = "There is no such organization, or this token does not name it (orgs)."
    assert api.problem(f"{path}?{query}", headers=others) == (404, told)
    assert api.head(f"{path}?{query}").status_code == 422


def test_no_address_of_an_organization_takes_a_parameter_that_is_not_described(api: Api) -> None:
    paths = {
        (method.upper(), path.format(orgId="acme", workflowId="w1"))
        for path, operations in api.get("/openapi.json").json()["paths"].items()
        for method in operations
        if path.startswith("/api/organizations/")
    }
    writes = {"Authorization": f"Bearer {token(scope='credits:read workflows:write wallet:write')}"}
    assert len(paths) >= 7
    for method, path in sorted(paths):
        refused = api.request(method, f"{path}?nonsense=1", headers=writes)
        assert (path, refused.status_code, refused.json()["detail"][:8]) == (path, 422, "nonsense")


def test_the_events_of_a_workflow_are_its_own_and_its_refunds(own_api: Api, history: None, engine: Engine) -> None:
    fields = {"org_id": "acme", "refund_id": "r1", "credits": 30, "workflow_id": "w1"}
    apply_batch(engine, [delivery("wallet.refund", **fields)])
    page = own_api.get(EVENTS, params={"workflow_id": "w1", "limit": 3}).json()
    found = [(event["event_type"], event["workflow_id"], event["project_id"]) for event in page["items"]]
    assert found == [("refund", "w1", "web"), ("usage", "w1", "web"), ("reservation_released", "w1", "web")]
    rest = own_api.get(EVENTS, params={"workflow_id": "w1", "cursor": page["next_cursor"]}).json()
    assert [event["event_type"] for event in rest["items"]] == ["reservation"]
    assert (page["total"], rest["total"]) == (4, 4)
    assert own_api.get(EVENTS, params={"workflow_id": "w1", "event_type": "usage"}).json()["total"] == 1
    assert own_api.get(EVENTS, params={"workflow_id": "nobody"}).json()["items"] == []


def test_the_history_by_run_has_a_line_for_each_run_and_for_what_belongs_to_none(
    own_api: Api, history: None, engine: Engine
) -> None:
    fields = {"org_id": "acme", "refund_id": "r1", "credits": 30, "workflow_id": "w1"}
    apply_batch(engine, [delivery("wallet.refund", **fields)])
    page = own_api.get(EVENTS, params={"group_by": "workflow"}).json()
    assert {name: page[name] for name in page if name not in ("items", "as_of")} == {
        "total": 4,
        "credits": sum(item["credits"] for item in page["items"]),
        "limit": 100,
        "offset": 0,
        "next_cursor": None,
        "archived": None,
    }
    run, other, purchase, allocation = page["items"]
    assert list(run) == [
        "workflow_id",
        "state",
        "project_id",
        "activity_name",
        "reserved_credits",
        "used_credits",
        "refunded_credits",
        "credits",
        "began_at",
        "changed_at",
        "expires_at",
        "archived_in_part",
        "last_id",
        "event",
        "events_url",
    ]
    assert {name: run[name] for name in run if not name.endswith("_at")} == {
        "workflow_id": "w1",
        "state": "settled",
        "project_id": "web",
        "activity_name": None,
        "reserved_credits": 75,
        "used_credits": 80,
        "refunded_credits": 30,
        "credits": -50,
        "archived_in_part": False,
        "last_id": 7,
        "event": None,
        "events_url": f"{EVENTS}?workflow_id=w1",
    }
    events = own_api.get(run["events_url"]).json()["items"]
    assert sum(event["credits"] for event in events) == run["credits"]
    assert (run["changed_at"], run["began_at"]) == (events[0]["created_at"], events[-1]["created_at"])
    assert (other["state"], other["expires_at"] > other["began_at"]) == ("reserved", True)
    assert (purchase["workflow_id"], purchase["events_url"], purchase["event"]["id"]) == (None, None, 2)
    assert allocation["event"] == own_api.get(EVENTS, params={"event_type": "subscription_credit"}).json()["items"][0]
    available = own_api.get(CREDITS).json()["available"]
    assert sum(item["credits"] for item in page["items"]) == available


def test_the_pages_by_run_continue_one_another_while_events_are_added(
    own_api: Api, history: None, engine: Engine
) -> None:
    expected = own_api.get(EVENTS, params={"group_by": "workflow"}).json()["items"]
    seen: list[dict[str, Any]] = []
    query: dict[str, Any] = {"group_by": "workflow", "limit": 1}
    for number in range(4):
        page = own_api.get(EVENTS, params=query).json()
        seen += page["items"]
        query["cursor"] = page["next_cursor"]
        assert page["total"] is None
        refund = {"refund_id": f"r{number}", "credits": 1, "workflow_id": "w1"}
        apply_batch(engine, [delivery("wallet.refund", org_id="acme", **refund)])
    assert (seen, query["cursor"]) == (expected, None)


def test_an_unknown_event_type_is_told_the_nine(api: Api) -> None:
    status, detail = api.problem(f"{EVENTS}?event_type=gift")
    assert status == 422
    assert detail.startswith("event_type must be 'usage', 'prepaid_purchase', 'subscription_credit', 'billing', ")


def test_of_many_bad_parameters_the_first_ten_are_told(api: Api) -> None:
    [(status, one), (_, many)] = [api.problem(f"{EVENTS}?{'&'.join(['event_type=x'] * n)}") for n in (1, 1_000)]
    assert (status, many) == (422, f"{'; '.join([one] * 10)}; … and 990 more")


def test_the_wallet_says_what_there_is(api: Api) -> None:
    body = api.get(CREDITS).json()
    period = body.pop("current_period")
    assert period["start"][:4].isdigit()
    assert period["end"] > period["start"]
    assert body == {
        "org_id": "acme",
        "balance": 520,
        "available": 500,
        "prepaid_balance": 500,
        "subscription_balance": 20,
        "reserved_credits": 20,
        "credit_limit": 0,
        "period_cap": None,
        "used_this_period": 80,
        "included_this_period": 100,
        "plan": "pro",
        "ending": [],
        "prepaid_ending": 0,
        "plan_ends_at": None,
        "next_plan": None,
    }


def test_the_wallet_of_an_organization_without_credits_is_empty(own_api: Api) -> None:
    body = own_api.get(CREDITS).json()
    assert (body["balance"], body["plan"], body["current_period"]) == (0, None, None)


def test_the_wallet_as_of_a_time(own_api: Api, history: None, engine: Engine) -> None:
    [(bought_at,)] = sql(engine, "SELECT created_at FROM credit_events WHERE org_id = 'acme' AND seq = 6")
    now = own_api.get(CREDITS, params={"at": bought_at.isoformat()}).json()
    assert (now["available"], now["reserved_credits"], now["used_this_period"]) == (500, 20, 80)
    before = own_api.get(CREDITS, params={"at": "2000-01-01"}).json()
    assert (before["available"], before["prepaid_balance"]) == (0, 0)
    later = own_api.get(CREDITS, params={"at": "2999-01-01"}).json()
    assert later["available"] == 500
    assert datetime.fromisoformat(later["at"]) <= datetime.now(UTC)
    assert own_api.problem(f"{CREDITS}?at=noon")[0] == 422


def test_a_workflow_is_told_with_its_refunds(own_api: Api, history: None, engine: Engine) -> None:
    fields = {"org_id": "acme", "refund_id": "r1", "credits": 30, "workflow_id": "w1"}
    apply_batch(engine, [delivery("wallet.refund", **fields)])
    body = own_api.get("/api/organizations/acme/workflows/w1").json()
    assert (body["refunded_credits"], body["events"][-1]["event_type"], body["events"][-1]["credits"]) == (
        30,
        "refund",
        30,
    )


def test_every_time_is_written_in_one_form(api: Api) -> None:
    wallet = api.get(CREDITS).json()
    workflow = api.get("/api/organizations/acme/workflows/w2").json()
    events = api.get(EVENTS).json()["items"]
    then = [api.get(CREDITS, params={"at": at}).json()["at"] for at in ("2026-01-31", "2026-01-31T02:00:00+02:00")]
    assert then == ["2026-01-31T00:00:00+00:00"] * 2
    times = [*wallet["current_period"].values(), workflow["expires_at"], *(event["created_at"] for event in events)]
    assert [time for time in times if not re.fullmatch(MOMENT, time)] == []


def test_a_workflow_and_its_events(api: Api) -> None:
    body = api.get("/api/organizations/acme/workflows/w1").json()
    assert [event["event_type"] for event in body.pop("events")] == ["reservation", "reservation_released", "usage"]
    assert body.pop("expires_at")
    assert body == {
        "workflow_id": "w1",
        "state": "settled",
        "project_id": "web",
        "activity_name": None,
        "requested_credits": 75,
        "reason": None,
        "reserved_credits": 75,
        "used_credits": 80,
        "refunded_credits": 0,
        "archived_in_part": False,
    }
    for unknown in ("w9", "w%00", "%3Cb%3E"):
        assert api.problem(f"/api/organizations/acme/workflows/{unknown}") == (
            404,
            "There is no such workflow in this organization.",
        )


def test_a_workflow_says_what_it_asked_for_and_why_it_was_refused(own_api: Api, engine: Engine) -> None:
    apply_batch(engine, [delivery("workflow.start", org_id="acme", workflow_id="w1", credits=75)])
    body = own_api.get("/api/organizations/acme/workflows/w1").json()
    names = ("state", "requested_credits", "reason", "reserved_credits", "events")
    assert [body[name] for name in names] == ["rejected", 75, "insufficient_credits", None, []]


@pytest.mark.parametrize("org_id", ["%00", "a%20b", "x" * 129])
def test_what_cannot_be_an_organization_does_not_exist_for_anybody(api: Api, org_id: str) -> None:
    everybody = {"Authorization": f"Bearer {token(orgs='*')}"}
    path = f"/api/organizations/{org_id}/credits"
    assert api.problem(path, headers=everybody) == (
        404,
        "There is no such organization, or this token does not name it (orgs).",
    )


@pytest.mark.parametrize(
    ("header", "status", "detail"),
    [
        (None, 401, "Send a token: Authorization: Bearer …"),
        ("Basic YTpi", 401, "Send a token: Authorization: Bearer …"),
        ("Bearer nonsense", 401, "The token is not valid."),
        (f"Bearer {token(exp=1)}", 401, "The token has expired."),
        (
            f"Bearer {jwt.encode({'exp': FUTURE}, 'another secret, also of 32 characters')}",
            401,
            "The token is not valid.",
        ),
        (f"Bearer {UNSIGNED}", 401, "The token is not valid."),
        (
            f"Bearer {token(orgs=['other'])}",
            404,
            "There is no such organization, or this token does not name it (orgs).",
        ),
        (f"Bearer {token(orgs=[])}", 404, "There is no such organization, or this token does not name it (orgs)."),
        (f"Bearer {token(scope='workflows:write')}", 403, "The token lacks the scope credits:read."),
    ],
)
def test_who_may_not_read_is_told_why(api: Api, header: str | None, status: int, detail: str) -> None:
    headers = {"Authorization": header} if header else {"Authorization": ""}
    assert api.problem(EVENTS, headers=headers) == (status, detail)


def test_a_token_without_expiry_is_refused(api: Api) -> None:
    endless = jwt.encode({"sub": "ann", "orgs": ["acme"], "scope": "credits:read"}, SECRET)
    assert api.problem(EVENTS, headers={"Authorization": f"Bearer {endless}"}) == (401, 'The token has no "exp".')


OURS, ISSUER = "https://credits.example", "https://login.example/"


@pytest.fixture(scope="module")
def particular(services: Embedded) -> Iterator[str]:
    """The address of an API that takes only tokens that are for it and from one issuer."""
    with installed(services) as own:
        settings = {"jwt_audience": OURS, "jwt_issuer": ISSUER}
        with served(own.database_url, own.broker_url, **settings) as address:
            yield address


@pytest.mark.parametrize(
    ("claims", "refusal"),
    [
        ({"aud": OURS, "iss": ISSUER}, None),
        ({"aud": ["https://mail.example", OURS], "iss": ISSUER}, None),
        ({"iss": ISSUER}, 'The token has no "aud".'),
        ({"aud": OURS}, 'The token has no "iss".'),
        ({"aud": "", "iss": ISSUER}, 'The token has no "aud".'),
        (
            {"aud": "https://mail.example", "iss": ISSUER},
            'The token is for another service: its "aud" is not the expected one.',
        ),
        ({"aud": [], "iss": ISSUER}, 'The token has no "aud".'),
        (
            {"aud": 5, "iss": ISSUER},
            'The token is for another service: its "aud" is not the expected one.',
        ),
        (
            {"aud": OURS, "iss": "https://login.example"},
            'The token is of another issuer: its "iss" is not the expected one.',
        ),
    ],
)
def test_a_token_has_to_be_for_this_service_and_from_its_issuer_where_that_is_set(
    particular: str, claims: dict[str, Any], refusal: str | None
) -> None:
    with Api(base_url=particular, headers={"Authorization": f"Bearer {token(**claims)}"}) as api:
        if refusal is None:
            assert api.get(CREDITS).status_code == 200
        else:
            assert api.problem(CREDITS) == (401, refusal)


@pytest.mark.parametrize("claims", [{"aud": "https://credits.example"}, {"aud": ["a", "b"]}, {"iss": "anybody"}])
def test_whom_a_token_is_for_does_not_matter_where_nothing_is_set(api: Api, claims: dict[str, Any]) -> None:
    assert api.get(CREDITS, headers={"Authorization": f"Bearer {token(**claims)}"}).status_code == 200


UNWRITABLE = ["a\x00b", "a\nb", "a\x7fb", "a\x85b", "\ud800", "\udfff"]


@pytest.mark.parametrize("name", UNWRITABLE, ids=ascii)
def test_a_token_whose_names_cannot_be_written_is_refused(api: Api, name: str) -> None:
    for path in (CREDITS, EVENTS):
        header = {"Authorization": f"Bearer {token(sub=name)}"}
        assert api.problem(path, headers=header) == (401, 'The token\'s "sub" must not contain control characters.')
        header = {"Authorization": f"Bearer {token(orgs=['acme', name])}"}
        assert api.problem(path, headers=header) == (401, 'The token\'s "orgs" must not contain control characters.')
    assert api.get(HISTORY, headers=header).status_code == 401
    named = token(sub="山田\u3000太郎 <ann@acme.example>", orgs=["acme"])
    assert api.get(HISTORY, headers={"Authorization": f"Bearer {named}"}).status_code == 200


def test_a_cookie_opens_no_api(api: Api) -> None:
    api.cookies.set("holdfast_session", token())
    assert api.problem(EVENTS, headers={"Authorization": ""})[0] == 401


def test_an_engine_reports_through_the_broker(api: Api) -> None:
    write = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
    before = _waiting(api)
    response = api.post("/api/organizations/acme/workflows/w1/start", json={"credits": 5}, headers=write)
    assert (response.status_code, response.json()) == (
        202,
        {"status": "accepted", "task": "workflow.start", "org_id": "acme", "workflow_id": "w1"},
    )
    assert _waiting(api) == before + 1


def test_the_metrics_count_what_waits_in_the_queue_of_engines_too(api: Api, ledger: Installation) -> None:
    of_engines = 'holdfast_queue_messages{queue="credits.engine"}'
    before = _metric(api, of_engines)
    with Client(ledger.broker_url, queue=ENGINE_QUEUE) as engine:
        engine.cancel(org_id="acme", workflow_id="w1")
    assert _metric(api, of_engines) == before + 1


def _waiting(api: Api) -> float:
    return _metric(api, 'holdfast_queue_messages{queue="credits"}')


def _metric(api: Api, name: str) -> float:
    [value] = [line.rsplit(" ", 1)[1] for line in api.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(value)


def test_the_metrics_tell_how_long_the_oldest_message_has_waited(api: Api) -> None:
    age = 'holdfast_queue_oldest_message_age_seconds{queue="credits"}'
    write = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
    for number in range(2):
        api.post(f"/api/organizations/acme/workflows/wait-{number}/cancel", json={}, headers=write)
    first = _metric(api, age)
    assert eventually(lambda: _metric(api, age)) > first


@pytest.mark.parametrize(
    ("path", "content", "status", "detail"),
    [
        ("w1/start", b"{}", 422, "workflow.start: credits is missing"),
        ("w1/start", b'{"credits": "5"}', 422, "workflow.start: credits must be an integer, got '5'"),
        ("w1/start", b"not json", 400, "The body cannot be read: not JSON: Expecting value at character 1."),
        ("w1/start", b"[]", 422, "The body must be a JSON object."),
        ("w1/start", b'{"credits": 5, "org_id": "other"}', 422, "org_id belongs in the path, not in the body."),
        ("w1/start", b'{"credits": 5, "org_id": "acme"}', 422, "org_id belongs in the path, not in the body."),
        ("w1/cancel", b'{"workflow_id": null}', 422, "workflow_id belongs in the path, not in the body."),
        ("w1/start", b"[" * 100_000, 413, "The body is larger than 65,536 bytes."),
        ("w1/start", b"[" * 60_000, 400, "The body cannot be read: the JSON is nested too deeply."),
        (
            "w1/start",
            b'{"credits": -' + b"9" * 5_000 + b"}",
            400,
            "The body cannot be read: an integer must not have 5,000 digits.",
        ),
        (
            "w1/start",
            b'{"credits": 5, "credits": 6}',
            400,
            "The body cannot be read: credits is given more than once in the same object.",
        ),
        (
            "w1/cancel",
            b'{"metadata": {"a": [{"\\ud800": 1, "\\ud800": 1}]}}',
            400,
            "The body cannot be read: \\ud800 is given more than once in the same object.",
        ),
        (
            "w%20/cancel",
            b"{}",
            422,
            "workflow.cancel: workflow_id must be 1-128 characters of A-Z a-z 0-9 _ . : -, got 'w '",
        ),
    ],
)
def test_a_bad_report_is_refused_in_a_sentence(api: Api, path: str, content: bytes, status: int, detail: str) -> None:
    write = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
    response = api.post(f"/api/organizations/acme/workflows/{path}", content=content, headers=write)
    assert (response.status_code, response.json()["detail"]) == (status, detail)


def test_a_step_that_does_not_exist_is_no_address(api: Api) -> None:
    response = api.post("/api/organizations/acme/workflows/w1/stop", json={})
    assert (response.status_code, response.json()["detail"]) == (404, "There is nothing at this address.")


def test_who_hangs_up_in_the_middle_of_a_report_is_no_error(app: FastAPI) -> None:
    came: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return came.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/organizations/acme/workflows/w1/start",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {token(scope='workflows:write')}".encode())],
    }
    asyncio.run(app(scope, receive, send))
    assert (came, sent) == ([], [])


@pytest.mark.parametrize("source", [*OTHERS_SOURCES["workflows:write"], *DISGUISES], ids=ascii)
@pytest.mark.parametrize("step", ["start", "cancel"])
def test_an_engine_cannot_pass_for_somebody_else(api: Api, step: str, source: str) -> None:
    write = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
    before = _waiting(api)
    body = {"source": source} | ({"credits": 5} if step == "start" else {})
    response = api.post(f"/api/organizations/acme/workflows/w1/{step}", json=body, headers=write)
    assert (response.status_code, response.json()["detail"]) == (
        422,
        f"workflow.{step}: source must not be admin, billing, operator or scheduler: these are reserved",
    )
    assert _waiting(api) == before
    own = api.post(f"/api/organizations/acme/workflows/w1/{step}", json={**body, "source": "crm"}, headers=write)
    assert own.status_code == 202


def test_over_http_a_source_is_printable_ascii(api: Api) -> None:
    def answer(source: str) -> tuple[int, str | None]:
        write = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
        response = api.post("/api/organizations/acme/workflows/w1/cancel", json={"source": source}, headers=write)
        return response.status_code, response.json().get("detail")

    sentence = "workflow.cancel: source must be printable ASCII over HTTP, got"
    assert [answer(source) for source in NOT_ASCII] == [(422, f"{sentence} {source!a}") for source in NOT_ASCII]
    assert {answer(source) for source in ("crm", "Studio 2 (EU)", "administration", "~")} == {(202, None)}


def test_nobody_else_than_those_has_a_source_of_their_own() -> None:
    others = {
        model.model_fields["source"].default for task, model in MESSAGES.items() if not task.startswith("workflow.")
    }
    assert {*others, SCHEDULER, OPERATOR} == set(OTHERS_SOURCES["workflows:write"])
    assert {SCHEDULER, OPERATOR} == set(OTHERS_SOURCES["wallet:write"])


def test_reading_does_not_allow_reporting(api: Api) -> None:
    response = api.post("/api/organizations/acme/workflows/w1/start", json={"credits": 5})
    assert (response.status_code, response.json()["detail"]) == (403, "The token lacks the scope workflows:write.")


def test_health_and_metrics_need_no_token(api: Api) -> None:
    nobody = {"Authorization": ""}
    assert api.get("/healthz", headers=nobody).json() == {"status": "ok"}
    for path in ("/healthz", "/readyz"):
        head = api.head(path, headers=nobody)
        assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", "application/json")
    ready = api.get("/readyz", headers=nobody)
    assert (ready.status_code, ready.json()) == (200, {"database": "ok", "broker": "ok"})
    metrics = api.get("/metrics", headers=nobody).text
    assert "holdfast_database_up 1.0" in metrics
    assert "holdfast_broker_up 1.0" in metrics
    assert "holdfast_dead_letters_open 0.0" in metrics
    assert "holdfast_wallets_overdue_period 0.0" in metrics
    assert "acme" not in metrics


def test_the_log_of_the_server_has_no_health_check_that_went_well(installation: Installation) -> None:
    settings = {"HOLDFAST_JWT_SECRET": SECRET, **installation.environment_of(READER)}
    server = installation.start("api", sys.executable, "-m", "uvicorn", "api_stub.app:app", "--port", "0", **settings)
    found = eventually(lambda: re.search(r"http://127\.0\.0\.1:\d+", log_of(server)))
    assert found is not None
    address = found[0]
    for path in ("/healthz", "/readyz", "/readyz?by=docker", "/api/organizations/acme/credits"):
        httpx.get(address + path, timeout=PATIENCE_S)
    sql(installation.engine, "UPDATE alembic_version SET version_num = '9999'")
    assert httpx.get(f"{address}/readyz", timeout=PATIENCE_S).status_code == 503
    eventually(lambda: "503" in log_of(server))
    messages = [json.loads(line)["message"] for line in log_of(server).splitlines()]
    assert [re.sub(".* - ", "", message) for message in messages if "HTTP/" in message] == [
        '"GET /api/organizations/acme/credits HTTP/1.1" 401',
        '"GET /readyz HTTP/1.1" 503',
    ]


def test_the_log_of_the_server_names_the_right_without_which_there_are_no_figures(installation: Installation) -> None:
    settings = {"HOLDFAST_JWT_SECRET": SECRET, **installation.environment_of(READER)}
    server = installation.start("api", sys.executable, "-m", "uvicorn", "api_stub.app:app", "--port", "0", **settings)
    found = eventually(lambda: re.search(r"http://127\.0\.0\.1:\d+", log_of(server)))
    assert found is not None
    sql(installation.engine, f"REVOKE ALL ON last_verification FROM {READER}")
    assert "holdfast_database_up 0.0" in httpx.get(f"{found[0]}/metrics", timeout=PATIENCE_S).text
    messages = [json.loads(line)["message"] for line in log_of(server).splitlines()]
    [line] = [message for message in messages if "figures" in message]
    assert "permission denied for table last_verification; run `holdfast migrate --roles`" in line


def test_without_its_database_the_api_says_so(own_api: Api, engine: Engine, services: Embedded) -> None:
    [(name,)] = sql(engine, "SELECT current_database()")
    engine.dispose()
    admin = connect(services.admin_url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        try:
            assert own_api.problem(EVENTS) == (503, "The ledger does not answer at the moment; try again.")
            assert own_api.get("/readyz").json() == {"database": "unavailable", "broker": "ok"}
            assert "holdfast_database_up 0.0" in own_api.get("/metrics").text
        finally:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    admin.dispose()


@pytest.fixture
def exhausted(app: FastAPI) -> Iterator[None]:
    """All database connections of the app are in use, and nobody waits long for one."""
    engine = app.state.services.engine
    assert engine.pool.timeout() == POOL_TIMEOUT_S == 5
    engine.pool._timeout = 0.05
    with ExitStack() as held:
        for _ in range(engine.pool.size() + engine.pool._max_overflow):
            held.enter_context(engine.connect())
        yield


def test_while_all_connections_are_in_use_the_answer_is_to_try_again(own_api: Api, exhausted: None) -> None:
    assert own_api.problem(EVENTS) == (503, "The ledger is busy at the moment; try again.")
    assert own_api.get(EVENTS).headers["retry-after"] == "5"
    # The database itself is well, and figures are wanted most when there is much to do.
    ready = own_api.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"database": "ok", "broker": "ok"})
    assert "holdfast_database_up 1.0" in own_api.get("/metrics").text
    for path in (HISTORY, f"{HISTORY}.csv"):
        page = own_api.get(path)
        assert (page.status_code, page.headers["retry-after"]) == (503, "5")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "Many people are here right now" in page.text


@pytest.fixture
def frozen(app: FastAPI, engine: Engine, services: Embedded) -> Iterator[None]:
    """The database hangs: it takes connections, two idle ones are open, and nothing is answered any more.

    What a request waits for has no end here, so that who waits for a request waits too long on any machine.
    """
    own = app.state.services.engine
    with own.connect() as one, own.connect() as other:
        assert (one.scalar(text("SELECT 1")), other.scalar(text("SELECT 1"))) == (1, 1)
    own.pool._timeout = 2 * PATIENCE_S
    event.listen(own, "do_connect", lambda *args: args[-1].update(connect_timeout=int(2 * PATIENCE_S)))
    backends = sql(engine, "SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
    engine.dispose()
    assert services.postgres.pid is not None
    with suspended(services.postgres.pid, *(pid for (pid,) in backends)):
        yield


def test_a_database_that_hangs_is_down(own_api: Api, frozen: None) -> None:
    with ThreadPoolExecutor(82) as many:
        _assert_is_down(own_api, many)
        # More requests than there are threads, all of which wait for the database.
        waiting = [many.submit(_give_up, own_api, somebody) for somebody in range(80)]
        _assert_is_down(own_api, many)
    assert {answer.result() for answer in waiting} <= {503, None}


def _assert_is_down(api: Api, many: ThreadPoolExecutor) -> None:
    answers = [many.submit(api.get, path, timeout=6 * CONNECT_TIMEOUT_S) for path in ("/readyz", "/metrics")]
    ready, metrics = (answer.result() for answer in answers)
    assert (ready.status_code, ready.json()) == (503, {"database": "unavailable", "broker": "ok"})
    assert "holdfast_database_up 0.0" in metrics.text
    assert "holdfast_broker_up 1.0" in metrics.text


def _give_up(api: Api, somebody: int) -> int | None:
    """Ask for the credits; None: there was no answer in a second."""
    try:
        return api.get(CREDITS, timeout=1, headers=_somebody(somebody)).status_code
    except httpx.TimeoutException:
        return None


def test_many_requests_at_once_do_not_wait_for_one_another(app: FastAPI, own_api: Api, history: None) -> None:
    # More than there are threads and connections together: a request that held one while it waits for the other
    # would stop them all until the pool's timeout.
    app.state.services.engine.pool._timeout = 2 * PATIENCE_S
    with ThreadPoolExecutor(80) as many:
        answers = list(
            many.map(lambda n: own_api.get(CREDITS, timeout=PATIENCE_S, headers=_somebody(n % 80)), range(400))
        )
    assert {answer.status_code for answer in answers} == {200}


def _defect(*_: object, **__: object) -> None:
    raise LookupError("a private detail")


def _wrong_statement(ledger: Connection, *_: object, **__: object) -> None:
    ledger.exec_driver_sql("SELECT 1 / (length('a private detail') - 16)")


@pytest.fixture
def log(own_api: Api) -> Iterator[io.StringIO]:
    """What the server logs, from now on."""
    server, written = logging.getLogger("uvicorn.error"), io.StringIO()
    handler = logging.StreamHandler(written)
    server.addHandler(handler)
    yield written
    server.removeHandler(handler)


@pytest.mark.parametrize(
    ("path", "function", "fault"),
    [
        (CREDITS, "views.wallet", _defect),
        (CREDITS, "views.wallet", _wrong_statement),
        (EVENTS, "history.events", _defect),
        (EVENTS, "history.events", _wrong_statement),
        ("/metrics", "figures.system_figures", _defect),
        (HISTORY, "views.reservations_held", _defect),
        (HISTORY, "views.reservations_held", _wrong_statement),
    ],
)
def test_what_nobody_expected_is_a_sentence_and_the_log_has_the_rest(
    own_api: Api,
    log: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    function: str,
    fault: Callable[..., None],
) -> None:
    monkeypatch.setattr(f"ledger.{function}", fault)
    failed = own_api.get(path)
    assert (failed.status_code, failed.headers["connection"]) == (500, "close")
    assert (failed.headers["cache-control"], failed.headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert "private detail" not in failed.text
    sentence = "Something went wrong on the server; its log says what."
    if path == HISTORY:
        assert failed.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in failed.headers["content-security-policy"]
        assert "This page could not be made." in failed.text
    else:
        assert failed.headers["content-type"] == "application/problem+json"
        assert failed.json() == {
            "type": "about:blank",
            "title": "Internal Server Error",
            "status": 500,
            "detail": sentence,
        }
    logged = eventually(log.getvalue)  # the server writes it when it has answered
    assert "Traceback (most recent call last):" in logged
    assert "private detail" in logged
    monkeypatch.undo()
    assert own_api.get(path).status_code == 200


TO_PEOPLE = {
    404: "Check the address. If a link led you here, tell whoever gave it to you.",
    405: "A button of another page leads here. Go back, and use that button.",
}


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/api", 404, "There is nothing at this address."),
        ("GET", "/api/nothing", 404, "There is nothing at this address."),
        ("GET", f"{CREDITS}/", 404, "There is nothing at this address."),
        ("GET", "/api/%0A", 404, "There is nothing at this address."),
        ("POST", CREDITS, 405, "This address takes GET or HEAD, not POST."),
        ("DELETE", "/api/organizations/acme/workflows/w1/start", 405, "This address takes POST, not DELETE."),
        ("PATCH", "/metrics", 405, "This address takes GET or HEAD, not PATCH."),
        ("POST", "/healthz", 405, "This address takes GET or HEAD, not POST."),
        ("GET", "/nothing", 404, "There is nothing at this address."),
        ("GET", "/apinothing", 404, "There is nothing at this address."),
        ("GET", "/static/nothing.css", 404, "There is nothing at this address."),
        ("GET", "/static", 404, "There is nothing at this address."),
        ("GET", "/operator", 404, "There is nothing at this address."),
        ("GET", "/organizations/acme/nothing", 404, "There is no such page."),
        ("POST", HISTORY, 405, "This address takes GET or HEAD, not POST."),
        ("PUT", "/signin", 405, "This address takes GET or HEAD or POST, not PUT."),
        ("POST", "/static/signin", 405, "This address takes GET or HEAD, not POST."),
        ("GET", "/signout", 405, "This address takes POST, not GET."),
    ],
)
def test_what_leads_nowhere_says_so_to_programs_and_to_people(
    api: Api, method: str, path: str, status: int, sentence: str
) -> None:
    answer = api.request(method, path)
    assert answer.status_code == status
    assert status != 405 or f"takes {answer.headers['allow'].replace(', ', ' or ')}, not" in sentence
    if path.startswith(("/api/", "/healthz", "/metrics")) or path == "/api":
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json() == {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": sentence,
        }
    else:
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert f"<p>{TO_PEOPLE[status]}</p>" in answer.text
        assert sentence not in answer.text


@pytest.mark.parametrize(
    "path", ["/", "/signin", HISTORY, f"{HISTORY}.csv", EVENTS, CREDITS, "/metrics", "/openapi.json", "/api/nothing"]
)
def test_head_is_answered_as_get_without_what_is_asked_for(api: Api, path: str) -> None:
    varying = {"date", "set-cookie", "content-length", "transfer-encoding", "holdfast-as-of"}
    head, whole = (api.request(method, path) for method in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert {name: value for name, value in head.headers.items() if name not in varying} == {
        name: value for name, value in whole.headers.items() if name not in varying
    }


@pytest.mark.parametrize(
    "path", [CREDITS, f"{CREDITS}?at=noon", "/api/nothing", "/metrics", "/readyz", "/openapi.json"]
)
def test_every_answer_to_programs_is_kept_by_nobody_and_taken_as_what_it_is(api: Api, path: str) -> None:
    headers = api.get(path).headers
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_the_openapi_document_describes_it(api: Api) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert set(paths) >= {
        "/api/organizations/{orgId}/credit-events",
        "/api/organizations/{orgId}/credits",
        "/api/organizations/{orgId}/workflows/{workflowId}",
        "/api/organizations/{orgId}/quote",
        "/api/messages",
        *(f"/api/organizations/{{orgId}}/workflows/{{workflowId}}/{step}" for step in STEPS),
        *(f"/api/organizations/{{orgId}}/{task.replace('.', '/')}" for task in MESSAGES if task.startswith("wallet.")),
        "/healthz",
        "/readyz",
        "/metrics",
    }
    [at] = [it for it in paths["/api/organizations/{orgId}/credits"]["get"]["parameters"] if it["name"] == "at"]
    assert "A date alone is the beginning of that UTC day." in at["description"]
    reports = [paths[f"/api/organizations/{{orgId}}/workflows/{{workflowId}}/{step}"]["post"] for step in STEPS]
    for report in reports:
        assert "`admin`, `billing`, `operator` or `scheduler` is refused" in report["description"]
        assert "`source` is printable ASCII" in report["description"]
        assert "429" not in report["responses"]
    assert len({report["operationId"] for report in reports}) == len(STEPS)
    for path, methods in paths.items():
        if path.startswith("/api/") and "get" in methods:
            too_many = methods["get"]["responses"]["429"]
            assert set(too_many["content"]) == {"application/problem+json"}
            assert too_many["headers"]["Retry-After"]["schema"] == {"type": "integer"}
    start, *_, fail = (report["requestBody"]["content"]["application/json"]["schema"] for report in reports)
    assert start["required"] == ["credits"]
    assert set(fail["properties"]) == {"source", "occurred_at", "metadata", "reason"}
    assert start["properties"]["source"]["not"] == {"enum": ["admin", "billing", "operator", "scheduler"]}
    assert start["properties"]["source"]["pattern"] == "^[ -~]+$"
    for path, methods in paths.items():
        for described in methods.values():
            assert set(described["responses"]["default"]["content"]) == {"application/problem+json"}, path
            for status, answer in described["responses"].items():
                if status.startswith(("4", "5")):
                    assert set(answer["content"]) == {"application/problem+json"}, (path, status)


def test_every_answer_is_as_the_openapi_document_says(api: Api, ledger: Installation) -> None:
    plan: dict[str, Any] = {"subscription_id": "s1", "plan": "Pro", "monthly_credits": 5}
    later, of_ending = "2099-01-01T00:00:00Z", {"org_id": "ending"}
    apply_batch(
        ledger.engine,
        [
            delivery("wallet.grant", **of_ending, grant_id="g1", credits=5, expires_at=later),
            delivery("wallet.subscribe", **of_ending, **plan, version=1),
            delivery("wallet.subscribe", **of_ending, **{**plan, "subscription_id": "s2"}, version=2, anchor=later),
        ],
    )
    ending = api.get("/api/organizations/ending/credits", headers=_reader("ending"))
    assert ending.json()["ending"] == [{"credits": 5, "expires_at": "2099-01-01T00:00:00+00:00", "from": "grant:g1"}]
    assert ending.json()["next_plan"]["starts_at"] == "2099-01-01T00:00:00+00:00"
    document = api.get("/openapi.json").json()
    write = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
    one = "/api/organizations/{orgId}/workflows/{workflowId}"
    answers = [
        (EVENTS.replace("acme", "{orgId}"), api.get(EVENTS)),
        (EVENTS.replace("acme", "{orgId}"), api.get(EVENTS, params={"limit": 1})),
        (CREDITS.replace("acme", "{orgId}"), api.get(CREDITS)),
        (CREDITS.replace("acme", "{orgId}"), ending),
        (CREDITS.replace("acme", "{orgId}"), api.get("/api/organizations/other/credits", headers=_reader("other"))),
        (CREDITS.replace("acme", "{orgId}"), api.get(CREDITS, params={"at": "2026-01-01"})),
        ("/api/organizations/{orgId}/quote", api.get("/api/organizations/acme/quote", params={"credits": 501})),
        *((one, api.get(f"/api/organizations/acme/workflows/{workflow_id}")) for workflow_id in ("w1", "w2")),
        (f"{one}/cancel", api.post("/api/organizations/acme/workflows/w1/cancel", json={}, headers=write)),
        (USAGE.replace("acme", "{orgId}"), api.get(USAGE, params={"group_by": ["project", "day"]})),
        (USAGE.replace("acme", "{orgId}"), api.get(USAGE)),
        ("/healthz", api.get("/healthz")),
        ("/readyz", api.get("/readyz")),
    ]
    assert answers[0][1].json()["items"] != []
    for path, answer in answers:
        assert answer.is_success, answer.text
        [described] = document["paths"][path].values()
        schema = described["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
        assert _fits(answer.json(), schema, document["components"]["schemas"]), (path, answer.json())


def test_the_openapi_document_says_where_a_token_is_needed(api: Api) -> None:
    document = api.get("/openapi.json").json()
    [(name, scheme)] = document["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")
    for path, methods in document["paths"].items():
        for described in methods.values():
            assert described.get("security") == ([{name: []}] if path.startswith("/api/") else None), path


def _somebody(number: int) -> dict[str, str]:
    """One of many readers, each of whom has turns of their own."""
    return {"Authorization": f"Bearer {token(sub=f'reader-{number}')}"}


def _reader(org_id: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(orgs=[org_id])}"}


TYPES = {"boolean": bool, "integer": int, "string": str, "null": type(None), "object": dict}


def _fits(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> bool:
    """Whether `value` is what the schema says; an object has only fields that it names."""
    match schema:
        case {"$ref": name}:
            return _fits(value, schemas[name.rpartition("/")[2]], schemas)
        case {"anyOf": several}:
            return any(_fits(value, each, schemas) for each in several)
        case {"enum": values}:
            return value in values
        case {"const": only}:
            return bool(value == only)
        case {"properties": fields, "required": required}:
            return (
                isinstance(value, dict)
                and set(required) <= set(value) <= set(fields)
                and all(_fits(value[name], fields[name], schemas) for name in value)
            )
        case {"type": "array", "items": each}:
            return isinstance(value, list) and all(_fits(item, each, schemas) for item in value)
        case {"format": "date-time"}:
            return isinstance(value, str) and re.fullmatch(MOMENT, value) is not None
        case {"type": name}:
            return type(value) is TYPES[name]
        case _:
            pytest.fail(f"says nothing: {schema}")
