"""The tasks: the names of the messages and the two runs of the scheduler, each one call into the ledger."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from ledger import scheduler
from ledger.messages import MESSAGES, only_argument
from ledger.store import DeadLettered, Delivery
from worker.delivery import apply_patiently, patiently

SCHEDULER_TASKS = {
    "subscriptions.post_due": scheduler.post_due,
    "reservations.release_expired": scheduler.release_expired,
}


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
        # kombu's JSON knows more types than JSON does; such a value is no message's, and is kept as text.
        body = json.dumps([args, kwargs, {}], default=str).encode()
        [answer] = apply_patiently(engine, [Delivery(name, only_argument(name, args, kwargs), body)])
        if isinstance(answer, DeadLettered):
            raise MessageDeadLetteredError(f"{answer.error} (dead letter {answer.letter_id}, {answer.code})")
        return asdict(answer)

    return apply_message


def _scheduler_task(run: Callable[[Engine], int], engine: Engine) -> Callable[..., int]:
    def run_scheduler(*_: object) -> int:  # a replayed dead letter names the wallet it was about
        return patiently(lambda: run(engine), waits_for=DBAPIError)

    return run_scheduler
