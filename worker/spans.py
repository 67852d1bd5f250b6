"""The worker's spans of OpenTelemetry: one for each batch, with a link to the span that sent each of its messages.

A batch has messages of many traces, so its span has none of them as its parent. Without a collector there are no spans,
and a batch costs nothing more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Link, ProxyTracerProvider, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from holdfast_client.broker import QUEUE
from holdfast_client.results import Result
from ledger import traces
from ledger.store import DeadLettered
from ledger.waiting import Waits

_tracer: trace.Tracer | None = None


def start(*, most_messages: int) -> None:
    """Make spans from here on, if this process exports them. A batch has at most `most_messages`.

    Raises SettingsError.
    """
    global _tracer  # noqa: PLW0603 # one for the process, as its exporter
    traces.export("holdfast-worker", most_links=most_messages)
    if not isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        _tracer = trace.get_tracer("holdfast")


class Processing:
    """The span of some messages that are applied together; without a span, nothing."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    @contextmanager
    def applying(self) -> Iterator[None]:
        """A span of what the database does."""
        if self._span is None or _tracer is None:
            yield
            return
        with _tracer.start_as_current_span("apply", attributes={"db.system.name": "postgresql"}):
            yield

    def failed(self, error: Exception) -> None:
        """Record that the messages could not be applied now."""
        if self._span is not None:
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))

    def ended(self, outcomes: Sequence[Result | DeadLettered | Waits]) -> None:
        """Record how many became dead letters, and how many wait for their organization."""
        if self._span is not None:
            self._span.set_attribute("holdfast.dead_letters", sum(isinstance(one, DeadLettered) for one in outcomes))
            self._span.set_attribute("holdfast.waiting", sum(isinstance(one, Waits) for one in outcomes))


_NO_SPAN = Processing()


@contextmanager
def processing(traceparents: Sequence[str | None]) -> Iterator[Processing]:
    """Make the span of messages with these contexts, None for one without."""
    if _tracer is None:
        yield _NO_SPAN
        return
    with trace.use_span(_started(_tracer, traceparents), end_on_exit=True) as span:
        yield Processing(span)


def waited(traceparents: Sequence[str | None], *, began_at: float) -> None:
    """Make the span of messages that waited for their organization. They were applied from this time, in s, to now."""
    if _tracer is not None and traceparents:
        _started(_tracer, traceparents, round(began_at * 1e9)).end()


def _started(tracer: trace.Tracer, traceparents: Sequence[str | None], began_at_ns: int | None = None) -> Span:
    return tracer.start_span(
        f"process {QUEUE}",
        kind=SpanKind.CONSUMER,
        attributes={
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": QUEUE,
            "messaging.batch.message_count": len(traceparents),
        },
        links=[_link(each) for each in traceparents if each is not None],
        start_time=began_at_ns,
    )


def _link(traceparent: str) -> Link:
    _, trace_id, span_id, flags = (int(part, 16) for part in traceparent.split("-"))
    return Link(SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags)))
