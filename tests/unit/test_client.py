"""The producer without a broker: which message each call makes, and what it refuses before anything is sent.

No port listens at these brokers' address, so whatever is sent nevertheless fails as not sent.
"""

import inspect
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from ledger.messages import MESSAGES
from worker.client import Client, InvalidMessageError

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(NOWHERE) as own:
        yield own


@pytest.fixture
def sent(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], bool]]:
    """What the client hands to Celery: task, message, and whether nobody waits for the answer."""
    kept: list[tuple[str, dict[str, Any], bool]] = []

    def keep(task: str, *, args: list[dict[str, Any]], ignore_result: bool, **_: object) -> None:
        [message] = args
        kept.append((task, message, ignore_result))

    monkeypatch.setattr(client._celery, "send_task", keep)
    return kept


Sent = list[tuple[str, dict[str, Any], bool]]


def test_there_is_a_method_for_every_message_with_its_fields() -> None:
    common = {"source", "occurred_at", "metadata"}
    for task, model in MESSAGES.items():
        method = getattr(Client, task.split(".")[1])
        named = set(inspect.signature(method).parameters) - {"self", "wait_s", "options"}
        assert (task, named) == (task, set(model.model_fields) - common)


def test_a_message_has_only_what_was_given(client: Client, sent: Sent) -> None:
    client.start(org_id="acme", workflow_id="run", credits=0)
    client.configure(org_id="acme", version=1, period_cap=0)
    client.adjust(org_id="acme", adjustment_id="fix", credits=-1, reason="typo", allow_negative=False)
    assert sent == [
        ("workflow.start", {"org_id": "acme", "workflow_id": "run", "credits": 0}, True),
        ("wallet.configure", {"org_id": "acme", "version": 1, "period_cap": 0}, True),
        (
            "wallet.adjust",
            {"org_id": "acme", "adjustment_id": "fix", "credits": -1, "reason": "typo", "allow_negative": False},
            True,
        ),
    ]


def test_a_moment_is_sent_as_text_with_its_offset(client: Client, sent: Sent) -> None:
    moment = datetime(2026, 1, 31, 9, tzinfo=UTC)
    plan = {"subscription_id": "sub", "version": 1, "plan": "team", "monthly_credits": 10}
    client.subscribe(org_id="acme", anchor=moment, occurred_at="2026-01-31T10:00:00+01:00", **plan)
    times = {"anchor": "2026-01-31T09:00:00+00:00", "occurred_at": "2026-01-31T10:00:00+01:00"}
    assert sent == [("wallet.subscribe", {"org_id": "acme", **plan, **times}, True)]


def test_source_and_metadata_are_sent_along(client: Client, sent: Sent) -> None:
    client.grant(org_id="acme", grant_id="gift", credits=1, source="crm", metadata={"note": "été"})
    [(_, message, _)] = sent
    assert (message["source"], message["metadata"]) == ("crm", {"note": "été"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"credits": -1}, "workflow.start: credits must be greater than or equal to 0, got -1"),
        ({"credits": 7.0}, "workflow.start: credits must be an integer, got 7.0"),
        ({"org_id": "a b"}, "workflow.start: org_id must be 1-128 characters of A-Z a-z 0-9 _ . : -, got 'a b'"),
        ({"expires_in_s": 59}, "workflow.start: expires_in_s must be greater than or equal to 60, got 59"),
        ({"metadata": {"x": float("nan")}}, "workflow.start: metadata must not contain NaN or Infinity"),
        ({"metadata": {"x": {1}}}, "workflow.start: metadata must not contain a set"),
        ({"colour": "red"}, "workflow.start: colour is not a field of this message"),
    ],
)
def test_an_invalid_message_is_refused_in_a_sentence(
    client: Client, sent: Sent, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidMessageError) as refused:
        client.start(**{"org_id": "acme", "workflow_id": "run", "credits": 1, **fields})
    assert str(refused.value).startswith(sentence)
    assert sent == []


def test_who_cannot_be_answered_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    with Client("amqp://127.0.0.1:1//") as client:
        monkeypatch.setattr(client._celery, "send_task", lambda *args, **_: sent.append(args))
        with pytest.raises(ValueError, match="wait_s needs a result_url: this broker keeps no answers"):
            client.start(org_id="acme", workflow_id="run", credits=1, wait_s=1)
        assert sent == []
        client.start(org_id="acme", workflow_id="run", credits=1)
        assert len(sent) == 1
