"""Many messages in one request: all of them are handed over in their order, or none."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from api_stub.batches import MOST_BYTES
from api_stub.turns import AT_ONCE
from holdfast_client.broker import QUEUE
from holdfast_client.messages import MAX_BODY_BYTES
from tests.acceptance import website
from tests.acceptance.website import Patient, token
from tests.installation import Installation
from tests.support import PATIENCE_S, eventually, sql
from worker.local.machine import free_port

PATH = "/api/messages"
BOTH = "workflows:write wallet:write"


class Sender(Patient):
    def __init__(self, address: str, *org_ids: str, **claims: Any) -> None:
        claims = {"orgs": list(org_ids), "scope": BOTH} | claims
        super().__init__(base_url=address, headers={"Authorization": f"Bearer {token(**claims)}"})

    def tell(self, content: bytes) -> httpx.Response:
        return self.post(PATH, content=content, headers={"Content-Type": "application/jsonl"})


def line(task: str, **fields: Any) -> bytes:
    return json.dumps({"task": task, **fields}).encode()


def grant(org_id: str, number: int, **fields: Any) -> bytes:
    return line("wallet.grant", org_id=org_id, grant_id=f"gift-{number}", credits=1, **fields)


@pytest.fixture
def sender(address: str, org_id: str) -> Iterator[Sender]:
    """On a ledger without a worker."""
    with Sender(address, org_id, "second") as own:
        yield own


def test_a_thousand_messages_of_several_organizations_are_applied_in_their_order(running: Installation) -> None:
    lines = [line("wallet.purchase", org_id=org_id, purchase_id="order", credits=1000) for org_id in ("one", "two")]
    for number in range(499):
        for org_id in ("one", "two"):
            run = {"org_id": org_id, "workflow_id": f"run-{number // 2}"}
            lines.append(line("workflow.finish" if number % 2 else "workflow.start", **run, credits=1))
    with website.served(running.database_url, running.broker_url) as address, Sender(address, "one", "two") as sender:
        response = sender.tell(b"\n".join(lines))
        assert (response.status_code, response.json()) == (202, {"status": "accepted", "messages": 1000})
        eventually(running.is_drained)
        assert sender.tell(b"\n".join(lines)).status_code == 202
        eventually(running.is_drained)
    counted = "SELECT event_type, count(*) FROM credit_events WHERE org_id = 'one' GROUP BY 1 ORDER BY 1"
    assert sql(running.engine, counted) == [
        ("prepaid_purchase", 1),
        ("reservation", 250),
        ("reservation_released", 249),
        ("usage", 249),
    ]
    assert running.count("dead_letters") == 0


@pytest.mark.parametrize(
    "content",
    [
        b"%b\n%b\n",
        b"%b\n%b",
        b"%b\r\n%b\r\n",
        b"\n\r\n  \t\n%b\n\n%b\n\n",
        b"\xef\xbb\xbf%b\n%b\n",
    ],
    ids=["lf", "no end", "crlf", "blank", "bom"],
)
def test_lines_end_as_lines_do(sender: Sender, org_id: str, ledger: Installation, content: bytes) -> None:
    before = ledger.broker.llen(QUEUE)
    response = sender.tell(content % (grant(org_id, 1), grant(org_id, 2, reason="a\u2028b")))
    assert (response.status_code, response.json()) == (202, {"status": "accepted", "messages": 2})
    assert ledger.broker.llen(QUEUE) == before + 2


BAD_LINES = {
    b"not json": "not JSON: Expecting value at character 1",
    b"[]": "the line must be a JSON object: one message, with no list around the lines",
    b'{"org_id": "acme"}': "task is missing, such as workflow.finish",
    b'{"task": "wallet.grant", "org_id": "\xff"}': "the byte 0xff at position 37 is not UTF-8: save the text as UTF-8",
    b'{"task": "wallet.grant", "task": "wallet.grant"}': "task is given more than once in the same object",
    b"x" * (MAX_BODY_BYTES + 1): "the line has more than 65,536 bytes",
    line("subscriptions.post_due"): "there is no task named 'subscriptions.post_due'",
    grant("acme", 1, colour="red"): "wallet.grant: colour is not a field of this message",
    grant("somebody-else", 1): "NO_ORGANIZATION",
    grant("second", 1, source="scheduler"): (
        "wallet.grant: source must not be operator or scheduler: these are reserved"
    ),
    line("workflow.cancel", org_id="second", workflow_id="w", source="billing"): (
        "workflow.cancel: source must not be admin, billing, operator or scheduler: these are reserved"
    ),
}


def test_of_a_batch_with_bad_lines_nothing_is_sent_and_every_line_is_named(
    sender: Sender, org_id: str, ledger: Installation
) -> None:
    before = ledger.broker.llen(QUEUE)
    lines = [grant(org_id, 1), b"", *BAD_LINES, grant(org_id, 2)]
    response = sender.tell(b"\n".join(lines))
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    of_another = sender.post("/api/organizations/somebody-else/wallet/grant").json()["detail"]
    expected = [detail.replace("NO_ORGANIZATION", of_another) for detail in BAD_LINES.values()]
    assert response.json()["lines"] == [{"line": number, "detail": detail} for number, detail in enumerate(expected, 3)]
    assert response.json()["detail"].startswith("Nothing was sent: line 3: not JSON: Expecting value at character 1; ")
    assert response.json()["detail"].endswith("; … and 1 more")
    assert ledger.broker.llen(QUEUE) == before


def test_every_line_needs_the_scope_of_its_message(address: str, org_id: str) -> None:
    both = b"\n".join([grant(org_id, 1), line("workflow.cancel", org_id=org_id, workflow_id="w")])
    for scope, lines in [
        ("workflows:write", [{"line": 1, "detail": "The token lacks the scope wallet:write."}]),
        ("wallet:write", [{"line": 2, "detail": "The token lacks the scope workflows:write."}]),
    ]:
        with Sender(address, org_id, scope=scope) as sender:
            response = sender.tell(both)
            assert (response.status_code, response.json()["lines"]) == (422, lines)
    with Sender(address, org_id, scope="credits:read operator") as reader:
        assert reader.tell(both).status_code == 403
    assert httpx.post(f"{address}{PATH}", content=both, trust_env=False).status_code == 401


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (b"", 422, "The body has no messages; send one on each line."),
        (b"\n \r\n", 422, "The body has no messages; send one on each line."),
        (b"{}\n" * 1_001, 422, "The body has more than 1,000 messages; send them in several requests."),
        (b" " * (MOST_BYTES + 1), 413, "The body is larger than 4,194,304 bytes."),
    ],
    ids=["empty", "blank", "too many", "too large"],
)
def test_too_little_or_too_much_is_refused(sender: Sender, content: bytes, status: int, detail: str) -> None:
    response = sender.tell(content)
    assert (response.status_code, response.json()["detail"]) == (status, detail)


def test_if_the_broker_is_away_all_of_it_is_sent_again(ledger: Installation, org_id: str) -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with website.served(ledger.database_url, nowhere) as address, Sender(address, org_id) as sender:
        response = sender.tell(grant(org_id, 1))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["detail"] == (
        "The broker may have some of the messages, but not all; send all of them again: that is safe."
    )


def test_who_sends_as_many_batches_as_may_be_is_told_to_come_back(address: str, org_id: str) -> None:
    enough = threading.Event()
    begun = threading.Barrier(AT_ONCE + 1)

    def slowly() -> Iterator[bytes]:
        yield grant(org_id, 1)
        begun.wait(PATIENCE_S)
        enough.wait(PATIENCE_S)
        yield b"\n"

    with Sender(address, org_id) as sender, ThreadPoolExecutor(AT_ONCE) as threads:
        sent = [threads.submit(sender.post, PATH, content=slowly()) for _ in range(AT_ONCE)]
        begun.wait(PATIENCE_S)
        refused = sender.tell(grant(org_id, 2))
        enough.set()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert {each.result(PATIENCE_S).status_code for each in sent} == {202}
