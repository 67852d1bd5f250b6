"""A replay that fails after nobody waits for it any more: its letter is open again, and says so."""

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from holdfast_client.broker import ENGINE_QUEUE, REPLAY_OF
from holdfast_client.client import Client
from holdfast_client.messages import DELIVERY_LIMIT
from tests.acceptance import commands
from tests.installation import Installation, envelope
from tests.messages import EMBED
from tests.support import eventually, sql, suspended
from worker.local.process import Process

_numbers = count(1)


@pytest.fixture
def sent(running: Installation) -> tuple[int, dict[str, Any]]:
    """A finish that contradicts an earlier one: its dead letter, closed as sent, and the message."""
    message = {"org_id": "acme", "workflow_id": f"run-{next(_numbers)}", "credits": 5}
    with Client(running.broker_url) as client:
        client.send("workflow.finish", message, wait_s=60)
        message["credits"] = 6
        client.send("workflow.finish", message)
    [(letter_id,)] = eventually(lambda: sql(running.engine, "SELECT id FROM dead_letters WHERE status = 'open'"))
    sql(
        running.engine,
        "UPDATE dead_letters SET status = 'replayed', resolved_at = clock_timestamp(), resolved_by = 'ann',"
        " resolution = 'sent; no answer' WHERE id = :id",
        id=letter_id,
    )
    return letter_id, message


def marks(running: Installation, since: int) -> list[tuple[Any, ...]]:
    query = "SELECT id, status, attempts, error_code FROM dead_letters WHERE id >= :since ORDER BY id"
    return sql(running.engine, query, since=since)


@pytest.fixture(autouse=True)
def nothing_is_open_at_the_end(running: Installation) -> Iterator[None]:
    yield
    sql(running.engine, "DELETE FROM dead_letters WHERE status = 'open'")


def test_a_replay_while_the_worker_is_paused_that_fails_later_opens_its_letter_again(
    with_worker: tuple[Installation, Process], sent: tuple[int, dict[str, Any]]
) -> None:
    running, worker = with_worker
    letter_id, _ = sent
    with suspended(worker.pid):
        ended = commands.run("failed", "replay", str(letter_id), "--wait-s", "0.1", env=running.environment)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert marks(running, letter_id) == [(letter_id, "replayed", 1, "conflict")]
    eventually(lambda: marks(running, letter_id) == [(letter_id, "open", 2, "conflict")])


def test_a_replay_that_is_delivered_too_often_opens_its_letter_again(
    running: Installation, sent: tuple[int, dict[str, Any]]
) -> None:
    letter_id, message = sent
    headers = {"task": "workflow.finish", "id": "1", REPLAY_OF: letter_id, "ignore_result": True}
    item = envelope(json.dumps([[message], {}, EMBED]), headers=headers)
    running.broker.lpush("credits", f'{{"restored": {DELIVERY_LIMIT}, {item[1:]}')
    eventually(lambda: marks(running, letter_id) == [(letter_id, "open", 2, "delivery_limit")])


def test_an_engine_cannot_open_a_letter_again(running: Installation, sent: tuple[int, dict[str, Any]]) -> None:
    letter_id, message = sent
    with Client(running.broker_url, queue=ENGINE_QUEUE) as engine:
        engine.send_as_is("workflow.finish", [message], {}, replay_of=letter_id)
    before = (letter_id, "replayed", 1, "conflict")
    eventually(lambda: marks(running, letter_id) == [before, (letter_id + 1, "open", 1, "conflict")])


@pytest.mark.parametrize("number", [True, "1", 0, -1, 2**63, 2**70, [1], None])
def test_a_header_that_names_no_letter_is_ignored(running: Installation, number: object) -> None:
    headers = {"task": "workflow.nothing", "id": "1", REPLAY_OF: number, "ignore_result": True}
    running.broker.lpush("credits", envelope(json.dumps([[{"n": str(number)}], {}, EMBED]), headers=headers))
    query = "SELECT status, attempts FROM dead_letters WHERE task = 'workflow.nothing'"
    eventually(lambda: sql(running.engine, query) == [("open", 1)])
