"""What the ledger says beside the message of a dead letter, on a real PostgreSQL."""

import json
from typing import Any

import pytest
from sqlalchemy import Engine

from holdfast_client.messages import AnyMessage, InvalidMessage, parse
from ledger import dead_letters, evidence
from ledger.dead_letters import KeptLetter
from ledger.evidence import Difference
from ledger.store import apply_batch
from tests.messages import delivery
from tests.support import sql

PLAN = {"subscription_id": "team", "plan": "Team", "monthly_credits": 10}


@pytest.fixture
def known(engine: Engine) -> Engine:
    """A ledger in which acme has one of everything that a later message can contradict."""
    apply_batch(
        engine,
        [
            delivery(task, org_id="acme", **fields)
            for task, fields in (
                ("wallet.purchase", {"purchase_id": "p1", "credits": 3_000}),
                ("workflow.start", {"workflow_id": "w1", "credits": 50}),
                ("workflow.finish", {"workflow_id": "w2", "credits": 40}),
                ("wallet.subscribe", {**PLAN, "version": 1, "anchor": "2026-01-31T00:00:00Z"}),
                ("wallet.configure", {"version": 1, "credit_limit": 5}),
            )
        ],
    )
    return engine


def message(task: str, **fields: Any) -> AnyMessage:
    found = parse(task, {"org_id": "acme", **fields})
    assert not isinstance(found, InvalidMessage), found
    return found


@pytest.mark.parametrize(
    ("task", "fields", "expected"),
    [
        ("wallet.purchase", {"purchase_id": "p1", "credits": 9_999}, [Difference("credits", 3_000, 9_999)]),
        (
            "wallet.purchase",
            {"purchase_id": "p1", "credits": 1, "expires_at": "2026-12-31T00:00:00Z"},
            [Difference("credits", 3_000, 1), Difference("expires_at", None, "2026-12-31T00:00:00Z")],
        ),
        ("wallet.purchase", {"purchase_id": "p1", "credits": 3_000}, []),
        ("wallet.purchase", {"purchase_id": "p2", "credits": 3_000}, []),
        ("workflow.start", {"workflow_id": "w1", "credits": 51}, [Difference("credits", 50, 51)]),
        ("workflow.start", {"workflow_id": "w2", "credits": 51}, []),
        ("workflow.finish", {"workflow_id": "w2", "credits": 41}, [Difference("credits", 40, 41)]),
        ("workflow.finish", {"workflow_id": "w3", "credits": 41}, []),
        ("workflow.cancel", {"workflow_id": "w2"}, []),
        ("wallet.configure", {"version": 1, "credit_limit": 6}, [Difference("credit_limit", 5, 6)]),
        (
            "wallet.subscribe",
            {**PLAN, "version": 2, "anchor": "2026-02-01T00:00:00Z"},
            [Difference("anchor", "2026-01-31T00:00:00Z", "2026-02-01T00:00:00Z")],
        ),
        ("wallet.subscribe", {**PLAN, "version": 2, "anchor": "2026-01-31T01:00:00+01:00"}, []),
        ("wallet.subscribe", {**PLAN, "version": 2}, []),
        ("wallet.subscribe", {**PLAN, "subscription_id": "other", "version": 2, "anchor": "2026-02-01T00:00:00Z"}, []),
    ],
)
def test_where_a_message_contradicts_the_ledger(
    known: Engine, task: str, fields: dict[str, Any], expected: list[Difference]
) -> None:
    with known.connect() as connection:
        assert evidence.differences(connection, message(task, **fields)) == expected


@pytest.mark.parametrize(
    ("task", "fields", "moved"),
    [
        ("wallet.purchase", {"purchase_id": "p1", "credits": 3_000}, 3_000),
        ("wallet.purchase", {"purchase_id": "p2", "credits": 3_000}, None),
        ("workflow.start", {"workflow_id": "w1", "credits": 50}, -50),
        ("workflow.finish", {"workflow_id": "w2", "credits": 40}, -40),
        ("workflow.fail", {"workflow_id": "w1"}, None),
        ("wallet.configure", {"version": 1}, None),
    ],
)
def test_what_a_message_has_moved(known: Engine, task: str, fields: dict[str, Any], moved: int | None) -> None:
    with known.connect() as connection:
        assert evidence.change(connection, message(task, **fields)) == moved


@pytest.mark.parametrize(
    ("body", "task"),
    [
        (b"no JSON", "wallet.purchase"),
        (json.dumps([[], {}, {}]).encode(), "wallet.purchase"),
        (json.dumps([[{"org_id": "acme", "purchase_id": "p1", "credits": 0}], {}, {}]).encode(), "wallet.purchase"),
        (json.dumps([[{"org_id": "acme", "purchase_id": "p1", "credits": 5}], {}, {}]).encode(), "wallet.unknown"),
    ],
)
def test_a_letter_without_a_valid_message_is_about_nothing_that_is_known(known: Engine, body: bytes, task: str) -> None:
    assert evidence.message_of(kept(known, task, body)) is None


def test_a_letter_with_a_valid_message_is_about_that(known: Engine) -> None:
    fields = {"org_id": "acme", "purchase_id": "p1", "credits": 9_999}
    letter = kept(known, "wallet.purchase", json.dumps([[fields], {}, {}]).encode())
    assert evidence.message_of(letter) == message("wallet.purchase", **fields)


def kept(engine: Engine, task: str, body: bytes) -> KeptLetter:
    [(number,)] = sql(
        engine,
        "INSERT INTO dead_letters (task, body, body_sha256, error_code, error, attempts)"
        " VALUES (:task, :body, :body, 'conflict', 'x', 1) RETURNING id",
        task=task,
        body=body,
    )
    with engine.connect() as connection:
        return dead_letters.letter(connection, number)
