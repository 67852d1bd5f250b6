"""What a worker counts, for Prometheus: messages by task and outcome, and how large and how slow its batches are."""

import collections
from collections.abc import Iterable, Sequence

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from ledger.settings import SettingsError
from ledger.state import Result
from ledger.store import DeadLettered
from ledger.waiting import Waits
from worker.runs import RunEnded
from worker.tasks import TASKS

_messages = Counter("holdfast_messages", "Messages that were answered.", ["task", "outcome"])
_batch_messages = Histogram(
    "holdfast_batch_messages", "Messages of one batch.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
)
_batch_seconds = Histogram("holdfast_batch_seconds", "From taking a batch to its commit, outages included.")
suspect_messages = Counter(
    "holdfast_suspect_messages", "Messages that were taken alone, as they came back from workers that died."
)

_waiting_organizations = Gauge("holdfast_waiting_organizations", "Organizations whose messages wait.")
_waiting_since = Gauge(
    "holdfast_organization_waiting_since_seconds",
    "Since when the messages of an organization wait, in seconds since 1970: of those that wait longest.",
    ["org_id", "reason"],
)
MOST_NAMED = 20
"""How many organizations the figures name."""

broker_is_not_durable = Gauge(
    "holdfast_broker_is_not_durable", "1 while the broker, as it is configured, may lose what it has taken."
)
waiting_for_database = Gauge("holdfast_waiting_for_database", "1 while the database does not answer this worker.")


def serve(address: str) -> None:
    """Serve this process's figures at /metrics on `address`, `host:port`. Raises SettingsError if that cannot be."""
    host, _, port = address.rpartition(":")
    try:
        start_http_server(int(port), addr=host)
    except OSError as error:
        raise SettingsError(f"HOLDFAST_METRICS_ADDRESS: cannot listen on {address}: {error.strerror}") from error


def count_batch(messages: int, *, took_s: float) -> None:
    """Count one batch of so many messages, which took `took_s` seconds."""
    _batch_messages.observe(messages)
    _batch_seconds.observe(took_s)


def count_answers(answered: Iterable[tuple[str, Result | DeadLettered | Waits | RunEnded]]) -> None:
    """Count what became of messages: of each its task, and the answer."""
    # A label must not grow with what anybody sends.
    outcomes = collections.Counter(
        (task if task in TASKS else "unknown", _outcome(answer)) for task, answer in answered
    )
    for (task, outcome), number in outcomes.items():
        _messages.labels(task, outcome).inc(number)


def tell_who_waits(organizations: Sequence[tuple[str, str, float]]) -> None:
    """Show who waits, why, and since when, in seconds since 1970. The first `MOST_NAMED` of them are named."""
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
