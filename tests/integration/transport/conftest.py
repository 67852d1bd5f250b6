"""A database of the broker, and a stock producer that fills it."""

from collections.abc import Iterator

import pytest
import redis
from celery import Celery


@pytest.fixture
def broker(broker_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(broker_url) as client:
        yield client


@pytest.fixture
def producer(broker_url: str) -> Iterator[Celery]:
    """Stock Celery, as in another company."""
    with Celery(broker=broker_url, set_as_current=False) as app:
        yield app
