"""The cause of a dead letter: what the errors of one incident have in common. And what each code means."""

import re
from datetime import UTC, datetime
from typing import Any, get_args

import pytest

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.messages import InvalidMessage, parse, too_large_body
from holdfast_client.results import ErrorCode
from ledger.causes import CODES, MAX_CAUSE_LENGTH, cause_of
from tests.memory import MemoryLedger
from worker.transport import MOST_ENTRY_BYTES


def invalid(**fields: Any) -> str:
    problem = parse("wallet.purchase", {"org_id": "acme", "purchase_id": "p1", "credits": 5, **fields})
    assert isinstance(problem, InvalidMessage)
    return problem.error


@pytest.mark.parametrize(
    ("cause", "errors"),
    [
        ("credits must be an integer", [invalid(credits="3,5"), invalid(credits=1.5), invalid(credits=[1])]),
        ("credits must be greater than 0", [invalid(credits=0), invalid(credits=-12)]),
        ("purchase_id must be an id", [invalid(purchase_id="a b"), invalid(purchase_id='it\'s "x"; y')]),
        (
            "purchase_id must be an id; credits must be greater than 0",
            [invalid(purchase_id=f"order {number}", credits=-number) for number in range(1, 60)],
        ),
        ("zzz is not a field of this message", [invalid(zzz=5)]),
        (
            "wallet.purchase takes one positional argument, the message as a JSON object",
            [
                f"wallet.purchase takes one positional argument, the message as a JSON object; got {sent}"
                for sent in ("2 positional and 0 named", "0 positional and 1 named")
            ],
        ),
        ("the message must be a JSON object", ["wallet.purchase: the message must be a JSON object, got a list of 3"]),
        (
            "the body has … bytes, more than 65,536: only the first … are kept; the … of the whole body is …",
            [too_large_body(size, f"{size:064x}").error for size in (70_000, 1_234_567)],
        ),
        ("wallet.bill failed unexpectedly: KeyError: …", ["wallet.bill failed unexpectedly: KeyError: 'run-1'"]),
        ("its worker ended each time it was applied", ["its worker ended each time it was applied"]),
        ("said … and …", ["said {'a': [1, {'b': 2}]} and [1, 2]", "said {} and []"]),
        ("…", ["", " \n ", "1,234", "-7"]),
        ("a\\x1b[J b", ["a\x1b[J\n b"]),
    ],
)
def test_the_errors_of_one_incident_have_one_cause(cause: str, errors: list[str]) -> None:
    assert {cause_of(error) for error in errors} == {cause}


def refusals() -> dict[str, list[str]]:
    """For each code that the rules give, the errors of two messages that differ in their ids and amounts only."""
    errors: dict[str, list[str]] = {}
    for workflow_id, message_id, number in (("nightly", "first", 40), ("run-7", "order.8", 2_000)):
        ledger = MemoryLedger(datetime(2026, 3, 1, 9, tzinfo=UTC))

        def refused(task: str, ledger: MemoryLedger = ledger, **fields: Any) -> None:
            refusal = ledger.send(task, **fields).refusal
            assert refusal is not None, task
            errors.setdefault(f"{task} {refusal.code}", []).append(refusal.error)

        ledger.send("wallet.purchase", purchase_id=message_id, credits=number)
        ledger.send("workflow.finish", workflow_id=workflow_id, credits=number)
        ledger.send("workflow.start", workflow_id=f"{workflow_id}-2", credits=number)
        plan = {"plan": "Team", "monthly_credits": 5, "anchor": "2026-03-01T00:00:00Z"}
        ledger.send("wallet.subscribe", subscription_id=message_id, version=1, **plan)
        refused("wallet.purchase", purchase_id=message_id, credits=number + 1)
        refused("workflow.finish", workflow_id=workflow_id, credits=number + 1)
        refused("workflow.start", workflow_id=f"{workflow_id}-2", credits=number + 1)
        later: dict[str, Any] = plan | {"anchor": f"2026-03-0{len(workflow_id)}T00:00:00Z"}
        refused("wallet.subscribe", subscription_id=message_id, version=2, **later)
        refused("wallet.bill", billing_id=message_id, credits=-10_000 - number)
        refused("wallet.refund", refund_id="r", workflow_id=workflow_id, credits=number + 1)
        refused("wallet.reverse", reversal_id="v", reason="disputed", purchase_id=f"{message_id}-2")
        refused("wallet.reverse", reversal_id="v", reason="disputed", purchase_id=message_id, credits=number + 1)
    return errors


def test_what_the_rules_refuse_has_one_cause_whatever_the_ids_and_amounts_are() -> None:
    found = {kind: {cause_of(error) for error in errors} for kind, errors in refusals().items()}
    assert found == {
        "wallet.purchase conflict": {"… was applied with credits …, so this message contradicts it"},
        "workflow.finish conflict": {"… was finished with … credits, so this message contradicts it"},
        "workflow.start conflict": {"… was started with … credits, so this message contradicts it"},
        "wallet.subscribe conflict": {
            "… has its anchor at …, which cannot change; another anchor needs another subscription_id"
        },
        "wallet.bill insufficient_credits": {"… would take the prepaid balance, …, below zero"},
        "wallet.refund refund_exceeds_usage": {
            "workflow … used … credits and … of them were refunded already, so … cannot be"
        },
        "wallet.reverse unknown_purchase": {"there is no purchase …; if it is still to come, replay this after it"},
        "wallet.reverse reversal_exceeds_purchase": {
            "purchase … brought … credits and … of them were reversed already, so … cannot be reversed"
        },
    }


@pytest.mark.parametrize("error", ["x" * 5_000, "{" * 5_000, "'" * 4_999, "1a" * 3_000, "\u200b" * 5_000, "a 1 " * 999])
def test_a_cause_is_short_printable_and_found_at_once(error: str) -> None:
    cause = cause_of(error)
    assert (1 <= len(cause) <= MAX_CAUSE_LENGTH, cause.isprintable()) == (True, True)
    assert cause_of(error) == cause


def test_every_code_is_explained() -> None:
    assert set(CODES) == set(get_args(ErrorCode))


def test_what_the_codes_say_of_queues_and_sizes_is_so() -> None:
    assert set(re.findall(r"`(credits[.a-z]*)`", CODES["not_allowed"].meaning + CODES["not_allowed"].cure)) == {
        ENGINE_QUEUE,
        QUEUE,
    }
    assert f"its entry in Redis than {MOST_ENTRY_BYTES:,}." in CODES["too_large"].meaning


def test_what_cannot_be_replayed_is_likely_to_be_discarded() -> None:
    assert {code for code, meaning in CODES.items() if "cannot be replayed" in meaning.cure} <= {
        code for code, meaning in CODES.items() if meaning.likely == "discard"
    }
