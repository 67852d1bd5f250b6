"""The tables of docs/credits.md, executed: each says what happens on which day, and the events that come of it."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest

from ledger.state import Decision, EventType
from tests.memory import MemoryLedger

PAGE = Path(__file__).parents[2] / "docs" / "credits.md"
HEADER = ["date", "what happens", "event", "credits", "prepaid", "subscription", "reserved"]

PLAN = r"subscribes to (?P<plan>[A-Z]\w+), (?P<n>[\d,]+) a month"
# What a sentence of a table means. `n` are credits, times are days of 2026 at 00:00 UTC, the others ids.
SENTENCES = {
    PLAN: "wallet.subscribe",
    rf"{PLAN}, (?P<first>[\d,]+) for the first": "wallet.subscribe",
    rf"{PLAN}, (?P<rollover>[\d,]+) may roll over": "wallet.subscribe",
    rf"{PLAN}, from (?P<anchor>\d+ \w+) on": "wallet.subscribe",
    r"changes from (?P<was>[A-Z]\w+) to (?P<plan>[A-Z]\w+), (?P<n>[\d,]+) a month": "wallet.subscribe",
    r"ends the subscription to (?P<plan>[A-Z]\w+)": "wallet.unsubscribe",
    r"buys (?P<n>[\d,]+)": "wallet.purchase",
    r"is granted (?P<n>[\d,]+)": "wallet.grant",
    r"is granted (?P<n>[\d,]+), until (?P<end>\d+ \w+)": "wallet.grant",
    r"run (?P<run>\w) starts, estimated at (?P<n>[\d,]+)": "workflow.start",
    r"run (?P<run>\w) finishes and used (?P<n>[\d,]+)": "workflow.finish",
    r"run (?P<run>\w) is cancelled": "workflow.cancel",
    r"run (?P<run>\w) is refunded (?P<n>[\d,]+)": "wallet.refund",
    r"a correction of (?P<n>[+−][\d,]+)": "wallet.adjust",
    r"an invoice of (?P<n>[\d,]+) credits": "wallet.bill",
    r"the payment of the purchase is taken back": "wallet.reverse",
    r"a period begins|a period ends|the grant ends|the refund ends": "",
}


def number(text: str) -> int:
    return int(text.replace(",", "").replace("−", "-"))


def day(text: str) -> datetime:
    return datetime.strptime(f"{text} 2026", "%d %B %Y").replace(tzinfo=UTC)


def message(sentence: str, count: int) -> tuple[str, dict[str, Any]]:
    """The task and the fields that `sentence` stands for: the `count`th of its table."""
    matches = [(task, match) for pattern, task in SENTENCES.items() if (match := re.fullmatch(pattern, sentence))]
    assert len(matches) == 1, f"SENTENCES must have one pattern for {sentence!r}"
    [(task, match)] = matches
    said = match.groupdict()
    fields: dict[str, Any] = {"credits": number(said["n"])} if said.get("n") else {}
    match task:
        case "wallet.subscribe":
            fields = {"monthly_credits": fields["credits"], "plan": said["plan"], "version": count}
            fields["subscription_id"] = said.get("was") or said["plan"]
            fields |= {"first_credits": number(said["first"])} if said.get("first") else {}
            fields |= {"rollover_limit": number(said["rollover"])} if said.get("rollover") else {}
            fields |= {"anchor": day(said["anchor"]).isoformat()} if said.get("anchor") else {}
        case "wallet.unsubscribe":
            fields = {"subscription_id": said["plan"], "version": count}
        case "wallet.purchase" | "wallet.grant":
            fields[f"{task.removeprefix('wallet.')}_id"] = "p" if task == "wallet.purchase" else f"g{count}"
            fields |= {"expires_at": day(said["end"]).isoformat()} if said.get("end") else {}
        case "workflow.start" | "workflow.finish" | "workflow.cancel":
            fields |= {"workflow_id": said["run"]}
            fields |= {"expires_in_s": 2_592_000} if task == "workflow.start" else {}
        case "wallet.refund":
            fields |= {"refund_id": f"r{count}", "workflow_id": said["run"]}
        case "wallet.adjust":
            fields |= {"adjustment_id": f"a{count}", "reason": "correction"}
        case "wallet.bill":
            fields |= {"billing_id": f"b{count}", "invoice_id": f"i{count}"}
        case "wallet.reverse":
            fields |= {"reversal_id": f"v{count}", "purchase_id": "p", "reason": "disputed"}
    return task, fields


def amount(credits: int) -> str:
    return f"{credits:,}".replace("-", "−")


def what_came_of_it(decision: Decision) -> str:
    """What a message that made no event is told in the table."""
    if decision.refusal is not None:
        return f"– (refused: {decision.refusal.code})"
    return f"– ({decision.outcome}: {decision.reason})" if decision.reason else "–"


def executed(steps: list[tuple[str, str]]) -> Iterator[list[str]]:
    """The rows of a table in which that happens on these days."""
    ledger = MemoryLedger(day(steps[0][0]))
    for count, (date, sentence) in enumerate(steps, start=1):
        task, fields = message(sentence, count)
        ledger.now = max(ledger.now, day(date))
        events, told = ledger.catch_up(), "–"
        if task:
            assert events == [], f"on {date}, something is due before {sentence!r}"
            decision = ledger.send(task, **fields)
            events, told = list(decision.events), what_came_of_it(decision)
        for index, event in enumerate(events):
            reason = event.metadata.get("reason") if event.source == "scheduler" or event.workflow_id else None
            yield [
                *((date, sentence) if index == 0 else ("", "")),
                f"`{event.event_type}`" + (f" ({reason})" if reason else ""),
                f"{'+' if event.credits > 0 else ''}{amount(event.credits)}",
                amount(event.prepaid_balance_after),
                amount(event.subscription_balance_after),
                amount(event.reserved_after),
            ]
        if not events:
            wallet = ledger.wallet
            balances = (wallet.prepaid_balance, wallet.subscription_balance, wallet.reserved)
            yield [date, sentence, told, "", *map(amount, balances)]


def tables() -> list[tuple[str, list[list[str]]]]:
    """The tables of the page that are executed, each with the heading that it stands under."""
    found: list[tuple[str, list[list[str]]]] = []
    heading = ""
    rows: list[list[str]] | None = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|") and cells == HEADER:
            found.append((heading, rows := []))
        elif not line.startswith("|"):
            rows = None
        elif rows is not None and set(line) - set("|-: "):
            rows.append(cells)
    return found


@pytest.mark.parametrize("rows", [pytest.param(rows, id=heading) for heading, rows in tables()])
def test_a_table_tells_what_the_ledger_does(rows: list[list[str]]) -> None:
    steps = [(cells[0], cells[1]) for cells in rows if cells[0]]
    assert rows == list(executed(steps))


def test_the_page_explains_every_type_of_event() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in get_args(EventType) if f"| `{name}` |" not in text] == []
    shown = {cells[2].split("`")[1] for _, rows in tables() for cells in rows if "`" in cells[2]}
    assert shown == set(get_args(EventType))
