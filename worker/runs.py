"""A run of the scheduler: the request and its answer."""

from typing import NamedTuple


class Run(NamedTuple):
    """A run that was asked for."""

    task: str
    answer_to: str | None
    """The id under which a caller waits for the answer, or None."""
    traceparent: str | None = None
    """The trace that the request belongs to."""


class RunEnded(NamedTuple):
    """The answer: the number of events that the run wrote."""

    events: int
