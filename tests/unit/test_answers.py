"""Where answers go: each under its caller's task id, in one round trip, and never at the cost of a message."""

import json
import logging
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from celery import Celery

from holdfast_client.results import Result
from ledger.store import DeadLettered
from worker.answers import PAUSE_S, Answers
from worker.broker import create_celery
from worker.runs import RunEnded

RESERVED = Result("reserved", None, False, "acme", "run-1", "reserved", (1,), 25)
LETTER = DeadLettered(7, "conflict", "workflow.start: run-1 was started with 75 credits")


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def client(server: fakeredis.FakeServer) -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(server=server)


@pytest.fixture
def app(client: fakeredis.FakeRedis) -> Celery:
    """The Celery app, whose result backend is in memory."""
    app = create_celery("tests", "redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0")
    app.backend.__dict__["client"] = client
    return app


def stored(client: fakeredis.FakeRedis, task_id: str) -> dict[str, Any]:
    value = client.get(f"celery-task-meta-{task_id}")
    assert isinstance(value, bytes)
    return dict(json.loads(value))


def test_an_answer_is_stored_and_told_as_a_celery_client_expects_it(app: Celery, client: fakeredis.FakeRedis) -> None:
    waiting = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call] # redis is typed in part
    waiting.subscribe("celery-task-meta-one")
    waiting.get_message()
    Answers(app).store([("one", RESERVED), (None, RESERVED), ("run", RunEnded(3))])
    answer = stored(client, "one")
    assert (answer["status"], answer["result"]["outcome"], answer["result"]["event_seqs"]) == (
        "SUCCESS",
        "reserved",
        [1],
    )
    assert stored(client, "run")["result"] == 3
    assert len(client.keys()) == 2, "a message whose sender wants no answer has none"
    told = waiting.get_message()
    assert told is not None
    assert json.loads(told["data"]) == answer
    assert 0 < client.ttl("celery-task-meta-one") <= app.backend.expires


def test_a_dead_letter_is_a_failure_that_names_it(app: Celery, client: fakeredis.FakeRedis) -> None:
    Answers(app).store([("one", LETTER)])
    answer = stored(client, "one")
    assert answer["status"] == "FAILURE"
    assert LETTER.error in str(answer["result"]["exc_message"])


def test_without_a_server_no_answer_is_stored_for_a_while(
    app: Celery,
    client: fakeredis.FakeRedis,
    server: fakeredis.FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("worker.answers.time.monotonic", lambda: clock.now)
    ours = Answers(app)
    server.connected = False
    with caplog.at_level(logging.WARNING, logger="worker.answers"):
        ours.store([("lost", RESERVED)])
        ours.store([("lost too", RESERVED)])
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Answers cannot be stored; next try in 10 s: ")
    assert ours.server_time() is None
    server.connected = True
    ours.store([("still none", RESERVED)])
    assert client.keys() == []
    clock.now += PAUSE_S
    ours.store([("one", RESERVED)])
    assert stored(client, "one")["status"] == "SUCCESS"
    assert ours.server_time() is not None
