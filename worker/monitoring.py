"""Gives monitors such as Flower what they expect of a Celery worker: events, signals, and the list of active tasks.

Only while events are on (`-E`). Otherwise messages are not `Monitored`: they are only counted, a batch at a time.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Self

from celery import Task, signals, states
from celery.events import EventDispatcher
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from celery.worker.state import all_total_count, task_ready, task_reserved, total_count
from kombu.message import Message


class Dispatcher(EventDispatcher):  # type: ignore[misc] # Celery ships no types
    """Sends an event once. Celery's heartbeat would retry forever, in the event loop, while the broker is away."""

    def _publish(self, *args: Any, retry: bool = False, **kwargs: Any) -> None:  # noqa: ARG002
        super()._publish(*args, retry=False, **kwargs)


class Monitored:
    """One message, from its arrival to its end."""

    def __init__(self, request: Request) -> None:
        self._request = request

    @classmethod
    def received(cls, task: Task, message: Message, consumer: Consumer) -> Self | None:
        """Report a message that has arrived. Returns None if events are off, or if Celery cannot read its headers."""
        events = consumer.event_dispatcher
        if not (events and events.enabled and (not events.groups or "task" in events.groups)):
            return None
        try:
            request = Request(message, app=consumer.app, task=task, hostname=consumer.hostname, eventer=events)
        except Exception:  # noqa: BLE001 - headers may cause any error, and do not concern the ledger
            return None
        if not isinstance(request.name, str):  # the header `shadow`
            return None
        signals.task_received.send(sender=consumer, request=request)
        request.send_event(
            "task-received",
            name=request.name,
            args=request.argsrepr,
            kwargs=request.kwargsrepr,
            root_id=request.root_id,
            parent_id=request.parent_id,
            retries=request.request_dict.get("retries", 0),
            eta=None,
            expires=None,
        )
        task_reserved(request)
        return cls(request)

    def started(self) -> None:
        """Report that the message is being applied; once, however often it is tried."""
        request = self._request
        if request.time_start is None:
            request.on_accepted(os.getpid(), time.monotonic())
            about = {"task_id": request.id, "args": request.args, "kwargs": request.kwargs}
            signals.task_prerun.send(sender=request.task, task=request.task, **about)

    def ended(self, value: Any, *, took_s: float) -> None:
        """Report the result of the message, or the exception."""
        request = self._request
        about = {"task_id": request.id, "args": request.args, "kwargs": request.kwargs}
        if isinstance(value, Exception):
            state = states.FAILURE
            signals.task_failure.send(sender=request.task, exception=value, traceback=None, einfo=None, **about)
            request.send_event("task-failed", exception=repr(value), traceback="")
        else:
            state = states.SUCCESS
            signals.task_success.send(sender=request.task, result=value)
            request.send_event("task-succeeded", result=repr(value), runtime=took_s)
        signals.task_postrun.send(sender=request.task, task=request.task, retval=value, state=state, **about)
        task_ready(request, successful=state == states.SUCCESS)


def count(tasks: Iterable[str]) -> None:
    """Count messages that are not `Monitored`, for `inspect stats` and the heartbeats. `tasks` are all registered."""
    counted = Counter(tasks)
    total_count.update(counted)
    all_total_count[0] += counted.total()
