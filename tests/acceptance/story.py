"""Every message of docs/messages.md, sent one after the other to one wallet, and what each answers."""

from typing import Any

Step = tuple[str, dict[str, Any], dict[str, Any]]


def _answer(outcome: str, event_seqs: list[int], available: int, **rest: Any) -> dict[str, Any]:
    unnamed = {"reason": None, "duplicate": False, "workflow_id": None, "state": None, "limit": None, "shortfall": None}
    return {"outcome": outcome, **unnamed, "event_seqs": event_seqs, "available": available, **rest}


STORY: list[Step] = [
    ("wallet.configure", {"version": 1, "credit_limit": 50}, _answer("posted", [], 0)),
    (
        "wallet.subscribe",
        {"subscription_id": "sub", "version": 1, "plan": "team", "monthly_credits": 1000},
        _answer("posted", [1], 1000),
    ),
    ("wallet.purchase", {"purchase_id": "order", "credits": 500}, _answer("posted", [2], 1500)),
    ("wallet.grant", {"grant_id": "gift", "credits": 100}, _answer("posted", [3], 1600)),
    ("wallet.adjust", {"adjustment_id": "fix", "credits": -50, "reason": "typo"}, _answer("posted", [4], 1550)),
    ("wallet.bill", {"billing_id": "march", "credits": 0, "invoice_id": "7"}, _answer("posted", [5], 1550)),
    (
        "workflow.start",
        {"workflow_id": "run-1", "credits": 300, "project_id": "web", "activity_name": "Report"},
        _answer("reserved", [6], 1250, workflow_id="run-1", state="reserved"),
    ),
    (
        "workflow.finish",
        {"workflow_id": "run-1", "credits": 200},
        _answer("settled", [7, 8], 1350, workflow_id="run-1", state="settled"),
    ),
    (
        "wallet.refund",
        {"refund_id": "sorry", "credits": 40, "workflow_id": "run-1"},
        _answer("posted", [9], 1390, workflow_id="run-1", state="settled"),
    ),
    (
        "workflow.start",
        {"workflow_id": "run-2", "credits": 100},
        _answer("reserved", [10], 1290, workflow_id="run-2", state="reserved"),
    ),
    (
        "workflow.cancel",
        {"workflow_id": "run-2"},
        _answer("released", [11], 1390, workflow_id="run-2", state="cancelled"),
    ),
    (
        "workflow.start",
        {"workflow_id": "run-3", "credits": 1441},
        _answer(
            "rejected",
            [],
            1390,
            workflow_id="run-3",
            state="rejected",
            reason="insufficient_credits",
            limit={"kind": "insufficient_credits", "limit": 1440, "used": 0, "reserved": 0, "resets_at": None},
            shortfall=1,
        ),
    ),
    (
        "workflow.start",
        {"workflow_id": "run-4", "credits": 1440},
        _answer("reserved", [12], -50, workflow_id="run-4", state="reserved"),
    ),
    (
        "workflow.fail",
        {"workflow_id": "run-4", "reason": "crashed"},
        _answer("released", [13], 1390, workflow_id="run-4", state="failed"),
    ),
    (
        "wallet.reverse",
        {"reversal_id": "chargeback", "purchase_id": "order", "credits": 90, "reason": "disputed"},
        _answer("posted", [14], 1300),
    ),
    ("wallet.unsubscribe", {"subscription_id": "sub", "version": 2}, _answer("posted", [], 1300)),
]
STATES = {answer["workflow_id"]: answer["state"] for _, _, answer in STORY}
"""The state of each workflow at the end."""
