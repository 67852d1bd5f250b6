"""What a call of the client returns if it did not wait for the answer."""

from typing import TYPE_CHECKING, NoReturn


class NotAskedError(AttributeError):
    """An answer is read that was not asked for; the text says how to ask."""


class Unanswered:
    """The broker has the message, and nobody waits for its answer. Is false; reading it raises NotAskedError."""

    __slots__ = ("task",)

    def __init__(self, task: str) -> None:
        self.task = task

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"<{self.task} was sent; its answer was not waited for>"

    if not TYPE_CHECKING:  # type checkers know that it has no answer

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("__") or name in self.__slots__:  # asked by Python itself, as for a copy
                raise AttributeError(name)
            raise NotAskedError(
                f"{self.task} was sent without waiting for its answer, so there is no {name}: "
                "to wait, name the seconds in the call, as in wait_s=10"
            )
