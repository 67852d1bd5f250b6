"""Nobody's reading keeps others from theirs: what one token may have at once, and how long a question may take."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, Engine

from api_stub import reader as api_reader
from api_stub import services as api_services
from api_stub.reader import Reader
from api_stub.turns import AT_ONCE
from ledger import daily_sums, history
from ledger.filters import EVERY_EVENT
from ledger.store import apply_batch
from tests.acceptance import website
from tests.acceptance.website import HISTORY, Patient, serving, token
from tests.messages import delivery
from worker.local.embedded import Embedded

EVENTS = "/api/organizations/acme/credit-events"
CREDITS = "/api/organizations/acme/credits"
BUSY = "The ledger is busy at the moment; try again."
TOO_MANY = "4 requests of this token are in progress already; try again in a second."
TOO_LONG = "The query takes too long; ask for a shorter range of time (date_from, date_to), or try again."


@pytest.fixture
def app(database_url: str, services: Embedded, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    assert api_services.READ_TIMEOUT_S == 5
    monkeypatch.setattr(api_services, "READ_TIMEOUT_S", 1)
    return website.app(database_url, services.broker_url)


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        yield address


def client(address: str, **claims: Any) -> Patient:
    claims = {"orgs": ["acme", "other"], "scope": "credits:read workflows:write"} | claims
    return Patient(base_url=address, headers={"Authorization": f"Bearer {token(**claims)}"})


@pytest.fixture
def long_history(engine: Engine) -> None:
    """More of acme than lies between a server and who does not read."""
    grant = {"org_id": "acme", "credits": 1, "metadata": {"note": "x" * 8_000}}
    apply_batch(engine, [delivery("wallet.grant", **grant, grant_id=f"g{n}") for n in range(3_000)])


def test_who_has_as_many_requests_as_may_be_is_told_to_come_back_and_nobody_else_is(
    address: str, long_history: None
) -> None:
    with ExitStack() as stack:
        greedy, same, other, another_org = (
            stack.enter_context(client(address, **claims))
            for claims in ({}, {"exp": website.FUTURE - 1}, {"sub": "bob"}, {"orgs": ["other"]})
        )
        downloads = [stack.enter_context(greedy.stream("GET", f"{HISTORY}.csv")) for _ in range(AT_ONCE)]
        assert {download.status_code for download in downloads} == {200}
        for reader in (greedy, same):
            refused = reader.get(CREDITS)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.headers["content-type"] == "application/problem+json"
            assert refused.json() == {
                "type": "about:blank",
                "title": "Too Many Requests",
                "status": 429,
                "detail": TOO_MANY,
            }
        page = greedy.get(HISTORY)
        assert (page.status_code, page.headers["retry-after"]) == (429, "1")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "Several pages of yours are being made already." in page.text
        with website.Visitor(base_url=address) as visitor:  # the same, as a browser keeps it
            visitor.sign_in(token(orgs=["acme", "other"], scope="credits:read"))
            assert visitor.get(HISTORY).status_code == 429
        # Not who is somebody else, what needs no token, and what reads nothing.
        assert other.get(CREDITS).status_code == 200
        assert another_org.get("/api/organizations/other/credits").status_code == 200
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/"):
            assert greedy.get(path).status_code in (200, 303), path
        report = greedy.post("/api/organizations/acme/workflows/w1/start", json={"credits": 1})
        assert report.status_code == 202
        downloads[0].close()
        assert greedy.get(CREDITS).status_code == 200


def test_a_few_more_at_once_wait_for_their_turn(address: str) -> None:
    with ExitStack() as stack:
        reader = stack.enter_context(client(address))
        threads = stack.enter_context(ThreadPoolExecutor(3 * AT_ONCE))
        answers = threads.map(lambda _: reader.get(CREDITS).status_code, range(10 * AT_ONCE))
        assert set(answers) == {200}


def _slow(ledger: Connection, *_: object, **__: object) -> None:
    ledger.exec_driver_sql("SELECT pg_sleep(60)")


def test_a_question_that_takes_too_long_is_ended_and_told_how_to_ask(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "find", _slow)
    with client(address) as reader:
        answer = reader.get(EVENTS)
        assert (answer.status_code, answer.json()["detail"]) == (503, TOO_LONG)
        assert answer.headers["retry-after"] == "5"
        page = reader.get(HISTORY)
        assert (page.status_code, "Choose a shorter time, or try again." in page.text) == (503, True)


LOOKING = (
    f"{EVENTS}?project_id=nope",
    f"{EVENTS}?event_type=usage",
    f"{EVENTS}?activity_name=Crawl",
    "/api/organizations/acme/usage",
    "/api/organizations/acme/usage.csv",
    HISTORY,
)


def test_those_who_look_through_many_events_take_turns_and_nobody_else_waits(
    app: FastAPI, address: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_services, "POOL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(api_reader, "MANY_EVENTS", 1)
    grants = [("acme", "g1"), ("acme", "g2"), ("other", "g1")]
    apply_batch(engine, [delivery("wallet.grant", org_id=org, grant_id=grant, credits=1) for org, grant in grants])
    with client(address) as reader:
        for path in LOOKING:
            with app.state.services.taking_turns():
                answer = reader.get(path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                assert (BUSY if path.startswith("/api/") else "Many people are here right now") in answer.text
                for of_few in (path.replace("acme", "other") for path in LOOKING):
                    assert reader.get(of_few).status_code == 200
                for not_looking in (EVENTS, CREDITS, f"{EVENTS}?date_from=2026-01-01", f"{EVENTS}?workflow_id=w1"):
                    assert reader.get(not_looking).status_code == 200
            assert reader.get(path).status_code == 200


def test_those_who_find_what_they_ask_for_in_the_daily_sums_take_no_turns(
    app: FastAPI, address: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_services, "POOL_TIMEOUT_S", 0.05)
    monkeypatch.setattr(api_reader, "MANY_EVENTS", 1)
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 1)
    apply_batch(
        engine, [delivery("wallet.grant", org_id="acme", grant_id=f"g{number}", credits=1) for number in range(3)]
    )
    assert daily_sums.sum_up(engine) == 3
    apply_batch(
        engine, [delivery("wallet.grant", org_id="other", grant_id=f"g{number}", credits=1) for number in range(3)]
    )
    with client(address) as reader, app.state.services.taking_turns():
        assert {path: reader.get(path).status_code for path in LOOKING} == dict.fromkeys(LOOKING, 200)
        assert reader.get(HISTORY.replace("acme", "other")).status_code == 503


def test_after_each_turn_the_database_is_left_alone_for_as_long(
    app: FastAPI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_reader, "MANY_EVENTS", 0)
    apply_batch(engine, [delivery("wallet.grant", org_id="acme", grant_id="g1", credits=1)])

    def slow(ledger: Connection) -> Any:
        return ledger.exec_driver_sql("SELECT clock_timestamp(), pg_sleep(0.5), clock_timestamp()").one()

    first, second = (Reader(app.state.services).read(slow, through=("acme", EVERY_EVENT)) for _ in range(2))
    ended_at, begun_at = first[2], second[0]
    assert (begun_at - ended_at).total_seconds() >= 0.5


def test_who_asks_has_one_process_of_the_database(app: FastAPI) -> None:
    settings = "SELECT current_setting('statement_timeout'), current_setting('max_parallel_workers_per_gather')"
    with app.state.services.reading() as ledger:
        assert ledger.exec_driver_sql(settings).one() == ("1s", "0")
