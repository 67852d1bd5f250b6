"""`apply_batch` on a real PostgreSQL: what it answers, what it writes, and what a batch that fails leaves behind."""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine, text

from holdfast_client.messages import MESSAGES, AnyMessage
from holdfast_client.results import Limit, Result
from ledger import audit, rules, store
from ledger.database import connect, raw_connection
from ledger.faults import is_transient
from ledger.periods import period_start
from ledger.state import Decision
from ledger.store import Applied, DeadLettered, Delivery, apply_batch, apply_waiting
from ledger.waiting import AWAY, LOCKED, Waits
from tests.messages import delivery, finish, purchase, start
from tests.support import (
    PATIENCE_S,
    begin_schedules,
    eventually,
    is_distributed,
    moved,
    of_one_shard,
    on_every_server,
    sql,
)
from worker.local.embedded import Embedded

EVENTS = """
    SELECT seq, event_type, credits, prepaid_balance_after, subscription_balance_after, reserved_after,
           period_usage_after
    FROM credit_events WHERE org_id = :org_id ORDER BY seq
"""


def reverse(reversal_id: str, **fields: Any) -> Delivery:
    return delivery("wallet.reverse", org_id="acme", reversal_id=reversal_id, reason="refunded", **fields)


def posted(*seqs: int, available: int, org_id: str = "acme") -> Result:
    return Result("posted", None, False, org_id, None, None, seqs, available)


def repeated(result: Result, *, available: int) -> Result:
    """What the repetition of a message that was answered with `result` is answered with."""
    return result._replace(duplicate=True, event_seqs=(), available=available, limit=None, shortfall=None)


def event_types(engine: Engine, org_id: str = "acme") -> list[str]:
    return [row[1] for row in sql(engine, EVENTS, org_id=org_id)]


def rejected(workflow_id: str, available: int, limit: Limit, shortfall: int) -> Result:
    return Result("rejected", limit.kind, False, "acme", workflow_id, "rejected", (), available, limit, shortfall)


ANCHOR = datetime.now(UTC) - timedelta(days=5)
PERIOD_END = period_start(ANCHOR, 1)

# Every message kind, in an order in which each finds what it needs, and its answer.
CONVERSATION = [
    (purchase("acme", credits=500), posted(1, available=500)),
    (delivery("wallet.grant", org_id="acme", grant_id="g1", credits=100, reason="welcome"), posted(2, available=600)),
    (
        delivery("wallet.adjust", org_id="acme", adjustment_id="a1", credits=-50, reason="typo"),
        posted(3, available=550),
    ),
    (
        delivery("wallet.bill", org_id="acme", billing_id="b1", credits=-30, invoice_id="i1"),
        posted(4, available=520),
    ),
    (
        delivery("wallet.configure", org_id="acme", version=1, credit_limit=10, period_cap=1_000),
        posted(available=520),
    ),
    (
        delivery(
            "wallet.subscribe",
            org_id="acme",
            subscription_id="s1",
            version=1,
            plan="team",
            monthly_credits=200,
            anchor=ANCHOR.isoformat(),
        ),
        posted(5, available=720),
    ),
    (start("acme", "w1", 100), Result("reserved", None, False, "acme", "w1", "reserved", (6,), 620)),
    (finish("acme", "w1", 80), Result("settled", None, False, "acme", "w1", "settled", (7, 8), 640)),
    (
        delivery("wallet.refund", org_id="acme", refund_id="r1", credits=20, workflow_id="w1"),
        Result("posted", None, False, "acme", "w1", "settled", (9,), 660),
    ),
    (start("acme", "w2", 671), rejected("w2", 660, Limit("insufficient_credits", 670, 0, 0, None), 1)),
    (start("acme", "w3", 670), Result("reserved", None, False, "acme", "w3", "reserved", (10,), -10)),
    (
        delivery("workflow.cancel", org_id="acme", workflow_id="w3", reason="stopped"),
        Result("released", None, False, "acme", "w3", "cancelled", (11,), 660),
    ),
    (start("acme", "w4", 60), Result("reserved", None, False, "acme", "w4", "reserved", (12,), 600)),
    (
        delivery("workflow.fail", org_id="acme", workflow_id="w4", reason="crashed"),
        Result("released", None, False, "acme", "w4", "failed", (13,), 660),
    ),
    (
        delivery("workflow.cancel", org_id="acme", workflow_id="w5"),
        Result("ignored", "not_started", False, "acme", "w5", "cancelled", (), 660),
    ),
    (start("acme", "w5", 10), Result("ignored", "already_ended", False, "acme", "w5", "cancelled", (), 660)),
    (delivery("wallet.configure", org_id="acme", version=3, period_cap=100), posted(available=660)),
    (start("acme", "w6", 21), rejected("w6", 660, Limit("period_cap", 100, 80, 0, PERIOD_END), 1)),
    (
        delivery("wallet.configure", org_id="acme", version=2, period_cap=None),
        Result("ignored", "stale_version", False, "acme", None, None, (), 660),
    ),
    (
        delivery("wallet.unsubscribe", org_id="acme", subscription_id="s9", version=2),
        Result("ignored", "not_subscribed", False, "acme", None, None, (), 660),
    ),
    (delivery("wallet.unsubscribe", org_id="acme", subscription_id="s1", version=2), posted(available=660)),
    (reverse("v1", purchase_id="p1", credits=60), posted(14, available=600)),
]
CONVERSATION_EVENTS = [
    (1, "prepaid_purchase", 500, 500, 0, 0, 0),
    (2, "grant", 100, 600, 0, 0, 0),
    (3, "adjustment", -50, 550, 0, 0, 0),
    (4, "billing", -30, 520, 0, 0, 0),
    (5, "subscription_credit", 200, 520, 200, 0, 0),
    (6, "reservation", -100, 520, 200, 100, 0),
    (7, "reservation_released", 100, 520, 200, 0, 0),
    (8, "usage", -80, 520, 120, 0, 80),
    (9, "refund", 20, 540, 120, 0, 80),
    (10, "reservation", -670, 540, 120, 670, 80),
    (11, "reservation_released", 670, 540, 120, 0, 80),
    (12, "reservation", -60, 540, 120, 60, 80),
    (13, "reservation_released", 60, 540, 120, 0, 80),
    (14, "billing", -60, 480, 120, 0, 80),
]


def test_the_conversation_has_every_message() -> None:
    assert {message.task for message, _ in CONVERSATION} == set(MESSAGES)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_message_is_answered_and_written_the_same_in_batches_of_any_size(engine: Engine, size: int) -> None:
    answers: list[Result | DeadLettered | Waits] = []
    for first in range(0, len(CONVERSATION), size):
        answers += apply_batch(engine, [message for message, _ in CONVERSATION[first : first + size]])
    assert answers == [answer for _, answer in CONVERSATION]
    assert sql(engine, EVENTS, org_id="acme") == CONVERSATION_EVENTS
    assert audit.verify(engine).is_clean


def test_a_repeated_batch_gets_the_first_answers_and_writes_nothing(engine: Engine) -> None:
    messages = [message for message, _ in CONVERSATION]
    apply_batch(engine, messages)
    again = apply_batch(engine, messages)
    states = {answer.workflow_id: answer.state for _, answer in CONVERSATION}  # the last of each
    assert again == [
        repeated(answer, available=600)._replace(state=states[answer.workflow_id]) for _, answer in CONVERSATION
    ]
    assert sql(engine, EVENTS, org_id="acme") == CONVERSATION_EVENTS


def test_a_message_twice_in_one_batch_is_applied_once(engine: Engine) -> None:
    answers = apply_batch(
        engine, [purchase("acme", credits=500), purchase("acme", credits=500), start("acme", "w1", 75)] * 2
    )
    reserved = Result("reserved", None, False, "acme", "w1", "reserved", (2,), 425)
    assert answers == [
        posted(1, available=500),
        repeated(posted(available=500), available=500),
        reserved,
        repeated(posted(available=500), available=425),
        repeated(posted(available=500), available=425),
        repeated(reserved, available=425),
    ]
    assert event_types(engine) == ["prepaid_purchase", "reservation"]


def test_a_start_that_was_rejected_stays_rejected_after_a_purchase(engine: Engine) -> None:
    apply_batch(engine, [start("acme", "w1", 75), purchase("acme", credits=500)])
    assert apply_batch(engine, [start("acme", "w1", 75)]) == [
        Result("rejected", "insufficient_credits", True, "acme", "w1", "rejected", (), 500)
    ]


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ([], "reserved"),
        ([delivery("workflow.cancel", org_id="acme", workflow_id="w1")], "cancelled"),
        ([delivery("workflow.fail", org_id="acme", workflow_id="w1")], "failed"),
        ([finish("acme", "w1", 80)], "settled"),
        ([delivery("workflow.cancel", org_id="acme", workflow_id="w1"), finish("acme", "w1", 80)], "settled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("together", [True, False])
def test_a_start_that_comes_again_tells_what_has_become_of_the_workflow(
    engine: Engine, ends: list[Delivery], state: str, *, together: bool
) -> None:
    first = start("acme", "w1", 75)
    messages = [purchase("acme", credits=500), first, *ends, first]
    batches = [messages] if together else [[message] for message in messages]
    *_, again = [answer for batch in batches for answer in apply_batch(engine, batch)]
    assert isinstance(again, Result)
    assert (again.outcome, again.duplicate, again.event_seqs) == ("reserved", True, ())
    assert (again.state, again.holds) == (state, state == "reserved")


def test_a_start_that_comes_again_after_its_hold_expired_says_so(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=500), start("acme", "w1", 75)])
    expire_holds(engine)
    [again] = apply_batch(engine, [start("acme", "w1", 75)])
    assert again == Result("reserved", None, True, "acme", "w1", "expired", (), 500)
    assert isinstance(again, Result)
    assert not again.holds


def test_a_message_counts_on_those_before_it_in_its_batch_and_on_no_other(engine: Engine) -> None:
    messages = [
        start("acme", "w1", 75),
        purchase("acme", credits=100),
        start("acme", "w2", 75),
        start("acme", "w3", 75),
        finish("acme", "w2", 5),
        start("acme", "w4", 75),
    ]
    assert apply_batch(engine, messages) == [
        rejected("w1", 0, Limit("insufficient_credits", 0, 0, 0, None), 75),
        posted(1, available=100),
        Result("reserved", None, False, "acme", "w2", "reserved", (2,), 25),
        rejected("w3", 25, Limit("insufficient_credits", 100, 0, 75, None), 50),
        Result("settled", None, False, "acme", "w2", "settled", (3, 4), 95),
        Result("reserved", None, False, "acme", "w4", "reserved", (5,), 20),
    ]


def test_one_batch_serves_several_organizations_each_with_its_own_numbers(engine: Engine) -> None:
    messages = [
        purchase("globex", credits=10),
        purchase("acme", credits=500),
        start("globex", "w1", 10),
        start("acme", "w1", 75),
        purchase("globex", "p2", 1),
    ]
    assert apply_batch(engine, messages) == [
        posted(1, available=10, org_id="globex"),
        posted(1, available=500, org_id="acme"),
        Result("reserved", None, False, "globex", "w1", "reserved", (2,), 0),
        Result("reserved", None, False, "acme", "w1", "reserved", (2,), 425),
        posted(3, available=1, org_id="globex"),
    ]
    assert event_types(engine, "globex") == ["prepaid_purchase", "reservation", "prepaid_purchase"]
    assert event_types(engine, "acme") == ["prepaid_purchase", "reservation"]


def test_conflicts_become_dead_letters_and_their_neighbours_are_applied(engine: Engine) -> None:
    messages = [
        purchase("acme", credits=500),
        purchase("acme", credits=501),
        start("acme", "w1", 75),
        start("acme", "w1", 76),
        finish("acme", "w1", 70),
        finish("acme", "w1", 71),
        purchase("acme", "p2", 1),
    ]
    bought, other_purchase, started, other_start, finished, other_finish, last = apply_batch(engine, messages)
    assert [bought, started, finished, last] == [
        posted(1, available=500),
        Result("reserved", None, False, "acme", "w1", "reserved", (2,), 425),
        Result("settled", None, False, "acme", "w1", "settled", (3, 4), 430),
        posted(5, available=431),
    ]
    refused = [other_purchase, other_start, other_finish]
    assert [(letter.code, letter.error) for letter in refused if isinstance(letter, DeadLettered)] == [
        ("conflict", "wallet.purchase: p1 was applied with credits 500, so this message contradicts it"),
        ("conflict", "workflow.start: w1 was started with 75 credits, so this message contradicts it"),
        ("conflict", "workflow.finish: w1 was finished with 70 credits, so this message contradicts it"),
    ]
    letters = sql(engine, "SELECT id, body, org_id, status, traceback FROM dead_letters ORDER BY id")
    assert letters == [
        (letter.letter_id, message.body, "acme", "open", None)
        for letter, message in sorted(
            zip([letter for letter in refused if isinstance(letter, DeadLettered)], messages[1:6:2], strict=True),
            key=lambda pair: pair[0].letter_id,
        )
    ]


def test_what_the_rules_refuse_changes_nothing(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100), finish("acme", "w1", 40)])
    before = sql(engine, EVENTS, org_id="acme")
    refused = apply_batch(
        engine,
        [
            delivery("wallet.adjust", org_id="acme", adjustment_id="a1", credits=-61, reason="typo"),
            delivery("wallet.bill", org_id="acme", billing_id="b1", credits=-61),
            delivery("wallet.refund", org_id="acme", refund_id="r1", credits=41, workflow_id="w1"),
            delivery("wallet.refund", org_id="acme", refund_id="r2", credits=1, workflow_id="unknown"),
            delivery(
                "wallet.reverse", org_id="acme", reversal_id="v1", purchase_id="p1", credits=101, reason="refunded"
            ),
            delivery("wallet.reverse", org_id="acme", reversal_id="v2", purchase_id="p2", reason="refunded"),
            purchase("acme", "p2", 10**12 + 1),
            delivery("wallet.no_such", org_id="acme"),
            delivery("wallet.purchase", org_id="acme", purchase_id="p3", credits=1.5),
        ],
    )
    assert [letter.code for letter in refused if isinstance(letter, DeadLettered)] == [
        "insufficient_credits",
        "insufficient_credits",
        "refund_exceeds_usage",
        "refund_exceeds_usage",
        "reversal_exceeds_purchase",
        "unknown_purchase",
        "invalid_message",
        "unknown_task",
        "invalid_message",
    ]
    assert sql(engine, EVENTS, org_id="acme") == before
    assert audit.verify(engine).is_clean


def test_a_batch_larger_than_a_transaction_is_applied_completely_and_in_order(engine: Engine) -> None:
    messages = [purchase(f"org-{number % 50:02}", f"p{number}", 1 + number % 50) for number in range(2_500)]
    answers = apply_batch(engine, messages)
    assert answers == [
        posted(number // 50 + 1, available=(number // 50 + 1) * (1 + number % 50), org_id=f"org-{number % 50:02}")
        for number in range(2_500)
    ]
    assert sql(engine, "SELECT count(*), sum(credits) FROM credit_events") == [(2_500, 63_750)]
    assert sql(engine, "SELECT count(*), min(last_seq), max(last_seq) FROM wallets") == [(50, 50, 50)]
    assert audit.verify(engine).is_clean


def test_an_empty_batch_is_no_work(engine: Engine) -> None:
    assert apply_batch(engine, []) == []


@pytest.mark.parametrize(
    "first",
    [
        purchase("acme", credits=5),
        start("acme", "w1", 5),
        delivery("workflow.cancel", org_id="acme", workflow_id="w1"),
        delivery("wallet.configure", org_id="acme", version=1),
        delivery("wallet.unsubscribe", org_id="acme", subscription_id="s1", version=1),
    ],
    ids=lambda first: first.task,
)
def test_a_wallet_comes_into_being_with_its_first_message(engine: Engine, first: Delivery) -> None:
    apply_batch(engine, [first])
    assert sql(engine, "SELECT org_id FROM wallets") == [("acme",)]


def test_an_invalid_message_creates_no_wallet(engine: Engine) -> None:
    apply_batch(engine, [delivery("workflow.start", org_id="acme", workflow_id="w1", credits=-1)])
    assert sql(engine, "SELECT count(*) FROM wallets") == [(0,)]


def test_an_event_keeps_everything_its_message_said(engine: Engine) -> None:
    message = start(
        "acme",
        "w1",
        75,
        project_id="project-7",
        activity_name="Résumé 📄",
        source="engine-2",
        occurred_at="2026-01-31T10:00:00+02:00",
        metadata={"attempt": 2, "nested": {"list": [1.5, None, True, "žluťoučký"]}, "reason": "mine"},
        expires_in_s=60,
    )
    apply_batch(engine, [purchase("acme", credits=100), message])
    columns = "workflow_id, project_id, activity_name, source, idempotency_key, metadata - 'expires_at'"
    assert sql(engine, f"SELECT {columns} FROM credit_events WHERE seq = 2") == [
        (
            "w1",
            "project-7",
            "Résumé 📄",
            "engine-2",
            "start:w1",
            {
                "attempt": 2,
                "nested": {"list": [1.5, None, True, "žluťoučký"]},
                "reason": "mine",
                "occurred_at": "2026-01-31T08:00:00+00:00",
            },
        )
    ]
    [(held_for,)] = sql(
        engine,
        "SELECT expires_at - created_at FROM workflows JOIN credit_events USING (org_id, workflow_id)"
        " WHERE expires_at = (metadata ->> 'expires_at')::timestamptz",
    )
    assert held_for == timedelta(seconds=60)


def test_the_largest_amounts_pass_through_exactly(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=1), finish("globex", "w1", 1)])
    as_after_thousands = "UPDATE wallets SET prepaid_balance = {} WHERE org_id = '{}'"
    sql(engine, as_after_thousands.format(2**53 - 1 - 10**12, "acme"))
    sql(engine, as_after_thousands.format(10**12 - 2**53 + 1, "globex"))
    assert apply_batch(engine, [purchase("acme", "p2", 10**12), start("acme", "w1", 10**12)]) == [
        posted(2, available=9_007_199_254_740_991),
        Result("reserved", None, False, "acme", "w1", "reserved", (3,), 9_006_199_254_740_991),
    ]
    [letter] = apply_batch(engine, [purchase("acme", "p3", 1)])
    assert isinstance(letter, DeadLettered)
    assert letter.code == "balance_out_of_range"
    for workflow_id in ("w2", "w3"):  # a finish is never refused
        [answer] = apply_batch(engine, [finish("globex", workflow_id, 10**12)])
        assert isinstance(answer, Result)
        assert (answer.outcome, answer.available) == ("settled", -9_007_199_254_740_991)


def test_ids_of_every_legal_character_and_length_do_not_meet(engine: Engine) -> None:
    ids = ["a", "a:", ":a", "a:1", "a:1:2", "-", ".", "_", "A", "Z09_.:-", "x" * 128, "x" * 127]
    messages = [message for name in ids for message in (purchase("o", name, 10), start("o", name, 5))]
    answers = apply_batch(engine, messages)
    assert [answer.outcome for answer in answers if isinstance(answer, Result)] == ["posted", "reserved"] * 12
    organizations = apply_batch(engine, [purchase(name, credits=1) for name in ids])
    assert organizations == [posted(1, available=1, org_id=name) for name in ids]
    assert audit.verify(engine).is_clean


def test_two_subscriptions_whose_ids_look_like_each_others_periods_do_not_meet(engine: Engine) -> None:
    def subscribe(subscription_id: str, version: int, credits: int, age_days: int) -> Delivery:
        anchor = datetime.now(UTC).replace(microsecond=0) - timedelta(days=age_days)
        return delivery(
            "wallet.subscribe",
            org_id="acme",
            subscription_id=subscription_id,
            version=version,
            plan="team",
            monthly_credits=credits,
            rollover_limit=1_000,
            anchor=anchor.isoformat(),
        )

    answers = apply_batch(
        engine,
        [
            subscribe("s", 1, 100, age_days=40),  # in its period 1
            subscribe("s", 2, 150, age_days=40),  # version 2 within period 1
            subscribe("s:1", 3, 70, age_days=70),  # in its period 2
        ],
    )
    assert answers == [posted(1, available=100), posted(2, available=150), posted(3, available=220)]


# The cost of a batch.


@contextmanager
def counting_statements(engine: Engine) -> Iterator[Counter[str]]:
    """Count what the pooled connection sends to the server, by protocol message, as libpq itself records it."""
    sent: Counter[str] = Counter()
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, psycopg.Connection)
    with tempfile.TemporaryFile("w+") as trace:
        connection.pgconn.trace(trace.fileno())
        connection.pgconn.set_trace_flags(psycopg.pq.Trace.SUPPRESS_TIMESTAMPS)
        yield sent
        connection.pgconn.untrace()
        trace.seek(0)
        sent.update(line.rstrip("\n").split("\t")[2] for line in trace if line.startswith("F"))


def mixed(count: int) -> list[Delivery]:
    """`count` messages for ten organizations, of the kinds that a workflow engine and billing send."""
    kinds = [
        lambda org_id, n: finish(org_id, f"w{n}", 1),
        lambda org_id, n: purchase(org_id, f"p{n}", 10),
        lambda org_id, n: start(org_id, f"v{n}", 1),
        lambda org_id, n: delivery("workflow.cancel", org_id=org_id, workflow_id=f"c{n}"),
        lambda org_id, n: delivery("wallet.refund", org_id=org_id, refund_id=f"r{n}", credits=1),
    ]
    return [kinds[n % 5](f"org-{n % 10}", n) for n in range(count)]


@pytest.mark.one_server("counts the statements of one transaction on one connection")
@pytest.mark.parametrize(
    ("count", "messages", "statements"),
    [
        # BEGIN, wallets, clock, workflows; workflows, wallets, events, COMMIT
        (1, [finish(f"org-{n % 10}", f"w{n}", 1) for n in range(1)], 8),
        (10, [finish(f"org-{n % 10}", f"w{n}", 1) for n in range(10)], 8),
        (1_000, [finish(f"org-{n % 10}", f"w{n}", 1) for n in range(1_000)], 8),
        # BEGIN, wallets, clock, posted messages; wallets, posted messages, events, COMMIT
        (10, [purchase(f"org-{n % 10}", f"p{n}", 1) for n in range(10)], 8),
        # both
        (10, mixed(10), 10),
        (1_000, mixed(1_000), 10),
    ],
    ids=["1 finish", "10 finishes", "1000 finishes", "10 purchases", "10 mixed", "1000 mixed"],
)
def test_a_batch_of_any_size_is_the_same_statements_in_two_round_trips(
    engine: Engine, count: int, messages: list[Delivery], statements: int
) -> None:
    apply_batch(engine, [purchase(f"org-{n}", "first", 10_000) for n in range(10)])
    with counting_statements(engine) as sent:
        answers = apply_batch(engine, messages)
    assert [type(answer) for answer in answers] == [Result] * count
    assert sent["Bind"] == sent["Execute"] == statements
    assert sent["Sync"] == 2  # each is waited for
    assert sent["Query"] == 0  # nothing went another way


READ = """
    SELECT COALESCE(sum({}), 0)::bigint FROM pg_stat_user_tables WHERE relname <> 'alembic_version'
"""
IDLE = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND state <> 'active'
"""


def rows_read(engine: Engine) -> tuple[int, int]:
    """How many rows the database has read: all of them, and those of whole tables. Ends the pooled connections."""
    engine.dispose()
    eventually(lambda: set(on_every_server(engine, IDLE)) == {"0"})  # a session that ends tells what it has read
    every, of_whole_tables = (
        sum(map(int, on_every_server(engine, READ.format(columns))))
        for columns in ("seq_tup_read + idx_tup_fetch", "seq_tup_read")
    )
    return every, of_whole_tables


def test_a_batch_reads_the_rows_that_it_names_however_large_the_tables_are(engine: Engine) -> None:
    # Filled at once, so that the planner knows nothing of them yet.
    sql(
        engine,
        """
        INSERT INTO wallets
        SELECT 'org-' || n, 1, now(), 1000, 0, 10, 0, 0, NULL, 0, NULL, NULL, now() + interval '1 day'
        FROM generate_series(1, 20000) AS n
        """,
    )
    sql(
        engine,
        """
        INSERT INTO workflows (org_id, workflow_id, state, start_credits, start_answer, expires_at, refunded)
        SELECT org_id, 'w1', 'reserved', 10, 'reserved', next_hold_expiry, 0 FROM wallets
        """,
    )
    apply_batch(engine, [start(f"org-{n}", "w2", 5) for n in range(1, 101)])
    due = "WHERE substr(org_id, 5)::int <= 100"
    sql(engine, f"UPDATE workflows SET expires_at = {moved('expires_at', '-2 days')} {due} AND workflow_id = 'w1'")
    sql(engine, f"UPDATE wallets SET next_hold_expiry = now() - interval '1 day' {due}")
    messages = [
        message
        for n in range(1, 101)
        for message in (finish(f"org-{n}", "w1", 5), start(f"org-{n}", "w3", 5), purchase(f"org-{n}", credits=5))
    ]
    before = rows_read(engine)
    answers = apply_batch(engine, messages)
    after = rows_read(engine)
    assert Counter(answer.outcome for answer in answers if isinstance(answer, Result)) == {
        "settled": 100,
        "reserved": 100,
        "posted": 100,
    }
    assert sql(engine, "SELECT count(*) FROM credit_events WHERE metadata ->> 'reason' = 'expired'") == [(100,)]
    assert after[1] - before[1] == 0
    assert after[0] - before[0] < 10 * len(messages)


# One bad message never harms its neighbours.


def a_hundred_starts() -> list[Delivery]:
    return [start(f"org-{n % 10}", f"w{n}", 1) for n in range(100)]


def assert_only_the_42nd_became_a_dead_letter(engine: Engine, answers: Sequence[Result | DeadLettered | Waits]) -> str:
    """The dead letter's traceback."""
    assert [n for n, answer in enumerate(answers) if not isinstance(answer, Result)] == [42]
    assert Counter(answer.outcome for answer in answers if isinstance(answer, Result)) == {"reserved": 99}
    assert sql(engine, "SELECT count(*) FROM workflows WHERE state = 'reserved'") == [(99,)]
    assert sql(engine, "SELECT count(*) FROM credit_events WHERE event_type = 'reservation'") == [(99,)]
    letter = answers[42]
    assert isinstance(letter, DeadLettered)
    [(letter_id, task, org_id, body, code, error, traceback)] = sql(
        engine, "SELECT id, task, org_id, body, error_code, error, traceback FROM dead_letters"
    )
    assert (letter_id, code, error) == (letter.letter_id, letter.code, letter.error)
    assert (task, org_id, body, code) == ("workflow.start", "org-2", a_hundred_starts()[42].body, "unexpected_error")
    assert audit.verify(engine).is_clean
    assert isinstance(traceback, str)
    return traceback


def test_a_message_that_the_database_refuses_stands_alone(engine: Engine) -> None:
    apply_batch(engine, [purchase(f"org-{n}", credits=100) for n in range(10)])
    sql(
        engine,
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'the database had enough of %', NEW.workflow_id; END $$
        """,
    )
    sql(
        engine,
        """
        CREATE TRIGGER refuse BEFORE INSERT ON credit_events FOR EACH ROW
        WHEN (NEW.workflow_id = 'w42') EXECUTE FUNCTION refuse()
        """,
    )
    answers = apply_batch(engine, a_hundred_starts())
    traceback = assert_only_the_42nd_became_a_dead_letter(engine, answers)
    assert "psycopg.errors.RaiseException: the database had enough of w42" in traceback
    [error] = [answer.error for answer in answers if isinstance(answer, DeadLettered)]
    assert error.startswith("workflow.start failed unexpectedly: RaiseException: the database had enough of w42")
    # Cured, the same message is applied, like any other.
    sql(engine, "DROP TRIGGER refuse ON credit_events")
    reserved = Result("reserved", None, False, "org-2", "w42", "reserved", (11,), 90)
    assert apply_batch(engine, [a_hundred_starts()[42]]) == [reserved]


def test_a_message_that_the_rules_trip_over_stands_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_batch(engine, [purchase(f"org-{n}", credits=100) for n in range(10)])
    decide = rules.decide

    def trip(wallet: Any, message: AnyMessage, *rest: Any, **known: Any) -> Decision:
        if getattr(message, "workflow_id", None) == "w42":
            raise RuntimeError("half \ud800 and \x00")
        return decide(wallet, message, *rest, **known)

    monkeypatch.setattr(rules, "decide", trip)
    answers = apply_batch(engine, a_hundred_starts())
    traceback = assert_only_the_42nd_became_a_dead_letter(engine, answers)
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith("RuntimeError: half \\ud800 and \\x00\n")
    [error] = [answer.error for answer in answers if isinstance(answer, DeadLettered)]
    assert error == "workflow.start failed unexpectedly: RuntimeError: half \\ud800 and \\x00"


def test_an_unexpected_error_is_kept_and_told_in_bounds(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def trip(*_: Any, **known: Any) -> Decision:
        raise RuntimeError("x" * 1_000_000)

    monkeypatch.setattr(rules, "decide", trip)
    [answer] = apply_batch(engine, a_hundred_starts()[:1])
    assert isinstance(answer, DeadLettered)
    [(error, traceback)] = sql(engine, "SELECT error, traceback FROM dead_letters")
    assert error == answer.error == f"workflow.start failed unexpectedly: RuntimeError: {'x' * 3_949}…"
    assert (len(error), len(traceback)) == (4_000, 64 * 1024)
    assert traceback.startswith("…")
    assert traceback.endswith("xxx\n")
    assert len(caplog.text) < 70_000


def test_a_whole_batch_of_failing_messages_becomes_as_many_dead_letters(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trip(*_: Any, **known: Any) -> Decision:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(rules, "decide", trip)
    answers = apply_batch(engine, a_hundred_starts()[:9])
    assert [answer.code for answer in answers if isinstance(answer, DeadLettered)] == ["unexpected_error"] * 9
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(9,)]


# A fault of the database is raised, and nothing has happened.

TWO_WALLETS = [purchase("acme", "p2", 1), purchase("globex", "p2", 1)]
WAITING = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%FOR UPDATE%'
"""
WAITING_FOR_A_NODE = """
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND pid IN (SELECT citus_pid_for_gpid(waiting_gpid) FROM citus_lock_waits)
"""


def waiting_sessions(engine: Engine) -> str:
    """A query for the sessions that wait for a locked wallet."""
    return WAITING_FOR_A_NODE if is_distributed(engine) else WAITING


@contextmanager
def applying_while_locked(engine: Engine, database_url: str) -> Iterator[tuple[Future[Any], Engine, Connection]]:
    """`TWO_WALLETS` being applied and waiting, while a transaction of another engine holds the wallet of globex."""
    apply_batch(engine, [purchase("acme", credits=500), purchase("globex", credits=500)])
    other = connect(database_url)
    try:
        with ThreadPoolExecutor(1) as threads, other.connect() as holder:
            holder.execute(text("SELECT * FROM wallets WHERE org_id = 'globex' FOR UPDATE"))
            applying = threads.submit(apply_batch, engine, TWO_WALLETS)
            eventually(lambda: applying.done() or sql(other, waiting_sessions(engine)))
            yield applying, other, holder
            holder.rollback()
    finally:
        other.dispose()


POSTED_TO_ACME, POSTED_TO_GLOBEX = posted(2, available=501), posted(2, available=501, org_id="globex")


def assert_only_globex_waits(engine: Engine, answers: Sequence[Any], reason: str) -> None:
    assert answers == [POSTED_TO_ACME, Waits("globex", reason)]
    assert sql(engine, "SELECT org_id, seq FROM credit_events ORDER BY 1, 2") == [
        ("acme", 1),
        ("acme", 2),
        ("globex", 1),
    ]
    assert sql(engine, "SELECT org_id, task, reason FROM waiting_messages") == [("globex", "wallet.purchase", reason)]
    assert apply_waiting(engine, "globex", limit=10) == Applied([(TWO_WALLETS[1], POSTED_TO_GLOBEX)], None)
    assert sql(engine, "SELECT count(*) FROM waiting_messages") == [(0,)]
    assert sql(engine, "SELECT count(*) FROM dead_letters") == [(0,)]
    assert audit.verify(engine).is_clean


def test_a_terminated_backend_costs_nobody_else_anything(engine: Engine, database_url: str) -> None:
    with applying_while_locked(engine, database_url) as (applying, other, _):
        end = f"SELECT pg_terminate_backend(pid) FROM ({waiting_sessions(other)}) AS waiting"
        assert sql(other, end) == [(True,)]
        answers = applying.result(PATIENCE_S)
    assert_only_globex_waits(engine, answers, LOCKED)


def test_a_locked_wallet_is_waited_for_by_its_own_messages_alone(engine: Engine, database_url: str) -> None:
    with applying_while_locked(engine, database_url) as (applying, _, _):
        answers = applying.result(PATIENCE_S)
    assert_only_globex_waits(engine, answers, LOCKED)


@pytest.mark.one_server("the session on a node gives up waiting before it looks for a deadlock")
def test_a_deadlock_is_isolated(engine: Engine, database_url: str, services: Embedded) -> None:
    admin = connect(services.admin_url)
    sql(admin, "GRANT SET ON PARAMETER deadlock_timeout TO holdfast")
    admin.dispose()
    # Of the pooled connection: it looks before its patience ends, and after the other one has come.
    sql(engine, "SELECT set_config('deadlock_timeout', '3s', false), set_config('lock_timeout', '1min', false)")
    with applying_while_locked(engine, database_url) as (applying, _, holder):
        # The batch holds acme. It is the only one that looks for a deadlock, so it is the one that gives way.
        holder.execute(
            text("SELECT set_config('deadlock_timeout', '1min', true), set_config('lock_timeout', '1min', true)")
        )
        holder.execute(text("SELECT * FROM wallets WHERE org_id = 'acme' FOR UPDATE"))
        assert applying.result(PATIENCE_S) == [Waits("acme", LOCKED), Waits("globex", LOCKED)]
    assert apply_waiting(engine, "acme", limit=10).answers == [(TWO_WALLETS[0], POSTED_TO_ACME)]
    assert apply_waiting(engine, "globex", limit=10).answers == [(TWO_WALLETS[1], POSTED_TO_GLOBEX)]


def test_a_pooled_connection_that_died_costs_nothing(engine: Engine, database_url: str) -> None:
    apply_batch(engine, [purchase("acme", credits=500), purchase("globex", credits=500)])
    other = connect(database_url)
    sql(
        other,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        " AND datname = current_database() AND backend_type = 'client backend'",
    )
    other.dispose()
    assert apply_batch(engine, TWO_WALLETS) == [POSTED_TO_ACME, POSTED_TO_GLOBEX]


def test_a_commit_that_fails_leaves_nothing_of_its_transaction(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=500), purchase("globex", credits=500)])
    # A constraint that is only looked at by COMMIT, as the last statement of all.
    sql(
        engine,
        """
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'too late' USING ERRCODE = 'serialization_failure'; END $$
        """,
    )
    sql(
        engine,
        """
        CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON credit_events DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (NEW.org_id = 'globex') EXECUTE FUNCTION fail()
        """,
    )
    answers = apply_batch(engine, TWO_WALLETS)
    sql(engine, "DROP TRIGGER fail ON credit_events")
    # A commit that a node refuses is to the ledger as if the node had gone away.
    reason = AWAY if is_distributed(engine) else "the database does not apply its messages: too late"
    assert_only_globex_waits(engine, answers, reason)


def test_messages_of_a_database_without_tables_are_kept_for_later(empty_database_url: str) -> None:
    engine = connect(empty_database_url)
    with pytest.raises(psycopg.errors.UndefinedTable) as raised:
        apply_batch(engine, [purchase("acme", credits=500)])
    assert is_transient(raised.value)
    engine.dispose()


# What time does to a wallet happens before its next message.


def expire_holds(engine: Engine) -> None:
    sql(engine, f"UPDATE workflows SET expires_at = {moved('expires_at', '-10 days')}")
    sql(engine, f"UPDATE wallets SET next_hold_expiry = {moved('next_hold_expiry', '-10 days')}")


def test_a_hold_that_expired_does_not_count_at_decision_time(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "w1", 60), start("acme", "w2", 40)])
    expire_holds(engine)
    assert apply_batch(engine, [start("acme", "w3", 100)]) == [
        Result("reserved", None, False, "acme", "w3", "reserved", (6,), 0)
    ]
    assert sql(engine, EVENTS, org_id="acme")[3:] == [
        (4, "reservation_released", 60, 100, 0, 40, 0),
        (5, "reservation_released", 40, 100, 0, 0, 0),
        (6, "reservation", -100, 100, 0, 100, 0),
    ]
    assert sql(
        engine,
        "SELECT workflow_id, source, metadata FROM credit_events WHERE event_type = 'reservation_released'"
        " ORDER BY seq",
    ) == [("w1", "scheduler", {"reason": "expired"}), ("w2", "scheduler", {"reason": "expired"})]
    assert sql(engine, "SELECT workflow_id, state FROM workflows ORDER BY 1") == [
        ("w1", "expired"),
        ("w2", "expired"),
        ("w3", "reserved"),
    ]
    assert sql(
        engine,
        "SELECT expires_at = next_hold_expiry FROM workflows JOIN wallets USING (org_id) WHERE workflow_id = 'w3'",
    ) == [(True,)]
    assert audit.verify(engine).is_clean


def test_a_hold_that_has_not_expired_stays_when_its_neighbour_expires(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "short", 60, expires_in_s=60)])
    expire_holds(engine)
    apply_batch(engine, [start("acme", "long", 1)])
    assert sql(engine, "SELECT workflow_id, state FROM workflows ORDER BY 1") == [
        ("long", "reserved"),
        ("short", "expired"),
    ]


def test_a_workflow_that_finishes_after_its_hold_expired_is_charged(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "w1", 60)])
    expire_holds(engine)
    assert apply_batch(engine, [finish("acme", "w1", 25)]) == [
        Result("settled", None, False, "acme", "w1", "settled", (4,), 75)
    ]
    assert event_types(engine) == ["prepaid_purchase", "reservation", "reservation_released", "usage"]
    assert audit.verify(engine).is_clean


def test_periods_that_are_due_begin_before_the_message(engine: Engine) -> None:
    subscribe = delivery(
        "wallet.subscribe",
        org_id="acme",
        subscription_id="s1",
        version=1,
        plan="team",
        monthly_credits=100,
        rollover_limit=30,
        anchor="2999-01-01T00:00:00Z",
    )
    assert apply_batch(engine, [subscribe]) == [posted(available=0)]
    # 70 days are two whole months and a part of the third, whichever months they are.
    begin_schedules(engine, "now() - interval '70 days'")
    assert apply_batch(engine, [finish("acme", "w1", 110)]) == [
        Result("settled", None, False, "acme", "w1", "settled", (6,), 20)
    ]
    assert sql(engine, EVENTS, org_id="acme") == [
        (1, "subscription_credit", 100, 0, 100, 0, 0),
        (2, "adjustment", -70, 0, 30, 0, 0),
        (3, "subscription_credit", 100, 0, 130, 0, 0),
        (4, "adjustment", -100, 0, 30, 0, 0),
        (5, "subscription_credit", 100, 0, 130, 0, 0),
        (6, "usage", -110, 0, 20, 0, 110),
    ]
    assert audit.verify(engine).is_clean


def test_time_never_runs_backwards_within_a_wallet(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100)])
    sql(engine, "UPDATE wallets SET last_event_at = '2400-01-01T00:00:00Z'")
    apply_batch(engine, [purchase("acme", "p2", 100), purchase("globex", credits=100)])
    assert sql(engine, "SELECT created_at FROM credit_events WHERE org_id = 'acme' AND seq = 2") == [
        (datetime(2400, 1, 1, tzinfo=UTC),)
    ]
    assert sql(engine, "SELECT created_at < '2399-01-01' FROM credit_events WHERE org_id = 'globex'") == [(True,)]


def test_created_at_is_the_clock_of_the_database(engine: Engine) -> None:
    [(before,)] = sql(engine, "SELECT clock_timestamp()")
    apply_batch(engine, [purchase("acme", credits=100)])
    [(created_at, after)] = sql(engine, "SELECT created_at, clock_timestamp() FROM credit_events")
    assert before < created_at < after


def test_a_thousand_messages_of_the_largest_size_are_one_batch(engine: Engine) -> None:
    largest: dict[str, Any] = {
        "credits": 1,
        "activity_name": "📄" * 256,
        "project_id": "p" * 128,
        "metadata": {"note": "x" * 8_000},
    }
    organizations = [f"{n % 50:0128}" for n in range(1_000)]
    workflows = [f"{n:0128}" for n in range(1_000)]
    apply_batch(engine, [purchase(org_id, credits=1_000) for org_id in organizations[:50]])
    for task, outcome in (("workflow.start", "reserved"), ("workflow.finish", "settled")):
        messages = [
            delivery(task, org_id=org_id, workflow_id=workflow_id, **largest)
            for org_id, workflow_id in zip(organizations, workflows, strict=True)
        ]
        answers = apply_batch(engine, messages)
        assert Counter(answer.outcome for answer in answers if isinstance(answer, Result)) == {outcome: 1_000}
        assert sql(engine, "SELECT state, count(*) FROM workflows GROUP BY state") == [
            ("reserved" if outcome == "reserved" else "settled", 1_000)
        ]
    assert sql(engine, "SELECT count(*), min(length(metadata ->> 'note')) FROM credit_events WHERE seq > 1") == [
        (3_000, 8_000)
    ]
    assert audit.verify(engine).is_clean


@pytest.mark.parametrize("fails_after_s", [0, 0.05])
def test_the_error_that_counts_is_the_first_one_however_much_is_on_its_way_behind_it(
    engine: Engine, fails_after_s: float
) -> None:
    """What the statements behind it say, that they were not executed, would be a fault that passes."""
    sql(
        engine,
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep({fails_after_s}); RAISE EXCEPTION 'never'; END $$
        """,
    )
    sql(
        engine,
        """
        CREATE TRIGGER refuse BEFORE INSERT ON credit_events FOR EACH STATEMENT EXECUTE FUNCTION refuse()
        """,
    )
    messages = [start("acme", f"{n:0128}", 0, activity_name="📄" * 256) for n in range(1_000)]
    with pytest.raises(psycopg.errors.RaiseException, match="never"), raw_connection(engine) as connection:
        store._apply((), connection, messages, None)


def test_a_task_name_of_any_length_is_kept_as_a_dead_letter(engine: Engine) -> None:
    [answer] = apply_batch(engine, [delivery("".join(chr(97 + n * n % 26) for n in range(9_000)))])
    assert isinstance(answer, DeadLettered)


def test_a_transaction_that_failed_has_given_up_its_locks_before_the_next_one_begins(
    engine: Engine, database_url: str
) -> None:
    """Otherwise the next one, which skips what is locked, would leave out the wallets of this one."""
    organizations = of_one_shard(engine, 50)
    apply_batch(engine, [purchase(org_id, credits=1) for org_id in organizations])
    lock = "SELECT 1 FROM wallets WHERE org_id = ANY({}) FOR UPDATE"
    other = connect(database_url)
    with other.connect() as watching:
        for _ in range(100):
            with suppress(KeyError), raw_connection(engine) as connection:
                connection.execute("BEGIN")
                connection.execute(lock.format("%s"), [organizations])
                raise KeyError
            watching.execute(text(f"{lock.format(':organizations')} NOWAIT"), {"organizations": organizations})
            watching.rollback()
    other.dispose()
