"""The three weeks with which `holdfast up` begins."""

from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from sqlalchemy import Engine, text

from holdfast_client.messages import Grant, Refund
from ledger import audit, views
from ledger.state import EventType
from ledger.store import apply_batch, apply_past
from tests.messages import purchase
from worker.local import weeks

LAST_MIDNIGHT = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def rows(engine: Engine, query: str) -> list[Any]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


# Whatever the day of the week and the time of day.
@pytest.mark.parametrize("hours_ago", [0, *range(1, 7 * 24, 29)])
def test_the_weeks_are_a_history_as_the_ledger_writes_it(engine: Engine, hours_ago: int) -> None:
    now = LAST_MIDNIGHT - timedelta(hours=hours_ago)
    assert weeks.tell(engine, now)
    verdict = audit.verify(engine)
    assert (verdict.is_clean, verdict.open_dead_letters) == (True, 4)
    [(first, last)] = rows(engine, "SELECT min(created_at), max(created_at) FROM credit_events")
    assert timedelta(days=20) < now - first < timedelta(days=23)
    assert timedelta(minutes=1) < now - last < timedelta(minutes=10)
    types = dict(rows(engine, "SELECT event_type, count(*) FROM credit_events GROUP BY 1"))
    assert set(types) == set(get_args(EventType))
    states = dict(rows(engine, "SELECT state, count(*) FROM workflows WHERE org_id = 'northwind' GROUP BY 1"))
    assert states.pop("settled") > 100
    assert states == {"rejected": 1, "cancelled": 1, "failed": 1, "reserved": 3}
    ended = rows(engine, "SELECT DISTINCT metadata ->> 'reason' FROM credit_events WHERE source = 'scheduler'")
    assert ("grant_expired",) in ended


def test_one_customer_is_well_and_the_other_one_has_a_debt(engine: Engine) -> None:
    weeks.tell(engine, LAST_MIDNIGHT)
    with engine.connect() as connection:
        wallet, debt = (views.wallet(connection, org_id) for org_id in (weeks.ORGANIZATION, weeks.OVERDRAWN))
    assert wallet is not None
    assert wallet.prepaid_balance > 3_000
    assert wallet.subscription_balance > 500
    assert wallet.prepaid_ending == 250 + 120  # a grant, and a refund of what a plan had paid
    assert wallet.next_credits is not None
    assert wallet.next_credits.at > LAST_MIDNIGHT + timedelta(days=14)
    assert debt is not None
    assert debt.available == -410


def test_a_ledger_that_has_a_wallet_stays_as_it_is(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme")])
    assert not weeks.tell(engine, LAST_MIDNIGHT)
    assert rows(engine, "SELECT org_id FROM wallets") == [("acme",)]
    assert rows(engine, "SELECT id FROM dead_letters") == []


def test_the_weeks_are_told_once(engine: Engine) -> None:
    assert weeks.tell(engine, LAST_MIDNIGHT)
    told = rows(engine, "SELECT org_id, last_seq FROM wallets ORDER BY 1")
    assert not weeks.tell(engine, LAST_MIDNIGHT)
    assert rows(engine, "SELECT org_id, last_seq FROM wallets ORDER BY 1") == told


def test_what_falls_due_is_posted_at_its_time(engine: Engine) -> None:
    weeks.tell(engine, LAST_MIDNIGHT)
    due = rows(engine, "SELECT created_at, metadata ->> 'expires_at' FROM credit_events WHERE source = 'scheduler'")
    ended = [(at, datetime.fromisoformat(by)) for at, by in due if by is not None]
    assert len(ended) >= 2
    assert [at for at, _ in ended] == [by for _, by in ended]


def test_a_past_is_never_in_the_future_nor_before_what_is_there(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme")])
    grants = [Grant(org_id="acme", grant_id=grant_id, credits=1) for grant_id in ("early", "late")]
    apply_past(engine, list(zip((LAST_MIDNIGHT, datetime(2999, 1, 1, tzinfo=UTC)), grants, strict=True)))
    bought, early, late = (at for (at,) in rows(engine, "SELECT created_at FROM credit_events ORDER BY seq"))
    assert bought == early <= late <= datetime.now(UTC)


def test_a_past_with_a_message_that_cannot_be_applied_is_an_error(engine: Engine) -> None:
    past = [(LAST_MIDNIGHT, Refund(org_id="acme", refund_id="r", workflow_id="w", credits=1))]
    with pytest.raises(ValueError, match=r"wallet.refund cannot be applied: .*used 0 credits"):
        apply_past(engine, past)
    assert rows(engine, "SELECT seq FROM credit_events") == []
