"""Replaying and discarding dead letters on a real PostgreSQL: the letter tells what came of it, and none is lost."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import timedelta
from threading import Timer
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine

from holdfast_client.client import Client
from holdfast_client.messages import DELIVERY_LIMIT, InvalidMessage
from holdfast_client.results import Result
from ledger import audit, dead_letters, views
from ledger.bodies import only_argument
from ledger.database import raw_connection
from ledger.dead_letters import (
    DeadLetter,
    LetterFilter,
    NotOpenError,
    NotReplayableError,
    StillFailsError,
    UnknownLetterError,
)
from ledger.store import DeadLettered, Delivery, apply_batch, apply_waiting
from tests.messages import EMBED, delivery
from tests.support import on_insert_into, sql
from worker.cli.terminal import open_ledger
from worker.replaying import Replayer

REFUND = delivery("wallet.refund", org_id="acme", refund_id="r1", credits=30, workflow_id="run")
FINISH = delivery("workflow.finish", org_id="acme", workflow_id="run", credits=80)


def worker(engine: Engine) -> Callable[[str, list[Any], dict[str, Any], str | None], Result]:
    """Applies what is sent at once, and answers."""

    def send(task: str, args: list[Any], kwargs: dict[str, Any], _: str | None) -> Result:
        body = json.dumps([args, kwargs, EMBED]).encode()
        [answer] = apply_batch(engine, [Delivery(task, only_argument(task, args, kwargs), body)])
        if isinstance(answer, DeadLettered):
            raise StillFailsError(answer.error)
        assert isinstance(answer, Result)
        return answer

    return send


def slow_worker(engine: Engine) -> Any:
    """Applies what is sent at once, but its answer does not come."""
    apply = worker(engine)

    def send(*message: Any) -> str:
        with suppress(StillFailsError):
            apply(*message)
        return "nobody knows"

    return send


def absent_worker(*_: Any) -> str:
    """What is sent waits."""
    return "nobody knows"


def replay(engine: Engine, letter_id: int, send: Any, *, by: str = "ann") -> str:
    return dead_letters.replay(engine, letter_id, by=by, send=send)


def marks(engine: Engine) -> list[tuple[Any, ...]]:
    return sql(engine, "SELECT id, status, attempts, resolved_by, resolution FROM dead_letters ORDER BY id")


def events(engine: Engine) -> list[tuple[Any, ...]]:
    return sql(engine, "SELECT event_type, credits FROM credit_events ORDER BY seq")


APPLIED_ONCE = [("usage", -80), ("refund", 30)]


def test_a_replayed_message_is_applied_and_its_letter_tells_who_when_and_what(engine: Engine) -> None:
    apply_batch(engine, [REFUND, FINISH])
    assert replay(engine, 1, worker(engine)) == "posted"
    assert marks(engine) == [(1, "replayed", 1, "ann", "posted")]
    assert sql(engine, "SELECT resolved_at BETWEEN last_failed_at AND clock_timestamp() FROM dead_letters") == [(True,)]
    assert events(engine) == APPLIED_ONCE
    assert audit.verify(engine).is_clean


def test_a_second_replay_changes_nothing_and_the_letter_keeps_the_first_outcome(engine: Engine) -> None:
    apply_batch(engine, [REFUND, FINISH])
    replay(engine, 1, worker(engine))
    before = sql(engine, "SELECT * FROM dead_letters")
    assert replay(engine, 1, worker(engine), by="bob") == "posted, a duplicate: nothing changes"
    assert sql(engine, "SELECT * FROM dead_letters") == before
    assert events(engine) == APPLIED_ONCE


def test_a_start_that_is_replayed_after_its_workflow_ended_says_that_nothing_is_held(engine: Engine) -> None:
    run = {"org_id": "acme", "workflow_id": "run"}
    start = delivery("workflow.start", **run, credits=5)
    letter = DeadLetter(start.task, start.body, "acme", "unexpected_error", "a defect that is mended by now")
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        [letter_id] = dead_letters.record(connection, [letter])
    apply_batch(engine, [delivery("wallet.grant", org_id="acme", grant_id="g1", credits=10)])
    assert replay(engine, letter_id, worker(engine)) == "reserved"
    assert replay(engine, letter_id, worker(engine)) == "reserved, a duplicate: nothing changes"
    apply_batch(engine, [delivery("workflow.cancel", **run)])
    told = "reserved, a duplicate: nothing changes, and the workflow is now cancelled"
    assert replay(engine, letter_id, worker(engine)) == told


def test_what_came_of_a_message_is_marked_also_if_the_database_restarts_meanwhile(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*message: Any) -> Result:
        ours = "datname = current_database() AND application_name = 'holdfast'"
        others = f"FROM pg_stat_activity WHERE {ours} AND pid <> pg_backend_pid()"
        assert sql(engine, f"SELECT pg_terminate_backend(pid, 60000) {others}") == [(True,)]
        return worker(engine)(*message)

    apply_batch(engine, [REFUND, FINISH])
    monkeypatch.setenv("HOLDFAST_DATABASE_URL", database_url)
    with open_ledger() as commands_own:
        assert replay(commands_own, 1, send) == "posted"
    assert marks(engine) == [(1, "replayed", 1, "ann", "posted")]


def test_a_message_that_fails_again_stays_open_with_one_attempt_more(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    with pytest.raises(StillFailsError, match="workflow run used 0 credits"):
        replay(engine, 1, worker(engine))
    assert marks(engine) == [(1, "open", 2, None, None)]


@pytest.mark.parametrize(
    "body",
    [
        '[[{}],{{}},{{"callbacks":null,"errbacks":null,"chain":null,"chord":null}}]',
        '{{"args": [{}], "kwargs": {{}}, "id": "1", "task": "wallet.refund"}}',
    ],
)
def test_a_message_that_was_written_in_another_way_is_the_same_message(engine: Engine, body: str) -> None:
    written = body.format(json.dumps(REFUND.payload, separators=(",", ":"))).encode()
    apply_batch(engine, [REFUND._replace(body=written)])
    with pytest.raises(StillFailsError):
        replay(engine, 1, worker(engine))
    assert marks(engine) == [(1, "open", 2, None, None)]


def test_a_rejected_start_is_an_outcome_not_a_failure(engine: Engine) -> None:
    body = b'[[{"org_id": "acme", "workflow_id": "run", "credits": 5}], {}, {}]'
    sql(
        engine,
        "INSERT INTO dead_letters (task, body, body_sha256, error_code, error, attempts)"
        " VALUES ('workflow.start', :body, sha256(:body), 'unexpected_error', 'a defect, mended since', 1)",
        body=body,
    )
    assert replay(engine, 1, worker(engine)) == "rejected (insufficient_credits)"
    assert marks(engine) == [(1, "replayed", 1, "ann", "rejected (insufficient_credits)")]


# No answer


def test_without_an_answer_the_letter_says_that_its_message_was_sent(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    assert replay(engine, 1, absent_worker) == "sent; nobody knows"
    assert marks(engine) == [(1, "replayed", 1, "ann", "sent; nobody knows")]


def test_a_failure_that_is_not_answered_leaves_the_letter_open(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    with pytest.raises(
        StillFailsError, match=r"workflow run used 0 credits .* \(dead letter 1, refund_exceeds_usage\)"
    ):
        replay(engine, 1, slow_worker(engine))
    assert marks(engine) == [(1, "open", 2, None, None)]


def test_a_failure_after_the_mark_is_a_new_open_letter(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    [failed] = apply_batch(engine, [REFUND])
    assert isinstance(failed, DeadLettered)
    assert marks(engine) == [
        (1, "replayed", 1, "ann", "sent; nobody knows"),
        (failed.letter_id, "open", 1, None, None),
    ]


def test_a_replay_that_fails_after_the_mark_opens_its_letter_again_with_the_attempt(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    [(failed_at,)] = sql(engine, "UPDATE dead_letters SET error = 'before' RETURNING last_failed_at")
    replay(engine, 1, absent_worker)
    [failed] = apply_batch(engine, [REFUND._replace(replay_of=1)])
    assert isinstance(failed, DeadLettered)
    assert failed.letter_id == 1
    assert marks(engine) == [(1, "open", 2, None, None)]
    [(error, last_failed_at)] = sql(engine, "SELECT error, last_failed_at FROM dead_letters")
    assert "workflow run used 0 credits" in error
    assert last_failed_at > failed_at
    apply_batch(engine, [FINISH])
    assert replay(engine, 1, worker(engine)) == "posted"


def test_a_replay_that_fails_unexpectedly_opens_its_letter_again_too(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    on_insert_into(engine, "posted_messages", "RAISE 'a defect'")
    apply_batch(engine, [FINISH])
    [failed] = apply_batch(engine, [REFUND._replace(replay_of=1)])
    assert isinstance(failed, DeadLettered)
    assert (failed.letter_id, failed.code) == (1, "unexpected_error")
    assert marks(engine) == [(1, "open", 2, None, None)]


def test_a_replay_that_waits_for_its_organization_and_fails_then_opens_its_letter_again(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    apply_batch(engine, [REFUND._replace(replay_of=1)], known_to_wait=["acme"])
    assert marks(engine) == [(1, "replayed", 1, "ann", "sent; nobody knows")]
    [(_, failed)] = apply_waiting(engine, "acme", limit=10).answers
    assert isinstance(failed, DeadLettered)
    assert marks(engine) == [(1, "open", 2, None, None)]


def test_a_replay_that_ends_its_workers_while_it_waits_opens_its_letter_again(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    apply_batch(engine, [REFUND._replace(replay_of=1)], known_to_wait=["acme"])
    sql(engine, "UPDATE waiting_messages SET attempts = :attempts", attempts=DELIVERY_LIMIT)
    [(_, failed)] = apply_waiting(engine, "acme", limit=10).answers
    assert isinstance(failed, DeadLettered)
    assert (failed.letter_id, failed.code) == (1, "delivery_limit")
    assert marks(engine) == [(1, "open", 2, None, None)]


def test_only_the_message_of_a_letter_opens_it_again(engine: Engine) -> None:
    """Whoever may send to the ledger may name any letter."""
    other = delivery("wallet.refund", org_id="acme", refund_id="r2", credits=30, workflow_id="run")
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    for forged in (other, REFUND._replace(task="wallet.grant"), other._replace(replay_of=77)):
        apply_batch(engine, [forged._replace(replay_of=forged.replay_of or 1)])
    assert marks(engine) == [
        (1, "replayed", 1, "ann", "sent; nobody knows"),
        (2, "open", 2, None, None),
        (3, "open", 1, None, None),
    ]


def test_a_discarded_letter_stays_discarded_when_its_replay_fails(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    dead_letters.discard(engine, 1, by="ann", why="a test")
    [failed] = apply_batch(engine, [REFUND._replace(replay_of=1)])
    assert isinstance(failed, DeadLettered)
    assert marks(engine) == [(1, "discarded", 1, "ann", "a test"), (failed.letter_id, "open", 1, None, None)]


def test_if_the_message_has_another_open_letter_by_now_the_attempt_is_in_that_one(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    [other] = apply_batch(engine, [REFUND])
    assert isinstance(other, DeadLettered)
    [failed] = apply_batch(engine, [REFUND._replace(replay_of=1)])
    assert failed == other
    assert marks(engine)[1] == (other.letter_id, "open", 2, None, None)


def test_a_letter_that_is_opened_at_the_same_time_is_the_only_open_one(engine: Engine) -> None:
    apply_batch(engine, [REFUND])
    replay(engine, 1, absent_worker)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: apply_batch(engine, [REFUND._replace(replay_of=1 if n % 2 else None)]), range(40)))
    opened = [mark for mark in marks(engine) if mark[1] == "open"]
    assert len(opened) == 1
    assert sql(engine, "SELECT sum(attempts), count(DISTINCT error_code) FROM dead_letters") == [(41, 1)]


def test_a_mark_waits_for_the_attempt_that_is_being_written(engine: Engine) -> None:
    apply_batch(engine, [REFUND])

    def send(*_: Any) -> str:
        writing = raw_connection(engine)
        connection = exits.enter_context(writing)
        connection.execute("BEGIN")
        letter = DeadLetter(REFUND.task, REFUND.body, "acme", "conflict", "again", replay_of=1)
        dead_letters.record(connection, [letter])
        Timer(0.2, lambda: connection.execute("COMMIT")).start()
        return "nobody knows"

    with ExitStack() as exits, pytest.raises(StillFailsError, match=r"^again \(dead letter 1, conflict\)$"):
        replay(engine, 1, send)
    assert marks(engine) == [(1, "open", 2, None, None)]


def test_what_is_too_large_as_celery_writes_it_is_not_sent(engine: Engine) -> None:
    fields = {"org_id": "acme", "grant_id": "g", "credits": 1, "note": "\u00e9" * 20_000}
    body = json.dumps([[fields], {}, EMBED], ensure_ascii=False).encode()
    apply_batch(engine, [Delivery("wallet.grant", fields, body)])
    with pytest.raises(NotReplayableError, match=r"^dead letter 1 is too large to be sent again as Celery writes it$"):
        replay(engine, 1, worker(engine))


def test_an_outcome_that_is_known_later_replaces_sent(engine: Engine) -> None:
    apply_batch(engine, [REFUND, FINISH])
    replay(engine, 1, slow_worker(engine))
    assert marks(engine) == [(1, "replayed", 1, "ann", "sent; nobody knows")]
    replay(engine, 1, worker(engine), by="bob")
    replay(engine, 1, absent_worker, by="eve")
    assert marks(engine) == [(1, "replayed", 1, "bob", "posted, a duplicate: nothing changes")]
    assert events(engine) == APPLIED_ONCE


def test_a_message_of_the_first_version_of_celerys_protocol_is_replayed(engine: Engine) -> None:
    fields = {"org_id": "acme", "grant_id": "gift", "credits": 5}
    body = json.dumps({"task": "wallet.grant", "id": "1", "args": [fields], "kwargs": {}}).encode()
    apply_batch(engine, [Delivery("wallet.grant", InvalidMessage("unexpected_error", "mended since", None), body)])
    assert replay(engine, 1, worker(engine)) == "posted"


# What cannot be replayed or discarded


def test_what_cannot_be_encoded_does_not_stop_the_others(engine: Engine) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with (
        Client("redis://127.0.0.1:1/0") as client,
        pytest.raises(NotReplayableError, match="dead letter 7 is nested too deeply to be sent again"),
    ):
        Replayer(engine, client, by="ann", wait_s=10).send(7, "wallet.grant", [nested], {}, None)


def test_an_unknown_letter_is_neither_replayed_nor_discarded(engine: Engine) -> None:
    for attempt in (
        lambda: replay(engine, 7, worker(engine)),
        lambda: dead_letters.discard(engine, 7, by="ann", why="a test"),
    ):
        with pytest.raises(UnknownLetterError, match=r"^there is no dead letter 7$"):
            attempt()


def test_a_discarded_letter_is_not_sent_and_not_discarded_again(engine: Engine) -> None:
    apply_batch(engine, [REFUND, FINISH])
    dead_letters.discard(engine, 1, by="ann", why="a test message")
    with pytest.raises(NotReplayableError, match=r"^dead letter 1 was discarded by ann: a test message$"):
        replay(engine, 1, worker(engine))
    with pytest.raises(NotOpenError, match=r"^dead letter 1 was discarded by ann: a test message$"):
        dead_letters.discard(engine, 1, by="bob", why="another reason")
    assert marks(engine) == [(1, "discarded", 1, "ann", "a test message")]
    assert events(engine) == [("usage", -80)]


def test_a_replayed_letter_is_not_discarded(engine: Engine) -> None:
    apply_batch(engine, [REFUND, FINISH])
    replay(engine, 1, worker(engine))
    with pytest.raises(NotOpenError, match=r"^dead letter 1 was replayed by ann: posted$"):
        dead_letters.discard(engine, 1, by="bob", why="a test message")
    assert marks(engine) == [(1, "replayed", 1, "ann", "posted")]


def test_a_letter_that_is_discarded_while_it_is_sent_tells_what_its_message_did(engine: Engine) -> None:
    apply_batch(engine, [REFUND, FINISH])

    def send(*message: Any) -> Result:
        dead_letters.discard(engine, 1, by="bob", why="too late")
        return worker(engine)(*message)

    replay(engine, 1, send)
    assert marks(engine) == [(1, "replayed", 1, "ann", "posted")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\xff",
        b"5",
        b'"abc"',
        b'{"a": 1, "b": 2, "c": 3}',
        b"[[], {}]",
        b"[{}, {}, {}]",
        b"[[], [], {}]",
        b"[[" + b"9" * 5_000 + b"], {}, {}]",
        b"[[" + b"[" * 5_000 + b"]" * 5_000 + b"], {}, {}]",
    ],
    ids=lambda body: ascii(body[:20]),
)
def test_what_is_no_message_is_not_sent(engine: Engine, body: bytes) -> None:
    apply_batch(engine, [Delivery("wallet.refund", None, body)])
    with pytest.raises(NotReplayableError, match=r"^dead letter 1 holds no message that could be sent again$"):
        replay(engine, 1, worker(engine))
    assert marks(engine) == [(1, "open", 1, None, None)]


def test_a_message_that_names_no_task_is_not_sent(engine: Engine) -> None:
    nameless = InvalidMessage("undecodable_message", "the message names no task", None)
    apply_batch(engine, [Delivery("", nameless, b"[[{}], {}, {}]")])
    with pytest.raises(NotReplayableError, match=r"^dead letter 1 names no task, so it cannot be sent again$"):
        replay(engine, 1, worker(engine))
    assert marks(engine) == [(1, "open", 1, None, None)]


def test_the_arguments_are_sent_as_they_came(engine: Engine) -> None:
    body = b'[[1, {"a": "\\ud800\\u0000"}], {"b": [NaN]}, {"callbacks": null}]'
    apply_batch(engine, [Delivery("wallet.\x1b", None, body)])
    sent = []

    def send(*message: Any) -> str:
        sent.append(message)
        return "nobody knows"

    replay(engine, 1, send)
    [(task, args, kwargs, traceparent)] = sent
    assert (task, args, traceparent) == ("wallet.\x1b", [1, {"a": "\ud800\x00"}], None)
    assert repr(kwargs) == "{'b': [nan]}"


# Finding letters


def test_letters_are_found_by_each_condition_and_by_all(engine: Engine) -> None:
    conflict = delivery("workflow.finish", org_id="acme", workflow_id="run", credits=81)
    other = delivery("wallet.refund", org_id="globex", refund_id="r1", credits=30, workflow_id="run")
    apply_batch(engine, [REFUND, FINISH])
    apply_batch(engine, [conflict])
    apply_batch(engine, [other])
    sql(engine, "UPDATE dead_letters SET first_failed_at = first_failed_at - interval '1 day' WHERE id = 1")
    sql(engine, "UPDATE dead_letters SET last_failed_at = first_failed_at WHERE id = 1")
    dead_letters.discard(engine, 3, by="ann", why="a test")
    [(now,)] = sql(engine, "SELECT clock_timestamp()")
    found = {
        LetterFilter(): [2, 1],
        LetterFilter(None): [3, 2, 1],
        LetterFilter("discarded"): [3],
        LetterFilter("replayed"): [],
        LetterFilter(code="conflict"): [2],
        LetterFilter(task="wallet.refund"): [1],
        LetterFilter(None, task="wallet.refund", org_id="globex"): [3],
        LetterFilter(org_id="acme"): [2, 1],
        LetterFilter(failed_since=now - timedelta(hours=1)): [2],
        LetterFilter(code="conflict", task="wallet.refund"): [],
    }
    with engine.connect() as connection:
        for matching, ids in found.items():
            assert (matching, [letter.id for letter in dead_letters.letters(connection, matching)]) == (matching, ids)
        assert [letter.id for letter in dead_letters.letters(connection, LetterFilter(None), before_id=3)] == [2, 1]
        assert dead_letters.letter(connection, 3).resolution == "a test"


# Reservations that stay open


def test_open_reservations_are_listed_oldest_first(engine: Engine) -> None:
    def start(org_id: str, workflow_id: str, credits: int) -> None:
        apply_batch(engine, [delivery("workflow.start", org_id=org_id, workflow_id=workflow_id, credits=credits)])

    for org_id in ("globex", "acme"):
        apply_batch(engine, [delivery("wallet.grant", org_id=org_id, grant_id="g1", credits=100)])
    start("globex", "first", 10)
    start("acme", "second", 20)
    start("acme", "too-much", 200)
    start("acme", "third", 30)
    start("acme", "ended", 40)
    apply_batch(engine, [delivery("workflow.cancel", org_id="acme", workflow_id="ended")])

    def found(**conditions: Any) -> list[tuple[str, int]]:
        with engine.connect() as connection:
            return [(hold.workflow_id, hold.credits) for hold in views.open_reservations(connection, **conditions)]

    assert found() == [("first", 10), ("second", 20), ("third", 30)]
    assert found(limit=1) == [("first", 10)]
    assert found(org_id="acme") == [("second", 20), ("third", 30)]
    assert found(older_than=timedelta(0)) == [("first", 10), ("second", 20), ("third", 30)]
    assert found(older_than=timedelta(hours=1)) == []
