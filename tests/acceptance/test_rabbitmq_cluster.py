"""RabbitMQ with three nodes: whoever of them dies or hangs, the others are gone on with, and nothing is lost."""

import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kombu.connection import Connection
from kombu.entity import Queue

from holdfast_client.broker import DEAD_QUEUE, ENGINE_DEAD_QUEUE, ENGINE_QUEUE, QUEUE, declare_queues
from holdfast_client.client import BrokerUnavailableError, Client, NotSentError
from ledger import audit
from tests import rabbitmq
from tests.installation import Installation, log_of
from tests.rabbitmq import RabbitMQ
from tests.support import PATIENCE_S, eventually
from worker.app import _confirm_publishing
from worker.broker import create_celery

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(600),  # seconds, for whole systems that start on a slow machine
    pytest.mark.skipif(not rabbitmq.is_installed(), reason="RabbitMQ (rabbitmq-server) is not installed"),
]

ROOT = Path(__file__).parents[2]

LEDGER = Queue(QUEUE, no_declare=True)
"""As who does not know its arguments names it."""


def declare(node: RabbitMQ) -> None:
    with Connection(node.url) as connection:
        declare_queues(connection)


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RabbitMQ]]:
    """Three nodes, and queues that were made when there was only the first."""
    with rabbitmq.cluster(while_first_is_alone=declare) as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: list[RabbitMQ]) -> list[RabbitMQ]:
    """Three nodes that run. The queues are new, have a member on each of them, and are led by the second one."""
    for node in cluster:
        if not node.server.is_running:
            node.start()
    cluster[0].clear()
    declare(cluster[1])
    return cluster


def url_of(nodes: list[RabbitMQ]) -> str:
    return ";".join(node.url for node in nodes)


def grant(client: Client, gift: str) -> None:
    client.grant(org_id="acme", grant_id=gift, credits=1)


def gifts_in(node: RabbitMQ) -> Iterator[str]:
    """Take all messages, and tell what they give."""
    with Connection(node.url) as connection, connection.channel() as channel:
        while message := channel.basic_get(QUEUE, no_ack=True):
            yield json.loads(message.body)[0][0]["grant_id"]


def test_queues_that_are_older_than_a_node_are_grown(cluster: list[RabbitMQ]) -> None:
    first, second, _ = cluster
    [command] = re.findall("^rabbitmq-queues (grow .*)$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
    grown = first.queues("--formatter=json", *shlex.split(command.replace("rabbit@mq-2", second.name)))
    rows = sorted((row["name"], row["size"], row["result"]) for row in json.loads(grown))
    assert rows == [
        (queue, 2, "ok") for queue in (QUEUE, DEAD_QUEUE, ENGINE_QUEUE, ENGINE_DEAD_QUEUE)
    ]  # until then, each had one member


def test_client_and_beat_leave_a_node_that_hangs(nodes: list[RabbitMQ]) -> None:
    url = url_of(nodes)
    app = create_celery("beat", url, None)
    _confirm_publishing(app)
    with app, app.connection_for_write() as connection, Client(url) as client, Client(url) as reader:
        producer = app.amqp.Producer(connection, auto_declare=False)  # as the beat has it

        def beat(gift: str) -> None:
            message = {"org_id": "acme", "grant_id": gift, "credits": 1}
            app.send_task("wallet.grant", args=[message], queue=LEDGER, producer=producer, ignore_result=True)

        grant(client, "1")
        beat("2")
        assert reader.waiting()[QUEUE].messages <= 2
        with nodes[0].silent():
            began = time.monotonic()
            with pytest.raises(NotSentError, match="it confirmed nothing for 5 s"):
                grant(client, "3")
            grant(client, "4")
            with pytest.raises(BrokerUnavailableError):
                reader.waiting()
            eventually(lambda: reader.waiting()[QUEUE].messages >= 3)
            with Client(url) as newcomer:
                grant(newcomer, "5")
            beat("6")
            assert time.monotonic() - began < PATIENCE_S
    assert set(gifts_in(nodes[1])) >= {"1", "2", "4", "5", "6"}


def test_nodes_that_are_killed_under_load_cost_nothing(nodes: list[RabbitMQ], installation: Installation) -> None:
    url = url_of(nodes)
    worker = installation.start_worker_on(url)
    sent = 0

    def send(client: Client) -> None:
        """Send a thousand more, again and again until the broker has them."""
        nonlocal sent
        numbers = range(sent, sent + 1_000)

        def are_taken() -> bool:
            with suppress(NotSentError):
                with client.batch() as batch:
                    for number in numbers:
                        batch.grant(org_id=f"org-{number % 20}", grant_id=f"gift-{number}", credits=1)
                return True
            return False

        eventually(are_taken)
        sent += len(numbers)

    with Client(url) as client:
        for victim in nodes:
            for node in nodes:
                if not node.server.is_running:
                    node.start()
            send(client)
            eventually(lambda: installation.count("credit_events") > sent - 1_000)
            victim.server.kill()
            send(client)
            eventually(lambda: installation.count("credit_events") == sent)
    assert worker.is_running
    assert installation.count("dead_letters") == 0
    assert audit.verify(installation.engine).is_clean


def test_a_worker_leaves_a_node_that_hangs(nodes: list[RabbitMQ], installation: Installation) -> None:
    worker = installation.start_worker_on(url_of(nodes))
    eventually(lambda: "Connected and ready" in log_of(worker))
    with nodes[0].silent(), Client(nodes[1].url) as client:
        grant(client, "gift")
        eventually(lambda: installation.count("credit_events") == 1, timeout_s=2 * PATIENCE_S)
