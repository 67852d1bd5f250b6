"""A way to a broker on which every connection breaks at the worst moment: the broker has it, the sender is not told."""

import selectors
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread


@contextmanager
def cut_way_to(port: int, *, after_bytes: int) -> Iterator[int]:
    """A port that leads to `port`. Who has sent more than `after_bytes` is cut off instead of answered."""
    with socket.create_server(("127.0.0.1", 0)) as entrance:
        relay = Thread(target=_accept, args=(entrance, port, after_bytes))
        relay.start()
        try:
            yield entrance.getsockname()[1]
        finally:
            entrance.shutdown(socket.SHUT_RDWR)
            relay.join()


def _accept(entrance: socket.socket, port: int, after_bytes: int) -> None:
    relays: list[Thread] = []
    with suppress(OSError):  # the end of the test
        while True:
            sender, _ = entrance.accept()
            relays.append(Thread(target=_relay, args=(sender, port, after_bytes)))
            relays[-1].start()
    for relay in relays:
        relay.join()


def _relay(sender: socket.socket, port: int, after_bytes: int) -> None:
    with (
        suppress(OSError),
        sender,
        socket.create_connection(("127.0.0.1", port)) as broker,
        selectors.DefaultSelector() as ready,
    ):
        ready.register(sender, selectors.EVENT_READ)
        ready.register(broker, selectors.EVENT_READ)
        sent = 0
        while True:
            for key, _ in ready.select():
                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                if not data or (key.fileobj is broker and sent > after_bytes):
                    return
                if key.fileobj is sender:
                    sent += len(data)
                    broker.sendall(data)
                else:
                    sender.sendall(data)
