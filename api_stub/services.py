"""The services of handlers: the database and the producer."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy import Connection

from api_stub.auth import Authenticator
from api_stub.places import Places
from api_stub.problems import BUSY, ON_PAGE_BUSY, RETRY, Problem
from api_stub.queue_ages import QueueAges
from holdfast_client.async_client import AsyncClient
from holdfast_client.client import Client
from ledger.database import POOL_TIMEOUT_S, connect, snapshot
from ledger.replica import Replica
from ledger.settings import Settings

READ_TIMEOUT_S = 5
"""How long the database may take for one statement of a request."""

log = logging.getLogger("uvicorn.error")  # the server has set up its format and its file


class Services:
    """The app's connections. None is opened before it is used."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError."""
        assert settings.database_url is not None
        assert settings.broker_url is not None
        self.product_name = settings.product_name or "Holdfast"
        self.buy_credits_url = settings.buy_credits_url
        self.authenticator = Authenticator.from_settings(settings)
        # A failed request is not repeated, unlike a worker's batch.
        self.engine = connect(settings.database_url, checks_connections=True, answer_timeout_s=READ_TIMEOUT_S)
        self._turn, self._rests_until = threading.Semaphore(), 0.0
        # For probes: on an open connection, they would hang with the database.
        self.probe = connect(settings.database_url, keeps_connections=False, answer_timeout_s=READ_TIMEOUT_S)
        self.replica: Replica | None = None
        if settings.read_database_url is not None:
            self.replica = Replica(settings.read_database_url, self.probe, answer_timeout_s=READ_TIMEOUT_S, log=log)
        self.client = Client(settings.broker_url, result_url=settings.result_url)
        self.async_client = AsyncClient(settings.broker_url, result_url=settings.result_url)
        self.queues = QueueAges(self.client)
        self.places = Places()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that only reads: one snapshot of the ledger, as it is now.

        For use within a handler, not as a dependency. Dependencies run before the handler, on the same pool of threads.
        Under load, all threads would wait for connections of requests that wait for a thread.
        """
        with snapshot(self.engine) as ledger:
            yield ledger

    @contextmanager
    def taking_turns(self) -> Iterator[None]:
        """Only one at a time, and half of the time nobody. Raises Problem if no turn comes."""
        if not self._turn.acquire(timeout=POOL_TIMEOUT_S):
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, BUSY, RETRY, on_page=ON_PAGE_BUSY)
        try:
            time.sleep(max(0.0, self._rests_until - time.monotonic()))
            began_at = time.monotonic()
            try:
                yield
            finally:
                ended_at = time.monotonic()
                self._rests_until = ended_at + (ended_at - began_at)
        finally:
            self._turn.release()

    def start(self) -> None:
        """Begin to look at the replica for reading, if there is one."""
        if self.replica is not None:
            self.replica.start()

    async def close(self) -> None:
        """Close all connections."""
        await self.async_client.close()
        self.client.close()
        self.engine.dispose()
        if self.replica is not None:
            self.replica.close()


async def services(request: Request) -> Services:
    """The services of the app that received `request`. Async, so it needs no thread."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


Using = Annotated[Services, Depends(services)]
