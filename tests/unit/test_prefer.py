"""How long a client would like to wait, in all forms of RFC 7240; what cannot be understood is ignored."""

import pytest
from fastapi import Request

from api_stub.prefer import MOST_WAIT_S, preferred_wait_s


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ([], 0),
        (["wait=5"], 5),
        (["WAIT=5"], 5),
        (["wait = 5"], 5),
        (['wait="5"'], 5),
        (["wait=20"], 20),
        (["wait=21"], MOST_WAIT_S),
        (["wait=999999999"], MOST_WAIT_S),
        (["respond-async, wait=5"], 5),
        (["respond-async", "wait=5"], 5),
        (["wait=5, wait=7"], 5),
        (["wait=5", "wait=7"], 5),
        (["wait=soon, wait=7"], 0),
        (["wait=5; for=sure"], 5),
        (['handling=strict; note="a, wait=3", wait=5'], 5),
        (["return=minimal"], 0),
        (["wait"], 0),
        (["wait="], 0),
        (["wait=0"], 0),
        (["wait=-1"], 0),
        (["wait=1.5"], 0),
        (["wait=1e1"], 0),
        (["wait=0x5"], 0),
        (["wait=\u0665"], 0),
        (["wait=9999999999"], MOST_WAIT_S),
        ([f"wait={'9' * 10_000}"], MOST_WAIT_S),
        ([f"wait={'0' * 10_000}7"], 7),
        (["waiting=5"], 0),
        ([""], 0),
        ([",,;=,"], 0),
        (['"'], 0),
    ],
)
def test_how_long_is_waited(headers: list[str], wait_s: int) -> None:
    raw = [(b"prefer", header.encode()) for header in headers]
    assert preferred_wait_s(Request({"type": "http", "headers": raw})) == wait_s
