"""The second broker, RabbitMQ itself: what is sent is confirmed, what is not confirmed raises, nothing gets lost."""

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from amqp.exceptions import PreconditionFailed
from celery import Celery
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.message import Message
from sqlalchemy import Engine

from holdfast_client.broker import DEAD_QUEUE, ENGINE_DEAD_QUEUE, ENGINE_QUEUE, QUEUE, declare_queues
from holdfast_client.client import BrokerUnavailableError, Client, NotSentError, Waiting
from holdfast_client.messages import DELIVERY_LIMIT
from holdfast_client.publishing import TIMEOUT_S
from tests import rabbitmq
from tests.cut import cut_way_to
from tests.installation import SENT_BY_FORKS, send_from_forks
from tests.rabbitmq import RabbitMQ
from tests.support import PATIENCE_S, eventually
from worker.broker import queues, taken_from
from worker.replaying import Replayer

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine

LEDGER = Queue(QUEUE, no_declare=True)
"""As who does not know its arguments names it."""

FULL = {"x-max-length": 1, "x-overflow": "reject-publish"}


@pytest.fixture
def client(rabbitmq_url: str) -> Iterator[Client]:
    with Client(rabbitmq_url) as own:
        yield own


@pytest.fixture
def channel(rabbitmq_url: str) -> Iterator[Any]:
    """A plain channel, to look into the queues with."""
    with Connection(rabbitmq_url) as connection, connection.channel() as own:
        yield own


def grant(client: Client, number: int = 1) -> None:
    client.grant(org_id="acme", grant_id=f"gift-{number}", credits=1)


def is_sent(client: Client, number: int) -> bool:
    try:
        grant(client, number)
    except NotSentError:
        return False
    return True


def grant_many(client: Client, count: int) -> None:
    with client.batch() as batch:
        for number in range(count):
            batch.grant(org_id="acme", grant_id=f"gift-{number}", credits=1)


def take(channel: Any, queue: str) -> Any:
    """The next message of `queue`, as soon as there is one."""
    return eventually(lambda: channel.basic_get(queue))


def take_all(channel: Any, queue: str, count: int) -> list[str]:
    """The ids of the first `count` messages."""
    messages = [take(channel, queue) for _ in range(count)]
    return [json.loads(message.body)[0][0]["grant_id"] for message in messages]


def stock_producer(broker_url: str, **settings: Any) -> Celery:
    app = Celery(broker=broker_url, set_as_current=False)
    app.conf.update(settings)
    return app


# What is sent


def test_before_any_worker_ever_ran_messages_wait(client: Client, channel: Any) -> None:
    grant(client, 1)
    grant_many(client, 1)
    assert take_all(channel, QUEUE, 2) == ["gift-1", "gift-0"]


def test_thousands_arrive_in_the_order_of_the_calls(client: Client, channel: Any) -> None:
    grant_many(client, 2500)
    assert take_all(channel, QUEUE, 2500) == [f"gift-{number}" for number in range(2500)]
    assert channel.basic_get(QUEUE) is None


def test_a_process_and_its_forks_share_one_client(channel: Any, rabbitmq_url: str) -> None:
    send_from_forks(rabbitmq_url)
    assert sorted(all_in(channel, QUEUE)) == sorted(SENT_BY_FORKS)


def test_a_message_is_what_a_stock_producer_sends(client: Client, channel: Any, rabbitmq_url: str) -> None:
    message: dict[str, Any] = {
        "org_id": "acme",
        "workflow_id": "run",
        "credits": 5,
        "metadata": {"note": 'é "quoted"'},
    }
    client.finish(**message)
    with stock_producer(rabbitmq_url) as app:
        app.send_task("workflow.finish", args=[message], queue=LEDGER, ignore_result=True)
    ours, stock = take(channel, QUEUE), take(channel, QUEUE)
    assert ours.body == stock.body
    assert without_ids(ours.properties) == without_ids(stock.properties)


def without_ids(properties: dict[str, Any]) -> str:
    headers = {name: value for name, value in properties["application_headers"].items() if name != "x-delivery-count"}
    text = json.dumps({**properties, "application_headers": headers}, sort_keys=True)
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)


def test_what_waits_is_counted(client: Client, channel: Any) -> None:
    assert client.waiting() == {QUEUE: Waiting(0, None), ENGINE_QUEUE: Waiting(0, None)}
    grant_many(client, 3)
    eventually(lambda: client.waiting() == {QUEUE: Waiting(3, None), ENGINE_QUEUE: Waiting(0, None)})


def test_a_queue_that_was_deleted_is_made_again(client: Client, channel: Any) -> None:
    grant(client, 1)
    channel.queue_delete(QUEUE)
    grant(client, 2)
    assert take_all(channel, QUEUE, 1) == ["gift-2"]


def test_a_broker_that_keeps_no_answers_is_not_asked_for_one(engine: Engine, client: Client, channel: Any) -> None:
    with pytest.raises(ValueError, match="wait_s needs a result_url: this broker keeps no answers"):
        client.grant(org_id="acme", grant_id="gift", credits=1, wait_s=1)
    replayer = Replayer(engine, client, by="ann", wait_s=10)
    assert replayer.send(7, "wallet.grant", [{}], {}, None) == "this broker keeps no answers"
    assert take(channel, QUEUE).headers["task"] == "wallet.grant"
    assert channel.basic_get(QUEUE) is None


def test_to_look_at_a_queue_that_is_not_there_disturbs_nothing(client: Client, channel: Any) -> None:
    grant(client, 1)
    channel.queue_delete(QUEUE)
    assert client.waiting() == {QUEUE: Waiting(0, None), ENGINE_QUEUE: Waiting(0, None)}
    grant(client, 2)
    assert take_all(channel, QUEUE, 1) == ["gift-2"]
    assert channel.basic_get(QUEUE) is None


# What is not


def test_what_a_full_queue_refuses_raises(client: Client, channel: Any) -> None:
    channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=FULL)
    with pytest.raises(
        NotSentError, match=r"^a batch of 50 messages.* it refused 49 of 50 messages: the queue credits"
    ):
        grant_many(client, 50)
    with pytest.raises(NotSentError, match=r"^wallet.grant could not be handed.* it refused 1 of 1 messages"):
        grant(client)
    channel.queue_purge(QUEUE)
    grant(client)


def test_what_a_full_quorum_queue_refuses_raises(client: Client, channel: Any) -> None:
    arguments = {"x-queue-type": "quorum", **FULL}
    channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=arguments)
    eventually(lambda: not is_sent(client, 1))  # such a queue is late to say that it is full


def test_a_connection_that_breaks_meanwhile_raises_and_sending_again_completes_it(
    client: Client, channel: Any, rabbitmq_server: RabbitMQ
) -> None:
    grant(client, 0)
    with (
        cut_way_to(rabbitmq_server.port, after_bytes=100_000) as way,
        Client(f"amqp://127.0.0.1:{way.port}//") as unlucky,
        pytest.raises(NotSentError) as failed,
    ):
        grant_many(unlucky, 500)
    assert re.match(
        r"^a batch of 500 messages, of which some may have arrived, could not be handed to the broker at "
        r"amqp://\S+, and may be sent again: ",
        str(failed.value),
    )
    arrived = Counter[str]()

    def came_again() -> bool:
        arrived.update(all_in(channel, QUEUE))
        return arrived["gift-1"] > 1

    eventually(came_again)  # with every attempt
    grant_many(client, 500)
    assert set(all_in(channel, QUEUE)) == {f"gift-{number}" for number in range(500)}


def all_in(channel: Any, queue: str) -> Iterator[str]:
    while message := channel.basic_get(queue):
        yield json.loads(message.body)[0][0]["grant_id"]


def test_a_wrong_password_is_told_without_it(rabbitmq_server: RabbitMQ) -> None:
    url = f"amqp://guest:sekrit@127.0.0.1:{rabbitmq_server.port}//"
    with Client(url) as client:
        with pytest.raises(NotSentError, match=r"amqp://guest:\*\*@127.* ACCESS_REFUSED - Login was refused") as failed:
            grant(client)
        with pytest.raises(BrokerUnavailableError, match="ACCESS_REFUSED"):
            client.waiting()
    assert "sekrit" not in str(failed.value)


def test_a_broker_that_falls_silent_is_given_up(client: Client, channel: Any, rabbitmq_server: RabbitMQ) -> None:
    grant(client, 1)
    with rabbitmq_server.silent():
        began = time.monotonic()
        with pytest.raises(NotSentError, match="it confirmed nothing for 5 s"):
            grant(client, 2)
        assert time.monotonic() - began < 3 * TIMEOUT_S, "more than one attempt waited"
    grant(client, 2)
    arrived = Counter(all_in(channel, QUEUE))
    assert set(arrived) == {"gift-1", "gift-2"}


@pytest.mark.skipif(not rabbitmq.is_installed(), reason="RabbitMQ (rabbitmq-server) is not installed")
def test_what_was_confirmed_survives_the_death_of_the_broker() -> None:
    with rabbitmq.running() as mortal, Client(mortal.url) as client:
        grant_many(client, 100)
        grant(client, 100)
        mortal.server.kill()
        with pytest.raises(NotSentError, match=f"127.0.0.1:{mortal.port}"):
            grant(client, 101)
        mortal.restart()
        eventually(lambda: is_sent(client, 101))  # at first the queue has no leader, and may refuse
        with Connection(mortal.url) as connection, connection.channel() as channel:
            assert take_all(channel, QUEUE, 102) == [f"gift-{number}" for number in range(102)]


# The queues


def test_the_queues_can_be_declared_by_everyone_and_in_any_order(
    rabbitmq_url: str, client: Client, channel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with Connection(rabbitmq_url) as connection:
        declare_queues(connection)
        grant(client)
        declare_queues(connection)
    with stock_producer(rabbitmq_url) as app:
        app.send_task("wallet.grant", args=[{"org_id": "acme", "grant_id": "gift-2", "credits": 1}], queue=LEDGER)
    assert take_all(channel, QUEUE, 2) == ["gift-1", "gift-2"]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_worker_consumes_all_and_knows_from_where_it_takes(rabbitmq_url: str, client: Client, channel: Any) -> None:
    arrived: list[str] = []

    def receive(message: Message) -> None:
        arrived.append(taken_from(message))
        message.ack()

    grant(client)
    for queue in (DEAD_QUEUE, ENGINE_QUEUE, ENGINE_DEAD_QUEUE):
        channel.basic_publish(channel.prepare_message(b"{}"), exchange="", routing_key=queue)
    with (
        Connection(rabbitmq_url) as connection,
        connection.Consumer(queues(rabbitmq_url), on_message=receive, auto_declare=True),
    ):
        while len(arrived) < 4:
            connection.drain_events(timeout=PATIENCE_S)
    assert sorted(arrived) == [QUEUE, DEAD_QUEUE, ENGINE_QUEUE, ENGINE_DEAD_QUEUE]


def test_a_queue_that_is_there_is_used_as_it_is(
    rabbitmq_url: str, client: Client, channel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    channel.queue_declare(QUEUE, durable=True, auto_delete=False)
    with Connection(rabbitmq_url) as connection:
        declare_queues(connection)
    [warning] = [record.message for record in caplog.records]
    assert warning.startswith("The queue credits has wrong arguments, and is used as it is: ")
    assert "PRECONDITION_FAILED - inequivalent arg" in warning
    grant(client)
    assert take_all(channel, QUEUE, 1) == ["gift-1"]


def test_what_is_delivered_too_often_moves_to_the_queue_of_the_dead(client: Client, channel: Any) -> None:
    grant(client)
    for redelivery in range(DELIVERY_LIMIT + 1):
        message = take(channel, QUEUE)
        assert message.headers.get("x-delivery-count", 0) == redelivery  # RabbitMQ 4 says nothing of the first one
        channel.basic_reject(message.delivery_tag, requeue=True)
    dead = take(channel, DEAD_QUEUE)
    assert dead.body == message.body
    assert dead.headers["task"] == "wallet.grant"
    assert (dead.headers["x-first-death-queue"], dead.headers["x-first-death-reason"]) == (QUEUE, "delivery_limit")
    assert channel.basic_get(QUEUE) is None


# Other producers, as docs/operating.md shows them


def test_a_stock_producer_may_name_the_replicated_queue(client: Client, channel: Any, rabbitmq_url: str) -> None:
    message = {"org_id": "acme", "grant_id": "gift-2", "credits": 1}
    grant(client)
    with stock_producer(rabbitmq_url, broker_transport_options={"confirm_publish": True}) as app:
        app.send_task("wallet.grant", args=[message], queue=LEDGER)
    # Why it must not declare it: on a connection of its own, as kombu declares a queue once for each.
    another = {"confirm_publish": True, "write_timeout": 60}
    with stock_producer(rabbitmq_url, broker_transport_options=another) as app, pytest.raises(PreconditionFailed):
        app.send_task("wallet.grant", args=[message], queue="credits")
    assert take_all(channel, QUEUE, 2) == ["gift-1", "gift-2"]
