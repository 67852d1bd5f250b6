"""The theorem: what a workflow does depends on the set of its messages, not on their order or number."""

from datetime import UTC, datetime
from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from ledger.state import Wallet
from tests.memory import MemoryLedger
from tests.property.model import check_history

NOW = datetime(2026, 1, 31, 9, tzinfo=UTC)

Step = tuple[str, str, int]
"""A workflow's id, what happens to it, and the credits if it says any."""


def amounts() -> st.SearchStrategy[int]:
    return st.integers(0, 12) | st.integers(0, 10**6)


def messages(workflow_id: str) -> st.SearchStrategy[list[Step]]:
    """Some of a workflow's possible messages, each of them up to twice."""

    def repeated(start: int, finish: int, twice: list[str], kinds: set[str]) -> list[Step]:
        amount = {"start": start, "finish": finish}
        steps = [(workflow_id, kind, amount.get(kind, 0)) for kind in sorted(kinds)]
        return steps + [step for step in steps if step[1] in twice]

    kinds = st.sampled_from(["start", "finish", "cancel", "fail"])
    twice = st.lists(kinds, max_size=1)
    return st.builds(repeated, amounts(), amounts(), twice, st.sets(kinds, min_size=1))


def new_ledger(prepaid: int, subscription: int, credit_limit: int = 0) -> MemoryLedger:
    ledger = MemoryLedger(NOW)
    ledger.send("wallet.configure", version=1, credit_limit=credit_limit)
    if subscription:
        ledger.send("wallet.subscribe", subscription_id="s", version=1, plan="p", monthly_credits=subscription)
    if prepaid:
        ledger.send("wallet.purchase", purchase_id="p", credits=prepaid)
    return ledger


def take(ledger: MemoryLedger, step: Step) -> None:
    workflow_id, kind, amount = step
    if kind == "wait":
        ledger.wait(hours=amount)
    else:
        fields = {"credits": amount} if kind in ("start", "finish") else {}
        decision = ledger.send(f"workflow.{kind}", workflow_id=workflow_id, **fields)
        assert decision.refusal is None


def balances(wallet: Wallet) -> dict[str, int]:
    return {
        "prepaid": wallet.prepaid_balance,
        "subscription": wallet.subscription_balance,
        "reserved": wallet.reserved,
        "usage": wallet.period_usage,
    }


def charged(prepaid: int, subscription: int, used: int) -> dict[str, int]:
    """The balances when that much was used of an idle wallet: the subscription pays first."""
    left = max(0, subscription - used)
    return {"prepaid": prepaid + subscription - used - left, "subscription": left, "reserved": 0, "usage": used}


@given(steps=messages("w"), prepaid=amounts(), subscription=amounts())
def test_every_order_of_a_workflows_messages_leaves_the_same_balances(
    steps: list[Step], prepaid: int, subscription: int
) -> None:
    said = {kind: amount for _, kind, amount in steps}
    if "finish" in said:
        expected = charged(prepaid, subscription, said["finish"])
    else:
        expected = charged(prepaid, subscription, 0)
        if set(said) == {"start"} and said["start"] <= prepaid + subscription:
            expected["reserved"] = said["start"]
    for order in sorted(set(permutations(steps))):
        ledger = new_ledger(prepaid, subscription)
        for step in order:
            take(ledger, step)
        assert balances(ledger.wallet) == expected, order
        usages = [event.credits for event in ledger.events if event.event_type == "usage"]
        assert usages == ([-said["finish"]] if "finish" in said else [])
        check_history(ledger.events)


@given(
    steps=messages("w"),
    waits=st.lists(st.integers(1, 30), max_size=2),
    prepaid=amounts(),
    subscription=amounts(),
    data=st.data(),
)
def test_a_workflow_that_never_finished_leaves_nothing_once_its_hold_expired(
    steps: list[Step], waits: list[int], prepaid: int, subscription: int, data: st.DataObject
) -> None:
    ledger = new_ledger(prepaid, subscription)
    pauses: list[Step] = [("", "wait", hours) for hours in waits]
    for step in data.draw(st.permutations(steps + pauses)):
        take(ledger, step)
    ledger.wait(hours=24)
    used = sum({amount for _, kind, amount in steps if kind == "finish"})
    assert balances(ledger.wallet) == charged(prepaid, subscription, used)
    check_history(ledger.events)


@given(
    steps=st.tuples(messages("w1"), messages("w2"), messages("w3")).map(
        lambda parts: [*parts[0], *parts[1], *parts[2]]
    ),
    prepaid=amounts(),
    subscription=amounts(),
    credit_limit=amounts(),
    data=st.data(),
)
def test_workflows_that_ended_leave_what_they_used_in_whatever_order_they_ran(
    steps: list[Step], prepaid: int, subscription: int, credit_limit: int, data: st.DataObject
) -> None:
    used = sum(amount for _, kind, amount in set(steps) if kind == "finish")
    for _ in range(2):
        ledger = new_ledger(prepaid, subscription, credit_limit)
        for step in data.draw(st.permutations(steps)):
            take(ledger, step)
        ledger.wait(hours=24)
        assert balances(ledger.wallet) == charged(prepaid, subscription, used)
        check_history(ledger.events)


@given(steps=messages("w"), other=amounts(), prepaid=amounts(), data=st.data())
def test_a_contradicting_message_changes_nothing(
    steps: list[Step], other: int, prepaid: int, data: st.DataObject
) -> None:
    ledger = new_ledger(prepaid, 0)
    said = {kind: amount for _, kind, amount in steps}
    for step in data.draw(st.permutations(steps)):
        take(ledger, step)
    before = ledger.wallet
    for kind in ("start", "finish"):
        if kind in said and said[kind] != other:
            decision = ledger.send(f"workflow.{kind}", workflow_id="w", credits=other)
            assert decision.refusal is not None
            assert decision.refusal.code == "conflict"
    assert ledger.wallet == before
