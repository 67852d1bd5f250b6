"""Subscriptions: what a new version does, and how periods begin and end.

The newest version within the organization wins, in whatever order they arrive. Credits of a period end with it, and
not before: where a plan is replaced, what it has left is set aside until then.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from holdfast_client.messages import MAX_CREDITS, Subscribe, Unsubscribe
from ledger.periods import period_at, period_start
from ledger.rules.ending import end_uncovered, of_period, with_row, without_origin
from ledger.rules.posting import SCHEDULER, metadata_of, post, refuse
from ledger.state import Decision, EndingCredits, Event, Subscription, Wallet

Events = tuple[Event, ...]


def subscribe(wallet: Wallet, message: Subscribe, now: datetime, subscriptions: Mapping[str, Subscription]) -> Decision:
    """Make `message` the organization's plan, or schedule it, unless a newer one has come already."""
    known = subscriptions.get(message.subscription_id)
    if message.version <= wallet.plan_version:
        return Decision(wallet, "ignored", "stale_version")
    anchor = known.anchor if known is not None else None
    if anchor is not None and message.anchor not in (None, anchor):
        return refuse(
            wallet,
            "conflict",
            f"{message.task}: {message.subscription_id} has its anchor at {anchor.isoformat()}, which cannot change; "
            "another anchor needs another subscription_id",
        )
    anchor = anchor or message.anchor or now
    period = period_at(anchor, now)
    changed = _inactive(subscriptions, wallet.scheduled_id, other_than=message.subscription_id)
    wallet = wallet._replace(plan_version=message.version, scheduled_id=None, scheduled_at=None)
    if known is not None and message.version <= known.version:
        # Its end has come before it: it replaces the others, and is over.
        if period is not None:
            changed += _inactive(subscriptions, wallet.subscription_id, other_than=None)
        return Decision(wallet, "ignored", "stale_version", subscriptions=changed)
    subscription = _newest(message, anchor, known)
    if period is None:
        wallet = wallet._replace(scheduled_id=message.subscription_id, scheduled_at=anchor)
        return Decision(wallet, "posted", subscriptions=(*changed, subscription))
    if wallet.subscription_id != message.subscription_id:
        changed += _inactive(subscriptions, wallet.subscription_id, other_than=message.subscription_id)
        wallet = _set_aside(wallet, subscriptions.get(wallet.subscription_id or ""), now)
        wallet = wallet._replace(subscription_id=message.subscription_id)
    if subscription.period != period:
        metadata = metadata_of(message, **dict.fromkeys(_CREDIT_KEYS))
        wallet, subscription, events = _begin_period(
            wallet, subscription, period, now, source=message.source, metadata=metadata
        )
    else:
        wallet = without_origin(wallet, _period_key(subscription), now)
        wallet = wallet._replace(next_period_at=period_start(anchor, period + 1))
        wallet, subscription, events = _change_plan(wallet, subscription, known, message, now)
    return Decision(wallet, "posted", events=events, subscriptions=(*changed, subscription))


_CREDIT_KEYS = ("reason", "not_granted", "debt_settled", "replaced_plan", "monthly_credits", "effective_at")


def _newest(message: Subscribe, anchor: datetime, known: Subscription | None) -> Subscription:
    """The subscription as `message` describes it, with the periods that are `known`."""
    before = known or Subscription(message.org_id, message.subscription_id, 0, active=False)
    first_lacks = before.first_lacks  # whatever else changes
    if message.first_credits is not None:
        first_lacks = message.monthly_credits - message.first_credits
    return before._replace(
        version=message.version,
        active=True,
        plan=message.plan,
        monthly_credits=message.monthly_credits,
        rollover_limit=message.rollover_limit,
        first_lacks=first_lacks,
        anchor=anchor,
    )


def _inactive(
    subscriptions: Mapping[str, Subscription], subscription_id: str | None, *, other_than: str | None
) -> tuple[Subscription, ...]:
    if subscription_id is None or subscription_id == other_than:
        return ()
    return (subscriptions[subscription_id]._replace(active=False),)


def unsubscribe(wallet: Wallet, message: Unsubscribe, subscriptions: Mapping[str, Subscription]) -> Decision:
    """End a subscription with its period, or call it off if it is scheduled. Another one stays as it is."""
    known = subscriptions.get(message.subscription_id)
    if message.version <= max(wallet.plan_version, 0 if known is None else known.version):
        return Decision(wallet, "ignored", "stale_version")
    ended = known or Subscription(message.org_id, message.subscription_id, message.version, active=False)
    ended = ended._replace(version=message.version, active=False)
    if message.subscription_id == wallet.scheduled_id:
        wallet = wallet._replace(scheduled_id=None, scheduled_at=None)
    elif message.subscription_id != wallet.subscription_id:
        return Decision(wallet, "ignored", "not_subscribed", subscriptions=(ended,))
    return Decision(wallet, "posted", subscriptions=(ended,))


def begin_due(
    wallet: Wallet, subscriptions: Mapping[str, Subscription], now: datetime, *, most_events: int | None = None
) -> tuple[Wallet, tuple[Subscription, ...], Events]:
    """Do what time alone does but for reservations: begin every period that is due, in order, and end credits.

    `subscriptions` has the current and the scheduled one by id. With `most_events`, ends once there are so many events,
    or one or two more: the wallet may be due still.
    """
    changed = dict(subscriptions)
    events: Events = ()
    left = most_events
    while left is None or left > 0:
        ends_at, scheduled_at = wallet.next_period_at, wallet.scheduled_at
        if scheduled_at is not None and scheduled_at <= now and (ends_at is None or scheduled_at <= ends_at):
            assert wallet.scheduled_id is not None
            wallet, begun = _take_over(wallet, changed, wallet.scheduled_id, now, left)
        elif ends_at is not None and ends_at <= now:
            assert wallet.subscription_id is not None
            wallet, begun = _go_on(wallet, changed, wallet.subscription_id, now, left)
        else:
            break
        events += begun
        left = None if left is None else left - len(begun)
    wallet, ended = end_uncovered(wallet, now, most_events=left)
    events += ended
    new = tuple(known for known in changed.values() if subscriptions.get(known.subscription_id) is not known)
    return wallet, new, events


def _take_over(
    wallet: Wallet, subscriptions: dict[str, Subscription], scheduled_id: str, now: datetime, most_events: int | None
) -> tuple[Wallet, Events]:
    """Begin the scheduled subscription, in place of the current one."""
    if (current := subscriptions.get(wallet.subscription_id or "")) is not None:
        wallet = _set_aside(wallet, current, now)
        subscriptions[current.subscription_id] = current._replace(active=False)
    wallet = wallet._replace(subscription_id=scheduled_id, scheduled_id=None, scheduled_at=None)
    wallet, begun, events = _begin_period(
        wallet, subscriptions[scheduled_id], 0, now, source=SCHEDULER, metadata={}, most_events=most_events
    )
    subscriptions[scheduled_id] = begun
    return wallet, events


def _go_on(
    wallet: Wallet, subscriptions: dict[str, Subscription], subscription_id: str, now: datetime, most_events: int | None
) -> tuple[Wallet, Events]:
    """Begin the next period of the current subscription; if it was ended, end its last one."""
    subscription = subscriptions[subscription_id]
    if subscription.period is None and subscription.anchor is not None and subscription.anchor > now:
        # A worker of an older version has scheduled it, and waits for the end of what another plan has left.
        wallet, events = end_uncovered(_set_aside(wallet, subscription, now), now, most_events=most_events)
        wallet = wallet._replace(scheduled_id=subscription_id, scheduled_at=subscription.anchor)
        return wallet._replace(subscription_id=None, next_period_at=None), events
    if not subscription.active:
        wallet = _set_aside(wallet, subscription, now)
        wallet, events = end_uncovered(wallet, now, most_events=most_events)
        return wallet._replace(subscription_id=None, next_period_at=None), events
    period = 0 if subscription.period is None else subscription.period + 1
    wallet, begun, events = _begin_period(
        wallet, subscription, period, now, source=SCHEDULER, metadata={}, most_events=most_events
    )
    subscriptions[subscription_id] = begun
    return wallet, events


def _set_aside(wallet: Wallet, subscription: Subscription | None, now: datetime, *, kept: int = 0) -> Wallet:
    """Give what the current period has left above `kept` its own end, which is the period's."""
    if (left := of_period(wallet) - kept) <= 0:
        return wallet
    assert subscription is not None
    assert wallet.next_period_at is not None
    row = EndingCredits(
        wallet.org_id,
        _period_key(subscription),
        wallet.next_period_at,
        wallet.last_seq,
        left,
        subscription.period_plan or subscription.plan,
    )
    return with_row(wallet, row, now)


def _begin_period(
    wallet: Wallet,
    subscription: Subscription,
    period: int,
    now: datetime,
    *,
    source: str,
    metadata: Mapping[str, Any],
    most_events: int | None = None,
) -> tuple[Wallet, Subscription, Events]:
    assert subscription.anchor is not None
    assert subscription.period is None or subscription.period < period
    starts_at, ends_at = period_start(subscription.anchor, period), period_start(subscription.anchor, period + 1)
    wallet = _set_aside(wallet, subscription, now, kept=subscription.rollover_limit)
    wallet, ended = end_uncovered(wallet, now, most_events=most_events)
    if subscription.first_period is None and subscription.period is None:
        subscription = subscription._replace(first_period=period)
    subscription = subscription._replace(period=period, period_plan=subscription.plan)
    subscription = subscription._replace(period_granted=_included(subscription))
    wallet, credit = _allocate(
        wallet._replace(next_period_at=ends_at, period_usage=0),
        subscription.period_granted,
        now,
        key=_period_key(subscription),
        source=source,
        metadata={
            **metadata,
            "subscription_id": subscription.subscription_id,
            "plan": subscription.plan,
            "period_start": starts_at.isoformat(),
            "period_end": ends_at.isoformat(),
        },
    )
    return wallet, subscription, (*ended, credit)


def _included(subscription: Subscription) -> int:
    """What the subscription's current period is given."""
    if subscription.period != subscription.first_period:
        return subscription.monthly_credits
    return max(0, subscription.monthly_credits - subscription.first_lacks)


def _period_key(subscription: Subscription) -> str:
    # What follows it begins with a character that no id has, so no two keys can be mistaken for one another.
    return f"subscription:{subscription.subscription_id}:{subscription.period or 0}"


def _change_plan(
    wallet: Wallet, subscription: Subscription, known: Subscription | None, message: Subscribe, now: datetime
) -> tuple[Wallet, Subscription, Events]:
    """Within a period: post what exceeds the most that it was granted already; what is less comes with the next one.

    Either is an event, so that the history tells it.
    """
    assert known is not None
    included = _included(subscription)
    difference = included - subscription.period_granted
    if difference >= 0:
        subscription = subscription._replace(period_plan=subscription.plan, period_granted=included)
    same_terms = (known.plan, known.monthly_credits) == (subscription.plan, subscription.monthly_credits)
    if same_terms and difference <= 0:
        return wallet, subscription, ()
    is_later = difference <= 0 and subscription.monthly_credits != known.monthly_credits
    wallet, event = _allocate(
        wallet,
        max(0, difference),
        now,
        key=f"{_period_key(subscription)}/v{subscription.version}",
        source=message.source,
        metadata=metadata_of(
            message,
            subscription_id=subscription.subscription_id,
            plan=subscription.plan,
            reason="plan_change",
            replaced_plan=known.plan if known.plan != subscription.plan else None,
            monthly_credits=subscription.monthly_credits if is_later else None,
            effective_at=wallet.next_period_at.isoformat() if is_later and wallet.next_period_at else None,
            not_granted=None,
            debt_settled=None,
            period_start=None,
            period_end=None,
        ),
    )
    return wallet, subscription, (event,)


def _allocate(
    wallet: Wallet,
    credits: int,
    now: datetime,
    *,
    key: str,
    source: str,
    metadata: dict[str, Any],
) -> tuple[Wallet, Event]:
    """Post what a period is given. It first brings a negative prepaid balance back towards zero."""
    # Time cannot be refused: a wallet that is full takes what fits, and the event says what did not.
    granted = min(credits, MAX_CREDITS - wallet.balance)
    settled = min(granted, max(0, -wallet.prepaid_balance))
    if granted < credits:
        metadata["not_granted"] = credits - granted
    if settled:
        metadata["debt_settled"] = settled
    return post(
        wallet,
        now,
        "subscription_credit",
        granted,
        subscription=granted - settled,
        prepaid=settled,
        key=key,
        source=source,
        metadata=metadata,
    )
