"""The sums of usage: exact, whatever the scheduler has summed already, and quick for years of events."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from itertools import combinations, pairwise, product
from typing import Any, get_args

import pytest
from sqlalchemy import Connection, Engine, text

from ledger import audit, daily_sums, history, usage
from ledger.database import snapshot
from ledger.filters import EventFilter
from ledger.store import apply_batch
from ledger.usage import Group, Rate, Share, Usage
from tests.messages import delivery
from tests.support import another_past, sql

DAYS = 12
BEGIN = datetime(2026, 2, 20, 12, 30, tzinfo=UTC)
EVERY_GROUP: tuple[Group, ...] = get_args(Group)


def spread(engine: Engine, org_id: str) -> None:
    """Give the events of `org_id` times that are spread evenly over DAYS, from BEGIN on."""
    with another_past(engine) as connection:
        connection.execute(
            text("""
                UPDATE credit_events SET created_at = timezone('UTC', timezone('UTC', CAST(:begin AS timestamptz))
                    + :length * (seq - 1) / (SELECT last_seq FROM wallets WHERE org_id = :org_id))
                WHERE org_id = :org_id
            """),
            {"begin": BEGIN, "length": timedelta(days=DAYS), "org_id": org_id},
        )
        connection.execute(
            text("""
                UPDATE wallets SET last_event_at = (SELECT max(created_at) FROM credit_events WHERE org_id = :org_id)
                WHERE org_id = :org_id
            """),
            {"org_id": org_id},
        )


@pytest.fixture
def used(engine: Engine) -> list[dict[str, Any]]:
    """What a ledger of two organizations has used, run by run, of `acme` only."""
    choices = random.Random(4)
    messages = [delivery("wallet.grant", org_id=org_id, grant_id="g", credits=500) for org_id in ("acme", "globex")]
    for number in range(300):
        fields: dict[str, Any] = {"workflow_id": f"w{number}", "credits": choices.choice((0, 1, 7, 500))}
        if project := choices.choice(("red", "blue", None)):
            fields["project_id"] = project
        if activity := choices.choice(("Crawl", "Train 'em", None)):
            fields["activity_name"] = activity
        fields["source"] = choices.choice(("engine-1", "engine-2"))
        messages += [delivery("workflow.finish", org_id=org_id, **fields) for org_id in ("acme", "globex")]
    apply_batch(engine, messages)
    spread(engine, "acme")
    rows = sql(
        engine,
        "SELECT created_at, project_id, activity_name, source, -credits FROM credit_events"
        " WHERE org_id = 'acme' AND event_type = 'usage' ORDER BY seq",
    )
    assert len(rows) == 300
    return [
        {
            "at": at,
            "project": project_id,
            "activity": activity_name,
            "source": source,
            "day": f"{at.astimezone(UTC):%Y-%m-%d}",
            "month": f"{at.astimezone(UTC):%Y-%m}",
            "credits": amount,
        }
        for at, project_id, activity_name, source, amount in rows
    ]


RANGES = [
    (None, None),
    (datetime(2026, 2, 22, tzinfo=UTC), None),
    (None, datetime(2026, 3, 1, tzinfo=UTC)),
    (datetime(2026, 2, 22, tzinfo=UTC), datetime(2026, 2, 28, tzinfo=UTC)),
    (datetime(2026, 2, 22, 7, 1, tzinfo=UTC), datetime(2026, 2, 28, 23, 59, 59, 999_999, tzinfo=UTC)),
    (datetime(2026, 2, 22, 7, tzinfo=UTC), datetime(2026, 2, 22, 20, tzinfo=UTC)),
    (datetime(2026, 2, 22, 20, tzinfo=UTC), datetime(2026, 2, 23, 4, tzinfo=UTC)),
    (datetime(2026, 2, 25, tzinfo=UTC), datetime(2026, 2, 25, tzinfo=UTC)),
    (datetime(2030, 1, 1, tzinfo=UTC), None),
    (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)),
    (datetime.max.replace(tzinfo=UTC), None),
]


def of(engine: Engine, *group_by: Group, org_id: str = "acme", **between: Any) -> Usage:
    with engine.connect() as connection:
        return usage.usage(connection, org_id, group_by, **between)


def agrees(engine: Engine, used: list[dict[str, Any]]) -> bool:
    """Whether every grouping of every range is the sum of its runs."""
    with snapshot(engine) as connection:
        return _agrees(connection, used)


def _agrees(connection: Connection, used: list[dict[str, Any]]) -> bool:
    for created_from, created_before in RANGES:
        runs = [
            run
            for run in used
            if (created_from is None or run["at"] >= created_from)
            and (created_before is None or run["at"] < created_before)
        ]
        for group_by in [(), *combinations(EVERY_GROUP, 1), *combinations(EVERY_GROUP, 2)]:
            found = usage.usage(connection, "acme", group_by, created_from=created_from, created_before=created_before)
            credits_of, runs_of = Counter[tuple[Any, ...]](), Counter[tuple[Any, ...]]()
            for run in runs:
                key = tuple(run[name] for name in group_by)
                credits_of[key] += run["credits"]
                runs_of[key] += 1
            groups = {tuple(group[name] for name in group_by): group for group in found.groups}
            assert len(groups) == len(found.groups)
            if group_by:
                assert {key: (group["credits"], group["runs"]) for key, group in groups.items()} == {
                    key: (credits_of[key], runs_of[key]) for key in runs_of
                }
            assert (found.credits, found.runs) == (sum(run["credits"] for run in runs), len(runs))
            assert not found.truncated
    return True


MATCHING = [
    EventFilter(),
    EventFilter(created_from=datetime(2026, 2, 22, tzinfo=UTC)),
    EventFilter(created_before=datetime(2026, 2, 28, 12, tzinfo=UTC), project_id="red"),
    EventFilter(created_from=datetime(2026, 2, 22, 7, tzinfo=UTC), activity_names=("Crawl", "Train 'em")),
    EventFilter(project_id="blue", activity_names=("Crawl",)),
    EventFilter(created_from=datetime(2030, 1, 1, tzinfo=UTC)),
]


def breaks_down(engine: Engine, used: list[dict[str, Any]]) -> bool:
    """Whether every breakdown is that of its runs."""
    for matching, most, (by, each) in product(MATCHING, (1, 2, 5), [("project", "day"), ("activity", "month")]):
        runs = [
            run
            for run in used
            if (matching.created_from is None or run["at"] >= matching.created_from)
            and (matching.created_before is None or run["at"] < matching.created_before)
            and matching.project_id in (None, run["project"])
            and (not matching.activity_names or run["activity"] in matching.activity_names)
        ]
        with engine.connect() as connection:
            of_usage = history.find(connection, "acme", usage.usage_of(matching))
            found = usage.breakdown(connection, of_usage, stacked_by=by, each=each, most=most)  # type: ignore[arg-type]

        def shares(name: str, runs: list[dict[str, Any]] = runs, most: int = most) -> list[Share]:
            credits_of, runs_of = Counter[str | None](), Counter[str | None]()
            for run in runs:
                credits_of[run[name]] += run["credits"]
                runs_of[run[name]] += 1
            return [Share(each, amount, runs_of[each]) for each, amount in credits_of.most_common(most)]

        assert found.projects == shares("project")
        assert found.activities == shares("activity")
        assert (found.credits, found.runs) == (sum(run["credits"] for run in runs), len(runs))
        large = {share.name for share in shares(by)}
        bars = Counter[tuple[str, str | None, bool]]()
        for run in runs:
            is_other = run[by] not in large
            bars[run[each], None if is_other else run[by], is_other] += run["credits"]
        assert {(bar.time, bar.name, bar.is_other): bar.credits for bar in found.bars} == bars
        assert [bar.time for bar in found.bars] == sorted(bar.time for bar in found.bars)
    return True


def test_what_used_the_credits_is_the_sum_of_the_events_whatever_is_summed_already(
    engine: Engine, used: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert breaks_down(engine, used)
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 1)
    monkeypatch.setattr(daily_sums, "STEP", 200)
    next(daily_sums.steps(engine))
    assert breaks_down(engine, used)
    daily_sums.sum_up(engine)
    assert breaks_down(engine, used)


def test_every_sum_is_that_of_the_events_whatever_is_summed_already(
    engine: Engine, used: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert agrees(engine, used)
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 1)
    monkeypatch.setattr(daily_sums, "STEP", 70)
    for _, summed in zip(range(3), daily_sums.steps(engine), strict=False):
        assert summed == 70
        assert agrees(engine, used)
    assert daily_sums.sum_up(engine) == 2 * 301 - 210
    assert agrees(engine, used)
    assert daily_sums.sum_up(engine) == 0
    assert agrees(engine, used)
    assert audit.verify(engine).is_clean


def test_few_events_are_not_summed(engine: Engine, used: list[dict[str, Any]]) -> None:
    assert daily_sums.sum_up(engine) == 0
    assert sql(engine, "SELECT * FROM daily_sums") == []


def test_two_schedulers_at_once_sum_each_event_once(
    engine: Engine, used: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 1)
    monkeypatch.setattr(daily_sums, "STEP", 10)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(daily_sums.sum_up, [engine] * 4))
    daily_sums.sum_up(engine)
    assert sql(engine, "SELECT org_id, seq FROM daily_sums_through ORDER BY 1") == [("acme", 301), ("globex", 301)]
    assert agrees(engine, used)
    assert audit.verify(engine).is_clean


def test_groups_come_by_time_and_then_the_largest_first(engine: Engine, used: list[dict[str, Any]]) -> None:
    days = of(engine, "day", "project").groups
    assert [group["day"] for group in days] == sorted(group["day"] for group in days)
    for _, one, other in ((one["day"], one, other) for one, other in pairwise(days) if one["day"] == other["day"]):
        assert one["credits"] >= other["credits"]
    sums = [group["credits"] for group in of(engine, "activity", "source").groups]
    assert sums == sorted(sums, reverse=True)


def test_too_many_groups_leave_out_the_smallest_and_the_total_has_all(
    engine: Engine, used: list[dict[str, Any]]
) -> None:
    every = of(engine, "day", "project")
    some = of(engine, "day", "project", most=5)
    assert some.truncated
    assert (some.credits, some.runs) == (every.credits, every.runs)
    largest = sorted((group["credits"] for group in every.groups), reverse=True)[:5]
    assert sorted((group["credits"] for group in some.groups), reverse=True) == largest


def test_an_unknown_organization_has_used_nothing(engine: Engine, used: list[dict[str, Any]]) -> None:
    assert of(engine, "project", org_id="nobody") == Usage([], 0, 0, truncated=False)


def test_verify_finds_a_sum_that_is_wrong(
    engine: Engine, used: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daily_sums, "NOT_SUMMED", 1)
    daily_sums.sum_up(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE daily_sums SET credits = 1 WHERE org_id = 'acme' AND day = '2026-02-24'"))
    [broken] = [finding for finding in audit.verify(engine).findings if finding.offenders]
    assert broken.check.name == "daily sums"
    assert {org_id for org_id, _ in broken.offenders} == {"acme"}


# The rate.


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        (0, None),
        (2, None),
        (3, Rate(14, None)),
        (9, Rate(6, None)),
    ],
)
def test_the_rate_is_the_mean_of_the_last_full_days_and_none_while_there_are_fewer_than_three(
    engine: Engine, days: int, expected: Rate | None
) -> None:
    today = datetime.combine(date(2026, 5, 10), datetime.min.time(), UTC)
    apply_batch(
        engine,
        [
            delivery("wallet.purchase", org_id="acme", purchase_id="p", credits=100),
            delivery("workflow.finish", org_id="acme", workflow_id="w", credits=42),
        ],
    )
    with another_past(engine) as connection:
        began_at = today - timedelta(days=days)
        connection.execute(
            text("UPDATE credit_events SET created_at = CASE seq WHEN 1 THEN :began ELSE :used END"),
            {"began": began_at, "used": max(began_at, today - timedelta(days=2))},
        )
    now = today + timedelta(hours=6)
    with engine.connect() as connection:
        found = usage.rate(connection, "acme", available=58, now=now)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert found.credits_per_day == expected.credits_per_day
    assert found.lasts_until is not None
    full_days = min(7, days)
    assert abs(found.lasts_until - (now + timedelta(days=58 * full_days / 42))) < timedelta(seconds=1)


def test_what_is_overdrawn_lasts_until_now_and_what_is_never_used_for_ever(engine: Engine) -> None:
    today = datetime(2026, 5, 10, tzinfo=UTC)
    apply_batch(
        engine,
        [delivery("wallet.purchase", org_id=org_id, purchase_id="p", credits=100) for org_id in ("acme", "globex")]
        + [delivery("workflow.finish", org_id="acme", workflow_id="w", credits=170)],
    )
    with another_past(engine) as connection:
        connection.execute(text("UPDATE credit_events SET created_at = '2026-05-01T00:00:00Z'"))
    with engine.connect() as connection:
        assert usage.rate(connection, "acme", available=-70, now=today) == Rate(0, None)
        assert usage.rate(connection, "globex", available=100, now=today) == Rate(0, None)
        in_range = today - timedelta(days=5)
        overdrawn = usage.rate(connection, "acme", available=-70, now=in_range)
    assert overdrawn == Rate(43, in_range)
