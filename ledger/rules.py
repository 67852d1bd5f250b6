"""What a message does to a wallet. Pure: a decision depends on the arguments alone.

`decide` decides one message. `begin_due_periods` and `release_expired` do what time alone does, before any message.
`_post` makes every event and asserts the arithmetic of the ledger; assertions stay on in production.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, assert_never

from ledger.messages import (
    MAX_CREDITS,
    Adjust,
    AnyMessage,
    AnyWalletMessage,
    AnyWorkflowMessage,
    Bill,
    Cancel,
    Configure,
    Fail,
    Finish,
    Grant,
    Message,
    Purchase,
    Refund,
    Start,
    Subscribe,
    Unsubscribe,
    WalletMessage,
    WorkflowMessage,
)
from ledger.periods import period_at, period_start
from ledger.state import (
    OUTCOMES,
    Decision,
    ErrorCode,
    Event,
    EventType,
    PostedMessage,
    Refusal,
    StepAnswer,
    Subscription,
    Wallet,
    Workflow,
    WorkflowState,
)

SCHEDULER = "scheduler"
"""The source of events that time alone causes."""


class _OutOfRangeError(Exception):
    """A balance would leave ±(2^53-1)."""


def decide(
    wallet: Wallet,
    message: AnyMessage,
    now: datetime,
    *,
    workflow: Workflow | None = None,
    subscription: Subscription | None = None,
    posted: PostedMessage | None = None,
) -> Decision:
    """Decide what `message` does to `wallet` at `now`. Nothing may be due in the wallet.

    `workflow` and `subscription` are the records that the message names; `posted` is the same message if it was applied
    before. A message that cannot be applied gives a decision with a `refusal`, not an exception.
    """
    assert wallet.org_id == message.org_id
    assert not wallet.is_due(now)
    assert wallet.last_event_at is None or wallet.last_event_at <= now
    try:
        if isinstance(message, WorkflowMessage):
            return _decide_workflow(wallet, message, now, workflow)
        if posted is not None:
            return _repeat(wallet, message, posted)
        return _decide_wallet(wallet, message, now, workflow, subscription)
    except _OutOfRangeError:
        return _refuse(wallet, "balance_out_of_range", f"{message.task}: a balance would pass 2^53-1 credits")


# Workflows


def _decide_workflow(wallet: Wallet, message: AnyWorkflowMessage, now: datetime, workflow: Workflow | None) -> Decision:
    match message:
        case Start():
            return _start(wallet, message, now, workflow)
        case Finish():
            return _finish(wallet, message, now, workflow)
        case Cancel() | Fail():
            return _end(wallet, message, now, workflow)
        case _:
            assert_never(message)


def _start(wallet: Wallet, message: Start, now: datetime, workflow: Workflow | None) -> Decision:
    if workflow is not None and workflow.start_credits is not None:
        assert workflow.start_answer is not None
        if workflow.start_credits != message.credits:
            return _conflict(wallet, message, f"was started with {workflow.start_credits} credits")
        return _answer(wallet, workflow.start_answer, duplicate=True)
    if workflow is not None:
        # A terminal message came first: the amount is remembered, nothing is held.
        workflow = workflow._replace(start_credits=message.credits, start_answer="already_ended")
        return _answer(wallet, "already_ended", workflow=workflow)

    answer = _reservation_answer(wallet, message.credits)
    expires_at = now + timedelta(seconds=message.expires_in_s) if answer == "reserved" else None
    workflow = Workflow(
        message.org_id,
        message.workflow_id,
        "rejected" if expires_at is None else "reserved",
        start_credits=message.credits,
        start_answer=answer,
        expires_at=expires_at,
        project_id=message.project_id,
        activity_name=message.activity_name,
    )
    if expires_at is None:
        return _answer(wallet, answer, workflow=workflow)

    wallet, event = _post(
        wallet,
        now,
        "reservation",
        -message.credits,
        reserved=message.credits,
        key=f"start:{message.workflow_id}",
        source=message.source,
        metadata=_metadata(message, expires_at=expires_at.isoformat()),
        workflow=workflow,
    )
    if wallet.next_hold_expiry is None or expires_at < wallet.next_hold_expiry:
        wallet = wallet._replace(next_hold_expiry=expires_at)
    return _answer(wallet, "reserved", workflow=workflow, event=event)


def _reservation_answer(wallet: Wallet, credits: int) -> StepAnswer:
    if wallet.available + wallet.credit_limit < credits:
        return "insufficient_credits"
    if wallet.period_cap is not None and wallet.period_usage + wallet.reserved + credits > wallet.period_cap:
        return "period_cap"
    return "reserved"


def _finish(wallet: Wallet, message: Finish, now: datetime, workflow: Workflow | None) -> Decision:
    if workflow is not None and workflow.finish_credits is not None:
        if workflow.finish_credits != message.credits:
            return _conflict(wallet, message, f"was finished with {workflow.finish_credits} credits")
        return Decision(wallet, "settled", duplicate=True)

    unreserved = workflow is None or workflow.state == "rejected"
    if workflow is None:
        workflow = Workflow(message.org_id, message.workflow_id, "settled")
    released: tuple[Event, ...] = ()
    if workflow.state == "reserved":
        metadata = _metadata(message, unreserved=None, overrun=None)
        wallet, event = _release(wallet, workflow, now, "settled", message.source, metadata)
        released = (event,)
    workflow = workflow._replace(
        state="settled",
        finish_credits=message.credits,
        project_id=message.project_id or workflow.project_id,
        activity_name=message.activity_name or workflow.activity_name,
    )
    from_subscription = min(message.credits, wallet.subscription_balance)
    from_prepaid = message.credits - from_subscription
    overrun = max(0, from_prepaid - max(0, wallet.prepaid_balance))
    wallet, usage = _post(
        wallet,
        now,
        "usage",
        -message.credits,
        subscription=-from_subscription,
        prepaid=-from_prepaid,
        usage=message.credits,
        key=f"finish:{message.workflow_id}",
        source=message.source,
        metadata=_metadata(message, unreserved=unreserved or None, overrun=overrun or None),
        workflow=workflow,
    )
    return Decision(wallet, "settled", events=(*released, usage), workflow=workflow)


def _end(wallet: Wallet, message: Cancel | Fail, now: datetime, workflow: Workflow | None) -> Decision:
    """Cancel or fail. The net effect of a workflow without a finish is zero."""
    cancelled = isinstance(message, Cancel)
    state: WorkflowState = "cancelled" if cancelled else "failed"
    answer: StepAnswer = "already_ended"
    event = None
    if workflow is None:
        workflow, answer = Workflow(message.org_id, message.workflow_id, state), "not_started"
    elif (earlier := workflow.cancel_answer if cancelled else workflow.fail_answer) is not None:
        return _answer(wallet, earlier, duplicate=True)
    elif workflow.state == "reserved":
        metadata = _metadata(message, given_reason=message.reason)
        wallet, event = _release(wallet, workflow, now, state, message.source, metadata)
        workflow, answer = workflow._replace(state=state), "released"
    workflow = workflow._replace(cancel_answer=answer) if cancelled else workflow._replace(fail_answer=answer)
    return _answer(wallet, answer, workflow=workflow, event=event)


def _answer(
    wallet: Wallet,
    answer: StepAnswer,
    *,
    duplicate: bool = False,
    workflow: Workflow | None = None,
    event: Event | None = None,
) -> Decision:
    outcome, reason = OUTCOMES[answer]
    return Decision(
        wallet,
        outcome,
        reason,
        duplicate=duplicate,
        workflow=workflow,
        events=() if event is None else (event,),
    )


# The wallet's own messages


def _decide_wallet(
    wallet: Wallet,
    message: AnyWalletMessage,
    now: datetime,
    workflow: Workflow | None,
    subscription: Subscription | None,
) -> Decision:
    match message:
        case Purchase():
            decision = _post_prepaid(wallet, message, now, "prepaid_purchase")
        case Grant():
            decision = _post_prepaid(wallet, message, now, "grant", reason=message.reason)
        case Adjust():
            decision = _adjust(wallet, message, now)
        case Refund():
            decision = _refund(wallet, message, now, workflow)
        case Bill():
            decision = _bill(wallet, message, now)
        case Subscribe():
            decision = _subscribe(wallet, message, now, subscription)
        case Unsubscribe():
            decision = _unsubscribe(wallet, message, subscription)
        case Configure():
            decision = _configure(wallet, message)
        case _:
            assert_never(message)
    if decision.refusal is not None:
        return decision
    posted = PostedMessage(
        message.org_id,
        message.kind,
        message.message_id,
        message.terms(),
        decision.outcome,
        decision.reason,
    )
    return decision._replace(posted=posted)


def _repeat(wallet: Wallet, message: WalletMessage, posted: PostedMessage) -> Decision:
    terms = message.terms()
    changed = [name for name, value in terms.items() if posted.terms.get(name) != value]
    if changed:
        said = ", ".join(f"{name} {json.dumps(posted.terms.get(name))}" for name in changed)
        return _conflict(wallet, message, f"was applied with {said}")
    return Decision(wallet, posted.outcome, posted.reason, duplicate=True)


def _post_prepaid(
    wallet: Wallet,
    message: Purchase | Grant | Adjust | Refund | Bill,
    now: datetime,
    event_type: EventType,
    **own: Any,
) -> Decision:
    """Post the message's credits to the prepaid balance, with the keys `own` in the event's metadata."""
    wallet, event = _post(
        wallet,
        now,
        event_type,
        message.credits,
        prepaid=message.credits,
        key=f"{message.kind}:{message.message_id}",
        source=message.source,
        metadata=_metadata(message, **{message.id_field: message.message_id}, **own),
    )
    return Decision(wallet, "posted", events=(event,))


def _adjust(wallet: Wallet, message: Adjust, now: datetime) -> Decision:
    if not message.allow_negative and _overdraws(wallet, message.credits):
        return _refuse_overdraft(wallet, message)
    return _post_prepaid(wallet, message, now, "adjustment", reason=message.reason)


def _bill(wallet: Wallet, message: Bill, now: datetime) -> Decision:
    if _overdraws(wallet, message.credits):
        return _refuse_overdraft(wallet, message)
    return _post_prepaid(wallet, message, now, "billing", invoice_id=message.invoice_id)


def _overdraws(wallet: Wallet, credits: int) -> bool:
    return credits < 0 and wallet.prepaid_balance + credits < 0


def _refuse_overdraft(wallet: Wallet, message: Adjust | Bill) -> Decision:
    return _refuse(
        wallet,
        "insufficient_credits",
        f"{message.task}: {message.credits} would take the prepaid balance, {wallet.prepaid_balance}, below zero",
    )


def _refund(wallet: Wallet, message: Refund, now: datetime, workflow: Workflow | None) -> Decision:
    if message.workflow_id is None:
        return _post_prepaid(wallet, message, now, "refund")
    used = 0 if workflow is None else workflow.finish_credits or 0
    refunded = 0 if workflow is None else workflow.refunded
    if workflow is None or refunded + message.credits > used:
        return _refuse(
            wallet,
            "refund_exceeds_usage",
            f"{message.task}: workflow {message.workflow_id} used {used} credits and {refunded} of them were refunded "
            f"already, so {message.credits} cannot be",
        )
    decision = _post_prepaid(wallet, message, now, "refund", workflow_id=message.workflow_id)
    return decision._replace(workflow=workflow._replace(refunded=refunded + message.credits))


def _configure(wallet: Wallet, message: Configure) -> Decision:
    if message.version <= wallet.config_version:
        return Decision(wallet, "ignored", "stale_version")
    wallet = wallet._replace(
        credit_limit=message.credit_limit,
        period_cap=message.period_cap,
        config_version=message.version,
    )
    return Decision(wallet, "posted")


# Subscriptions


def _subscribe(wallet: Wallet, message: Subscribe, now: datetime, known: Subscription | None) -> Decision:
    if known is not None and message.version <= known.version:
        return Decision(wallet, "ignored", "stale_version")
    anchor = known.anchor if known is not None else None
    if anchor is not None and message.anchor not in (None, anchor):
        return _refuse(
            wallet,
            "conflict",
            f"{message.task}: {message.subscription_id} has its anchor at {anchor.isoformat()}, which cannot change; "
            "another anchor needs another subscription_id",
        )
    anchor = anchor or message.anchor or now
    subscription = Subscription(
        message.org_id,
        message.subscription_id,
        message.version,
        active=True,
        plan=message.plan,
        monthly_credits=message.monthly_credits,
        rollover_limit=message.rollover_limit,
        anchor=anchor,
        period=known.period if known is not None else None,
        period_granted=known.period_granted if known is not None else 0,
    )
    wallet = wallet._replace(subscription_id=message.subscription_id)
    period = period_at(anchor, now)
    events: tuple[Event, ...] = ()
    if period is None:
        # The credits of a replaced subscription expire with its own period, if that ends before the anchor.
        wallet = wallet._replace(next_period_at=min(anchor, wallet.next_period_at or anchor))
    elif subscription.period != period:
        wallet, subscription, events = _begin_period(
            wallet,
            subscription,
            period,
            now,
            source=message.source,
            metadata=_metadata(message, reason=None, not_granted=None),
        )
    else:
        wallet = wallet._replace(next_period_at=period_start(anchor, period + 1))
        wallet, subscription, events = _raise_allocation(wallet, subscription, period, message, now)
    return Decision(wallet, "posted", events=events, subscription=subscription)


def _unsubscribe(wallet: Wallet, message: Unsubscribe, known: Subscription | None) -> Decision:
    if known is None:
        tombstone = Subscription(message.org_id, message.subscription_id, message.version, active=False)
        return Decision(wallet, "ignored", "not_subscribed", subscription=tombstone)
    if message.version <= known.version:
        return Decision(wallet, "ignored", "stale_version")
    return Decision(wallet, "posted", subscription=known._replace(version=message.version, active=False))


def begin_due_periods(
    wallet: Wallet, subscription: Subscription, now: datetime, *, most_events: int | None = None
) -> tuple[Wallet, Subscription, tuple[Event, ...]]:
    """Begin every period of the wallet's subscription that is due at `now`, one by one, in order.

    With `most_events`, stops after so many events, or one more; then more may still be due.
    """
    assert wallet.subscription_id == subscription.subscription_id
    assert subscription.anchor is not None
    events: tuple[Event, ...] = ()
    while (due_at := wallet.next_period_at) is not None and due_at <= now:
        if most_events is not None and len(events) >= most_events:
            break
        period = 0 if subscription.period is None else subscription.period + 1
        starts_at = period_start(subscription.anchor, period)
        if not subscription.active:
            wallet, begun = _expire(wallet, subscription, period, now, rollover_limit=0)
            wallet = wallet._replace(subscription_id=None, next_period_at=None)
        elif due_at < starts_at:
            # The last period of the replaced subscription has ended.
            wallet, begun = _expire(wallet, subscription, period, now, rollover_limit=0)
            wallet = wallet._replace(next_period_at=starts_at)
        else:
            wallet, subscription, begun = _begin_period(
                wallet, subscription, period, now, source=SCHEDULER, metadata={}
            )
        events += begun
    return wallet, subscription, events


def _begin_period(
    wallet: Wallet, subscription: Subscription, period: int, now: datetime, *, source: str, metadata: Mapping[str, Any]
) -> tuple[Wallet, Subscription, tuple[Event, ...]]:
    assert subscription.anchor is not None
    assert subscription.period is None or subscription.period < period
    ends_at = period_start(subscription.anchor, period + 1)
    wallet, expired = _expire(wallet, subscription, period, now, rollover_limit=subscription.rollover_limit)
    wallet, credit = _allocate(
        wallet._replace(next_period_at=ends_at, period_usage=0),
        subscription.monthly_credits,
        now,
        key=_period_key(subscription, period),
        source=source,
        metadata={
            **metadata,
            "subscription_id": subscription.subscription_id,
            "plan": subscription.plan,
            "period_start": period_start(subscription.anchor, period).isoformat(),
            "period_end": ends_at.isoformat(),
        },
    )
    subscription = subscription._replace(period=period, period_granted=subscription.monthly_credits)
    return wallet, subscription, (*expired, credit)


def _period_key(subscription: Subscription, period: int) -> str:
    # A suffix begins with a character that no id has, so no two keys are the same.
    return f"subscription:{subscription.subscription_id}:{period}"


def _raise_allocation(
    wallet: Wallet, subscription: Subscription, period: int, message: Subscribe, now: datetime
) -> tuple[Wallet, Subscription, tuple[Event, ...]]:
    """Within a period, a change of plan only adds the credits beyond the most that the period was granted."""
    difference = subscription.monthly_credits - subscription.period_granted
    if difference <= 0:
        return wallet, subscription, ()
    wallet, event = _allocate(
        wallet,
        difference,
        now,
        key=f"{_period_key(subscription, period)}/v{subscription.version}",
        source=message.source,
        metadata=_metadata(
            message,
            subscription_id=subscription.subscription_id,
            plan=subscription.plan,
            reason="plan_change",
            not_granted=None,
            period_start=None,
            period_end=None,
        ),
    )
    return wallet, subscription._replace(period_granted=subscription.monthly_credits), (event,)


def _allocate(
    wallet: Wallet,
    credits: int,
    now: datetime,
    *,
    key: str,
    source: str,
    metadata: dict[str, Any],
) -> tuple[Wallet, Event]:
    # A period cannot be refused: a full wallet takes what fits, and the event records the rest.
    granted = min(credits, MAX_CREDITS - wallet.balance, MAX_CREDITS - wallet.subscription_balance)
    if granted < credits:
        metadata["not_granted"] = credits - granted
    return _post(
        wallet,
        now,
        "subscription_credit",
        granted,
        subscription=granted,
        key=key,
        source=source,
        metadata=metadata,
    )


def _expire(
    wallet: Wallet, subscription: Subscription, period: int, now: datetime, *, rollover_limit: int
) -> tuple[Wallet, tuple[Event, ...]]:
    excess = wallet.subscription_balance - rollover_limit
    if excess <= 0:
        return wallet, ()
    wallet, event = _post(
        wallet,
        now,
        "adjustment",
        -excess,
        subscription=-excess,
        key=f"{_period_key(subscription, period)}/v{subscription.version}/expired",
        source=SCHEDULER,
        metadata={"reason": "subscription_expired", "subscription_id": subscription.subscription_id},
    )
    return wallet, (event,)


# Reservations that end without a message


def release_expired(wallet: Wallet, workflow: Workflow, now: datetime) -> tuple[Wallet, Workflow, Event]:
    """Release the reservation of `workflow`, which has expired by `now`."""
    assert workflow.state == "reserved"
    assert workflow.expires_at is not None
    assert workflow.expires_at <= now
    wallet, event = _release(wallet, workflow, now, "expired", SCHEDULER, {})
    return wallet, workflow._replace(state="expired"), event


def _release(
    wallet: Wallet, workflow: Workflow, now: datetime, reason: str, source: str, metadata: Mapping[str, Any]
) -> tuple[Wallet, Event]:
    assert workflow.start_credits is not None
    return _post(
        wallet,
        now,
        "reservation_released",
        workflow.start_credits,
        reserved=-workflow.start_credits,
        key=f"release:{workflow.workflow_id}",
        source=source,
        metadata={**metadata, "reason": reason},
        workflow=workflow,
    )


# Every event is made here


def _post(
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
    """Append one event: change the balances by the given amounts and number the event."""
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
    assert after.period_usage >= 0
    # The first two also bound the available balance, whatever expires later.
    if (
        after.balance > MAX_CREDITS
        or after.prepaid_balance - after.reserved < -MAX_CREDITS
        or after.reserved > MAX_CREDITS
        or after.period_usage > MAX_CREDITS
    ):
        raise _OutOfRangeError
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


def _metadata(message: Message, **own: Any) -> dict[str, Any]:
    """The message's metadata and the ledger's own keys. A key of `own` replaces the sender's; None removes it."""
    if message.occurred_at is not None:
        own["occurred_at"] = message.occurred_at.isoformat()
    kept = {name: value for name, value in message.metadata.items() if name not in own}
    kept.update({name: value for name, value in own.items() if value is not None})
    return kept


def _refuse(wallet: Wallet, code: ErrorCode, error: str) -> Decision:
    return Decision(wallet, refusal=Refusal(code, error))


def _conflict(wallet: Wallet, message: WorkflowMessage | WalletMessage, earlier: str) -> Decision:
    name = message.workflow_id if isinstance(message, WorkflowMessage) else message.message_id
    return _refuse(wallet, "conflict", f"{message.task}: {name} {earlier}, so this message contradicts it")
