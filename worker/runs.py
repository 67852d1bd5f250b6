"""A run of the scheduler: what is asked for, and what it has done."""

from typing import NamedTuple


class Run(NamedTuple):
    """A run that somebody has asked for."""

    task: str
    answer_to: str | None
    """The id under which the answer is waited for, if it is."""


class RunEnded(NamedTuple):
    """The answer: how many events the run has written."""

    events: int
