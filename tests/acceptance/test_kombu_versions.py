"""The client with every kombu that it allows, on both brokers."""

import pytest

from tests.acceptance.lone_engine import TOLD, told
from tests.installation import Installation
from tests.wheels import Environment, Wheels

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]  # seconds, for a slow package index

OLDEST_REDIS_PY = {"5.3.0": "5.0.3", "5.4.0": "5.0.3", "5.5.0": "5.2.1", "5.6.0": "5.2.1", "5.7.0": "6.4.0"}
"""The oldest redis-py that the client allows with each kombu."""


@pytest.mark.parametrize(("kombu", "redis"), OLDEST_REDIS_PY.items())
def test_it_is_answered_on_both_brokers(
    wheels: Wheels, empty: Environment, running: Installation, rabbitmq_url: str, kombu: str, redis: str
) -> None:
    empty.pip("install", wheels.client, f"kombu=={kombu}", f"redis=={redis}", "pydantic==2.12.0", "setuptools<81")
    org_id = f"kombu-{kombu}"
    assert told(empty, org_id, running.broker_url, running.broker_url) == TOLD
    worker = running.start_worker_on(rabbitmq_url, "on-rabbitmq")
    assert told(empty, f"{org_id}-on-rabbitmq", rabbitmq_url, running.broker_url) == TOLD
    worker.stop()
