"""The ledger's values: immutable, with no behaviour but derived properties.

The fields of `Wallet`, `Workflow`, `Subscription`, `PostedMessage` and `Event` are the columns of their tables. Every
message creates several values, so they are named tuples, which are created five times as fast as frozen dataclasses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

EventType = Literal[
    "usage",
    "prepaid_purchase",
    "subscription_credit",
    "billing",
    "adjustment",
    "grant",
    "refund",
    "reservation",
    "reservation_released",
]
WorkflowState = Literal["reserved", "rejected", "settled", "cancelled", "failed", "expired"]
OutcomeName = Literal["reserved", "rejected", "settled", "released", "posted", "ignored"]
StepAnswer = Literal["reserved", "insufficient_credits", "period_cap", "released", "not_started", "already_ended"]
Reason = Literal[
    "insufficient_credits", "period_cap", "not_started", "already_ended", "stale_version", "not_subscribed"
]
"""Why a message had its outcome, where there is more than one reason."""

ErrorCode = Literal[
    "invalid_message",
    "too_large",
    "not_allowed",
    "delivery_limit",
    "undecodable_message",
    "unknown_task",
    "conflict",
    "insufficient_credits",
    "refund_exceeds_usage",
    "balance_out_of_range",
    "unexpected_error",
]
"""Why a message is a dead letter."""

OUTCOMES: dict[StepAnswer, tuple[OutcomeName, Reason | None]] = {
    "reserved": ("reserved", None),
    "insufficient_credits": ("rejected", "insufficient_credits"),
    "period_cap": ("rejected", "period_cap"),
    "released": ("released", None),
    "not_started": ("ignored", "not_started"),
    "already_ended": ("ignored", "already_ended"),
}
"""The outcome and the reason for each answer to a start, a cancel or a fail."""


class Wallet(NamedTuple):
    """An organization's balances and limits, in credits, and what is due next."""

    org_id: str
    last_seq: int = 0
    last_event_at: datetime | None = None
    prepaid_balance: int = 0
    subscription_balance: int = 0
    reserved: int = 0
    period_usage: int = 0
    credit_limit: int = 0
    period_cap: int | None = None
    config_version: int = 0
    subscription_id: str | None = None
    """The subscription that allocates credits now, if any."""
    next_period_at: datetime | None = None
    """When its next period begins (or, once unsubscribed, when the credits left expire)."""
    next_hold_expiry: datetime | None = None
    """No open reservation expires before this. None: there is none."""

    @property
    def balance(self) -> int:
        """All credits of the wallet, reserved ones included."""
        return self.subscription_balance + self.prepaid_balance

    @property
    def available(self) -> int:
        """The credits that a workflow may still reserve, without the credit limit."""
        return self.balance - self.reserved

    def is_due(self, now: datetime) -> bool:
        """Whether a period begins or a reservation expires by `now`."""
        return (self.next_period_at is not None and self.next_period_at <= now) or (
            self.next_hold_expiry is not None and self.next_hold_expiry <= now
        )


class Workflow(NamedTuple):
    """One workflow of the engine: the amounts of its messages, and the first answer to each."""

    org_id: str
    workflow_id: str
    state: WorkflowState
    start_credits: int | None = None
    start_answer: StepAnswer | None = None
    expires_at: datetime | None = None
    finish_credits: int | None = None
    cancel_answer: StepAnswer | None = None
    fail_answer: StepAnswer | None = None
    refunded: int = 0
    project_id: str | None = None
    activity_name: str | None = None


class Subscription(NamedTuple):
    """One subscription: its newest version, and the last period that it began."""

    org_id: str
    subscription_id: str
    version: int
    active: bool
    plan: str | None = None
    monthly_credits: int = 0
    rollover_limit: int = 0
    anchor: datetime | None = None
    """When period 0 starts. None as long as only an unsubscription has arrived."""
    period: int | None = None
    """The number of the last period that began."""
    period_granted: int = 0
    """The most credits that were granted in that period."""


class PostedMessage(NamedTuple):
    """A wallet message that was applied: its terms and its answer."""

    org_id: str
    kind: str
    message_id: str
    terms: Mapping[str, Any]
    outcome: OutcomeName
    reason: Reason | None


class Event(NamedTuple):
    """One immutable row of the credit history, with the whole wallet after it."""

    org_id: str
    seq: int
    created_at: datetime
    event_type: EventType
    source: str
    workflow_id: str | None
    project_id: str | None
    activity_name: str | None
    credits: int
    """The signed effect on the available balance."""
    prepaid_balance_after: int
    subscription_balance_after: int
    reserved_after: int
    period_usage_after: int
    idempotency_key: str
    """What caused the event, unique within the organization."""
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a message cannot be applied, even if it is tried again. It becomes a dead letter."""

    code: ErrorCode
    error: str


class Decision(NamedTuple):
    """What a message does: its answer, the changed records, and the events to append.

    A record that is None does not change. A decision with a `refusal` changes nothing.
    """

    wallet: Wallet
    outcome: OutcomeName = "ignored"
    reason: Reason | None = None
    duplicate: bool = False
    events: tuple[Event, ...] = ()
    workflow: Workflow | None = None
    subscription: Subscription | None = None
    posted: PostedMessage | None = None
    refusal: Refusal | None = None


class Result(NamedTuple):
    """What a message did, as its sender receives it."""

    outcome: OutcomeName
    reason: Reason | None
    duplicate: bool
    org_id: str
    workflow_id: str | None
    state: WorkflowState | None
    """The state of the workflow now. None: the message names no workflow, or the worker is older than this field."""
    event_seqs: tuple[int, ...]
    """The numbers of the events that this delivery wrote: none for a duplicate."""
    available: int
    """The wallet's available credits after the message."""

    @property
    def holds(self) -> bool:
        """Whether credits are held for the workflow now: after a start, whether it may run.

        The outcome does not say so: a repeated start has its first outcome, whatever has happened since.
        """
        return self.state == "reserved"
