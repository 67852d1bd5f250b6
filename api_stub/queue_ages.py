"""How long the oldest message of each queue has waited, as far as this process has seen."""

import time

from holdfast_client.client import Client


class QueueAges:
    """Looks at the queues, and remembers since when their oldest messages are there."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._oldest: dict[str, tuple[bytes | None, float]] = {}
        """The oldest message of each queue at the last look, and when it was first seen there."""

    def look(self) -> dict[str, tuple[int, float]]:
        """For each queue, how many messages wait, and for how many seconds the oldest was seen; 0: none was.

        Raises BrokerUnavailableError.
        """
        waiting = self._client.waiting()
        return {queue: (inside.messages, self._seen_for_s(queue, inside.oldest)) for queue, inside in waiting.items()}

    def _seen_for_s(self, queue: str, oldest: bytes | None) -> float:
        now = time.monotonic()
        if oldest is None or self._oldest.get(queue, (None, 0.0))[0] != oldest:
            self._oldest[queue] = (oldest, now)
        return now - self._oldest[queue][1]
