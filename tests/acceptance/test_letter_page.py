"""The page of a dead letter: what the ledger says beside the message, what to do, and what came of it."""

import re
from collections.abc import Iterator

import httpx
import pytest

from api_stub import letters
from ledger.store import apply_batch
from tests.acceptance.website import LETTERS, Visitor, form_token, served, text_of, write
from tests.installation import Installation
from tests.messages import delivery
from tests.support import PATIENCE_S, sql


@pytest.fixture(scope="module")
def address(running: Installation) -> Iterator[str]:
    """The address of pages whose ledger has a worker."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(letters, "ANSWER_TIMEOUT_S", PATIENCE_S)
        with served(running.database_url, running.broker_url) as address:
            yield address


def letters_of(running: Installation, org_id: str) -> list[str]:
    rows = sql(running.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id ORDER BY id", org_id=org_id)
    return [f"{LETTERS}/{number}" for (number,) in rows]


@pytest.fixture
def bill(running: Installation, org_id: str) -> str:
    """The address of a letter that can be applied after a purchase."""
    write(running.engine, org_id, ("wallet.bill", {"billing_id": "b", "credits": -90}))
    [address] = letters_of(running, org_id)
    return address


def buttons(page: httpx.Response) -> list[tuple[str, bool]]:
    """The buttons of the main part, and whether each is the primary one."""
    found = re.findall(r'<button( class="primary")? type="submit">([^<]*)<', page.text.partition("<main")[2])
    return [(text, bool(primary)) for primary, text in found]


def test_a_conflict_shows_both_amounts_and_is_likely_to_be_discarded(
    running: Installation, operator: Visitor, org_id: str
) -> None:
    for number in (3_000, 9_999):
        write(running.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": number}))
    [address] = letters_of(running, org_id)
    page = operator.get(address)
    table = re.search(r'<table class="compared">(.*?)</table>', page.text, re.DOTALL)
    assert table is not None
    assert text_of(table[1]).endswith("The ledger says The message says Credits 3,000 9,999")
    assert buttons(page) == [("Discard the message", True), ("Replay the message", False)]
    assert '<h2 id="what">What is wrong</h2>' in page.text
    assert "a new <code>subscription_id</code>, which replaces" in page.text
    assert text_of(re.findall(r'<dd id="balance">.*?</dd>', page.text)[0]) == "3,000, 3,000 available"


def test_what_can_be_applied_later_is_likely_to_be_replayed_and_the_page_says_what_came_of_it(
    running: Installation, operator: Visitor, org_id: str, bill: str
) -> None:
    page = operator.get(bill)
    assert buttons(page) == [("Replay the message", True), ("Discard the message", False)]
    assert re.findall(r'<dd id="balance">(.*?)</dd>', page.text) == ["no wallet yet"] or "0, 0 available" in page.text
    write(running.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 506}))
    write(running.engine, org_id, ("wallet.bill", {"billing_id": "later", "credits": -1_000}))
    done = operator.post(f"{bill}/replay", data={"form": form_token(page)})
    assert done.status_code == 303
    page = operator.get(bill)
    assert re.findall(r'<p id="done">(.*?)</p>', page.text, re.DOTALL) == ["✓ Applied: −90; 416 available now."]
    assert ('<h2 id="what">What was wrong</h2>' in page.text, "What to do:" in page.text) == (True, False)
    assert buttons(page) == []
    following = re.search(r'<a href="([^"]*)">Next open letter →</a>', page.text)
    assert following is not None
    assert operator.get(following[1]).status_code == 200


def test_what_was_sent_and_not_answered_is_not_called_applied(
    running: Installation, operator: Visitor, bill: str
) -> None:
    sql(
        running.engine,
        "UPDATE dead_letters SET status = 'replayed', resolved_at = now(), resolved_by = 'ann',"
        " resolution = 'sent; no answer came' WHERE id = :id",
        id=int(bill.rpartition("/")[2]),
    )
    page = operator.get(bill)
    assert "✓ Sent. Nobody waited for its outcome: if it fails, this letter is open again." in page.text
    assert "Applied" not in page.text


def test_one_can_go_from_letter_to_letter(running: Installation, operator: Visitor, org_id: str) -> None:
    sql(running.engine, "DELETE FROM dead_letters")
    for number in range(3):
        write(running.engine, org_id, ("wallet.bill", {"billing_id": f"b{number}", "credits": -5}))
    oldest, middle, newest = letters_of(running, org_id)

    def place(address: str) -> tuple[str, list[str]]:
        found = re.search(r'<nav class="place".*?</nav>', operator.get(address).text, re.DOTALL)
        assert found is not None
        return text_of(found[0]), re.findall(r'href="([^"]*)"', found[0])

    assert place(newest) == ("1 of 3 Older letter →", [middle])
    assert place(middle) == ("Newer letter ← 2 of 3 Older letter →", [newest, oldest])
    assert place(oldest) == ("Newer letter ← 3 of 3", [middle])
    for address in (oldest, middle, newest):
        operator.post(f"{address}/discard", data={"form": form_token(operator.get(address)), "reason": "a test"})
    page = operator.get(newest)
    assert ("✓ Discarded." in page.text, "No letter is open." in page.text) == (True, True)


def test_a_letter_leads_to_its_organization(operator: Visitor, org_id: str, bill: str) -> None:
    assert f'<a href="/operators/organizations/{org_id}">{org_id}</a>' in operator.get(bill).text


def test_a_code_of_an_older_version_is_shown_without_a_cure(
    running: Installation, operator: Visitor, bill: str
) -> None:
    sql(running.engine, "UPDATE dead_letters SET error_code = 'odd' WHERE id = :id", id=int(bill.rpartition("/")[2]))
    page = operator.get(bill)
    assert (page.status_code, "What to do:" in page.text) == (200, False)
    assert buttons(page) == [("Replay the message", False), ("Discard the message", False)]
    assert operator.get(LETTERS).status_code == 200


def test_the_trace_of_the_message_is_named_if_it_had_one(running: Installation, operator: Visitor, org_id: str) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    traced = delivery("wallet.purchase", org_id=org_id, purchase_id="traced", credits=0)
    untraced = delivery("wallet.purchase", org_id=org_id, purchase_id="untraced", credits=0)
    apply_batch(running.engine, [traced._replace(traceparent=f"00-{trace_id}-00f067aa0ba902b7-01"), untraced])
    pages = [operator.get(address).text for address in letters_of(running, org_id)]
    shown = [re.findall(r'<dd class="mono" id="trace">(\w+)</dd>', page) for page in pages]
    assert sorted(shown) == [[], [trace_id]]
