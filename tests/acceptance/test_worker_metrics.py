"""What a worker tells about itself: figures for Prometheus, and a log of one JSON object a line."""

import json
from contextlib import ExitStack, closing

import httpx

from tests.acceptance.installation import Installation, Producer, celery, log_of
from tests.support import eventually
from worker.embedded import free_port
from worker.process import Process


def test_a_worker_counts_what_it_answered(installation: Installation) -> None:
    port = free_port()
    figures = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)
    with ExitStack() as cleanup, closing(Producer(installation.broker_url)) as producer, figures:
        told_to_serve = installation.environment | {"HOLDFAST_METRICS_ADDRESS": f"127.0.0.1:{port}"}
        worker = Process("worker", celery("worker"), installation.folder, env=told_to_serve)
        cleanup.callback(worker.kill)
        worker.start()
        grant = {"org_id": "acme", "grant_id": "gift", "credits": 5}
        producer.answer("wallet.grant", grant)
        producer.answer("wallet.grant", grant)
        producer.ask("wallet.grant", {**grant, "credits": 6}).get(timeout=20, propagate=False)
        told = eventually(lambda: figures.get("/metrics").text)
    for line in (
        'holdfast_messages_total{outcome="posted",task="wallet.grant"} 1.0',
        'holdfast_messages_total{outcome="duplicate",task="wallet.grant"} 1.0',
        'holdfast_messages_total{outcome="dead_letter",task="wallet.grant"} 1.0',
        "holdfast_batch_messages_count 3.0",
        "holdfast_batch_seconds_count 3.0",
    ):
        assert line in told
    [warning] = [json.loads(line) for line in log_of(worker).splitlines() if line.startswith("{")]
    assert set(warning) == {"time", "level", "logger", "message", "process"}
    assert warning["message"] == (
        "Dead letter 1, conflict: wallet.grant: gift was applied with credits 5, so this message contradicts it"
    )
