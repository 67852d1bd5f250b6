"""What a sender tells of its trace: if it has a current span of OpenTelemetry, its messages carry the context on.

Without the package opentelemetry-api, and without a current span, nothing is added, and nothing is done.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TRACEPARENT = "traceparent"
"""The header of a message that says which span has sent it, as W3C Trace Context defines it."""


@contextmanager
def publishing(queue: str, system: str, headers: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Make a span of handing over messages with these headers, and write its context into them.

    A message that has a context already, as a replay has, keeps it.
    """
    if "opentelemetry.trace" not in sys.modules:  # who has a current span has imported it
        yield
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not trace.get_current_span().get_span_context().is_valid:
        yield
        return
    attributes: dict[str, str | int] = {
        "messaging.system": system,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": queue,
    }
    if len(headers) > 1:
        attributes["messaging.batch.message_count"] = len(headers)
    tracer = trace.get_tracer("holdfast")
    with tracer.start_as_current_span(f"send {queue}", kind=trace.SpanKind.PRODUCER, attributes=attributes):
        context: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(context)
        for each in headers:
            if TRACEPARENT not in each:
                each.update(context)
        yield
