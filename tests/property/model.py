"""A naive model of one wallet, written from what users are promised and not from the code.

It keeps plain facts and adds them up from the beginning whenever somebody asks. Slow, and meant to be obviously right.
It knows no bounds: whoever uses it stays below 2^53-1 credits.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, assert_never

from ledger.state import Event

Answer = tuple[str, str | None, bool]
"""Outcome, reason, duplicate; or ("refused", code, False)."""

MESSAGE_ID = {
    "wallet.purchase": ("purchase_id",),
    "wallet.grant": ("grant_id",),
    "wallet.adjust": ("adjustment_id",),
    "wallet.refund": ("refund_id",),
    "wallet.bill": ("billing_id",),
    "wallet.subscribe": ("subscription_id", "version"),
    "wallet.unsubscribe": ("subscription_id", "version"),
    "wallet.configure": ("version",),
}
NO_TERMS = {"source", "metadata", "occurred_at"}


def months_after(anchor: datetime, months: int) -> datetime:
    """Count months one by one, then take the last day that exists."""
    year, month, day = anchor.year, anchor.month, anchor.day
    for _ in range(months):
        year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    while True:
        try:
            return anchor.replace(year=year, month=month, day=day)
        except ValueError:
            day -= 1


class Model:
    """One organization's wallet."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
        self.workflows: dict[str, dict[str, Any]] = {}
        self.subscriptions: dict[str, dict[str, Any]] = {}
        self.current: str | None = None
        self.left_until: datetime | None = None
        """When what another subscription has left expires, should that be before the current one first begins."""
        self.said: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.answers: dict[tuple[Any, ...], Answer] = {}
        self.limits: dict[str, Any] = {"version": 0, "credit_limit": 0, "period_cap": None}

    # Balances, from the facts

    @property
    def balances(self) -> dict[str, int]:
        prepaid = subscription = usage = 0
        for fact in self.facts:
            match fact:
                case {"prepaid": credits}:
                    prepaid += credits
                case {"used": credits}:
                    from_subscription = min(subscription, credits)
                    subscription -= from_subscription
                    prepaid -= credits - from_subscription
                    usage += credits
                case {"period": credits, "rollover_limit": limit}:
                    subscription = min(subscription, limit) + credits
                    usage = 0
                case {"raised": credits}:
                    subscription += credits
                case {"over": _}:
                    subscription = 0
        reserved = sum(workflow["start"] for workflow in self.workflows.values() if "held_until" in workflow)
        return {"prepaid": prepaid, "subscription": subscription, "reserved": reserved, "usage": usage}

    @property
    def available(self) -> int:
        balances = self.balances
        return balances["prepaid"] + balances["subscription"] - balances["reserved"]

    def holds(self, workflow_id: str | None) -> bool:
        """Whether credits are held for the workflow now."""
        return "held_until" in self.workflows.get(workflow_id or "", {})

    # Time

    def next_due(self) -> datetime | None:
        """When time alone does something next."""
        due = [workflow["held_until"] for workflow in self.workflows.values() if "held_until" in workflow]
        if self.current is not None:
            due.append(self._next_end(self.current))
        return min(due, default=None)

    def _next_period(self, subscription_id: str) -> datetime:
        subscription = self.subscriptions[subscription_id]
        begun = subscription["granted"]
        return months_after(subscription["anchor"], max(begun) + 1 if begun else 0)

    def _next_end(self, subscription_id: str) -> datetime:
        return self.left_until or self._next_period(subscription_id)

    def catch_up(self, now: datetime) -> None:
        for workflow in self.workflows.values():
            if "held_until" in workflow and workflow["held_until"] <= now:
                del workflow["held_until"]
        while self.current is not None and self._next_end(self.current) <= now:
            subscription = self.subscriptions[self.current]
            if not subscription["active"]:
                self.facts.append({"over": self.current})
                self.current = self.left_until = None
            elif self.left_until is not None:
                self.facts.append({"over": "another subscription"})
                self.left_until = None
            else:
                begun = subscription["granted"]
                self._begin(subscription, max(begun) + 1 if begun else 0)

    def _begin(self, subscription: dict[str, Any], period: int) -> None:
        granted = subscription["monthly_credits"]
        self.facts.append({"period": granted, "rollover_limit": subscription["rollover_limit"]})
        subscription["granted"][period] = granted

    # Messages

    def receive(self, task: str, fields: dict[str, Any], now: datetime) -> Answer:
        self.catch_up(now)
        match task:
            case "workflow.start":
                return self._start(fields["workflow_id"], fields, now)
            case "workflow.finish":
                return self._finish(fields["workflow_id"], fields["credits"])
            case "workflow.cancel" | "workflow.fail":
                return self._end(fields["workflow_id"], f"{task} answer")
        key = (task, *(fields[name] for name in MESSAGE_ID[task]))
        terms = {name: value for name, value in fields.items() if name not in NO_TERMS}
        if key in self.said:
            if self.said[key] != terms:
                return "refused", "conflict", False
            outcome, reason, _ = self.answers[key]
            return outcome, reason, True
        match task:
            case "wallet.configure":
                answer = self._configure(fields)
            case "wallet.subscribe":
                answer = self._subscribe(fields, now)
            case "wallet.unsubscribe":
                answer = self._unsubscribe(fields)
            case "wallet.purchase" | "wallet.grant" | "wallet.adjust" | "wallet.refund" | "wallet.bill":
                answer = self._post(task, fields)
            case _:
                raise NotImplementedError(f"the model does not know what {task} does")
        if answer[0] != "refused":
            self.said[key], self.answers[key] = terms, answer
        return answer

    def _start(self, workflow_id: str, fields: dict[str, Any], now: datetime) -> Answer:
        workflow = self.workflows.get(workflow_id)
        if workflow is None:
            reason = self._why_not(fields["credits"])
            workflow = self.workflows[workflow_id] = {"start": fields["credits"]}
            if reason is None:
                workflow["held_until"] = now + timedelta(seconds=fields["expires_in_s"])
                workflow["start answer"] = "reserved", None
            else:
                workflow["start answer"] = "rejected", reason
            return *workflow["start answer"], False
        if "start" not in workflow:
            workflow["start"] = fields["credits"]
            workflow["start answer"] = "ignored", "already_ended"
            return *workflow["start answer"], False
        if workflow["start"] != fields["credits"]:
            return "refused", "conflict", False
        return *workflow["start answer"], True

    def _why_not(self, credits: int) -> str | None:
        if self.available + self.limits["credit_limit"] < credits:
            return "insufficient_credits"
        cap = self.limits["period_cap"]
        if cap is not None and self.balances["usage"] + self.balances["reserved"] + credits > cap:
            return "period_cap"
        return None

    def _finish(self, workflow_id: str, used: int) -> Answer:
        workflow = self.workflows.setdefault(workflow_id, {})
        if "finish" in workflow:
            return ("settled", None, True) if workflow["finish"] == used else ("refused", "conflict", False)
        workflow["finish"] = used
        workflow.pop("held_until", None)
        self.facts.append({"used": used})
        return "settled", None, False

    def _end(self, workflow_id: str, kept_as: str) -> Answer:
        known = workflow_id in self.workflows
        workflow = self.workflows.setdefault(workflow_id, {})
        if kept_as in workflow:
            return *workflow[kept_as], True
        if not known:
            workflow[kept_as] = "ignored", "not_started"
        elif "held_until" in workflow:
            del workflow["held_until"]
            workflow[kept_as] = "released", None
        else:
            workflow[kept_as] = "ignored", "already_ended"
        return *workflow[kept_as], False

    def _post(self, task: str, fields: dict[str, Any]) -> Answer:
        fact = {"prepaid": fields["credits"]}
        below_zero = fields["credits"] < 0 and self.balances["prepaid"] + fields["credits"] < 0
        if task in ("wallet.adjust", "wallet.bill") and below_zero and not fields.get("allow_negative"):
            return "refused", "insufficient_credits", False
        if task == "wallet.refund" and fields["workflow_id"] is not None:
            fact["refund of"] = fields["workflow_id"]
            refunds = [earlier["prepaid"] for earlier in self.facts if earlier.get("refund of") == fact["refund of"]]
            used = self.workflows.get(fields["workflow_id"], {}).get("finish", 0)
            if sum(refunds) + fields["credits"] > used:
                return "refused", "refund_exceeds_usage", False
        self.facts.append(fact)
        return "posted", None, False

    def _configure(self, fields: dict[str, Any]) -> Answer:
        if fields["version"] <= self.limits["version"]:
            return "ignored", "stale_version", False
        self.limits = {name: fields[name] for name in ("version", "credit_limit", "period_cap")}
        return "posted", None, False

    def _subscribe(self, fields: dict[str, Any], now: datetime) -> Answer:
        subscription_id = fields["subscription_id"]
        known = self.subscriptions.get(subscription_id, {"version": 0, "anchor": None, "granted": {}})
        if fields["version"] <= known["version"]:
            return "ignored", "stale_version", False
        anchor = None if fields["anchor"] is None else datetime.fromisoformat(fields["anchor"])
        if known["anchor"] is not None and anchor not in (None, known["anchor"]):
            return "refused", "conflict", False
        subscription = self.subscriptions[subscription_id] = {
            "version": fields["version"],
            "active": True,
            "monthly_credits": fields["monthly_credits"],
            "rollover_limit": fields["rollover_limit"],
            "anchor": known["anchor"] or anchor or now,
            "granted": known["granted"],
        }
        ends = None if self.current is None else self._next_end(self.current)
        self.current = subscription_id
        begins = subscription["anchor"]
        self.left_until = ends if ends is not None and now < begins and ends < begins else None
        period = -1
        while months_after(subscription["anchor"], period + 1) <= now:
            period += 1
        if period >= 0 and period not in subscription["granted"]:
            self._begin(subscription, period)
        elif period >= 0:
            more = fields["monthly_credits"] - subscription["granted"][period]
            if more > 0:
                self.facts.append({"raised": more})
                subscription["granted"][period] = fields["monthly_credits"]
        return "posted", None, False

    def _unsubscribe(self, fields: dict[str, Any]) -> Answer:
        subscription_id = fields["subscription_id"]
        known = self.subscriptions.get(subscription_id)
        if known is None:
            self.subscriptions[subscription_id] = {
                "version": fields["version"],
                "active": False,
                "anchor": None,
                "granted": {},
            }
            return "ignored", "not_subscribed", False
        if fields["version"] <= known["version"]:
            return "ignored", "stale_version", False
        known["version"], known["active"] = fields["version"], False
        return "posted", None, False


def check_history(events: Sequence[Event]) -> None:
    """Every event is numbered, changes what its type says, and leaves Σ credits = available."""
    total = prepaid = subscription = reserved = usage = 0
    for number, event in enumerate(events, start=1):
        assert event.seq == number
        assert number == 1 or events[number - 2].created_at <= event.created_at
        effect, was_usage = event.credits, usage
        changes = (
            event.prepaid_balance_after - prepaid,
            event.subscription_balance_after - subscription,
            event.reserved_after - reserved,
            event.period_usage_after - usage,
        )
        drawn = min(-effect, subscription)
        total += effect
        prepaid, subscription = event.prepaid_balance_after, event.subscription_balance_after
        reserved, usage = event.reserved_after, event.period_usage_after
        assert total == prepaid + subscription - reserved
        match event.event_type:
            case "reservation":
                assert changes == (0, 0, -effect, 0)
                assert effect <= 0
            case "reservation_released":
                assert changes == (0, 0, -effect, 0)
                assert effect >= 0
                assert event.metadata["reason"] in ("settled", "cancelled", "failed", "expired")
                if event.metadata["reason"] == "settled":
                    assert events[number].event_type == "usage"
                    assert events[number].workflow_id == event.workflow_id
            case "usage":
                assert changes == (effect + drawn, -drawn, 0, -effect)
                assert effect <= 0
            case "subscription_credit" if "/" in event.idempotency_key:
                assert event.metadata["reason"] == "plan_change"
                assert changes == (0, effect, 0, 0)
                assert effect > 0
            case "subscription_credit":
                assert changes == (0, effect, 0, -was_usage)
                assert effect >= 0
            case "adjustment" if event.idempotency_key.startswith("subscription:"):
                assert event.metadata["reason"] == "subscription_expired"
                assert changes == (0, effect, 0, 0)
                assert effect < 0
            case "prepaid_purchase" | "grant" | "refund":
                assert changes == (effect, 0, 0, 0)
                assert effect > 0
            case "adjustment" | "billing":
                assert changes == (effect, 0, 0, 0)
            case _:
                assert_never(event.event_type)
    assert len({event.idempotency_key for event in events}) == len(events)
