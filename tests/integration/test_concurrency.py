"""Several writers at once, on connections of their own: no credit is granted twice, and nobody deadlocks."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Barrier
from typing import TypeVar

from sqlalchemy import Engine, text

from holdfast_client.results import Result
from ledger import audit, scheduler
from ledger.database import connect
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.waiting import Waits
from tests.messages import delivery, purchase
from tests.support import PATIENCE_S, begin_schedules, on_every_server, sql

Answer = TypeVar("Answer")


@contextmanager
def writers(database_url: str, count: int) -> Iterator[list[Engine]]:
    """`count` engines, each with a connection that is open already."""
    with ExitStack() as stack:
        engines = [connect(database_url) for _ in range(count)]
        for engine in engines:
            stack.callback(engine.dispose)
            sql(engine, "SELECT 1")
        yield engines


def at_once(engines: Sequence[Engine], work: Callable[[int, Engine], Answer]) -> list[Answer]:
    """Do `work` on every engine, each in a thread of its own, released together."""
    barrier = Barrier(len(engines), timeout=PATIENCE_S)

    def run(number: int) -> Answer:
        barrier.wait()
        return work(number, engines[number])

    with ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(run, range(len(engines)), timeout=PATIENCE_S))


def test_twenty_reservations_at_once_hold_no_more_than_there_is(engine: Engine, database_url: str) -> None:
    apply_batch(engine, [purchase("acme", "p1", 500)])

    def start(number: int, own: Engine) -> Result | DeadLettered | Waits:
        message = delivery("workflow.start", org_id="acme", workflow_id=f"w{number}", credits=75)
        return apply_batch(own, [message])[0]

    with writers(database_url, 20) as engines:
        answers = at_once(engines, start)
    assert Counter((answer.outcome, answer.reason) for answer in answers if isinstance(answer, Result)) == {
        ("reserved", None): 6,
        ("rejected", "insufficient_credits"): 14,
    }
    assert sql(engine, "SELECT prepaid_balance, reserved, last_seq FROM wallets") == [(500, 450, 7)]
    assert sql(engine, "SELECT state, count(*) FROM workflows GROUP BY state ORDER BY state") == [
        ("rejected", 14),
        ("reserved", 6),
    ]
    assert audit.verify(engine).is_clean


def test_writers_of_the_same_wallets_in_opposite_orders_never_deadlock(engine: Engine, database_url: str) -> None:
    organizations = [f"org-{n}" for n in range(8)]
    rounds = 100
    apply_batch(engine, [purchase(org_id, "first") for org_id in organizations])

    def write(number: int, own: Engine) -> int:
        order = organizations if number else organizations[::-1]
        answers = [
            answer
            for round_ in range(rounds)
            for answer in apply_batch(own, [purchase(org_id, f"{number}-{round_}") for org_id in order])
        ]
        return sum(isinstance(answer, Result) and answer.outcome == "posted" for answer in answers)

    with writers(database_url, 2) as engines:
        assert at_once(engines, write) == [800, 800]
    assert sql(engine, "SELECT DISTINCT last_seq, prepaid_balance FROM wallets") == [(201, 2_010)]
    deadlocks = on_every_server(engine, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert set(deadlocks) == {"0"}
    assert audit.verify(engine).is_clean


def test_two_writers_create_the_same_new_wallets_at_once(engine: Engine, database_url: str) -> None:
    organizations = [f"org-{n:02}" for n in range(50)]
    # Each wallet takes a while to create, so that the two writers meet in the middle.
    sql(
        engine,
        """
        CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep(0.002); RETURN NEW; END $$
        """,
    )
    sql(
        engine,
        """
        CREATE TRIGGER dawdle BEFORE INSERT ON wallets FOR EACH ROW EXECUTE FUNCTION dawdle()
        """,
    )

    def write(number: int, own: Engine) -> int:
        order = organizations if number else organizations[::-1]
        answers = apply_batch(own, [purchase(org_id, f"p{number}") for org_id in order])
        return sum(isinstance(answer, Result) and answer.outcome == "posted" for answer in answers)

    with writers(database_url, 2) as engines:
        assert at_once(engines, write) == [50, 50]
    assert sql(engine, "SELECT count(*), min(prepaid_balance), max(last_seq) FROM wallets") == [(50, 20, 2)]
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(0,)]
    assert audit.verify(engine).is_clean


def test_a_message_delivered_ten_times_at_once_is_applied_once(engine: Engine, database_url: str) -> None:
    messages = [
        purchase("acme", "p1", 500),
        delivery("workflow.start", org_id="acme", workflow_id="w1", credits=75),
        delivery("workflow.finish", org_id="acme", workflow_id="w1", credits=80),
        delivery("workflow.cancel", org_id="acme", workflow_id="w2"),
        delivery("wallet.refund", org_id="acme", refund_id="r1", credits=80, workflow_id="w1"),
    ]
    with writers(database_url, 10) as engines:
        for message, outcome, seqs in zip(
            messages,
            ["posted", "reserved", "settled", "ignored", "posted"],
            [(1,), (2,), (3, 4), (), (5,)],
            strict=True,
        ):

            def deliver(_: int, own: Engine, message: Delivery = message) -> Result | DeadLettered | Waits:
                return apply_batch(own, [message])[0]

            answers = at_once(engines, deliver)
            assert Counter(
                (answer.outcome, answer.duplicate, answer.event_seqs)
                for answer in answers
                if isinstance(answer, Result)
            ) == {(outcome, False, seqs): 1, (outcome, True, ()): 9}
    assert audit.verify(engine).is_clean


def test_conflicting_messages_at_once_apply_one_and_keep_the_others(engine: Engine, database_url: str) -> None:
    def deliver(number: int, own: Engine) -> Result | DeadLettered | Waits:
        return apply_batch(own, [purchase("acme", "p1", 100 + number)])[0]

    with writers(database_url, 10) as engines:
        answers = at_once(engines, deliver)
    [winner] = [answer for answer in answers if isinstance(answer, Result)]
    assert [answer.code for answer in answers if isinstance(answer, DeadLettered)] == ["conflict"] * 9
    assert sql(engine, "SELECT prepaid_balance FROM wallets") == [(winner.available,)]
    assert sql(engine, "SELECT count(*) FROM dead_letters WHERE status = 'open'") == [(9,)]


def test_the_same_bad_message_failing_ten_times_at_once_is_one_dead_letter(engine: Engine, database_url: str) -> None:
    bad = [delivery("wallet.purchase", org_id="acme", purchase_id=f"p{n}", credits=0) for n in range(5)]

    def deliver(number: int, own: Engine) -> list[int]:
        letters = apply_batch(own, bad if number % 2 else bad[::-1])
        return sorted(letter.letter_id for letter in letters if isinstance(letter, DeadLettered))

    with writers(database_url, 10) as engines:
        answers = at_once(engines, deliver)
    ids = [letter_id for (letter_id,) in sql(engine, "SELECT id FROM dead_letters ORDER BY id")]
    assert answers == [ids] * 10
    assert sql(engine, "SELECT error_code, attempts FROM dead_letters") == [("invalid_message", 10)] * 5


def subscribe_due(engine: Engine, organizations: Sequence[str]) -> None:
    """Wallets whose first period began 40 days ago and whose second one has begun too; neither is posted."""
    apply_batch(
        engine,
        [
            delivery(
                "wallet.subscribe",
                org_id=org_id,
                subscription_id="s1",
                version=1,
                plan="team",
                monthly_credits=100,
                anchor="2999-01-01T00:00:00Z",
            )
            for org_id in organizations
        ],
    )
    begin_schedules(engine, "now() - interval '40 days'")


def test_the_scheduler_leaves_out_a_wallet_that_a_writer_holds(engine: Engine, database_url: str) -> None:
    subscribe_due(engine, ["acme", "globex", "initech"])
    with writers(database_url, 1) as [other], other.connect() as writer:
        writer.execute(text("SELECT * FROM wallets WHERE org_id = 'globex' FOR UPDATE"))
        sql(engine, "SET lock_timeout = '2s'")  # of the pooled connection: waiting at all would fail the test
        assert scheduler.post_due(engine) == 6
        writer.rollback()
    posted = "SELECT org_id, last_seq FROM wallets ORDER BY org_id"
    assert sql(engine, posted) == [("acme", 3), ("globex", 0), ("initech", 3)]
    assert scheduler.post_due(engine) == 3
    assert sql(engine, posted) == [("acme", 3), ("globex", 3), ("initech", 3)]
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(0,)]


def test_schedulers_and_a_writer_at_once_post_each_period_once(engine: Engine, database_url: str) -> None:
    organizations = [f"org-{n:03}" for n in range(600)]  # two chunks
    subscribe_due(engine, organizations)

    def work(number: int, own: Engine) -> int:
        if number < 2:
            return scheduler.post_due(own)
        writes = [apply_batch(own, [purchase(org_id, "p1")]) for org_id in organizations[::20]]
        return sum(isinstance(answer, Result) for answers in writes for answer in answers)

    with writers(database_url, 3) as engines:
        posted_first, posted_second, written = at_once(engines, work)
    assert written == 30
    assert 0 < posted_first + posted_second <= 1_800
    scheduler.post_due(engine)  # a wallet that was locked whenever a scheduler came by is still due
    assert scheduler.post_due(engine) == 0
    assert sql(
        engine,
        "SELECT idempotency_key, count(*) FROM credit_events WHERE event_type <> 'prepaid_purchase'"
        " GROUP BY idempotency_key ORDER BY idempotency_key",
    ) == [("subscription:s1:0", 600), ("subscription:s1:0/ended/2", 600), ("subscription:s1:1", 600)]
    assert audit.verify(engine).is_clean
