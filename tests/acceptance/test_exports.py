"""The file of the credit history: every event that matches, and no cell that a spreadsheet takes for a formula."""

import asyncio
import csv
import io
import json
import re
import string
import unicodedata
from contextlib import ExitStack
from datetime import datetime

import httpx
import pytest

from api_stub import exports
from tests.acceptance.website import HISTORY, Visitor, app, history_of, serving, token, write
from tests.installation import Installation
from tests.support import eventually

COLUMNS = (
    "created_at,event_type,source,project_id,activity_name,credits,prepaid_balance_after,period_usage_after,metadata"
)


def test_the_file_has_every_event_that_matches(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500, "metadata": {"note": 'é, "quoted"\nand more'}}),
        ("workflow.finish", {"workflow_id": "w", "credits": 120, "project_id": "web", "activity_name": "Crawl"}),
        *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(200)),
    )
    answer = customer.get(f"{history_of(org_id)}.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == f'attachment; filename="credit-history-{org_id}.csv"'
    header, *lines = csv.reader(io.StringIO(answer.content.decode("utf-8"), newline=""))
    assert ",".join(header) == f"{COLUMNS},id,workflow_id"
    assert [line[9] for line in lines] == [str(number) for number in range(202, 0, -1)]
    usage, purchase = (dict(zip(header, line, strict=True)) for line in lines[-2:])
    assert datetime.fromisoformat(usage.pop("created_at")).tzinfo is not None
    assert usage == {
        "event_type": "usage",
        "source": "workflow-engine",
        "project_id": "web",
        "activity_name": "Crawl",
        "credits": "-120",
        "prepaid_balance_after": "380",
        "period_usage_after": "120",
        "metadata": '{"paid_by":{"prepaid":120},"unreserved":true}',
        "id": "2",
        "workflow_id": "w",
    }
    assert json.loads(purchase["metadata"]) == {"note": 'é, "quoted"\nand more', "purchase_id": "p"}
    filtered = customer.get(f"{history_of(org_id)}.csv", params={"event_type": "usage"})
    assert filtered.text.count("\r\n") == 2


FORMULAS = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\uff1dcmd", "\uff0b1", "\uff0d1", "\uff20SUM(1)")
BEFORE = (
    *("", " ", "\t", "\r", "\n", "\xa0", "\u3000", "\ufeff", "\u200b", "\u200d", '"', "\x1b[0m", "\u202e"),
    *(" \ufeff\t\xa0", "x;", "x; ", 'x;"', 'x; ""', 'x,";', '",;', "x;\ufeff", "x;y;\xa0", "x;\u200d\u3000"),
    *("x\t", "x\n", "x\r\n", "x\u2028", "x\x85", "x\x0b"),
)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_no_cell_of_the_file_is_a_formula(ledger: Installation, customer: Visitor, org_id: str, separator: str) -> None:
    texts = [f"{before}{formula}" for before in BEFORE for formula in FORMULAS]
    finishes = [
        {"workflow_id": f"-w{number}", "credits": 7, "activity_name": text, "source": text, "metadata": {text: [text]}}
        for number, text in enumerate(texts)
    ]
    write(ledger.engine, org_id, *(("workflow.finish", {"project_id": "-p", **fields}) for fields in finishes))
    file = customer.get(f"{history_of(org_id)}.csv").text
    assert {character for character in file if not character.isprintable()} <= {"\r", "\n", "\xa0", "\u3000", "\u200d"}
    lines = list(csv.reader(io.StringIO(file, newline=""), delimiter=separator))
    assert [cell for line in lines for cell in line if is_formula(cell)] == []
    assert len(lines) == 1 + len(texts)
    if separator == ",":
        events = [dict(zip(exports.COLUMNS, line, strict=True)) for line in reversed(lines[1:])]
        assert [json.loads(event["metadata"])[text] for text, event in zip(texts, events, strict=True)] == [
            [text] for text in texts
        ]
        assert {(event["project_id"], event["credits"]) for event in events} == {("'-p", "-7")}
        assert events[0]["activity_name"] == f"'{texts[0]}"


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet that overlooks as much as it can takes `cell` for one; a number is none."""
    begins = cell.lstrip(string.whitespace + '\xa0\u3000\ufeff\u200b\u200d\u202e\x1b"')
    return unicodedata.normalize("NFKC", begins[:1]) in tuple("=+-@") and not re.fullmatch("-[0-9]+", cell)


def test_text_of_the_file_that_is_no_formula_is_as_it_was(ledger: Installation, customer: Visitor, org_id: str) -> None:
    emoji, persian = "\U0001f469\u200d\U0001f4bb", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    texts = ["Crawl; then = and - and @", "a;b", "1+1", "x-y", 'é, "quoted"', emoji, persian]
    write(
        ledger.engine,
        org_id,
        *(
            ("workflow.finish", {"workflow_id": f"w{number}", "credits": 7, "activity_name": text})
            for number, text in enumerate(texts)
        ),
    )
    answer = customer.get(f"{history_of(org_id)}.csv")
    _, *lines = csv.reader(io.StringIO(answer.text, newline=""))
    assert [line[exports.COLUMNS.index("activity_name")] for line in reversed(lines)] == texts


def test_no_text_on_the_page_turns_round_or_hides_what_is_beside_it(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    unseen, seen = "\x1b[2J\x07\x9b\u202e\u200b\u2066", "\U0001f469\u200d\U0001f4bb"
    text = f"a{unseen}b{seen}"
    fields = {"credits": 7, "source": text, "activity_name": text, "metadata": {text: text, "deep": [text]}}
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 50}),
        ("workflow.finish", {"workflow_id": "w", **fields}),
        ("workflow.finish", {"workflow_id": "x", **fields, "metadata": {text: text}}),
        ("workflow.start", {"workflow_id": "y", "credits": 1, "activity_name": text}),
    )
    history = history_of(org_id)
    for path, least in ((history, 4), (f"{history}?view=ledger", 7), (f"/organizations/{org_id}/runs/x", 3)):
        page = customer.get(path).text
        assert not set(unseen[0:1] + unseen[4:]).intersection(page)
        assert page.count(f"a\\x1b[2J\\x07\\x9b\\u202e\\u200b\\u2066b{seen}") >= least, path


def test_the_json_of_the_api_has_every_text_exactly(ledger: Installation, visitor: Visitor, org_id: str) -> None:
    texts = [f"{before}=1" for before in BEFORE]
    write(
        ledger.engine,
        org_id,
        *(
            ("workflow.finish", {"workflow_id": f"w{number}", "credits": 7, "source": text, "metadata": {text: text}})
            for number, text in enumerate(texts)
        ),
    )
    header = {"Authorization": f"Bearer {token(orgs=[org_id])}"}
    items = visitor.get(f"/api/organizations/{org_id}/credit-events", headers=header).json()["items"]
    assert [item["source"] for item in reversed(items)] == texts
    assert [item["metadata"][text] for text, item in zip(texts, reversed(items), strict=True)] == texts


def test_a_download_that_nobody_reads_holds_no_connection_to_the_database(ledger: Installation, org_id: str) -> None:
    long = {"note": "x" * 8_000}
    write(
        ledger.engine,
        org_id,
        *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1, "metadata": long}) for number in range(3_000)),
    )
    serving_app = app(ledger.database_url, ledger.broker_url)
    in_use = serving_app.state.services.engine.pool.checkedout
    headers = [{"Authorization": f"Bearer {token(orgs=[org_id], sub=f'reader-{number}')}"} for number in range(20)]
    with serving(serving_app) as address, Visitor(base_url=address) as visitor, ExitStack() as stack:
        downloads = [
            stack.enter_context(visitor.stream("GET", f"{history_of(org_id)}.csv", headers=header))
            for header in headers
        ]
        assert {download.status_code for download in downloads} == {200}
        # 24 MB each are more than what lies between the server and who does not read.
        eventually(lambda: in_use() == 0)
        assert visitor.get(history_of(org_id), headers=headers[0]).status_code == 200
        write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "late", "credits": 1}))
        _, *lines = csv.reader(downloads[7].iter_lines())
        assert [int(line[9]) for line in lines] == list(range(3_000, 0, -1))


def test_who_asks_only_for_the_headers_of_the_file_has_no_event_read(
    ledger: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = map(str, range(100))
    monkeypatch.setattr(exports, "pieces", lambda _: pieces)
    transport = httpx.ASGITransport(app(ledger.database_url, ledger.broker_url))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://credits.example") as client:
            return await client.head(f"{HISTORY}.csv", headers={"Authorization": f"Bearer {token()}"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["content-type"][:8]) == (200, "text/csv")
    assert next(pieces) == "1"  # the first is read before the answer begins
