"""The trace of a request: FastAPI makes its span, if there is a collector, and messages carry its context on.

The trace that a client names in `traceparent` goes on in its messages without a collector, too.
"""

from collections.abc import MutableMapping
from typing import Any

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api_stub.access_log import without_tokens
from ledger import traces

_FOR_MONITORS = ("/healthz", "/readyz", "/metrics")


def _is_left_out(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in _FOR_MONITORS


TELEMETRY: Any = {
    "metrics": False,  # /metrics has what there is to know
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
    "exclude": _is_left_out,
}
"""What FastAPI does by itself: a span for each request that somebody waits for."""


def start() -> None:
    """Make spans from here on, if this process exports them. Raises SettingsError."""
    traces.export("holdfast-api", most_links=128)
    provider = trace.get_tracer_provider()
    if not hasattr(provider, "add_span_processor"):
        return
    from opentelemetry.sdk.trace import Span, SpanProcessor

    class _KeepTokensOut(SpanProcessor):
        def on_start(self, span: Span, *_: object, **__: object) -> None:
            query = (span.attributes or {}).get("url.query")
            if isinstance(query, str):
                span.set_attribute("url.query", without_tokens(f"?{query}")[1:])

    provider.add_span_processor(_KeepTokensOut())


def carry_on(app: ASGIApp) -> ASGIApp:
    """Answer a request in the trace that it names, if there is no span of it."""

    async def carried(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or trace.get_current_span().get_span_context().is_valid:
            await app(scope, receive, send)
            return
        token = context.attach(TraceContextTextMapPropagator().extract(Headers(scope=scope)))
        try:
            await app(scope, receive, send)
        finally:
            context.detach(token)

    return carried
