"""Limits how many requests wait for the answer to a message, so that other requests find a connection.

A request without a place is not refused: it is answered at once, without the answer to its message.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from api_stub.auth import Principal

OF_ALL = 250
"""How many requests wait at the same time: half of the connections that the API takes (`--limit-concurrency`)."""

OF_ONE = 100
"""How many of them have tokens with the same subject and organizations."""


class Places:
    """The places of one process. For use in its event loop only."""

    def __init__(self) -> None:
        self._taken = Counter[object]()

    @contextmanager
    def one_for(self, principal: Principal) -> Iterator[bool]:
        """Take a place as long as the block runs. Yields whether there was one."""
        who = principal.subject, principal.orgs
        is_free = self._taken.total() < OF_ALL and self._taken[who] < OF_ONE
        self._taken[who] += is_free
        try:
            yield is_free
        finally:
            self._taken[who] -= is_free
            if not self._taken[who]:
                del self._taken[who]
