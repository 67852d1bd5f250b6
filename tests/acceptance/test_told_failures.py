"""A caller that waits for the answer to a message that becomes a dead letter is told at once, whatever is wrong."""

import json
from typing import Any
from uuid import uuid4

import pytest
from celery.result import AsyncResult

from holdfast_client.messages import DELIVERY_LIMIT, MAX_BODY_BYTES
from tests.installation import Installation, Producer, envelope
from tests.messages import EMBED
from tests.support import PATIENCE_S, eventually
from worker.transport import MOST_ENTRY_BYTES

GRANT = {"org_id": "acme", "grant_id": "gift", "credits": 1}
BODY = json.dumps([[GRANT], {}, EMBED])


def lay_down(producer: Producer, body: str, *, restored: int = 0, **headers: Any) -> AsyncResult:
    """Put a message on the list, as Celery writes it. Returns what its sender waits for."""
    waiting: AsyncResult = producer.celery.AsyncResult(str(uuid4()))
    producer.celery.backend.result_consumer.consume_from(waiting.id)
    item = envelope(body, headers={"task": "wallet.grant", "id": waiting.id, "ignore_result": False, **headers})
    with producer.celery.connection_for_write() as connection:
        counted = f'{{"restored": {restored}, {item[1:]}' if restored else item
        connection.default_channel.client.lpush("credits", counted)
    return waiting


def failure(waiting: AsyncResult) -> str:
    told = waiting.get(timeout=PATIENCE_S, propagate=False)
    assert isinstance(told, Exception)
    return str(told)


@pytest.mark.parametrize(
    ("body", "more", "code"),
    [
        (BODY, {"task": "workflow.finnish"}, "unknown_task"),
        ("{{{", {}, "undecodable_message"),
        (BODY, {"compression": "application/x-gzip"}, "undecodable_message"),
        (json.dumps([[{**GRANT, "credits": 0}], {}, EMBED]), {}, "invalid_message"),
        (BODY + " " * MAX_BODY_BYTES, {}, "too_large"),
        (BODY + " " * MOST_ENTRY_BYTES, {}, "too_large"),
        (BODY + " " * 20 * MOST_ENTRY_BYTES, {}, "too_large"),
        (BODY, {"restored": DELIVERY_LIMIT}, "delivery_limit"),
    ],
)
@pytest.mark.parametrize("asks", [{"ignore_result": False}, {"ignore_result": None}], ids=["asks", "as by default"])
def test_whoever_waits_for_a_dead_letter_is_told(
    running: Installation, workflow_engine: Producer, body: str, more: dict[str, Any], code: str, asks: dict[str, Any]
) -> None:
    assert f", {code})" in failure(lay_down(workflow_engine, body, **asks, **more))


def test_a_caller_of_a_misspelled_task_who_sets_nothing_is_told(
    running: Installation, workflow_engine: Producer
) -> None:
    finish = {"org_id": "acme", "workflow_id": "run-1", "credits": 5}
    for queue in ("credits", "credits.engine"):
        asked = workflow_engine.celery.send_task("workflow.finnish", args=[finish], queue=queue)
        assert "there is no task named 'workflow.finnish'" in failure(asked)


def test_a_message_that_waits_first_and_then_fails_is_told_too(
    running: Installation, workflow_engine: Producer
) -> None:
    workflow_engine.answer("wallet.grant", {**GRANT, "org_id": "locked"})
    with running.locked("locked"):
        asked = lay_down(workflow_engine, json.dumps([[{**GRANT, "org_id": "locked", "credits": 2}], {}, EMBED]))
        default = workflow_engine.celery.send_task(
            "wallet.grant", args=[{**GRANT, "org_id": "locked", "credits": 3}], queue="credits"
        )
        eventually(lambda: running.count("waiting_messages") == 2)
    for waiting in (asked, default):
        assert ", conflict)" in failure(waiting)


def test_of_what_nobody_asked_for_only_a_failure_is_stored_unless_it_is_refused(
    running: Installation, workflow_engine: Producer
) -> None:
    def send(grant_id: str, credits: int, *, ignore_result: bool | None) -> str:
        fields = {"org_id": "quiet", "grant_id": grant_id, "credits": credits}
        sent = workflow_engine.celery.send_task(
            "wallet.grant", args=[fields], queue="credits", ignore_result=ignore_result
        )
        return f"celery-task-meta-{sent.id}"

    applied, refused = send("one", 1, ignore_result=None), send("two", 0, ignore_result=True)
    failed = send("three", 0, ignore_result=None)
    eventually(running.is_drained)
    eventually(lambda: running.broker.exists(failed))
    assert running.broker.exists(applied, refused) == 0
    assert 0 < running.broker.ttl(failed) <= 3600
