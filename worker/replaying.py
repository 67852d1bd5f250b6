"""Sends dead letters again, for the command line and for the operators' page."""

from functools import partial
from typing import Any

from sqlalchemy import Engine

from holdfast_client.client import Client, DeadLetteredError, InvalidMessageError, NoAnswerError
from holdfast_client.results import Result
from ledger import dead_letters
from ledger.dead_letters import NotReplayableError, StillFailsError


class Replayer:
    """Replays dead letters one by one, and waits for each answer, until one is late: then it waits for no more.

    Each message names its letter, so that one that fails later opens this letter again.
    """

    def __init__(self, engine: Engine, client: Client, *, by: str, wait_s: float) -> None:
        self._engine = engine
        self._client = client
        self._by = by
        self._wait_s = wait_s if client.keeps_answers else None
        self._unanswered = "this broker keeps no answers"

    def replay(self, letter_id: int) -> str:
        """Send the letter's message again. Returns the outcome, in words.

        Raises UnknownLetterError, NotReplayableError, StillFailsError and NotSentError.
        """
        return dead_letters.replay(self._engine, letter_id, by=self._by, send=partial(self.send, letter_id))

    def send(
        self, letter_id: int, task: str, args: list[Any], kwargs: dict[str, Any], traceparent: str | None
    ) -> Result | str:
        """Send the message of a letter. Returns its result or, in words, why the result is not known."""
        try:
            answer = self._client.send_as_is(
                task, args, kwargs, wait_s=self._wait_s, replay_of=letter_id, traceparent=traceparent
            )
        except DeadLetteredError as error:
            raise StillFailsError(str(error)) from error
        except InvalidMessageError as error:
            raise NotReplayableError(f"dead letter {letter_id} is nested too deeply to be sent again") from error
        except NoAnswerError as error:
            self._wait_s, self._unanswered = None, "not waited for, as the answer before it did not come in time"
            return str(error)
        if answer is not None:
            return answer
        return self._unanswered if self._wait_s is None else "it has run"
