"""What a message does to a wallet. Pure: the same arguments give the same decision, and nothing else is read.

`decide` decides one message, and `quote` says what it would decide about a start. `begin_due` and `release_expired` are
what time alone does; they come before any message. Every event is made by `posting.post`, which asserts the arithmetic
of the ledger; assertions stay on in production.
"""

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

from holdfast_client.messages import AnyMessage, WorkflowMessage
from ledger.rules.ending import end_uncovered
from ledger.rules.posting import SCHEDULER, OutOfRangeError, refuse
from ledger.rules.subscriptions import begin_due
from ledger.rules.wallets import decide_wallet, repeat
from ledger.rules.workflows import decide_workflow, quote, release_expired
from ledger.state import Decision, PostedMessage, Subscription, Wallet, Workflow

__all__ = ["SCHEDULER", "begin_due", "decide", "quote", "release_expired"]

_NONE: Mapping[str, Subscription] = MappingProxyType({})


def decide(
    wallet: Wallet,
    message: AnyMessage,
    now: datetime,
    *,
    workflow: Workflow | None = None,
    subscriptions: Mapping[str, Subscription] = _NONE,
    posted: PostedMessage | None = None,
    purchase: PostedMessage | None = None,
) -> Decision:
    """Decide what `message` does to `wallet` at `now`; nothing is due in the wallet any more.

    `workflow` and `purchase` are what is known of those that the message names, and `posted` is the same message, if
    it came before. `subscriptions` has, by id, the one that the message names, the current one and the scheduled one.
    A message that cannot be applied is a `refusal` in the decision, not an exception.
    """
    assert wallet.org_id == message.org_id
    assert not wallet.is_due(now)
    assert wallet.last_event_at is None or wallet.last_event_at <= now
    try:
        if isinstance(message, WorkflowMessage):
            decision = decide_workflow(wallet, message, now, workflow)
        elif posted is not None:
            return repeat(wallet, message, posted)
        else:
            decision = decide_wallet(wallet, message, now, workflow, subscriptions, purchase)
    except OutOfRangeError:
        return refuse(wallet, "balance_out_of_range", f"{message.task}: a balance would pass 2^53-1 credits")
    # After the whole message: between a release and its usage, what was held is not uncovered.
    wallet, ended = end_uncovered(decision.wallet, now)
    if wallet is decision.wallet:  # as nearly always
        return decision
    return decision._replace(wallet=wallet, events=(*decision.events, *ended))
