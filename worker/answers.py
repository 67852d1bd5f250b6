"""Stores the answers that callers wait for in Celery's result backend, as Celery's own workers do.

A sender asks for the answer with `ignore_result=False`. One that says nothing gets only the failure of its message, as
with Celery's `task_store_errors_even_if_ignored`.

Guarantee: no message waits for this. After a failure, no answer is stored for `PAUSE_S`. A caller without an answer
sends its message again, which is safe.
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from celery import Celery
from redis.exceptions import RedisError

from holdfast_client.results import Result
from ledger import traces
from ledger.store import DeadLettered, Delivery
from worker.runs import RunEnded
from worker.tasks import as_value

logger = logging.getLogger(__name__)

PAUSE_S = 10
"""How long no answers are stored after a failure."""

ONLY_FAILURES = "only-failures:"
"""What stands before the task id of a sender that gets only a failure."""

Answer = Result | DeadLettered | RunEnded
"""The result of a message, or of a run of the scheduler."""


class Answers:
    """The answers of one worker. May be used by several threads."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._again_at = 0.0

    def store(self, asked: Sequence[tuple[str | None, Answer]]) -> None:
        """Store each answer for the caller with that task id, if there is one. One round trip."""
        backend = self._app.backend
        wanted = [
            (task_id.removeprefix(ONLY_FAILURES), answer)
            for task_id, answer in asked
            if task_id is not None and (isinstance(answer, DeadLettered) or not task_id.startswith(ONLY_FAILURES))
        ]
        if not wanted or not hasattr(backend, "client") or time.monotonic() < self._again_at:
            return
        try:
            with backend.client.pipeline(transaction=False) as pipe:
                for task_id, answer in wanted:
                    key, stored = backend.get_key_for_task(task_id), _stored(backend, task_id, answer)
                    pipe.set(key, stored, ex=backend.expires)
                    pipe.publish(key, stored)
                pipe.execute()
        except (RedisError, OSError) as error:
            logger.warning("Answers cannot be stored; next try in %d s: %s", PAUSE_S, error)
            self._again_at = time.monotonic() + PAUSE_S

    def server_time(self) -> float | None:
        """The time of the result store, in seconds since 1970, or None if it is not known."""
        with suppress(RedisError, OSError, AttributeError):
            seconds, microseconds = self._app.backend.client.time()
            return int(seconds) + int(microseconds) / 1e6
        return None


def tell_dead_letter(delivery: Delivery, answer: DeadLettered) -> None:
    """Log a dead letter, with the trace of its message."""
    trace = traces.of(delivery.traceparent)
    logger.warning("Dead letter %d, %s: %s", answer.letter_id, answer.code, answer.error, extra=trace)


def value_of(answer: Answer) -> Any:
    """The value for the caller: the result as a JSON object, the number of events of a run, or the exception."""
    return answer.events if isinstance(answer, RunEnded) else as_value(answer)


def _stored(backend: Any, task_id: str, answer: Answer) -> str:
    """An answer as Celery's own workers store it, so that any Celery client can read it."""
    value = value_of(answer)
    if isinstance(value, Exception):
        meta = backend._get_result_meta(backend.prepare_exception(value), "FAILURE", None, None)  # noqa: SLF001
    else:
        meta = backend._get_result_meta(value, "SUCCESS", None, None)  # noqa: SLF001
    return json.dumps({**meta, "task_id": task_id})
