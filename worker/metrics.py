"""What a worker counts, for Prometheus: messages by task and outcome, and how large and how slow its batches are."""

from collections.abc import Sequence

from prometheus_client import Counter, Histogram, start_http_server

from ledger.messages import MESSAGES
from ledger.state import Result
from ledger.store import DeadLettered, Delivery

_messages = Counter("holdfast_messages", "Messages that were answered.", ["task", "outcome"])
_batch_messages = Histogram(
    "holdfast_batch_messages", "Messages of one batch.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
)
_batch_seconds = Histogram("holdfast_batch_seconds", "From taking a batch to its commit, outages included.")


def serve(port: int) -> None:
    """Serve this process's figures at /metrics, on every interface."""
    start_http_server(port)


def count(deliveries: Sequence[Delivery], answers: Sequence[Result | DeadLettered], *, took_s: float) -> None:
    """Count one batch, which took `took_s` seconds."""
    _batch_messages.observe(len(deliveries))
    _batch_seconds.observe(took_s)
    for delivery, answer in zip(deliveries, answers, strict=True):
        # A label must not grow with what anybody sends.
        task = delivery.task if delivery.task in MESSAGES else "unknown"
        _messages.labels(task, _outcome(answer)).inc()


def _outcome(answer: Result | DeadLettered) -> str:
    if isinstance(answer, DeadLettered):
        return "dead_letter"
    return "duplicate" if answer.duplicate else answer.outcome
