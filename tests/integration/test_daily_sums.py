"""The daily sums: whatever is summed already, every count, sum and page is that of the events."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import accumulate, count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, insert

from ledger import audit, daily_sums, history
from ledger.database import snapshot
from ledger.filters import EventFilter
from ledger.history import Totals
from ledger.store import apply_batch
from ledger.tables import credit_events
from tests.messages import delivery
from tests.support import sql

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine

BEGIN = datetime(2026, 2, 27, 22, tzinfo=UTC)


@dataclass(frozen=True)
class Entry:
    """An event, as far as filters look at it."""

    seq: int
    at: datetime
    event_type: str
    project_id: str | None
    activity_name: str | None
    credits: int

    def meets(self, matching: EventFilter) -> bool:
        return (
            (matching.created_from is None or self.at >= matching.created_from)
            and (matching.created_before is None or self.at < matching.created_before)
            and (not matching.event_types or self.event_type in matching.event_types)
            and (matching.project_id is None or self.project_id == matching.project_id)
            and (not matching.activity_names or self.activity_name in matching.activity_names)
        )


# Few values, so that most filters match something, and pauses of minutes as well as of days.
_described = st.tuples(
    st.sampled_from([timedelta(0), timedelta(minutes=50), timedelta(hours=2), timedelta(hours=7), timedelta(days=2)]),
    st.sampled_from(["grant", "refund", "adjustment"]),
    st.sampled_from([None, "red", "blue"]),
    st.sampled_from([None, "Crawl", "Train 'em"]),
    st.integers(1, 10**12),
)
_moments = st.one_of(
    st.none(),
    st.integers(-3, 90).map(lambda hours: BEGIN + timedelta(hours=hours)),
    st.integers(-1, 9).map(lambda days: datetime(2026, 2, 28, tzinfo=UTC) + timedelta(days=days)),
)
_filters = st.builds(
    EventFilter,
    created_from=_moments,
    created_before=_moments,
    event_types=st.lists(st.sampled_from(["grant", "refund", "adjustment", "usage"]), max_size=3).map(tuple),
    project_id=st.sampled_from([None, None, "red", "blue", "", "nope"]),
    activity_names=st.lists(st.sampled_from(["Crawl", "Train 'em", "", "nope"]), max_size=2).map(tuple),
)

_places: st.SearchStrategy[dict[str, int]] = st.one_of(
    st.fixed_dictionaries({"offset": st.integers(0, 65)}), st.fixed_dictionaries({"before_seq": st.integers(1, 70)})
)


@st.composite
def _histories(draw: st.DrawFn) -> list[Entry]:
    described = draw(st.lists(_described, max_size=60))
    moments: Iterator[datetime] = accumulate((each[0] for each in described), operator.add, initial=BEGIN)
    return [
        Entry(seq, at, kind, project, activity, -amount if kind == "adjustment" and amount % 2 else amount)
        for seq, at, (_, kind, project, activity, amount) in zip(count(1), moments, described, strict=False)
    ]


def write(engine: Engine, org_id: str, entries: Sequence[Entry], *, summed: Sequence[int]) -> None:
    """Write a history, and sum it up in as many transactions as `summed` has numbers: up to each of them."""
    balances = accumulate(entry.credits for entry in entries)
    rows: list[dict[str, Any]] = [
        {
            "org_id": org_id,
            "seq": entry.seq,
            "created_at": entry.at,
            "event_type": entry.event_type,
            "source": "admin",
            "project_id": entry.project_id,
            "activity_name": entry.activity_name,
            "credits": entry.credits,
            "prepaid_balance_after": balance,
            "subscription_balance_after": 0,
            "reserved_after": 0,
            "period_usage_after": 0,
            "idempotency_key": f"test:{entry.seq}",
            "metadata": {},
        }
        for entry, balance in zip(entries, balances, strict=True)
    ]
    if rows:
        with engine.begin() as connection:
            connection.execute(insert(credit_events), rows)
    sql(
        engine,
        """
        INSERT INTO wallets (org_id, last_seq, last_event_at, prepaid_balance, subscription_balance, reserved,
                             period_usage, credit_limit, config_version)
        VALUES (:org_id, 0, NULL, 0, 0, 0, 0, 0, 0)
        """,
        org_id=org_id,
    )
    for last in sorted(summed):
        sql(
            engine,
            "UPDATE wallets SET last_seq = :last, last_event_at = now() WHERE org_id = :org_id AND last_seq < :last",
            org_id=org_id,
            last=last,
        )
        daily_sums._sum_some(engine, org_id)


def test_every_total_and_every_page_is_that_of_the_events_whatever_is_summed_already(engine: Engine) -> None:
    numbers = count()

    @settings(max_examples=settings().max_examples // 2)
    @given(_histories(), st.data())
    def check(entries: list[Entry], data: st.DataObject) -> None:
        org_id = f"org-{next(numbers)}"
        write(engine, org_id, entries, summed=data.draw(st.lists(st.integers(0, len(entries)), max_size=3)))
        for _ in range(3):
            matching = data.draw(_filters)
            agrees(org_id, entries, matching, data.draw(st.integers(1, 9)), data.draw(_places))

    def agrees(org_id: str, entries: list[Entry], matching: EventFilter, limit: int, place: dict[str, Any]) -> None:
        matches = [entry for entry in reversed(entries) if entry.meets(matching)]
        before = place.get("before_seq", len(entries) + 1)
        older = [entry.seq for entry in matches if entry.seq < before][place.get("offset", 0) :]
        newer = [entry.seq for entry in reversed(matches) if entry.seq >= before]
        total = Totals(len(matches), sum(entry.credits for entry in matches))
        with snapshot(engine) as ledger:
            found = history.find(ledger, org_id, matching)
            assert found.totals(ledger) == total
            page = found.page(ledger, limit=limit, **place)
            assert [event["seq"] for event in page.events] == older[:limit]
            assert (page.total, page.credits) == total
            assert page.next_before_seq == (older[limit - 1] if len(older) > limit else None)
            begins = newer[limit] if len(newer) > limit else None
            assert found.newer(ledger, limit=limit, before_seq=before) == (len(newer), begins)

    check()
    [wrong] = [finding for finding in audit.verify(engine).findings if finding.check.name == "daily sums"]
    assert wrong.offenders == []


def test_the_events_of_a_workflow_have_totals_too(engine: Engine) -> None:
    apply_batch(
        engine,
        [
            delivery("workflow.finish", org_id="acme", workflow_id="w1", credits=80),
            delivery("workflow.finish", org_id="acme", workflow_id="w2", credits=7),
            delivery("wallet.refund", org_id="acme", refund_id="r1", credits=30, workflow_id="w1"),
        ],
    )
    matching = EventFilter(workflow_id="w1")
    with snapshot(engine) as ledger:
        assert history.find(ledger, "acme", matching).totals(ledger) == Totals(2, -50)
        used = replace(matching, event_types=("usage",))
        assert history.find(ledger, "acme", used).totals(ledger) == Totals(1, -80)
        granted = replace(matching, event_types=("grant",))
        assert history.find(ledger, "acme", granted).totals(ledger) == Totals(0, 0)


def test_a_day_may_begin_with_a_small_number_and_end_with_a_large_one(engine: Engine) -> None:
    write_many = """
        INSERT INTO credit_events
        SELECT 'acme', seq, :begin, 'grant', 'admin', NULL, CASE WHEN seq IN (20000, 40000) THEN 'red' END, NULL, 1,
               seq, 0, 0, 0, 'test:' || seq, '{}'
        FROM generate_series(1, 40000) AS seq
    """
    sql(engine, write_many, begin=BEGIN)
    with snapshot(engine) as ledger:
        page = history.events(ledger, "acme", EventFilter(project_id="red"))
    assert [event["seq"] for event in page.events] == [40_000, 20_000]


@pytest.mark.parametrize(
    ("summed", "rows", "expected"),
    [
        (0, 100, False),
        (0, 99, True),
        (96, 9, False),  # two days of two sums each, a day of one, and the four events that are in none
        (96, 8, True),
        (96, 3, True),
    ],
)
def test_how_much_is_read_is_known_before_it_is_read(engine: Engine, summed: int, rows: int, expected: bool) -> None:
    entries = [
        Entry(seq, BEGIN + timedelta(hours=seq // 2), "grant", "red" if seq % 2 and seq < 40 else None, None, 1)
        for seq in range(1, 101)
    ]
    write(engine, "acme", entries, summed=[summed])
    with snapshot(engine) as ledger:
        found = history.find(ledger, "acme", EventFilter(project_id="red"))
        assert found.reads_more_than(ledger, rows) is expected


def test_only_wallets_with_many_new_events_are_summed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 3)
    grants: list[Any] = [
        delivery("wallet.grant", org_id=org_id, grant_id=f"g{number}", credits=1)
        for org_id, number_of_events in (("few", 2), ("many", 3), ("more", 5))
        for number in range(number_of_events)
    ]
    apply_batch(engine, grants)
    assert sorted(daily_sums.steps(engine)) == [3, 5]
    assert daily_sums.sum_up(engine) == 0
