"""Liveness, readiness, and metrics for Prometheus, read on request.

A worker serves its own metrics (see `worker.metrics`). Nothing here is about a single organization.
"""

import logging
from collections.abc import Iterator
from http import HTTPStatus

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from sqlalchemy.exc import DBAPIError

from api_stub import answers
from api_stub.reader import Reader
from api_stub.services import Services
from holdfast_client.client import BrokerUnavailableError
from ledger import figures, migrations
from ledger.faults import describe

PROBES = 4
"""How many probes are answered at once; others wait."""

log = logging.getLogger("uvicorn.error")  # the server has set up its format and its file


def add(app: FastAPI) -> None:
    """Add /healthz, /readyz and /metrics. They need no token, and run on threads of their own, also on a busy API."""
    using: Services = app.state.services
    registry = CollectorRegistry()
    registry.register(SystemCollector(using))
    threads = CapacityLimiter(PROBES)

    @app.get("/healthz", tags=["system"])
    async def healthz() -> answers.Health:
        """The process answers."""
        return answers.Health(status="ok")

    @app.get("/readyz", tags=["system"], response_model=answers.Readiness)
    async def readyz() -> JSONResponse:
        """Whether requests can be served: the database is there and migrated, and the broker answers. Otherwise 503."""
        checks = await to_thread.run_sync(_checks, using, limiter=threads)
        is_ready = all(check == "ok" for check in checks.values())
        return JSONResponse(checks, HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/metrics", tags=["system"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        text = await to_thread.run_sync(generate_latest, registry, limiter=threads)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _checks(using: Services) -> dict[str, str]:
    return {"database": _check_database(using), "broker": _check_broker(using)}


def _check_database(using: Services) -> str:
    try:
        return migrations.problem(using.probe) or "ok"
    except DBAPIError:
        return "unavailable"


def _check_broker(using: Services) -> str:
    try:
        using.client.waiting()
    except BrokerUnavailableError:
        return "unavailable"
    return "ok"


class SystemCollector(Collector):
    """Reads the database and the broker at every scrape. If one does not answer, it is down, without other metrics."""

    def __init__(self, using: Services) -> None:
        self._using = using

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the metrics of this moment."""
        reader = Reader(self._using, keeps_connections=False)
        try:
            found, is_up = reader.read(figures.system_figures), True
        except DBAPIError as error:
            log.error("The figures for monitoring could not be read: %s", describe(error))
            found, is_up = {}, False
        if reader.is_from_replica:
            is_up = self._primary_answers()
        yield _up("database", is_up)
        yield self._replica()
        if found:
            help_text = "Until when the figures of the ledger have everything, in seconds since 1970."
            yield GaugeMetricFamily("holdfast_figures_timestamp_seconds", help_text, value=reader.as_of.timestamp())
        for name, (help_text, value) in found.items():
            yield GaugeMetricFamily(f"holdfast_{name}", help_text, value=value)
        try:
            waiting = self._using.queues.look()
        except BrokerUnavailableError:
            waiting = {}
        yield _up("broker", bool(waiting))
        messages = GaugeMetricFamily("holdfast_queue_messages", "Messages that wait in the queue.", labels=["queue"])
        ages = GaugeMetricFamily(
            "holdfast_queue_oldest_message_age_seconds",
            "Time since a scrape, or a page of operators, first saw the oldest waiting message, which may be older.",
            labels=["queue"],
        )
        for queue, (number, age_s) in waiting.items():
            messages.add_metric([queue], number)
            ages.add_metric([queue], age_s)
        yield messages
        yield ages

    def _primary_answers(self) -> bool:
        try:
            self._using.probe.connect().close()
        except DBAPIError:
            return False
        return True

    def _replica(self) -> GaugeMetricFamily:
        """Without a sample if there is none."""
        replica = self._using.replica
        help_text = "1 if the replica for reading can be read, else 0."
        return GaugeMetricFamily("holdfast_replica_up", help_text, None if replica is None else replica.is_readable)


def _up(service: str, is_up: bool) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"holdfast_{service}_up", f"1 if the {service} answers, else 0.", value=float(is_up))
