"""A trace goes on through Holdfast: real exporters send to a collector, and it sees who is linked to whom."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from holdfast_client.client import Client
from ledger import dead_letters
from tests.acceptance import commands
from tests.acceptance.website import SECRET, app, serving, token
from tests.installation import Installation, celery, exit_code, log_of, terminate
from tests.support import PATIENCE_S, eventually, sql
from worker.local.machine import free_port

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
IN_TRACE = NonRecordingSpan(SpanContext(int(TRACE, 16), 0x00F067AA0BA902B7, is_remote=False, trace_flags=TraceFlags(1)))
"""A current span of an engine that exports none."""
GRANT = "/api/organizations/acme/wallet/grant"
MANY = 300
"""More links than the SDK keeps by default."""

# A workflow engine with OpenTelemetry, in each way to send.
ENGINE = f"""
import asyncio, sys
from opentelemetry import trace
from ledger import traces
from holdfast_client.async_client import AsyncClient
from holdfast_client.client import Client
from worker.local.machine import free_port
traces.export("engine", most_links=1)
async def cancel():
    async with AsyncClient(sys.argv[1]) as client:
        await client.cancel(org_id="acme", workflow_id="run", wait_s={PATIENCE_S})
with trace.get_tracer("engine").start_as_current_span("run"), Client(sys.argv[1]) as client:
    client.start(org_id="acme", workflow_id="run", credits=0, wait_s={PATIENCE_S})
    asyncio.run(cancel())
    with client.batch() as batch:
        for number in range({MANY}):
            batch.grant(org_id="acme", grant_id=f"gift-{{number}}", credits=1)
"""


@dataclass
class Collector:
    """What a collector has got, by service: OTLP over HTTP, as Jaeger, Tempo and every vendor take it."""

    endpoint: str = ""
    spans: list[tuple[str, Span]] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, str]:
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def of(self, service: str, name: str) -> list[Span]:
        return [span for of, span in self.spans.copy() if (of, span.name) == (service, name)]

    def take(self, request: ExportTraceServiceRequest) -> None:
        for each in request.resource_spans:
            [service] = [one.value.string_value for one in each.resource.attributes if one.key == "service.name"]
            self.spans += [(service, span) for scope in each.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collecting = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collecting.take(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collecting.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield collecting
        server.shutdown()
        thread.join()


def attributes(span: Span) -> dict[str, str | int]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


@contextmanager
def in_trace(url: str) -> Iterator[Client]:
    with Client(url) as client, trace.use_span(IN_TRACE):
        yield client


def test_every_message_of_a_batch_is_linked_to_the_span_that_sent_it(
    installation: Installation, collector: Collector
) -> None:
    worker = installation.start("worker", *celery("worker"), **collector.settings)
    engine = installation.start("engine", sys.executable, "-c", ENGINE, installation.broker_url, **collector.settings)
    assert exit_code(engine) == 0, log_of(engine)
    eventually(installation.is_drained)
    eventually(lambda: sum(len(span.links) for span in collector.of("holdfast-worker", "process credits")) == MANY + 2)
    [run] = collector.of("engine", "run")
    sent = collector.of("engine", "send credits")
    assert [attributes(span).get("messaging.batch.message_count") for span in sent] == [None, None, MANY]
    for span in sent:
        assert (span.trace_id, span.parent_span_id, span.kind) == (run.trace_id, run.span_id, Span.SPAN_KIND_PRODUCER)
        assert attributes(span).items() >= {
            ("messaging.system", "redis"),
            ("messaging.operation.type", "send"),
            ("messaging.destination.name", "credits"),
        }
    batches = collector.of("holdfast-worker", "process credits")
    links = [(link.trace_id, link.span_id) for span in batches for link in span.links]
    assert sorted(links) == sorted(
        [(span.trace_id, span.span_id) for span in sent[:2]] + [(run.trace_id, sent[2].span_id)] * MANY
    )
    assert {span.kind for span in batches} == {Span.SPAN_KIND_CONSUMER}
    assert [attributes(span)["messaging.batch.message_count"] for span in batches] == [
        len(span.links) for span in batches
    ]
    applied = collector.of("holdfast-worker", "apply")
    assert {(span.trace_id, span.parent_span_id) for span in applied} == {
        (span.trace_id, span.span_id) for span in batches
    }
    terminate(worker)
    assert exit_code(worker) == 0


def test_a_dead_letter_names_its_trace_wherever_it_is_shown_and_keeps_it_when_replayed(
    installation: Installation, collector: Collector
) -> None:
    worker = installation.start("worker", *celery("worker"), **collector.settings)
    with in_trace(installation.broker_url) as client:
        client.grant(org_id="acme", grant_id="gift", credits=1, wait_s=PATIENCE_S)
        with installation.locked("acme"):
            client.grant(org_id="acme", grant_id="gift", credits=2)
            eventually(lambda: installation.count("waiting_messages"))
        eventually(lambda: installation.count("dead_letters"))
    [span] = eventually(
        lambda: [
            span
            for span in collector.of("holdfast-worker", "process credits")
            if not attributes(span).keys() & {"holdfast.waiting"} and span.links
        ]
    )
    assert [link.trace_id.hex() for link in span.links] == [TRACE]
    told = [json.loads(line) for line in log_of(worker).splitlines() if '"Dead letter 1, ' in line]
    assert [line["trace_id"] for line in told] == [TRACE]
    shown = commands.run("failed", "show", "1", "--json", env=installation.environment)
    assert json.loads(shown.stdout)["trace_id"] == TRACE
    assert TRACE in commands.run("failed", "show", "1", env=installation.environment).stdout
    replayed = commands.run("failed", "replay", "1", env=installation.environment)
    assert "conflict" in replayed.stdout + replayed.stderr
    links = eventually(
        lambda: [
            link
            for span in collector.of("holdfast-worker", "process credits")
            for link in span.links
            if attributes(span).get("holdfast.dead_letters") == 1
        ]
    )
    assert {(link.trace_id.hex(), link.span_id.hex()) for link in links} == {(TRACE, PARENT.split("-")[2])}
    with installation.engine.connect() as connection:
        assert dead_letters.letter(connection, 1).traceparent == PARENT
        assert dead_letters.letter(connection, 1).attempts == 2


def test_a_context_that_is_none_is_ignored(installation: Installation, collector: Collector) -> None:
    installation.start("worker", *celery("worker"), **collector.settings)
    bad = ["", "00-0-0-01", PARENT.upper(), PARENT * 1_000, 7, None, [PARENT], {"traceparent": PARENT}]
    with Client(installation.broker_url) as client:
        messages = [
            client._publisher.encode("wallet.grant", [{"org_id": "acme", "grant_id": f"g-{number}", "credits": 0}], {})
            for number in range(len(bad))
        ]
        for message, value in zip(messages, bad, strict=True):
            message.headers["traceparent"] = value
        client._publisher.publish(messages)
    eventually(
        lambda: sql(installation.engine, "SELECT DISTINCT attempts, traceparent FROM dead_letters") == [(1, None)]
    )
    assert installation.count("dead_letters") == len(bad)
    spans = eventually(lambda: collector.of("holdfast-worker", "process credits"))
    assert [list(span.links) for span in spans] == [[]] * len(spans)


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_request_goes_on_in_its_trace_and_its_span_tells_no_token(
    installation: Installation, collector: Collector
) -> None:
    headers = {"Authorization": f"Bearer {token(scope='wallet:write')}", "traceparent": PARENT}
    port = str(free_port())
    environment = {**installation.environment, **collector.settings, "HOLDFAST_JWT_SECRET": SECRET}
    api = [sys.executable, "-m", "uvicorn", "api_stub.app:app", "--http", "api_stub.protocol:PromptProtocol"]
    installation.start("api", *api, "--port", port, **environment)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as client:
        eventually(lambda: is_up(client))
        assert client.post(GRANT, headers=headers, json={"grant_id": "gift", "credits": 5}).status_code == 202
        secret = token()
        client.get("/signin", params={"token": secret, "next": f"/organizations/acme?token={secret}"})
    [sent] = eventually(lambda: collector.of("holdfast-api", "send credits"))
    eventually(lambda: len([span for _, span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]) == 2)
    servers = [span for _, span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    [request] = [span for span in servers if span.trace_id.hex() == TRACE]
    assert (request.parent_span_id.hex(), sent.parent_span_id) == (PARENT.split("-")[2], request.span_id)
    [message] = installation.broker.lrange("credits", 0, -1)
    assert json.loads(message)["headers"]["traceparent"] == f"00-{TRACE}-{sent.span_id.hex()}-01"
    assert secret.split(".")[1] not in "".join(span.SerializeToString().decode("latin-1") for span in servers)


def test_a_request_goes_on_in_its_trace_without_a_collector(installation: Installation) -> None:
    headers = {"Authorization": f"Bearer {token(scope='wallet:write')}", "traceparent": PARENT}
    with (
        serving(app(installation.database_url, installation.broker_url)) as address,
        httpx.Client(base_url=address, trust_env=False, timeout=PATIENCE_S) as client,
    ):
        assert client.post(GRANT, headers=headers, json={"grant_id": "gift", "credits": 5}).status_code == 202
    [message] = installation.broker.lrange("credits", 0, -1)
    assert json.loads(message)["headers"]["traceparent"] == PARENT


def test_a_worker_whose_collector_is_gone_works_on_and_ends_in_time(installation: Installation) -> None:
    worker = installation.start("worker", *celery("worker"), OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    with in_trace(installation.broker_url) as client:
        assert client.grant(org_id="acme", grant_id="gift", credits=1, wait_s=PATIENCE_S).available == 1
    terminate(worker)
    assert exit_code(worker) == 0
