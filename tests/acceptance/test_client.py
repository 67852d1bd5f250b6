"""The producer for engines in Python, against a running worker and against everything that may be missing."""

import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

import pytest

from holdfast_client.broker import masked
from holdfast_client.client import Client, DeadLetteredError, InvalidMessageError, NoAnswerError, NotSentError
from holdfast_client.messages import MESSAGES
from holdfast_client.publishing import TIMEOUT_S
from holdfast_client.results import Limit, Result, WorkflowState
from holdfast_client.unanswered import Unanswered
from tests.acceptance.story import STORY
from tests.cut import cut_way_to
from tests.installation import SENT_BY_FORKS, Installation, Producer, send_from_forks
from tests.support import PATIENCE_S, eventually, raw, sql

ANSWERS = "celery-task-meta-*"


@pytest.fixture
def client(running: Installation) -> Iterator[Client]:
    with Client(running.broker_url) as own:
        yield own


def events(installation: Installation, org_id: str) -> int:
    [(rows,)] = sql(installation.engine, "SELECT count(*) FROM credit_events WHERE org_id = :org_id", org_id=org_id)
    return int(rows)


def test_the_story_has_every_message() -> None:
    assert {task for task, _, _ in STORY} == set(MESSAGES)


def test_every_method_sends_its_message_and_returns_the_answer(client: Client) -> None:
    for task, fields, expected in STORY:
        method = getattr(client, task.split(".")[1])
        answer = method(org_id="acme", wait_s=PATIENCE_S, **fields)
        limit = None if expected["limit"] is None else Limit(**expected["limit"])
        values = {**expected, "event_seqs": tuple(expected["event_seqs"]), "limit": limit}
        assert (task, answer) == (task, Result(org_id="acme", **values))


def test_a_start_is_reserved_rejected_or_a_duplicate(client: Client) -> None:
    client.purchase(org_id="engine", purchase_id="order", credits=100)
    reserved = client.start(org_id="engine", workflow_id="run-1", credits=60, wait_s=PATIENCE_S)
    rejected = client.start(org_id="engine", workflow_id="run-2", credits=60, wait_s=PATIENCE_S)
    again = client.start(org_id="engine", workflow_id="run-1", credits=60, wait_s=PATIENCE_S)
    assert reserved == Result("reserved", None, False, "engine", "run-1", "reserved", (2,), 40)
    limit = Limit("insufficient_credits", limit=100, used=0, reserved=60, resets_at=None)
    assert rejected == Result("rejected", limit.kind, False, "engine", "run-2", "rejected", (), 40, limit, 20)
    assert again == Result("reserved", None, True, "engine", "run-1", "reserved", (), 40)
    assert [answer.holds for answer in (reserved, rejected, again)] == [True, False, True]


def test_a_start_that_comes_again_after_a_cancel_holds_nothing(client: Client) -> None:
    client.purchase(org_id="cancelled", purchase_id="order", credits=100)
    assert client.start(org_id="cancelled", workflow_id="run-1", credits=60, wait_s=PATIENCE_S).holds
    assert client.cancel(org_id="cancelled", workflow_id="run-1", wait_s=PATIENCE_S).state == "cancelled"
    again = client.start(org_id="cancelled", workflow_id="run-1", credits=60, wait_s=PATIENCE_S)
    assert again == Result("reserved", None, True, "cancelled", "run-1", "cancelled", (), 100)
    assert not again.holds


def test_a_start_that_comes_again_after_its_hold_expired_holds_nothing(running: Installation, client: Client) -> None:
    client.purchase(org_id="expired", purchase_id="order", credits=100)
    assert client.start(org_id="expired", workflow_id="run-1", credits=60, expires_in_s=60, wait_s=PATIENCE_S).holds
    past = "clock_timestamp() - interval '1 second'"
    sql(running.engine, f"UPDATE workflows SET expires_at = {past} WHERE org_id = 'expired'")
    sql(running.engine, f"UPDATE wallets SET next_hold_expiry = {past} WHERE org_id = 'expired'")
    again = client.start(org_id="expired", workflow_id="run-1", credits=60, wait_s=PATIENCE_S)
    assert again == Result("reserved", None, True, "expired", "run-1", "expired", (), 100)
    assert not again.holds


@pytest.mark.parametrize(
    ("others", "state"),
    [({}, None), ({"state": "reserved"}, "reserved"), ({"state": "cancelled", "colour": "red"}, "cancelled")],
    ids=["older", "the same", "newer"],
)
def test_the_answer_of_a_worker_of_another_version_is_understood(
    installation: Installation, others: dict[str, Any], state: WorkflowState | None
) -> None:
    """A worker that does not know `state` yet, or that says more than this client knows, while both are updated."""
    said = {"outcome": "reserved", "reason": None, "duplicate": False, "org_id": "acme", "workflow_id": "run-1"}
    result = {**said, "event_seqs": [1], "available": 40, **others}
    with Client(installation.broker_url) as client, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(client.start, org_id="acme", workflow_id="run-1", credits=60, wait_s=PATIENCE_S)
        envelope = json.loads(raw(eventually(lambda: installation.broker.rpop("credits"))))
        key = f"celery-task-meta-{envelope['headers']['id']}"
        installation.broker.publish(key, json.dumps({"status": "SUCCESS", "result": result}))
        answer = waiting.result(PATIENCE_S)
    assert answer == Result("reserved", None, False, "acme", "run-1", state, (1,), 40)
    assert answer.holds == (state == "reserved")


def test_without_waiting_a_message_returns_no_answer_and_leaves_none(running: Installation, client: Client) -> None:
    running.broker.delete("none", *running.broker.keys(ANSWERS))
    assert isinstance(client.grant(org_id="quiet", grant_id="gift", credits=1), Unanswered)
    eventually(lambda: events(running, "quiet") == 1)
    eventually(running.is_drained)
    assert running.broker.keys(ANSWERS) == []


def test_an_answer_that_was_read_is_not_kept(running: Installation, client: Client) -> None:
    running.broker.delete("none", *running.broker.keys(ANSWERS))
    client.grant(org_id="read", grant_id="gift", credits=1, wait_s=PATIENCE_S)
    with pytest.raises(DeadLetteredError):
        client.grant(org_id="read", grant_id="gift", credits=2, wait_s=PATIENCE_S)
    eventually(running.is_drained)
    assert running.broker.keys(ANSWERS) == []


def test_a_conflict_is_told_in_a_sentence(client: Client) -> None:
    client.purchase(org_id="conflict", purchase_id="order", credits=5, wait_s=PATIENCE_S)
    with pytest.raises(DeadLetteredError) as told:
        client.purchase(org_id="conflict", purchase_id="order", credits=6, wait_s=PATIENCE_S)
    assert "wallet.purchase: order was applied with credits 5, so this message contradicts it" in str(told.value)


@pytest.mark.parametrize(
    "occurred_at",
    [
        "2026-01-31T10:00:00+01:00",
        datetime(2026, 1, 31, 9, tzinfo=UTC),
        datetime(2026, 1, 31, 10, tzinfo=timezone(timedelta(hours=1))),
    ],
    ids=["a string", "UTC", "another zone"],
)
def test_occurred_at_and_the_other_options_are_on_the_event(
    running: Installation, client: Client, occurred_at: datetime | str, request: pytest.FixtureRequest
) -> None:
    org_id = request.node.callspec.id.replace(" ", "-")
    client.grant(
        org_id=org_id,
        grant_id="gift",
        credits=1,
        occurred_at=occurred_at,  # type: ignore[arg-type]  # text is taken too
        source="crm",
        metadata={"note": "été"},
        wait_s=PATIENCE_S,
    )
    kept = sql(running.engine, "SELECT source, metadata FROM credit_events WHERE org_id = :org_id", org_id=org_id)
    metadata = {"note": "été", "grant_id": "gift", "occurred_at": "2026-01-31T09:00:00+00:00"}
    assert kept == [("crm", metadata)]


def test_an_anchor_may_be_a_datetime(running: Installation, client: Client) -> None:
    client.subscribe(
        org_id="anchored",
        subscription_id="sub",
        version=1,
        plan="team",
        monthly_credits=10,
        anchor=datetime(2026, 1, 31, tzinfo=UTC),
        wait_s=PATIENCE_S,
    )
    anchors = sql(running.engine, "SELECT anchor FROM subscriptions WHERE org_id = 'anchored'")
    assert anchors == [(datetime(2026, 1, 31, tzinfo=UTC),)]


def test_eight_threads_share_one_client(running: Installation, client: Client) -> None:
    client.purchase(org_id="shared", purchase_id="order", credits=100, wait_s=PATIENCE_S)

    def start(number: int) -> Result:
        return client.start(org_id="shared", workflow_id=f"run-{number}", credits=1, wait_s=PATIENCE_S)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(start, range(200), timeout=PATIENCE_S))
    assert [answer.workflow_id for answer in answers] == [f"run-{number}" for number in range(200)]
    assert sorted(answer.outcome for answer in answers) == ["rejected"] * 100 + ["reserved"] * 100
    assert events(running, "shared") == 101


def test_a_process_and_its_forks_share_one_client(installation: Installation) -> None:
    send_from_forks(installation.broker_url)
    assert sorted(waiting_grants(installation)) == sorted(SENT_BY_FORKS)


def test_a_closed_client_leaves_no_connection(installation: Installation) -> None:
    def connections() -> int:
        number = installation.broker_url.rsplit("/", 1)[1]
        return sum(1 for other in installation.broker.client_list() if other["db"] == number)

    before = connections()
    with Client(installation.broker_url) as client:
        client.grant(org_id="acme", grant_id="gift", credits=1)
        with pytest.raises(NoAnswerError):
            client.grant(org_id="acme", grant_id="gift", credits=1, wait_s=0.1)
    eventually(lambda: connections() == before)


# Batches, and what is on the wire


def test_a_batch_is_applied_in_the_order_of_its_calls(running: Installation, client: Client) -> None:
    with client.batch() as batch:
        batch.purchase(org_id="together", purchase_id="order", credits=100)
        for number in range(50):
            batch.start(org_id="together", workflow_id=f"run-{number}", credits=2)
            batch.finish(org_id="together", workflow_id=f"run-{number}", credits=1)
    eventually(lambda: events(running, "together") == 151)
    kept = sql(running.engine, "SELECT workflow_id, credits FROM credit_events WHERE org_id = 'together' ORDER BY seq")
    runs = [(f"run-{number}", effect) for number in range(50) for effect in (-2, 2, -1)]
    assert kept == [(None, 100), *runs]


def test_a_batch_takes_one_command_for_every_thousand_messages(installation: Installation) -> None:
    def pushes() -> int:
        return int(installation.broker.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"])

    with Client(installation.broker_url) as client:
        before = pushes()
        with client.batch() as batch:
            for number in range(2500):
                batch.grant(org_id="acme", grant_id=f"gift-{number}", credits=1)
        assert pushes() - before == 3
    assert waiting_grants(installation) == [f"gift-{number}" for number in range(2500)]


@pytest.mark.parametrize(
    "message",
    [
        {"workflow_id": "run", "credits": 5},
        {"workflow_id": "run", "credits": 5, "metadata": {"note": 'é "quoted" \\', "deep": {"er": [1, {}]}}},
        {
            "workflow_id": "run",
            "credits": 5,
            "activity_name": "x" * 256,
            "source": "it's",
            "metadata": {"y": "z" * 2000},
        },
    ],
    ids=["plain", "nested", "long"],
)
def test_a_message_is_byte_for_byte_what_celery_sends(
    installation: Installation, producer: Producer, message: dict[str, Any]
) -> None:
    message = {"org_id": "acme", **message}
    with Client(installation.broker_url) as client:
        client.finish(**message)
        with client.batch() as batch:
            batch.finish(**message)
    producer.celery.send_task("workflow.finish", args=[message], queue="credits", ignore_result=True)
    sent = [without_ids(raw(envelope)) for envelope in installation.broker.lrange("credits", 0, -1)]
    assert len(sent) == 3
    assert sent[1] == sent[2]
    if "metadata" in message:  # of which Celery shows monitors less
        sent = [re.sub(rb'"argsrepr": "(\\.|[^"\\])*"', b'"argsrepr": ""', each) for each in sent]
    assert len(set(sent)) == 1


def waiting_grants(installation: Installation) -> list[str]:
    """The ids of all grants that wait, in the order in which they are taken."""
    envelopes = [json.loads(envelope) for envelope in reversed(installation.broker.lrange("credits", 0, -1))]
    return [json.loads(base64.b64decode(envelope["body"]))[0][0]["grant_id"] for envelope in envelopes]


def without_ids(envelope: bytes) -> bytes:
    return re.sub(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", b"UUID", envelope)


# What goes wrong


def test_a_connection_that_breaks_meanwhile_raises_and_sending_again_is_safe(
    running: Installation, client: Client
) -> None:
    def grant_all(sender: Client) -> None:
        with sender.batch() as batch:
            for number in range(100):
                batch.grant(org_id="unlucky", grant_id=f"gift-{number}", credits=1)

    port = urlsplit(running.broker_url).port
    assert port is not None
    with (
        cut_way_to(port, after_bytes=50_000) as way,
        Client(way.to(running.broker_url)) as unlucky,
        pytest.raises(NotSentError, match=r"^a batch of 100 messages, of which some may have arrived, could not be"),
    ):
        grant_all(unlucky)
    eventually(lambda: events(running, "unlucky") == 100)  # as it was only the answer that got lost
    grant_all(client)
    eventually(running.is_drained)
    assert events(running, "unlucky") == 100


def test_a_broker_that_is_away_for_a_moment_is_waited_for(running: Installation) -> None:
    port = urlsplit(running.broker_url).port
    assert port is not None
    with cut_way_to(port) as way, Client(way.to(running.broker_url)) as client:
        for number in range(2):
            with way.closed_for(0.4):
                run = client.start(org_id="moment", workflow_id=f"run-{number}", credits=0, wait_s=PATIENCE_S)
            assert run.outcome == "reserved"


def test_what_the_broker_refuses_raises(installation: Installation) -> None:
    installation.broker.set("credits", "is no list")
    with Client(installation.broker_url) as client:
        with pytest.raises(
            NotSentError, match=r"^wallet.grant could not be handed to the broker at redis://.*WRONGTYPE"
        ):
            client.grant(org_id="acme", grant_id="gift", credits=1)
        installation.broker.delete("credits")
        client.grant(org_id="acme", grant_id="gift", credits=1)
    assert waiting_grants(installation) == ["gift"]


def test_an_invalid_message_is_refused_in_a_sentence_and_not_sent(installation: Installation) -> None:
    with Client(installation.broker_url) as client:
        with pytest.raises(InvalidMessageError) as refused:
            client.grant(org_id="acme", grant_id="gift", credits=0)
        with pytest.raises(InvalidMessageError, match="occurred_at must have an offset from UTC"):
            client.grant(org_id="acme", grant_id="gift", credits=1, occurred_at=datetime(2026, 1, 31))  # noqa: DTZ001
        with pytest.raises(InvalidMessageError, match="metadata must not contain a datetime"):
            client.grant(org_id="acme", grant_id="gift", credits=1, metadata={"at": datetime.now(UTC)}, wait_s=1)
    assert str(refused.value) == "wallet.grant: credits must be greater than 0, got 0"
    assert installation.is_drained()


def test_without_a_worker_there_is_no_answer_and_the_message_is_kept(installation: Installation) -> None:
    with Client(installation.broker_url) as client, told_soon(), pytest.raises(NoAnswerError) as missed:
        client.start(org_id="acme", workflow_id="run", credits=1, wait_s=0.2)
    where = f"{masked(installation.broker_url)} (Redis database {installation.broker_url.rsplit('/', 1)[1]})"
    assert str(missed.value) == (
        f"workflow.start was sent, but no answer came within 0.2 s: 1 message waits in the queue credits at {where}, "
        "and no worker answers: none runs, or it is paused, or uses another broker or database"
    )
    assert installation.waiting() == {"credits": 1, "unacked": 0}


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is ours, and that nobody listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def told_soon() -> Iterator[None]:
    """Much later than on a fast machine, but before four attempts could each have waited for `TIMEOUT_S`."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 3.5 * TIMEOUT_S


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_an_unreachable_broker_is_named_without_its_password(closed_port: int, scheme: str) -> None:
    url = f"{scheme}://user:sekrit@127.0.0.1:{closed_port}/0"
    with Client(url) as client, told_soon(), pytest.raises(NotSentError) as failed:
        client.start(org_id="acme", workflow_id="run", credits=1)
    assert f"127.0.0.1:{closed_port}" in str(failed.value)
    assert "sekrit" not in str(failed.value)


def test_an_unreachable_broker_is_told_as_soon_to_who_waits_for_an_answer(closed_port: int) -> None:
    with (
        Client(f"redis://user:sekrit@127.0.0.1:{closed_port}/0") as client,
        told_soon(),
        pytest.raises(NotSentError) as failed,
    ):
        client.start(org_id="acme", workflow_id="run", credits=1, wait_s=1)
    assert f"127.0.0.1:{closed_port}" in str(failed.value)
    assert "sekrit" not in str(failed.value)


def test_an_unreachable_result_store_is_an_error_of_the_clients_own(
    installation: Installation, closed_port: int
) -> None:
    result_url = f"redis://user:sekrit@127.0.0.1:{closed_port}/0"
    with (
        Client(installation.broker_url, result_url=result_url) as client,
        told_soon(),
        pytest.raises((NotSentError, NoAnswerError)) as failed,
    ):
        client.start(org_id="acme", workflow_id="run", credits=1, wait_s=1)
    assert "sekrit" not in str(failed.value)


@pytest.mark.parametrize(("scheme", "waits"), [("redis", {}), ("redis", {"wait_s": 1.0}), ("amqp", {})])
def test_a_broker_that_never_answers_is_given_up(silent_port: int, scheme: str, waits: dict[str, Any]) -> None:
    with Client(f"{scheme}://127.0.0.1:{silent_port}/0") as client, told_soon(), pytest.raises(NotSentError) as failed:
        client.start(org_id="acme", workflow_id="run", credits=1, **waits)
    assert str(failed.value) != ""
