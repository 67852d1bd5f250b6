"""Sums over all organizations: exact, of one moment, and of every kind of event."""

from dataclasses import asdict
from datetime import timedelta
from typing import Any, get_args

from sqlalchemy import Engine, event

from ledger.database import connect
from ledger.state import EventType
from ledger.store import apply_batch
from ledger.totals import read
from tests.messages import delivery, finish, purchase, start, subscribe
from tests.support import sql


def by_kind(engine: Engine, **a_range: Any) -> dict[tuple[str, str | None], tuple[int, int]]:
    """The number and the sum of every kind of event that there is."""
    events = read(engine, **a_range).events
    return {(each.event_type, each.reason): (each.events, each.credits) for each in events if each.events}


def test_an_empty_ledger_adds_up_to_nothing_of_every_type(engine: Engine) -> None:
    totals = read(engine)
    sums = {name: value for name, value in asdict(totals).items() if name not in ("at", "events")}
    assert sums == dict.fromkeys(sums, 0) | {"created_from": None, "created_before": None}
    assert [each.event_type for each in totals.events] == list(get_args(EventType))
    assert {(each.reason, each.events, each.credits) for each in totals.events} == {(None, 0, 0)}


def test_balances_and_events_are_added_over_all_organizations(engine: Engine) -> None:
    messages = [
        purchase("a", credits=1_000),
        purchase("b", credits=500),
        subscribe("b", monthly_credits=200),
        start("a", "run", 300),
        finish("a", "run", 250),
        start("b", "run", 100),
        finish("c", "run", 70),  # below zero
        delivery("wallet.adjust", org_id="a", adjustment_id="x", credits=-5, reason="expired"),
        delivery("wallet.grant", org_id="a", grant_id="late", credits=9, expires_at="2020-01-01T00:00:00Z"),
    ]
    apply_batch(engine, messages)
    totals = read(engine)
    assert (totals.wallets, totals.balance, totals.available, totals.reserved_credits) == (3, 1_375, 1_275, 100)
    assert (totals.prepaid_balance, totals.subscription_balance) == (1_175, 200)
    assert by_kind(engine) == {
        ("prepaid_purchase", None): (2, 1_500),
        ("subscription_credit", None): (1, 200),
        ("grant", None): (1, 9),
        ("adjustment", None): (1, -5),
        ("adjustment", "grant_expired"): (1, -9),
        ("reservation", None): (2, -400),
        ("reservation_released", None): (1, 300),
        ("usage", None): (2, -320),
    }
    assert sum(each.credits for each in totals.events) == totals.available


def test_a_range_includes_its_begin_and_not_its_end(engine: Engine) -> None:
    for number in range(3):
        apply_batch(engine, [purchase("a", f"p{number}", 10**number)])
    first, second, third = (at for (at,) in sql(engine, "SELECT created_at FROM credit_events ORDER BY seq"))
    everything = ("prepaid_purchase", None)
    assert by_kind(engine, created_from=second) == {everything: (2, 110)}
    assert by_kind(engine, created_before=third) == {everything: (2, 11)}
    assert by_kind(engine, created_from=first, created_before=second) == {everything: (1, 1)}
    assert by_kind(engine, created_from=third + timedelta(seconds=1)) == {}
    assert read(engine, created_from=third).available == 111


def test_sums_are_exact_beyond_the_largest_integer_of_the_database(engine: Engine) -> None:
    apply_batch(engine, [purchase(f"org-{number}", credits=1) for number in range(2_000)])
    sql(engine, "UPDATE wallets SET prepaid_balance = 9007199254740991")
    assert read(engine).prepaid_balance == read(engine).available == 2_000 * (2**53 - 1) > 2**63


def test_what_is_applied_meanwhile_does_not_count(engine: Engine, database_url: str) -> None:
    apply_batch(engine, [purchase("a", "p1", 5)])
    other = connect(database_url)

    @event.listens_for(engine, "after_cursor_execute")
    def apply_one_more(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "FROM wallets" in statement:
            apply_batch(other, [purchase("b", "p1", 7)])

    totals = read(engine)
    assert (totals.wallets, totals.available, sum(each.credits for each in totals.events)) == (1, 5, 5)
    other.dispose()
    [(events,)] = sql(engine, "SELECT count(*) FROM credit_events")
    assert events == 2
