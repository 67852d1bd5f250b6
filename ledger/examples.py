"""An example of every message, for docs/messages.md (`make docs`) and for the description of the API.

Together they are a story: each finds what it needs.
"""

from typing import Any

EXAMPLES: dict[str, dict[str, Any]] = {
    "workflow.start": {
        "org_id": "acme",
        "workflow_id": "run-1",
        "credits": 75,
        "project_id": "website",
        "activity_name": "Nightly build",
        "expires_in_s": 3600,
    },
    "workflow.finish": {
        "org_id": "acme",
        "workflow_id": "run-1",
        "credits": 80,
        "occurred_at": "2026-03-01T09:30:00Z",
        "metadata": {"region": "eu"},
    },
    "workflow.cancel": {"org_id": "acme", "workflow_id": "run-2", "reason": "cancelled by its owner"},
    "workflow.fail": {"org_id": "acme", "workflow_id": "run-3", "reason": "out of memory"},
    "wallet.purchase": {"org_id": "acme", "purchase_id": "order-1", "credits": 500},
    "wallet.grant": {
        "org_id": "acme",
        "grant_id": "welcome",
        "credits": 100,
        "reason": "welcome",
        "expires_at": "2026-12-31T00:00:00Z",
        "source": "signup",
    },
    "wallet.adjust": {
        "org_id": "acme",
        "adjustment_id": "fix-1",
        "credits": -20,
        "reason": "order-1 was counted twice",
    },
    "wallet.refund": {"org_id": "acme", "refund_id": "refund-1", "credits": 30, "workflow_id": "run-1"},
    "wallet.bill": {"org_id": "acme", "billing_id": "bill-1", "credits": 0, "invoice_id": "2026-0001"},
    "wallet.reverse": {
        "org_id": "acme",
        "reversal_id": "chargeback-1",
        "purchase_id": "order-1",
        "credits": 200,
        "reason": "disputed",
    },
    "wallet.subscribe": {
        "org_id": "acme",
        "subscription_id": "sub-1",
        "version": 1,
        "plan": "team",
        "monthly_credits": 1000,
        "rollover_limit": 200,
        "anchor": "2026-01-31T00:00:00Z",
        "first_credits": 500,
    },
    "wallet.unsubscribe": {"org_id": "acme", "subscription_id": "sub-1", "version": 2},
    "wallet.configure": {"org_id": "acme", "version": 1, "credit_limit": 50, "period_cap": 5000},
}
