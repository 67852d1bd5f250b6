"""Quotes over HTTP: what a start would be answered, for whoever may read the credits."""

from collections.abc import Iterator
from typing import Any

import pytest

from ledger.store import apply_batch
from tests.acceptance.website import Patient, token
from tests.installation import Installation
from tests.messages import delivery, finish, purchase, start

PATH = "/api/organizations/{org_id}/quote"


@pytest.fixture
def path(ledger: Installation, org_id: str) -> str:
    configure = delivery("wallet.configure", org_id=org_id, version=1, period_cap=90, credit_limit=5)
    apply_batch(
        ledger.engine, [purchase(org_id, credits=100), configure, start(org_id, "w1", 30), finish(org_id, "w2", 20)]
    )
    return PATH.format(org_id=org_id)


@pytest.fixture
def reader(address: str, org_id: str) -> Iterator[Patient]:
    with Patient(base_url=address, headers={"Authorization": f"Bearer {token(orgs=[org_id])}"}) as client:
        yield client


def test_a_quote_says_what_a_start_would_be_answered(reader: Patient, path: str) -> None:
    limits = [
        {
            "kind": "insufficient_credits",
            "limit": 85,
            "used": 0,
            "reserved": 30,
            "resets_at": None,
            "remaining": 55,
        },
        {"kind": "period_cap", "limit": 90, "used": 20, "reserved": 30, "resets_at": None, "remaining": 40},
    ]
    rest: dict[str, Any] = {"available": 50, "limits": limits, "as_of_seq": 3}
    answers: list[tuple[int, dict[str, Any]]] = [
        (40, {"outcome": "reserved", "reason": None, "shortfall": None}),
        (41, {"outcome": "rejected", "reason": "period_cap", "shortfall": 1}),
        (60, {"outcome": "rejected", "reason": "insufficient_credits", "shortfall": 5}),
    ]
    for wanted, answer in answers:
        response = reader.get(path, params={"credits": wanted, "project_id": "web"})
        assert (response.status_code, response.json()) == (200, {**answer, **rest})


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("", "credits is missing"),
        ("credits=-1", "credits must be greater than or equal to 0"),
        ("credits=1000000000001", "credits must be less than or equal to 1000000000000"),
        ("credits=many", "credits must be an integer"),
        (
            "credits=1&project_id=a%20b",
            "project_id must have 1 to 128 characters, and only letters, digits and _ . : - among them",
        ),
    ],
)
def test_a_bad_question_is_named_in_a_sentence(reader: Patient, path: str, query: str, detail: str) -> None:
    response = reader.get(f"{path}?{query}")
    assert (response.status_code, response.json()["detail"]) == (422, detail)


def test_a_quote_is_for_whoever_may_read_the_credits(reader: Patient, path: str, org_id: str) -> None:
    writer = {"Authorization": f"Bearer {token(orgs=[org_id], scope='workflows:write')}"}
    assert reader.get(path, params={"credits": 1}, headers=writer).status_code == 403
    assert reader.get(PATH.format(org_id="somebody-else"), params={"credits": 1}).status_code == 404
