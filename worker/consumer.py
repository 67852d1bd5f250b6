"""The Celery consumer that keeps what Celery would drop or die of.

Guarantee: a message that reaches this worker and names no task that it knows, or whose body is not a task's, becomes a
dead letter with its raw bytes before it is acknowledged. Everything else takes Celery's own way, without the headers
that would make Celery hold it back, drop it, or die of it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from celery.exceptions import Reject
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.message import Message as Arrived

from ledger.messages import InvalidMessage
from ledger.store import Delivery
from worker.delivery import apply_patiently

_IGNORED_HEADERS = ("eta", "expires", "timelimit", "stamped_headers", "stamps")
"""What would make Celery drop a message, hold it back, or die of it. Lateness means nothing to a ledger."""


class Consumer(CeleryConsumer):  # type: ignore[misc] # Celery ships no types
    """As set by `worker_consumer`. The app's `ledger_engine` is where dead letters go."""

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc]
        """Without what workers tell one another: ours need not know of each other."""

        default_steps: ClassVar[list[str]] = [
            step for step in CeleryConsumer.Blueprint.default_steps if not step.endswith((":Mingle", ":Gossip"))
        ]

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Arrived], None]:
        """Celery's handler for one message, behind our check."""
        celerys_own = super().create_task_handler(*args, **kwargs)

        def handle(message: Arrived) -> None:
            problem = self._problem(message)
            if problem is None:
                for header in _IGNORED_HEADERS:
                    message.headers.pop(header, None)
                celerys_own(message)
            else:
                self._bury(message, problem)

        return handle

    def on_unknown_message(self, _body: object, message: Arrived) -> None:
        """Celery found no task in it."""
        self._bury(message, InvalidMessage("undecodable_message", "the message names no task", None))

    def on_unknown_task(self, _body: object, message: Arrived, exc: Exception) -> None:
        """Celery does not know its task."""
        self._bury(message, InvalidMessage("unknown_task", f"there is no task named {exc}", None))

    def on_invalid_task(self, _body: object, message: Arrived, exc: Exception) -> None:
        """Celery could not read its headers."""
        self._bury(message, InvalidMessage("undecodable_message", f"the message's headers are invalid: {exc}", None))

    def on_decode_error(self, message: Arrived, exc: Exception) -> None:
        """Celery could not decode its body."""
        self._bury(message, InvalidMessage("undecodable_message", f"the body cannot be decoded: {exc}", None))

    def _problem(self, message: Arrived) -> InvalidMessage | None:
        task = _task(message)
        if task is not None and task not in self.strategies:
            return InvalidMessage("unknown_task", f"there is no task named {task[:200]!a}", None)
        if task is not None and not isinstance(message.headers.get("id"), str):
            return InvalidMessage("undecodable_message", "the message's header id must be a string", None)
        try:
            body = message.payload
        except Exception as error:  # noqa: BLE001 - a body decides what is raised, from ValueError to RecursionError
            return InvalidMessage("undecodable_message", f"the body cannot be decoded: {error}", None)
        match body:
            case [list(), dict(), dict() | None]:
                return None
            case {"task": str(), "args": list()} if task is None:
                return None  # the first version of Celery's protocol
            case _:
                expected = "the body must be [args, kwargs, embed], as Celery sends it"
                return InvalidMessage("undecodable_message", expected, None)

    def _bury(self, message: Arrived, problem: InvalidMessage) -> None:
        raw = message.body if isinstance(message.body, bytes) else str(message.body).encode("utf-8", "surrogateescape")
        try:
            apply_patiently(self.app.ledger_engine, [Delivery(_task(message) or "", problem, raw)])
        except Reject:
            message.requeue()
        else:
            message.ack()


def _task(message: Arrived) -> str | None:
    task = message.headers.get("task") if isinstance(message.headers, dict) else None
    return task if isinstance(task, str) else None
