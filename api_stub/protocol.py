"""uvicorn's HTTP protocol with a time limit: a request must arrive whole within REQUEST_TIMEOUT_S.

`uvicorn --http api_stub.protocol:PromptProtocol` uses it. uvicorn itself limits only the time between two requests. It
keeps an unfinished request, or a connection without any, forever, and no application sees it.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_TIMEOUT_S = 10.0
"""How long a request may take to arrive, its body included. An answer may take any time."""

STOPPING = "stopping"
"""The name of an event in the state of the lifespan. It is set when the server begins to stop."""


class PromptProtocol(H11Protocol):
    """uvicorn's own protocol, which also closes a connection if a request does not arrive completely in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin the time for the first request."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Begin the time of a request with its first byte, and end it with its last one."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Check for a next request, which may have begun before this answer was complete."""
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        """Tell requests that wait that the server stops; as the base class, close the connection if it is idle."""
        if (stopping := self.app_state.get(STOPPING)) is not None:
            stopping.set()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the time."""
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
