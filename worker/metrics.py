"""A worker's metrics for Prometheus: messages by task and outcome, the size and duration of batches, and faults."""

import collections
from collections.abc import Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from holdfast_client.results import Result
from ledger.settings import SettingsError
from ledger.store import DeadLettered
from ledger.waiting import Waits
from worker.runs import RunEnded
from worker.tasks import TASKS

_messages = Counter("holdfast_messages", "Messages, by task and outcome.", ["task", "outcome"])
_batch_messages = Histogram(
    "holdfast_batch_messages", "Messages of one batch.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
)
_batch_seconds = Histogram("holdfast_batch_seconds", "Time from taking a batch to its commit, outages included.")
suspect_messages = Counter(
    "holdfast_suspect_messages", "Messages taken alone, because they came back from workers that died."
)

_waiting_organizations = Gauge("holdfast_waiting_organizations", "Organizations whose messages wait.")
_waiting_since = Gauge(
    "holdfast_organization_waiting_since_seconds",
    "Since when the messages of an organization wait, in seconds since 1970. Only for the longest waits.",
    ["org_id", "reason"],
)
MOST_NAMED = 20
"""The most organizations that the metrics name."""

broker_is_not_durable = Gauge(
    "holdfast_broker_is_not_durable", "1 while the configuration of the broker allows it to lose messages."
)
waiting_for_database = Gauge("holdfast_waiting_for_database", "1 while the database does not answer this worker.")


def serve(address: str) -> None:
    """Serve the metrics of this process at /metrics on `address`, `host:port`. Raises SettingsError if it cannot."""
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), addr=host)
    except OSError as error:
        raise SettingsError(f"HOLDFAST_METRICS_ADDRESS: cannot listen on {address}: {error.strerror}") from error


def count_batch(messages: int, *, took_s: float) -> None:
    """Count one batch of so many messages. It took `took_s` seconds."""
    _batch_messages.observe(messages)
    _batch_seconds.observe(took_s)


def count_answers(answered: Iterable[tuple[str, Result | DeadLettered | Waits | RunEnded]]) -> None:
    """Count messages by task and outcome, given the task and the answer of each."""
    # A sender must not be able to add labels.
    outcomes = collections.Counter(
        (task if task in TASKS else "unknown", _outcome(answer)) for task, answer in answered
    )
    for (task, outcome), number in outcomes.items():
        _messages.labels(task, outcome).inc(number)


def tell_who_waits(organizations: Sequence[tuple[str, str, float]]) -> None:
    """Show the organizations that wait: id, reason, and start in seconds since 1970. Names the first `MOST_NAMED`."""
    _waiting_organizations.set(len(organizations))
    _waiting_since.clear()
    for org_id, reason, since in organizations[:MOST_NAMED]:
        _waiting_since.labels(org_id, reason).set(since)


def _outcome(answer: Result | DeadLettered | Waits | RunEnded) -> str:
    match answer:
        case Result():
            return "duplicate" if answer.duplicate else answer.outcome
        case DeadLettered():
            return "dead_letter"
        case Waits():
            return "waits"
        case RunEnded():
            return "run"
