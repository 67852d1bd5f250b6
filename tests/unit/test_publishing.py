"""How messages are encoded and divided before they are handed to a broker."""

from typing import Any

import pytest
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st

from worker import publishing
from worker.publishing import CHUNK_BYTES, CHUNK_MESSAGES, Encoded


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1] * CHUNK_MESSAGES, [CHUNK_MESSAGES]),
        ([1] * (CHUNK_MESSAGES + 1), [CHUNK_MESSAGES, 1]),
        ([CHUNK_BYTES, 1], [1, 1]),
        ([CHUNK_BYTES // 2] * 3, [2, 1]),
        ([1, 2 * CHUNK_BYTES, 1], [1, 1, 1]),
    ],
)
def test_a_round_trip_carries_so_many_messages_and_bytes(sizes: list[int], expected: list[int]) -> None:
    messages = [Encoded("x" * size, "application/json", "utf-8", {}, {}) for size in sizes]
    chunks = list(publishing._chunks(messages))
    assert [len(chunk) for chunk in chunks] == expected
    assert [message for chunk in chunks for message in chunk] == messages


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), st.integers() | st.text() | JSON) | st.just({"reason": "x" * 1100}))
def test_arguments_are_described_as_celery_does_or_left_to_it(message: dict[str, Any]) -> None:
    described = publishing._plain_repr([message])
    assert described in (None, saferepr([message], 1024))


def test_plain_arguments_are_described_without_celery() -> None:
    assert publishing._plain_repr([{"org_id": "acme", "credits": 1}]) == "[{'org_id': 'acme', 'credits': 1}]"
