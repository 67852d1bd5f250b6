"""The measurements: each method is one of them and yields its figures. `docs/performance.md` explains them.

After each that writes, a check confirms that every message had its effect and that the ledger's invariants hold.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine

from bench import naive, past
from bench.envelopes import are_as_sent, send_task
from bench.latency import latencies_ms
from bench.limits import bare_inserts_s
from bench.stand import EMPTY, Stand, check_ledger
from bench.workload import NotAccountedError, Workload, organization
from holdfast_client.client import Client
from ledger import daily_sums, history, scheduler
from ledger.filters import EventFilter
from ledger.store import apply_batch

MESSAGES = "messages/s"
MILLISECONDS = "ms"
PAGES_READ = 11
"""How often a page is read; its figure is the median."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. `key` begins with the letter of the measurement."""

    key: str
    what: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of the measurements."""

    repetitions: int
    organizations: int
    messages: int
    """For the worker, and for the ledger in batches."""
    slow_messages: int
    """For everything one by one: the naive way, the no-op task, batches of 1, publishing, single commits."""
    batches: tuple[int, ...]
    sent_per_s: int
    sent_for_s: int
    few_events: int
    many_events: int
    offset: int
    subscribers: int


FULL = Sizes(
    repetitions=3,
    organizations=1_000,
    messages=20_000,
    slow_messages=4_000,
    batches=(1, 10, 50, 200, 1_000),
    sent_per_s=100,
    sent_for_s=10,
    few_events=10_000,
    many_events=1_000_000,
    offset=100_000,
    subscribers=100_000,
)
QUICK = Sizes(
    repetitions=2,
    organizations=1_000,
    messages=6_000,
    slow_messages=800,
    batches=(1, 10, 50, 200, 1_000),
    sent_per_s=100,
    sent_for_s=3,
    few_events=10_000,
    many_events=100_000,
    offset=10_000,
    subscribers=5_000,
)


def repetitions(stand: Stand, sizes: Sizes, *, progress: Callable[[str], None]) -> Iterator[list[Figure]]:
    """Measure everything, several times in turn, so that a temporary disturbance affects every row alike.

    Raises NotAccountedError.
    """
    measurements = _Measurements(stand, sizes, progress=progress)
    for number in range(1, sizes.repetitions + 1):
        progress(f"Repetition {number} of {sizes.repetitions}:")
        yield list(measurements.once())


class _Measurements:
    """All measurements on `stand`. Their messages, and the databases they begin with, are made once."""

    def __init__(self, stand: Stand, sizes: Sizes, *, progress: Callable[[str], None]) -> None:
        self._stand = stand
        self._sizes = sizes
        self._progress = progress
        organizations = sizes.organizations
        progress("Making the messages …")
        self._slow = Workload.lifecycle(sizes.slow_messages, organizations=organizations)
        self._spread = Workload.lifecycle(sizes.messages, organizations=organizations)
        self._slow_hot = Workload.lifecycle(sizes.slow_messages, organizations=1)
        self._hot = Workload.lifecycle(sizes.messages, organizations=1)
        self._noops = Workload([("noop", payload) for _, payload in self._slow.messages])
        for load in (self._slow, self._spread, self._hot, self._noops):
            assert len(load.envelopes) == len(load.messages)  # made before any clock runs
        if not are_as_sent(stand.broker, stand.embedded.broker.url, self._spread.messages[0]):
            raise NotAccountedError("the entries for the queue differ from those of Celery's send_task")
        progress("Making the databases …")
        self._naive = stand.template(partial(_make_naive, organizations=organizations), like=EMPTY)
        self._funded = stand.template(partial(past.fill, organizations=organizations, workflows_each=0))
        self._few = stand.template(_past(sizes.few_events, organizations))
        self._many = stand.template(_past(sizes.many_events, organizations))
        self._long = stand.template(_past(sizes.many_events, 1))
        self._due = stand.template(partial(past.fill_due, organizations=sizes.subscribers))

    def once(self) -> Iterator[Figure]:
        """Measure everything once."""
        for measure in (
            *(self.naive_way, self.end_to_end, self.one_organization, self.ledger_alone, self.limits),
            *(self.latency, self.publishing, self.growth, self.history_pages, self.due_subscriptions),
        ):
            self._progress(f"  {measure.__name__.replace('_', ' ')} …")
            yield from measure()

    def naive_way(self) -> Iterator[Figure]:
        """(a) The naive way, which Holdfast is measured against, and (d) a no-op Celery task, on the same worker."""
        with self._stand.database(self._naive) as engine:
            with self._stand.naive(engine):
                took_s = self._stand.drain_s(self._slow.envelopes)
                nothing_took_s = self._stand.drain_s(self._noops.envelopes)
            self._slow.check(engine)
        yield _rate("a", "the naive way, 2 processes", self._slow, took_s)
        yield _rate("d", "a Celery task that does nothing, stock transport, 2 processes", self._noops, nothing_took_s)

    def end_to_end(self) -> Iterator[Figure]:
        """(b) From a full queue to the last commit."""
        for workers, name in ((1, "1 worker"), (2, "2 workers")):
            took_s = self._worked_off_s(self._funded, self._spread, workers=workers)
            what = f"Holdfast end to end, {name}, {self._sizes.organizations:,} organizations"
            yield _rate(f"b-{workers}", what, self._spread, took_s)

    def one_organization(self) -> Iterator[Figure]:
        """(c) As (b), but all messages are for the same wallet."""
        took_s = self._worked_off_s(self._funded, self._hot)
        yield _rate("c", "the same, 1 worker, one hot organization", self._hot, took_s)

    def ledger_alone(self) -> Iterator[Figure]:
        """(e) `apply_batch` in this process: no broker, no Celery."""
        for size in self._sizes.batches:
            spread, hot = (self._slow, self._slow_hot) if size == 1 else (self._spread, self._hot)
            for name, load in (("spread", spread), ("hot", hot)):
                deliveries = load.deliveries
                with self._stand.database(self._funded) as engine:
                    with engine.connect():  # the pool has its connection, as a worker's has
                        pass
                    began_at = time.perf_counter()
                    for first in range(0, len(deliveries), size):
                        apply_batch(engine, deliveries[first : first + size])
                    took_s = time.perf_counter() - began_at
                    _check(engine, load)
                yield _rate(f"e-{name}-{size}", f"the ledger alone, {name}, batches of {size:,}", load, took_s)

    def limits(self) -> Iterator[Figure]:
        """(f) The limit of PostgreSQL."""
        for key, rows, batch in (
            ("f-set", self._sizes.messages, 1_000),
            ("f-row", self._sizes.slow_messages, 1),
        ):
            with self._stand.database(self._funded) as engine:
                took_s = bare_inserts_s(engine, rows=rows, batch=batch)
            yield Figure(key, f"bare rows of events, {batch:,} for an INSERT and a commit", rows / took_s, "rows/s")

    def latency(self) -> Iterator[Figure]:
        """(g) How soon a message is committed at a low load."""
        per_s = self._sizes.sent_per_s
        load = Workload.starts(per_s * self._sizes.sent_for_s, organizations=self._sizes.organizations)
        with self._stand.database(self._funded) as engine:
            with self._stand.holdfast(engine, workers=1), Client(self._stand.embedded.broker.url) as client:
                latencies = latencies_ms(engine, client, load, per_s=per_s)
            _check(engine, load)
        percentiles = statistics.quantiles(latencies, n=100)
        what = f"from send to commit at {per_s} messages/s"
        yield Figure("g-p50", f"{what}, p50", percentiles[49], MILLISECONDS)
        yield Figure("g-p99", f"{what}, p99", percentiles[98], MILLISECONDS)

    def publishing(self) -> Iterator[Figure]:
        """(h) How fast one producer hands messages to the broker."""
        few = Workload.starts(self._sizes.slow_messages, organizations=self._sizes.organizations)
        many = Workload.starts(self._sizes.messages, organizations=self._sizes.organizations)
        for key, what, send, load in (
            ("h-stock", "publishing one by one, Celery's send_task", _send_stock, few),
            ("h-single", "publishing one by one, Client.start", _send_single, few),
            ("h-batch", "publishing in bulk, Client.batch", _send_batch, many),
        ):
            took_s = _took_s(partial(send, self._stand.embedded.broker.url, load))
            if (waiting := self._stand.empty_queue()) != len(load.messages):
                raise NotAccountedError(f"{len(load.messages):,} messages were sent, and {waiting:,} are in the queue")
            yield _rate(key, what, load, took_s)

    def growth(self) -> Iterator[Figure]:
        """(i) As (b), in a ledger that has events already."""
        for key, template, events in (
            ("i-few", self._few, self._sizes.few_events),
            ("i-many", self._many, self._sizes.many_events),
        ):
            each = past.workflows_each(events, organizations=self._sizes.organizations)
            took_s = self._worked_off_s(template, self._spread, used_before=each * past.CREDITS_PER_WORKFLOW)
            what = f"Holdfast end to end, 1 worker, {events:,} events already there"
            yield _rate(key, what, self._spread, took_s)

    def history_pages(self) -> Iterator[Figure]:
        """(j) The time of a customer's page, near and far."""
        filters = (
            ("every", "every event", EventFilter()),
            ("type", "one event type", EventFilter(event_types=("usage",))),
            ("project", "one project", EventFilter(project_id="project-1")),
        )
        with self._stand.opened(self._long) as engine, engine.connect() as connection:
            daily_sums.sum_up(engine)
            for key, name, matching in filters:
                for place, offset in (("newest", 0), ("far", self._sizes.offset)):
                    read = partial(history.events, connection, organization(0), matching, offset=offset)
                    if len(read().events) != history.MAX_PAGE:
                        raise NotAccountedError(f"there is no page of {name} at offset {offset:,}")
                    took_s = statistics.median(_took_s(read) for _ in range(PAGES_READ))
                    what = f"a page of a history of {self._sizes.many_events:,} events, {name}, offset {offset:,}"
                    yield Figure(f"j-{key}-{place}", what, took_s * 1_000, MILLISECONDS)
            check_ledger(engine)

    def due_subscriptions(self) -> Iterator[Figure]:
        """(k) The beat's run when a period begins for every organization."""
        with self._stand.database(self._due) as engine:
            began_at = time.perf_counter()
            written = scheduler.post_due(engine)
            took_s = time.perf_counter() - began_at
            if written != 2 * self._sizes.subscribers:
                raise NotAccountedError(
                    f"{self._sizes.subscribers:,} periods were due, but {written:,} events were written"
                )
            check_ledger(engine)
        what = f"posting the subscriptions of {self._sizes.subscribers:,} organizations, all due"
        yield Figure("k", what, self._sizes.subscribers / took_s, "organizations/s")

    def _worked_off_s(self, template: str, load: Workload, *, workers: int = 1, used_before: int = 0) -> float:
        """The seconds that Holdfast needs for `load`, from when all of it waits."""
        with self._stand.database(template) as engine:
            with self._stand.holdfast(engine, workers=workers):
                took_s = self._stand.drain_s(load.envelopes) + self._stand.waiting_s(engine)
            _check(engine, load, used_before=used_before)
        return took_s


def _make_naive(engine: Engine, *, organizations: int) -> None:
    naive.Base.metadata.create_all(engine)
    past.fill_naive(engine, organizations=organizations)


def _past(events: int, organizations: int) -> Callable[[Engine], None]:
    each = past.workflows_each(events, organizations=organizations)
    return partial(past.fill, organizations=organizations, workflows_each=each)


def _check(engine: Engine, load: Workload, *, used_before: int = 0) -> None:
    load.check(engine, used_before=used_before)
    check_ledger(engine)


def _rate(key: str, what: str, load: Workload, took_s: float) -> Figure:
    count = len(load.messages)
    return Figure(key, f"{what} ({count:,} messages)", count / took_s, MESSAGES)


def _send_stock(broker_url: str, load: Workload) -> None:
    send_task(broker_url, load.messages)


def _send_single(broker_url: str, load: Workload) -> None:
    with Client(broker_url) as client:
        for _, payload in load.messages:
            client.start(**payload)


def _send_batch(broker_url: str, load: Workload) -> None:
    with Client(broker_url) as client, client.batch() as batch:
        for _, payload in load.messages:
            batch.start(**payload)


def _took_s(act: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    act()
    return time.perf_counter() - began_at
