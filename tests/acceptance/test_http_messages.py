"""Every message over HTTP, with a running worker: what a caller in any language gets, and what it never waits for."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api_stub import places
from tests.acceptance import website
from tests.acceptance.story import STORY
from tests.acceptance.website import Patient, serving, token
from tests.installation import Installation
from tests.support import PATIENCE_S, eventually, sql
from worker.local.machine import free_port

EVERY_SCOPE = "credits:read workflows:write wallet:write"


def path_of(task: str, org_id: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a message is sent to, and the fields that its body has."""
    kind, _, name = task.partition(".")
    if kind == "workflow":
        body = {field: value for field, value in fields.items() if field != "workflow_id"}
        return f"/api/organizations/{org_id}/workflows/{fields['workflow_id']}/{name}", body
    return f"/api/organizations/{org_id}/{kind}/{name}", fields


class Sender(Patient):
    """A program that sends messages over HTTP."""

    def __init__(self, address: str, *org_ids: str, **claims: Any) -> None:
        claims = {"orgs": list(org_ids), "scope": EVERY_SCOPE} | claims
        super().__init__(base_url=address, headers={"Authorization": f"Bearer {token(**claims)}"})

    def tell(self, task: str, org_id: str, *, wait: int | None = 20, **fields: Any) -> httpx.Response:
        path, body = path_of(task, org_id, fields)
        return self.post(path, json=body, headers={} if wait is None else {"Prefer": f"wait={wait}"})


@pytest.fixture(scope="module")
def app(running: Installation) -> FastAPI:
    return website.app(running.database_url, running.broker_url)


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with serving(app) as address:
        yield address


@pytest.fixture
def sender(address: str, org_id: str) -> Iterator[Sender]:
    with Sender(address, org_id) as own:
        yield own


def taken(app: FastAPI) -> int:
    """How many requests wait for an answer."""
    return int(app.state.services.places._taken.total())


def test_every_message_is_answered_as_a_python_caller_is(sender: Sender, org_id: str) -> None:
    from jsonschema import Draft202012Validator  # which takes more than a second: not in every test process

    document = sender.get("/openapi.json").json()
    for task, fields, expected in STORY:
        response = sender.tell(task, org_id, **fields)
        assert (task, response.status_code, response.json()) == (task, 200, {"org_id": org_id, **expected})
        assert response.headers["preference-applied"] == "wait=20"
        path, _ = path_of(task, "{orgId}", {**fields, "workflow_id": "{workflowId}"})
        schema = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        Draft202012Validator({**schema, "components": document["components"]}).validate(response.json())
    for task, fields, expected in STORY:
        again = sender.tell(task, org_id, **fields)
        assert (again.status_code, again.json()["duplicate"]) == (200, True)
        assert again.json()["outcome"] == expected["outcome"]


def test_a_start_that_is_rejected_is_an_answer_with_what_is_lacking(sender: Sender, org_id: str) -> None:
    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=50)
    answer = sender.tell("workflow.start", org_id, workflow_id="run-1", credits=80)
    assert answer.status_code == 200
    told = {name: answer.json()[name] for name in ("outcome", "reason", "state", "available", "shortfall")}
    assert told == {
        "outcome": "rejected",
        "reason": "insufficient_credits",
        "state": "rejected",
        "available": 50,
        "shortfall": 30,
    }
    assert answer.json()["limit"] == {
        "kind": "insufficient_credits",
        "limit": 50,
        "used": 0,
        "reserved": 0,
        "resets_at": None,
    }


def test_who_does_not_wait_is_told_where_the_workflow_can_be_read(sender: Sender, org_id: str) -> None:
    bought = sender.tell("wallet.purchase", org_id, wait=None, purchase_id="order", credits=50)
    started = sender.tell("workflow.start", org_id, wait=None, workflow_id="run:1", credits=40)
    assert (bought.status_code, bought.json()) == (
        202,
        {"status": "accepted", "task": "wallet.purchase", "org_id": org_id, "workflow_id": None},
    )
    assert "location" not in bought.headers
    assert "preference-applied" not in started.headers
    assert (started.status_code, started.json()["workflow_id"]) == (202, "run:1")
    assert started.headers["location"] == f"/api/organizations/{org_id}/workflows/run:1"
    eventually(lambda: sender.get(started.headers["location"]).is_success)


def test_a_preference_that_cannot_be_understood_is_ignored(sender: Sender, org_id: str) -> None:
    path, body = path_of("workflow.cancel", org_id, {"workflow_id": "run-1"})
    response = sender.post(path, json=body, headers={"Prefer": "wait=soon"})
    assert (response.status_code, "preference-applied" in response.headers) == (202, False)
    waited = sender.post(path, json=body, headers={"Prefer": "wait=3600"})
    assert (waited.status_code, waited.headers["preference-applied"]) == (200, "wait=20")


def test_what_takes_longer_is_accepted_and_sending_it_again_is_safe(
    sender: Sender, org_id: str, running: Installation
) -> None:
    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=50)
    with running.locked(org_id):
        slow = sender.tell("workflow.start", org_id, wait=1, workflow_id="run-1", credits=40)
    assert (slow.status_code, slow.headers["preference-applied"]) == (202, "wait=1")
    assert slow.headers["location"] == f"/api/organizations/{org_id}/workflows/run-1"
    again = sender.tell("workflow.start", org_id, workflow_id="run-1", credits=40)
    assert (again.json()["outcome"], again.json()["duplicate"], again.json()["available"]) == ("reserved", True, 10)


def test_a_dead_letter_is_a_problem_with_its_number(sender: Sender, org_id: str, running: Installation) -> None:
    def letters() -> list[tuple[Any, ...]]:
        return sql(running.engine, "SELECT id, error_code FROM dead_letters WHERE org_id = :o ORDER BY id", o=org_id)

    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=50)
    conflict = sender.tell("wallet.purchase", org_id, purchase_id="order", credits=60)
    unknown = sender.tell("wallet.reverse", org_id, reversal_id="r", purchase_id="other", reason="disputed")
    assert [conflict.status_code, unknown.status_code] == [409, 422]
    for response, (number, code) in zip((conflict, unknown), letters(), strict=True):
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert (problem["dead_letter"], problem["code"], problem["status"]) == (number, code, response.status_code)
        assert problem["detail"].endswith(f"(dead letter {number}, {code}).")


SCOPES = {"workflow.cancel": "workflows:write", "wallet.grant": "wallet:write"}
FIELDS: dict[str, dict[str, Any]] = {
    "workflow.cancel": {"workflow_id": "run-1"},
    "wallet.grant": {"grant_id": "gift", "credits": 5},
}


@pytest.mark.parametrize("task", SCOPES)
def test_a_scope_is_for_its_own_messages_and_no_other_includes_it(address: str, org_id: str, task: str) -> None:
    others = " ".join({"credits:read", "workflows:write", "wallet:write", "operator"} - {SCOPES[task]})
    with Sender(address, org_id, scope=others) as without, Sender(address, org_id, scope=SCOPES[task]) as alone:
        refused = without.tell(task, org_id, **FIELDS[task])
        assert (refused.status_code, refused.json()["detail"]) == (403, f"The token lacks the scope {SCOPES[task]}.")
        assert alone.tell(task, org_id, **FIELDS[task]).status_code == 200
        assert alone.tell(task, "somebody-else", **FIELDS[task]).status_code == 404
    nobody = httpx.post(f"{address}{path_of(task, org_id, FIELDS[task])[0]}", trust_env=False)
    assert nobody.status_code == 401


@pytest.mark.parametrize(
    ("fields", "status", "detail"),
    [
        ({"org_id": "other"}, 422, "org_id belongs in the path, not in the body."),
        ({"credits": 0}, 422, "wallet.grant: credits must be greater than 0, got 0"),
        ({"workflow_id": "run-1"}, 422, "wallet.grant: workflow_id is not a field of this message"),
        ({"source": "operat0r"}, 422, "wallet.grant: source must not be operator or scheduler: these are reserved"),
        ({"source": "größe"}, 422, "wallet.grant: source must be printable ASCII over HTTP, got 'gr\\xf6\\xdfe'"),
        ({"reason": "x" * 70_000}, 413, "The body is larger than 65,536 bytes."),
    ],
)
def test_a_bad_message_is_refused_in_a_sentence(
    sender: Sender, org_id: str, fields: dict[str, Any], status: int, detail: str
) -> None:
    path, body = path_of("wallet.grant", org_id, {"grant_id": "gift", "credits": 5, **fields})
    response = sender.post(path, json=body)
    assert (response.status_code, response.json()["detail"]) == (status, detail)


def test_whoever_may_change_wallets_names_their_own_source(sender: Sender, org_id: str, running: Installation) -> None:
    for source in ("admin", "billing", "crm"):
        sender.tell("wallet.grant", org_id, grant_id=source, credits=5, source=source)
    kept = sql(running.engine, "SELECT source FROM credit_events WHERE org_id = :o ORDER BY seq", o=org_id)
    assert kept == [("admin",), ("billing",), ("crm",)]


# While somebody waits


def test_sixty_requests_wait_and_hold_no_thread_that_others_need(
    sender: Sender, org_id: str, running: Installation, app: FastAPI
) -> None:
    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=40)
    with ThreadPoolExecutor(60) as threads:
        with running.locked(org_id):
            sent = [
                threads.submit(sender.tell, "workflow.start", org_id, workflow_id=f"run-{n}", credits=1)
                for n in range(60)
            ]
            eventually(lambda: taken(app) == 60)
            assert sender.get(f"/api/organizations/{org_id}/credits").json()["available"] == 40
            assert not any(each.done() for each in sent)
        answers = [each.result(PATIENCE_S) for each in sent]
    assert {answer.status_code for answer in answers} == {200}
    assert sorted(answer.json()["outcome"] for answer in answers) == ["rejected"] * 20 + ["reserved"] * 40
    assert taken(app) == 0


def test_who_has_no_place_to_wait_is_answered_at_once(
    sender: Sender, address: str, org_id: str, running: Installation, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(who: Sender, workflow_id: str) -> httpx.Response:
        return who.tell("workflow.cancel", org_id, workflow_id=workflow_id)

    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=40)
    monkeypatch.setattr(places, "OF_ONE", 1)
    monkeypatch.setattr(places, "OF_ALL", 2)
    with (
        Sender(address, org_id, sub="bob") as bob,
        Sender(address, org_id, sub="carl") as carl,
        ThreadPoolExecutor(2) as threads,
    ):
        with running.locked(org_id):
            waiting = [threads.submit(cancel, sender, "one"), threads.submit(cancel, bob, "two")]
            eventually(lambda: taken(app) == 2)
            for who in (sender, carl):
                at_once = cancel(who, "three")
                assert (at_once.status_code, "preference-applied" in at_once.headers) == (202, False)
        assert [each.result(PATIENCE_S).status_code for each in waiting] == [200, 200]
        assert cancel(carl, "three").status_code == 200


def test_a_client_that_hangs_up_is_not_waited_for_and_its_message_is_applied(
    sender: Sender, org_id: str, running: Installation, app: FastAPI
) -> None:
    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=40)
    path, _ = path_of("workflow.start", org_id, {"workflow_id": "run-1"})
    request = sender.build_request("POST", path, json={"credits": 1}, headers={"Prefer": "wait=20"})
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    with running.locked(org_id):
        with socket.create_connection((request.url.host, request.url.port or 80)) as impatient:
            impatient.sendall("\r\n".join(lines).encode() + request.read())
            eventually(lambda: taken(app) == 1)
        eventually(lambda: taken(app) == 0)
    assert sender.tell("workflow.start", org_id, workflow_id="run-1", credits=1).json()["duplicate"]


def test_a_server_that_stops_answers_at_once_whoever_waits(sender: Sender, org_id: str, running: Installation) -> None:
    sender.tell("wallet.purchase", org_id, purchase_id="order", credits=40)
    own = website.app(running.database_url, running.broker_url)
    with ThreadPoolExecutor(1) as threads, running.locked(org_id), serving(own) as address:
        waiting = threads.submit(_cancel, address, org_id)
        eventually(lambda: taken(own) == 1)
        assert not waiting.done()
    answer = waiting.result()  # `serving` has waited for it, but not until the lock was released
    assert (answer.status_code, answer.json()["workflow_id"]) == (202, "run-1")


def _cancel(address: str, org_id: str) -> httpx.Response:
    with Sender(address, org_id) as sender:
        return sender.tell("workflow.cancel", org_id, workflow_id="run-1")


# What may be missing


def test_without_a_broker_a_message_is_refused_whether_its_sender_waits_or_not(
    running: Installation, org_id: str
) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with website.served(running.database_url, nowhere) as address, Sender(address, org_id) as sender:
        for wait in (None, 5):
            response = sender.tell("workflow.cancel", org_id, wait=wait, workflow_id="run-1")
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            assert response.json()["detail"] == "The message could not be handed to the broker; send it again."


def test_without_its_store_of_answers_a_message_is_sent_and_not_waited_for(
    installation: Installation, org_id: str
) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with (
        website.served(installation.database_url, installation.broker_url, result_url=nowhere) as address,
        Sender(address, org_id) as sender,
    ):
        response = sender.tell("workflow.cancel", org_id, workflow_id="run-1")
    assert (response.status_code, "preference-applied" in response.headers) == (202, False)
    assert installation.waiting() == {"credits": 1, "unacked": 0}


def test_a_broker_that_keeps_no_answers_takes_the_message(
    running: Installation, rabbitmq_url: str, org_id: str
) -> None:
    with website.served(running.database_url, rabbitmq_url) as address, Sender(address, org_id) as sender:
        response = sender.tell("workflow.cancel", org_id, workflow_id="run-1")
        assert (response.status_code, "preference-applied" in response.headers) == (202, False)


def test_with_a_store_of_answers_beside_it_rabbitmq_is_waited_for(
    installation: Installation, rabbitmq_url: str, org_id: str
) -> None:
    installation.start_worker_on(rabbitmq_url)
    with (
        website.served(installation.database_url, rabbitmq_url, result_url=installation.broker_url) as address,
        Sender(address, org_id) as sender,
    ):
        response = eventually(lambda: _answered(sender.tell("workflow.cancel", org_id, workflow_id="run-1")))
    assert response is not None
    assert (response.json()["outcome"], response.headers["preference-applied"]) == ("ignored", "wait=20")


def _answered(response: httpx.Response) -> httpx.Response | None:
    return response if response.status_code == 200 else None
