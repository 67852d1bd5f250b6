"""Engines have a queue of their own: whatever they write, they do no more than start and end workflows."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from kombu.connection import Connection

from holdfast_client.broker import ENGINE_DEAD_QUEUE, ENGINE_QUEUE, QUEUE
from holdfast_client.client import Client
from holdfast_client.messages import DELIVERY_LIMIT, SUSPECT
from ledger import audit
from tests.acceptance import commands
from tests.installation import (
    IMPATIENT_WORKER,
    Installation,
    Producer,
    envelope,
    installed,
    warnings_in,
)
from tests.messages import EMBED
from tests.support import PATIENCE_S, eventually, sql
from worker.local.embedded import Embedded
from worker.local.process import Process

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine

GRANT = {"org_id": "acme", "grant_id": "forged", "credits": 10**9}
FINISH: dict[str, Any] = {"org_id": "acme", "workflow_id": "run", "credits": 5}
FORGED = {**FINISH, "source": "billing"}


def body(*arguments: object) -> str:
    return json.dumps([arguments, {}, EMBED])


def letters(ledger: Installation) -> list[tuple[str, str]]:
    return [(code, task) for code, task in sql(ledger.engine, "SELECT error_code, task FROM dead_letters ORDER BY id")]


def sources(ledger: Installation) -> list[str]:
    return [source for (source,) in sql(ledger.engine, "SELECT source FROM credit_events ORDER BY org_id, seq")]


def replay_all(ledger: Installation) -> commands.Ended:
    return commands.run("failed", "replay", "--all", "--yes", "--json", env=ledger.environment)


ODD = {
    "a grant": envelope(body(GRANT)),
    "a run of the scheduler": envelope(body(), task="subscriptions.post_due"),
    "a task that nobody knows": envelope(body(GRANT), task="wallet.nothing"),
    "a grant in no form that is read": envelope(body({**GRANT, "grant_id": "plain"}), content_type="text/plain"),
    "a grant that only a replay could read": envelope(body(GRANT).encode("utf-16-le")),
    "a grant by the first protocol": envelope(
        json.dumps({"task": "wallet.grant", "id": "1", "args": [GRANT], "kwargs": {}}), headers={}
    ),
    "a workflow's message that only a replay could read": envelope(
        body(FORGED).encode("utf-16-le"), task="workflow.finish"
    ),
    "no message at all": "wallet.grant",
}


def says_it_came_from(queue: str, entry: str) -> str:
    """The same entry, whose sender names another queue in every place that a sender has."""
    message = json.loads(entry)
    message["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue, "taken_from": queue}
    message["headers"]["x-death"] = [{"queue": queue, "reason": "delivery_limit", "count": 20}]
    return json.dumps(message)


def test_nothing_else_is_taken_from_it_whatever_it_says_and_no_replay_lets_it_in(
    installation: Installation, producer: Producer
) -> None:
    lists = [ENGINE_QUEUE, f"{ENGINE_QUEUE}\x06\x163"]
    entries = [*ODD.values(), says_it_came_from(QUEUE, envelope(body({**GRANT, "grant_id": "second"})))]
    for number, entry in enumerate(entries):
        installation.broker.lpush(lists[number % 2], entry)
    worker = installation.start_worker()
    eventually(lambda: installation.count("dead_letters") == len(entries))
    assert {code for code, _ in letters(installation)} == {"not_allowed"}
    errors = [error for (error,) in sql(installation.engine, "SELECT error FROM dead_letters ORDER BY id")]
    assert (
        "only workflow messages are taken from credits.engine: 'wallet.grant' must be sent to credits, "
        "by a system that has the right"
    ) in errors
    replayed = replay_all(installation)
    assert replayed.returncode == 1
    outcomes = json.loads(replayed.stdout)["items"]
    assert len(outcomes) == len(entries)
    assert all("if it is intended, send it from a system that may" in outcome["error"] for outcome in outcomes)
    # What is not sent again is no attempt. What billing itself sends is.
    assert producer.answer("wallet.grant", {**GRANT, "credits": 7})["available"] == 7
    assert installation.count("dead_letters") == len(entries)
    assert worker.is_running
    assert audit.verify(installation.engine).is_clean


def test_its_messages_have_the_workers_source_now_and_after_they_waited_or_were_replayed(
    installation: Installation, producer: Producer
) -> None:
    installation.start_worker()
    producer.answer("wallet.grant", {"org_id": "acme", "grant_id": "gift", "credits": 100, "source": "billing"})

    def ask(task: str, fields: dict[str, Any]) -> Any:
        return producer.celery.send_task(task, args=[fields], queue=ENGINE_QUEUE, ignore_result=False)

    assert ask("workflow.start", FORGED).get(timeout=PATIENCE_S)["outcome"] == "reserved"
    with installation.locked("acme"):
        waits = ask("workflow.finish", FORGED)
        eventually(lambda: installation.count("waiting_messages") == 1)
    assert waits.get(timeout=PATIENCE_S)["outcome"] == "settled"
    old = {"task": "workflow.finish", "id": "1", "args": [{**FORGED, "workflow_id": "old"}], "kwargs": {}}
    installation.broker.lpush(ENGINE_QUEUE, envelope(json.dumps(old), headers={}))
    eventually(lambda: sources(installation) == ["billing", *["workflow-engine"] * 4])
    with pytest.raises(Exception, match="conflict"):
        ask("workflow.finish", {**FORGED, "credits": 6}).get(timeout=PATIENCE_S)
    [(kept,)] = sql(installation.engine, "SELECT body FROM dead_letters")
    assert json.loads(bytes(kept))[0] == [{**FINISH, "credits": 6}]
    answer = producer.answer("workflow.finish", {**FORGED, "workflow_id": "other"})
    assert (answer["outcome"], sources(installation)[-1]) == ("settled", "billing")


def has_ended(worker: Process) -> bool:
    return not worker.is_running


def test_what_killed_workers_held_of_it_is_still_an_engines(installation: Installation, producer: Producer) -> None:
    sql(installation.engine, "ALTER TABLE wallets RENAME TO away")  # nothing can be applied, so it is held
    command = [sys.executable, "-c", IMPATIENT_WORKER]
    for entry in (envelope(body(GRANT)), envelope(body(FORGED), task="workflow.finish")):
        installation.broker.lpush(ENGINE_QUEUE, says_it_came_from(QUEUE, entry))
    producer.send("wallet.grant", {"org_id": "acme", "grant_id": "gift", "credits": 1})
    for number in range(SUSPECT):
        worker = installation.start(f"worker-{number}", *command)
        eventually(lambda: installation.waiting()["unacked"] > 0)
        os.kill(worker.pid, signal.SIGKILL)
        eventually(partial(has_ended, worker))
    sql(installation.engine, "ALTER TABLE away RENAME TO wallets")
    installation.start("last", *command)
    eventually(lambda: installation.count("credit_events") == 2 and installation.count("dead_letters") == 1)
    eventually(installation.is_drained)
    assert letters(installation) == [("not_allowed", "wallet.grant")]
    assert sorted(sources(installation)) == ["admin", "workflow-engine"]


def test_what_ended_too_many_workers_gains_no_rights(installation: Installation) -> None:
    sent = [(GRANT, "wallet.grant"), (FORGED, "workflow.finish"), (FORGED, "workflow.cancel")]
    for fields, task in sent:
        entry = envelope(body(fields) if task != "workflow.cancel" else "[[", task=task)
        installation.broker.lpush(ENGINE_QUEUE, f'{{"restored": {DELIVERY_LIMIT}, ' + entry[1:])
    installation.start_worker()
    eventually(lambda: installation.count("dead_letters") == 3)
    assert sorted(letters(installation)) == [
        ("delivery_limit", "workflow.finish"),
        ("not_allowed", "wallet.grant"),
        ("not_allowed", "workflow.cancel"),
    ]
    replayed = replay_all(installation)
    assert [item["outcome"] for item in json.loads(replayed.stdout)["items"] if item["outcome"]] == ["settled"]
    assert sources(installation) == ["workflow-engine"]


def test_what_waits_in_it_is_counted(installation: Installation) -> None:
    with Client(installation.broker_url, queue=ENGINE_QUEUE) as engine:
        engine.cancel(org_id="acme", workflow_id="run")
        assert {queue: found.messages for queue, found in engine.waiting().items()} == {QUEUE: 0, ENGINE_QUEUE: 1}
    assert installation.broker.llen(QUEUE) == 0


# RabbitMQ


@pytest.fixture
def ledger(services: Embedded, rabbitmq_url: str) -> Iterator[Installation]:
    """A ledger whose broker is RabbitMQ; answers are kept in Redis beside it."""
    with installed(services) as own:
        yield own


def publish(rabbitmq_url: str, task: str, fields: dict[str, Any], *, queue: str = ENGINE_QUEUE) -> None:
    headers = {"task": task, "id": "1", "taken_from": QUEUE, "x-death": [{"queue": QUEUE, "count": 20}]}
    with Connection(rabbitmq_url) as connection, connection.channel() as channel:
        message = channel.prepare_message(body(fields).encode(), content_type="application/json", headers=headers)
        channel.basic_publish(message, exchange=queue, routing_key=queue)


def test_on_rabbitmq_too(ledger: Installation, rabbitmq_url: str) -> None:
    ledger.start_worker_on(rabbitmq_url)
    with (
        Client(rabbitmq_url, result_url=ledger.broker_url) as billing,
        Client(rabbitmq_url, queue=ENGINE_QUEUE, result_url=ledger.broker_url) as engine,
    ):
        billing.grant(org_id="acme", grant_id="gift", credits=10, wait_s=PATIENCE_S)
        assert engine.start(**FINISH, wait_s=PATIENCE_S).holds
        publish(rabbitmq_url, "wallet.grant", GRANT)
        publish(rabbitmq_url, "workflow.finish", FORGED)
        eventually(lambda: letters(ledger) == [("not_allowed", "wallet.grant")])
        eventually(lambda: sources(ledger) == ["admin", *["workflow-engine"] * 3])
        assert {queue: found.messages for queue, found in billing.waiting().items()} == {QUEUE: 0, ENGINE_QUEUE: 0}


def test_on_rabbitmq_what_was_delivered_too_often_gains_no_rights(ledger: Installation, rabbitmq_url: str) -> None:
    sql(ledger.engine, "ALTER TABLE wallets RENAME TO away")  # nothing can be applied, so it is held
    first = ledger.start_worker_on(rabbitmq_url, "first")
    with Client(rabbitmq_url, result_url=ledger.broker_url) as client:
        client.grant(org_id="acme", grant_id="gift", credits=10)
        publish(rabbitmq_url, "wallet.grant", GRANT)
        publish(rabbitmq_url, "workflow.finish", FORGED)
        eventually(lambda: warnings_in(first))
        os.kill(first.pid, signal.SIGKILL)
        for _ in range(DELIVERY_LIMIT):  # further workers that die of it
            with Connection(rabbitmq_url) as connection, connection.channel() as channel:
                for _ in range(2):
                    eventually(partial(channel.basic_get, ENGINE_QUEUE))
                connection.collect()
        with Connection(rabbitmq_url) as connection, connection.channel() as channel:
            declared = lambda: channel.queue_declare(ENGINE_DEAD_QUEUE, passive=True).message_count == 2  # noqa: E731
            eventually(declared)
        sql(ledger.engine, "ALTER TABLE away RENAME TO wallets")
        ledger.start_worker_on(rabbitmq_url)
        eventually(lambda: ledger.count("dead_letters") == 2)
        assert sorted(letters(ledger)) == [("delivery_limit", "workflow.finish"), ("not_allowed", "wallet.grant")]
        [(kept,)] = sql(ledger.engine, "SELECT body FROM dead_letters WHERE task = 'workflow.finish'")
        assert json.loads(bytes(kept))[0] == [FINISH]
