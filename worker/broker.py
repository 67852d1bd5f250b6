"""How Holdfast talks to the broker, the same for who sends and for who consumes."""

from typing import Any

from celery import Celery

QUEUE = "credits"
"""Where messages wait."""

QUEUES = (QUEUE, "celery")
"""Every queue that is worked on: an engine that knows only the tasks' names sends to Celery's own default."""

REDIS_SCHEMES = ("redis://", "rediss://")

VISIBILITY_TIMEOUT_S = 60
"""After this, Redis delivers again what a worker took and never acknowledged."""


def create_celery(name: str, broker_url: str, result_url: str | None) -> Celery:
    """A Celery app that speaks only JSON, with `QUEUE` as its default. Connects to nothing yet."""
    app = Celery(name, broker=broker_url, backend=result_url or "disabled://", set_as_current=False)
    app.conf.update(
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],  # nothing that could run code, such as pickle
        task_default_queue=QUEUE,
        broker_transport_options=_redis_options() if broker_url.startswith(REDIS_SCHEMES) else {},
    )
    return app


def _redis_options() -> dict[str, Any]:
    return {
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        # Look every second, not every hundred, for messages to deliver again.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "priority_steps": [0],  # one list per queue: messages have no priorities
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
    }
