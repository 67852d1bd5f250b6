"""The trace that a message belongs to, as its sender has written it: the `traceparent` of W3C Trace Context.

And where spans are sent, for the programs that make some: the worker and the API.
"""

import atexit
import os
import re
from collections.abc import Callable
from threading import Timer

from ledger.settings import SettingsError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own variables. Spans are exported if one of them is set."""

LAST_S = 2.0
"""How long a process that ends tries to send its last spans."""

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""Version, trace id, span id, flags. An id of zeros, and the version ff, are invalid."""


def valid(traceparent: object) -> str | None:
    """The `traceparent`, or None if it is none, which is ignored."""
    return traceparent if isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent) else None


def trace_id(traceparent: str | None) -> str | None:
    """The trace id in a valid `traceparent`: 32 hexadecimal digits."""
    return None if traceparent is None else traceparent.split("-")[1]


def of(traceparent: str | None) -> dict[str, str]:
    """What a line of the log about a message says of its trace."""
    return {} if traceparent is None else {"trace_id": traceparent.split("-")[1]}


def export(service: str, *, most_links: int) -> None:
    """Send the spans of this process to a collector, if a variable of OpenTelemetry names one.

    OpenTelemetry reads all of its variables (`OTEL_*`) itself. `service` is the name without OTEL_SERVICE_NAME, and
    `most_links` the limit without OTEL_SPAN_LINK_COUNT_LIMIT. Does nothing if the process exports its spans already, as
    with `opentelemetry-instrument`. Raises SettingsError if the extra `otel` is not installed.
    """
    named = [name for name in ENDPOINTS if os.environ.get(name)]
    if not named:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        cure = "install the extra `otel`, in a checkout with: pip install ./client '.[otel]'"
        raise SettingsError(f"{named[0]} is set, and the package {error.name} is missing: {cure}") from None
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    if "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        os.environ.setdefault("OTEL_SERVICE_NAME", service)
    os.environ.setdefault("OTEL_SPAN_LINK_COUNT_LIMIT", str(most_links))
    exporter = OTLPSpanExporter()
    provider = TracerProvider(resource=Resource.create(), span_limits=SpanLimits(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    atexit.register(_end, provider.shutdown, exporter.shutdown)


def _end(provider: Callable[[], object], exporter: Callable[[], object]) -> None:
    """Send the last spans. A collector that is away would be tried again and again."""
    late = Timer(LAST_S, exporter)
    late.daemon = True
    late.start()
    provider()
    late.cancel()
