"""Sends a file of messages, one JSON object a line.

Nothing is recorded about what was sent, as a message that is sent again changes nothing. What is kept in memory does
not grow with the file. Neither does the queue: nothing is sent while many messages wait there.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast_client.broker import QUEUE
from holdfast_client.client import Client, InvalidMessageError
from holdfast_client.messages import InvalidMessage
from ledger.message_lines import numbered_lines, read_line

PIECE_BYTES = 128 * 1024
"""How much of the file is read, and then sent, at once: about a thousand messages."""

MOST_WAITING = 20_000
"""Nothing is sent while more messages wait. Whatever else is sent to the queue meanwhile is applied within seconds."""

MOST_PROBLEMS = 100
"""The most invalid lines whose problems are kept."""

POLL_S = 0.2


@dataclass(slots=True)
class Transfer:
    """A file that is being sent, or only checked."""

    client: Client | None
    """The sender. None: there is no broker, so the messages can only be checked."""
    dry_run: bool
    first_line: int = 1
    """The lines before it are skipped."""
    progress: Callable[[], object] = lambda: None
    """Called after every change of the figures below."""
    next_line: int = field(init=False)
    """All lines before it are done: sent, or invalid. Sending may go on from here."""
    read_bytes: int = 0
    valid: int = 0
    """The messages that the broker has or, in a dry run, would get."""
    invalid: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)
    """The first MOST_PROBLEMS invalid lines: the number of each, and what is wrong with it."""
    waiting: int = 0
    """How many messages wait for a worker, while nothing is sent for that reason."""

    def __post_init__(self) -> None:
        self.next_line = self.first_line

    def run(self, pieces: Iterable[bytes]) -> None:
        """Send all messages of the text in `pieces`. Raises NotSentError and BrokerUnavailableError."""
        gathered: list[tuple[int, bytes]] = []

        def done_before_the_next() -> Iterator[bytes]:
            for piece in pieces:
                yield piece
                self._send(gathered)  # the lines that end in this piece: a pipe may be slow to bring another
                gathered.clear()
                self.read_bytes += len(piece)
                self.progress()

        for number, line in numbered_lines(done_before_the_next()):
            if number >= self.first_line:
                gathered.append((number, line))
        self._send(gathered)  # a last line without an end
        self.progress()

    def _send(self, lines: Sequence[tuple[int, bytes]]) -> None:
        if not lines:
            return
        if self.client is None:
            valid = self._take(lines, lambda _task, _message: None)
        elif self.dry_run:
            valid = self._take(lines, self.client.refuse_invalid)
        else:
            self._wait_for_room(self.client)
            with self.client.batch() as batch:
                valid = self._take(lines, batch.send)
        self.valid += valid
        self.next_line = lines[-1][0] + 1

    def _take(self, lines: Sequence[tuple[int, bytes]], take: Callable[[str, dict[str, Any]], object]) -> int:
        """Hand the message of every valid line to `take`, and keep what is wrong with the others. Returns how many."""
        valid = 0
        for number, line in lines:
            found = read_line(line)
            try:
                if isinstance(found, InvalidMessage):
                    raise InvalidMessageError(found.error)
                take(found.task, found.message)
                valid += 1
            except InvalidMessageError as error:
                self.invalid += 1
                if len(self.problems) < MOST_PROBLEMS:
                    self.problems.append((number, str(error)))
        return valid

    def _wait_for_room(self, client: Client) -> None:
        if client.queue != QUEUE:  # an engine may write to its queue, but not look at it
            return
        while (waiting := client.waiting()[QUEUE].messages) > MOST_WAITING:
            self.waiting = waiting
            self.progress()
            time.sleep(POLL_S)
        self.waiting = 0
