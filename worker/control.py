"""Celery's remote control of a worker: it answers questions, and refuses every other command.

By Celery's default, anybody who reaches the broker can stop a worker, end its consuming, or have it drop messages. Here
only a signal stops a worker, and how it was started decides what it consumes and whether it sends events.
"""

from typing import Any

from celery.worker.control import Panel, inspect_command

QUESTIONS = frozenset(
    {
        *("ping", "report", "stats", "clock", "active_queues", "consuming", "registered", "dump_tasks"),
        *("active", "dump_active", "reserved", "dump_reserved", "scheduled", "dump_schedule", "query_task"),
        *("revoked", "dump_revoked", "conf", "dump_conf"),  # Celery masks the passwords
    }
)
"""The commands that change nothing."""


def answer_questions_only() -> None:
    """Make this process refuse every command of Celery's but QUESTIONS."""
    for name in set(Panel.data) - QUESTIONS:
        Panel.data[name] = _refuse


def _refuse(_state: Any, **_: Any) -> dict[str, str]:
    return {"error": "this worker only answers questions; stop it or change its settings where it runs"}


@inspect_command()  # type: ignore[untyped-decorator]
def consuming(state: Any) -> list[str]:
    """The queues that this worker takes messages from at this moment."""
    consumer = state.consumer.task_consumer
    return [] if consumer is None else [queue.name for queue in consumer.queues if consumer.consuming_from(queue)]
