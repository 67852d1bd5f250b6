"""What docs/security.md says of RabbitMQ is so on a real one: its commands are run, and an engine can do no more."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import AccessRefused
from kombu.connection import Connection

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.client import Client, NotSentError
from tests.installation import Installation, installed
from tests.support import PATIENCE_S, eventually, sql
from worker.local.embedded import Embedded

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine

DOCUMENT = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
RABBITMQ = DOCUMENT.split("\n## RabbitMQ\n")[1].split("\n## ")[0]


@pytest.fixture
def ledger(services: Embedded, rabbitmq_url: str, rights: Callable[[str], str]) -> Iterator[Installation]:
    """A ledger whose worker is the user `holdfast`, and takes messages."""
    with installed(services) as own:
        own.start_worker_on(rights("holdfast"))
        with Client(rights("holdfast"), result_url=own.broker_url) as billing:
            billing.grant(org_id="acme", grant_id="gift", credits=100, wait_s=PATIENCE_S)
        yield own


def publish(channel: Any, exchange: str, routing_key: str) -> None:
    channel.confirm_select()
    channel.basic_publish_confirm(channel.prepare_message(b"{}"), exchange=exchange, routing_key=routing_key)


FORBIDDEN: dict[str, Callable[[Any], object]] = {
    "any queue, by the default exchange": lambda channel: publish(channel, "", QUEUE),
    "its own, by the default exchange": lambda channel: publish(channel, "", ENGINE_QUEUE),
    "credits": lambda channel: publish(channel, QUEUE, QUEUE),
    "the dead letters": lambda channel: publish(channel, "credits.engine.dead", "credits.engine.dead"),
    "commands": lambda channel: publish(channel, "holdfast.pidbox", ""),
    "events": lambda channel: publish(channel, "celeryev", "worker.x"),
    "read": lambda channel: channel.basic_get(ENGINE_QUEUE),
    "consume": lambda channel: channel.basic_consume(QUEUE),
    "empty": lambda channel: channel.queue_purge(ENGINE_QUEUE),
    "delete": lambda channel: channel.queue_delete(ENGINE_QUEUE),
    "declare": lambda channel: channel.queue_declare("another"),
    "bind": lambda channel: channel.queue_bind(ENGINE_QUEUE, "credits", "credits"),
    "bind the exchange": lambda channel: channel.exchange_bind(QUEUE, ENGINE_QUEUE, ENGINE_QUEUE),
}


def test_an_engine_sends_and_does_nothing_else(ledger: Installation, rights: Callable[[str], str]) -> None:
    with Client(rights("engine"), queue=ENGINE_QUEUE, result_url=ledger.broker_url) as engine:
        assert engine.start(org_id="acme", workflow_id="run", credits=5, wait_s=PATIENCE_S).holds
    [program] = re.findall(r"^```python\n(.*?)^```$", RABBITMQ, re.MULTILINE | re.DOTALL)
    env = {**os.environ, "HOLDFAST_ENGINE_BROKER_URL": rights("engine")}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=PATIENCE_S)
    eventually(lambda: sql(ledger.engine, "SELECT 1 FROM workflows WHERE workflow_id = 'run-3'"))
    with Connection(rights("engine")) as connection:
        for what, act in FORBIDDEN.items():
            with connection.channel() as channel, pytest.raises(AccessRefused):
                pytest.fail(f"an engine may {what}: {act(channel)!r}")
    with Client(rights("engine")) as client, pytest.raises(NotSentError, match="ACCESS_REFUSED"):
        client.grant(org_id="acme", grant_id="forged", credits=10**9)


def test_before_a_worker_has_made_its_exchange_an_engine_is_told(
    rabbitmq_url: str, rights: Callable[[str], str]
) -> None:
    with (
        Client(rights("engine"), queue=ENGINE_QUEUE) as engine,
        pytest.raises(NotSentError, match=r"no exchange 'credits\.engine'"),
    ):
        engine.cancel(org_id="acme", workflow_id="run")
