"""Erasing the free text of an organization: none of it is left, no sum changes, and repeating stays safe."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from holdfast_client.results import Result
from ledger import audit, daily_sums, dead_letters, erasing, evidence, history
from ledger.database import snapshot
from ledger.erasing import Erased
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.upkeep import UpkeepError
from ledger.usage import usage
from tests.messages import delivery
from tests.support import moved, sql

SECRET = "call Ann Smith"
END = (datetime.now(UTC) + timedelta(days=9)).isoformat()


def told(task: str, org_id: str = "acme", **fields: Any) -> Delivery:
    by = "ann@example.com" if fields.get("source") == "operator" else SECRET
    metadata = {"note": SECRET, "by": by, "plan": [SECRET], "grant_id": SECRET, "paid_by": {"x": SECRET}}
    return delivery(task, org_id=org_id, **fields, metadata=metadata)


SENT = [
    told("wallet.purchase", purchase_id="p1", credits=100, expires_at=END),
    told("wallet.grant", grant_id="g1", credits=50, reason=SECRET),
    told("wallet.adjust", adjustment_id="a1", credits=-3, reason=SECRET, source="operator"),
    told("wallet.reverse", reversal_id="v1", purchase_id="p1", credits=2, reason="disputed"),
    told("wallet.configure", version=1, credit_limit=5, reason=SECRET),
    told("wallet.subscribe", subscription_id="s1", version=1, plan="team of ten", monthly_credits=9),
    told("workflow.start", workflow_id="r1", credits=9, activity_name=SECRET, project_id="red"),
    told("workflow.finish", workflow_id="r1", credits=8, activity_name=SECRET),
    told("workflow.finish", workflow_id="r2", credits=8, activity_name=f"{SECRET}, again", project_id="red"),
    told("workflow.finish", workflow_id="r3", credits=1, project_id="red"),
    told("workflow.start", workflow_id="r4", credits=9, activity_name=SECRET),
    told("workflow.cancel", workflow_id="r4", reason=SECRET),
    told("wallet.refund", refund_id="f1", credits=1, workflow_id="r1"),
    told("wallet.bill", billing_id="b1", credits=-1, invoice_id="INV-7"),
]


@pytest.fixture
def ledger(engine: Engine) -> Engine:
    """Two organizations with the same text; one of them is summed."""
    theirs = [each._replace(payload={**each.payload, "org_id": "globex"}) for each in SENT]  # type: ignore[dict-item]
    answers = apply_batch(engine, [*SENT, *theirs])
    assert [answer for answer in answers if not isinstance(answer, Result)] == []
    for _ in daily_sums.steps_of(engine, "acme"):
        pass
    return engine


def contents(engine: Engine, org_id: str) -> str:
    tables = ("credit_events", "workflows", "posted_messages", "daily_sums", "dead_letters")
    rows = [sql(engine, f"SELECT * FROM {table} WHERE org_id = :org_id", org_id=org_id) for table in tables]
    return json.dumps(rows, default=str)


def erase(engine: Engine, **options: Any) -> Erased:
    return erasing.erase(engine, "acme", by="ann@example.com", why="asked for", **options)


def seen(engine: Engine) -> Any:
    with snapshot(engine) as connection:
        columns = "seq, credits, prepaid_balance_after, subscription_balance_after, reserved_after, idempotency_key"
        events = sql(engine, f"SELECT {columns} FROM credit_events WHERE org_id = 'acme' ORDER BY seq")
        return (
            usage(connection, "acme", ["project", "day"]),
            history.find(connection, "acme").totals(connection),
            events,
        )


def test_no_text_is_left_of_one_organization_and_every_sum_is_as_before(ledger: Engine) -> None:
    before, theirs = seen(ledger), contents(ledger, "globex")
    assert "Ann Smith" in contents(ledger, "acme")
    found = erase(ledger, dry_run=True)
    assert "Ann Smith" in contents(ledger, "acme")
    assert erase(ledger) == found
    assert found.events == len(sql(ledger, "SELECT FROM credit_events WHERE org_id = 'acme'"))
    assert (found.workflows, found.messages, found.dead_letters, found.archived_events) == (3, 3, 0, 0)
    assert "Ann" not in contents(ledger, "acme")
    assert seen(ledger) == before
    assert contents(ledger, "globex") == theirs
    assert audit.verify(ledger).is_clean
    [record] = sql(ledger, "SELECT org_id, seq, erased_by, why FROM erasures")
    assert record == ("acme", before[1].events, "ann@example.com", "asked for")
    assert erase(ledger) == Erased(0, 0, 0, 0, 0, None)


def test_what_the_ledger_itself_wrote_stays(ledger: Engine) -> None:
    erase(ledger)
    left = dict(sql(ledger, "SELECT idempotency_key, metadata FROM credit_events WHERE org_id = 'acme'"))
    assert left["purchase:p1"] == {"purchase_id": "p1", "expires_at": END}
    assert left["grant:g1"] == {"grant_id": "g1"}
    assert left["adjustment:a1"] == {"adjustment_id": "a1", "by": "ann@example.com"} | left["adjustment:a1"]
    assert left["release:r4"] == {"reason": "cancelled"}
    assert left["reversal:v1"]["reason"] == "disputed"
    assert left["billing:b1"] == {"billing_id": "b1", "invoice_id": "INV-7"} | left["billing:b1"]
    assert left["finish:r3"]["unreserved"] is True
    assert left["subscription:s1:0"]["plan"] == "team of ten"


def test_what_is_repeated_is_a_duplicate_and_no_conflict(ledger: Engine) -> None:
    erase(ledger)
    answers = apply_batch(ledger, SENT)
    assert [answer.duplicate for answer in answers if isinstance(answer, Result)] == [True] * len(SENT)
    assert "Ann" not in contents(ledger, "acme")
    grant = {"org_id": "acme", "grant_id": "g1", "credits": 51, "reason": "another"}
    [conflict] = apply_batch(ledger, [delivery("wallet.grant", **grant)])
    assert isinstance(conflict, DeadLettered)
    assert conflict.error == "wallet.grant: g1 was applied with credits 50, so this message contradicts it"
    with ledger.connect() as connection:
        [listed] = dead_letters.letters(connection)
        letter = dead_letters.letter(connection, listed.id)
        message = evidence.message_of(letter)
        assert message is not None
        assert [each.name for each in evidence.differences(connection, message)] == ["credits"]


def test_closed_letters_are_erased_and_open_ones_or_waiting_messages_refuse_it(ledger: Engine) -> None:
    refund: dict[str, Any] = {"refund_id": "f9", "credits": 99, "workflow_id": "r1"}
    [answer] = apply_batch(ledger, [told("wallet.refund", **refund)])
    assert isinstance(answer, DeadLettered)
    with pytest.raises(UpkeepError, match="acme has 1 open dead letters"):
        erase(ledger)
    dead_letters.discard(ledger, answer.letter_id, by="ann", why=SECRET)
    assert erase(ledger).dead_letters == 1
    assert "Ann" not in contents(ledger, "acme")
    with ledger.connect() as connection:
        assert dead_letters.letter(connection, answer.letter_id).body == b""
    sql(ledger, "INSERT INTO waiting_messages (org_id, task, body, reason) VALUES ('acme', 'x', '', 'slow')")
    with pytest.raises(UpkeepError, match="1 messages of acme wait"):
        erase(ledger)


def test_an_unknown_organization_is_told(engine: Engine) -> None:
    with pytest.raises(UpkeepError, match="acme has no wallet"):
        erase(engine)


@pytest.mark.parametrize(
    "change",
    [
        "credits = credits + 1",
        "activity_name = 'another'",
        """metadata = metadata || '{"more": 1}'""",
        "metadata = '{}', source = 'me'",
        f"created_at = {moved('created_at', '1 second')}",
    ],
)
def test_the_database_refuses_any_other_change_also_of_what_is_to_be_erased(ledger: Engine, change: str) -> None:
    erase(ledger)
    with pytest.raises(DBAPIError, match="append-only"):
        sql(ledger, f"UPDATE credit_events SET {change} WHERE org_id = 'acme'")
    with pytest.raises(DBAPIError, match="append-only"):
        sql(ledger, "UPDATE credit_events SET metadata = '{}' WHERE org_id = 'globex'")
    with pytest.raises(DBAPIError, match="append-only"):
        sql(ledger, "DELETE FROM credit_events WHERE org_id = 'acme' AND seq = 1")
