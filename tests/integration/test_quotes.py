"""Quotes and previews say what comes of a message, whatever is due in the wallet, and change nothing."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from holdfast_client.messages import InvalidMessage, parse
from holdfast_client.results import Limit, Result
from ledger import quotes
from ledger.database import connect
from ledger.roles import READER
from ledger.state import Quote, Refusal, Wallet
from ledger.store import apply_batch
from tests.messages import delivery, finish, purchase, start, subscribe
from tests.support import as_role, begin_schedules, sql

STATE = "SELECT (SELECT count(*) FROM credit_events), (SELECT array_agg(wallets.*::text) FROM wallets)"


def quote(database_url: str, org_id: str, credits: int) -> Quote:
    """As the API asks: as the reader, in one snapshot that only reads."""
    engine = connect(as_role(READER, database_url), keeps_connections=False)
    with engine.connect() as opened:
        reading = opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        return quotes.quote(reading, org_id, credits)


def preview(database_url: str, task: str, **fields: Any) -> quotes.Preview:
    message = parse(task, fields)
    assert not isinstance(message, InvalidMessage)
    engine = connect(as_role(READER, database_url), keeps_connections=False)
    with engine.connect() as opened:
        reading = opened.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        return quotes.preview(reading, message)


def nothing_is_due(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "w1", 30), finish("acme", "w2", 20)])
    apply_batch(engine, [delivery("wallet.configure", org_id="acme", version=1, period_cap=90, credit_limit=5)])


def a_period_begins(engine: Engine) -> None:
    apply_batch(engine, [subscribe("acme", monthly_credits=100, anchor="2999-01-01T00:00:00Z")])
    begin_schedules(engine, ":anchor", anchor=datetime.now(UTC) - timedelta(days=40))


def a_reservation_expired(engine: Engine) -> None:
    apply_batch(engine, [purchase("acme", credits=100), start("acme", "w1", 90), start("acme", "w2", 5)])
    sql(engine, "UPDATE workflows SET expires_at = now() - interval '1 second' WHERE workflow_id = 'w1'")
    sql(engine, "UPDATE wallets SET next_hold_expiry = now() - interval '1 second'")


def credits_have_ended(engine: Engine) -> None:
    later = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    grant = delivery("wallet.grant", org_id="acme", grant_id="g1", credits=60, expires_at=later)
    apply_batch(engine, [purchase("acme", credits=40), grant, start("acme", "w1", 10)])
    sql(engine, "UPDATE ending_credits SET expires_at = now() - interval '1 second'")
    sql(engine, "UPDATE wallets SET next_ending_at = now() - interval '1 second'")


@pytest.mark.parametrize(
    ("prepare", "credits", "reason"),
    [
        (nothing_is_due, 40, None),
        (nothing_is_due, 41, "period_cap"),
        (nothing_is_due, 56, "insufficient_credits"),
        (a_period_begins, 100, None),
        (a_period_begins, 101, "insufficient_credits"),
        (a_reservation_expired, 95, None),
        (a_reservation_expired, 96, "insufficient_credits"),
        (credits_have_ended, 40, None),
        (credits_have_ended, 41, "insufficient_credits"),
    ],
)
def test_a_quote_is_what_a_start_is_answered_and_changes_nothing(
    engine: Engine, database_url: str, prepare: Callable[[Engine], None], credits: int, reason: str | None
) -> None:
    prepare(engine)
    before = sql(engine, STATE)
    [(last_seq,)] = sql(engine, "SELECT last_seq FROM wallets")
    found = quote(database_url, "acme", credits)
    assert sql(engine, STATE) == before
    assert (found.as_of_seq, found.reason) == (last_seq, reason)
    [answer] = apply_batch(engine, [start("acme", "next", credits)])
    assert isinstance(answer, Result)
    assert (found.outcome, found.reason, found.shortfall) == (answer.outcome, answer.reason, answer.shortfall)
    held = credits if answer.outcome == "reserved" else 0
    assert found.available == answer.available + held
    assert answer.limit is None or answer.limit in found.limits


def test_an_organization_that_nobody_has_named_has_nothing(database_url: str) -> None:
    nothing = Limit("insufficient_credits", limit=0, used=0, reserved=0, resets_at=None)
    assert quote(database_url, "nobody", 5) == Quote("rejected", "insufficient_credits", 0, 5, (nothing,), 0)


def test_while_a_wallet_is_locked_there_is_a_quote(engine: Engine, database_url: str) -> None:
    apply_batch(engine, [purchase("acme", credits=100)])
    with engine.begin() as other:
        other.exec_driver_sql("SELECT 1 FROM wallets WHERE org_id = 'acme' FOR UPDATE")
        assert quote(database_url, "acme", 100).outcome == "reserved"


def test_if_more_is_due_than_one_transaction_posts_there_is_no_quote(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_reservation_expired(engine)
    monkeypatch.setattr("ledger.working_set.MOST_DUE", 1)
    sql(engine, "UPDATE workflows SET expires_at = now() - interval '1 second'")
    with pytest.raises(quotes.MuchDueError):
        quote(database_url, "acme", 5)


def test_an_error_of_the_database_is_one_as_of_any_other_query(engine: Engine, database_url: str) -> None:
    sql(engine, "DROP TABLE ending_credits CASCADE")
    apply_batch(engine, [purchase("acme", credits=100)])
    sql(engine, "UPDATE wallets SET next_ending_at = now()")
    with pytest.raises(DBAPIError):
        quote(database_url, "acme", 5)


def test_a_preview_counts_what_is_due_and_shows_what_the_message_alone_does(engine: Engine, database_url: str) -> None:
    a_reservation_expired(engine)
    before = sql(engine, STATE)
    foreseen = preview(database_url, "wallet.grant", org_id="acme", grant_id="g1", credits=20, metadata={"by": "olga"})
    assert sql(engine, STATE) == before
    assert isinstance(foreseen.answer, Result)
    assert (foreseen.before.available, foreseen.after.available) == (95, 115)
    [event] = foreseen.events
    assert (event.event_type, event.credits, event.metadata["by"]) == ("grant", 20, "olga")
    assert foreseen.answer.event_seqs == (event.seq,)


def test_a_preview_says_why_a_message_would_be_refused(engine: Engine, database_url: str) -> None:
    apply_batch(engine, [purchase("acme", credits=100), finish("acme", "w1", 20)])
    fields = {"org_id": "acme", "refund_id": "r1", "workflow_id": "w1"}
    refused = preview(database_url, "wallet.refund", **fields, credits=21)
    assert isinstance(refused.answer, Refusal)
    assert refused.answer.code == "refund_exceeds_usage"
    assert (refused.before, refused.events) == (refused.after, ())
    allowed = preview(database_url, "wallet.refund", **fields, credits=20)
    assert (allowed.before.available, allowed.after.available) == (80, 100)


def test_a_preview_knows_a_message_that_came_before(engine: Engine, database_url: str) -> None:
    apply_batch(engine, [purchase("acme", credits=100)])
    again = preview(database_url, "wallet.purchase", org_id="acme", purchase_id="p1", credits=100)
    assert isinstance(again.answer, Result)
    assert (again.answer.duplicate, again.events, again.after) == (True, (), again.before)


def test_a_preview_of_the_first_message_begins_with_nothing(database_url: str) -> None:
    first = preview(database_url, "wallet.purchase", org_id="nobody", purchase_id="p1", credits=5)
    assert (first.before, first.after.available) == (Wallet("nobody"), 5)
