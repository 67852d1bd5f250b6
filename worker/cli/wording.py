"""The sentences about options and arguments that the library for the command line takes from its validator."""

import difflib
from collections.abc import Collection
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from ledger.readable import beginning, escaped

MAX_SHOWN = 40
"""The most characters of a wrong value that a sentence repeats."""


class Commands(TyperGroup):
    """The group of all commands. Says what is wrong with an option as every other part of Holdfast does."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.BadParameter."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValidationError):
                error.message = _sentence(error.__cause__)
            raise


def _sentence(error: ValidationError) -> str:
    [problem, *_] = error.errors(include_url=False)
    text = str(problem["msg"]).removeprefix("Value error, ")
    if not text.startswith("Input should "):
        return escaped(text)
    rule = (
        text.removeprefix("Input should ").partition(", unable to ")[0].replace("be a valid integer", "be an integer")
    )
    return f"must {rule}, got {escaped(beginning(str(problem['input']), MAX_SHOWN))}"


def did_you_mean(text: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the most similar one that is known, or nothing."""
    similar = difflib.get_close_matches(text, known, n=1)
    return f"; did you mean {similar[0]}?" if similar else ""
