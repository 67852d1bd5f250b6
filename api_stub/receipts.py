"""What happened to the balance, in everyday words: of a receipt, of a run and of an event."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, assert_never

from ledger.receipts import Receipt, Step
from ledger.state import EventType
from ledger.views import WorkflowView
from ledger.wording import amount, clock, day


def outcome(receipt: Receipt, now: datetime, before: datetime | None) -> str:
    """What became of a run until `before`, the end of the range of time that is shown: `used 66 of 129 held`."""
    held, used = receipt.reserved_credits, receipt.used_credits
    if receipt.state == "reserved":
        assert held is not None
        assert receipt.expires_at is not None
        if before is not None and before <= now:
            return f"still held {amount(held)} then"
        # Within 30 days, so without the year.
        return f"holds {amount(held)} until {day(receipt.expires_at)[:-5]} {clock(receipt.expires_at)[:-3]}"
    if used is None:
        return f"{receipt.state}, {amount(held)} returned" if held else str(receipt.state)
    said = f"used {amount(used)}" + (f" of {amount(held)} held" if held is not None else ", nothing was held")
    return f"{said}, {amount(receipt.refunded_credits)} refunded" if receipt.refunded_credits else said


def standing(run: WorkflowView, now: datetime) -> str:
    """How a run stands, in a sentence."""
    held = amount(run.reserved_credits or 0)
    asked = f"It asked for {amount(run.requested_credits or 0)}, {_REFUSED.get(run.reason or '', '')}"
    match run.state:
        case "reserved":
            assert run.expires_at is not None
            if run.expires_at <= now:
                return f"It holds {held}. The time of its hold is over, so they come back with the next change."
            return f"It holds {held} until it ends, until {day(run.expires_at)} {clock(run.expires_at)} at the longest."
        case "rejected":
            return f"It was refused. {asked}."
        case "settled":
            used = f"It used {amount(run.used_credits or 0)}"
            if run.reserved_credits is not None:
                return f"{used} of the {held} that were held for it."
            return f"{used}. Nothing was held for it." + (f" {asked}." if run.reason in _REFUSED else "")
        case "cancelled" | "failed" | "expired":
            ended = f"It {_WHY_RETURNED[run.state]}"
            if run.reserved_credits is None:
                return f"{ended}. Nothing was held, and nothing was used."
            return f"{ended}. The {held} that were held for it came back."
        case _:
            assert_never(run.state)


_REFUSED = {
    "insufficient_credits": "which was more than was available",
    "period_cap": "which was more than the cap of the period allowed",
}


def told(event: Mapping[str, Any]) -> str:
    """An event in everyday words: `Purchase · order-1`."""
    event_type: EventType = event["event_type"]
    metadata = event["metadata"]
    match event_type:
        case "reservation":
            return "Held"
        case "reservation_released":
            reason = metadata.get("reason")
            return "Returned" if reason == "settled" else f"Returned, as the run {_WHY_RETURNED.get(reason, 'ended')}"
        case "usage":
            return "Used"
        case "prepaid_purchase":
            return _named("Purchase", metadata, "purchase_id")
        case "grant":
            return _named("Grant", metadata, "reason", "grant_id")
        case "refund":
            return _named("Refund", metadata, "reason", "refund_id")
        case "subscription_credit":
            return _of_plan(metadata)
        case "adjustment":
            return _ended(event) or _named("Adjustment", metadata, "reason", "adjustment_id")
        case "billing":
            return _billed(metadata)
        case _:
            assert_never(event_type)


_TOLD = frozenset(
    {"reason", "workflow_id", "expires_at", "ending", "paid_by", "unreserved", "overrun", "not_charged", "debt_settled"}
)


def more(event: Mapping[str, Any]) -> dict[str, Any]:
    """What else is known of an event of a run: its metadata without what the run's page says in other words."""
    return {name: value for name, value in event["metadata"].items() if name not in _TOLD}


def told_step(step: Step) -> str:
    """The same for an event of a run of which less is known."""
    return told({"event_type": step.event_type, "metadata": {"reason": step.reason}})


_WHY_RETURNED = {"cancelled": "was cancelled", "failed": "failed", "expired": "did not end in time"}


def _named(what: str, metadata: Mapping[str, Any], *names: str) -> str:
    said = next((metadata[name] for name in names if isinstance(metadata.get(name), str) and metadata[name]), None)
    return what if said is None else f"{what} · {said}"


def _of_plan(metadata: Mapping[str, Any]) -> str:
    plan = metadata.get("plan", "")
    if metadata.get("reason") == "plan_change":
        return f"Plan changed to {plan}"
    with suppress(KeyError, ValueError, TypeError):
        return f"Plan {plan} · credits until {day(datetime.fromisoformat(metadata['period_end']))}"
    return f"Plan {plan}"


def _ended(event: Mapping[str, Any]) -> str | None:
    """The end of credits that nobody used; None: it is an adjustment that somebody made."""
    metadata = event["metadata"]
    if "adjustment_id" in metadata:
        return None
    kind = str(metadata.get("reason")).partition("_expired")[0]
    of = metadata.get("plan", "an earlier plan") if kind == "subscription" else f"{kind} {metadata.get(f'{kind}_id')}"
    return f"{amount(-event['credits'])} unused credits of {of} ended"


def _billed(metadata: Mapping[str, Any]) -> str:
    if "reversal_id" in metadata:
        return f"Purchase {metadata['purchase_id']} was {metadata['reason']}"
    if isinstance(metadata.get("invoice_id"), str):
        return f"Invoice {metadata['invoice_id']}"
    return _named("Billing", metadata, "billing_id")
