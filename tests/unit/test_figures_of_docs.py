"""Figures in the documents that are constants in the code: after a change, a test names the document to correct."""

import re
from pathlib import Path

import pytest

from api_stub.auth import MIN_RSA_BITS
from api_stub.protocol import REQUEST_TIMEOUT_S
from api_stub.reader import MANY_EVENTS
from api_stub.services import READ_TIMEOUT_S
from api_stub.turns import AT_ONCE
from holdfast_client.messages import DELIVERY_LIMIT, MAX_BODY_BYTES, SUSPECT
from holdfast_client.publishing import TIMEOUT_S
from holdfast_client.redis_server import OLDEST_REDIS
from ledger import archive, migrations
from ledger.clocks import MOST_APART_S
from ledger.daily_sums import NOT_SUMMED
from ledger.database import LONG_PATIENCE_S, TRANSACTION_TIMEOUT_S
from ledger.history import MAX_PAGE
from ledger.isolation import MOST_CULPRITS
from ledger.working_set import MOST_DUE
from worker import background, batching
from worker.app import BEAT_INTERVAL_S
from worker.broker import VISIBILITY_TIMEOUT_S
from worker.local.system import API_OPTIONS
from worker.outage import SILENT_S
from worker.transport import MOST_BYTES, MOST_ENTRY_BYTES, MOST_HELD_BYTES, MOST_TAKEN

ROOT = Path(__file__).parents[2]
WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 10: "ten", 20: "twenty", 30: "thirty", 60: "sixty"}
API_CONNECTIONS = int(API_OPTIONS[API_OPTIONS.index("--limit-concurrency") + 1])


def count(number: int, unit: str) -> set[str]:
    """How a person writes it."""
    return {f"{figure} {unit}" for figure in (str(number), f"{number:,}", WORDS.get(number, str(number)))}


def seconds(length: float) -> set[str]:
    assert length == int(length)
    whole = {
        f"{article} {unit}"
        for unit, s in (("minute", 60), ("hour", 3_600))
        if length == s
        for article in ("a", "an", "one", "every")
    }
    minutes = count(int(length) // 60, "minutes") if length % 60 == 0 else set()
    return whole | minutes | count(int(length), "seconds") | count(int(length), "s")


def size(number_of_bytes: int) -> set[str]:
    kib, rest = divmod(number_of_bytes, 1024)
    assert rest == 0
    return {f"{kib} KiB"} if kib % 1024 else {f"{kib:,} KiB", f"{kib // 1024} MiB"}


FIGURES: list[tuple[str, str, set[str]]] = [
    ("README.md", "MAX_PAGE", {f"at most {MAX_PAGE}"}),
    ("README.md", "OLDEST_REDIS", {"Redis {}.{}".format(*OLDEST_REDIS)}),
    ("docs/architecture.md", "MOST_TAKEN", count(MOST_TAKEN, "messages")),
    ("docs/architecture.md", "VISIBILITY_TIMEOUT_S", seconds(VISIBILITY_TIMEOUT_S)),
    ("docs/architecture.md", "BEAT_INTERVAL_S", seconds(BEAT_INTERVAL_S)),
    ("docs/messages.md", "MAX_BODY_BYTES", size(MAX_BODY_BYTES)),
    ("docs/messages.md", "MOST_ENTRY_BYTES", size(MOST_ENTRY_BYTES)),
    ("docs/messages.md", "DELIVERY_LIMIT", count(DELIVERY_LIMIT, "workers")),
    ("docs/reliability.md", "the prefetch limit", count(2 * batching.MOST_MESSAGES, "messages")),
    ("docs/reliability.md", "MOST_HELD_BYTES", size(MOST_HELD_BYTES)),
    ("docs/reliability.md", "MOST_BYTES", size(MOST_BYTES)),
    ("docs/reliability.md", "MAX_BODY_BYTES", size(MAX_BODY_BYTES)),
    ("docs/reliability.md", "MOST_ENTRY_BYTES", size(MOST_ENTRY_BYTES)),
    ("docs/reliability.md", "SUSPECT", count(SUSPECT, "times")),
    ("docs/reliability.md", "SUSPECT", count(SUSPECT, "workers")),
    ("docs/reliability.md", "DELIVERY_LIMIT", count(DELIVERY_LIMIT, "deliveries")),
    ("docs/reliability.md", "DELIVERY_LIMIT", count(DELIVERY_LIMIT, "times")),
    ("docs/reliability.md", "MOST_CULPRITS", count(MOST_CULPRITS, "organizations")),
    ("docs/reliability.md", "MOST_DUE", count(MOST_DUE, "events")),
    ("docs/reliability.md", "LONG_PATIENCE_S", seconds(LONG_PATIENCE_S)),
    ("docs/reliability.md", "background.TOLD_AFTER_S", seconds(background.TOLD_AFTER_S)),
    ("docs/reliability.md", "VISIBILITY_TIMEOUT_S", seconds(VISIBILITY_TIMEOUT_S)),
    ("docs/reliability.md", "TRANSACTION_TIMEOUT_S", seconds(TRANSACTION_TIMEOUT_S)),
    ("docs/reliability.md", "SILENT_S", seconds(SILENT_S)),
    ("docs/reliability.md", "publishing.TIMEOUT_S", seconds(TIMEOUT_S)),
    ("docs/reliability.md", "batching.LONGEST_DELAY_S", seconds(batching.LONGEST_DELAY_S)),
    ("docs/reliability.md", "clocks.MOST_APART_S", seconds(MOST_APART_S)),
    ("docs/operating.md", "AT_ONCE", count(AT_ONCE, "reads")),
    ("docs/operating.md", "MANY_EVENTS", count(MANY_EVENTS, "events")),
    ("docs/performance.md", "NOT_SUMMED", count(NOT_SUMMED, "events")),
    ("docs/operating.md", "archive.LEAST_AGE_DAYS", count(archive.LEAST_AGE_DAYS, "days")),
    ("docs/operating.md", "archive.GROUPS_OF_A_FILE", count(archive.GROUPS_OF_A_FILE * archive.STEP, "events")),
    ("docs/operating.md", "READ_TIMEOUT_S", seconds(READ_TIMEOUT_S)),
    ("docs/operating.md", "REQUEST_TIMEOUT_S", seconds(REQUEST_TIMEOUT_S)),
    ("docs/operating.md", "MIN_RSA_BITS", count(MIN_RSA_BITS, "bits")),
    ("docs/operating.md", "migrations.PATIENCE_S", seconds(migrations.PATIENCE_S)),
    ("docs/operating.md", "batching.LONGEST_DELAY_S", seconds(batching.LONGEST_DELAY_S)),
    ("docs/operating.md", "LONG_PATIENCE_S", seconds(LONG_PATIENCE_S)),
    ("docs/operating.md", "--limit-concurrency", count(API_CONNECTIONS, "connections")),
]


def has(text: str, written: set[str]) -> bool:
    """Whether one of them stands in `text`, not as a part of a longer word or number."""
    flat = f" {' '.join(text.split())} "
    return any(re.search(rf"(?<![\w,.]){re.escape(figure)}(?!\w)", flat) for figure in written)


@pytest.mark.parametrize(
    ("document", "name", "written"), FIGURES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_document_says_what_the_code_does(document: str, name: str, written: set[str]) -> None:
    assert has((ROOT / document).read_text(), written), f"{document} lacks {name}: one of {sorted(written)}"


def test_a_figure_is_found_whole() -> None:
    assert has("after 60\nseconds", seconds(60))
    assert has("for a minute.", seconds(60))
    assert has("at most 20,000 events", count(20_000, "events"))
    assert not has("after 160 seconds", seconds(60))
    assert not has("1,500 messages", count(500, "messages"))
