"""What a message did, as its sender receives it: immutable values, with no behaviour but derived properties."""

from datetime import datetime
from typing import Literal, NamedTuple

WorkflowState = Literal["reserved", "rejected", "settled", "cancelled", "failed", "expired"]
OutcomeName = Literal["reserved", "rejected", "settled", "released", "posted", "ignored"]
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
    "unknown_purchase",
    "reversal_exceeds_purchase",
    "balance_out_of_range",
    "unexpected_error",
]
"""Why a message is a dead letter."""


class Limit(NamedTuple):
    """A limit on what starts may reserve."""

    kind: Reason
    limit: int
    """Credits: what may be reserved in all, or used and reserved within the period."""
    used: int
    reserved: int
    resets_at: datetime | None
    """When `used` is 0 again. None: never, as there is no period."""

    @property
    def remaining(self) -> int:
        """The credits that it still allows to reserve; negative if more is used and reserved than it allows."""
        return self.limit - self.used - self.reserved


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
    limit: Limit | None = None
    """The limit that rejected the start; None for a repetition."""
    shortfall: int | None = None
    """How many credits that limit lacked; None for a repetition."""

    @property
    def holds(self) -> bool:
        """Whether credits are held for the workflow now: after a start, whether it may run.

        The outcome does not say so: a repeated start has its first outcome, whatever has happened since.
        """
        return self.state == "reserved"
