"""The tasks: the names of DESIGN's messages and the two runs of the scheduler, each one call into the ledger.

Guarantee: a message is applied, or is a dead letter, before its task ends, and only then acknowledged. While the
database does not answer, the task waits; a worker that is told to stop meanwhile gives its message back to the broker.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from celery import Celery
from celery.exceptions import Reject
from celery.worker import state as worker_state
from sqlalchemy import Engine

from ledger import scheduler
from ledger.database import describe, is_transient
from ledger.messages import MESSAGES, only_argument
from ledger.store import DeadLettered, Delivery, apply_batch

logger = logging.getLogger(__name__)

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0

SCHEDULER_TASKS = {
    "subscriptions.post_due": scheduler.post_due,
    "reservations.release_expired": scheduler.release_expired,
}

Answer = TypeVar("Answer")


class MessageDeadLetteredError(Exception):
    """What a caller that waits for the result is told about a message that could not be applied."""


def register(app: Celery, engine: Engine) -> None:
    """Give `app` all tasks, working on `engine`."""
    for name in MESSAGES:
        app.task(_message_task(name, engine), name=name, throws=(MessageDeadLetteredError,))
    for name, run in SCHEDULER_TASKS.items():
        app.task(_scheduler_task(run, engine), name=name)


def _message_task(name: str, engine: Engine) -> Callable[..., dict[str, Any]]:
    def apply_message(*args: object, **kwargs: object) -> dict[str, Any]:
        body = json.dumps([args, kwargs, {}]).encode()
        delivery = Delivery(name, only_argument(name, args, kwargs), body)
        [answer] = _patiently(lambda: apply_batch(engine, [delivery]))
        if isinstance(answer, DeadLettered):
            logger.warning("Dead letter %d, %s: %s", answer.letter_id, answer.code, answer.error)
            raise MessageDeadLetteredError(f"{answer.error} (dead letter {answer.letter_id}, {answer.code})")
        return asdict(answer)

    return apply_message


def _scheduler_task(run: Callable[[Engine], int], engine: Engine) -> Callable[..., int]:
    def run_scheduler(*_: object) -> int:  # a replayed dead letter names the wallet it was about
        return _patiently(lambda: run(engine))

    return run_scheduler


def _patiently(attempt: Callable[[], Answer]) -> Answer:
    """What `attempt` answers, however long the database takes to be well again."""
    delay_s = FIRST_DELAY_S
    failed_at: float | None = None
    while True:
        try:
            answer = attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            if failed_at is None:
                failed_at = time.monotonic()
                logger.warning("The database does not answer, the message waits: %s", describe(error))
            if _is_stopping():
                # Unacknowledged, it would wait for the visibility timeout; given back, the next worker takes it.
                raise Reject("the worker stops", requeue=True) from error
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        else:
            if failed_at is not None:
                logger.warning("The database answers again after %.1f s", time.monotonic() - failed_at)
            return answer


def _is_stopping() -> bool:
    return worker_state.should_stop not in (None, False) or worker_state.should_terminate not in (None, False)
