"""What time alone does to idle wallets: periods begin and reservations expire, in order, once, and for everybody."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from ledger import audit, scheduler
from ledger.store import Delivery, apply_batch
from tests.messages import delivery, purchase, start, subscribe
from tests.support import begin_schedules, moved, sql

EVENTS = """
    SELECT event_type, credits, subscription_balance_after, idempotency_key
    FROM credit_events WHERE org_id = :org_id ORDER BY seq
"""


def subscribe_later(org_id: str, **terms: Any) -> Delivery:
    """A subscription that is scheduled: `begin` decides when it was to begin."""
    return subscribe(org_id, monthly_credits=100, anchor="2999-01-01T00:00:00Z", **terms)


def unsubscribe(org_id: str) -> Delivery:
    return delivery("wallet.unsubscribe", org_id=org_id, subscription_id="s1", version=2)


def begin(engine: Engine, anchor: datetime) -> None:
    begin_schedules(engine, ":anchor", anchor=anchor)


def days_ago(days: int) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def shift_holds(engine: Engine, shift: str) -> None:
    sql(engine, f"UPDATE workflows SET expires_at = {moved('expires_at', shift)}")
    sql(engine, f"UPDATE wallets SET next_hold_expiry = {moved('next_hold_expiry', shift)}")


def test_missed_periods_begin_one_by_one_as_if_on_time(engine: Engine) -> None:
    apply_batch(engine, [subscribe_later("acme", rollover_limit=40)])
    begin(engine, days_ago(70))  # two whole months and a part of the third, whichever months they are
    assert scheduler.post_due(engine) == 5
    assert sql(engine, EVENTS, org_id="acme") == [
        ("subscription_credit", 100, 100, "subscription:s1:0"),
        ("adjustment", -60, 40, "subscription:s1:0/ended/2"),
        ("subscription_credit", 100, 140, "subscription:s1:1"),
        ("adjustment", -100, 40, "subscription:s1:1/ended/4"),
        ("subscription_credit", 100, 140, "subscription:s1:2"),
    ]
    assert sql(engine, "SELECT DISTINCT source FROM credit_events") == [("scheduler",)]
    assert sql(engine, "SELECT period, period_granted FROM subscriptions") == [(2, 100)]
    assert sql(engine, "SELECT next_period_at > now() FROM wallets") == [(True,)]
    assert audit.verify(engine).is_clean


def test_periods_of_an_anchor_at_a_month_end_are_clamped_and_counted_from_the_anchor(engine: Engine) -> None:
    apply_batch(engine, [subscribe_later("acme")])
    begin(engine, datetime(2024, 1, 31, 9, 30, tzinfo=UTC))
    scheduler.post_due(engine)
    periods = sql(
        engine,
        "SELECT metadata ->> 'period_start', metadata ->> 'period_end' FROM credit_events"
        " WHERE event_type = 'subscription_credit' ORDER BY seq",
    )
    assert [start for start, _ in periods[:14]] == [
        "2024-01-31T09:30:00+00:00",
        "2024-02-29T09:30:00+00:00",
        "2024-03-31T09:30:00+00:00",
        "2024-04-30T09:30:00+00:00",
        "2024-05-31T09:30:00+00:00",
        "2024-06-30T09:30:00+00:00",
        "2024-07-31T09:30:00+00:00",
        "2024-08-31T09:30:00+00:00",
        "2024-09-30T09:30:00+00:00",
        "2024-10-31T09:30:00+00:00",
        "2024-11-30T09:30:00+00:00",
        "2024-12-31T09:30:00+00:00",
        "2025-01-31T09:30:00+00:00",
        "2025-02-28T09:30:00+00:00",
    ]
    assert [end for _, end in periods[:-1]] == [start for start, _ in periods[1:]]
    last_start, last_end = map(datetime.fromisoformat, periods[-1])
    assert last_start <= datetime.now(UTC) < last_end
    assert sql(engine, "SELECT next_period_at FROM wallets") == [(last_end,)]
    assert audit.verify(engine).is_clean


def test_more_wallets_than_one_chunk_are_all_caught_up(engine: Engine) -> None:
    assert scheduler.CHUNK == 500
    organizations = [f"org-{n:04}" for n in range(1_100)]
    apply_batch(engine, [subscribe_later(org_id) for org_id in organizations])
    begin(engine, days_ago(40))
    assert scheduler.post_due(engine) == 3_300
    assert sql(engine, "SELECT last_seq, subscription_balance, count(*) FROM wallets GROUP BY 1, 2") == [
        (3, 100, 1_100)
    ]
    assert scheduler.post_due(engine) == 0
    assert audit.verify(engine).is_clean


def test_chunks_of_wallets_due_at_different_times_leave_nobody_out(engine: Engine) -> None:
    organizations = [f"org-{n:04}" for n in range(1_100)]
    apply_batch(engine, [subscribe_later(org_id) for org_id in organizations])
    # Groups of seven share a moment, and the moments run against the order of the names.
    begin_schedules(engine, "now() - interval '40 days' - (right(org_id, 4)::int / 7) * interval '1 second'")
    assert scheduler.post_due(engine) == 3_300


def test_a_second_run_finds_nothing_to_do(engine: Engine) -> None:
    apply_batch(
        engine, [subscribe_later("acme"), purchase("globex", credits=100), start("globex", "w1", expires_in_s=60)]
    )
    begin(engine, days_ago(40))
    shift_holds(engine, "-1 day")
    assert (scheduler.post_due(engine), scheduler.release_expired(engine)) == (3, 1)
    before = sql(engine, "SELECT * FROM wallets ORDER BY org_id")
    assert (scheduler.post_due(engine), scheduler.release_expired(engine)) == (0, 0)
    assert sql(engine, "SELECT * FROM wallets ORDER BY org_id") == before


def test_nothing_is_due_before_its_time(engine: Engine) -> None:
    apply_batch(engine, [subscribe_later("acme"), purchase("acme", credits=100), start("acme", "w1", expires_in_s=60)])
    assert (scheduler.post_due(engine), scheduler.release_expired(engine)) == (0, 0)
    assert sql(engine, "SELECT last_seq FROM wallets") == [(2,)]


def test_what_is_left_of_an_ended_subscription_expires_with_its_period(engine: Engine) -> None:
    apply_batch(engine, [subscribe_later("acme", rollover_limit=1_000)])
    begin(engine, days_ago(10))
    assert scheduler.post_due(engine) == 1
    apply_batch(engine, [unsubscribe("acme")])
    assert scheduler.post_due(engine) == 0  # until the period ends, the credits stay
    assert sql(engine, "SELECT subscription_balance FROM wallets") == [(100,)]
    sql(engine, "UPDATE wallets SET next_period_at = now() - interval '90 days'")
    assert scheduler.post_due(engine) == 1
    assert sql(engine, EVENTS, org_id="acme") == [
        ("subscription_credit", 100, 100, "subscription:s1:0"),
        ("adjustment", -100, 0, "subscription:s1:0/ended/2"),
    ]
    assert sql(engine, "SELECT subscription_id, next_period_at FROM wallets") == [(None, None)]
    assert scheduler.post_due(engine) == 0
    assert audit.verify(engine).is_clean


def test_a_wallet_that_cannot_be_caught_up_becomes_a_dead_letter_and_stops_nobody(engine: Engine) -> None:
    organizations = ["acme", "broken", "globex", "initech"]
    apply_batch(engine, [subscribe_later(org_id) for org_id in organizations])
    begin(engine, days_ago(40))
    sql(
        engine,
        """
        UPDATE wallets SET subscription_id = scheduled_id, next_period_at = scheduled_at,
          scheduled_id = NULL, scheduled_at = NULL WHERE org_id = 'broken';
        DELETE FROM subscriptions WHERE org_id = 'broken'
        """,
    )
    assert scheduler.post_due(engine) == 9
    assert sql(engine, "SELECT org_id, last_seq FROM wallets ORDER BY org_id") == [
        ("acme", 3),
        ("broken", 0),
        ("globex", 3),
        ("initech", 3),
    ]
    assert scheduler.post_due(engine) == 0
    [(task, org_id, body, code, traceback, attempts)] = sql(
        engine, "SELECT task, org_id, body, error_code, traceback, attempts FROM dead_letters"
    )
    assert (task, org_id, code, attempts) == ("subscriptions.post_due", "broken", "unexpected_error", 2)
    assert body == b'[[{"org_id": "broken"}], {}, {}]'
    assert isinstance(traceback, str)
    assert "KeyError" in traceback


def test_expired_holds_are_released_and_the_next_expiry_is_the_next_open_one(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            purchase("acme", credits=100),
            start("acme", "first", expires_in_s=60),
            start("acme", "second", expires_in_s=120),
            start("acme", "third", expires_in_s=86_400),
            start("acme", "fourth", expires_in_s=90_000),
        ],
    )
    shift_holds(engine, "-10 minutes")
    assert scheduler.release_expired(engine) == 2
    assert sql(
        engine,
        "SELECT workflow_id, event_type, credits, source, metadata, reserved_after FROM credit_events"
        " WHERE seq > 5 ORDER BY seq",
    ) == [
        ("first", "reservation_released", 10, "scheduler", {"reason": "expired"}, 30),
        ("second", "reservation_released", 10, "scheduler", {"reason": "expired"}, 20),
    ]
    assert sql(engine, "SELECT workflow_id, state FROM workflows ORDER BY expires_at") == [
        ("first", "expired"),
        ("second", "expired"),
        ("third", "reserved"),
        ("fourth", "reserved"),
    ]
    assert sql(
        engine,
        "SELECT next_hold_expiry = expires_at FROM wallets JOIN workflows USING (org_id) WHERE workflow_id = 'third'",
    ) == [(True,)]
    shift_holds(engine, "-10 days")
    assert scheduler.release_expired(engine) == 2
    assert sql(engine, "SELECT reserved, next_hold_expiry FROM wallets") == [(0, None)]
    assert audit.verify(engine).is_clean


def test_an_expiry_that_was_settled_meanwhile_is_forgotten_without_an_event(engine: Engine) -> None:
    finish = delivery("workflow.finish", org_id="acme", workflow_id="w1", credits=5)
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "w1", expires_in_s=60), finish])
    shift_holds(engine, "-10 minutes")
    assert scheduler.release_expired(engine) == 0
    assert sql(engine, "SELECT reserved, next_hold_expiry, last_seq FROM wallets") == [(0, None, 4)]


@pytest.mark.parametrize("run", [scheduler.post_due, scheduler.release_expired])
def test_a_wallet_with_a_period_and_a_hold_due_gets_both_from_either_run(
    engine: Engine, run: Callable[[Engine], int]
) -> None:
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "w1", expires_in_s=60), subscribe_later("acme")])
    begin(engine, days_ago(10))
    shift_holds(engine, "-1 day")
    assert run(engine) == 2
    assert [row[0] for row in sql(engine, EVENTS, org_id="acme")] == [
        "prepaid_purchase",
        "reservation",
        "subscription_credit",
        "reservation_released",
    ]
    assert audit.verify(engine).is_clean
