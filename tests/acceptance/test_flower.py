"""Celery's own tools and Flower: what they say of a worker is true, with the broker's user that a worker has."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from holdfast_client.client import Client
from tests.acceptance import commands
from tests.installation import Installation, celery, installed_on, log_of, open_folder
from tests.support import PATIENCE_S, eventually
from worker.local.broker import Broker
from worker.local.machine import free_port

GRANTS = [{"org_id": "acme", "grant_id": f"gift-{number}", "credits": 5} for number in range(7)]
CONTRADICTIONS = [{**fields, "credits": 6} for fields in GRANTS[:3]]
SENT = {"SUCCESS": len(GRANTS), "FAILURE": len(CONTRADICTIONS)}
QUEUES = {"credits", "credits.engine"}
SECTION = (Path(__file__).parents[2] / "docs/operating.md").read_text().split("\n## Flower and Celery's tools\n")[1]
[BLOCK] = re.findall(r"^```shell\n(.*?)^```$", SECTION.split("\n## ")[0], re.MULTILINE | re.DOTALL)
*ASKING, WATCHING = [[sys.executable, "-m", *line.split()] for line in BLOCK.splitlines()]
"""The commands of the document."""


@pytest.fixture
def watched(database_url: str) -> Iterator[Installation]:
    """A ledger on a broker of its own, all of whose parts, and whoever watches them, are the user `holdfast`."""
    with open_folder() as folder:
        server = Broker(folder)
        server.start()
        try:
            with installed_on(database_url, server.url_of("holdfast")) as own:
                yield own
        finally:
            server.stop()


def said(env: dict[str, str], argv: list[str]) -> str:
    ended = commands.run_program(argv, env=env)
    assert ended.returncode == 0, ended.stderr
    assert "ERROR" not in ended.stdout
    return ended.stdout


def test_what_celery_says_of_a_worker_is_true(watched: Installation) -> None:
    def inspected(*command: str) -> str:
        return said(watched.environment, [*celery("inspect"), "--destination=celery@watched", *command])

    watched.start("worker", *celery("worker"), "-n", "celery@watched")
    with Client(watched.broker_url) as client:
        eventually(client.sees_worker)
        send(client)
        client.send_as_is("no.such.task", [{}], {})
    eventually(watched.is_drained)
    stats = json.loads(inspected("stats", "--json"))
    assert stats["celery@watched"]["total"] == {"wallet.grant": sum(SENT.values())}
    for command in ASKING:
        assert said(watched.environment, command).startswith("->  celery@watched: OK\n")
    for nothing in ("active", "revoked"):
        assert "- empty -" in inspected(nothing)
    assert "* workflow.start\n" in inspected("registered")
    queues = json.loads(inspected("active_queues", "--json"))["celery@watched"]
    assert {queue["name"] for queue in queues} == QUEUES
    password = watched.broker_url.split(":")[2].partition("@")[0]
    for about in ("report", "conf"):
        told = inspected(about)
        assert "********" in told
        assert password not in told


def test_flower_shows_every_message_and_how_it_ended(watched: Installation) -> None:
    shown = watch(watched, watched.broker_url, "-E")
    assert {queue["name"]: queue["messages"] for queue in shown} == dict.fromkeys(QUEUES, 0)


@pytest.mark.soak
def test_flower_shows_them_on_rabbitmq(
    installation: Installation, rabbitmq_url: str, rights: Callable[[str], str]
) -> None:
    url = rights("holdfast")
    assert rabbitmq_url
    settings = {"HOLDFAST_BROKER_URL": url, "HOLDFAST_RESULT_URL": installation.broker_url}
    assert watch(installation, url, CELERY_WORKER_TASK_EVENTS="true", **settings) == []


def send(client: Client) -> None:
    with client.batch() as batch:
        for fields in [*GRANTS, *CONTRADICTIONS]:
            batch.send("wallet.grant", fields)


def watch(installation: Installation, broker_url: str, *flags: str, **settings: str) -> list[dict[str, Any]]:
    """Have Flower watch a worker that applies messages. Checks what it shows, and returns the queues that it knows."""
    port = str(free_port())
    installation.start("worker", *celery("worker"), "-n", "celery@watched", *flags, **settings)
    watching = [word.replace("5555", port) for word in WATCHING]
    flower = installation.start("flower", *watching, FLOWER_UNAUTHENTICATED_API="true", **settings)
    with (
        Client(broker_url) as sender,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as client,
    ):
        eventually(lambda: answers(client) and heartbeat(client))
        send(sender)
        tasks = eventually(lambda: ended(client))
        assert Counter(task["state"] for task in tasks) == SENT
        assert {(task["name"], task["worker"]) for task in tasks} == {("wallet.grant", "celery@watched")}
        failures = [task["exception"] for task in tasks if task["state"] == "FAILURE"]
        assert all("(dead letter " in failure and ", conflict)" in failure for failure in failures)
        worker = client.get("/api/workers?refresh=1").json()["celery@watched"]
        assert worker["stats"]["total"] == {"wallet.grant": sum(SENT.values())}
        assert {queue["name"] for queue in worker["active_queues"]} >= QUEUES
        figures = client.get("/metrics").text
        for kind, number in (("received", sum(SENT.values())), ("succeeded", SENT["SUCCESS"])):
            assert events(kind) + f" {number}.0\n" in figures
        assert events("failed") + f" {SENT['FAILURE']}.0\n" in figures
        assert 'flower_worker_online{worker="celery@watched"} 1.0\n' in figures
        assert client.get("/worker/celery@watched").status_code == 200
        queues: list[dict[str, Any]] = client.get("/api/queues/length").json()["active_queues"]
    assert f"Broker: {broker_url.partition(':')[0]}://holdfast:**@" in log_of(flower)
    return queues


def events(kind: str) -> str:
    return f'flower_events_total{{task="wallet.grant",type="task-{kind}",worker="celery@watched"}}'


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthcheck").status_code == 200
    except httpx.TransportError:
        return False


def heartbeat(client: httpx.Client) -> bool:
    """Whether it has heard of the worker, so that it misses nothing from here on."""
    return 'flower_worker_online{worker="celery@watched"} 1.0' in client.get("/metrics").text


def ended(client: httpx.Client) -> list[dict[str, Any]]:
    """The tasks that it shows, when all have ended."""
    tasks = list(client.get("/api/tasks").json().values())
    return tasks if len(tasks) == sum(SENT.values()) and {task["state"] for task in tasks} <= set(SENT) else []
