"""The Celery tasks: one for each message, and the two runs of the scheduler. Each is one call into the ledger.

A worker applies messages in batches (`worker.batching`), and does runs in the background (`worker.background`). A task
that is called directly does the same at once.
"""

from collections.abc import Callable
from typing import Any

from celery import Celery
from sqlalchemy import Engine

from holdfast_client.messages import MESSAGES
from holdfast_client.results import Limit, Result
from ledger import bodies, daily_sums, due, scheduler
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.waiting import Waits

SCHEDULER_TASKS = {
    due.POST_DUE: scheduler.post_due,
    due.RELEASE_EXPIRED: scheduler.release_expired,
    daily_sums.SUM_UP: daily_sums.sum_up,
}

TASKS = frozenset([*MESSAGES, *SCHEDULER_TASKS])


class MessageDeadLetteredError(Exception):
    """The message could not be applied. A caller that waits for the result gets this."""


class MessageWaitsError(Exception):
    """A message that was applied directly has to wait. It is kept, and a worker applies it as soon as possible."""


def as_value(answer: Result | DeadLettered) -> dict[str, Any] | MessageDeadLetteredError:
    """The value for a caller that waits: the result as a JSON object, or the exception."""
    if isinstance(answer, DeadLettered):
        return MessageDeadLetteredError(f"{answer.error} (dead letter {answer.letter_id}, {answer.code})")
    return {**answer._asdict(), "event_seqs": list(answer.event_seqs), "limit": _limit_as_value(answer.limit)}


def _limit_as_value(limit: Limit | None) -> dict[str, Any] | None:
    if limit is None:
        return None
    return {**limit._asdict(), "resets_at": None if limit.resets_at is None else limit.resets_at.isoformat()}


def register(app: Celery, engine: Engine) -> None:
    """Register all tasks with `app`. They work on `engine`."""
    for name in MESSAGES:
        app.task(_message_task(name, engine), name=name)
    for name, run in SCHEDULER_TASKS.items():
        app.task(_scheduler_task(run, engine), name=name)


def _message_task(name: str, engine: Engine) -> Callable[..., dict[str, Any]]:
    def apply_message(*args: object, **kwargs: object) -> dict[str, Any]:
        body = bodies.written(args, kwargs)
        [answer] = apply_batch(engine, [Delivery(name, bodies.only_argument(name, args, kwargs), body)])
        if isinstance(answer, Waits):
            raise MessageWaitsError(f"{name} waits, and will be applied by a worker: {answer.reason}")
        value = as_value(answer)
        if isinstance(value, MessageDeadLetteredError):
            raise value
        return value

    return apply_message


def _scheduler_task(run: Callable[[Engine], int], engine: Engine) -> Callable[..., int]:
    def run_scheduler(*_: object) -> int:  # a replayed dead letter passes its wallet
        return run(engine)

    return run_scheduler
