"""The checker of the nemesis, on ledgers in which harm was done: each harm is found, and without one nothing is."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
import redis
from kombu.connection import Connection
from sqlalchemy import Engine

from holdfast_client.messages import MESSAGES, InvalidMessage
from holdfast_client.results import Result
from ledger import audit
from ledger.database import connect
from ledger.scheduler import release_expired
from ledger.store import Delivery, apply_batch
from ledger.working_set import MOST_DUE
from tests.nemesis import checker, neighbour
from tests.nemesis.checker import ANSWER_KEY, Finding
from tests.nemesis.machine import WAITING, Machine, expire_all
from tests.nemesis.producer import Producer, Sent
from tests.nemesis.run import Goal, Report
from tests.nemesis.workload import FLOOD_ORG_ID, Message, Workload
from tests.support import sql

pytestmark = pytest.mark.soak  # they are about the nemesis itself, which runs at every push

HOUR = timedelta(hours=1)
SEED = 20
"""With this one, the messages are of all kinds."""


class Ledger:
    """A ledger to which a workload was applied, without a worker, and to which harm can be done."""

    def __init__(self, engine: Engine, broker: redis.Redis) -> None:
        self.engine = engine
        self.broker = broker
        now = datetime.now(UTC)
        workload = Workload(SEED, now - 3 * HOUR, flood=20)
        self.messages = workload.opening() + workload.flood()
        for ago in (2 * HOUR, HOUR, -HOUR):  # the last one's idle organization has to wait for its period
            self.messages += workload.chunk(now - ago)
        self.sent: dict[int, Sent] = {}

    def apply(self, messages: Iterable[Message], *, though: Callable[[Message], bool] = lambda _: True) -> None:
        """Send `messages`, of which only those arrive for which `though` holds."""
        messages = list(messages)
        for message in messages:
            sent = self.sent.setdefault(message.number, Sent(message))
            sent.calls += 1
            sent.confirmed += 1
            sent.task_ids.append(str(uuid4()))
        arrived = [message for message in messages if though(message)]
        for message, answer in zip(arrived, apply_batch(self.engine, list(map(delivery, arrived))), strict=True):
            if isinstance(answer, Result):
                self.answer(message.number, answer.outcome, answer.reason, duplicate=answer.duplicate)

    def answer(self, number: int, outcome: str, reason: str | None, *, duplicate: bool) -> None:
        """Answer the first of its calls that has no answer."""
        for task_id in self.sent[number].task_ids:
            result = {"outcome": outcome, "reason": reason, "duplicate": duplicate}
            if self.broker.set(f"{ANSWER_KEY}{task_id}", json.dumps({"status": "SUCCESS", "result": result}), nx=True):
                return

    def findings(self) -> list[Finding]:
        seen = checker.observe(self.engine, self.broker, datetime.now(UTC))
        checker.observe_neighbour(seen, self.broker)
        return checker.check(self.sent.values(), seen)

    def first(self, task: str, *, fate: str = "applied", form: str = "task", org_id: str = "") -> Message:
        return next(
            message
            for message in self.messages
            if (message.task, message.fate, message.form) == (task, fate, form)
            and message.fields.get("org_id", "").startswith(org_id)
            and message.fields.get("workflow_id") != "opening"
        )


def delivery(message: Message) -> Delivery:
    if message.form == "task":
        return Delivery(message.task, message.fields, json.dumps([[message.fields], {}, {}]).encode())
    return Delivery(message.task, InvalidMessage("undecodable_message", "it is none", None), message.text.encode())


@pytest.fixture
def broker(broker_url: str) -> Iterator[redis.Redis]:
    with closing(redis.Redis.from_url(broker_url)) as client:
        neighbour.hold(client, broker_url)
        yield client


@pytest.fixture
def ledger(engine: Engine, broker: redis.Redis) -> Ledger:
    """A ledger and what is sent to it; nothing is applied yet."""
    return Ledger(engine, broker)


@pytest.fixture
def sound(ledger: Ledger) -> Ledger:
    """A ledger to which all was applied."""
    ledger.apply(ledger.messages)
    return ledger


def found(findings: list[Finding], kind: str, message: Message) -> bool:
    return any(finding.kind == kind and message.number in finding.numbers for finding in findings)


def test_the_workload_has_every_message_but_the_one_whose_effect_depends_on_when_it_comes(ledger: Ledger) -> None:
    assert {message.task for message in ledger.messages} >= set(MESSAGES) - {"wallet.unsubscribe"}


# No harm


def test_nothing_is_found_where_all_is_well(sound: Ledger) -> None:
    assert sound.findings() == []


def test_nothing_is_found_when_everything_arrives_again_in_another_order(sound: Ledger) -> None:
    sound.apply(reversed(sound.messages))
    assert sound.findings() == []


def test_nothing_is_found_when_a_flood_of_reservations_has_expired(sound: Ledger) -> None:
    expired = expire_all(sound.engine, FLOOD_ORG_ID)
    assert expired > 20, "those of the beginning, without three that finished; and two of each chunk"
    assert release_expired(sound.engine) == expired
    assert sound.findings() == []
    sound.apply(reversed(sound.messages))
    assert sound.findings() == []


# Lost

KINDS = [
    ("workflow.start", "applied", "task"),
    ("workflow.finish", "applied", "task"),
    ("workflow.cancel", "applied", "task"),
    ("workflow.fail", "applied", "task"),
    ("wallet.purchase", "applied", "task"),
    ("wallet.grant", "applied", "task"),
    ("wallet.refund", "applied", "task"),
    ("wallet.bill", "applied", "task"),
    ("wallet.bill", "either", "task"),
    ("wallet.adjust", "applied", "task"),
    ("wallet.reverse", "applied", "task"),
    ("wallet.subscribe", "applied", "task"),
    ("wallet.configure", "applied", "task"),
    ("wallet.grant", "undecodable_message", "body"),
    ("", "undecodable_message", "entry"),
]


@pytest.mark.parametrize(("task", "fate", "form"), KINDS, ids=lambda value: value or "none")
def test_a_lost_message_is_found(ledger: Ledger, task: str, fate: str, form: str) -> None:
    lost = ledger.first(task, fate=fate, form=form)
    ledger.apply(ledger.messages, though=lambda message: message != lost)
    assert found(ledger.findings(), "lost", lost)


@pytest.mark.parametrize("fate", ["conflict", "invalid_message", "unknown_task"])
def test_a_lost_message_that_should_be_a_dead_letter_is_found(ledger: Ledger, fate: str) -> None:
    lost = next(message for message in ledger.messages if message.fate == fate)
    ledger.apply(ledger.messages, though=lambda message: message != lost)
    assert found(ledger.findings(), "lost", lost)


def test_a_lost_repetition_of_a_dead_letter_is_found(sound: Ledger) -> None:
    lost = sound.first("", fate="undecodable_message", form="entry")
    sound.apply([lost, lost], though=lambda _: False)
    assert found(sound.findings(), "lost", lost)


def test_a_period_that_never_began_is_found(sound: Ledger) -> None:
    plan = sound.first("wallet.subscribe", org_id="idle")
    change_history(sound.engine, f"DELETE FROM credit_events WHERE org_id = '{plan.org_id}'")
    assert found(sound.findings(), "lost", plan)


def test_a_hold_that_should_have_expired_is_found(sound: Ledger) -> None:
    [(org_id, workflow_id)] = sql(
        sound.engine,
        "UPDATE workflows SET expires_at = now() - interval '1 minute' WHERE (org_id, workflow_id) = "
        "(SELECT org_id, workflow_id FROM workflows WHERE state = 'reserved' LIMIT 1) RETURNING org_id, workflow_id",
    )
    start = next(message for message in sound.messages if message.fields.get("workflow_id") == workflow_id)
    assert start.org_id == org_id
    assert found(sound.findings(), "lost", start)


def test_each_reservation_of_a_flood_that_was_not_released_is_found(sound: Ledger) -> None:
    expired = expire_all(sound.engine, FLOOD_ORG_ID)
    assert [finding.kind for finding in sound.findings()] == ["lost"] * expired


def test_a_grant_that_should_have_ended_is_found(sound: Ledger) -> None:
    grant = sound.first("wallet.grant", org_id="ending")
    change_history(
        sound.engine, f"DELETE FROM credit_events WHERE org_id = '{grant.org_id}' AND event_type = 'adjustment'"
    )
    assert found(sound.findings(), "lost", grant)


# Applied twice


@pytest.mark.parametrize(
    ("task", "id_field"),
    [
        ("wallet.grant", "grant_id"),
        ("wallet.purchase", "purchase_id"),
        ("wallet.adjust", "adjustment_id"),
        ("wallet.reverse", "reversal_id"),
        ("workflow.finish", "workflow_id"),
    ],
)
def test_a_message_that_was_applied_twice_is_found(sound: Ledger, task: str, id_field: str) -> None:
    """As if its id had not been known: the ledger is in order, only not what was asked for."""
    twice = sound.first(task)
    again = {**twice.fields, id_field: "again"}
    apply_batch(sound.engine, [Delivery(task, again, b"")])
    assert audit.verify(sound.engine).is_clean
    findings = sound.findings()
    assert found(findings, "applied twice", twice)
    assert "balance" in {finding.kind for finding in findings} or twice.fields["credits"] == 0


def test_a_period_that_began_twice_is_found(sound: Ledger) -> None:
    plan = sound.first("wallet.subscribe", org_id="idle")
    another = {**plan.fields, "subscription_id": "again", "version": plan.fields["version"] + 1}
    apply_batch(sound.engine, [Delivery(plan.task, another, b"")])
    assert audit.verify(sound.engine).is_clean
    assert any(finding.kind == "applied twice" and plan.org_id in finding.what for finding in sound.findings())


def test_a_message_that_was_twice_answered_as_new_is_found(sound: Ledger) -> None:
    start = sound.first("workflow.start", org_id="ample")
    sound.apply([start], though=lambda _: False)
    [(answer,)] = sql(sound.engine, f"SELECT start_answer FROM workflows WHERE workflow_id = '{workflow_of(start)}'")
    sound.answer(start.number, *checker.ANSWERS[answer], duplicate=False)
    assert found(sound.findings(), "applied twice", start)


def test_a_message_that_is_two_dead_letters_is_found(sound: Ledger) -> None:
    letter = sound.first("wallet.robbery", fate="unknown_task")
    sql(
        sound.engine,
        "UPDATE dead_letters SET status = 'discarded', resolved_at = now(), resolved_by = 'x', resolution = 'x' "
        "WHERE error_code = 'unknown_task'",
    )
    sound.apply([letter])
    assert found(sound.findings(), "applied twice", letter)


# Other than what was asked for


def workflow_of(message: Message) -> str:
    return str(message.fields["workflow_id"])


def change_history(engine: Engine, statement: str) -> None:
    """Do what the database refuses."""
    sql(engine, "ALTER TABLE credit_events DISABLE TRIGGER USER")
    sql(engine, statement)
    sql(engine, "ALTER TABLE credit_events ENABLE TRIGGER USER")


@pytest.mark.parametrize("column", ["prepaid_balance", "subscription_balance", "reserved"])
def test_a_changed_balance_is_found(sound: Ledger, column: str) -> None:
    sql(
        sound.engine,
        f"UPDATE wallets SET {column} = {column} + 1, next_hold_expiry = 'infinity' WHERE org_id = 'ample-3'",
    )
    kinds = {finding.kind for finding in sound.findings() if "ample-3" in finding.what}
    assert {"balance", "invariant"} <= kinds


def test_a_changed_amount_is_found_even_if_everything_agrees_with_it(sound: Ledger) -> None:
    grant = Message(1_000_000, "wallet.grant", {"org_id": "ample-3", "grant_id": "last", "credits": 5})
    sound.apply([grant])
    assert sound.findings() == []
    change_history(
        sound.engine,
        "UPDATE credit_events SET credits = 6, prepaid_balance_after = prepaid_balance_after + 1 "
        "WHERE org_id = 'ample-3' AND idempotency_key = 'grant:last'",
    )
    sql(sound.engine, "UPDATE wallets SET prepaid_balance = prepaid_balance + 1 WHERE org_id = 'ample-3'")
    sql(
        sound.engine,
        "UPDATE posted_messages SET terms = jsonb_set(terms, '{credits}', '6') "
        "WHERE org_id = 'ample-3' AND kind = 'grant' AND message_id = 'last'",
    )
    assert audit.verify(sound.engine).is_clean
    findings = sound.findings()
    assert found(findings, "lost", grant)
    assert found(findings, "balance", grant)


@pytest.mark.parametrize("org_id", ["ample-3", FLOOD_ORG_ID])
def test_a_rejection_of_who_has_plenty_is_found(ledger: Ledger, org_id: str) -> None:
    start = Message(1_000_000, "workflow.start", {"org_id": org_id, "workflow_id": "dear", "credits": 2 * 10**9})
    ledger.apply([*ledger.messages, start])
    assert found(ledger.findings(), "balance", start)


def test_a_reservation_that_expired_and_should_have_lasted_is_found(sound: Ledger) -> None:
    [(org_id, workflow_id), *_] = sql(
        sound.engine,
        "SELECT org_id, workflow_id FROM workflows WHERE expires_at > now() + interval '13 hours'"
        " AND state = 'reserved'",
    )
    expire_all(sound.engine, org_id)
    assert release_expired(sound.engine) > 0
    start = next(message for message in sound.messages if message.fields.get("workflow_id") == workflow_id)
    assert found(sound.findings(), "balance", start)


def test_a_reservation_that_expired_before_its_time_is_found(sound: Ledger) -> None:
    expire_all(sound.engine, FLOOD_ORG_ID)
    assert release_expired(sound.engine) > 0
    early = sound.first("workflow.start", org_id=FLOOD_ORG_ID)
    sql(
        sound.engine,
        f"UPDATE workflows SET expires_at = now() + interval '1 hour' WHERE workflow_id = '{workflow_of(early)}'",
    )
    [finding] = sound.findings()
    assert (finding.kind, finding.numbers) == ("balance", (early.number,))


def test_an_older_setting_that_came_to_hold_is_found(sound: Ledger) -> None:
    configure = sound.first("wallet.configure")
    sql(sound.engine, f"UPDATE wallets SET credit_limit = 77 WHERE org_id = '{configure.org_id}'")
    assert [finding.kind for finding in sound.findings()] == ["lost"]


def test_a_message_that_could_be_applied_and_is_a_dead_letter_is_found(sound: Ledger) -> None:
    grant = sound.first("wallet.grant")
    body = delivery(grant).body
    apply_batch(sound.engine, [Delivery("wallet.grant", InvalidMessage("invalid_message", "no", None), body)])
    assert found(sound.findings(), "dead letter", grant)


def test_a_dead_letter_for_another_reason_is_found(sound: Ledger) -> None:
    letter = sound.first("wallet.robbery", fate="unknown_task")
    sql(sound.engine, "UPDATE dead_letters SET error_code = 'unexpected_error' WHERE error_code = 'unknown_task'")
    assert found(sound.findings(), "dead letter", letter)


def test_a_dead_letter_of_nobodys_message_is_found(sound: Ledger) -> None:
    apply_batch(sound.engine, [Delivery("wallet.grant", {}, b"from nobody")])
    [finding] = sound.findings()
    assert finding.kind == "dead letter"
    assert "from nobody" in finding.what


# Another application


def test_a_task_of_another_application_that_is_a_dead_letter_is_found(sound: Ledger) -> None:
    problem = InvalidMessage("unknown_task", "there is no task of that name", None)
    apply_batch(sound.engine, [Delivery(task, problem, b"[[1], {}, {}]") for task in neighbour.TASKS])
    assert [finding.kind for finding in sound.findings()] == ["neighbour", "neighbour"]


@pytest.mark.parametrize("key", ["unacked", "unacked_index"])
def test_what_is_taken_from_the_worker_of_another_application_is_found(sound: Ledger, key: str) -> None:
    if key == "unacked":
        sound.broker.hdel(key, neighbour.HELD[3])
    else:
        sound.broker.zrem(key, neighbour.HELD[3])
    [finding] = sound.findings()
    assert (finding.kind, finding.what) == ("neighbour", f"its worker no longer holds {neighbour.HELD[3]}")


def test_a_worker_that_restores_what_another_application_holds_is_found(sound: Ledger, broker_url: str) -> None:
    with Connection(broker_url, transport_options={"visibility_timeout": 3}) as connection:
        connection.default_channel.qos.restore_visible()
    assert {finding.kind for finding in sound.findings()} == {"neighbour"}


# Answers


def test_an_answer_that_is_not_what_happened_is_found(sound: Ledger) -> None:
    start = sound.first("workflow.start", org_id="ample")
    sound.apply([start], though=lambda _: False)
    sound.answer(start.number, "rejected", "insufficient_credits", duplicate=True)
    assert found(sound.findings(), "answer", start)


def test_a_start_that_was_never_answered_is_found_and_asked_for_again(sound: Ledger) -> None:
    start = sound.first("workflow.start")
    for task_id in sound.sent[start.number].task_ids:
        sound.broker.delete(f"{ANSWER_KEY}{task_id}")
    assert found(sound.findings(), "answer", start)
    assert checker.unanswered(sound.sent.values(), checker.answers(sound.broker)) == [sound.sent[start.number]]


# What a run proves


def test_only_what_was_delivered_again_after_its_commit_counts_as_absorbed(ledger: Ledger) -> None:
    start, repeated = ledger.first("workflow.start"), ledger.first("workflow.finish")
    ledger.apply([start, repeated, repeated])
    seen = checker.observe(ledger.engine, ledger.broker, datetime.now(UTC))
    assert checker.absorbed(ledger.sent.values(), seen) == 0, "the producer itself has sent it twice"
    key = f"{ANSWER_KEY}{ledger.sent[start.number].task_ids[0]}"
    ledger.broker.delete(key)
    [again] = apply_batch(ledger.engine, [delivery(start)])
    assert isinstance(again, Result)
    ledger.answer(start.number, again.outcome, again.reason, duplicate=again.duplicate)
    seen = checker.observe(ledger.engine, ledger.broker, datetime.now(UTC))
    assert checker.absorbed(ledger.sent.values(), seen) == 1


GOAL = Goal(seconds=1, messages=10, kills=2)


def report(**changes: Any) -> Report:
    proof: dict[str, Any] = {"messages": 10, "kills": 2, "has_done_all": True, "kills_at_work": 1, "absorbed": 1}
    proof |= {"neighbour_tasks": 1, "locks_at_work": 1, "largest_flood": MOST_DUE + 1}
    return Report(7, GOAL, Path("/logs"), **{**proof, **changes})


def test_a_run_that_found_nothing_and_did_enough_passes() -> None:
    assert report().verdict == "PASS"


@pytest.mark.parametrize(
    "lacking",
    [
        *({"messages": 9}, {"kills": 1}, {"has_done_all": False}, {"kills_at_work": 0}, {"absorbed": 0}),
        *({"neighbour_tasks": 0}, {"locks_at_work": 0}, {"largest_flood": MOST_DUE}),
    ],
)
def test_a_run_that_did_too_little_is_unknown(lacking: dict[str, int]) -> None:
    assert report(**lacking).verdict == "UNKNOWN"
    assert str(report(**lacking)).startswith("UNKNOWN")


def test_a_run_that_found_something_fails_and_says_all_that_is_known() -> None:
    failed = report(
        findings=[Finding("lost", "a grant is gone", (17,))], absorbed=0, history=["1.00 s  SIGKILL worker-1"]
    )
    assert failed.verdict == "FAIL"
    for part in ("seed 7", "lost: a grant is gone (nemesis-17)", "SIGKILL worker-1", "/logs"):
        assert part in str(failed)


# What is drained


def test_drained_is_only_what_waits_neither_in_the_broker_nor_in_a_database_that_answers(
    ledger: Ledger, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, 7, lambda _: None, patience=1)
    machine.engine, machine.broker = ledger.engine, ledger.broker
    assert machine.is_drained()
    grant = ledger.first("wallet.grant")
    apply_batch(ledger.engine, [delivery(grant)], known_to_wait=[grant.org_id])
    assert machine.waiting()[WAITING] == 1
    assert not machine.is_drained()
    machine.engine = connect(f"postgresql+psycopg:///nothing?host={tmp_path}")
    assert machine.waiting()[WAITING] is None
    assert not machine.is_drained()


# What counts as sent


def test_what_was_confirmed_when_the_broker_may_not_have_kept_it_is_sent_again(broker_url: str) -> None:
    first, second, *_ = Workload(7, datetime.now(UTC)).opening()
    with (
        closing(redis.Redis.from_url(broker_url)) as client,
        closing(Producer(broker_url, Workload(7, datetime.now(UTC)), seed=7, messages_per_s=1)) as producer,
    ):
        producer.send([first])
        knew_all_until = monotonic()
        producer.send([second])
        producer.broker_was_killed(knew_all_until=knew_all_until)
        assert [producer.sent[message.number].confirmed for message in (first, second)] == [1, 0]
        producer.finish()
        assert [producer.sent[message.number].confirmed for message in (first, second)] == [1, 1]
        assert [producer.sent[message.number].calls for message in (first, second)] == [1, 2]
        client.flushdb()
