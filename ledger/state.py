"""The ledger's values: immutable, with no behaviour but derived properties.

The fields of `Wallet`, `Workflow`, `Subscription`, `PostedMessage` and `Event` are the columns of their tables. Every
message creates several values, so they are named tuples, which are created five times as fast as frozen dataclasses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

from holdfast_client.results import ErrorCode, Limit, OutcomeName, Reason, WorkflowState

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
StepAnswer = Literal["reserved", "insufficient_credits", "period_cap", "released", "not_started", "already_ended"]

OUTCOMES: dict[StepAnswer, tuple[OutcomeName, Reason | None]] = {
    "reserved": ("reserved", None),
    "insufficient_credits": ("rejected", "insufficient_credits"),
    "period_cap": ("rejected", "period_cap"),
    "released": ("released", None),
    "not_started": ("ignored", "not_started"),
    "already_ended": ("ignored", "already_ended"),
}
"""The outcome and the reason for each answer to a start, a cancel or a fail."""


class EndingCredits(NamedTuple):
    """Credits of a wallet with an end of their own: what is left of one grant, purchase, refund or ended period."""

    org_id: str
    origin: str
    """The idempotency key of the event that brought them: its type, and the id of the message or the period."""
    expires_at: datetime
    seq: int
    """No event after this one brought any of them."""
    remaining: int
    """Always above 0: what is used up is no row."""
    plan: str | None = None
    """The plan, if a subscription brought them."""

    @property
    def is_from_subscription(self) -> bool:
        """Whether they are part of the subscription balance, not of the prepaid balance."""
        return self.origin.startswith("subscription:")


class Cover(NamedTuple):
    """What keeps credits that are past their end: the reservations that were made before that."""

    until: datetime
    """It covers what ended until then, together with the covers before it."""
    seq: int
    """The wallet's last event at that time: later reservations cover nothing of it."""
    credits: int
    """The credits of those of the reservations that are open still."""


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
    plan_version: int = 0
    """The version of the newest `wallet.subscribe`, whichever subscription it named."""
    scheduled_id: str | None = None
    """The subscription that takes over at `scheduled_at`, if one is scheduled."""
    scheduled_at: datetime | None = None
    next_ending_at: datetime | None = None
    """When the next of the credits with an end of their own end. None: there are none, or all are past their end."""
    held_past_end: int = 0
    """The credits in these rows that are past their end, and stay as long as reservations cover them."""
    covers: tuple[Cover, ...] | None = None
    """What covers the credits that are past their end, oldest first. None: there are none."""
    ending: tuple[EndingCredits, ...] = ()
    """The prepaid credits with an end of their own, in the order of use: rows of `ending_credits`, no column."""
    set_aside: tuple[EndingCredits, ...] = ()
    """The same for what ended periods and replaced plans have left of the subscription balance."""

    @property
    def has_ending(self) -> bool:
        """Whether there are rows in `ending_credits`."""
        return self.next_ending_at is not None or self.held_past_end > 0

    @property
    def balance(self) -> int:
        """All credits of the wallet, reserved ones included."""
        return self.subscription_balance + self.prepaid_balance

    @property
    def available(self) -> int:
        """The credits that a workflow may still reserve, without the credit limit."""
        return self.balance - self.reserved

    def is_due(self, now: datetime) -> bool:
        """Whether time alone does something by `now`."""
        return (
            (self.next_period_at is not None and self.next_period_at <= now)
            or (self.next_hold_expiry is not None and self.next_hold_expiry <= now)
            or (self.next_ending_at is not None and self.next_ending_at <= now)
            or (self.scheduled_at is not None and self.scheduled_at <= now)
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
    reserved_seq: int | None = None
    """The event of its reservation."""
    paid_by_ending: Mapping[str, int] | None = None
    """What credits that end paid of its usage: how much, by their end. None: nothing."""
    rejected_at: datetime | None = None
    """When its start was rejected."""


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
    first_lacks: int = 0
    """By how much less than any other its first period is given."""
    first_period: int | None = None
    """The number of the first period that it began."""
    period_plan: str | None = None
    """The plan that the last period was granted by: after a downgrade, not yet `plan`."""


class PostedMessage(NamedTuple):
    """A wallet message that was applied: its terms and its answer."""

    org_id: str
    kind: str
    message_id: str
    terms: Mapping[str, Any]
    outcome: OutcomeName
    reason: Reason | None
    reversed: int = 0
    """Of a purchase: how much of it was reversed."""


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


class Quote(NamedTuple):
    """What a start would be answered now. It holds nothing."""

    outcome: OutcomeName
    reason: Reason | None
    available: int
    shortfall: int | None
    """How many credits the limit that rejects it lacks. None: it is not rejected."""
    limits: tuple[Limit, ...]
    """Every limit of the wallet, in the order in which a start is checked against them."""
    as_of_seq: int
    """The number of the wallet's last event."""


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
    subscriptions: tuple[Subscription, ...] = ()
    posted: tuple[PostedMessage, ...] = ()
    limit: Limit | None = None
    shortfall: int | None = None
    refusal: Refusal | None = None
