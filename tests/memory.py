"""A ledger of one organization in memory: the pure rules, applied as the store applies them."""

from datetime import datetime, timedelta
from typing import Any

from holdfast_client.messages import InvalidMessage, Purchase, Reverse, WalletMessage, parse
from ledger import rules
from ledger.state import Decision, Event, PostedMessage, Refusal, Subscription, Wallet, Workflow

Row = tuple[str, int, int, int, int, int]


def row(event: Event) -> Row:
    """(event_type, credits, prepaid, subscription, reserved, period usage after it)."""
    return (
        event.event_type,
        event.credits,
        event.prepaid_balance_after,
        event.subscription_balance_after,
        event.reserved_after,
        event.period_usage_after,
    )


def rows(decision: Decision) -> list[Row]:
    return [row(event) for event in decision.events]


class MemoryLedger:
    """Begins what is due, releases what expired, then decides: in the order of `ledger.store`."""

    def __init__(self, now: datetime, org_id: str = "acme") -> None:
        self.now = now
        self.wallet = Wallet(org_id)
        self.workflows: dict[str, Workflow] = {}
        self.subscriptions: dict[str, Subscription] = {}
        self.posted: dict[tuple[str, str], PostedMessage] = {}
        self.events: list[Event] = []

    def wait(self, **duration: float) -> list[Event]:
        """Let time pass, and do what it alone does."""
        return self.wait_until(self.now + timedelta(**duration))

    def wait_until(self, now: datetime) -> list[Event]:
        """Let time pass until `now`, and do what it alone does."""
        self.now = now
        return self.catch_up()

    def catch_up(self) -> list[Event]:
        """Begin the periods and release the holds that are due. Answers with the events."""
        before = len(self.events)
        if not self.wallet.is_due(self.now):
            return []
        self.wallet, changed, events = rules.begin_due(self.wallet, self.subscriptions, self.now)
        self.subscriptions |= {known.subscription_id: known for known in changed}
        self.events += events
        held = sorted(_hold(workflow) for workflow in self.workflows.values() if workflow.state == "reserved")
        for expires_at, workflow_id in held:
            if expires_at <= self.now:
                workflow = self.workflows[workflow_id]
                self.wallet, expired, events = rules.release_expired(self.wallet, workflow, self.now)
                self.workflows[workflow_id] = expired
                self.events += events
        open_until = [expires_at for expires_at, _ in held if expires_at > self.now]
        self.wallet = self.wallet._replace(next_hold_expiry=min(open_until, default=None))
        return self.events[before:]

    def send(self, task: str, **fields: Any) -> Decision:
        """Apply one message."""
        self.catch_up()
        message = parse(task, {"org_id": self.wallet.org_id, **fields})
        if isinstance(message, InvalidMessage):
            return Decision(self.wallet, refusal=Refusal(message.code, message.error))
        named: dict[str, Any] = {"workflow": self.workflows.get(getattr(message, "workflow_id", None) or "")}
        if isinstance(message, WalletMessage):
            named["posted"] = self.posted.get((message.kind, message.message_id))
            named["subscriptions"] = self.subscriptions
        if isinstance(message, Reverse):
            named["purchase"] = self.posted.get((Purchase.kind, message.purchase_id))
        decision = rules.decide(self.wallet, message, self.now, **named)
        if decision.refusal is not None or decision.duplicate:
            assert decision.wallet == self.wallet
            assert decision.posted == ()
            assert decision.events == ()
            return decision
        self.wallet = decision.wallet
        self.events += decision.events
        if decision.workflow is not None:
            self.workflows[decision.workflow.workflow_id] = decision.workflow
        self.subscriptions |= {known.subscription_id: known for known in decision.subscriptions}
        self.posted |= {(posted.kind, posted.message_id): posted for posted in decision.posted}
        return decision


def _hold(workflow: Workflow) -> tuple[datetime, str]:
    assert workflow.expires_at is not None
    return workflow.expires_at, workflow.workflow_id
