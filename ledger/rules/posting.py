"""Every event is made here, and every refusal."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from holdfast_client.messages import MAX_CREDITS, Message, WalletMessage, WorkflowMessage
from holdfast_client.results import ErrorCode
from ledger.state import Decision, Event, EventType, Refusal, Wallet, Workflow

SCHEDULER = "scheduler"
"""The source of what time alone does."""


class OutOfRangeError(Exception):
    """A balance would leave ±(2^53-1)."""


def post(
    wallet: Wallet,
    now: datetime,
    event_type: EventType,
    credits: int,
    *,
    key: str,
    source: str,
    metadata: Mapping[str, Any],
    prepaid: int = 0,
    subscription: int = 0,
    reserved: int = 0,
    usage: int = 0,
    workflow: Workflow | None = None,
) -> tuple[Wallet, Event]:
    """Append one event: change the balances by the given amounts and number the event.

    Raises OutOfRangeError if a balance would leave its bounds.
    """
    after = wallet._replace(
        last_seq=wallet.last_seq + 1,
        last_event_at=now,
        prepaid_balance=wallet.prepaid_balance + prepaid,
        subscription_balance=wallet.subscription_balance + subscription,
        reserved=wallet.reserved + reserved,
        period_usage=wallet.period_usage + usage,
    )
    assert after.available == wallet.available + credits
    assert 0 <= after.subscription_balance <= MAX_CREDITS
    assert after.reserved >= 0
    assert 0 <= after.period_usage <= MAX_CREDITS
    # These two bound the available balance too, whatever ends later.
    if (
        after.balance > MAX_CREDITS
        or after.prepaid_balance - after.reserved < -MAX_CREDITS
        or after.reserved > MAX_CREDITS
    ):
        raise OutOfRangeError
    return after, Event(
        org_id=wallet.org_id,
        seq=after.last_seq,
        created_at=now,
        event_type=event_type,
        source=source,
        workflow_id=None if workflow is None else workflow.workflow_id,
        project_id=None if workflow is None else workflow.project_id,
        activity_name=None if workflow is None else workflow.activity_name,
        credits=credits,
        prepaid_balance_after=after.prepaid_balance,
        subscription_balance_after=after.subscription_balance,
        reserved_after=after.reserved,
        period_usage_after=after.period_usage,
        idempotency_key=key,
        metadata=metadata,
    )


def metadata_of(message: Message, **own: Any) -> dict[str, Any]:
    """The message's metadata and the ledger's own keys. A key of `own` replaces the sender's; None removes it."""
    if message.occurred_at is not None:
        own["occurred_at"] = message.occurred_at.isoformat()
    said = {name: value for name, value in own.items() if value is not None}
    if not message.metadata:  # as nearly always
        return said
    return {name: value for name, value in message.metadata.items() if name not in own} | said


def refuse(wallet: Wallet, code: ErrorCode, error: str) -> Decision:
    """A decision that changes nothing: the message becomes a dead letter."""
    return Decision(wallet, refusal=Refusal(code, error))


def conflict(wallet: Wallet, message: WorkflowMessage | WalletMessage, earlier: str) -> Decision:
    """Refuse a message that says something else than the same one `earlier`."""
    name = message.workflow_id if isinstance(message, WorkflowMessage) else message.message_id
    return refuse(wallet, "conflict", f"{message.task}: {name} {earlier}, so this message contradicts it")
