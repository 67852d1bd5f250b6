"""docs/messages.md says what is so: written from the code, complete, with examples that are applied here."""

import ast
import json
import re
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from api_stub.app import create_app
from docs.generate_messages import EVENTS, OF_WALLETS, OF_WORKFLOWS, OUTCOMES, PAGE, render
from holdfast_client.messages import MAX_AMOUNT, MAX_CREDITS, MESSAGES, Message, parse
from holdfast_client.results import Limit, OutcomeName, Reason, WorkflowState
from ledger.examples import EXAMPLES
from ledger.settings import Settings
from ledger.state import OUTCOMES as WORKFLOW_OUTCOMES
from tests.memory import MemoryLedger

ROOT = Path(__file__).parents[2]
TEXT = PAGE.read_text(encoding="utf-8")

# The examples as one story, with what each is answered.
STORY = [
    ("wallet.configure", "posted"),
    ("wallet.purchase", "posted"),
    ("wallet.subscribe", "posted"),
    ("wallet.grant", "posted"),
    ("wallet.adjust", "posted"),
    ("workflow.start", "reserved"),
    ("workflow.finish", "settled"),
    ("workflow.cancel", "released"),
    ("workflow.fail", "released"),
    ("wallet.refund", "posted"),
    ("wallet.bill", "posted"),
    ("wallet.reverse", "posted"),
    ("wallet.unsubscribe", "posted"),
]


def section(task: str) -> str:
    return TEXT.split(f"\n## `{task}`\n")[1].split("\n## ")[0]


def example(task: str) -> dict[str, Any]:
    [found] = re.findall(r"^```json\n(.*?)\n```$", section(task), re.MULTILINE | re.DOTALL)
    message: dict[str, Any] = json.loads(found)
    return message


def own_metadata() -> dict[str, set[str]]:
    """What metadata each type of event has, in a story in which everything happens; the sender gives none."""
    ledger = MemoryLedger(datetime(2026, 3, 1, 9, tzinfo=UTC))

    def send(task: str, **fields: Any) -> None:
        assert ledger.send(task, **fields).refusal is None, task

    def owe_one() -> None:
        fields = {"adjustment_id": f"owe-{len(ledger.events)}", "reason": "typo", "allow_negative": True}
        send("wallet.adjust", credits=-1 - ledger.wallet.prepaid_balance, **fields)

    plan = {**EXAMPLES["wallet.subscribe"], "rollover_limit": 0, "first_credits": 20}
    send("workflow.finish", workflow_id="never-started", credits=10)
    send("wallet.subscribe", **{**plan, "monthly_credits": 50})
    send("wallet.subscribe", **{**plan, "version": 2, "plan": "small", "monthly_credits": 10, "first_credits": 10})
    ends = {"expires_at": "2026-03-20T00:00:00Z"}
    for task, fields in [
        ("wallet.adjust", {"adjustment_id": "found", "credits": 5, "reason": "found"}),
        ("wallet.bill", {"billing_id": "bonus", "credits": 5, "invoice_id": "2026-0001"}),
        ("wallet.refund", {"refund_id": "sorry", "credits": 5}),
        ("wallet.grant", {**EXAMPLES["wallet.grant"], **ends}),
        ("wallet.purchase", {"purchase_id": "order-1", "credits": 500, **ends}),
    ]:
        owe_one()
        send(task, **fields)
    send("wallet.grant", grant_id="late", credits=5, expires_at="2026-01-01T00:00:00Z")
    send("wallet.bill", billing_id="fee", credits=-5)
    send("workflow.start", workflow_id="run-1", credits=75)
    send("workflow.finish", workflow_id="run-1", credits=80)
    send("wallet.refund", **EXAMPLES["wallet.refund"])
    send("workflow.start", workflow_id="run-2", credits=10)
    send("workflow.cancel", **EXAMPLES["workflow.cancel"])
    send("wallet.reverse", **EXAMPLES["wallet.reverse"])
    send("wallet.configure", **EXAMPLES["wallet.configure"], reason="as agreed")
    # Full, and as deep in debt as can be: as after thousands of messages.
    ledger.wallet = ledger.wallet._replace(prepaid_balance=MAX_CREDITS - ledger.wallet.subscription_balance)
    send("wallet.subscribe", **{**plan, "version": 3, "plan": "large", "monthly_credits": 500, "first_credits": 500})
    ledger.wait(days=60)
    ledger.wallet = ledger.wallet._replace(prepaid_balance=5 - MAX_CREDITS)
    send("workflow.finish", workflow_id="run-3", credits=1000)
    keys: dict[str, set[str]] = defaultdict(set)
    for event in ledger.events:
        keys[event.event_type] |= set(event.metadata)
    return keys


def test_the_page_is_what_make_docs_writes() -> None:
    assert render() == TEXT, "docs/messages.md is not up to date: make docs"


def test_the_page_has_a_section_for_every_message() -> None:
    assert re.findall(r"^## `(.*)`$", TEXT, re.MULTILINE) == list(MESSAGES)


@pytest.mark.parametrize("task", MESSAGES)
def test_every_field_of_a_message_has_its_row_with_a_meaning(task: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", section(task), re.MULTILINE)
    common = ["org_id", "source", "occurred_at", "metadata"]
    assert [name for name, *_ in rows] == [name for name in MESSAGES[task].model_fields if name not in common]
    for name, _, default, _ in rows:
        assert (default == "required") == MESSAGES[task].model_fields[name].is_required()


def test_bounds_and_defaults_are_told_as_they_are() -> None:
    assert "| `expires_in_s` | integer, 60 to 2,592,000 | `86400` | Seconds after which " in section("workflow.start")
    assert "| `credits` | amount ≥ 0 | required |" in section("workflow.finish")
    assert "| `credits` | amount > 0 | required |" in section("wallet.purchase")
    assert "| `credits` | amount | required |" in section("wallet.bill")
    assert "| `credits` | amount > 0, or null | `null` |" in section("wallet.reverse")
    assert "| `reason` | `refunded` or `disputed` | required |" in section("wallet.reverse")
    assert "| `expires_at` | time, or null | `null` |" in section("wallet.grant")
    assert "| `first_credits` | amount ≥ 0, or null | `null` |" in section("wallet.subscribe")
    assert "| `rollover_limit` | integer ≥ 0 | `0` |" in section("wallet.subscribe")
    assert f"at most {MAX_AMOUNT:,} (10^12) either way" in TEXT
    assert "at most 9,007,199,254,740,991 (2^53−1)" in TEXT
    assert "| `period_cap` | integer ≥ 0, or null | `null` |" in section("wallet.configure")
    assert "| `allow_negative` | boolean | `false` |" in section("wallet.adjust")
    assert "| `plan` | text, 1–256 characters | required |" in section("wallet.subscribe")


def test_every_message_tells_what_it_is_known_by_and_its_default_source() -> None:
    assert "Known by `org_id` and `workflow_id`. Default `source`: `workflow-engine`." in section("workflow.start")
    assert "Known by `org_id` and `grant_id`. Default `source`: `admin`." in section("wallet.grant")
    assert "Known by `org_id`, `subscription_id` and `version`." in section("wallet.unsubscribe")
    assert "Known by `org_id` and `version`." in section("wallet.configure")


@pytest.mark.parametrize("task", MESSAGES)
def test_every_message_tells_what_it_can_take_away(task: str) -> None:
    assert len(re.findall(r" Takes away: .+\.$", section(task), re.MULTILINE)) == 1


def test_an_answers_limit_has_the_parts_that_the_page_names() -> None:
    [meaning] = re.findall(r"^\| `limit` \| (.*) \|$", TEXT, re.MULTILINE)
    assert [name for name in re.findall(r"`(\w+)`", meaning) if name != "reason"] == list(Limit._fields)


@pytest.mark.parametrize("task", MESSAGES)
def test_every_example_is_a_valid_message(task: str) -> None:
    assert isinstance(parse(task, example(task)), Message)


def test_the_examples_are_applied_and_answered_as_a_story() -> None:
    assert sorted(task for task, _ in STORY) == sorted(MESSAGES)
    ledger = MemoryLedger(datetime(2026, 3, 1, 9, tzinfo=UTC))
    for workflow_id in ("run-2", "run-3"):
        ledger.send("wallet.purchase", purchase_id=workflow_id, credits=10)
        ledger.send("workflow.start", workflow_id=workflow_id, credits=10)
    for task, outcome in STORY:
        decision = ledger.send(task, **example(task))
        assert decision.refusal is None
        assert (task, decision.outcome) == (task, outcome)
        assert ledger.send(task, **example(task)).duplicate


def test_the_program_of_the_page_sends_a_valid_message() -> None:
    [program] = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    [message] = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Assign)][1:2]
    assert isinstance(parse("workflow.start", ast.literal_eval(message)), Message)
    assert 'send_task("workflow.start"' in program
    assert 'queue="credits"' in program
    assert '["state"] == "reserved"' in program


def test_an_answer_may_have_every_state_and_the_page_names_them() -> None:
    [meaning] = re.findall(r"^\| `state` \| (.*) \|$", TEXT, re.MULTILINE)
    assert re.findall(r"`(\w+)`", meaning) == list(get_args(WorkflowState))


def test_the_paths_of_the_page_are_the_apis() -> None:
    api = create_app(
        Settings(
            database_url="postgresql+psycopg://user:password@host/database",
            broker_url="redis://host",
            jwt_secret="a secret of at least thirty-two characters",
        )
    )
    for task in MESSAGES:
        kind, _, name = task.partition(".")
        path = OF_WORKFLOWS if kind == "workflow" else OF_WALLETS
        assert f"`POST {path}" in TEXT
        assert "post" in api.openapi()["paths"][f"{path}{name}"]


def test_every_outcome_and_reason_is_explained() -> None:
    assert {outcome for outcome, _ in OUTCOMES} == set(get_args(OutcomeName))
    assert {reason for _, reason in OUTCOMES} == {None, *get_args(Reason)}
    assert set(WORKFLOW_OUTCOMES.values()) <= set(OUTCOMES)


def test_every_key_that_the_ledger_adds_to_metadata_is_named_with_its_event() -> None:
    assert own_metadata() == {event_type: set(own) for event_type, (_, _, own) in EVENTS.items()}


def test_readme_and_architecture_lead_to_the_page() -> None:
    assert "(docs/messages.md)" in (ROOT / "README.md").read_text()
    assert "(messages.md)" in (ROOT / "docs" / "architecture.md").read_text()
