"""Reading the ledger: the wallet as it was written last, and the pages of its credit history."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from ledger import history
from ledger.history import EventFilter, Page, WalletView
from ledger.state import EventType
from ledger.store import Delivery, apply_batch
from tests.support import delivery, sql


def acme(task: str, **fields: Any) -> Delivery:
    return delivery(task, org_id="acme", **fields)


def subscribe(**fields: Any) -> Delivery:
    terms = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 200}
    return acme("wallet.subscribe", **(terms | fields))


EVERYTHING = EventFilter()


def wallet(engine: Engine, org_id: str = "acme") -> WalletView | None:
    with engine.connect() as connection:
        return history.wallet(connection, org_id)


def events(engine: Engine, matching: EventFilter = EVERYTHING, *, org_id: str = "acme", **page: int) -> Page:
    with engine.connect() as connection:
        return history.events(connection, org_id, matching, **page)


def seqs(page: Page) -> list[int]:
    return [event["seq"] for event in page.events]


# The wallet.


def test_an_unknown_organization_has_no_wallet(engine: Engine) -> None:
    apply_batch(engine, [acme("wallet.purchase", purchase_id="p1", credits=500)])
    assert wallet(engine, "acm") is None
    assert wallet(engine, "ACME") is None
    assert wallet(engine, "") is None
    assert wallet(engine, "acme' OR true --") is None


def test_a_wallet_without_a_subscription(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            acme("wallet.purchase", purchase_id="p1", credits=500),
            acme("wallet.configure", version=1, credit_limit=10, period_cap=1_000),
            acme("workflow.start", workflow_id="w1", credits=75),
            acme("workflow.finish", workflow_id="w2", credits=30),
        ],
    )
    assert wallet(engine) == WalletView(
        org_id="acme",
        balance=470,
        available=395,
        prepaid_balance=470,
        subscription_balance=0,
        reserved_credits=75,
        credit_limit=10,
        period_cap=1_000,
        used_this_period=30,
        included_this_period=0,
        plan=None,
        current_period_start=None,
        current_period_end=None,
    )


def test_a_wallet_in_a_period_of_its_subscription(engine: Engine) -> None:
    anchor = datetime.now(UTC).replace(microsecond=0) - timedelta(days=5)
    apply_batch(
        engine,
        [
            acme("wallet.purchase", purchase_id="p1", credits=500),
            subscribe(anchor=anchor.isoformat()),
            acme("workflow.finish", workflow_id="w1", credits=230),
        ],
    )
    seen = wallet(engine)
    assert seen is not None
    assert seen.current_period_end is not None
    assert timedelta(days=28) <= seen.current_period_end - anchor <= timedelta(days=31)
    assert seen == WalletView(
        org_id="acme",
        balance=470,
        available=470,
        prepaid_balance=470,
        subscription_balance=0,
        reserved_credits=0,
        credit_limit=0,
        period_cap=None,
        used_this_period=230,
        included_this_period=200,
        plan="team",
        current_period_start=anchor,
        current_period_end=seen.current_period_end,
    )


def test_the_period_of_an_old_subscription_is_the_one_that_contains_now(engine: Engine) -> None:
    anchor = datetime(2024, 1, 31, 9, 30, tzinfo=UTC)
    apply_batch(engine, [subscribe(anchor=anchor.isoformat())])
    seen = wallet(engine)
    assert seen is not None
    assert seen.current_period_start is not None
    assert seen.current_period_end is not None
    assert seen.current_period_start <= datetime.now(UTC) < seen.current_period_end
    assert (seen.current_period_start.hour, seen.current_period_start.minute) == (9, 30)
    assert seen.current_period_start.day in (28, 29, 30, 31)


def test_a_better_plan_within_the_period_includes_more_and_keeps_the_period(engine: Engine) -> None:
    apply_batch(engine, [subscribe()])
    before = wallet(engine)
    apply_batch(engine, [subscribe(version=2, plan="big", monthly_credits=300)])
    after = wallet(engine)
    assert before is not None
    assert after is not None
    assert (after.plan, after.included_this_period, after.subscription_balance) == ("big", 300, 300)
    assert (after.current_period_start, after.current_period_end) == (
        before.current_period_start,
        before.current_period_end,
    )


def test_a_subscription_that_has_not_begun_includes_nothing_yet(engine: Engine) -> None:
    apply_batch(engine, [subscribe(anchor="2999-01-01T00:00:00Z")])
    seen = wallet(engine)
    assert seen is not None
    assert (seen.plan, seen.balance, seen.included_this_period) == ("team", 0, 0)
    assert (seen.current_period_start, seen.current_period_end) == (None, None)


def test_an_ended_subscription_is_shown_until_its_period_ends(engine: Engine) -> None:
    apply_batch(engine, [subscribe(), acme("wallet.unsubscribe", subscription_id="s1", version=2)])
    seen = wallet(engine)
    assert seen is not None
    assert (seen.plan, seen.balance, seen.included_this_period) == ("team", 200, 200)
    assert seen.current_period_end is not None
    sql(engine, "UPDATE wallets SET next_period_at = now() - interval '1 day'")
    apply_batch(engine, [acme("workflow.cancel", workflow_id="w1")])
    seen = wallet(engine)
    assert seen is not None
    assert (seen.plan, seen.balance, seen.included_this_period) == (None, 0, 0)
    assert (seen.current_period_start, seen.current_period_end) == (None, None)


def test_the_wallet_shows_the_subscription_that_allocates_now(engine: Engine) -> None:
    apply_batch(engine, [subscribe(), subscribe(subscription_id="s2", plan="other", monthly_credits=70)])
    seen = wallet(engine)
    assert seen is not None
    assert (seen.plan, seen.included_this_period) == ("other", 70)


@pytest.mark.parametrize("subscription_id", ["s:1", ":", "Z09_.:-" + "x" * 121])
def test_odd_but_legal_ids_are_found(engine: Engine, subscription_id: str) -> None:
    org_id = "Z09_.:-" + "x" * 121
    message = {"org_id": org_id, "version": 1, "plan": "% team_", "monthly_credits": 200}
    apply_batch(engine, [delivery("wallet.subscribe", subscription_id=subscription_id, **message)])
    seen = wallet(engine, org_id)
    assert seen is not None
    assert (seen.org_id, seen.plan, seen.included_this_period) == (org_id, "% team_", 200)
    assert seen.current_period_start is not None
    assert seqs(events(engine, org_id=org_id)) == [1]


# The events.


@pytest.fixture
def ledger(engine: Engine) -> Engine:
    """Eight events of acme, one a day from 1 January 2026 at noon, and one of globex."""
    apply_batch(
        engine,
        [
            subscribe(),  # 1
            acme("wallet.purchase", purchase_id="p1", credits=500),  # 2
            acme("workflow.start", workflow_id="w1", credits=75, project_id="red", activity_name="Import"),  # 3
            acme("workflow.finish", workflow_id="w1", credits=80, metadata={"pages": 3}),  # 4 and 5
            acme("workflow.start", workflow_id="w2", credits=10, project_id="blue"),  # 6
            acme("workflow.fail", workflow_id="w2"),  # 7
            acme("wallet.grant", grant_id="g1", credits=1),  # 8
            delivery("wallet.purchase", org_id="globex", purchase_id="p1", credits=5),
        ],
    )
    sql(engine, "ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only")
    sql(engine, "UPDATE credit_events SET created_at = '2025-12-31T12:00:00Z'::timestamptz + seq * interval '1 day'")
    sql(engine, "ALTER TABLE credit_events ENABLE TRIGGER credit_events_append_only")
    return engine


def test_events_come_newest_first_and_are_nobody_elses(ledger: Engine) -> None:
    page = events(ledger)
    assert seqs(page) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert page.total == 8
    assert {event["org_id"] for event in page.events} == {"acme"}
    assert seqs(events(ledger, org_id="globex")) == [1]


def test_an_unknown_organization_has_no_events(ledger: Engine) -> None:
    page = events(ledger, org_id="initech")
    assert (page.events, page.total) == ([], 0)


def test_an_event_has_the_columns_that_a_customer_sees(ledger: Engine) -> None:
    assert history.CUSTOMER_COLUMNS == (
        "created_at",
        "event_type",
        "source",
        "project_id",
        "activity_name",
        "credits",
        "prepaid_balance_after",
        "period_usage_after",
        "metadata",
    )
    usage = events(ledger, EventFilter(event_types=["usage"])).events[0]
    assert [usage[column] for column in history.CUSTOMER_COLUMNS] == [
        datetime(2026, 1, 5, 12, tzinfo=UTC),
        "usage",
        "workflow-engine",
        "red",
        "Import",
        -80,
        500,
        80,
        {"pages": 3},
    ]
    assert (usage["seq"], usage["workflow_id"], usage["subscription_balance_after"]) == (5, "w1", 120)
    assert usage["created_at"].utcoffset() == timedelta(0)


RANGES = [
    (None, None, [8, 7, 6, 5, 4, 3, 2, 1]),
    (datetime(2026, 1, 3, 12, tzinfo=UTC), None, [8, 7, 6, 5, 4, 3]),
    (datetime(2026, 1, 3, 12, 0, 0, 1, tzinfo=UTC), None, [8, 7, 6, 5, 4]),
    (None, datetime(2026, 1, 3, 12, tzinfo=UTC), [2, 1]),
    (None, datetime(2026, 1, 3, 12, 0, 0, 1, tzinfo=UTC), [3, 2, 1]),
    (datetime(2026, 1, 3, 12, tzinfo=UTC), datetime(2026, 1, 5, 12, tzinfo=UTC), [4, 3]),
    (datetime(2026, 1, 3, tzinfo=UTC), datetime(2026, 1, 4, tzinfo=UTC), [3]),  # a whole day
    (datetime(2026, 1, 3, 12, tzinfo=UTC), datetime(2026, 1, 3, 12, tzinfo=UTC), []),
    (datetime(2026, 1, 5, tzinfo=UTC), datetime(2026, 1, 3, tzinfo=UTC), []),
    (datetime.fromisoformat("2026-01-03T14:00:00+02:00"), datetime(2026, 1, 4, tzinfo=UTC), [3]),
]


def test_a_range_of_dates_includes_its_beginning_and_not_its_end(ledger: Engine) -> None:
    for created_from, created_before, expected in RANGES:
        page = events(ledger, EventFilter(created_from=created_from, created_before=created_before))
        assert (seqs(page), page.total) == (expected, len(expected)), (created_from, created_before)


TYPES: list[tuple[list[EventType], list[int]]] = [
    ([], [8, 7, 6, 5, 4, 3, 2, 1]),
    (["reservation"], [6, 3]),
    (["reservation", "reservation_released"], [7, 6, 4, 3]),
    (["usage", "grant", "subscription_credit", "usage"], [8, 5, 1]),
    (["billing"], []),
]


def test_events_are_filtered_by_any_of_several_types(ledger: Engine) -> None:
    for event_types, expected in TYPES:
        page = events(ledger, EventFilter(event_types=event_types))
        assert (seqs(page), page.total) == (expected, len(expected)), event_types


PROJECTS = [("red", [5, 4, 3]), ("blue", [7, 6]), ("green", []), ("re", []), ("RED", []), ("%", []), ("", [])]


def test_events_are_filtered_by_their_project(ledger: Engine) -> None:
    for project_id, expected in PROJECTS:
        page = events(ledger, EventFilter(project_id=project_id))
        assert (seqs(page), page.total) == (expected, len(expected)), project_id


def test_all_conditions_hold_at_once(ledger: Engine) -> None:
    matching = EventFilter(
        created_from=datetime(2026, 1, 4, tzinfo=UTC),
        created_before=datetime(2026, 1, 8, tzinfo=UTC),
        event_types=["usage", "reservation_released"],
        project_id="red",
    )
    page = events(ledger, matching)
    assert (seqs(page), page.total) == ([5, 4], 2)


PAGES = [
    (3, 0, [8, 7, 6]),
    (3, 3, [5, 4, 3]),
    (3, 6, [2, 1]),
    (3, 8, []),
    (1, 7, [1]),
    (100, 0, [8, 7, 6, 5, 4, 3, 2, 1]),
    (1, 2**62, []),
]


def test_a_page_is_a_part_of_all_that_match(ledger: Engine) -> None:
    for limit, offset, expected in PAGES:
        page = events(ledger, limit=limit, offset=offset)
        assert (seqs(page), page.total) == (expected, 8), (limit, offset)


def test_a_page_of_what_is_filtered_counts_only_that(ledger: Engine) -> None:
    page = events(ledger, EventFilter(project_id="red"), limit=1, offset=1)
    assert (seqs(page), page.total) == ([4], 3)


def test_a_page_has_a_hundred_events_unless_told_and_never_more(engine: Engine) -> None:
    apply_batch(engine, [acme("wallet.purchase", purchase_id=f"p{n}", credits=1) for n in range(150)])
    page = events(engine)
    assert (seqs(page), page.total) == (list(range(150, 50, -1)), 150)
    for limit in (0, -1, 101):
        with pytest.raises(AssertionError):
            events(engine, limit=limit)
    with pytest.raises(AssertionError):
        events(engine, offset=-1)


@pytest.mark.parametrize("project_id", ["a:b", "-", "Z09_.:-" + "x" * 121])
def test_projects_of_odd_but_legal_ids_are_found(engine: Engine, project_id: str) -> None:
    apply_batch(
        engine,
        [
            acme("workflow.start", workflow_id="-.:_", credits=0, project_id=project_id),
            acme("workflow.start", workflow_id="other", credits=0, project_id="other"),
        ],
    )
    page = events(engine, EventFilter(project_id=project_id))
    assert [event["workflow_id"] for event in page.events] == ["-.:_"]
