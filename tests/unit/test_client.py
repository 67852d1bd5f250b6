"""The producer without a broker: which message each call makes, and what it refuses before anything is sent.

No port listens at these brokers' address, so whatever is sent nevertheless fails as not sent.
"""

import copy
import inspect
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client, DeadLetteredError, InvalidMessageError, Method, _result
from holdfast_client.messages import MESSAGES
from holdfast_client.publishing import Encoded
from holdfast_client.results import Limit, Result
from holdfast_client.unanswered import NotAskedError
from ledger.store import DeadLettered
from worker.tasks import as_value

NOWHERE = "redis://127.0.0.1:1/0"

Sent = list[tuple[str, dict[str, Any], bool]]


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(NOWHERE) as own:
        yield own


@pytest.fixture
def sent(client: Client, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What the client hands to the broker: task, message, and whether nobody waits for the answer."""
    kept: Sent = []

    def keep(messages: Sequence[Encoded]) -> None:
        for message in messages:
            [[argument], kwargs, _] = json.loads(message.body)
            assert kwargs == {}
            kept.append((message.headers["task"], argument, message.headers["ignore_result"]))

    monkeypatch.setattr(client._publisher, "publish", keep)
    return kept


def test_there_is_a_method_for_every_message_with_its_fields() -> None:
    methods = {name: getattr(Client, name) for name in dir(Client) if isinstance(getattr(Client, name), Method)}
    assert {name: method.task for name, method in methods.items()} == {task.split(".")[1]: task for task in MESSAGES}
    for method in methods.values():
        model = MESSAGES[method.task]
        assert set(inspect.signature(method).parameters) == {*model.model_fields, "wait_s"}
        assert method.__doc__ == model.__doc__


def test_an_answer_that_was_not_asked_for_says_how_to_ask(client: Client, sent: Sent) -> None:
    started = client.start(org_id="acme", workflow_id="run", credits=5)
    assert not started
    for read in ("outcome", "holds", "no_such_field"):
        with pytest.raises(NotAskedError) as asked:
            getattr(started, read)
        assert str(asked.value) == (
            f"workflow.start was sent without waiting for its answer, so there is no {read}: "
            "to wait, name the seconds in the call, as in wait_s=10"
        )
    with client.batch() as batch:
        assert repr(batch.cancel(org_id="acme", workflow_id="run")).startswith("<workflow.cancel was sent; ")
    assert len(sent) == 2
    assert copy.deepcopy(started).task == "workflow.start"


@pytest.mark.parametrize("queue", ["credit", "celery", "credits.dead", ""])
def test_a_queue_that_no_worker_takes_from_is_refused(queue: str) -> None:
    with pytest.raises(ValueError, match=f"the queue must be credits or credits.engine, not '{queue}': no worker"):
        Client(NOWHERE, queue=queue)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://host:8000", "http is for the API or a web page, not for the broker"),
        ("host:6379", "it has no scheme, such as redis://"),
        ("", "it has no scheme, such as redis://"),
    ],
)
def test_a_url_that_is_no_brokers_is_refused_at_once(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^the broker's URL must begin with redis://, .* and name a host; {why}$"):
        Client(url)
    with pytest.raises(ValueError, match=f"^the URL for answers must begin with redis://.* and name a host; {why}$"):
        Client(NOWHERE, result_url=url)


def test_a_methods_fields_are_named(client: Client) -> None:
    with pytest.raises(TypeError, match=r"workflow\.start takes its fields by name"):
        client.start("acme", "run", 5)  # type: ignore[call-overload]


def test_a_message_has_only_what_was_given(client: Client, sent: Sent) -> None:
    client.start(org_id="acme", workflow_id="run", credits=0)
    client.configure(org_id="acme", version=1, period_cap=0)
    client.adjust(org_id="acme", adjustment_id="fix", credits=-1, reason="typo", allow_negative=False)
    assert sent == [
        ("workflow.start", {"org_id": "acme", "workflow_id": "run", "credits": 0}, True),
        ("wallet.configure", {"org_id": "acme", "version": 1, "period_cap": 0}, True),
        (
            "wallet.adjust",
            {"org_id": "acme", "adjustment_id": "fix", "credits": -1, "reason": "typo", "allow_negative": False},
            True,
        ),
    ]


def test_a_moment_is_sent_as_text_with_its_offset(client: Client, sent: Sent) -> None:
    moment = datetime(2026, 1, 31, 9, tzinfo=UTC)
    plan: dict[str, Any] = {"subscription_id": "sub", "version": 1, "plan": "team", "monthly_credits": 10}
    as_text = "2026-01-31T10:00:00+01:00"
    client.subscribe(org_id="acme", anchor=moment, occurred_at=as_text, **plan)  # type: ignore[call-overload]
    times = {"anchor": "2026-01-31T09:00:00+00:00", "occurred_at": "2026-01-31T10:00:00+01:00"}
    assert sent == [("wallet.subscribe", {"org_id": "acme", **plan, **times}, True)]


def test_the_end_of_credits_may_be_given_as_a_moment(client: Client, sent: Sent) -> None:
    moment = datetime(2026, 1, 31, 9, tzinfo=UTC)
    client.grant(org_id="acme", grant_id="g", credits=5, expires_at=moment)
    client.purchase(org_id="acme", purchase_id="p", credits=5, expires_at=moment)
    assert [message["expires_at"] for _, message, _ in sent] == ["2026-01-31T09:00:00+00:00"] * 2


REJECTED = Result("rejected", "period_cap", False, "acme", "run", "rejected", (), 500, shortfall=7)


@pytest.mark.parametrize(
    "limit",
    [
        None,
        Limit("insufficient_credits", 500, 0, 450, None),
        Limit("period_cap", 1000, 900, 50, datetime(2026, 2, 28, 9, tzinfo=UTC)),
    ],
)
def test_an_answer_is_read_as_the_worker_gave_it(limit: Limit | None) -> None:
    result = REJECTED._replace(limit=limit)
    assert _result(json.loads(json.dumps(as_value(result)))) == result


def test_the_answer_of_a_worker_of_another_version_is_read() -> None:
    older = {"outcome": "rejected", "reason": "period_cap", "duplicate": False, "org_id": "acme", "workflow_id": "run"}
    assert _result({**older, "event_seqs": [], "available": 500}) == REJECTED._replace(state=None, shortfall=None)
    limit = {"kind": "period_cap", "limit": 9, "used": 8, "reserved": 1, "resets_at": None, "colour": "red"}
    newer = _result({**older, "event_seqs": [], "available": 500, "limit": limit, "size": 5})
    assert newer.limit == Limit("period_cap", 9, 8, 1, None)


def test_a_dead_letter_is_told_with_its_number_and_its_code() -> None:
    letter = DeadLettered(7, "conflict", "wallet.grant: (dead letter 3, conflict) was applied")
    error = DeadLetteredError(str(as_value(letter)))
    assert (error.letter_id, error.code) == (7, "conflict")
    assert str(error) == "wallet.grant: (dead letter 3, conflict) was applied (dead letter 7, conflict)"
    other = DeadLetteredError("of a worker that says it in another way")
    assert (other.letter_id, other.code) == (None, None)


def test_source_and_metadata_are_sent_along(client: Client, sent: Sent) -> None:
    client.grant(org_id="acme", grant_id="gift", credits=1, source="crm", metadata={"note": "été"})
    [(_, message, _)] = sent
    assert (message["source"], message["metadata"]) == ("crm", {"note": "été"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"credits": -1}, "workflow.start: credits must be greater than or equal to 0, got -1"),
        ({"credits": 7.0}, "workflow.start: credits must be an integer, got 7.0"),
        ({"org_id": "a b"}, "workflow.start: org_id must be 1-128 characters of A-Z a-z 0-9 _ . : -, got 'a b'"),
        ({"expires_in_s": 59}, "workflow.start: expires_in_s must be greater than or equal to 60, got 59"),
        ({"metadata": {"x": float("nan")}}, "workflow.start: metadata must not contain NaN or Infinity"),
        ({"metadata": {"x": {1}}}, "workflow.start: metadata must not contain a set"),
        ({"colour": "red"}, "workflow.start: colour is not a field of this message"),
    ],
)
def test_an_invalid_message_is_refused_in_a_sentence(
    client: Client, sent: Sent, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidMessageError) as refused:
        client.start(**{"org_id": "acme", "workflow_id": "run", "credits": 1, **fields})
    assert str(refused.value).startswith(sentence)
    assert sent == []


@pytest.mark.parametrize("wait_s", ["10", True, -1, float("nan"), float("inf")])
def test_a_wait_that_is_no_number_of_seconds_is_refused_before_anything_is_sent(
    client: Client, sent: Sent, wait_s: Any
) -> None:
    with pytest.raises(InvalidMessageError, match=r"^wait_s must be a number of seconds, such as 10, got .*"):
        client.start(org_id="acme", workflow_id="run", credits=1, wait_s=wait_s)
    assert sent == []


def test_a_url_that_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="the broker's URL must be a text, such as redis://broker:6379/0, got None"):
        Client(None)  # type: ignore[arg-type]


def test_who_cannot_be_answered_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Encoded] = []
    with Client("amqp://127.0.0.1:1//") as client:
        monkeypatch.setattr(client._publisher, "publish", published.extend)
        with pytest.raises(ValueError, match="wait_s needs a result_url: this broker keeps no answers"):
            client.start(org_id="acme", workflow_id="run", credits=1, wait_s=1)
        assert published == []
        client.start(org_id="acme", workflow_id="run", credits=1)
        assert len(published) == 1


def test_what_cannot_be_encoded_is_not_sent(client: Client, sent: Sent) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidMessageError, match=r"^wallet.grant was not sent, as it cannot be encoded"):
        client.send_as_is("wallet.grant", [nested], {})
    assert sent == []


# Batches


def test_a_batch_is_sent_at_its_end_in_the_order_of_its_calls(client: Client, sent: Sent) -> None:
    with client.batch() as batch:
        batch.start(org_id="acme", workflow_id="run", credits=5)
        batch.finish(org_id="acme", workflow_id="run", credits=3, source="crm")
        assert len(batch) == 2
        assert sent == []
    assert sent == [
        ("workflow.start", {"org_id": "acme", "workflow_id": "run", "credits": 5}, True),
        ("workflow.finish", {"org_id": "acme", "workflow_id": "run", "credits": 3, "source": "crm"}, True),
    ]


def test_of_a_batch_that_raises_nothing_is_sent(client: Client, sent: Sent) -> None:
    def send_two() -> None:
        with client.batch() as batch:
            batch.start(org_id="acme", workflow_id="run-1", credits=5)
            batch.start(org_id="acme", workflow_id="run-2", credits=-5)

    with pytest.raises(InvalidMessageError, match=r"^workflow.start: credits must be greater than or equal to 0"):
        send_two()
    assert sent == []


def test_an_invalid_message_that_is_caught_leaves_the_batch_as_it_was(client: Client, sent: Sent) -> None:
    with client.batch() as batch:
        batch.cancel(org_id="acme", workflow_id="run-1")
        with pytest.raises(InvalidMessageError):
            batch.cancel(org_id="a b", workflow_id="run-2")
    assert sent == [("workflow.cancel", {"org_id": "acme", "workflow_id": "run-1"}, True)]


def test_a_batch_waits_for_no_answer_and_takes_nothing_after_its_end(client: Client, sent: Sent) -> None:
    with client.batch() as batch, pytest.raises(ValueError, match="a batch waits for no answers"):
        batch.cancel(org_id="acme", workflow_id="run", wait_s=1)
    with pytest.raises(ValueError, match="this batch has ended"):
        batch.cancel(org_id="acme", workflow_id="run")
    assert sent == []


def test_an_empty_batch_needs_no_broker(client: Client) -> None:
    with client.batch():
        pass


def test_an_engine_sends_messages_about_workflows_alone_and_names_no_source() -> None:
    with Client(NOWHERE, queue=ENGINE_QUEUE) as client, client.batch() as batch:
        for sender in (client, batch):
            with pytest.raises(InvalidMessageError) as refused:
                sender.grant(org_id="acme", grant_id="g", credits=10**9)
            assert str(refused.value) == (
                "wallet.grant is not taken from credits.engine, the queue of engines: "
                "send it to credits, if you have the right"
            )
            with pytest.raises(InvalidMessageError, match=r"workflow\.fail: an engine must not name a source"):
                sender.fail(org_id="acme", workflow_id="run", source="billing")
        with pytest.raises(InvalidMessageError, match="is not taken from"):
            client.send_as_is("subscriptions.post_due", [], {})
        assert len(batch) == 0
