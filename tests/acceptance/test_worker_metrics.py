"""What a worker tells about itself: figures for Prometheus, and a log of one JSON object a line."""

import json
import socket
from contextlib import closing

from ledger.roles import WORKER
from tests.acceptance import commands
from tests.installation import Installation, Producer, celery, log_of
from tests.support import PATIENCE_S, eventually


def test_a_worker_counts_what_it_answered(installation: Installation) -> None:
    with closing(Producer(installation.broker_url)) as producer, installation.serving_figures() as (worker, figures):
        grant = {"org_id": "acme", "grant_id": "gift", "credits": 5}
        producer.answer("wallet.grant", grant)
        producer.answer("wallet.grant", grant)
        producer.ask("wallet.grant", {**grant, "credits": 6}).get(timeout=PATIENCE_S, propagate=False)
        told = eventually(lambda: figures.get("/metrics").text)
    for line in (
        'holdfast_messages_total{outcome="posted",task="wallet.grant"} 1.0',
        'holdfast_messages_total{outcome="duplicate",task="wallet.grant"} 1.0',
        'holdfast_messages_total{outcome="dead_letter",task="wallet.grant"} 1.0',
        "holdfast_batch_messages_count 3.0",
        "holdfast_batch_seconds_count 3.0",
    ):
        assert line in told
    _, warning = [json.loads(line) for line in log_of(worker).splitlines() if line.startswith("{")]
    assert set(warning) == {"time", "level", "logger", "message", "process"}
    assert warning["message"] == (
        "Dead letter 1, conflict: wallet.grant: gift was applied with credits 5, so this message contradicts it"
    )


def test_a_worker_that_cannot_serve_its_figures_says_so_and_does_not_start(installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address, reason in (
            (f"127.0.0.1:{taken.getsockname()[1]}", "Address already in use"),
            ("nohost.invalid:9464", "Name or service not known"),
        ):
            told_to_serve = installation.environment_of(WORKER) | {"HOLDFAST_METRICS_ADDRESS": address}
            ended = commands.run_program(celery("worker"), env=told_to_serve)
            assert ended.returncode == 2
            assert f"holdfast: HOLDFAST_METRICS_ADDRESS: cannot listen on {address}: {reason}\n" in ended.stderr
            assert "Traceback" not in ended.stderr
