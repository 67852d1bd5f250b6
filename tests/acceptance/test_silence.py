"""A sender whose answer does not come is told what waits, where, and whether a worker is there."""

from collections.abc import Iterator

import pytest

from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client, NoAnswerError
from tests.databases import new_broker_database
from tests.installation import Installation
from tests.support import suspended
from worker.local.broker import Broker
from worker.local.embedded import Embedded
from worker.local.process import Process

Running = tuple[Installation, Process]
FINISH = {"org_id": "acme", "workflow_id": "run-1", "credits": 5}
NO_WORKER = "and no worker answers: none runs, or it is paused, or uses another broker or database"


@pytest.fixture(scope="module")
def other_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Another server, with users."""
    broker = Broker(tmp_path_factory.mktemp("broker"))
    broker.start()
    yield broker
    broker.stop()


def told(client: Client) -> str:
    with pytest.raises(NoAnswerError) as missed:
        client.send("workflow.finish", FINISH, wait_s=0.2)
    return str(missed.value).partition("within 0.2 s: ")[2]


def database_of(url: str) -> str:
    return f"(Redis database {url.rsplit('/', 1)[1]})"


def test_a_paused_worker_does_not_answer_and_the_messages_are_counted(with_worker: Running) -> None:
    installation, worker = with_worker
    with Client(installation.broker_url) as client, suspended(worker.pid):
        client.finish(org_id="acme", workflow_id="run-0", credits=5)
        seen = told(client)
    assert seen.startswith("2 messages wait in the queue credits at redis://")
    assert seen.endswith(f"{database_of(installation.broker_url)}, {NO_WORKER}")


def test_in_another_database_of_redis_there_is_no_worker(with_worker: Running, services: Embedded) -> None:
    with new_broker_database(services) as other, Client(other) as client:
        seen = told(client)
    assert seen.startswith("1 message waits in the queue credits at redis://")
    assert seen.endswith(f"{database_of(other)}, {NO_WORKER}")


def test_a_url_that_names_no_database_of_redis_means_the_first_one(other_broker: Broker) -> None:
    with Client(other_broker.url.removesuffix("/0")) as client:
        assert "(Redis database 0)" in told(client)


def test_a_worker_that_keeps_answers_elsewhere_has_taken_the_message(
    with_worker: Running, other_broker: Broker
) -> None:
    installation, _ = with_worker
    with Client(installation.broker_url, result_url=other_broker.url) as client:
        seen = told(client)
    assert seen.startswith("no message waits in the queue credits at redis://")
    assert seen.endswith("or its answer is kept elsewhere (HOLDFAST_RESULT_URL)")


def test_an_engine_that_may_not_ask_for_workers_counts_its_messages(other_broker: Broker) -> None:
    with Client(other_broker.url_of("engine"), queue=ENGINE_QUEUE) as engine:
        seen = told(engine)
    assert seen.startswith("1 message waits in the queue credits.engine at redis://engine:**@127.0.0.1:")
    assert seen.endswith("/0 (Redis database 0); whether a worker is there, this user of the broker may not ask")


def test_who_asks_for_workers_gives_back_nothing_that_workers_of_others_hold(with_worker: Running) -> None:
    """As kombu does, with whatever was taken an hour ago, whenever it waits for a reply."""
    installation, worker = with_worker
    installation.broker.hset("unacked", "1", '[{"body": "", "properties": {"delivery_info": {}}}, "", "celery"]')
    installation.broker.zadd("unacked_index", {"1": 0})
    with Client(installation.broker_url) as client, suspended(worker.pid):
        assert client.sees_worker() is False
    assert installation.broker.zcard("unacked_index") == 1
