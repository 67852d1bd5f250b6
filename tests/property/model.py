"""A naive model of one wallet, written from what users are promised and not from the code.

It keeps pots of credits, each with its end, and does what time does in the order of time. Slow, and meant to be
obviously right.
It knows no bounds: whoever uses it stays below 2^53-1 credits.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
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
    "wallet.reverse": ("reversal_id",),
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


class Pot:
    """Some credits that end together, and what they are."""

    def __init__(self, credits: int, end: datetime, *, is_subscription: bool, of: str = "") -> None:
        self.left = credits
        self.end = end
        self.ended: int | None = None
        """How many starts had come when it ended: only those cover it."""
        self.is_subscription = is_subscription
        self.of = of


class Model:
    """One organization's wallet."""

    def __init__(self) -> None:
        self.time = datetime.min.replace(tzinfo=UTC)
        self.permanent = 0
        self.period = 0
        """What is left of the credits of the current period."""
        self.pots: list[Pot] = []
        """All other credits with an end, oldest first."""
        self.usage = 0
        self.starts = 0
        self.workflows: dict[str, dict[str, Any]] = {}
        self.subscriptions: dict[str, dict[str, Any]] = {}
        self.current: str | None = None
        self.scheduled: str | None = None
        self.plan_version = 0
        self.reversed: dict[str, int] = {}
        self.said: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.answers: dict[tuple[Any, ...], Answer] = {}
        self.limits: dict[str, Any] = {"version": 0, "credit_limit": 0, "period_cap": None}

    # Balances

    @property
    def balances(self) -> dict[str, int]:
        return {
            "prepaid": self.permanent + sum(pot.left for pot in self.pots if not pot.is_subscription),
            "subscription": self.period + sum(pot.left for pot in self.pots if pot.is_subscription),
            "reserved": sum(workflow["start"] for workflow in self.workflows.values() if "held_until" in workflow),
            "usage": self.usage,
        }

    @property
    def ending(self) -> dict[tuple[datetime, bool], int]:
        """What ends by itself, besides the current period: by when, and whether a subscription brought it."""
        ending: dict[tuple[datetime, bool], int] = {}
        for pot in self.pots:
            key = pot.end, pot.is_subscription
            ending[key] = ending.get(key, 0) + pot.left
        return ending

    @property
    def available(self) -> int:
        balances = self.balances
        return balances["prepaid"] + balances["subscription"] - balances["reserved"]

    def holds(self, workflow_id: str | None) -> bool:
        """Whether credits are held for the workflow now."""
        return "held_until" in self.workflows.get(workflow_id or "", {})

    def _use(self, credits: int, *, prepaid_only: bool = False) -> list[tuple[datetime | None, int]]:
        """Take credits, what ends first, first. Returns when what was taken would have ended: None for never."""
        pots = [*self.pots]
        if self.current is not None:
            pots.append(Pot(self.period, self._period_end(), is_subscription=True, of="period"))
        taken: list[tuple[datetime | None, int]] = []
        left = credits
        for pot in sorted(pots, key=lambda pot: (pot.end, not pot.is_subscription)):
            if not (prepaid_only and pot.is_subscription):
                part = min(pot.left, left)
                pot.left -= part
                left -= part
                taken.append((pot.end, part))
                if pot.of == "period":
                    self.period = pot.left
        self.permanent -= left
        self._sweep_up()
        return [(None, left), *taken]

    def _sweep_up(self) -> None:
        self.pots = [pot for pot in self.pots if pot.left]

    def _bring(self, credits: int, end: datetime | None = None, *, of: str = "") -> None:
        """Prepaid credits come in: a debt takes them first."""
        debt = max(0, -self.balances["prepaid"])
        if end is None:
            self.permanent += credits
            return
        self.permanent += min(debt, credits)
        if credits > debt and end > self.time:
            self.pots.append(Pot(credits - debt, end, is_subscription=False, of=of))

    def _end_uncovered(self) -> None:
        """What is past its end stays as long as reservations cover it that were made before."""
        past = sorted(
            (pot for pot in self.pots if pot.end <= self.time), key=lambda pot: (pot.end, not pot.is_subscription)
        )
        for number, pot in enumerate(past):
            pot.ended = self.starts if pot.ended is None else pot.ended
            holds = [flow for flow in self.workflows.values() if "held_until" in flow and flow["number"] <= pot.ended]
            too_much = sum(older.left for older in past[: number + 1]) - sum(flow["start"] for flow in holds)
            for older in past[: number + 1]:
                part = max(0, min(older.left, too_much))
                older.left -= part
                too_much -= part
        self._sweep_up()

    # Time: what happens first is done first

    def next_due(self) -> datetime | None:
        """When time alone does something next."""
        due = [workflow["held_until"] for workflow in self.workflows.values() if "held_until" in workflow]
        due += [pot.end for pot in self.pots if pot.end > self.time]
        if self.current is not None:
            due.append(self._period_end())
        if self.scheduled is not None:
            due.append(self.subscriptions[self.scheduled]["anchor"])
        return min(due, default=None)

    def _period_end(self) -> datetime:
        assert self.current is not None
        subscription = self.subscriptions[self.current]
        return months_after(subscription["anchor"], max(subscription["granted"]) + 1)

    def catch_up(self, now: datetime) -> None:
        while (due := self.next_due()) is not None and due <= now:
            self.time = due
            for workflow in self.workflows.values():
                if "held_until" in workflow and workflow["held_until"] <= due:
                    del workflow["held_until"]
            if self.scheduled is not None and self.subscriptions[self.scheduled]["anchor"] <= due:
                self._replace_current(self.scheduled)
                self._begin(0)
            elif self.current is not None and self._period_end() <= due:
                self._next_period(self.subscriptions[self.current])
            self._end_uncovered()
        self.time = now

    def _next_period(self, subscription: dict[str, Any]) -> None:
        kept = min(self.period, subscription["rollover_limit"]) if subscription["active"] else 0
        self._set_aside(self.period - kept)
        if subscription["active"]:
            self._begin(max(subscription["granted"]) + 1)
        else:
            self.current = None

    def _set_aside(self, credits: int) -> None:
        if credits:
            self.pots.append(Pot(credits, self._period_end(), is_subscription=True, of=self._period_name()))
            self.period -= credits

    def _period_name(self) -> str:
        assert self.current is not None
        return f"{self.current}:{max(self.subscriptions[self.current]['granted'])}"

    def _replace_current(self, subscription_id: str) -> None:
        if self.current is not None:
            self._set_aside(self.period)
        self.current, self.scheduled = subscription_id, None

    def _begin(self, period: int) -> None:
        assert self.current is not None
        subscription = self.subscriptions[self.current]
        subscription.setdefault("first", period)
        subscription["granted"][period] = 0
        self._allocate(subscription, period)
        self.usage = 0

    def _allocate(self, subscription: dict[str, Any], period: int) -> None:
        """Give the period what it lacks of what the subscription says now. A debt takes it first."""
        included = subscription["monthly_credits"]
        if period == subscription["first"]:
            included = max(0, included - subscription["lacks"])
        more = max(0, included - subscription["granted"][period])
        subscription["granted"][period] += more
        settled = min(more, max(0, -self.balances["prepaid"]))
        self.permanent += settled
        self.period += more - settled

    # Messages

    def receive(self, task: str, fields: dict[str, Any], now: datetime) -> Answer:
        self.catch_up(now)
        answer = self._decide(task, fields, now)
        self._end_uncovered()
        return answer

    def _decide(self, task: str, fields: dict[str, Any], now: datetime) -> Answer:
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
            case (
                "wallet.purchase"
                | "wallet.grant"
                | "wallet.adjust"
                | "wallet.refund"
                | "wallet.bill"
                | "wallet.reverse"
            ):
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
                self.starts += 1
                workflow["number"] = self.starts
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
        if cap is not None and self.usage + self.balances["reserved"] + credits > cap:
            return "period_cap"
        return None

    def _finish(self, workflow_id: str, used: int) -> Answer:
        workflow = self.workflows.setdefault(workflow_id, {})
        if "finish" in workflow:
            return ("settled", None, True) if workflow["finish"] == used else ("refused", "conflict", False)
        workflow["finish"] = used
        workflow.pop("held_until", None)
        workflow["paid by"] = self._use(used)
        self.usage += used
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
        amount = fields["credits"]
        match task:
            case "wallet.refund" if fields["workflow_id"] is not None:
                return self._refund(self.workflows.get(fields["workflow_id"], {}), amount)
            case "wallet.reverse":
                return self._reverse(fields["purchase_id"], amount)
            case "wallet.purchase" | "wallet.grant" if fields["expires_at"] is not None:
                self._bring(amount, datetime.fromisoformat(fields["expires_at"]), of=fields.get("purchase_id", ""))
            case _ if amount >= 0:
                self._bring(amount)
            case _:
                least = min(self.balances["prepaid"], self.available)
                if least + amount < 0 and not fields.get("allow_negative"):
                    return "refused", "insufficient_credits", False
                self._use(-amount, prepaid_only=True)
        return "posted", None, False

    def _refund(self, workflow: dict[str, Any], credits: int) -> Answer:
        """Credit by credit: the permanent ones first, then what would have ended last."""
        given = workflow.setdefault("refunded", 0)
        if given + credits > workflow.get("finish", 0):
            return "refused", "refund_exceeds_usage", False
        never = datetime.max.replace(tzinfo=UTC)
        paid = sorted(workflow["paid by"], key=lambda part: part[0] or never, reverse=True)
        ends = [end for end, part in paid for _ in range(part)][given : given + credits]
        for end in dict.fromkeys(ends):
            part = ends.count(end)
            self._bring(part, None if end is None else max(end, self.time + timedelta(days=30)))
        workflow["refunded"] += credits
        return "posted", None, False

    def _reverse(self, purchase_id: str, credits: int | None) -> Answer:
        purchase = self.said.get(("wallet.purchase", purchase_id))
        if purchase is None:
            return "refused", "unknown_purchase", False
        left = purchase["credits"] - self.reversed.get(purchase_id, 0)
        amount = left if credits is None else credits
        if amount > left or not left:
            return "refused", "reversal_exceeds_purchase", False
        self.reversed[purchase_id] = self.reversed.get(purchase_id, 0) + amount
        for pot in self.pots:
            if pot.of == purchase_id and not pot.is_subscription:
                part = min(pot.left, amount)
                pot.left -= part
                amount -= part
        self._use(amount, prepaid_only=True)
        return "posted", None, False

    def _configure(self, fields: dict[str, Any]) -> Answer:
        if fields["version"] <= self.limits["version"]:
            return "ignored", "stale_version", False
        self.limits = {name: fields[name] for name in ("version", "credit_limit", "period_cap")}
        return "posted", None, False

    def _subscribe(self, fields: dict[str, Any], now: datetime) -> Answer:
        subscription_id, version = fields["subscription_id"], fields["version"]
        known = self.subscriptions.get(subscription_id, {"version": 0, "anchor": None, "granted": {}})
        if version <= self.plan_version:
            return "ignored", "stale_version", False
        anchor = None if fields["anchor"] is None else datetime.fromisoformat(fields["anchor"])
        if known["anchor"] is not None and anchor not in (None, known["anchor"]):
            return "refused", "conflict", False
        anchor = known["anchor"] or anchor or now
        self.plan_version = version
        self.scheduled = None
        if version <= known["version"]:
            if anchor <= now and self.current is not None:
                self.subscriptions[self.current]["active"] = False
            return "ignored", "stale_version", False
        terms = {name: fields[name] for name in ("version", "monthly_credits", "rollover_limit")}
        terms["lacks"] = known.get("lacks", 0)
        if fields["first_credits"] is not None:
            terms["lacks"] = fields["monthly_credits"] - fields["first_credits"]
        subscription = self.subscriptions[subscription_id] = {**known, **terms, "anchor": anchor, "active": True}
        if anchor > now:
            self.scheduled = subscription_id
            return "posted", None, False
        if self.current != subscription_id:
            self._replace_current(subscription_id)
        period = 0
        while months_after(anchor, period + 1) <= now:
            period += 1
        if period in subscription["granted"]:
            again = [pot for pot in self.pots if pot.is_subscription and pot.of == self._period_name()]
            self.period += sum(pot.left for pot in again)
            self.pots = [pot for pot in self.pots if pot not in again]
            self._allocate(subscription, period)
        else:
            self._begin(period)
        return "posted", None, False

    def _unsubscribe(self, fields: dict[str, Any]) -> Answer:
        subscription_id, version = fields["subscription_id"], fields["version"]
        known = self.subscriptions.setdefault(subscription_id, {"version": 0, "anchor": None, "granted": {}})
        if version <= max(known["version"], self.plan_version):
            return "ignored", "stale_version", False
        known["version"], known["active"] = version, False
        if subscription_id == self.scheduled:
            self.scheduled = None
        elif subscription_id != self.current:
            return "ignored", "not_subscribed", False
        return "posted", None, False


def paid(paid_by: Mapping[str, int], *sources: str) -> int:
    return sum(paid_by.get(source, 0) for source in sources)


def settles(event: Event, prepaid_before: int) -> int:
    """How much of a debt the event settles: all that it can, and it says so."""
    settled = min(event.credits, max(0, -prepaid_before))
    assert event.metadata.get("debt_settled", 0) == settled
    return settled


def check_history(events: Sequence[Event]) -> None:
    """Every event is numbered, changes what its type says, and leaves Σ credits = available."""
    total = prepaid = subscription = reserved = usage = 0
    for number, event in enumerate(events, start=1):
        assert event.seq == number
        assert number == 1 or events[number - 2].created_at <= event.created_at
        effect, was_usage, was_prepaid = event.credits, usage, prepaid
        changes = (
            event.prepaid_balance_after - prepaid,
            event.subscription_balance_after - subscription,
            event.reserved_after - reserved,
            event.period_usage_after - usage,
        )
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
                paid_by = event.metadata.get("paid_by", {})
                assert changes == (-paid(paid_by, "ending", "prepaid"), -paid(paid_by, "subscription"), 0, -effect)
                assert sum(paid_by.values()) == -effect
                assert all(part > 0 for part in paid_by.values())
            case "subscription_credit" if "/" in event.idempotency_key:
                settled = settles(event, was_prepaid)
                assert event.metadata["reason"] == "plan_change"
                assert changes == (settled, effect - settled, 0, 0)
                assert effect > 0 or "effective_at" in event.metadata or "replaced_plan" in event.metadata
            case "subscription_credit":
                settled = settles(event, was_prepaid)
                assert changes == (settled, effect - settled, 0, -was_usage)
                assert effect >= 0
            case "adjustment" if "/ended/" in event.idempotency_key:
                kind = event.idempotency_key.partition(":")[0]
                assert event.metadata["reason"] == f"{kind}_expired"
                assert datetime.fromisoformat(event.metadata["expires_at"]) <= event.created_at
                assert changes == ((0, effect, 0, 0) if kind == "subscription" else (effect, 0, 0, 0))
                assert effect < 0
            case "prepaid_purchase" | "grant" | "refund":
                settles(event, was_prepaid)
                assert changes == (effect, 0, 0, 0)
                assert effect > 0
                assert event.workflow_id == (
                    event.metadata.get("workflow_id") if event.event_type == "refund" else None
                )
            case "adjustment" | "billing":
                assert changes == (effect, 0, 0, 0)
            case _:
                assert_never(event.event_type)
    assert len({event.idempotency_key for event in events}) == len(events)
