"""Messages as they arrive from the broker. Fields that a test does not name have defaults."""

import json
from typing import Any

from holdfast_client.messages import MESSAGES, WORKFLOW_TASKS
from ledger.store import Delivery

STEPS = [task.partition(".")[2] for task in MESSAGES if task in WORKFLOW_TASKS]
"""What the four messages of a workflow are called: the last part of their tasks, and of their addresses over HTTP."""

EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
"""The third part of a body, as Celery sends it."""


def delivery(task: str, **fields: Any) -> Delivery:
    """The message with these fields."""
    return Delivery(task, fields, json.dumps([[fields], {}, EMBED]).encode())


def purchase(org_id: str, purchase_id: str = "p1", credits: int = 10) -> Delivery:
    return delivery("wallet.purchase", org_id=org_id, purchase_id=purchase_id, credits=credits)


def start(org_id: str, workflow_id: str, credits: int = 10, **fields: Any) -> Delivery:
    return delivery("workflow.start", org_id=org_id, workflow_id=workflow_id, credits=credits, **fields)


def finish(org_id: str, workflow_id: str, credits: int = 10) -> Delivery:
    return delivery("workflow.finish", org_id=org_id, workflow_id=workflow_id, credits=credits)


def subscribe(org_id: str, **terms: Any) -> Delivery:
    usual = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 200}
    return delivery("wallet.subscribe", org_id=org_id, **(usual | terms))


def grant(org_id: str, grant_id: str = "gift") -> dict[str, Any]:
    """The fields of a grant."""
    return {"org_id": org_id, "grant_id": grant_id, "credits": 1}
