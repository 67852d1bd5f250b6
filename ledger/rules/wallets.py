"""What a message about the wallet itself does."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, assert_never

from holdfast_client.messages import (
    ERASED,
    Adjust,
    AnyWalletMessage,
    Bill,
    Configure,
    Grant,
    Purchase,
    Refund,
    Reverse,
    Subscribe,
    Unsubscribe,
    WalletMessage,
)
from ledger.rules.ending import draw_prepaid, end, with_row, without
from ledger.rules.posting import conflict, metadata_of, post, refuse
from ledger.rules.subscriptions import subscribe, unsubscribe
from ledger.state import (
    Decision,
    EndingCredits,
    Event,
    EventType,
    PostedMessage,
    Subscription,
    Wallet,
    Workflow,
)

REFUNDED_FOR = timedelta(days=30)
"""How long refunded credits last at least that a workflow had taken from credits with an end."""


def decide_wallet(
    wallet: Wallet,
    message: AnyWalletMessage,
    now: datetime,
    workflow: Workflow | None,
    subscriptions: Mapping[str, Subscription],
    purchase: PostedMessage | None,
) -> Decision:
    """Decide `message`, which has not come before; remember its terms and its answer."""
    match message:
        case Purchase():
            decision = _purchase(wallet, message, now)
        case Grant():
            decision = _grant(wallet, message, now)
        case Adjust():
            decision = _adjust(wallet, message, now)
        case Refund():
            decision = _refund(wallet, message, now, workflow)
        case Bill():
            decision = _bill(wallet, message, now)
        case Reverse():
            decision = _reverse(wallet, message, now, purchase)
        case Subscribe():
            decision = subscribe(wallet, message, now, subscriptions)
        case Unsubscribe():
            decision = unsubscribe(wallet, message, subscriptions)
        case Configure():
            decision = _configure(wallet, message, now)
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
    return decision._replace(posted=(*decision.posted, posted))


def repeat(wallet: Wallet, message: WalletMessage, posted: PostedMessage) -> Decision:
    """Answer a message that has come before as it was answered then."""
    terms = message.terms()
    changed = [name for name, value in terms.items() if posted.terms.get(name) not in (value, ERASED)]
    if changed:
        said = ", ".join(f"{name} {json.dumps(posted.terms.get(name))}" for name in changed)
        return conflict(wallet, message, f"was applied with {said}")
    return Decision(wallet, posted.outcome, posted.reason, duplicate=True)


Part = tuple[datetime | None, int]
"""When credits end, if they do, and how many they are."""


def _bring(
    wallet: Wallet,
    message: Purchase | Grant | Adjust | Refund | Bill,
    now: datetime,
    event_type: EventType,
    parts: Sequence[Part],
    workflow: Workflow | None = None,
    **own: Any,
) -> Decision:
    """Bring `parts` into the prepaid balance, with the keys `own` in the event's metadata. A debt takes them first.

    The event belongs to `workflow`.
    """
    left_of_debt = max(0, -wallet.prepaid_balance)
    debt_settled = min(left_of_debt, sum(brought for _, brought in parts))
    rows: list[EndingCredits] = []
    for expires_at, brought in parts:
        settled = min(left_of_debt, brought)
        left_of_debt -= settled
        if expires_at is not None and brought > settled:
            rows.append(
                EndingCredits(message.org_id, _key(message), expires_at, wallet.last_seq + 1, brought - settled)
            )
    ending = [{"credits": row.remaining, "expires_at": row.expires_at.isoformat()} for row in rows]
    if event_type == "refund":
        own["ending"] = ending or None
    metadata = metadata_of(message, **{message.id_field: message.message_id}, **own, debt_settled=debt_settled or None)
    wallet, event = post(
        wallet,
        now,
        event_type,
        message.credits,
        prepaid=message.credits,
        key=_key(message),
        source=message.source,
        metadata=metadata,
        workflow=workflow,
    )
    ended: list[Event] = []
    for row in rows:
        if row.expires_at > now:
            wallet = with_row(wallet, row, now)
        else:
            wallet, event_of_end = end(wallet, row, row.remaining, now)
            ended.append(event_of_end)
    return Decision(wallet, "posted", events=(event, *ended))


def _key(message: WalletMessage) -> str:
    return f"{message.kind}:{message.message_id}"


def _purchase(wallet: Wallet, message: Purchase, now: datetime) -> Decision:
    return _bring(wallet, message, now, "prepaid_purchase", [(message.expires_at, message.credits)], **_until(message))


def _grant(wallet: Wallet, message: Grant, now: datetime) -> Decision:
    parts = [(message.expires_at, message.credits)]
    return _bring(wallet, message, now, "grant", parts, reason=message.reason, **_until(message))


def _until(message: Purchase | Grant) -> dict[str, Any]:
    return {"expires_at": None if message.expires_at is None else message.expires_at.isoformat()}


def _adjust(wallet: Wallet, message: Adjust, now: datetime) -> Decision:
    if message.credits > 0:
        return _bring(wallet, message, now, "adjustment", [(None, message.credits)], reason=message.reason)
    if not message.allow_negative and (refusal := _overdraft(wallet, message)):
        return refusal
    return _take(wallet, message, -message.credits, now, "adjustment", reason=message.reason)


def _bill(wallet: Wallet, message: Bill, now: datetime) -> Decision:
    if message.credits >= 0:
        return _bring(wallet, message, now, "billing", [(None, message.credits)], invoice_id=message.invoice_id)
    return _overdraft(wallet, message) or _take(
        wallet, message, -message.credits, now, "billing", invoice_id=message.invoice_id
    )


def _overdraft(wallet: Wallet, message: Adjust | Bill) -> Decision | None:
    """The refusal of a message that takes more than there is, or what a workflow holds."""
    balance = min(wallet.prepaid_balance, wallet.available)
    if balance + message.credits >= 0:
        return None
    which = "what is available" if balance < wallet.prepaid_balance else "the prepaid balance"
    return refuse(
        wallet,
        "insufficient_credits",
        f"{message.task}: {message.credits} would take {which}, {balance}, below zero",
    )


def _take(
    wallet: Wallet,
    message: Adjust | Bill | Reverse,
    credits: int,
    now: datetime,
    event_type: EventType,
    *,
    first: str | None = None,
    **own: Any,
) -> Decision:
    """Take `credits` out of the prepaid balance, from the origin `first` before others; `own` as in `_bring`."""
    drawn = draw_prepaid(wallet, credits, first=first)
    wallet = without(wallet, drawn, now)
    wallet, event = post(
        wallet,
        now,
        event_type,
        -credits,
        prepaid=-credits,
        key=_key(message),
        source=message.source,
        metadata=metadata_of(
            message, **{message.id_field: message.message_id}, **own, from_ending=drawn.from_ending or None
        ),
    )
    return Decision(wallet, "posted", events=(event,))


def _refund(wallet: Wallet, message: Refund, now: datetime, workflow: Workflow | None) -> Decision:
    if message.workflow_id is None:
        return _bring(wallet, message, now, "refund", [(None, message.credits)], workflow_id=None)
    used = 0 if workflow is None else workflow.finish_credits or 0
    refunded = 0 if workflow is None else workflow.refunded
    if workflow is None or refunded + message.credits > used:
        return refuse(
            wallet,
            "refund_exceeds_usage",
            f"{message.task}: workflow {message.workflow_id} used {used} credits and {refunded} of them were refunded "
            f"already, so {message.credits} cannot be",
        )
    parts = _where_from(workflow, message.credits, now)
    decision = _bring(wallet, message, now, "refund", parts, workflow, workflow_id=message.workflow_id)
    return decision._replace(workflow=workflow._replace(refunded=refunded + message.credits))


def _where_from(workflow: Workflow, credits: int, now: datetime) -> list[Part]:
    """Where the next `credits` of a refund go: first to the permanent ones, then to the latest end first."""
    assert workflow.finish_credits is not None
    paid_by_ending = {datetime.fromisoformat(by): paid for by, paid in (workflow.paid_by_ending or {}).items()}
    permanent = workflow.finish_credits - sum(paid_by_ending.values())
    to_skip = workflow.refunded
    parts: dict[datetime | None, int] = {}
    left = credits
    for ended_at, paid in [(None, permanent), *sorted(paid_by_ending.items(), reverse=True)]:
        skipped = min(to_skip, paid)
        given = min(left, paid - skipped)
        to_skip -= skipped
        left -= given
        if given:
            ends_at = None if ended_at is None else max(ended_at, now + REFUNDED_FOR)
            parts[ends_at] = parts.get(ends_at, 0) + given
    assert left == 0
    return list(parts.items())


def _reverse(wallet: Wallet, message: Reverse, now: datetime, purchase: PostedMessage | None) -> Decision:
    if purchase is None:
        return refuse(
            wallet,
            "unknown_purchase",
            f"{message.task}: there is no purchase {message.purchase_id}; if it is still to come, replay this after it",
        )
    left = purchase.terms["credits"] - purchase.reversed
    amount = left if message.credits is None else message.credits
    if amount > left or left == 0:
        return refuse(
            wallet,
            "reversal_exceeds_purchase",
            f"{message.task}: purchase {message.purchase_id} brought {purchase.terms['credits']} credits and "
            f"{purchase.reversed} of them were reversed already, so "
            f"{'nothing is left' if message.credits is None else f'{message.credits} cannot be reversed'}",
        )
    own = {"purchase_id": message.purchase_id, "reason": message.reason}
    origin = f"{Purchase.kind}:{message.purchase_id}"
    decision = _take(wallet, message, amount, now, "billing", first=origin, **own)
    return decision._replace(posted=(purchase._replace(reversed=purchase.reversed + amount),))


def _configure(wallet: Wallet, message: Configure, now: datetime) -> Decision:
    if message.version <= wallet.config_version:
        return Decision(wallet, "ignored", "stale_version")
    wallet = wallet._replace(
        credit_limit=message.credit_limit,
        period_cap=message.period_cap,
        config_version=message.version,
    )
    if message.reason is None:
        return Decision(wallet, "posted")
    limits = {name: getattr(message, name) for name in ("version", "credit_limit", "period_cap")}
    wallet, event = post(
        wallet,
        now,
        "billing",
        0,
        key=_key(message),
        source=message.source,
        metadata=metadata_of(message, reason=message.reason, **limits),
    )
    return Decision(wallet, "posted", events=(event,))
