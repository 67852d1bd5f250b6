"""The worker and the beat, as processes, fed by a producer that knows nothing but docs/messages.md."""

import base64
import json
import re
import signal
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery.schedules import schedule

from holdfast_client.messages import MESSAGES
from ledger import audit
from ledger.settings import Settings
from tests.acceptance import commands
from tests.acceptance.story import STATES, STORY
from tests.installation import (
    Installation,
    Producer,
    celery,
    envelope,
    environment,
    exit_code,
    log_of,
    terminate,
    wait_for_workers,
)
from tests.support import PATIENCE_S, begin_schedules, eventually, sql
from worker.app import create_app
from worker.compression import UNKNOWN_COMPRESSION
from worker.local.process import Process

# The beat as it is, except that its minute lasts half a second.
FAST_BEAT = """
import datetime
from worker import celery
for entry in celery.conf.beat_schedule.values():
    entry["schedule"].run_every = datetime.timedelta(seconds=0.5)
celery.Beat(loglevel="INFO").run()
"""

# It is told to end while it sends, and the place where that happens fails, as redis-py's reading does then.
TOLD_WHILE_SENDING = """
import os, signal
from worker import transport
def _put(*args, **kwargs):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise ValueError("I/O operation on closed file.")
transport.Channel._put = _put
"""

# A wall clock that goes back by two days once there is a file `stepped`; what measures intervals is not touched.
STEPPING_CLOCK = """
import datetime, os, time
real, real_ns = time.time, time.time_ns
def step_s():
    return -2 * 86400 if os.path.exists("stepped") else 0
class Stepping(datetime.datetime):
    __slots__ = ()
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=step_s())
datetime.datetime = Stepping
time.time, time.time_ns = lambda: real() + step_s(), lambda: real_ns() + step_s() * 10**9
"""

POST_DUE, RELEASE_EXPIRED = "subscriptions.post_due", "reservations.release_expired"


# One message


def test_every_message_answers_as_the_contract_says(workflow_engine: Producer) -> None:
    assert {task for task, _, _ in STORY} == set(MESSAGES)
    for task, fields, expected in STORY:
        answer = workflow_engine.answer(task, {"org_id": "acme", **fields})
        assert (task, answer) == (task, {"org_id": "acme", **expected})


def test_every_message_has_the_default_source_of_its_task(running: Installation, workflow_engine: Producer) -> None:
    for task, fields, _ in STORY:
        workflow_engine.answer(task, {"org_id": "sources", **fields})
    events = sql(running.engine, "SELECT event_type, source FROM credit_events WHERE org_id = 'sources' ORDER BY seq")
    assert events == [
        ("subscription_credit", "billing"),
        ("prepaid_purchase", "billing"),
        ("grant", "admin"),
        ("adjustment", "admin"),
        ("billing", "billing"),
        ("reservation", "workflow-engine"),
        ("reservation_released", "workflow-engine"),
        ("usage", "workflow-engine"),
        ("refund", "billing"),
        ("reservation", "workflow-engine"),
        ("reservation_released", "workflow-engine"),
        ("reservation", "workflow-engine"),
        ("reservation_released", "workflow-engine"),
        ("billing", "billing"),
    ]


def test_what_a_message_carries_is_on_its_event(running: Installation, workflow_engine: Producer) -> None:
    metadata = {"note": "été ✓", "nested": {"list": [1, 2.5, None, True]}, "grant_id": "not this one"}
    workflow_engine.answer(
        "wallet.grant",
        {
            "org_id": "carrier",
            "grant_id": "gift",
            "credits": 1_000_000_000_000,
            "source": "a campaign",
            "occurred_at": "2026-01-31T10:00:00+01:00",
            "metadata": metadata,
        },
    )
    kept = {**metadata, "grant_id": "gift", "occurred_at": "2026-01-31T09:00:00+00:00"}
    events = sql(running.engine, "SELECT credits, source, metadata FROM credit_events WHERE org_id = 'carrier'")
    assert events == [(1_000_000_000_000, "a campaign", kept)]


def test_every_message_that_comes_again_is_a_duplicate_and_writes_nothing(
    running: Installation, workflow_engine: Producer
) -> None:
    for task, fields, _ in STORY:
        workflow_engine.answer(task, {"org_id": "twice", **fields})
    for task, fields, first in STORY:
        answer = workflow_engine.answer(task, {"org_id": "twice", **fields})
        now = {
            "state": STATES[first["workflow_id"]],
            "event_seqs": [],
            "available": 1300,
            "limit": None,
            "shortfall": None,
        }
        expected = {"org_id": "twice", **first, "duplicate": True, **now}
        assert (task, answer) == (task, expected)
    assert sql(running.engine, "SELECT count(*) FROM credit_events WHERE org_id = 'twice'") == [(14,)]


def test_who_does_not_ask_gets_no_result_stored(running: Installation) -> None:
    running.broker.delete(*running.broker.keys("celery-task-meta-*") or ["none"])
    with closing(Producer(running.broker_url)) as silent:
        silent.send("wallet.grant", {"org_id": "silent", "grant_id": "gift", "credits": 5})
        eventually(lambda: sql(running.engine, "SELECT 1 FROM credit_events WHERE org_id = 'silent'"))
        eventually(running.is_drained)
    assert running.broker.keys("celery-task-meta-*") == []


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_whatever_the_pool_messages_are_applied_and_given_back(
    installation: Installation, producer: Producer, pool: str
) -> None:
    worker = installation.start("worker", *celery("worker"), "--pool", pool, "--concurrency", "2")
    for number in range(50):
        producer.send("wallet.grant", {"org_id": "acme", "grant_id": f"gift-{number}", "credits": 1})
    assert producer.answer("wallet.grant", {"org_id": "acme", "grant_id": "last", "credits": 1})["available"] == 51
    terminate(worker)
    assert exit_code(worker) == 0, worker.last_words()
    assert installation.is_drained()
    assert "Traceback" not in log_of(worker)


def test_what_waits_is_one_batch_and_its_answers_are_stored_at_once(
    installation: Installation, producer: Producer
) -> None:
    asked = [producer.ask("wallet.grant", {"org_id": "acme", "grant_id": str(n), "credits": 1}) for n in range(300)]
    installation.broker.config_resetstat()
    installation.start_worker()
    assert [one.get(timeout=PATIENCE_S)["available"] for one in asked] == list(range(1, 301))
    assert eventually(installation.is_drained)
    calls = {name: stat["calls"] for name, stat in installation.broker.info("commandstats").items()}
    assert (calls["cmdstat_hset"], calls["cmdstat_zrem"], calls["cmdstat_hdel"]) == (1, 1, 1)
    [(transactions,)] = sql(installation.engine, "SELECT count(DISTINCT xmin::text) FROM credit_events")
    assert transactions == 1


def test_its_log_is_one_line_of_json_for_an_event(installation: Installation, producer: Producer) -> None:
    # Without Celery's banner, and without its warning of being root, which is one of the tests' machine.
    program = [sys.executable, "-W", "ignore", "-m", "celery", "--quiet", "-A", "worker", "worker"]
    worker = installation.start_anew("worker", *program)
    producer.ask("wallet.grant", {}).get(timeout=PATIENCE_S, propagate=False)
    terminate(worker)
    assert exit_code(worker) == 0
    lines = [json.loads(line) for line in log_of(worker).splitlines()]
    assert [(line["level"], line["message"].split(":")[0]) for line in lines] == [
        ("INFO", "Connected and ready"),
        ("WARNING", "Dead letter 1, invalid_message"),
        ("INFO", "worker"),
    ]
    assert lines[0]["message"].startswith(
        "Connected and ready: takes messages from redis://administrator:**@127.0.0.1:"
    )
    assert lines[2]["message"] == "worker: Warm shutdown (MainProcess)"
    assert len({tuple(line) for line in lines}) == 1, "all have the same fields"


def test_a_worker_that_is_told_to_say_less_does_not_say_that_it_is_well(
    installation: Installation, producer: Producer
) -> None:
    worker = installation.start("worker", *celery("worker"), "--loglevel", "ERROR")
    producer.answer("wallet.grant", {"org_id": "acme", "grant_id": "gift", "credits": 1})
    assert "ready" not in log_of(worker)


# What cannot be applied


def dead_letters(installation: Installation, task: str, org_id: str | None) -> list[tuple[Any, ...]]:
    return sql(
        installation.engine,
        "SELECT error_code, error, attempts, status FROM dead_letters"
        " WHERE task = :task AND org_id IS NOT DISTINCT FROM :org_id ORDER BY id",
        task=task,
        org_id=org_id,
    )


def test_a_conflict_fails_with_a_sentence_and_is_a_dead_letter(
    running: Installation, workflow_engine: Producer
) -> None:
    finish = {"org_id": "conflict", "workflow_id": "run-1"}
    workflow_engine.answer("workflow.finish", {**finish, "credits": 5})
    asked = workflow_engine.ask("workflow.finish", {**finish, "credits": 6})
    failure = asked.get(timeout=PATIENCE_S, propagate=False)
    sentence = "workflow.finish: run-1 was finished with 5 credits, so this message contradicts it"
    assert asked.state == "FAILURE"
    assert sentence in str(failure)
    assert dead_letters(running, "workflow.finish", "conflict") == [("conflict", sentence, 1, "open")]
    [(body,)] = sql(running.engine, "SELECT body FROM dead_letters WHERE org_id = 'conflict'")
    assert json.loads(bytes(body))[:2] == [[{**finish, "credits": 6}], {}]
    assert eventually(running.is_drained)


GRANT = {"org_id": "bad", "grant_id": "gift", "credits": 5}
ONE_ARGUMENT = "wallet.grant takes one positional argument, the message as a JSON object; got "
AN_OBJECT = "wallet.grant: the message must be a JSON object, got "


@pytest.mark.parametrize(
    ("args", "kwargs", "org_id", "error"),
    [
        pytest.param([], {}, None, f"{ONE_ARGUMENT}0 positional and 0 named", id="no argument"),
        pytest.param([GRANT, GRANT], {}, None, f"{ONE_ARGUMENT}2 positional and 0 named", id="two arguments"),
        pytest.param([GRANT], {"credits": 5}, None, f"{ONE_ARGUMENT}1 positional and 1 named", id="one and a keyword"),
        pytest.param([], GRANT, None, f"{ONE_ARGUMENT}0 positional and 3 named", id="only keywords"),
        pytest.param([[GRANT]], {}, None, f"{AN_OBJECT}a list of 1", id="a list"),
        pytest.param([json.dumps(GRANT)], {}, None, f"{AN_OBJECT}'{json.dumps(GRANT)}'", id="a string"),
        pytest.param([None], {}, None, f"{AN_OBJECT}null", id="null"),
        pytest.param(
            [{**GRANT, "metadata": {"rate": float("nan")}}],
            {},
            "bad",
            "wallet.grant: metadata must not contain NaN or Infinity",
            id="NaN in the metadata",
        ),
        pytest.param(
            [{**GRANT, "metadata": {"half": "\ud800", "nul": "\x00"}}],
            {},
            "bad",
            "wallet.grant: metadata must not contain half a surrogate pair",
            id="what PostgreSQL cannot store",
        ),
        pytest.param(
            [{**GRANT, "credits": "5", "colour": "red"}],
            {},
            "bad",
            "wallet.grant: credits must be an integer, got '5'; colour is not a field of this message",
            id="wrong fields",
        ),
    ],
)
def test_what_is_no_message_becomes_a_dead_letter_and_the_worker_lives(
    running: Installation,
    workflow_engine: Producer,
    args: list[object],
    kwargs: dict[str, object],
    org_id: str | None,
    error: str,
) -> None:
    sql(running.engine, "DELETE FROM dead_letters WHERE task = 'wallet.grant'")
    failure = workflow_engine.ask("wallet.grant", *args, **kwargs).get(timeout=PATIENCE_S, propagate=False)
    assert error in str(failure)
    assert dead_letters(running, "wallet.grant", org_id) == [("invalid_message", error, 1, "open")]
    assert workflow_engine.answer("workflow.cancel", {"org_id": "good", "workflow_id": "run"})["outcome"] == "ignored"
    assert eventually(running.is_drained)
    assert sql(running.engine, "SELECT count(*) FROM wallets WHERE org_id = 'bad'") == [(0,)]


def unencoded(item: str, body: str) -> str:
    """The same message with this body, which is not in base64."""
    fields = json.loads(item)
    del fields["properties"]["body_encoding"]
    return json.dumps({**fields, "body": body})


def body_in(item: str) -> bytes:
    fields = json.loads(item)
    if "body_encoding" in fields["properties"]:
        return base64.b64decode(fields["body"])
    return str(fields["body"]).encode(errors="surrogatepass")


def test_no_header_makes_celery_drop_a_message_or_die(running: Installation, workflow_engine: Producer) -> None:
    before = running.count("credit_events")
    odd = [
        {"expires": "2020-01-01T00:00:00+00:00"},
        {"eta": "2999-01-01T00:00:00+00:00"},
        {"timelimit": 5},
        {"stamped_headers": 5},
        {"retries": "many", "argsrepr": 7, "root_id": {}},
        {"ignore_result": "no"},
        {"shadow": ["no name"]},
    ]
    for number, headers in enumerate(odd):
        fields = {"org_id": "odd", "grant_id": f"odd-{number}", "credits": 1}
        message = json.loads(envelope(json.dumps([[fields], {}, {}])))
        message["headers"].update(headers)
        message["properties"]["delivery_info"] = [1]
        running.broker.lpush("credits", json.dumps(message))
    eventually(lambda: running.count("credit_events") == before + len(odd))
    assert eventually(running.is_drained)


def test_a_revoked_message_is_applied_all_the_same(running: Installation, workflow_engine: Producer) -> None:
    task_id = str(uuid4())
    workflow_engine.celery.control.revoke(task_id)
    wait_for_workers(workflow_engine)
    fields = {"org_id": "revoked", "grant_id": "gift", "credits": 1}
    workflow_engine.celery.send_task("wallet.grant", args=[fields], task_id=task_id, queue="credits")
    eventually(lambda: sql(running.engine, "SELECT 1 FROM credit_events WHERE org_id = 'revoked'"))


def test_the_first_version_of_celerys_protocol_is_understood(running: Installation) -> None:
    fields = {"org_id": "old", "grant_id": "gift", "credits": 1}
    body = {"task": "wallet.grant", "id": str(uuid4()), "args": [fields], "kwargs": {}, "retries": 0}
    running.broker.lpush("credits", envelope(json.dumps(body), headers={}))
    eventually(lambda: sql(running.engine, "SELECT 1 FROM credit_events WHERE org_id = 'old'"))
    assert eventually(running.is_drained)


def test_a_value_that_only_celery_knows_as_json_is_not_lost(running: Installation, workflow_engine: Producer) -> None:
    fields = {"org_id": "odd", "grant_id": "dated", "credits": 1, "occurred_at": datetime.now(UTC)}
    failure = workflow_engine.ask("wallet.grant", fields).get(timeout=PATIENCE_S, propagate=False)
    assert "occurred_at must be an ISO 8601 string" in str(failure)


def test_who_asked_for_an_answer_is_told_that_there_is_no_such_task(
    running: Installation, workflow_engine: Producer
) -> None:
    failure = workflow_engine.ask("wallet.typo", {"org_id": "acme"}).get(timeout=PATIENCE_S, propagate=False)
    assert "there is no task named 'wallet.typo'" in str(failure)


LIST_ITEM = b"\xff no message at all"
WHAT_CELERY_DROPS_OR_DIES_OF: dict[str, tuple[str | bytes, tuple[str, str, str | None]]] = {
    "unknown task": (
        envelope('[[{"org_id": "acme"}], {}, {}]', task="wallet.nothing"),
        ("wallet.nothing", "unknown_task", "there is no task named 'wallet.nothing'"),
    ),
    "a task of Celery's own": (
        envelope("[[], {}, {}]", task="celery.chord"),
        ("celery.chord", "unknown_task", "there is no task named 'celery.chord'"),
    ),
    "no JSON": (
        envelope("{{{"),
        (
            "wallet.grant",
            "undecodable_message",
            "the body cannot be decoded: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
    ),
    "no triple": (
        envelope('{"a": 1}'),
        ("wallet.grant", "undecodable_message", "the body must be [args, kwargs, embed], as Celery sends it"),
    ),
    "not JSON by its type": (
        envelope("x", content_type="application/x-python-serialize"),
        (
            "wallet.grant",
            "undecodable_message",
            "the body must be application/json, not 'application/x-python-serialize'",
        ),
    ),
    "no type": (
        envelope("y", content_type=None),
        ("wallet.grant", "undecodable_message", "the body must be application/json, not 'None'"),
    ),
    "no task": (
        envelope("[8]", headers={"lang": "py", "id": "1"}),
        ("", "undecodable_message", "the message names no task"),
    ),
    "no headers": (envelope("[1]", headers={}), ("", "undecodable_message", "the message names no task")),
    "a task that is a number": (
        envelope("[2]", headers={"task": 5, "id": "1"}),
        ("", "undecodable_message", "the message's header task must be a string"),
    ),
    "no id": (
        envelope("[3]", headers={"task": "wallet.grant"}),
        ("wallet.grant", "undecodable_message", "the message's header id must be a string"),
    ),
    "an id that cannot be a key": (
        envelope("[4]", headers={"task": "wallet.grant", "id": "\ud800"}),
        ("wallet.grant", "undecodable_message", "the message's header id must be a string"),
    ),
    "bad ETA": (
        envelope("[5]", headers={"task": "wallet.grant", "id": "1", "eta": "tomorrow"}),
        ("wallet.grant", "undecodable_message", "the message's header eta is not a time"),
    ),
    "an ETA after the end of time": (
        envelope("[9]", headers={"task": "wallet.grant", "id": "1", "eta": "9999-12-31T24:00:00"}),
        ("wallet.grant", "undecodable_message", "the message's header eta is not a time"),
    ),
    "bad expiry": (
        envelope("[6]", headers={"task": "wallet.grant", "id": "1", "expires": [7]}),
        ("wallet.grant", "undecodable_message", "the message's header expires is not a time"),
    ),
    "compressed, it says": (
        envelope("[7]", headers={"task": "wallet.grant", "id": "1", "compression": "application/x-gzip"}),
        ("wallet.grant", "undecodable_message", None),
    ),
    "compressed in a way with a long name": (
        envelope("[10]", headers={"task": "wallet.grant", "id": "1", "compression": "x" * 50_000}),
        ("wallet.grant", "undecodable_message", f"the body cannot be decoded: {UNKNOWN_COMPRESSION}"),
    ),
    "a number too long to read": (
        envelope(f'[[{{"credits": {"9" * 5000}}}], {{}}, {{}}]'),
        ("wallet.grant", "undecodable_message", None),
    ),
    "nested too deep to read": (
        envelope(f"[[{'[' * 5000}{']' * 5000}], {{}}, {{}}]"),
        ("wallet.grant", "undecodable_message", None),
    ),
    "half a surrogate pair, as it is": (
        unencoded(envelope(""), "\ud800"),
        ("wallet.grant", "undecodable_message", None),
    ),
    "no envelope": (LIST_ITEM, ("", "undecodable_message", "the entry in the queue is not a Celery message")),
}


def test_what_celery_would_drop_or_die_of_is_a_dead_letter_with_its_bytes(
    installation: Installation, producer: Producer
) -> None:
    items = [item for item, _ in WHAT_CELERY_DROPS_OR_DIES_OF.values()]
    installation.broker.lpush("credits", *items)
    worker = installation.start_worker()
    producer.send("wallet.grant", {"org_id": "acme", "grant_id": "gift", "credits": 1})
    eventually(lambda: installation.count("credit_events") == 1 or not worker.is_running)
    eventually(lambda: installation.count("dead_letters") == len(items) or not worker.is_running)
    assert worker.is_running, worker.last_words()
    assert eventually(installation.is_drained)
    kept = sql(installation.engine, "SELECT body, task, error_code, error FROM dead_letters")
    letters = {bytes(body): letter for body, *letter in kept}
    for name, (item, (task, code, error)) in WHAT_CELERY_DROPS_OR_DIES_OF.items():
        body = item if isinstance(item, bytes) else body_in(item)
        assert letters[body][:2] == [task, code], name
        assert error is None or letters[body][2] == error, name
    assert "Traceback" not in log_of(worker)


# Time


def subscribe_and_begin(installation: Installation, producer: Producer, org_ids: list[str]) -> None:
    """A subscription from tomorrow on; here tomorrow is past, as if the day were over."""
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    for org_id in org_ids:
        subscription = {"subscription_id": "sub", "version": 1, "plan": "team", "monthly_credits": 100}
        producer.answer("wallet.subscribe", {"org_id": org_id, **subscription, "anchor": tomorrow})
    begin_schedules(installation.engine, "clock_timestamp() - interval '1 second'")


def hold_and_expire(installation: Installation, producer: Producer, org_ids: list[str]) -> None:
    """A hold lasts a minute at least; here it is past, as if the minute were over."""
    for org_id in org_ids:
        producer.answer("wallet.grant", {"org_id": org_id, "grant_id": "gift", "credits": 10})
        producer.answer("workflow.start", {"org_id": org_id, "workflow_id": "run", "credits": 7, "expires_in_s": 60})
    past = "clock_timestamp() - interval '1 second'"
    sql(installation.engine, f"UPDATE workflows SET expires_at = {past} WHERE org_id = ANY(:ids)", ids=org_ids)
    sql(installation.engine, f"UPDATE wallets SET next_hold_expiry = {past} WHERE org_id = ANY(:ids)", ids=org_ids)


def events_by_wallet(installation: Installation, org_ids: list[str]) -> dict[str, list[tuple[Any, ...]]]:
    rows = sql(
        installation.engine,
        "SELECT org_id, event_type, source, credits FROM credit_events WHERE org_id = ANY(:ids) ORDER BY org_id, seq",
        ids=org_ids,
    )
    return {org_id: [row[1:] for row in rows if row[0] == org_id] for org_id in org_ids}


def each(org_ids: list[str], events: list[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    return dict.fromkeys(org_ids, events)


PERIOD = ("subscription_credit", "scheduler", 100)
EXPIRED = [
    ("grant", "admin", 10),
    ("reservation", "workflow-engine", -7),
    ("reservation_released", "scheduler", 7),
]


def test_the_scheduler_catches_up_idle_wallets_once_however_often_it_runs(
    installation: Installation, producer: Producer
) -> None:
    installation.start_worker("worker-1")
    installation.start_worker("worker-2")
    subscribed = [f"subscribed-{number}" for number in range(10)]
    holding = [f"holding-{number}" for number in range(10)]
    wait_for_workers(producer, 2)
    subscribe_and_begin(installation, producer, subscribed)
    hold_and_expire(installation, producer, holding)
    assert installation.count("credit_events") == 20

    runs = [producer.ask(task) for _ in range(4) for task in (POST_DUE, RELEASE_EXPIRED, "events.sum_up")]
    assert sum(run.get(timeout=PATIENCE_S) for run in runs) == 20
    assert events_by_wallet(installation, subscribed) == each(subscribed, [PERIOD])
    assert events_by_wallet(installation, holding) == each(holding, EXPIRED)
    assert audit.verify(installation.engine).is_clean
    assert installation.count("dead_letters") == 0


def has_sent_tasks(beat: Process) -> bool:
    return log_of(beat).count("Sending due task") >= 8


def test_two_beats_begin_each_period_once(installation: Installation, producer: Producer) -> None:
    installation.start_worker()
    wait_for_workers(producer)
    beats = [installation.start(name, sys.executable, "-c", FAST_BEAT) for name in ("beat-1", "beat-2")]
    org_ids = [f"org-{number}" for number in range(10)]
    hold_and_expire(installation, producer, org_ids[:5])
    subscribe_and_begin(installation, producer, org_ids[5:])
    eventually(lambda: installation.count("credit_events") == 5 * 3 + 5)
    for beat in beats:
        eventually(partial(has_sent_tasks, beat))
        terminate(beat)
        assert exit_code(beat) == 0, beat.last_words()
    eventually(installation.is_drained)
    assert events_by_wallet(installation, org_ids) == {**each(org_ids[:5], EXPIRED), **each(org_ids[5:], [PERIOD])}
    assert audit.verify(installation.engine).is_clean


def test_a_beat_whose_clock_goes_back_by_two_days_goes_on(installation: Installation) -> None:
    beat = installation.start_anew("beat", sys.executable, "-c", STEPPING_CLOCK + FAST_BEAT)
    eventually(lambda: log_of(beat).count("Sending due task") >= 2)
    (installation.folder / "stepped").touch()
    sent = log_of(beat).count("Sending due task")
    eventually(lambda: log_of(beat).count("Sending due task") >= sent + 6)
    terminate(beat)
    assert exit_code(beat) == 0, beat.last_words()
    lines = [json.loads(line) for line in log_of(beat).splitlines() if line.startswith("{")]
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert max(times) - times[-1] > timedelta(days=1)  # so it is this clock that the process has


def test_a_beat_that_is_told_to_end_while_it_sends_ends(installation: Installation) -> None:
    beat = installation.start("beat", sys.executable, "-c", TOLD_WHILE_SENDING + FAST_BEAT)
    assert exit_code(beat) == 0, beat.last_words()
    assert "Warning" not in log_of(beat)


def test_the_schedule_is_every_run_every_minute_to_the_ledgers_own_queue() -> None:
    settings = Settings(database_url="postgresql+psycopg://u@127.0.0.1:1/d", broker_url="redis://127.0.0.1:1/0")
    with create_app(settings) as app:
        assert app.conf.beat_schedule == {
            "subscriptions.post_due": {"task": "subscriptions.post_due", "schedule": schedule(60.0)},
            "reservations.release_expired": {"task": "reservations.release_expired", "schedule": schedule(60.0)},
            "events.sum_up": {"task": "events.sum_up", "schedule": schedule(60.0)},
        }
        queues = [app.amqp.router.route({}, name)["queue"].name for name in app.conf.beat_schedule]
    assert queues == ["credits"] * 3


def catches_sigterm(process: Process) -> bool:
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which signals a process handles")
def test_the_beat_starts_as_it_is_leaves_no_file_and_stops_when_told(installation: Installation) -> None:
    beat = installation.start("beat", *celery("beat"))
    eventually(lambda: catches_sigterm(beat))
    terminate(beat)
    assert exit_code(beat) == 0, beat.last_words()
    assert sorted(path.name for path in installation.folder.iterdir()) == ["beat.log", "beat.pid"]  # `start` made both
    assert "Traceback" not in log_of(beat)


# Ends and outages


def test_sigterm_in_the_middle_loses_and_repeats_nothing(installation: Installation, producer: Producer) -> None:
    worker = installation.start_worker()
    producer.send_grants(0, 400)
    eventually(lambda: installation.count("credit_events") > 0)
    terminate(worker)
    producer.send_grants(400, 100)
    assert exit_code(worker) == 0, worker.last_words()
    assert installation.waiting()["unacked"] == 0  # else they would wait for the visibility timeout
    assert installation.count("credit_events") + sum(installation.waiting().values()) == 500
    installation.start_worker("worker-2")
    eventually(lambda: installation.count("credit_events") == 500)
    assert eventually(installation.is_drained)
    assert sql(installation.engine, "SELECT count(*), sum(prepaid_balance) FROM wallets") == [(20, 500)]
    assert installation.count("dead_letters") == 0
    assert audit.verify(installation.engine).is_clean
    assert "Traceback" not in log_of(worker)


def test_a_database_url_that_cannot_be_used_is_refused_at_the_start(installation: Installation) -> None:
    misled = replace(installation, database_url=f"{installation.database_url}&no_such_option=1")
    worker = misled.start_worker()
    assert exit_code(worker) == 2
    assert log_of(worker).strip() == (
        "holdfast: HOLDFAST_DATABASE_URL has an option that PostgreSQL does not know: "
        'invalid connection option "no_such_option"'
    )


# Settings

DATABASE, BROKER = "postgresql+psycopg://u:sekrit@127.0.0.1:1/d", "redis://:sekrit@127.0.0.1:1/0"


@pytest.mark.parametrize("command", ["worker", "beat"])
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        pytest.param(
            {"HOLDFAST_BROKER_URL": BROKER},
            "holdfast: HOLDFAST_DATABASE_URL is not set. "
            "PostgreSQL: `postgresql+psycopg://user:password@host/database`\n",
            id="missing",
        ),
        pytest.param(
            {"HOLDFAST_DATABASE_URL": DATABASE, "HOLDFAST_BROKER_URL": "kafka://:sekrit@host"},
            "holdfast: HOLDFAST_BROKER_URL must begin with redis://, rediss://, amqp:// or amqps:// and name a host\n",
            id="malformed",
        ),
        pytest.param(
            {"HOLDFAST_DATABSASE_URL": DATABASE, "HOLDFAST_BROKER_URL": BROKER},
            "holdfast: HOLDFAST_DATABSASE_URL is not a setting; did you mean HOLDFAST_DATABASE_URL?\n",
            id="misspelled",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(command: str, settings: dict[str, str], line: str) -> None:
    ended = commands.run_program(celery(command), env=environment(**settings))
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
