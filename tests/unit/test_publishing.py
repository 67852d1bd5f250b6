"""How messages are encoded and divided before they are handed to a broker."""

from typing import Any

import pytest
from celery import Celery
from celery.app.amqp import AMQP
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st
from kombu.serialization import dumps

from holdfast_client import publishing
from holdfast_client.broker import REPLAY_OF
from holdfast_client.publishing import CHUNK_BYTES, CHUNK_MESSAGES, Encoded, Publisher

NOWHERE = "redis://127.0.0.1:1/0"
CELERY = Celery(set_as_current=False)


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


@given(st.dictionaries(st.text(), JSON) | st.just({"reason": "x" * 1100}), st.booleans())
def test_a_message_is_what_celery_would_send(message: dict[str, Any], is_awaited: bool) -> None:
    """But for the address of replies, where nobody listens, and the text of arguments that are nested or long."""
    ours = Publisher(NOWHERE).encode("wallet.grant", [message], {}, task_id="7" if is_awaited else None)
    task_id = ours.headers["id"]
    celerys = CELERY.amqp.as_task_v2(task_id, "wallet.grant", [message], {}, ignore_result=not is_awaited)
    assert ours.headers == {**celerys.headers, "argsrepr": ours.headers["argsrepr"]}
    assert ours.properties == {**celerys.properties, "delivery_mode": 2, "reply_to": ours.properties["reply_to"]}
    assert (ours.content_type, ours.content_encoding, ours.body) == dumps(celerys.body, serializer="json")


def test_arguments_are_described_as_celery_does() -> None:
    message = {"org_id": "acme", "credits": 1, "metadata": {}}
    assert Publisher(NOWHERE).encode("wallet.grant", [message], {}).headers["argsrepr"] == saferepr([message])
    long = Publisher(NOWHERE).encode("wallet.grant", [{"reason": "x" * 5000}], {}).headers["argsrepr"]
    assert len(long) == AMQP.argsrepr_maxsize


def test_a_replay_names_its_dead_letter() -> None:
    assert Publisher(NOWHERE).encode("wallet.grant", [{}], {}, replay_of=7).headers[REPLAY_OF] == 7
    assert REPLAY_OF not in Publisher(NOWHERE).encode("wallet.grant", [{}], {}).headers
