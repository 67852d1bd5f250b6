"""The banner of the customer's page: what it says first, for every state of a wallet, and when it says nothing."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from api_stub.banner import REFUSED_FOR, Banner, banner
from ledger.usage import Rate
from ledger.views import Ending, NextCredits, NextPlan, Refused, WalletView

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
END = datetime(2026, 12, 4, tzinfo=UTC)
PREPAID = WalletView("acme", balance=1_000, available=1_000, prepaid_balance=1_000)
TEAM = replace(
    PREPAID,
    plan="Team",
    subscription_balance=70,
    included_this_period=5_000,
    current_period_start=datetime(2026, 11, 4, tzinfo=UTC),
    current_period_end=END,
    next_credits=NextCredits("Team", 5_000, END, 0),
)
CANCELLED = replace(TEAM, plan_ends_at=END, next_credits=None)
ADDED = "you top up, or until 4 Dec, when Team adds 5,000."
LIFTED = "4 Dec, when the next period begins, or the cap is raised."
AGAIN = "Then start it again, as a new run."
REFUSED = Refused("nightly-3", 500, "insufficient_credits", NOW - timedelta(hours=2))


def said(wallet: WalletView | None, **given: Any) -> Banner | None:
    known: dict[str, Any] = {"speed": None, "largest_held": 0, "refused": None, "now": NOW}
    return banner(wallet, **(known | given))


def words(wallet: WalletView, **given: Any) -> str:
    found = said(wallet, **given)
    assert found is not None
    return f"{'!' if found.is_urgent else ''}{found.title} {found.text}"


@pytest.mark.parametrize("wallet", [None, PREPAID, TEAM, replace(TEAM, period_cap=9_000)])
def test_where_nothing_has_to_be_done_nothing_is_said(wallet: WalletView | None) -> None:
    assert said(wallet, speed=Rate(1_000, None), largest_held=1_000) is None


@pytest.mark.parametrize(
    ("wallet", "sentences"),
    [
        (replace(PREPAID, available=-410), "!Overdrawn by 410. New runs are refused until you top up."),
        (
            replace(TEAM, available=-410),
            f"!Overdrawn by 410. New runs are refused until {ADDED}",
        ),
        (replace(TEAM, available=-5_000), "!Overdrawn by 5,000. New runs are refused until you top up."),
        (replace(PREPAID, available=0), "!There are no credits. New runs are refused until you top up."),
        (
            replace(PREPAID, available=-500, credit_limit=500),
            "!The credit limit of 500 is used up. New runs are refused until you top up.",
        ),
        (
            replace(PREPAID, available=-900, credit_limit=500),
            "!The credit limit of 500 is used up. New runs are refused until you top up.",
        ),
    ],
)
def test_who_has_no_credits_is_told_that_runs_are_refused(wallet: WalletView, sentences: str) -> None:
    assert words(wallet) == sentences


def test_a_debt_within_the_credit_limit_is_no_alarm() -> None:
    assert said(replace(PREPAID, available=-100, credit_limit=500)) is None


@pytest.mark.parametrize(
    ("wallet", "sentences"),
    [
        (CANCELLED, "Team was cancelled. 70 unused credits end on 4 Dec; no more follow."),
        (
            replace(CANCELLED, subscription_balance=1),
            "Team was cancelled. 1 unused credit ends on 4 Dec; no more follow.",
        ),
        (replace(CANCELLED, subscription_balance=0), "Team was cancelled. It ends on 4 Dec; no more credits follow."),
        (
            replace(
                CANCELLED,
                ending=(Ending(30, NOW, "subscription:old:3"), Ending(9, NOW, "grant:welcome")),
            ),
            "Team was cancelled. 40 unused credits end on 4 Dec; no more follow.",
        ),
        (
            replace(CANCELLED, plan_ends_at=datetime(2027, 1, 2, tzinfo=UTC)),
            "Team was cancelled. 70 unused credits end on 2 Jan 2027; no more follow.",
        ),
    ],
)
def test_a_cancelled_plan_is_told(wallet: WalletView, sentences: str) -> None:
    assert words(wallet) == sentences


def test_a_plan_that_another_one_follows_was_not_cancelled() -> None:
    assert said(replace(CANCELLED, next_plan=NextPlan("Pro", 9_000, END))) is None


@pytest.mark.parametrize(
    ("cap", "changes", "sentences"),
    [
        (
            100,
            {"used_this_period": 100},
            f"!The cap of 100 for this period is reached. New runs are refused until {LIFTED}",
        ),
        (
            100,
            {"used_this_period": 80, "reserved_credits": 25},
            f"!The cap of 100 for this period is reached. New runs are refused until {LIFTED}",
        ),
        (
            100,
            {"used_this_period": 80, "reserved_credits": 10},
            f"Only 10 left of this period's cap of 100. Runs that are estimated higher are refused until {LIFTED}",
        ),
        (
            100,
            {"used_this_period": 95, "current_period_end": None},
            "Only 5 left of the cap of 100. Runs that are estimated higher are refused until the cap is raised.",
        ),
        (100, {"used_this_period": 80, "reserved_credits": 9}, None),
        (
            0,
            {"current_period_end": None},
            "!The cap of 0 is reached. New runs are refused until the cap is raised.",
        ),
    ],
)
def test_a_cap_that_is_reached_or_nearly_is_told(cap: int, changes: dict[str, Any], sentences: str | None) -> None:
    wallet = replace(TEAM, period_cap=cap, **changes)
    assert (said(wallet) and words(wallet)) == sentences


@pytest.mark.parametrize(
    ("known", "sentences"),
    [
        ({}, None),
        ({"speed": Rate(6, None), "largest_held": 6}, None),
        (
            {"speed": Rate(7, None)},
            f"Only 6 left. Runs that are estimated higher are refused until {ADDED}",
        ),
        (
            {"largest_held": 9_000, "speed": Rate(1, None)},
            "Only 6 left. Runs that are estimated higher are refused until you top up.",
        ),
    ],
)
def test_little_is_less_than_a_day_uses_or_the_largest_run_holds(known: dict[str, Any], sentences: str | None) -> None:
    wallet = replace(TEAM, available=6)
    assert (said(wallet, **known) and words(wallet, **known)) == sentences


def test_what_can_be_owed_counts_as_left() -> None:
    assert said(replace(TEAM, available=-6, credit_limit=20), largest_held=14) is None
    assert words(replace(PREPAID, available=-6, credit_limit=20), largest_held=15) == (
        "Only 14 left. Runs that are estimated higher are refused until you top up."
    )


@pytest.mark.parametrize(
    ("wallet", "refused", "text"),
    [
        (replace(PREPAID, available=6), REFUSED, "Top up at least 494 credits, then start it again, as a new run."),
        (replace(PREPAID, available=499), REFUSED, "Top up at least 1 credit, then start it again, as a new run."),
        (PREPAID, REFUSED, "There is room for it now: start it again, as a new run."),
        (
            replace(TEAM, period_cap=1_000, used_this_period=501),
            replace(REFUSED, reason="period_cap"),
            "Wait until 4 Dec, when the next period begins, or the cap is raised, then start it again, as a new run.",
        ),
        (
            replace(TEAM, period_cap=499),
            replace(REFUSED, reason="period_cap"),
            "Wait until the cap is raised, then start it again, as a new run.",
        ),
        (
            replace(TEAM, available=6, period_cap=1_000, used_this_period=501),
            REFUSED,
            f"It lacks 494 credits, and would pass the cap: top up, and wait until {LIFTED} {AGAIN}",
        ),
        (
            replace(TEAM, available=499, period_cap=499),
            REFUSED,
            f"It lacks 1 credit, and would pass the cap: top up, and wait until the cap is raised. {AGAIN}",
        ),
        (
            replace(TEAM, period_cap=1_000, used_this_period=500),
            replace(REFUSED, reason="period_cap"),
            "There is room for it now: start it again, as a new run.",
        ),
    ],
)
def test_a_run_that_was_refused_is_told_with_what_to_do(wallet: WalletView, refused: Refused, text: str) -> None:
    assert said(wallet, refused=refused) == Banner("A run was refused.", text, is_urgent=False, refused=refused)


def test_a_run_that_was_refused_long_ago_is_not_told() -> None:
    assert said(PREPAID, refused=replace(REFUSED, at=NOW - REFUSED_FOR)) is not None
    assert said(PREPAID, refused=replace(REFUSED, at=NOW - REFUSED_FOR - timedelta(seconds=1))) is None


def test_the_most_important_comes_first_and_has_the_refused_run_with_it() -> None:
    everything = replace(CANCELLED, available=-1, period_cap=10, used_this_period=10, credit_limit=0)
    titles = []
    for wallet in (
        everything,
        replace(everything, available=5),
        replace(everything, available=5, plan_ends_at=None),
        replace(everything, available=5, plan_ends_at=None, period_cap=None),
        PREPAID,
    ):
        found = said(wallet, largest_held=50, refused=REFUSED)
        assert found is not None
        assert found.refused == REFUSED
        titles.append(found.title)
    assert titles == [
        "Overdrawn by 1.",
        "Team was cancelled.",
        "The cap of 10 for this period is reached.",
        "Only 5 left.",
        "A run was refused.",
    ]
