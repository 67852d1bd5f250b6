"""What a message of a workflow does, and the expiry of its reservation."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, assert_never

from holdfast_client.messages import MAX_CREDITS, AnyWorkflowMessage, Cancel, Fail, Finish, Start
from holdfast_client.results import Limit, WorkflowState
from ledger.rules.ending import draw, end_uncovered, uncover, without
from ledger.rules.posting import SCHEDULER, conflict, metadata_of, post
from ledger.state import OUTCOMES, Decision, Event, Quote, StepAnswer, Wallet, Workflow


def decide_workflow(wallet: Wallet, message: AnyWorkflowMessage, now: datetime, workflow: Workflow | None) -> Decision:
    """Decide `message` about `workflow`, which is None if no message has named it before."""
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
            return conflict(wallet, message, f"was started with {workflow.start_credits} credits")
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
        reserved_seq=None if expires_at is None else wallet.last_seq + 1,
        rejected_at=now if expires_at is None else None,
    )
    if expires_at is None:
        limit = _limit(wallet, answer)
        shortfall = message.credits - limit.remaining
        return _answer(wallet, answer, workflow=workflow)._replace(limit=limit, shortfall=shortfall)

    wallet, event = post(
        wallet,
        now,
        "reservation",
        -message.credits,
        reserved=message.credits,
        key=f"start:{message.workflow_id}",
        source=message.source,
        metadata=metadata_of(message, expires_at=expires_at.isoformat()),
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


def quote(wallet: Wallet, credits: int) -> Quote:
    """What a start with `credits` would be answered. Nothing is due in the wallet any more."""
    answer = _reservation_answer(wallet, credits)
    checked: tuple[StepAnswer, ...] = ("insufficient_credits",)
    if wallet.period_cap is not None:
        checked += ("period_cap",)
    shortfall = None if answer == "reserved" else credits - _limit(wallet, answer).remaining
    return Quote(
        *OUTCOMES[answer], wallet.available, shortfall, tuple(_limit(wallet, each) for each in checked), wallet.last_seq
    )


def _limit(wallet: Wallet, answer: StepAnswer) -> Limit:
    """The limit that rejects a start with `answer`."""
    if answer == "insufficient_credits":
        return Limit(answer, wallet.balance + wallet.credit_limit, 0, wallet.reserved, None)
    assert answer == "period_cap"
    assert wallet.period_cap is not None
    return Limit(answer, wallet.period_cap, wallet.period_usage, wallet.reserved, wallet.next_period_at)


def _finish(wallet: Wallet, message: Finish, now: datetime, workflow: Workflow | None) -> Decision:
    if workflow is not None and workflow.finish_credits is not None:
        if workflow.finish_credits != message.credits:
            return conflict(wallet, message, f"was finished with {workflow.finish_credits} credits")
        return Decision(wallet, "settled", duplicate=True)

    unreserved = workflow is None or workflow.state == "rejected"
    if workflow is None:
        workflow = Workflow(message.org_id, message.workflow_id, "settled")
    released: tuple[Event, ...] = ()
    if workflow.state == "reserved":
        metadata = metadata_of(message, **_OF_USAGE_ALONE)
        wallet, event = _release(wallet, workflow, now, "settled", message.source, metadata)
        released = (event,)
    workflow = workflow._replace(
        state="settled",
        finish_credits=message.credits,
        project_id=message.project_id or workflow.project_id,
        activity_name=message.activity_name or workflow.activity_name,
    )
    wallet, workflow, usage = _charge(wallet, message, now, workflow, unreserved=unreserved)
    return Decision(wallet, "settled", events=(*released, usage), workflow=workflow)


_OF_USAGE_ALONE = dict.fromkeys(("unreserved", "overrun", "not_charged", "paid_by"))


def _charge(
    wallet: Wallet, message: Finish, now: datetime, workflow: Workflow, *, unreserved: bool
) -> tuple[Wallet, Workflow, Event]:
    """Charge what the workflow used. Never refused: at the bounds of the ledger, debt and period usage stay there."""
    most = wallet.balance - wallet.reserved + MAX_CREDITS
    charged = min(message.credits, most)
    drawn = draw(wallet, charged)
    paid_by = {}
    if drawn.ends:
        workflow = workflow._replace(paid_by_ending={end.isoformat(): paid for end, paid in drawn.ends.items()})
    if drawn.from_subscription:
        paid_by["subscription"] = drawn.from_subscription
    if drawn.from_ending:
        paid_by["ending"] = drawn.from_ending
    if drawn.from_permanent:
        paid_by["prepaid"] = drawn.from_permanent
    # Whatever permanent credits give, the ones with an end are used up.
    overrun = drawn.from_permanent - max(0, wallet.prepaid_balance - drawn.from_ending)
    wallet = without(wallet, drawn, now)
    wallet, event = post(
        wallet,
        now,
        "usage",
        -charged,
        subscription=-drawn.from_subscription,
        prepaid=-drawn.from_prepaid,
        usage=min(charged, MAX_CREDITS - wallet.period_usage),
        key=f"finish:{message.workflow_id}",
        source=message.source,
        metadata=metadata_of(
            message,
            unreserved=unreserved or None,
            overrun=overrun if overrun > 0 else None,
            not_charged=message.credits - charged or None,
            paid_by=paid_by or None,
        ),
        workflow=workflow,
    )
    return wallet, workflow, event


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
        metadata = metadata_of(message, given_reason=message.reason)
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


def release_expired(
    wallet: Wallet, workflow: Workflow, now: datetime, *, most_events: int | None = None
) -> tuple[Wallet, Workflow, tuple[Event, ...]]:
    """Release the reservation of `workflow`, which has expired by `now`, and end what it has covered.

    With `most_events`, the wallet may be due still.
    """
    assert workflow.state == "reserved"
    assert workflow.expires_at is not None
    assert workflow.expires_at <= now
    wallet, released = _release(wallet, workflow, now, "expired", SCHEDULER, {})
    wallet, ended = end_uncovered(wallet, now, most_events=most_events)
    return wallet, workflow._replace(state="expired"), (released, *ended)


def _release(
    wallet: Wallet, workflow: Workflow, now: datetime, reason: str, source: str, metadata: Mapping[str, Any]
) -> tuple[Wallet, Event]:
    assert workflow.start_credits is not None
    return post(
        uncover(wallet, workflow.start_credits, workflow.reserved_seq),
        now,
        "reservation_released",
        workflow.start_credits,
        reserved=-workflow.start_credits,
        key=f"release:{workflow.workflow_id}",
        source=source,
        metadata={**metadata, "reason": reason},
        workflow=workflow,
    )
