"""The archive: whatever leaves, what stays continues from it, and nothing is lost, whatever is killed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from ledger import archive, audit
from ledger.messages import AnyMessage, InvalidMessage, parse
from ledger.store import apply_past
from tests.support import sql

NOW = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
BEFORE = (NOW - timedelta(days=40)).date()

Sent = tuple[float, str, dict[str, Any]]
"""A message: how many days ago, its task, and its fields."""


def past(engine: Engine, org_id: str, *sent: Sent) -> None:
    """Apply messages as if they had come some days ago."""
    apply_past(
        engine, [(NOW - timedelta(days=days), message(task, org_id=org_id, **fields)) for days, task, fields in sent]
    )


def message(task: str, **fields: Any) -> AnyMessage:
    parsed = parse(task, fields)
    assert not isinstance(parsed, InvalidMessage), parsed
    return parsed


def run(days: float, name: str, credits: int = 5, **fields: Any) -> list[Sent]:
    """A run that reserves and finishes, some days ago."""
    named = {"workflow_id": name, **fields}
    return [
        (days, "workflow.start", {**named, "credits": credits + 1}),
        (days - 0.01, "workflow.finish", {**named, "credits": credits}),
    ]


YEAR: list[Sent] = [
    (90.5, "wallet.purchase", {"purchase_id": "p1", "credits": 500}),
    (90.4, "wallet.grant", {"grant_id": "g1", "credits": 50, "reason": "welcome", "metadata": {"note": "by phone"}}),
    *run(90.3, "r1", project_id="red", activity_name="Crawl"),
    (90.2, "wallet.reverse", {"reversal_id": "v1", "purchase_id": "p1", "credits": 20, "reason": "disputed"}),
    (90.1, "wallet.grant", {"grant_id": "g2", "credits": 30, "expires_at": "2999-01-01T00:00:00Z"}),
    (90.1, "wallet.grant", {"grant_id": "g3", "credits": 7, "expires_at": (NOW - timedelta(days=80)).isoformat()}),
    *run(60.3, "r2", activity_name="Train"),
    (60.2, "workflow.start", {"workflow_id": "r3", "credits": 9}),
    (60.1, "workflow.cancel", {"workflow_id": "r3"}),
    (60.1, "wallet.bill", {"billing_id": "b1", "credits": 0}),
    (60.1, "wallet.configure", {"version": 1, "credit_limit": 10}),
    (59.99, "workflow.start", {"workflow_id": "r4", "credits": 9}),
    *run(30.3, "r5", project_id="red"),
    (30.1, "wallet.refund", {"refund_id": "f1", "credits": 2, "workflow_id": "r1"}),
    (1.1, "wallet.refund", {"refund_id": "f2", "credits": 1, "workflow_id": "r2"}),
]


def found(engine: Engine) -> dict[str, list[tuple[str, str]]]:
    return {each.check.name: each.offenders for each in audit.verify(engine).findings if each.offenders}


def found_with(engine: Engine, folder: Path) -> dict[str, list[tuple[str, str]]]:
    return {each.check.name: each.offenders for each in archive.verify(engine, folder).findings if each.offenders}


def numbers(engine: Engine, org_id: str = "acme") -> list[int]:
    return [
        seq for (seq,) in sql(engine, "SELECT seq FROM credit_events WHERE org_id = :org_id ORDER BY 1", org_id=org_id)
    ]


def test_the_closed_days_leave_and_the_rest_continues_from_them(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    past(engine, "globex", (70, "wallet.purchase", {"purchase_id": "p1", "credits": 5}))
    before = numbers(engine)
    moved = list(archive.archive(engine, BEFORE, tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == [*(each.entry.file for each in moved), "manifest.json"]
    [(through,)] = sql(engine, "SELECT seq FROM archived")
    assert numbers(engine) == before[through:]
    assert sum(each.events for each in moved) == through > 10
    assert numbers(engine, "globex") == [1]  # the last event stays
    assert found(engine) == {}
    assert found_with(engine, tmp_path) == {}
    verdict, whole = audit.verify(engine), archive.verify(engine, tmp_path)
    assert (verdict.events + verdict.archived, verdict.archived) == (whole.events, through)
    assert list(archive.archive(engine, BEFORE, tmp_path)) == []
