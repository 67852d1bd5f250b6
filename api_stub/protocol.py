"""How requests arrive: as uvicorn reads them, and whole within REQUEST_TIMEOUT_S.

`uvicorn --http api_stub.protocol:PromptProtocol`. uvicorn itself bounds only the time between two requests: a request
that has begun, or a connection on which nothing ever comes, it keeps for ever, and no application ever sees it.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_TIMEOUT_S = 10.0
"""How long a request may take to arrive, its body of at most 64 KiB included. An answer takes as long as it takes."""


class PromptProtocol(H11Protocol):
    """uvicorn's own protocol, which closes a connection when a request is not there in time, to its last byte."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Nothing has come yet, and soon something must."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """The time of a request begins with its first byte, and ends with its last one."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next request may have begun while the answer to this one was made."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._end()
        super().connection_lost(exc)

    def _watch(self) -> None:
        state = self.conn.their_state
        if state is not h11.SEND_BODY and not (state is h11.IDLE and self.conn.trailing_data[0]):
            self._end()
        elif self._deadline is None:
            self._begin()

    def _begin(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.abort)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
