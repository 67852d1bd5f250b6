"""The same worker on RabbitMQ: the same ledger, the same promises."""

import bz2
import json
import os
import signal
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil
import pytest
from kombu.connection import Connection

from holdfast_client.broker import DEAD_QUEUE, ENGINE_DEAD_QUEUE, ENGINE_QUEUE, QUEUE, declare_queues
from holdfast_client.client import Client, NoAnswerError
from holdfast_client.messages import DELIVERY_LIMIT, MAX_BODY_BYTES
from ledger import audit
from tests import rabbitmq
from tests.cut import cut_way_to
from tests.installation import (
    Installation,
    celery,
    exit_code,
    installed,
    log_of,
    terminate,
    warnings_in,
)
from tests.rabbitmq import RabbitMQ
from tests.support import PATIENCE_S, eventually, sql
from worker.batching import MOST_MESSAGES
from worker.local.embedded import Embedded

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


@pytest.fixture
def ledger(services: Embedded, rabbitmq_url: str) -> Iterator[Installation]:
    """A ledger whose broker is RabbitMQ; answers are kept in Redis beside it."""
    with installed(services) as own:
        yield own


@pytest.fixture
def client(ledger: Installation, rabbitmq_url: str) -> Iterator[Client]:
    with Client(rabbitmq_url, result_url=ledger.broker_url) as own:
        yield own


def grant_many(client: Client, first: int, count: int) -> None:
    with client.batch() as batch:
        for number in range(first, first + count):
            batch.grant(org_id=f"org-{number % 20}", grant_id=f"gift-{number}", credits=1)


def waiting(rabbitmq_url: str) -> dict[str, int]:
    """How many messages are in each queue and with nobody."""
    with Connection(rabbitmq_url) as connection, connection.channel() as channel:
        return {name: channel.queue_declare(name, passive=True).message_count for name in (QUEUE, DEAD_QUEUE)}


def is_drained(rabbitmq_url: str) -> bool:
    return not any(waiting(rabbitmq_url).values())


def test_a_sender_without_an_answer_is_told_what_waits_and_sends_on(
    ledger: Installation, rabbitmq_url: str, client: Client
) -> None:
    with pytest.raises(NoAnswerError) as missed:
        client.cancel(org_id="acme", workflow_id="run", wait_s=0.2)
    _, _, seen = str(missed.value).partition("within 0.2 s: ")
    assert seen.startswith("1 message waits in the queue credits at amqp://")
    assert "Redis" not in seen
    assert "and no worker answers" in seen
    ledger.start_worker_on(rabbitmq_url)
    assert client.cancel(org_id="acme", workflow_id="run", wait_s=PATIENCE_S).outcome == "ignored"


def test_messages_are_applied_in_batches_and_answered(ledger: Installation, rabbitmq_url: str, client: Client) -> None:
    grant_many(client, 0, 5_000)
    ledger.start_worker_on(rabbitmq_url)
    eventually(lambda: ledger.count("credit_events") == 5_000)
    [(transactions,)] = sql(ledger.engine, "SELECT count(DISTINCT xmin::text) FROM credit_events")
    assert transactions < 500, "less than ten messages in a batch"
    answer = client.start(org_id="org-1", workflow_id="run", credits=5, wait_s=PATIENCE_S)
    assert (answer.outcome, answer.available) == ("reserved", 245)
    eventually(lambda: is_drained(rabbitmq_url))
    assert ledger.is_sound(events=5_001)


def test_nothing_is_used_that_rabbitmq_4_refuses(
    ledger: Installation, rabbitmq_server: RabbitMQ, rabbitmq_url: str, client: Client
) -> None:
    ledger.start_worker_on(rabbitmq_url)
    client.grant(org_id="acme", grant_id="gift", credits=1, wait_s=PATIENCE_S)
    eventually(client.sees_worker)  # which makes the queues of remote control
    table = ("--silent", "--formatter=json")
    found = json.loads(rabbitmq_server.control(*table, "list_queues", "name", "durable", "exclusive", "type"))
    transient = {queue["name"] for queue in found if not (queue["durable"] or queue["exclusive"])}
    assert transient == set(), "neither kept nor of one connection"
    kept = {queue["name"]: queue["type"] for queue in found if queue["durable"]}
    assert kept == dict.fromkeys((QUEUE, DEAD_QUEUE, ENGINE_QUEUE, ENGINE_DEAD_QUEUE), "quorum")
    assert "celery@" in str(found), "the queue of remote control"
    consumers = json.loads(rabbitmq_server.control(*table, "list_consumers", "queue_name", "prefetch_count"))
    limits = {consumer["queue_name"]: consumer["prefetch_count"] for consumer in consumers}
    assert limits[QUEUE] == 2 * MOST_MESSAGES, "a limit of the whole channel, not of the consumer"


def has_more_events(ledger: Installation, before: int) -> bool:
    return ledger.count("credit_events") > before


def test_what_killed_and_stopped_workers_held_is_applied_once(
    ledger: Installation, rabbitmq_url: str, client: Client
) -> None:
    grant_many(client, 0, 4_000)
    for number in range(4):
        before = ledger.count("credit_events")
        worker = ledger.start_worker_on(rabbitmq_url, f"worker-{number}")
        eventually(partial(has_more_events, ledger, before))
        if number % 2:
            terminate(worker)
            assert exit_code(worker) == 0, worker.last_words()
        else:
            os.kill(worker.pid, signal.SIGKILL)
        grant_many(client, 4_000 + 1_000 * number, 1_000)
    ledger.start_worker_on(rabbitmq_url)
    eventually(lambda: ledger.count("credit_events") == 8_000)
    eventually(lambda: is_drained(rabbitmq_url))
    assert ledger.is_sound(events=8_000)


def test_what_is_no_message_is_a_dead_letter_with_its_bytes(ledger: Installation, rabbitmq_url: str) -> None:
    headers = {"task": "wallet.grant", "id": "1"}
    odd: list[tuple[bytes, dict[str, Any]]] = [
        (b"\xff\x00", {"content_type": "application/octet-stream"}),
        (b"{{{", {"content_type": "application/json", "headers": headers}),
        (b'{"a": 1}', {"content_type": "application/json", "headers": headers}),
        (b"[[], {}, {}]", {"content_type": "application/json", "headers": {**headers, "task": "wallet.nothing"}}),
        (b"[1]", {"content_type": "application/json"}),
        (b"", {}),
        (b"x" * 3_000_000, {"content_type": "application/json", "headers": headers}),
        (
            zlib.compress(b" " * 100_000_000),
            {"content_type": "application/json", "headers": {**headers, "compression": "application/x-gzip"}},
        ),
        (
            bz2.compress(b" " * 300_000_000),
            {"content_type": "application/json", "headers": {**headers, "compression": "application/x-bz2"}},
        ),
    ]
    with Connection(rabbitmq_url) as connection, connection.channel() as channel:
        declare_queues(connection)
        for body, properties in odd:
            channel.basic_publish(channel.prepare_message(body, **properties), exchange="", routing_key=QUEUE)
    worker = ledger.start_worker_on(rabbitmq_url)
    eventually(lambda: ledger.count("dead_letters") == len(odd))
    letters = {bytes(body): code for body, code in sql(ledger.engine, "SELECT body, error_code FROM dead_letters")}
    codes = ["undecodable_message"] * 3 + ["unknown_task"] + ["undecodable_message"] * 2 + ["too_large"] * 2
    codes += ["undecodable_message"]
    assert letters == dict(zip([body[:MAX_BODY_BYTES] for body, _ in odd], codes, strict=True))
    eventually(lambda: is_drained(rabbitmq_url))
    assert worker.is_running
    assert psutil.Process(worker.pid).memory_info().rss < 300 * 2**20


def test_what_ends_its_worker_each_time_is_a_dead_letter_that_can_be_replayed(
    ledger: Installation, rabbitmq_url: str, client: Client
) -> None:
    sql(ledger.engine, "ALTER TABLE wallets RENAME TO away")  # nothing can be applied, so it is held
    client.grant(org_id="acme", grant_id="poison", credits=5)
    eventually(lambda: waiting(rabbitmq_url)[QUEUE] == 1)
    first = ledger.start_worker_on(rabbitmq_url, "first")
    eventually(lambda: warnings_in(first))
    os.kill(first.pid, signal.SIGKILL)
    for _ in range(DELIVERY_LIMIT):  # further workers that die of it
        with Connection(rabbitmq_url) as connection, connection.channel() as channel:
            eventually(partial(channel.basic_get, QUEUE))
            connection.collect()
    eventually(lambda: waiting(rabbitmq_url)[DEAD_QUEUE] == 1)
    for number in range(3):
        client.grant(org_id="acme", grant_id=f"gift-{number}", credits=1)
    sql(ledger.engine, "ALTER TABLE away RENAME TO wallets")
    worker = ledger.start_worker_on(rabbitmq_url)
    eventually(lambda: ledger.count("dead_letters") == 1 and ledger.count("credit_events") == 3)
    [(code, task, body)] = sql(ledger.engine, "SELECT error_code, task, body FROM dead_letters")
    assert (code, task) == ("delivery_limit", "wallet.grant")
    [args, kwargs, _] = json.loads(bytes(body))
    eventually(lambda: is_drained(rabbitmq_url))
    applied = client.send_as_is(task, args, kwargs, wait_s=PATIENCE_S)
    assert applied is not None
    assert applied.available == 8
    assert worker.is_running
    assert audit.verify(ledger.engine).is_clean


def test_neither_the_end_of_the_broker_nor_that_of_the_database_costs_a_message(
    services: Embedded, ledger: Installation
) -> None:
    with rabbitmq.running() as broker, Client(broker.url, result_url=ledger.broker_url) as client:
        worker = ledger.start_worker_on(broker.url)
        client.grant(org_id="acme", grant_id="gift", credits=5, wait_s=PATIENCE_S)
        with ledger.engine.connect() as rival, rival.begin():
            rival.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")  # a broker may take its time
            rival.exec_driver_sql("SELECT 1 FROM wallets WHERE org_id = 'acme' FOR UPDATE")
            client.grant(org_id="acme", grant_id="second", credits=5)
            grant_many(client, 0, 100)
            broker.restart()
        eventually(lambda: ledger.count("credit_events") == 102)
        assert client.grant(org_id="acme", grant_id="third", credits=5, wait_s=PATIENCE_S).available == 15
        eventually(lambda: is_drained(broker.url))
        assert worker.is_running
        assert "Traceback" not in log_of(worker)
        assert any("Connection to broker lost" in line for line in warnings_in(worker))
        terminate(worker)
        assert exit_code(worker) == 0
    assert ledger.is_sound(events=103)


def test_a_connection_that_is_reset_while_a_batch_is_applied_is_one_line_in_the_log(
    ledger: Installation, rabbitmq_server: RabbitMQ, client: Client
) -> None:
    with cut_way_to(rabbitmq_server.port) as way:
        worker = ledger.start_worker_on(f"amqp://127.0.0.1:{way.port}//")
        client.grant(org_id="acme", grant_id="gift", credits=5, wait_s=PATIENCE_S)
        os.kill(worker.pid, signal.SIGSTOP)
        for number in range(3):  # it will read them one after the other, and ask for more
            client.grant(org_id="acme", grant_id=f"gift-{number}", credits=5)
        with ledger.locked("acme"):
            os.kill(worker.pid, signal.SIGCONT)
            eventually(lambda: sql(ledger.engine, "SELECT 1 FROM pg_locks WHERE NOT granted"))
            way.reset()
        eventually(lambda: ledger.count("credit_events") == 4)
        assert client.grant(org_id="acme", grant_id="last", credits=5, wait_s=PATIENCE_S).available == 25
        assert any("Connection to broker lost" in line for line in warnings_in(worker))
        assert "Traceback" not in log_of(worker)
    assert ledger.is_sound(events=5)


def test_a_broker_without_room_is_drained(
    ledger: Installation, rabbitmq_server: RabbitMQ, rabbitmq_url: str, client: Client
) -> None:
    grant_many(client, 0, 1_000)
    rabbitmq_server.control("set_vm_memory_high_watermark", "0.0001")
    try:
        worker = ledger.start_worker_on(rabbitmq_url, "worker", "-E")
        eventually(lambda: is_drained(rabbitmq_url))
        assert worker.is_running
    finally:
        rabbitmq_server.control("set_vm_memory_high_watermark", "0.6")
    terminate(worker)
    assert exit_code(worker) == 0, worker.last_words()
    assert ledger.is_sound(events=1_000)


def test_a_beat_whose_login_is_refused_says_so_in_one_line(ledger: Installation, rabbitmq_server: RabbitMQ) -> None:
    url = f"amqp://guest:sekrit@127.0.0.1:{rabbitmq_server.port}//"
    beat = ledger.start("beat", *celery("beat"), HOLDFAST_BROKER_URL=url)
    eventually(lambda: warnings_in(beat))
    assert "Cannot send to amqp://guest:**@127.0.0.1" in warnings_in(beat)[0]
    assert "ACCESS_REFUSED" in warnings_in(beat)[0]
    assert beat.is_running
    assert "Traceback" not in log_of(beat)
    assert "sekrit" not in log_of(beat)


def test_a_worker_that_is_refused_leaks_neither_connections_nor_passwords(
    ledger: Installation, rabbitmq_server: RabbitMQ, rabbitmq_url: str, client: Client
) -> None:
    def times_refused() -> int:
        return log_of(rabbitmq_server.server).count("caused a channel exception resource_locked")

    url = f"amqp://ann:sekrit-1@127.0.0.1:1//;{rabbitmq_url};amqp://bob:sekrit-2@127.0.0.1:1//"
    worker = ledger.start_worker_on(url, "worker", "--loglevel=debug")
    beat = ledger.start("beat", *celery("beat"), "--loglevel=debug", HOLDFAST_BROKER_URL=url)
    grant_many(client, 0, 1)
    eventually(lambda: ledger.count("credit_events") == 1)
    with Connection(rabbitmq_url) as owner, owner.channel() as channel:
        channel.queue_delete(QUEUE)
        channel.queue_declare(QUEUE, durable=True, exclusive=True, auto_delete=False)
        eventually(lambda: times_refused() > 2)
        descriptors = psutil.Process(worker.pid).num_fds()
        eventually(lambda: times_refused() > 9)
        assert psutil.Process(worker.pid).num_fds() < descriptors + 4
    eventually(lambda: "Consuming from amqp://ann:**@" in log_of(worker))
    for process in (worker, beat):
        assert ":**@127.0.0.1" in log_of(process)
        assert "sekrit" not in log_of(process)
