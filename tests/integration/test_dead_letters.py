"""Dead letters on a real PostgreSQL: nothing that arrived is lost, and the same failure is the same letter."""

import json
import logging
import re
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event

from holdfast_client.messages import InvalidMessage
from holdfast_client.results import Result
from ledger import dead_letters, rules
from ledger.state import Decision
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.waiting import Waits
from tests.messages import delivery
from tests.support import sql

BAD = delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=0)
DISCARD = """
    UPDATE dead_letters SET status = 'discarded', resolved_at = now(), resolved_by = 'ann', resolution = 'a test'
    WHERE id = :id
"""


def letter_of(answer: Result | DeadLettered | Waits) -> DeadLettered:
    assert isinstance(answer, DeadLettered)
    return answer


def test_a_message_that_cannot_be_applied_is_kept_as_it_arrived(engine: Engine) -> None:
    [(before,)] = sql(engine, "SELECT clock_timestamp()")
    [answer] = apply_batch(engine, [BAD])
    assert answer == DeadLettered(1, "invalid_message", "wallet.purchase: credits must be greater than 0, got 0")
    with engine.connect() as connection:
        letter = dead_letters.letter(connection, 1)
    assert before <= letter.first_failed_at <= letter.last_failed_at
    row = asdict(letter)
    times = {"first_failed_at": letter.first_failed_at, "last_failed_at": letter.last_failed_at}
    assert row == times | {
        "id": 1,
        "status": "open",
        "task": "wallet.purchase",
        "org_id": "acme",
        "body": delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=0).body,
        "error_code": "invalid_message",
        "error": "wallet.purchase: credits must be greater than 0, got 0",
        "traceback": None,
        "cause": "credits must be greater than 0",
        "attempts": 1,
        "resolved_at": None,
        "resolved_by": None,
        "resolution": None,
        "traceparent": None,
    }


def test_a_redelivery_is_another_attempt_of_the_same_letter(engine: Engine) -> None:
    ids = [letter_of(apply_batch(engine, [BAD])[0]).letter_id for _ in range(3)]
    assert ids == [1, 1, 1]
    assert sql(engine, "SELECT count(*), sum(attempts) FROM dead_letters") == [(1, 3)]
    assert sql(engine, "SELECT last_failed_at > first_failed_at FROM dead_letters") == [(True,)]


def test_the_same_letter_twice_in_one_batch_is_one_with_two_attempts(engine: Engine) -> None:
    other = delivery("wallet.purchase", org_id="acme", purchase_id="p2", credits=0)
    answers = apply_batch(engine, [BAD, other, BAD, BAD])
    first, second, third, fourth = (letter_of(answer).letter_id for answer in answers)
    assert first == third == fourth != second
    assert sql(engine, "SELECT id, attempts FROM dead_letters ORDER BY attempts") == [(second, 1), (first, 3)]
    apply_batch(engine, [BAD, other, BAD, BAD])
    assert sql(engine, "SELECT id, attempts FROM dead_letters ORDER BY attempts") == [(second, 2), (first, 6)]
    with engine.connect() as connection:
        assert len(dead_letters.letters(connection)) == 2


def test_the_same_body_for_another_task_is_another_letter(engine: Engine) -> None:
    apply_batch(engine, [BAD, Delivery("wallet.grant", BAD.payload, BAD.body)])
    assert sql(engine, "SELECT task FROM dead_letters ORDER BY task") == [("wallet.grant",), ("wallet.purchase",)]


def test_a_letter_that_somebody_dealt_with_stays_as_it_is_when_the_message_fails_again(engine: Engine) -> None:
    apply_batch(engine, [BAD])
    sql(engine, DISCARD, id=1)
    before = sql(engine, "SELECT * FROM dead_letters")
    [again] = apply_batch(engine, [BAD])
    new = letter_of(again).letter_id
    assert new != 1
    assert sql(engine, "SELECT * FROM dead_letters WHERE id = 1") == before
    assert sql(engine, "SELECT status, attempts FROM dead_letters WHERE id = :id", id=new) == [("open", 1)]


def test_another_reason_to_fail_replaces_the_first(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    message = delivery("wallet.bill", org_id="acme", billing_id="b1", credits=-5)

    def trip(*_: Any, **known: Any) -> Decision:
        raise RuntimeError("nothing works")

    with monkeypatch.context() as broken:
        broken.setattr(rules, "decide", trip)
        apply_batch(engine, [message])
    assert sql(engine, "SELECT error_code, traceback IS NULL, attempts FROM dead_letters") == [
        ("unexpected_error", False, 1)
    ]
    apply_batch(engine, [message])
    assert sql(engine, "SELECT error_code, error, traceback, attempts FROM dead_letters") == [
        (
            "insufficient_credits",
            "wallet.bill: -5 would take the prepaid balance, 0, below zero",
            None,
            2,
        )
    ]


def test_a_message_that_is_applied_later_leaves_its_letter_open(engine: Engine) -> None:
    message = delivery("wallet.bill", org_id="acme", billing_id="b1", credits=-5)
    purchase = delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5)
    apply_batch(engine, [message, purchase])
    assert apply_batch(engine, [message]) == [Result("posted", None, False, "acme", None, None, (2,), 0)]
    assert sql(engine, "SELECT status, attempts FROM dead_letters") == [("open", 1)]


def test_a_clock_that_was_set_back_does_not_stop_a_letter(engine: Engine) -> None:
    apply_batch(engine, [BAD])
    ahead = "'2400-01-01T00:00:00Z'"
    sql(engine, f"UPDATE dead_letters SET first_failed_at = {ahead}, last_failed_at = {ahead}")
    [again] = apply_batch(engine, [BAD])
    assert letter_of(again).code == "invalid_message"
    assert sql(engine, "SELECT attempts FROM dead_letters") == [(2,)]


@pytest.mark.parametrize(
    ("payload", "org_id"),
    [
        ({"org_id": "acme", "purchase_id": "p\x00", "credits": 1}, "acme"),
        ({"org_id": "acme", "purchase_id": "p1", "credits": 1, "source": "\x00"}, "acme"),
        ({"org_id": "acme", "purchase_id": "p1", "credits": 1, "metadata": {"\x00": 1}}, "acme"),
        ({"org_id": "acme", "purchase_id": "p1", "credits": 1, "metadata": {"a": "\ud800"}}, "acme"),
        ({"org_id": "acme", "purchase_id": "p1", "credits": 1, "\ud800\x00": 1}, "acme"),
        ({"org_id": "acme", "purchase_id": "\udfff", "credits": "\ud800"}, "acme"),
        ({"org_id": "a\x00", "purchase_id": "p1", "credits": 1}, None),
        ({"org_id": "\ud800", "purchase_id": "p1", "credits": 1}, None),
        ({"org_id": "x" * 129, "purchase_id": "p1", "credits": 1}, None),
        ({"org_id": 7, "purchase_id": "p1", "credits": 1}, None),
        ("\x00\ud800", None),
        ([["\x00"], {"\ud800": 1}], None),
        (None, None),
        (InvalidMessage("undecodable_message", "the body is not JSON", None), None),
    ],
    ids=ascii,
)
def test_text_that_postgresql_cannot_hold_survives_as_bytes(
    engine: Engine, payload: object, org_id: str | None
) -> None:
    body = b"\x00\xff" if isinstance(payload, InvalidMessage) else json.dumps([[payload], {}, {}]).encode()
    good = delivery("wallet.purchase", org_id="globex", purchase_id="p1", credits=5)
    refused, applied = apply_batch(engine, [Delivery("wallet.purchase", payload, body), good])
    code = "undecodable_message" if isinstance(payload, InvalidMessage) else "invalid_message"
    assert letter_of(refused).code == code
    assert applied == Result("posted", None, False, "globex", None, None, (1,), 5)
    assert sql(engine, "SELECT body, org_id, error_code, error, traceback FROM dead_letters") == [
        (body, org_id, code, letter_of(refused).error, None)
    ]


@pytest.mark.parametrize(
    "task",
    ["", "wallet.\x00", "wallet.\ud800", "wallet.Žluťoučký", "x" * 100_000],
    ids=["empty", "NUL", "half a surrogate pair", "not ASCII", "very long"],
)
def test_a_task_of_any_name_is_kept_with_its_neighbours(
    engine: Engine, caplog: pytest.LogCaptureFixture, task: str
) -> None:
    good = delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=5)
    with caplog.at_level(logging.ERROR):
        refused, applied = apply_batch(engine, [Delivery(task, {"org_id": "acme"}, b"body"), good])
    assert letter_of(refused).code == "unknown_task"
    assert applied == Result("posted", None, False, "acme", None, None, (1,), 5)
    assert sql(engine, "SELECT body, org_id, error_code FROM dead_letters") == [(b"body", "acme", "unknown_task")]
    assert caplog.records == []


def test_large_and_empty_bodies_are_kept_whole(engine: Engine) -> None:
    bodies = [b"", b"\x00", bytes(range(256)) * 20_000]
    apply_batch(engine, [Delivery("no.such", None, body) for body in bodies])
    assert sorted(body for (body,) in sql(engine, "SELECT body FROM dead_letters")) == sorted(bodies)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'[[{"a": [1]}], {}, {}]', '{\n  "a": [\n    1\n  ]\n}'),
        (b'[[1], {"b": 2}, {}]', '{\n  "args": [\n    1\n  ],\n  "kwargs": {\n    "b": 2\n  }\n}'),
        (b'[["\\u0000\xc2\x9b\xe2\x80\xae\\ud800<b>"], {}, {}]', r'"\u0000\u009b\u202e\ud800<b>"'),
        (b"\xff\x00garbage\n\xe2\x80\xae<script>", "\\xff\\x00garbage\n\\u202e<script>"),
        (b"", ""),
    ],
)
def test_a_message_is_readable_and_none_of_its_characters_is_hidden(body: bytes, text: str) -> None:
    assert dead_letters.readable(body, 100, "That is all.") == text


@pytest.mark.parametrize("depth", [100, 900, 2_000, 100_000])
def test_a_message_of_any_depth_is_readable(depth: int) -> None:
    body = b"[[" + b"[" * depth + b"]" * depth + b"], {}, {}]"
    assert "[" * depth in dead_letters.readable(body, 2_000_000, "")


def test_open_letters_are_the_newest_that_nobody_dealt_with(engine: Engine) -> None:
    for n in range(5):
        apply_batch(engine, [Delivery("no.such", None, b"%d" % n)])
    sql(engine, DISCARD, id=4)
    with engine.connect() as connection:
        assert [letter.id for letter in dead_letters.letters(connection)] == [5, 3, 2, 1]
        assert [letter.id for letter in dead_letters.letters(connection, limit=2)] == [5, 3]


def test_a_list_of_letters_reads_no_message_no_traceback_and_the_beginning_of_an_error(engine: Engine) -> None:
    large = "UPDATE dead_letters SET body = :body, error = :text, traceback = :text"
    apply_batch(engine, [BAD])
    sql(engine, large, body=b"[" * 1_000_000, text="é" * 1_000_000)
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    with engine.connect() as connection:
        [listed] = dead_letters.letters(connection)
        kept = dead_letters.letter(connection, listed.id)
    assert [re.findall(r"body|traceback", statement) for statement in asked] == [[], ["body", "traceback"]]
    assert asdict(listed) == {name: value for name, value in asdict(kept).items() if name in asdict(listed)} | {
        "error": "é" * 4_000
    }


def test_no_letters_are_open_at_first(engine: Engine) -> None:
    with engine.connect() as connection:
        assert list(dead_letters.letters(connection)) == []


def test_attempts_and_times_grow_with_each_failure(engine: Engine) -> None:
    apply_batch(engine, [BAD])
    day = timedelta(days=1)
    sql(
        engine,
        "UPDATE dead_letters SET first_failed_at = first_failed_at - :day, last_failed_at = first_failed_at - :day",
        day=day,
    )
    [(first, _)] = sql(engine, "SELECT first_failed_at, last_failed_at FROM dead_letters")
    apply_batch(engine, [BAD])
    [(still_first, last)] = sql(engine, "SELECT first_failed_at, last_failed_at FROM dead_letters")
    assert still_first == first
    assert timedelta(0) < last - first - day < timedelta(minutes=1)
