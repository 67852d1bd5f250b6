"""What cannot be applied now waits alone: its organization's later messages behind it, and nobody else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text

from holdfast_client.messages import DELIVERY_LIMIT, InvalidMessage
from holdfast_client.results import Result
from ledger import audit, due, rules, scheduler, waiting, working_set
from ledger.database import LONG_PATIENCE_S, connect
from ledger.faults import is_transient
from ledger.store import Applied, Delivery, apply_batch, apply_waiting
from ledger.waiting import BEHIND, BLOCKED, LOCKED, MUCH_DUE, RECORD_LOCKED, SLOW, Waits
from ledger.working_set import PATIENCE_S
from tests.messages import delivery, purchase, start
from tests.support import begin_schedules, moved, no_more_acting, of_one_shard, on_insert_into, sql

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine


@pytest.fixture
def other(database_url: str) -> Iterator[Engine]:
    """Somebody else on the same database."""
    own = connect(database_url)
    yield own
    own.dispose()


@contextmanager
def holding(other: Engine, *statements: str) -> Iterator[None]:
    """Somebody has executed `statements` in a transaction that is still open."""
    with other.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
        yield
        connection.rollback()


def locked(other: Engine, org_id: str) -> Any:
    return holding(other, f"SELECT 1 FROM wallets WHERE org_id = '{org_id}' FOR UPDATE")


def outcomes(answers: Sequence[Any]) -> list[str]:
    return [answer.outcome if isinstance(answer, Result) else type(answer).__name__ for answer in answers]


def apply_all_waiting(engine: Engine, org_id: str, *, limit: int = 500) -> list[Any]:
    """Apply what waits for `org_id` to its end; returns the answers."""
    answers: list[Any] = []
    for _ in range(100):
        applied = apply_waiting(engine, org_id, limit=limit)
        answers += [answer for _, answer in applied.answers]
        if not applied.answers and applied.problem is None:
            return answers
    raise AssertionError(f"{org_id} waits on: {applied.problem}")


def purchases_in_order(engine: Engine, org_id: str) -> list[str]:
    events = "SELECT metadata ->> 'purchase_id' FROM credit_events WHERE org_id = :org_id ORDER BY seq"
    return [purchase_id for (purchase_id,) in sql(engine, events, org_id=org_id)]


def is_sound(engine: Engine) -> bool:
    assert sql(engine, "SELECT count(*) FROM waiting_messages") == [(0,)]
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(0,)]
    return audit.verify(engine).is_clean


@pytest.mark.parametrize("limit", [1, 7, 500])
def test_later_messages_of_an_organization_wait_behind_and_all_are_applied_in_order(
    engine: Engine, other: Engine, limit: int
) -> None:
    apply_batch(engine, [purchase("acme", "first"), purchase("globex", "first")])
    with locked(other, "acme"):
        answers = apply_batch(engine, [purchase(("acme", "globex")[n % 2], f"p{n:02}") for n in range(20)])
        assert answers[::2] == [Waits("acme", LOCKED)] * 10
        assert outcomes(answers[1::2]) == ["posted"] * 10
        for number in range(20, 30):
            more = apply_batch(engine, [purchase("acme", f"p{number}")], known_to_wait={"acme"})
            assert more == [Waits("acme", BEHIND)]
        assert apply_waiting(engine, "acme", limit=limit) == Applied([], LOCKED)
    # Free again, but what waits is first.
    assert apply_batch(engine, [purchase("acme", "p30")]) == [Waits("acme", BEHIND)]
    assert outcomes(apply_all_waiting(engine, "acme", limit=limit)) == ["posted"] * 21
    assert outcomes(apply_batch(engine, [purchase("acme", "p31")])) == ["posted"]
    assert purchases_in_order(engine, "acme") == [
        "first",
        *(f"p{n:02}" for n in range(0, 20, 2)),
        *(f"p{n}" for n in range(20, 32)),
    ]
    assert is_sound(engine)


def test_who_waits_is_told_with_the_reason_of_its_first_message(engine: Engine, other: Engine) -> None:
    apply_batch(engine, [purchase(org_id, "first") for org_id in ("acme", "globex", "initech")])
    assert waits(engine) == []
    with locked(other, "globex"), other.connect() as second:
        second.execute(text("SELECT 1 FROM wallets WHERE org_id = 'acme' FOR UPDATE"))
        apply_batch(engine, [purchase(org_id, "second") for org_id in ("acme", "globex", "initech")])
        apply_batch(engine, [purchase(org_id, "third") for org_id in ("acme", "globex", "initech")])
    assert waits(engine) == [("acme", LOCKED), ("globex", LOCKED)]
    with engine.connect() as connection:
        assert [one.org_id for one in waiting.organizations(connection, most=1)] == ["acme"]


def waits(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(one.org_id, one.reason) for one in waiting.organizations(connection)]


def test_the_caller_of_a_message_that_waits_is_kept_with_it(engine: Engine, other: Engine) -> None:
    apply_batch(engine, [purchase("acme", "first")])
    asked = purchase("acme", "second")._replace(answer_to="somebody")
    with locked(other, "acme"):
        assert apply_batch(engine, [asked]) == [Waits("acme", LOCKED)]
    [(applied, answer)] = apply_waiting(engine, "acme", limit=1).answers
    assert applied == asked
    assert outcomes([answer]) == ["posted"]


def test_a_wallet_that_somebody_is_creating_is_not_waited_for_by_others(engine: Engine, other: Engine) -> None:
    apply_batch(engine, [purchase("globex", "first")])
    columns = "last_seq, prepaid_balance, subscription_balance, reserved, period_usage, credit_limit, config_version"
    creating = f"INSERT INTO wallets (org_id, {columns}) VALUES ('acme', 0, 0, 0, 0, 0, 0, 0)"
    with holding(other, creating):
        answers = apply_batch(engine, [purchase("acme", "p1"), purchase("globex", "p1"), purchase("new", "p1")])
        assert outcomes(answers) == ["Waits", "posted", "posted"]
    assert outcomes(apply_all_waiting(engine, "acme")) == ["posted"]
    assert is_sound(engine)


def test_wallets_that_somebody_is_creating_are_not_taken_for_an_outage(engine: Engine, other: Engine) -> None:
    columns = "last_seq, prepaid_balance, subscription_balance, reserved, period_usage, credit_limit, config_version"
    creating = f"INSERT INTO wallets (org_id, {columns}) SELECT 'new-' || n, 0, 0, 0, 0, 0, 0, 0"
    with holding(other, f"{creating} FROM generate_series(10, 29) AS n"):
        answers = apply_batch(engine, [purchase(f"new-{n}", "p1") for n in range(10, 40)])
        assert outcomes(answers) == [*["Waits"] * 20, *["posted"] * 10]
    for n in range(10, 30):
        assert outcomes(apply_all_waiting(engine, f"new-{n}")) == ["posted"]
    assert is_sound(engine)


def test_a_wallet_that_another_worker_has_for_a_moment_does_not_wait_with_a_locked_one(
    engine: Engine, other: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    organizations = busy, stuck = of_one_shard(engine, 2)
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])
    with locked(other, stuck), other.connect() as worker:
        worker.execute(text(f"SELECT 1 FROM wallets WHERE org_id = '{busy}' FOR UPDATE"))
        monkeypatch.setattr("ledger.working_set.time.sleep", lambda _: worker.rollback())
        answers = apply_batch(engine, [purchase(org_id, "second") for org_id in organizations])
    assert outcomes(answers) == ["posted", "Waits"]
    assert outcomes(apply_all_waiting(engine, stuck)) == ["posted"]


def test_a_message_that_will_be_a_dead_letter_waits_behind_what_waits_for_the_dead_letters(
    engine: Engine, other: Engine
) -> None:
    bad = [purchase("acme", f"bad-{n}", credits=0) for n in range(2)]
    apply_batch(engine, [purchase("acme", "first")])
    with holding(other, "LOCK TABLE dead_letters"):
        assert outcomes(apply_batch(engine, bad[:1])) == ["Waits"]
        # Nothing is asked of the dead letters, which would take its time.
        assert apply_batch(engine, bad[1:], known_to_wait={"acme"}) == [Waits("acme", BEHIND)]
    assert outcomes(apply_all_waiting(engine, "acme")) == ["DeadLettered"] * 2


SUBSCRIBE = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 100}


@pytest.mark.parametrize("table", ["workflows", "subscriptions", "ending_credits"])
def test_records_that_somebody_has_locked_in_many_organizations_delay_nobody_else(
    engine: Engine, other: Engine, table: str
) -> None:
    organizations = [f"org-{n:02}" for n in range(60)]
    for org_id in organizations:
        subscribe = delivery("wallet.subscribe", org_id=org_id, **SUBSCRIBE, anchor="2999-01-01T00:00:00Z")
        grant = delivery("wallet.grant", org_id=org_id, grant_id="g1", credits=5, expires_at="2999-01-01T00:00:00Z")
        apply_batch(engine, [purchase(org_id, "first"), start(org_id, "run", 5), subscribe, grant])
    if table == "workflows":
        messages = [delivery("workflow.cancel", org_id=org_id, workflow_id="run") for org_id in organizations]
    elif table == "ending_credits":
        run = {"workflow_id": "run", "credits": 2}
        messages = [delivery("workflow.finish", org_id=org_id, **run) for org_id in organizations]
    else:
        end = {"subscription_id": "s1", "version": 2}
        messages = [delivery("wallet.unsubscribe", org_id=org_id, **end) for org_id in organizations]
    lock = f"SELECT 1 FROM {table} WHERE org_id = '{{}}' FOR UPDATE"
    with holding(other, *map(lock.format, organizations[:40])):
        answers = apply_batch(engine, messages)
        assert answers[:40] == [Waits(org_id, RECORD_LOCKED) for org_id in organizations[:40]]
        assert {type(answer) for answer in answers[40:]} == {Result}
        assert apply_waiting(engine, "org-00", limit=1) == Applied([], RECORD_LOCKED)
        # Nothing that waits was kept twice, and nobody else is looked at for it again.
        again = apply_batch(engine, [purchase(org_id, "second") for org_id in organizations])
        assert outcomes(again) == [*["Waits"] * 40, *["posted"] * 20]
    assert sql(engine, "SELECT count(*), count(DISTINCT org_id) FROM waiting_messages") == [(80, 40)]
    for org_id in organizations[:40]:
        assert len(apply_all_waiting(engine, org_id)) == 2
    assert is_sound(engine)


def test_an_expired_hold_that_somebody_has_locked_delays_nobody_else_and_is_released_later(
    engine: Engine, other: Engine
) -> None:
    with_expired_holds(engine, "acme", 3)
    with_expired_holds(engine, "globex", 3)
    with holding(other, "SELECT 1 FROM workflows WHERE org_id = 'acme' AND workflow_id = 'w001' FOR UPDATE"):
        answers = apply_batch(engine, [purchase("acme", "p2"), purchase("globex", "p2")])
        assert answers[0] == Waits("acme", RECORD_LOCKED)
        assert outcomes(answers[1:]) == ["posted"]
        assert apply_waiting(engine, "acme", limit=1) == Applied([], RECORD_LOCKED)
        assert scheduler.release_expired(engine) == 0
    assert sql(engine, "SELECT count(*) FROM workflows WHERE state = 'expired'") == [(3,)]
    assert scheduler.release_expired(engine) == 3
    assert outcomes(apply_all_waiting(engine, "acme")) == ["posted"]
    assert is_sound(engine)


@pytest.mark.parametrize("state", ["40001", "40P01", "53100", "53200", "25006", "58030", "55P03"])
def test_an_error_that_passes_concerns_its_organization_alone_as_long_as_others_get_through(
    engine: Engine, state: str
) -> None:
    organizations = [f"org-{n:03}" for n in range(100)]
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])
    act = f"RAISE EXCEPTION 'not now' USING ERRCODE = '{state}'"
    on_insert_into(engine, "credit_events", act, when="NEW.org_id BETWEEN 'org-040' AND 'org-059'")
    # Two of each: the second one goes behind the first one.
    messages = [purchase(org_id, purchase_id) for purchase_id in ("second", "third") for org_id in organizations]
    answers = apply_batch(engine, messages)
    assert outcomes(answers) == [*["posted"] * 40, *["Waits"] * 20, *["posted"] * 40] * 2
    reason = BLOCKED if state == "55P03" else "the database does not apply its messages: not now"
    assert {answer.reason for answer in answers if isinstance(answer, Waits)} == {reason}
    assert sql(engine, "SELECT count(*) FROM waiting_messages") == [(40,)]
    no_more_acting(engine, "credit_events")
    for org_id in organizations[40:60]:
        assert outcomes(apply_all_waiting(engine, org_id)) == ["posted"] * 2
        assert purchases_in_order(engine, org_id) == ["first", "second", "third"]
    assert is_sound(engine)


def test_an_unexpected_error_whose_dead_letter_cannot_be_written_concerns_its_organization_alone(
    engine: Engine, other: Engine
) -> None:
    on_insert_into(engine, "credit_events", "RAISE EXCEPTION 'never'", when="NEW.org_id = 'acme'")
    apply_batch(engine, [purchase("acme", "bad"), purchase("globex", "first")])
    with holding(other, "SELECT 1 FROM dead_letters FOR UPDATE"):
        messages = [purchase("globex", "second"), purchase("acme", "bad"), purchase("acme", "worse")]
        answers = apply_batch(engine, messages)
        assert outcomes(answers) == ["posted", "Waits", "Waits"]
    assert outcomes(apply_all_waiting(engine, "acme")) == ["DeadLettered"] * 2


def test_a_locked_table_of_dead_letters_delays_only_those_who_need_it(engine: Engine, other: Engine) -> None:
    organizations = [f"org-{n:02}" for n in range(40)]
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])
    nameless = [
        Delivery("", InvalidMessage("undecodable_message", "it cannot be read", None), b"\x00%d" % n) for n in range(10)
    ]
    bad = [purchase(org_id, "bad", credits=0) for org_id in organizations[:10]]
    with holding(other, "LOCK TABLE dead_letters"):
        answers = apply_batch(engine, [*nameless, *bad, *[purchase(org_id, "second") for org_id in organizations]])
        assert outcomes(answers) == [*["Waits"] * 20, *["Waits"] * 10, *["posted"] * 30]
    for org_id in (waiting.NOBODY, *organizations[:10]):
        apply_all_waiting(engine, org_id)
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(20,)]
    assert sql(engine, "SELECT count(*) FROM credit_events") == [(80,)]
    assert audit.verify(engine).is_clean


def test_organizations_that_are_all_slow_one_after_the_other_delay_nobody_for_long(engine: Engine) -> None:
    organizations = [f"org-{n:03}" for n in range(100)]
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])
    on_insert_into(engine, "credit_events", "PERFORM pg_sleep(5)", when="NEW.org_id BETWEEN 'org-040' AND 'org-047'")
    answers = apply_batch(engine, [purchase(org_id, "second") for org_id in organizations])
    assert outcomes(answers) == [*["posted"] * 40, *["Waits"] * 8, *["posted"] * 52]
    no_more_acting(engine, "credit_events")
    for org_id in organizations[40:48]:
        assert outcomes(apply_all_waiting(engine, org_id)) == ["posted"]
    assert is_sound(engine)


def test_of_many_slow_organizations_not_every_one_is_looked_for_and_nothing_is_lost(engine: Engine) -> None:
    organizations = [f"org-{n:03}" for n in range(60)]
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])
    on_insert_into(engine, "credit_events", "PERFORM pg_sleep(5)", when="NEW.org_id < 'org-040'")
    messages = [purchase(org_id, purchase_id) for purchase_id in ("second", "third") for org_id in organizations]
    answers = dict(zip(organizations * 2, apply_batch(engine, messages), strict=True))
    assert {answers[org_id] for org_id in organizations[:40]} == {Waits(org_id, SLOW) for org_id in organizations[:40]}
    # Whoever is left when so many are in trouble is tried by itself, and soon applied.
    for org_id in organizations[40:]:
        assert outcomes(apply_all_waiting(engine, org_id)) in ([], ["posted"] * 2)
    no_more_acting(engine, "credit_events")
    for org_id in organizations[:40]:
        assert outcomes(apply_all_waiting(engine, org_id)) == ["posted"] * 2
        assert purchases_in_order(engine, org_id) == ["first", "second", "third"]
    assert is_sound(engine)


def test_a_statement_that_takes_too_long_for_one_organization_delays_nobody_else(engine: Engine) -> None:
    organizations = [f"org-{n:03}" for n in range(200)]
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])
    on_insert_into(engine, "credit_events", f"PERFORM pg_sleep({PATIENCE_S + 1})", when="NEW.org_id = 'org-100'")
    answers = apply_batch(engine, [purchase(org_id, "second") for org_id in organizations])
    assert answers[100] == Waits("org-100", SLOW)
    assert outcomes(answers[:100] + answers[101:]) == ["posted"] * 199
    # In its own time, and nobody waits for that, it is applied.
    [(_, answer)] = apply_waiting(engine, "org-100", limit=1, patience_s=LONG_PATIENCE_S).answers
    assert outcomes([answer]) == ["posted"]
    assert is_sound(engine)


def test_a_batch_in_which_everything_is_slow_is_split_until_it_is_done(engine: Engine) -> None:
    on_insert_into(engine, "credit_events", "PERFORM pg_sleep(0.03)")
    answers = apply_batch(engine, [purchase("acme", f"p{n:03}") for n in range(100)])
    assert outcomes(answers) == ["posted"] * 100
    assert purchases_in_order(engine, "acme") == [f"p{n:03}" for n in range(100)]
    assert is_sound(engine)


def test_a_message_that_costs_the_connection_waits_alone(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", "first"), purchase("globex", "first")])
    on_insert_into(
        engine, "credit_events", "PERFORM pg_terminate_backend(pg_backend_pid())", when="NEW.org_id = 'acme'"
    )
    answers = apply_batch(engine, [purchase(("acme", "globex")[n % 2], f"p{n}") for n in range(4)])
    assert outcomes(answers) == ["Waits", "posted", "Waits", "posted"]
    with pytest.raises(psycopg.OperationalError):
        apply_waiting(engine, "acme", limit=1)
    no_more_acting(engine, "credit_events")
    assert outcomes(apply_all_waiting(engine, "acme")) == ["posted"] * 2
    assert is_sound(engine)


def test_what_concerns_everybody_is_raised_soon_and_loses_nothing(engine: Engine, other: Engine) -> None:
    messages = [purchase(f"org-{n:03}", "p1") for n in range(200)]
    with holding(other, "LOCK TABLE credit_events IN ACCESS EXCLUSIVE MODE"):
        with pytest.raises(psycopg.errors.LockNotAvailable) as raised:
            apply_batch(engine, messages)
        assert is_transient(raised.value)
    assert waits(engine) == []
    assert outcomes(apply_batch(engine, messages)) == ["posted"] * 200
    assert sql(engine, "SELECT count(*) FROM credit_events") == [(200,)]
    assert is_sound(engine)


def test_a_dead_letter_that_somebody_has_locked_delays_nobody_else(engine: Engine, other: Engine) -> None:
    bad, homeless = purchase("acme", "bad", credits=0), delivery("wallet.purchase", purchase_id="p1", credits=1)
    impossible = purchase("no such name", "p1")
    nameless = Delivery("", InvalidMessage("undecodable_message", "it cannot be read", None), b"\x00?")
    letters = [nameless, bad, homeless, impossible]
    apply_batch(engine, [*letters, purchase("globex", "first")])
    with holding(other, "SELECT 1 FROM dead_letters FOR UPDATE"):
        good = [purchase("globex", "second"), purchase("acme", "good")]
        answers = [apply_batch(engine, [letter, *good]) for letter in letters]
        assert [outcomes(some) for some in answers] == [
            ["Waits", "posted", "posted"],
            ["Waits", "posted", "Waits"],
            ["Waits", "posted", "Waits"],
            ["Waits", "posted", "Waits"],
        ]
    assert [org_id for org_id, _ in waits(engine)] == [waiting.NOBODY, "acme", "no such name"]
    assert outcomes(apply_all_waiting(engine, waiting.NOBODY)) == ["DeadLettered"] * 2
    assert outcomes(apply_all_waiting(engine, "no such name")) == ["DeadLettered"]
    assert outcomes(apply_all_waiting(engine, "acme")) == ["DeadLettered", *["posted"] * 3]
    assert sql(engine, "SELECT DISTINCT attempts FROM dead_letters") == [(2,)]
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(4,)]
    assert purchases_in_order(engine, "acme") == ["good"]
    assert audit.verify(engine).is_clean


def test_a_waiting_message_that_somebody_has_locked_is_not_overtaken(engine: Engine, other: Engine) -> None:
    apply_batch(engine, [purchase("acme", "first")])
    with locked(other, "acme"):
        apply_batch(engine, [purchase("acme", f"p{n}") for n in range(3)])
    with holding(other, "SELECT 1 FROM waiting_messages ORDER BY number LIMIT 1 FOR UPDATE"):
        with pytest.raises(psycopg.errors.LockNotAvailable):
            apply_waiting(engine, "acme", limit=500)
        assert purchases_in_order(engine, "acme") == ["first"]
    assert outcomes(apply_all_waiting(engine, "acme")) == ["posted"] * 3
    assert purchases_in_order(engine, "acme") == ["first", "p0", "p1", "p2"]
    assert is_sound(engine)


def test_two_workers_at_once_make_one_dead_letter_of_a_message_without_a_wallet(engine: Engine, other: Engine) -> None:
    nameless = Delivery("", InvalidMessage("undecodable_message", "it cannot be read", None), b"\x00?")
    apply_batch(engine, [nameless])
    with holding(other, "SELECT 1 FROM dead_letters FOR UPDATE"):
        apply_batch(engine, [nameless])
    with holding(other, "DELETE FROM waiting_messages"), pytest.raises(psycopg.errors.LockNotAvailable):
        apply_waiting(engine, waiting.NOBODY, limit=1)
    assert outcomes(apply_all_waiting(engine, waiting.NOBODY)) == ["DeadLettered"]
    assert sql(engine, "SELECT attempts FROM dead_letters") == [(2,)]


def test_a_waiting_message_that_can_never_be_applied_becomes_a_dead_letter(engine: Engine, other: Engine) -> None:
    apply_batch(engine, [purchase("acme", "first")])
    with locked(other, "acme"):
        apply_batch(engine, [purchase("acme", f"p{n}") for n in range(3)])
    on_insert_into(engine, "credit_events", "RAISE EXCEPTION 'never'", when="NEW.metadata ->> 'purchase_id' = 'p1'")
    assert outcomes(apply_all_waiting(engine, "acme")) == ["posted", "DeadLettered", "posted"]
    assert purchases_in_order(engine, "acme") == ["first", "p0", "p2"]
    [(code, body)] = sql(engine, "SELECT error_code, body FROM dead_letters")
    assert (code, body) == ("unexpected_error", purchase("acme", "p1").body)
    assert sql(engine, "SELECT count(*) FROM waiting_messages") == [(0,)]


# A message that ends its worker.


class WorkerEnded(BaseException):
    """Nothing catches it, as nothing can do something about SIGKILL."""


@pytest.fixture
def ends_its_worker(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The purchases that end their worker, by their ids."""
    purchases: set[str] = set()
    decide = rules.decide

    def end(wallet: Any, message: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(message, "purchase_id", None) in purchases:
            raise WorkerEnded
        return decide(wallet, message, *args, **kwargs)

    monkeypatch.setattr(rules, "decide", end)
    return purchases


def attempts(engine: Engine) -> list[int]:
    return [count for (count,) in sql(engine, "SELECT attempts FROM waiting_messages ORDER BY number")]


def wait_in_line(engine: Engine, other: Engine, purchase_ids: Sequence[str]) -> None:
    apply_batch(engine, [purchase("acme", "first")])
    with locked(other, "acme"):
        asked = [purchase("acme", purchase_id)._replace(answer_to=purchase_id) for purchase_id in purchase_ids]
        apply_batch(engine, asked)


def test_a_waiting_message_that_ends_its_workers_becomes_a_dead_letter_and_the_others_are_applied_in_order(
    engine: Engine, other: Engine, ends_its_worker: set[str]
) -> None:
    wait_in_line(engine, other, [f"p{n}" for n in range(6)])
    ends_its_worker.add("p3")
    ended, answers = 0, []
    for _ in range(100):
        try:
            applied = apply_waiting(engine, "acme", limit=500)
        except WorkerEnded:
            ended += 1
        else:
            answers += applied.answers
            if not applied.answers:
                break
    assert ended == DELIVERY_LIMIT
    assert outcomes([answer for _, answer in answers]) == [*["posted"] * 3, "DeadLettered", *["posted"] * 2]
    assert [asked.answer_to for asked, _ in answers] == [f"p{n}" for n in range(6)]
    assert purchases_in_order(engine, "acme") == ["first", "p0", "p1", "p2", "p4", "p5"]
    [letter] = sql(engine, "SELECT error_code, error, org_id, task, body FROM dead_letters")
    assert letter == (
        "delivery_limit",
        "its worker ended each time it was applied",
        "acme",
        "wallet.purchase",
        purchase("acme", "p3").body,
    )
    assert sql(engine, "SELECT count(*) FROM waiting_messages") == [(0,)]


def test_an_attempt_that_fails_and_lets_its_worker_live_does_not_count(
    engine: Engine, other: Engine, ends_its_worker: set[str]
) -> None:
    wait_in_line(engine, other, ["p1", "p2"])
    ends_its_worker.add("p2")
    with pytest.raises(WorkerEnded):
        apply_waiting(engine, "acme", limit=500)
    assert attempts(engine) == [1, 1]
    ends_its_worker.clear()
    on_insert_into(engine, "credit_events", "RAISE EXCEPTION 'not now' USING ERRCODE = '40001'")
    for _ in range(DELIVERY_LIMIT + 1):
        with pytest.raises(psycopg.errors.SerializationFailure):
            apply_waiting(engine, "acme", limit=500)
    with locked(other, "acme"):
        assert apply_waiting(engine, "acme", limit=500) == Applied([], LOCKED)
    assert attempts(engine) == [1, 1]
    no_more_acting(engine, "credit_events")
    assert outcomes(apply_all_waiting(engine, "acme")) == ["posted"] * 2
    assert is_sound(engine)


# More is due than one transaction does.


@pytest.fixture
def most_due(monkeypatch: pytest.MonkeyPatch) -> int:
    """A small bound, so that few holds are many."""
    monkeypatch.setattr(working_set, "MOST_DUE", 10)
    return 10


def with_expired_holds(engine: Engine, org_id: str, count: int) -> None:
    apply_batch(engine, [purchase(org_id, "p1", 1_000), *(start(org_id, f"w{n:03}", 2) for n in range(count))])
    expire(engine)


def expire(engine: Engine) -> None:
    sql(engine, f"UPDATE workflows SET expires_at = {moved('expires_at', '-1 day')}")
    sql(engine, f"UPDATE wallets SET next_hold_expiry = {moved('next_hold_expiry', '-1 day')}")


def test_what_is_due_comes_before_the_messages_that_wait_and_they_know_of_it(engine: Engine, other: Engine) -> None:
    apply_batch(engine, [purchase("acme", "p1", 100), start("acme", "w1", 60), start("acme", "w2", 40)])
    with locked(other, "acme"):
        finish = delivery("workflow.finish", org_id="acme", workflow_id="w1", credits=10)
        assert outcomes(apply_batch(engine, [finish, start("acme", "w3", 90)])) == ["Waits"] * 2
    expire(engine)
    assert outcomes(apply_all_waiting(engine, "acme")) == ["settled", "reserved"]
    assert sql(engine, "SELECT workflow_id, state FROM workflows ORDER BY 1") == [
        ("w1", "settled"),
        ("w2", "expired"),
        ("w3", "reserved"),
    ]
    assert is_sound(engine)


def test_an_organization_with_more_expired_holds_than_a_transaction_releases_waits_alone(
    engine: Engine, most_due: int
) -> None:
    with_expired_holds(engine, "acme", 35)
    apply_batch(engine, [purchase("globex", "p1")])
    answers = apply_batch(engine, [start("acme", "new", 1_000), purchase("globex", "p2")])
    assert answers[0] == Waits("acme", MUCH_DUE)
    assert outcomes(answers[1:]) == ["posted"]
    assert sql(engine, "SELECT count(*) FROM workflows WHERE state = 'expired'") == [(10,)]
    assert apply_waiting(engine, "acme", limit=500) == Applied([], MUCH_DUE)
    assert sql(engine, "SELECT count(*) FROM workflows WHERE state = 'expired'") == [(20,)]
    # All that has expired is released first, so all credits are free again.
    assert outcomes(apply_all_waiting(engine, "acme")) == ["reserved"]
    assert sql(engine, "SELECT count(*) FROM workflows WHERE state = 'expired'") == [(35,)]
    assert is_sound(engine)


def test_a_run_releases_any_number_of_holds_in_bounded_steps(engine: Engine, most_due: int) -> None:
    of_many, of_few = of_one_shard(engine, 2)
    with_expired_holds(engine, of_many, 95)
    with_expired_holds(engine, of_few, 5)
    written = list(scheduler.steps(engine, due.RELEASE_EXPIRED))
    assert sum(written) == 100
    assert max(written) == most_due
    assert sql(engine, "SELECT reserved, next_hold_expiry FROM wallets") == [(0, None)] * 2
    assert scheduler.release_expired(engine) == 0
    assert is_sound(engine)


def test_a_run_begins_any_number_of_periods_in_bounded_steps(engine: Engine, most_due: int) -> None:
    subscribe = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 100}
    organizations = of_one_shard(engine, 4)
    apply_batch(
        engine,
        [
            delivery("wallet.subscribe", org_id=org_id, **subscribe, anchor="2999-01-01T00:00:00Z")
            for org_id in organizations
        ],
    )
    with_expired_holds(engine, organizations[0], 3)
    begin_schedules(engine, "now() - interval '500 days'")
    written = list(scheduler.steps(engine, due.POST_DUE))
    periods = sql(engine, "SELECT DISTINCT period + 1 FROM subscriptions")[0][0]
    assert periods in (16, 17, 18)
    assert max(written) <= most_due + 1  # a period is one event or two
    posted = sql(
        engine,
        "SELECT org_id, event_type, count(*), sum(credits) FROM credit_events WHERE source = 'scheduler'"
        " GROUP BY 1, 2 ORDER BY 1, 2",
    )
    assert sum(written) == sum(count for _, _, count, _ in posted)
    ended = periods - 1
    # What the expired holds covered ended once they were released, in a few more events.
    assert [(of_type, total) for _, of_type, _, total in posted[:3]] == [
        ("adjustment", -100 * ended),
        ("reservation_released", 6),
        ("subscription_credit", 100 * periods),
    ]
    for org_id, adjusted, credited in zip(organizations[1:], posted[3::2], posted[4::2], strict=True):
        assert adjusted == (org_id, "adjustment", ended, -100 * ended)
        assert credited == (org_id, "subscription_credit", periods, 100 * periods)
    assert sql(engine, "SELECT DISTINCT next_period_at > now(), reserved, next_hold_expiry FROM wallets") == [
        (True, 0, None)
    ]
    assert is_sound(engine)


def test_an_organization_with_many_missed_periods_is_caught_up_before_its_message(
    engine: Engine, most_due: int
) -> None:
    fields = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 100}
    apply_batch(engine, [delivery("wallet.subscribe", org_id="acme", **fields, anchor="2999-01-01T00:00:00Z")])
    begin_schedules(engine, "now() - interval '500 days'")
    assert apply_batch(engine, [start("acme", "w1", 100)]) == [Waits("acme", MUCH_DUE)]
    assert outcomes(apply_all_waiting(engine, "acme")) == ["reserved"]
    assert is_sound(engine)
