"""Reading the ledger: the wallet as it was written last, and the pages of its credit history."""

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate, chain
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, QueuePool, text

from ledger import daily_sums, filters, history, views
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.history import Page
from ledger.state import EventType
from ledger.store import Delivery, apply_batch
from ledger.views import MOST_ENDS, Held, NextCredits, WalletView
from tests.messages import delivery, subscribe
from tests.support import another_past, reads_of, sql


def acme(task: str, **fields: Any) -> Delivery:
    return delivery(task, org_id="acme", **fields)


RED = EventFilter(project_id="red")
THREE_DAYS = EventFilter(created_from=datetime(2026, 1, 2, tzinfo=UTC), created_before=datetime(2026, 1, 5, tzinfo=UTC))


def wallet(engine: Engine, org_id: str = "acme") -> WalletView | None:
    with engine.connect() as connection:
        return views.wallet(connection, org_id)


def events(engine: Engine, matching: EventFilter = EVERY_EVENT, *, org_id: str = "acme", **page: int) -> Page:
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


def test_a_wallet_lists_the_ends_of_each_balance_and_counts_all(engine: Engine) -> None:
    plan = {"monthly_credits": 30, "plan": "old"}
    grants = [
        acme("wallet.grant", grant_id=f"g{n}", credits=10, expires_at=f"2999-01-01T00:{n // 60:02}:{n % 60:02}Z")
        for n in range(MOST_ENDS + 20)
    ]
    apply_batch(
        engine,
        [
            acme("wallet.subscribe", subscription_id="s1", version=1, **plan),
            acme("wallet.subscribe", subscription_id="s2", version=2, **plan),
            acme("wallet.purchase", purchase_id="p1", credits=500),
            *grants,
        ],
    )
    found = wallet(engine)
    assert found is not None
    assert [part.origin for part in found.ending] == ["subscription:s1:0", *(f"grant:g{n}" for n in range(MOST_ENDS))]
    assert found.prepaid_balance - found.prepaid_ending == 500


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
            subscribe("acme", anchor=anchor.isoformat()),
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
        next_credits=NextCredits("team", 200, seen.current_period_end, kept=0),
    )


def test_the_period_of_an_old_subscription_is_the_one_that_contains_now(engine: Engine) -> None:
    anchor = datetime(2024, 1, 31, 9, 30, tzinfo=UTC)
    apply_batch(engine, [subscribe("acme", anchor=anchor.isoformat())])
    seen = wallet(engine)
    assert seen is not None
    assert seen.current_period_start is not None
    assert seen.current_period_end is not None
    assert seen.current_period_start <= datetime.now(UTC) < seen.current_period_end
    assert (seen.current_period_start.hour, seen.current_period_start.minute) == (9, 30)
    assert seen.current_period_start.day in (28, 29, 30, 31)


def test_a_better_plan_within_the_period_includes_more_and_keeps_the_period(engine: Engine) -> None:
    apply_batch(engine, [subscribe("acme")])
    before = wallet(engine)
    apply_batch(engine, [subscribe("acme", version=2, plan="big", monthly_credits=300)])
    after = wallet(engine)
    assert before is not None
    assert after is not None
    assert (after.plan, after.included_this_period, after.subscription_balance) == ("big", 300, 300)
    assert (after.current_period_start, after.current_period_end) == (
        before.current_period_start,
        before.current_period_end,
    )


def test_a_subscription_that_has_not_begun_includes_nothing_yet(engine: Engine) -> None:
    apply_batch(engine, [subscribe("acme", anchor="2999-01-01T00:00:00Z")])
    seen = wallet(engine)
    assert seen is not None
    assert (seen.plan, seen.balance, seen.included_this_period) == (None, 0, 0)
    assert (seen.current_period_start, seen.current_period_end) == (None, None)


def test_an_ended_subscription_is_shown_until_its_period_ends(engine: Engine) -> None:
    apply_batch(engine, [subscribe("acme"), acme("wallet.unsubscribe", subscription_id="s1", version=2)])
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
    other = {"subscription_id": "s2", "version": 2, "plan": "other", "monthly_credits": 70}
    apply_batch(engine, [subscribe("acme"), subscribe("acme", **other)])
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
            subscribe("acme"),  # 1
            acme("wallet.purchase", purchase_id="p1", credits=500),  # 2
            acme("workflow.start", workflow_id="w1", credits=75, project_id="red", activity_name="Import"),  # 3
            acme("workflow.finish", workflow_id="w1", credits=80, metadata={"pages": 3}),  # 4 and 5
            acme("workflow.start", workflow_id="w2", credits=10, project_id="blue"),  # 6
            acme("workflow.fail", workflow_id="w2"),  # 7
            acme("wallet.grant", grant_id="g1", credits=1),  # 8
            delivery("wallet.purchase", org_id="globex", purchase_id="p1", credits=5),
        ],
    )
    with another_past(engine) as connection:
        connection.execute(text("UPDATE credit_events SET created_at = to_timestamp(1767182400 + seq * 86400)"))
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
    usage = events(ledger, EventFilter(event_types=("usage",))).events[0]
    assert [usage[column] for column in history.CUSTOMER_COLUMNS] == [
        datetime(2026, 1, 5, 12, tzinfo=UTC),
        "usage",
        "workflow-engine",
        "red",
        "Import",
        -80,
        500,
        80,
        {"pages": 3, "paid_by": {"subscription": 80}},
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
        page = events(ledger, EventFilter(event_types=tuple(event_types)))
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
        event_types=("usage", "reservation_released"),
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


# Long histories.


def write_grants(engine: Engine, org_id: str, times: list[datetime]) -> None:
    """One event at each of `times`, of which every third is a refund and every fifth of the project red.

    Every sixth is a refund of the workflow w, or every 3,000th of the workflow few. The column names neither.
    """
    sql(
        engine,
        """
        INSERT INTO credit_events
        SELECT :org_id, seq, at, CASE WHEN seq % 3 = 0 THEN 'refund' ELSE 'grant' END, 'admin', NULL,
               CASE WHEN seq % 5 = 0 THEN 'red' END, NULL, 1, seq, 0, 0, 0,
               CASE WHEN seq % 3 = 0 THEN 'refund:' ELSE 'grant:' END || seq, '{}'
        FROM unnest(CAST(:times AS timestamptz[])) WITH ORDINALITY AS event (at, seq)
        """,
        org_id=org_id,
        times=times,
    )
    sql(
        engine,
        """
        INSERT INTO posted_messages
        SELECT :org_id, 'refund', seq, CASE
               WHEN seq % 3000 = 0 THEN '{"workflow_id": "few"}'::jsonb
               WHEN seq % 6 = 0 THEN '{"workflow_id": "w"}'
               ELSE '{"workflow_id": null}' END, 'posted', NULL
        FROM generate_series(3, :most, 3) AS seq
        """,
        org_id=org_id,
        most=len(times),
    )


def test_a_range_of_time_is_found_wherever_it_begins_and_ends(engine: Engine) -> None:
    chance = random.Random(4)
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    for length in (0, 1, 2, 3, 7, 40):
        # Several events of one moment, as a batch writes them, and moments without any.
        moments = [begin + timedelta(microseconds=n) for n in accumulate(chance.choices([0, 0, 1, 2], k=length))]
        org_id = f"org-{length}"
        write_grants(engine, org_id, moments)
        numbered = list(enumerate(moments, 1))
        ends = [begin + timedelta(microseconds=n) for n in range(-1, (2 * length) + 2)]
        with engine.connect() as connection:
            for created_from, created_before in [(chance.choice(ends), chance.choice(ends)) for _ in range(25)]:
                matching = EventFilter(created_from=created_from, created_before=created_before)
                expected = [seq for seq, at in reversed(numbered) if created_from <= at < created_before]
                page = history.events(connection, org_id, matching)
                assert (seqs(page), page.total) == (expected, len(expected))
                passed = sum(at <= created_from for at in moments)
                then = history.balances_at(connection, org_id, created_from)
                assert then is not None
                assert then.prepaid_balance == passed
                until = history.find(connection, org_id, matching).steps(connection, points=1_000)
                assert until == [(moments[seq - 1], seq) for seq in reversed(expected)]
                extremes = history.find(connection, org_id, matching).lowest_and_highest(connection)
                assert extremes == ((expected[-1], expected[0]) if expected else None)


@pytest.mark.parametrize(
    ("first", "last", "begins", "ends"),
    [
        ("2026-11-22", "2026-11-22", "2026-11-22T00:00:00Z", "2026-11-23T00:00:00Z"),
        ("2026-11-22T10:00", "2026-11-22", "2026-11-22T10:00:00Z", "2026-11-23T00:00:00Z"),
        ("2026-11-22T10:00", "2026-11-22 10:00", "2026-11-22T10:00:00Z", "2026-11-22T10:00:00Z"),
        ("2026-11-23", "2026-11-23T00:00:00Z", "2026-11-23T00:00:00Z", "2026-11-23T00:00:00Z"),
        ("2026-11-22T10:00:00 02:00", "20261122T100000.5 00:30", "2026-11-22T08:00:00Z", "2026-11-22T09:30:00.5Z"),
        ("9999-12-31", "9999-12-31", "9999-12-31T00:00:00Z", "9999-12-31T23:59:59.999999Z"),
        ("0001-01-01", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"),
    ],
)
def test_a_range_is_what_a_person_means(first: str, last: str, begins: str, ends: str) -> None:
    meant = filters.time_range(filters.when(first), filters.when(last))
    assert meant == (datetime.fromisoformat(begins), datetime.fromisoformat(ends))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("2026-11-23", "2026-11-22"),
        ("2026-11-24", "2026-11-22"),
        ("2026-11-23T00:00:00Z", "2026-11-22"),
        ("2026-11-23", "2026-11-22T23:59:59Z"),
        ("2026-11-22T10:00:00Z", "2026-11-22T10:00:00+00:01"),
    ],
)
def test_a_range_does_not_end_before_it_begins(first: str, last: str) -> None:
    with pytest.raises(ValueError, match="ends before it begins"):
        filters.time_range(filters.when(first), filters.when(last))


@pytest.mark.parametrize(
    "text", ["", "soon", "2026-02-30", "2026-11-22 00:00 00:00 00:00", "2026-11-22  10:00", "10:00"]
)
def test_what_is_no_date_or_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a date or time such as"):
        filters.moment(text)


def test_the_last_representable_moment_is_after_every_event(ledger: Engine) -> None:
    last = datetime.max.replace(tzinfo=UTC)
    with ledger.connect() as connection:
        then = history.balances_at(connection, "acme", last)
        assert then is not None
        assert then.prepaid_balance == 501
    assert seqs(events(ledger, EventFilter(created_from=last))) == []
    assert len(seqs(events(ledger, EventFilter(created_before=last)))) == 8


FILTERS = [
    EVERY_EVENT,
    EventFilter(created_from=datetime(2026, 1, 1, 1, tzinfo=UTC)),
    EventFilter(created_before=datetime(2026, 1, 1, 3, tzinfo=UTC), event_types=("refund",)),
    EventFilter(project_id="red"),
    EventFilter(workflow_id="w"),
]


def test_pages_by_offset_and_by_number_are_the_same_slices(engine: Engine) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    write_grants(engine, "acme", [begin + timedelta(minutes=n) for n in range(250)])
    for matching in FILTERS:
        matches = [event["seq"] for event in history.all_events(reads_of(engine), "acme", matching)]
        for offset in range(0, len(matches) + 10, 7):
            page = events(engine, matching, limit=10, offset=offset)
            assert (seqs(page), page.total) == (matches[offset : offset + 10], len(matches))
            more = offset + 10 < len(matches)
            assert page.next_before_seq == (matches[offset + 9] if more else None)
        with engine.connect() as connection:
            for before in range(1, 260, 9):
                page = history.events(connection, "acme", matching, limit=10, before_seq=before)
                older = [seq for seq in matches if seq < before]
                assert (seqs(page), page.total) == (older[:10], len(matches))
                newer = [seq for seq in reversed(matches) if seq >= before]
                begins = newer[10] if len(newer) > 10 else None
                assert history.find(connection, "acme", matching).newer(connection, limit=10, before_seq=before) == (
                    len(newer),
                    begins,
                )


def rows_read(connection: Connection, table: str) -> int:
    """How many rows of `table` have been read in the transaction of `connection`: in Acme's shard, if there is one."""
    sql(
        connection.engine,
        """
        CREATE OR REPLACE FUNCTION rows_read(of_table text) RETURNS numeric LANGUAGE sql AS $$
            SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables
            WHERE relname ~ concat('^', of_table, '(_[0-9]+)?$')
        $$
        """,
    )
    # No row is read of the other table, which names the shard.
    read = text("SELECT rows_read(:of_table) + count(*) FROM erasures WHERE org_id = 'acme'")
    return int(connection.scalar(read, {"of_table": table}))


def events_read(connection: Connection) -> int:
    return rows_read(connection, "credit_events")


READS: dict[str, Callable[[Connection], object]] = {
    "the newest page": lambda c: history.events(c, "acme"),
    "a page far back": lambda c: history.events(c, "acme", offset=9_000),
    "a page of a range": lambda c: history.events(c, "acme", THREE_DAYS, offset=2_000),
    "what is newer": lambda c: history.find(c, "acme", EVERY_EVENT).newer(c, limit=100, before_seq=500),
    "a workflow": lambda c: history.events(c, "acme", EventFilter(workflow_id="few")),
    "a workflow that there is not, by type": lambda c: history.events(
        c, "acme", EventFilter(workflow_id="nope", event_types=("grant",))
    ),
    "balances long ago": lambda c: history.balances_at(c, "acme", datetime(2026, 1, 1, 1, tzinfo=UTC)),
    "the chart": lambda c: history.find(c, "acme", EVERY_EVENT).steps(c, points=100),
    "the extremes, where they are too many to look at": lambda c: history.find(
        c, "acme", EVERY_EVENT
    ).lowest_and_highest(c),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_does_not_grow_with_the_history(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_COMPARED", 9_999)
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    write_grants(engine, "acme", [begin + timedelta(minutes=n) for n in range(10_000)])
    sql(engine, "ANALYZE credit_events, posted_messages")
    with engine.connect() as connection:
        READS[name](connection)
        assert 0 < events_read(connection) <= 150
        assert rows_read(connection, "posted_messages") <= 20


def sum_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring the daily sums up to the last event."""
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 1)
    sql(
        engine,
        """
        INSERT INTO wallets (org_id, last_seq, last_event_at, prepaid_balance, subscription_balance, reserved,
                             period_usage, credit_limit, config_version)
        SELECT org_id, max(seq), max(created_at), max(seq), 0, 0, 0, 0, 0 FROM credit_events GROUP BY org_id
        """,
    )
    daily_sums.sum_up(engine)
    engine.dispose()  # what this connection has read may still be counted


FILTERED: dict[str, Callable[[Connection], object]] = {
    "a type": lambda c: history.events(c, "acme", EventFilter(event_types=("grant",))),
    "a type that no event has": lambda c: history.events(c, "acme", EventFilter(event_types=("usage",))),
    "a project": lambda c: history.events(c, "acme", EventFilter(project_id="red"), offset=1_500),
    "a project that no event has": lambda c: history.events(c, "acme", EventFilter(project_id="nope")),
    "both": lambda c: history.events(c, "acme", EventFilter(event_types=("refund",), project_id="red")),
    "what is newer": lambda c: history.find(c, "acme", RED).newer(c, limit=100, before_seq=1_441),  # the second day
    "three days": lambda c: history.events(c, "acme", replace(THREE_DAYS, project_id="red"), offset=500),
}


@pytest.mark.parametrize("name", FILTERED)
def test_what_a_filter_leaves_out_is_not_read(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    for org_id in ("acme", "other", "third"):
        write_grants(engine, org_id, [begin + timedelta(minutes=n) for n in range(10_000)])
    sum_up(engine, monkeypatch)
    sql(engine.execution_options(isolation_level="AUTOCOMMIT"), "VACUUM ANALYZE credit_events")
    with engine.connect() as connection:
        FILTERED[name](connection)
        assert 0 <= events_read(connection) <= 150  # the rest was told by the sums and the index


def test_of_the_day_in_which_a_range_ends_each_event_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    write_grants(engine, "acme", [begin + timedelta(minutes=n) for n in range(10_000)])
    sum_up(engine, monkeypatch)
    with engine.connect() as connection:
        since = history.find(connection, "acme", RED).newer(connection, limit=100, before_seq=500)
        assert since == (1_901, 1_000)
        assert events_read(connection) <= 24 * 60 + 150


def test_events_that_are_in_no_sum_are_passed_over_once_and_those_of_the_days_of_the_page(engine: Engine) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    write_grants(engine, "acme", [begin + timedelta(minutes=n) for n in range(3_000)])
    sql(engine, "ANALYZE credit_events")
    with engine.connect() as connection:
        assert history.events(connection, "acme", EventFilter(project_id="nope")).total == 0
        assert 3_000 <= events_read(connection) <= 3_050
        assert history.events(connection, "acme", EventFilter(project_id="red"), offset=550).total == 600
        assert 0 < events_read(connection) <= 3_050 + 3_050 + 24 * 60 + 100


def test_a_page_far_back_is_found_by_passing_over_the_newer_ones_once(engine: Engine) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    write_grants(engine, "acme", [begin + timedelta(minutes=n) for n in range(3_000)])
    matching, found = EventFilter(event_types=("grant",)), [n for n in range(3_000, 0, -1) if n % 3]
    with engine.connect() as connection:  # without statistics, so that the planner guesses wrong
        assert seqs(history.events(connection, "acme", matching, offset=1_500)) == found[1_500:1_600]
        assert events_read(connection) <= 3 * 3_000


def test_the_extremes_are_among_all_events_of_the_range(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    purchase = acme("wallet.purchase", purchase_id="p", credits=1_000)
    starts = [acme("workflow.start", workflow_id=f"w{n}", credits=n) for n in range(100, 600)]
    ends = [acme("workflow.cancel", workflow_id=f"w{n}") for n in range(100, 600)]
    apply_batch(engine, [purchase, *chain.from_iterable(zip(starts, ends, strict=True))])
    with engine.connect() as connection:
        assert history.find(connection, "acme", EVERY_EVENT).lowest_and_highest(connection) == (401, 1_000)
        for points in (2, 3, 240):
            steps = history.find(connection, "acme", EVERY_EVENT).steps(connection, points=points)
            assert (len(steps), steps[0][1], steps[-1][1]) == (points, 1_000, 1_000)
        for most, known in ((1_001, True), (1_000, False)):
            monkeypatch.setattr(history, "MAX_COMPARED", most)
            assert (history.find(connection, "acme", EVERY_EVENT).lowest_and_highest(connection) is not None) == known


# Workflows and reservations.


def test_the_events_of_a_workflow_are_its_own_and_those_of_its_refunds(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            acme("wallet.purchase", purchase_id="p1", credits=500),
            acme("workflow.start", workflow_id="w1", credits=75),
            acme("workflow.finish", workflow_id="w1", credits=80),
            acme("workflow.finish", workflow_id="w2", credits=80),
            acme("wallet.refund", refund_id="r1", credits=30, workflow_id="w1", metadata={"workflow_id": "w2"}),
            acme("wallet.refund", refund_id="r2", credits=5, metadata={"workflow_id": "w1"}),
            acme("wallet.refund", refund_id="r3", credits=999, workflow_id="w1"),  # more than it used
            acme("wallet.refund", refund_id="r4", credits=50, workflow_id="w1"),
            acme("wallet.grant", grant_id="r1", credits=1),
            delivery("workflow.finish", org_id="globex", workflow_id="w1", credits=9),
            delivery("wallet.refund", org_id="globex", refund_id="r1", credits=9, workflow_id="w1"),
        ],
    )
    found = {}
    with engine.connect() as connection:
        for workflow_id in ("w1", "w2"):
            workflow = views.workflow(connection, "acme", workflow_id)
            assert workflow is not None
            page = history.events(connection, "acme", EventFilter(workflow_id=workflow_id))
            assert (page.events, page.total) == (workflow.events[::-1], len(workflow.events))
            found[workflow_id] = [(event["event_type"], event["credits"]) for event in workflow.events]
    assert found == {
        "w1": [("reservation", -75), ("reservation_released", 75), ("usage", -80), ("refund", 30), ("refund", 50)],
        "w2": [("usage", -80)],
    }


def test_the_events_of_a_workflow_are_paged_and_combined_with_other_filters(engine: Engine) -> None:
    refunds = [acme("wallet.refund", refund_id=f"r{n}", credits=1, workflow_id="w1") for n in range(10)]
    others = [acme("wallet.grant", grant_id=f"g{n}", credits=1) for n in range(10)]
    used = [acme("workflow.finish", workflow_id=name, credits=20) for name in ("w1", "w2")]
    apply_batch(engine, [*used, *chain.from_iterable(zip(refunds, others, strict=True))])
    own = [21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1]
    [(early,)] = sql(engine, "SELECT created_at FROM credit_events WHERE seq = 1")
    with engine.connect() as connection:

        def found(limit: int = 100, offset: int = 0, before_seq: int | None = None, **also: Any) -> Page:
            matching = EventFilter(workflow_id="w1", **also)
            return history.events(connection, "acme", matching, limit=limit, offset=offset, before_seq=before_seq)

        assert (seqs(found()), found().total, found().next_before_seq) == (own, 11, None)
        assert (seqs(found(limit=4)), found(limit=4).total, found(limit=4).next_before_seq) == (own[:4], 11, 15)
        assert seqs(found(limit=4, offset=3)) == own[3:7]
        assert (seqs(found(limit=4, before_seq=15)), found(before_seq=15).total) == (own[4:8], 11)
        assert seqs(found(event_types=("usage",))) == [1]
        assert seqs(found(project_id="web")) == []
        assert seqs(found(created_before=early)) == []
        assert seqs(found(created_from=early)) == own
        newer = history.find(connection, "acme", EventFilter(workflow_id="w1"))
        assert newer.newer(connection, limit=2, before_seq=10) == (6, 15)


def test_open_reservations_are_read_page_by_page_and_counted(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            acme("wallet.purchase", purchase_id="p1", credits=500),
            *(acme("workflow.start", workflow_id=f"w{n}", credits=n) for n in range(1, 6)),
            acme("workflow.cancel", workflow_id="w2"),
            delivery("wallet.purchase", org_id="globex", purchase_id="p1", credits=5),
            delivery("workflow.start", org_id="globex", workflow_id="w1", credits=5),
        ],
    )
    with engine.connect() as connection:
        pages = [views.open_reservations(connection, org_id="acme", limit=3, offset=offset) for offset in (0, 3, 6)]
        assert [[hold.workflow_id for hold in page] for page in pages] == [["w1", "w3", "w4"], ["w5"], []]
        assert views.reservations_held(connection, "acme") == Held(reservations=4, credits=13, largest=5)
        assert views.reservations_held(connection, "initech") == Held(0, 0, 0)


def test_the_workflow_that_was_rejected_last_is_known_until_it_runs(engine: Engine) -> None:
    def last() -> tuple[str, int, str] | None:
        with engine.connect() as connection:
            found = views.last_refused(connection, "acme")
        if found is None:
            return None
        assert datetime.now(UTC) - timedelta(minutes=5) < found.at < datetime.now(UTC) + timedelta(minutes=5)
        return found.workflow_id, found.credits, found.reason

    assert last() is None
    apply_batch(engine, [acme("wallet.purchase", purchase_id="p", credits=50)])
    apply_batch(engine, [acme("workflow.start", workflow_id="z", credits=51)])
    assert last() == ("z", 51, "insufficient_credits")
    apply_batch(engine, [acme("wallet.configure", version=1, period_cap=10)])
    apply_batch(engine, [acme("workflow.start", workflow_id="a", credits=11)])
    assert last() == ("a", 11, "period_cap")
    apply_batch(engine, [acme("workflow.start", workflow_id="fits", credits=1)])
    assert last() == ("a", 11, "period_cap")
    apply_batch(engine, [acme("workflow.finish", workflow_id="a", credits=11)])
    assert last() == ("z", 51, "insufficient_credits")


def test_the_next_credits_of_a_plan_are_known(engine: Engine) -> None:
    def coming() -> tuple[str, int, int, bool] | None:
        seen = wallet(engine)
        assert seen is not None
        found = seen.next_credits
        if found is None:
            return None
        return found.plan, found.credits, found.kept, found.at == seen.current_period_end

    apply_batch(engine, [acme("wallet.purchase", purchase_id="p", credits=1)])
    assert coming() is None
    apply_batch(engine, [subscribe("acme", rollover_limit=30)])
    assert coming() == ("team", 200, 30, True)
    apply_batch(engine, [subscribe("acme", version=2, plan="small", monthly_credits=10)])
    assert coming() == ("small", 10, 0, True)
    soon = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    scheduled = {"subscription_id": "next", "anchor": soon, "plan": "big", "monthly_credits": 900}
    apply_batch(engine, [subscribe("acme", version=3, **scheduled, first_credits=300)])
    assert coming() == ("big", 300, 0, False)
    apply_batch(engine, [acme("wallet.unsubscribe", subscription_id="next", version=4)])
    apply_batch(engine, [acme("wallet.unsubscribe", subscription_id="s1", version=5)])
    assert coming() is None


# Sums, and the names of activities.


@pytest.mark.parametrize(
    "matching",
    [
        EVERY_EVENT,
        THREE_DAYS,
        RED,
        EventFilter(event_types=("usage", "reservation")),
        EventFilter(activity_names=("Import", "Export")),
        EventFilter(workflow_id="w1"),
        EventFilter(created_from=datetime(2026, 1, 8, tzinfo=UTC)),
    ],
)
def test_the_sum_of_what_matches_is_that_of_its_events(ledger: Engine, matching: EventFilter) -> None:
    with ledger.connect() as connection:
        found = history.find(connection, "acme", matching)
        rows = connection.execute(found.select()).mappings().all()
        assert rows
        assert found.totals(connection).credits == sum(row["credits"] for row in rows)
        assert history.find(connection, "nobody", matching).totals(connection).credits == 0


def test_the_events_whose_activities_contain_a_text_are_found_in_whatever_case(engine: Engine) -> None:
    names = ("Train 100% model", "Train 1000 models", "retrain_all", "Crawl")
    apply_batch(
        engine,
        [acme("workflow.finish", workflow_id=f"w{n}", credits=1, activity_name=name) for n, name in enumerate(names)]
        + [acme("wallet.purchase", purchase_id="p", credits=1)],
    )

    def found(text: str) -> list[str | None]:
        with engine.connect() as connection:
            matching = EventFilter(activity_contains=text)
            return sorted(event["activity_name"] for event in history.events(connection, "acme", matching).events)

    assert found("TRAIN") == ["Train 100% model", "Train 1000 models", "retrain_all"]
    assert found("100%") == ["Train 100% model"]
    assert found("train_") == ["retrain_all"]
    assert found("nothing") == []


# Exports.


@pytest.mark.parametrize(
    "matching", FILTERS, ids=["everything", "since", "until, by type", "by project", "by workflow"]
)
def test_an_export_is_the_history_at_its_beginning_and_holds_no_connection(
    engine: Engine, matching: EventFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "EXPORT_STEP", 20)
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    assert isinstance(engine.pool, QueuePool)
    write_grants(engine, "acme", [begin + timedelta(minutes=n) for n in range(250)])
    write_grants(engine, "globex", [begin])
    expected = [seq for page in range(3) for seq in seqs(events(engine, matching, offset=100 * page))]
    exported = []
    for event in history.all_events(reads_of(engine), "acme", matching):
        assert engine.pool.checkedout() == 0
        exported.append(event["seq"])
        if len(exported) % 10 == 1:
            added = 251 + len(exported) // 10
            sql(
                engine,
                """
                INSERT INTO credit_events
                VALUES ('acme', :seq, :at, 'refund', 'admin', NULL, 'red', NULL, 1, 1, 0, 0, 0, 'new:' || :seq, '{}')
                """,
                seq=added,
                at=begin + timedelta(minutes=added),
            )
    assert exported == expected
    assert expected[0] == max(expected)


def test_an_export_of_nothing_is_empty(engine: Engine) -> None:
    assert list(history.all_events(reads_of(engine), "acme", EVERY_EVENT)) == []
