"""What the Redis transport takes from a queue and is no message, or is too large for one."""

import hashlib
import json

import pytest
import redis
from celery import Celery

from holdfast_client.messages import MAX_BODY_BYTES, too_large_entry
from tests.integration.transport.kombu_worker import (
    QUEUE,
    SECOND,
    Worker,
    changed,
    give_up,
    held,
    lay_down,
    numbers,
    send,
    time_out,
    working,
)
from tests.support import PATIENCE_S, raw
from worker.transport import MOST_ENTRY_BYTES, NO_MESSAGE, UNACKED, UNACKED_INDEX, SetAside

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine


# What is no message


def no_messages(item: bytes) -> dict[str, bytes]:
    properties = json.loads(item)["properties"]
    return {
        "text": b"hello",
        "nothing": b"",
        "bytes": bytes(range(256)),
        "null": b"null",
        "a list": b"[1, 2, 3]",
        "an object": b"{}",
        "no properties": changed(item, properties=None),
        "properties that are a list": changed(item, properties=[]),
        "a body that is an object": changed(item, body={"a": 1}),
        "a body that is not base64": changed(item, body="a"),
        "an unknown encoding": changed(item, properties={**properties, "body_encoding": "rot13"}),
        "headers that are a list": changed(item, headers=[1]),
        "nested too deep": b"[" * 100_000,
        "not utf-8": item.replace(b"workflow", b"work\xfflow"),
        "brackets at the end": b'x, "", "other"]',
    }


def test_what_is_no_message_is_delivered_with_its_bytes(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    items = no_messages(lay_down(producer, broker))
    broker.lpush(QUEUE, *items.values())
    send(producer, 7)
    with working(broker_url) as worker:
        worker.receive(len(items) + 1)
        odd = [message for message in worker.received if isinstance(message, SetAside)]
        assert numbers([message for message in worker.received if message not in odd]) == [7]
        assert [(message.body, message.headers, message.problem) for message in odd] == [
            (item, {}, NO_MESSAGE) for item in items.values()
        ]
        assert held(broker) == len(items) + 1
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_is_no_message_is_restored_as_it_was(broker_url: str, broker: redis.Redis, producer: Celery) -> None:
    items = [item for item in no_messages(lay_down(producer, broker)).values() if not item.startswith(b"{")]
    broker.lpush(QUEUE, *items)
    killed = Worker(broker_url)
    killed.receive(len(items))
    killed.is_killed()
    time_out(broker)
    with working(broker_url) as worker:
        assert [message.body for message in worker.receive(len(items))] == items
    assert broker.lrange(QUEUE, 0, -1) == items[::-1]


def test_what_is_held_in_no_form_of_ours_is_delivered_as_it_is(broker_url: str, broker: redis.Redis) -> None:
    """Somebody else has written to our keys."""
    kept = {
        '[garbage, "", "credits"]': b"garbage",
        '[{"a": 1}, "no exchange", "x"]': b'[{"a": 1}, "no exchange", "x"]',
        "[[], [], []]": b"[[], [], []]",
        "5": b"5",
    }
    broker.hset(UNACKED, mapping={str(number): entry for number, entry in enumerate(kept)})
    broker.zadd(UNACKED_INDEX, {str(number): 1 for number in range(len(kept))})
    broker.zadd(UNACKED_INDEX, {"held by nobody": 1})
    with working(broker_url) as worker:
        worker.receive(len(kept))
        assert {type(message) for message in worker.received} == {SetAside}
        assert sorted(message.body for message in worker.received) == sorted(kept.values())
        worker.acknowledge()
    assert broker.keys() == broker.keys("_kombu.binding*")


def test_two_equal_entries_are_two(broker_url: str, broker: redis.Redis) -> None:
    broker.lpush(QUEUE, "same", "same")
    with working(broker_url) as worker:
        worker.receive(2)
        worker.channel.qos.acknowledge([worker.received.pop().delivery_tag])
        assert held(broker) == 1
        worker.acknowledge()
    assert held(broker) == 0


# What is too large


@pytest.mark.parametrize("size", [MOST_ENTRY_BYTES, 5_000_000])
def test_of_an_entry_that_is_too_large_only_the_first_part_is_taken(
    broker_url: str, broker: redis.Redis, producer: Celery, size: int
) -> None:
    sent = producer.send_task("wallet.grant", args=[f"first {'x' * size}"], queue=QUEUE, ignore_result=True)
    [entry] = map(raw, broker.lrange(QUEUE, 0, -1))
    with working(broker_url) as worker:
        [message] = worker.receive(1)
        assert isinstance(message, SetAside)
        assert message.body.startswith(b'[["first xxx')
        assert 40_000 < len(message.body) <= MAX_BODY_BYTES
        assert message.headers == {"task": "wallet.grant", "id": sent.id, "ignore_result": True}
        digest = hashlib.sha1(entry).hexdigest()
        assert message.problem == too_large_entry(len(entry), MOST_ENTRY_BYTES, digest)
    assert broker.lrange(QUEUE, 0, -1) == [entry]  # given back whole
    with working(broker_url) as worker:
        worker.receive(1)
        worker.acknowledge()
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_is_too_large_is_moved_and_never_written_again(broker_url: str, broker: redis.Redis) -> None:
    """Else the server would be busy with it for seconds, and the worker give up before it has an answer."""

    def written_bytes() -> int:
        return int(broker.info("persistence")["aof_current_size"])

    entries = [b"first", b"x" * 5_000_000, b"second", b"y" * 5_000_000, b"", b"third"]
    broker.lpush(QUEUE, *entries)
    before = written_bytes()
    with working(broker_url) as worker:
        assert [len(message.body) for message in worker.receive(6)] == [5, MAX_BODY_BYTES, 6, MAX_BODY_BYTES, 0, 5]
        assert len(broker.keys(f"{UNACKED}.*")) == 2
    assert broker.lrange(QUEUE, 0, -1) == entries[::-1]  # given back
    give_up(broker_url, broker, 6)
    assert broker.lrange(QUEUE, 0, -1) == entries[::-1]  # timed out
    with working(broker_url) as worker:
        worker.channel.restore([worker.receive(6)[1].delivery_tag], leftmost=True)
    assert broker.lrange(QUEUE, 0, -1) == [entries[1], *reversed(entries[2:]), entries[0]]  # to be taken last
    with working(broker_url) as worker:
        worker.receive(6)
        worker.acknowledge()
    assert written_bytes() - before < 1_000_000
    assert broker.keys("credits*") == []


def test_what_a_wait_is_answered_with_is_read_unless_it_is_too_large_and_only_then_the_wait_has_a_new_connection(
    broker_url: str, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.transport.WAIT_S", 10 * PATIENCE_S)  # so that nothing comes with the end of a wait

    def connections() -> int:
        return int(broker.info("stats")["total_connections_received"])

    with working(broker_url) as worker:
        opened: list[int] = []
        for size in (1, MOST_ENTRY_BYTES, MOST_ENTRY_BYTES, MOST_ENTRY_BYTES + 1, 1, 20_000_000, MOST_ENTRY_BYTES):
            worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
            before = connections()
            broker.lpush(QUEUE, b"x" * size)
            [message] = worker.receive(1)
            assert len(message.body) == (size if size <= MOST_ENTRY_BYTES else MAX_BODY_BYTES)
            worker.acknowledge()
            worker.run(lambda: set(worker.channel._asked_at) == {QUEUE, SECOND})
            opened.append(connections() - before)
    assert opened == [0, 0, 0, 1, 0, 1, 0]
    assert (broker.llen(QUEUE), held(broker)) == (0, 0)


def test_what_is_too_large_and_no_message_is_taken_in_part(broker_url: str, broker: redis.Redis) -> None:
    broker.lpush(QUEUE, b"\xff" * MOST_ENTRY_BYTES + b"!")
    with working(broker_url) as worker:
        [message] = worker.receive(1)
        assert isinstance(message, SetAside)
        assert (message.body, message.headers) == (b"\xff" * MAX_BODY_BYTES, {})
        worker.acknowledge()
    assert held(broker) == 0
