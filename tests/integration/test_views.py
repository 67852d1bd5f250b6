"""The wallet as its owner sees it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine

from ledger import views
from ledger.store import apply_batch
from ledger.views import NextCredits
from tests.messages import delivery, subscribe

LATER = datetime(2099, 1, 31, tzinfo=UTC)
TERMS: dict[str, Any] = {"monthly_credits": 200, "rollover_limit": 50}


def next_credits(engine: Engine) -> NextCredits | None:
    with engine.connect() as connection:
        view = views.wallet(connection, "acme")
    assert view is not None
    return view.next_credits


def period_end(engine: Engine) -> datetime:
    with engine.connect() as connection:
        view = views.wallet(connection, "acme")
    assert view is not None
    assert view.current_period_end is not None
    return view.current_period_end


def test_a_plan_that_goes_on_gives_its_credits_when_the_period_ends(engine: Engine) -> None:
    apply_batch(engine, [subscribe("acme", **TERMS)])
    assert next_credits(engine) == NextCredits("team", 200, period_end(engine), kept=50)
    apply_batch(engine, [subscribe("acme", **TERMS | {"version": 2, "plan": "small", "monthly_credits": 80})])
    assert next_credits(engine) == NextCredits("small", 80, period_end(engine), kept=50)


def test_a_plan_that_was_ended_gives_nothing_more(engine: Engine) -> None:
    ended = delivery("wallet.unsubscribe", org_id="acme", subscription_id="s1", version=2)
    apply_batch(engine, [subscribe("acme", **TERMS), ended])
    assert next_credits(engine) is None


def test_a_wallet_without_a_plan_gets_nothing_from_one(engine: Engine) -> None:
    apply_batch(engine, [delivery("wallet.configure", org_id="acme", version=1)])
    assert next_credits(engine) is None


@pytest.mark.parametrize("has_plan", [False, True])
def test_a_plan_that_begins_later_is_next_unless_another_one_gives_something_before(
    engine: Engine, has_plan: bool
) -> None:
    later = subscribe("acme", subscription_id="s2", version=2, plan="large", monthly_credits=900, anchor=str(LATER))
    apply_batch(engine, [*[subscribe("acme", **TERMS)] * has_plan, later])
    of_current = NextCredits("team", 200, period_end(engine), kept=50) if has_plan else None
    assert next_credits(engine) == (of_current or NextCredits("large", 900, LATER, kept=0))
