"""The HTTP API, served for real, on a real ledger: what customers and engines get, and what they get told."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest
import uvicorn
from sqlalchemy import Engine

from api_stub.app import create_app
from ledger.settings import Settings
from ledger.store import apply_batch
from tests.support import delivery, eventually, sql
from worker.embedded import Embedded

SECRET = "a secret for tests, of at least 32 characters"
FUTURE = 4_102_444_800
EVENTS = "/api/organizations/acme/credit-events"
CREDITS = "/api/organizations/acme/credits"
PAST = {"created_at", "metadata"}


def token(**claims: Any) -> str:
    return jwt.encode({"sub": "ann", "orgs": ["acme"], "scope": "credits:read", "exp": FUTURE} | claims, SECRET)


class Api(httpx.Client):
    """The API at its address, asked by somebody who may read the credits of acme."""

    def problem(self, path: str, **params: Any) -> tuple[int, str]:
        response = self.get(path, **params)
        assert response.headers["content-type"] == "application/problem+json"
        body = response.json()
        assert set(body) == {"type", "title", "status", "detail"}
        assert body["status"] == response.status_code
        return response.status_code, body["detail"]


@pytest.fixture
def api(database_url: str, services: Embedded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    settings = Settings(database_url=database_url, broker_url=services.broker_url, jwt_secret=SECRET)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    [listener] = server.servers
    port = listener.sockets[0].getsockname()[1]
    with Api(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token()}"}) as client:
        yield client
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def history(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            delivery(
                "wallet.subscribe", org_id="acme", subscription_id="s1", version=1, plan="pro", monthly_credits=100
            ),
            delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=500),
            delivery("workflow.start", org_id="acme", workflow_id="w1", credits=75, project_id="web"),
            delivery("workflow.finish", org_id="acme", workflow_id="w1", credits=80),
            delivery("workflow.start", org_id="acme", workflow_id="w2", credits=20, activity_name="Crawl"),
            delivery("wallet.purchase", org_id="other", purchase_id="p1", credits=1),
        ],
    )


def test_the_history_has_the_columns_of_the_contract_newest_first(api: Api, history: None) -> None:
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
        ("limit=2&offset=1", [5, 4]),
        ("date_from=2000-01-01&date_to=2999-12-31", [6, 5, 4, 3, 2, 1]),
        ("date_to=2000-01-01", []),
        ("date_from=2999-01-01T00:00:00Z", []),
        ("cursor=3", [2, 1]),
    ],
)
def test_the_history_is_filtered_and_paged(api: Api, history: None, query: str, ids: list[int]) -> None:
    assert [item["id"] for item in api.get(f"{EVENTS}?{query}").json()["items"]] == ids


def test_a_cursor_neither_skips_nor_repeats_while_events_are_added(api: Api, history: None, engine: Engine) -> None:
    seen: list[int] = []
    cursor = None
    for number in range(3):
        page = api.get(EVENTS, params={"limit": 2} | ({} if cursor is None else {"cursor": cursor})).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        apply_batch(engine, [delivery("wallet.grant", org_id="acme", grant_id=f"g{number}", credits=1)])
    assert (seen, cursor) == ([6, 5, 4, 3, 2, 1], None)


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("limit=0", "limit must be greater than or equal to 1"),
        ("limit=101", "limit must be less than or equal to 100"),
        ("limit=ten", "limit must be a valid integer, unable to parse string as an integer"),
        ("offset=-1", "offset must be greater than or equal to 0"),
        (f"offset={10**30}", "offset must be less than or equal to 9007199254740991"),
        ("date_from=yesterday", "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z"),
        ("date_to=2026-02-30", "date_to must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z"),
        ("cursor=x", "cursor must be a valid integer, unable to parse string as an integer"),
        ("cursor=3&offset=1", "cursor cannot be combined with offset"),
        ("project_id=%00", "project_id must not contain control characters"),
    ],
)
def test_a_bad_parameter_is_named_in_a_sentence(api: Api, query: str, detail: str) -> None:
    assert api.problem(f"{EVENTS}?{query}") == (422, detail)


def test_an_unknown_event_type_is_told_the_nine(api: Api) -> None:
    status, detail = api.problem(f"{EVENTS}?event_type=gift")
    assert status == 422
    assert detail.startswith("event_type must be 'usage', 'prepaid_purchase', 'subscription_credit', 'billing', ")


def test_the_wallet_says_what_there_is(api: Api, history: None) -> None:
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
    }


def test_the_wallet_of_an_organization_without_credits_is_empty(api: Api) -> None:
    body = api.get(CREDITS).json()
    assert (body["balance"], body["plan"], body["current_period"]) == (0, None, None)


def test_the_wallet_as_of_a_time(api: Api, history: None, engine: Engine) -> None:
    [(bought_at,)] = sql(engine, "SELECT created_at FROM credit_events WHERE org_id = 'acme' AND seq = 6")
    now = api.get(CREDITS, params={"at": bought_at.isoformat()}).json()
    assert (now["available"], now["reserved_credits"], now["used_this_period"]) == (500, 20, 80)
    before = api.get(CREDITS, params={"at": "2000-01-01"}).json()
    assert (before["available"], before["prepaid_balance"]) == (0, 0)
    assert api.problem(f"{CREDITS}?at=noon")[0] == 422


def test_a_workflow_and_its_events(api: Api, history: None) -> None:
    body = api.get("/api/organizations/acme/workflows/w1").json()
    assert [event["event_type"] for event in body.pop("events")] == ["reservation", "reservation_released", "usage"]
    assert body.pop("expires_at")
    assert body == {
        "workflow_id": "w1",
        "state": "settled",
        "project_id": "web",
        "activity_name": None,
        "reserved_credits": 75,
        "used_credits": 80,
        "refunded_credits": 0,
    }
    for unknown in ("w9", "w%00", "%3Cb%3E"):
        assert api.problem(f"/api/organizations/acme/workflows/{unknown}") == (
            404,
            "There is no such workflow in this organization.",
        )


@pytest.mark.parametrize("org_id", ["%00", "a%20b", "x" * 129])
def test_what_cannot_be_an_organization_does_not_exist_for_anybody(api: Api, org_id: str) -> None:
    everybody = {"Authorization": f"Bearer {token(orgs='*')}"}
    path = f"/api/organizations/{org_id}/credits"
    assert api.problem(path, headers=everybody) == (404, "There is no such organization.")


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
        (f"Bearer {jwt.encode({'orgs': '*', 'exp': FUTURE}, None, algorithm='none')}", 401, "The token is not valid."),
        (f"Bearer {token(orgs=['other'])}", 404, "There is no such organization."),
        (f"Bearer {token(orgs=[])}", 404, "There is no such organization."),
        (f"Bearer {token(scope='workflows:write')}", 403, "The token lacks the scope credits:read."),
    ],
)
def test_who_may_not_read_is_told_why(api: Api, header: str | None, status: int, detail: str) -> None:
    headers = {"Authorization": header} if header else {"Authorization": ""}
    assert api.problem(EVENTS, headers=headers) == (status, detail)


def test_a_token_without_expiry_is_refused(api: Api) -> None:
    endless = jwt.encode({"sub": "ann", "orgs": ["acme"], "scope": "credits:read"}, SECRET)
    assert api.problem(EVENTS, headers={"Authorization": f"Bearer {endless}"}) == (401, "The token is not valid.")


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
        ("w1/start", b"not json", 400, "The body is not JSON."),
        ("w1/start", b"[]", 422, "The body must be a JSON object."),
        ("w1/start", b"[" * 100_000, 413, "The body is larger than 65,536 bytes."),
        ("w1/start", b"[" * 60_000, 400, "The body is not JSON."),
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


def test_reading_does_not_allow_reporting(api: Api) -> None:
    response = api.post("/api/organizations/acme/workflows/w1/start", json={"credits": 5})
    assert (response.status_code, response.json()["detail"]) == (403, "The token lacks the scope workflows:write.")


def test_health_and_metrics_need_no_token(api: Api, history: None) -> None:
    nobody = {"Authorization": ""}
    assert api.get("/healthz", headers=nobody).json() == {"status": "ok"}
    ready = api.get("/readyz", headers=nobody)
    assert (ready.status_code, ready.json()) == (200, {"database": "ok", "broker": "ok"})
    metrics = api.get("/metrics", headers=nobody).text
    assert "holdfast_database_up 1.0" in metrics
    assert "holdfast_broker_up 1.0" in metrics
    assert "holdfast_dead_letters_open 0.0" in metrics
    assert "holdfast_wallets_overdue_period 0.0" in metrics
    assert "acme" not in metrics


def test_without_its_database_the_api_says_so(api: Api, engine: Engine, services: Embedded) -> None:
    from ledger.database import connect

    [(name,)] = sql(engine, "SELECT current_database()")
    engine.dispose()
    admin = connect(services.admin_url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        try:
            assert api.problem(EVENTS) == (503, "The ledger does not answer at the moment; try again.")
            assert api.get("/readyz").json() == {"database": "unavailable", "broker": "ok"}
            assert "holdfast_database_up 0.0" in api.get("/metrics").text
        finally:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    admin.dispose()


def test_the_openapi_document_describes_it(api: Api) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert set(paths) >= {
        "/api/organizations/{orgId}/credit-events",
        "/api/organizations/{orgId}/credits",
        "/api/organizations/{orgId}/workflows/{workflowId}",
        "/api/organizations/{orgId}/workflows/{workflowId}/{step}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
