"""Who sends a request slowly, or not at all, keeps nobody out and is not held for long."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from itertools import cycle

import pytest
from sqlalchemy import Engine

from api_stub import protocol
from ledger.store import apply_batch
from tests.acceptance.website import HISTORY, Patient, app, serving, token
from tests.messages import delivery
from tests.support import PATIENCE_S
from worker.local.embedded import Embedded
from worker.local.system import API_OPTIONS

CREDITS = "/api/organizations/acme/credits"
REPORT = "/api/organizations/acme/workflows/w1/start"
LIMIT = int(API_OPTIONS[API_OPTIONS.index("--limit-concurrency") + 1])


@pytest.fixture
def address(database_url: str, services: Embedded, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    assert protocol.REQUEST_TIMEOUT_S == 10
    monkeypatch.setattr(protocol, "REQUEST_TIMEOUT_S", 2)
    with serving(app(database_url, services.broker_url), limit_concurrency=LIMIT) as address:
        yield address


def authorization(scope: str = "credits:read", sub: str = "ann") -> dict[str, str]:
    return {"Authorization": f"Bearer {token(scope=scope, sub=sub)}"}


def head(method: str, path: str, **headers: str) -> bytes:
    lines = [f"{name}: {value}" for name, value in {"Host": "credits.example", **headers}.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, ""]).encode()


WHOLE = head("GET", CREDITS, **authorization()) + b"\r\n"
WITHOUT_BODY = head("POST", REPORT, **authorization("workflows:write"), **{"Content-Length": "10"}) + b'\r\n{"cre'
HALF_SENT = {
    "nothing": (b"", 0),
    "half a line": (b"GET /api/org", 0),
    "all headers but the last line": (head("GET", CREDITS, **authorization()), 0),
    "headers without the body": (WITHOUT_BODY, 0),
    "headers without the body, refused already": (head("POST", REPORT, **{"Content-Length": "10"}) + b"\r\n", 1),
    "another one, after the first was answered": (WHOLE + b"GET /api/org", 1),
    "another one without its body": (WHOLE + WITHOUT_BODY, 1),
}
"""What is sent, and how many answers there are."""


def connected(address: str, stack: ExitStack) -> socket.socket:
    host, _, port = address.removeprefix("http://").partition(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))


def read_an_answer(connection: socket.socket) -> int:
    """The status of the next answer, which is read as a whole, in however many pieces it comes."""
    with HTTPResponse(connection) as answer:
        answer.begin()
        answer.read()
        return answer.status


def read_to_the_end(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    pieces = []
    try:
        while piece := connection.recv(65_536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def test_300_requests_that_are_half_sent_keep_nobody_out_and_are_given_up(address: str) -> None:
    # Somebody else: what the others have sent whole takes turns of theirs.
    with ExitStack() as stack, Patient(base_url=address, headers=authorization(sub="bob")) as reader:
        slow = [connected(address, stack) for _ in range(300)]
        for connection, (sent, _) in zip(slow, cycle(HALF_SENT.values()), strict=False):
            connection.sendall(sent)
        assert [reader.get(path).status_code for path in (CREDITS, HISTORY, "/readyz")] == [200, 200, 200]
        for connection in slow:
            read_to_the_end(connection)
        assert reader.get(CREDITS).status_code == 200


def test_what_is_half_sent_is_given_up_however_far_it_has_come(address: str) -> None:
    with ExitStack() as stack:
        connections = {name: connected(address, stack) for name in HALF_SENT}
        for name, (sent, _) in HALF_SENT.items():
            connections[name].sendall(sent)
        got = {name: read_to_the_end(connection).count(b"HTTP/1.1 ") for name, connection in connections.items()}
        assert got == {name: answers for name, (_, answers) in HALF_SENT.items()}


def test_who_sends_byte_by_byte_is_given_up(address: str) -> None:
    with ExitStack() as stack:
        connection = connected(address, stack)
        connection.settimeout(0.05)
        for byte in head("GET", CREDITS, Padding="x" * 10_000):
            try:
                connection.sendall(bytes([byte]))
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("all of it was taken, however slowly")


def test_a_download_and_a_connection_that_is_used_again_take_as_long_as_they_want(address: str, engine: Engine) -> None:
    grant = {"org_id": "acme", "credits": 1, "metadata": {"note": "x" * 8_000}}
    apply_batch(engine, [delivery("wallet.grant", **grant, grant_id=f"g{n}") for n in range(2_000)])
    with ExitStack() as stack:
        connection, silent = connected(address, stack), connected(address, stack)
        reader = stack.enter_context(Patient(base_url=address, headers=authorization()))
        with reader.stream("GET", f"{HISTORY}.csv") as download:
            for _ in range(2):
                connection.sendall(WHOLE)
                assert read_an_answer(connection) == 200
                assert read_to_the_end(silent) == b""  # what a request may take is over
                silent = connected(address, stack)
            assert sum(1 for _ in download.iter_lines()) == 2_001


def test_a_request_of_two_lengths_ends_its_connection_and_nothing_behind_it_is_answered(address: str) -> None:
    lengths = {"Content-Length": "4", "Transfer-Encoding": "chunked"}
    with ExitStack() as stack:
        connection = connected(address, stack)
        connection.sendall(head("GET", CREDITS, **authorization(), **lengths) + b"\r\n0\r\n\r\n" + WHOLE)
        answers = read_to_the_end(connection).decode()
    assert answers.startswith("HTTP/1.1 400 ")
    assert answers.count("HTTP/1.1 ") == 1
    assert "The request has a Content-Length and a Transfer-Encoding." in answers
