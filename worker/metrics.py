"""What a worker counts, for Prometheus: messages by task and outcome, and how large and how slow its batches are."""

import collections
from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from ledger.settings import SettingsError
from ledger.state import Result
from ledger.store import DeadLettered, Delivery
from worker.tasks import TASKS

_messages = Counter("holdfast_messages", "Messages that were answered.", ["task", "outcome"])
_batch_messages = Histogram(
    "holdfast_batch_messages", "Messages of one batch.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
)
_batch_seconds = Histogram("holdfast_batch_seconds", "From taking a batch to its commit, outages included.")

waiting_for_database = Gauge("holdfast_waiting_for_database", "1 while the database does not answer this worker.")


def serve(address: str) -> None:
    """Serve this process's figures at /metrics on `address`, `host:port`. Raises SettingsError if that cannot be."""
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), addr=host)
    except OSError as error:
        raise SettingsError(f"HOLDFAST_METRICS_ADDRESS: cannot listen on {address}: {error.strerror}") from error


def count(deliveries: Sequence[Delivery], answers: Sequence[Result | DeadLettered | int], *, took_s: float) -> None:
    """Count one batch, which took `took_s` seconds."""
    _batch_messages.observe(len(deliveries))
    _batch_seconds.observe(took_s)
    # A label must not grow with what anybody sends.
    outcomes = collections.Counter(
        (delivery.task if delivery.task in TASKS else "unknown", _outcome(answer))
        for delivery, answer in zip(deliveries, answers, strict=True)
    )
    for (task, outcome), number in outcomes.items():
        _messages.labels(task, outcome).inc(number)


def _outcome(answer: Result | DeadLettered | int) -> str:
    if isinstance(answer, int):
        return "run"
    if isinstance(answer, DeadLettered):
        return "dead_letter"
    return "duplicate" if answer.duplicate else answer.outcome
