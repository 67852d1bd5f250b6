"""The sentences about a wallet, which its page and `holdfast wallet` say."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from ledger.outlook import Term, outlook
from ledger.usage import Rate
from ledger.views import Ending, NextCredits, WalletView

NOW = datetime(2026, 11, 26, 10, 0, tzinfo=UTC)
RENEWAL = datetime(2026, 12, 4, tzinfo=UTC)
WALLET = WalletView(
    "northwind",
    balance=3_721,
    available=3_328,
    prepaid_balance=3_318,
    subscription_balance=403,
    reserved_credits=393,
    plan="Team",
)
PLAN = NextCredits("Team", 5_000, RENEWAL, kept=1_000)
ENOUGH = "About 219 a day; enough until 4 Dec, when Team adds 5,000"
UNKEPT = NextCredits("Team", 5_000, RENEWAL, kept=0)


def rate(per_day: int, *, days: float | None) -> Rate:
    return Rate(per_day, None if days is None else NOW + timedelta(days=days))


def said(view: WalletView, speed: Rate | None = None) -> tuple[str, ...]:
    return outlook(view, speed, NOW).sentences


def holding(available: int, **fields: int | None) -> WalletView:
    """A wallet of prepaid credits alone."""
    return replace(WalletView("acme", available, available, available), **fields)  # type: ignore[arg-type]


def test_what_is_available_is_a_sum() -> None:
    found = outlook(WALLET, None, NOW)
    assert (found.available, found.arithmetic) == (3_328, "3,318 prepaid + 403 plan − 393 held")
    assert found.terms == (Term(3_318, "prepaid"), Term(403, "plan"), Term(-393, "held"))
    assert sum(term.credits for term in found.terms) == found.available


@pytest.mark.parametrize(
    ("view", "arithmetic"),
    [
        (holding(0), "0 prepaid"),
        (holding(-410), "−410 prepaid"),
        (replace(WALLET, prepaid_balance=0, available=10), "403 plan − 393 held"),
        (replace(WALLET, prepaid_balance=0, subscription_balance=0, available=-393), "−393 held"),
    ],
)
def test_what_is_nothing_is_no_term(view: WalletView, arithmetic: str) -> None:
    assert outlook(view, None, NOW).arithmetic == arithmetic


@pytest.mark.parametrize(
    ("coming", "speed", "sentence"),
    [
        (PLAN, rate(219, days=15), f"{ENOUGH} (up to 1,000 unused are kept)."),
        (UNKEPT, rate(219, days=15), f"{ENOUGH}."),
        (UNKEPT, rate(219, days=None), f"{ENOUGH}."),
        (UNKEPT, rate(900, days=3), "About 900 a day; enough until about 29 Nov. On 4 Dec, Team adds 5,000."),
        (UNKEPT, rate(0, days=None), "Nothing was used in the days before today. On 4 Dec, Team adds 5,000."),
        (UNKEPT, None, "On 4 Dec, Team adds 5,000."),
        (replace(UNKEPT, at=datetime(2027, 1, 4, tzinfo=UTC)), None, "On 4 Jan 2027, Team adds 5,000."),
        (None, rate(900, days=3), "About 900 a day; enough until about 29 Nov."),
        (None, rate(1, days=365), "About 1 a day; enough for more than a year."),
        (None, rate(1, days=None), "About 1 a day; enough for more than a year."),
        (None, rate(0, days=None), "Nothing was used in the days before today."),
    ],
)
def test_how_long_it_lasts_and_what_comes_next(coming: NextCredits | None, speed: Rate | None, sentence: str) -> None:
    assert said(replace(WALLET, next_credits=coming), speed) == (sentence,)


CANCELLED = replace(
    holding(7_800, subscription_balance=7_800, prepaid_balance=0),
    plan="Team",
    plan_ends_at=RENEWAL,
    current_period_end=RENEWAL,
)


@pytest.mark.parametrize(
    ("view", "sentence"),
    [
        (CANCELLED, "About 10 a day; enough until about 4 Dec."),
        (replace(CANCELLED, reserved_credits=7_790, available=10), "About 10 a day; enough until about 27 Nov."),
        (replace(CANCELLED, available=7_820, prepaid_balance=20), "About 10 a day; enough until about 6 Dec."),
        (
            replace(CANCELLED, plan_ends_at=None, next_credits=replace(PLAN, at=RENEWAL)),
            "About 10 a day; enough until 4 Dec, when Team adds 5,000 (up to 1,000 unused are kept).",
        ),
        (
            replace(holding(530), ending=(Ending(500, NOW + timedelta(days=2), "grant:g"),)),
            "About 10 a day; enough until about 1 Dec.",
        ),
        (
            replace(holding(50), ending=(Ending(20, NOW + timedelta(days=2), "grant:g"),)),
            "About 10 a day; enough until about 1 Dec.",
        ),
        (
            replace(holding(2**53), ending=(Ending(500, NOW + timedelta(days=2), "grant:g"),)),
            "About 10 a day; enough for more than a year.",
        ),
    ],
)
def test_what_ends_unused_does_not_make_the_rest_last_longer(view: WalletView, sentence: str) -> None:
    days = min(view.available / 10, 10**6)
    assert said(view, rate(10, days=days))[0] == sentence


def test_credits_that_are_due_already_are_not_announced() -> None:
    assert said(replace(WALLET, next_credits=replace(PLAN, at=NOW))) == ()


def test_a_debt_is_said_first_and_nothing_is_enough() -> None:
    overdrawn = replace(holding(-410), next_credits=PLAN)
    assert said(overdrawn, rate(219, days=0)) == (
        "Overdrawn by 410: new runs are refused until more than that is added.",
        "On 4 Dec, Team adds 5,000 (up to 1,000 unused are kept).",
    )
    assert said(holding(0), rate(219, days=0)) == (
        "Nothing is available: new runs are refused until credits are added.",
    )


@pytest.mark.parametrize(
    ("available", "sentence"),
    [
        (100, "With a credit limit of 500, runs may reserve 600."),
        (0, "With a credit limit of 500, runs may reserve 500."),
        (-410, "With a credit limit of 500, runs may reserve 90."),
        (-500, "The credit limit of 500 is used up: new runs are refused until credits are added."),
        (-501, "The credit limit of 500 is used up: new runs are refused until more than 1 is added."),
    ],
)
def test_a_credit_limit_is_said_as_long_as_it_allows_something(available: int, sentence: str) -> None:
    assert said(holding(available, credit_limit=500)) == (sentence,)


def test_a_plan_that_was_cancelled_says_what_ends() -> None:
    starter = replace(WALLET, plan="Starter", plan_ends_at=datetime(2026, 12, 20, tzinfo=UTC), subscription_balance=70)
    assert said(starter) == ("Starter was cancelled. 70 unused credits end on 20 Dec; no more follow.",)
    assert said(replace(starter, subscription_balance=1)) == (
        "Starter was cancelled. 1 unused credit ends on 20 Dec; no more follow.",
    )
    assert said(replace(starter, subscription_balance=0)) == ("Starter was cancelled. It ends on 20 Dec.",)
    earlier = Ending(20, datetime(2026, 12, 1, tzinfo=UTC), "subscription:basic:3")
    assert said(replace(starter, ending=(earlier,))) == (
        "Starter was cancelled. 50 unused credits end on 20 Dec; no more follow.",
    )
    assert said(replace(starter, next_credits=UNKEPT)) == ("On 4 Dec, Team adds 5,000.",)


def test_the_next_end_of_prepaid_credits_is_said() -> None:
    past = Ending(5, NOW, "grant:old")
    of_plan = Ending(20, NOW + timedelta(days=1), "subscription:basic:3")
    first, second = (Ending(30, NOW + timedelta(days=days), f"grant:g{days}") for days in (2, 9))
    assert said(replace(WALLET, ending=(past, of_plan, first, second))) == ("30 of the prepaid credits end on 28 Nov.",)
    assert said(replace(WALLET, ending=(past, of_plan))) == ()


def test_a_cap_says_what_it_leaves() -> None:
    capped = replace(WALLET, period_cap=9_000, used_this_period=4_597)
    assert said(capped) == ("The cap of 9,000 leaves 4,010 to reserve in this period.",)
    assert said(replace(capped, period_cap=100)) == ("The cap of 100 leaves 0 to reserve in this period.",)
