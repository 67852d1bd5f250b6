"""What a worker does when it is told to from afar: it answers questions, and nothing else.

Celery would also stop, no longer consume, or forget messages, for whoever reaches its broker. A worker is stopped with
SIGTERM; what it consumes and whether it sends events is settled when it starts.
"""

from typing import Any

from celery.worker.control import Panel, inspect_command

QUESTIONS = frozenset(
    {
        *("ping", "report", "stats", "clock", "active_queues", "consuming", "registered", "dump_tasks"),
        *("active", "dump_active", "reserved", "dump_reserved", "scheduled", "dump_schedule", "query_task"),
    }
)
"""The commands that change nothing."""


def answer_questions_only() -> None:
    """Have this process refuse every other command, whichever Celery has."""
    for name in set(Panel.data) - QUESTIONS:
        Panel.data[name] = _refuse


def _refuse(_state: Any, **_: Any) -> dict[str, str]:
    return {"error": "this worker only answers questions; what it does is settled where it is started"}


@inspect_command()  # type: ignore[untyped-decorator]
def consuming(state: Any) -> list[str]:
    """The queues that this worker takes messages from at this moment."""
    consumer = state.consumer.task_consumer
    return [] if consumer is None else [queue.name for queue in consumer.queues if consumer.consuming_from(queue)]
