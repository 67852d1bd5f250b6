"""A way to a server on which connections break: when the server has it and the sender is not told, or when a test says.

A connection is broken by a reset, as by a firewall or a host that is gone.
"""

import selectors
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread, Timer
from urllib.parse import urlsplit

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, and no time to send what is left


@dataclass
class Way:
    """The `port` that leads to another one."""

    port: int
    is_closed: bool = False
    """New connections are broken at once."""
    _brokers: list[socket.socket] = field(default_factory=list)
    _goes_on: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self._goes_on.set()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing gets through, on open connections and new ones, as if the server hung. Later, everything does."""
        self._goes_on.clear()
        try:
            yield
        finally:
            self._goes_on.set()

    def reset(self) -> None:
        """Break every connection; new ones can be made."""
        while self._brokers:
            with suppress(OSError):  # it has ended by itself
                self._brokers.pop().shutdown(socket.SHUT_RDWR)

    def to(self, url: str) -> str:
        """The URL that leads to the server of `url` on this way."""
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.port}")).geturl()

    @contextmanager
    def closed_for(self, seconds: float) -> Iterator[None]:
        """Closed from now on, and open again after some time."""
        self.is_closed = True
        self.reset()
        opening = Timer(seconds, lambda: setattr(self, "is_closed", False))
        opening.start()
        yield
        opening.join()


@contextmanager
def cut_way_to(port: int, *, after_bytes: float = float("inf")) -> Iterator[Way]:
    """A way to `port`. Who has sent more than `after_bytes` is cut off instead of answered."""
    with socket.create_server(("127.0.0.1", 0)) as entrance:
        way = Way(entrance.getsockname()[1])
        relay = Thread(target=_accept, args=(entrance, port, after_bytes, way))
        relay.start()
        try:
            yield way
        finally:
            entrance.shutdown(socket.SHUT_RDWR)
            way.reset()
            relay.join()


def _accept(entrance: socket.socket, port: int, after_bytes: float, way: Way) -> None:
    relays: list[Thread] = []
    with suppress(OSError):  # the end of the test
        while True:
            sender, _ = entrance.accept()
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            relays.append(Thread(target=_relay, args=(sender, port, after_bytes, way)))
            relays[-1].start()
    for relay in relays:
        relay.join()


def _relay(sender: socket.socket, port: int, after_bytes: float, way: Way) -> None:
    with (
        suppress(OSError),
        sender,
        socket.create_connection(("127.0.0.1", port)) as broker,
        selectors.DefaultSelector() as ready,
    ):
        if way.is_closed:
            return
        way._brokers.append(broker)
        ready.register(sender, selectors.EVENT_READ)
        ready.register(broker, selectors.EVENT_READ)
        sent = 0
        while True:
            for key, _ in ready.select():
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(65536)
                way._goes_on.wait()
                if not data or (key.fileobj is broker and sent > after_bytes):
                    return
                if key.fileobj is sender:
                    sent += len(data)
                    broker.sendall(data)
                else:
                    sender.sendall(data)
