"""The pages of operators: dead letters are read, replayed and discarded by who may."""

import json
import re
from html import unescape

import httpx
import pytest

from api_stub import letters
from tests.acceptance.website import LETTERS, ONE_BY_ONE, Visitor, form_token, link, token, write
from tests.installation import Installation
from tests.support import sql


def test_the_pages_of_operators_are_for_operators(customer: Visitor, letter: str) -> None:
    for path in (LETTERS, letter, f"{LETTERS}/none", "/operators/else"):
        refused = customer.get(path)
        assert (refused.status_code, "This page is for staff" in refused.text) == (403, True)
    for action in ("replay", "discard"):
        assert customer.post(f"{letter}/{action}", data={"reason": "x"}).status_code == 403


def test_staff_that_only_reads_sees_no_form_and_changes_no_letter(
    ledger: Installation, operator: Visitor, letter: str
) -> None:
    form = form_token(operator.get(letter))
    operator.sign_in(token(sub="rita", orgs=[], scope="operator:read"))
    for path in (LETTERS, letter):
        page = operator.get(path)
        assert (page.status_code, 'method="post"' in page.text.partition("<main")[2]) == (200, False)
    own = form_token(operator.get(letter))  # of the button that signs out
    for action in ("replay", "discard"):
        for each in (form, own):
            refused = operator.post(f"{letter}/{action}", data={"form": each, "reason": "x"})
            assert refused.status_code == 403
        assert "You may see this page, but change nothing here: that is for operators." in refused.text
    number = int(letter.rpartition("/")[2])
    assert sql(ledger.engine, "SELECT status FROM dead_letters WHERE id = :id", id=number) == [("open",)]


def test_an_operator_reads_what_is_wrong(operator: Visitor, letter: str, org_id: str) -> None:
    listed = operator.get(ONE_BY_ONE)
    assert f'<a href="{letter}">' in listed.text
    page = operator.get(letter)
    assert "wallet.purchase: credits must be greater than 0, got 0" in page.text
    message = re.search(r"<pre[^>]*>(.*?)</pre>", page.text, re.DOTALL)
    assert message is not None
    assert json.loads(unescape(message[1])) == {"org_id": org_id, "purchase_id": "p1", "credits": 0}
    assert operator.get(f"{LETTERS}/999999").status_code == 404
    assert operator.get(f"{LETTERS}/{10**20}").status_code == 404
    assert operator.get(f"{LETTERS}/one").status_code == 404


def test_dead_letters_can_be_filtered_and_paged(ledger: Installation, operator: Visitor, org_id: str) -> None:
    write(ledger.engine, org_id, *((f"{org_id}.task", {"number": number}) for number in range(letters.PAGE + 5)))
    of_task = {"task": f"{org_id}.task", "view": "letters"}
    first = operator.get(LETTERS, params={**of_task, "code": "unknown_task", "status": "all"})
    assert first.text.count('scope="row"') == letters.PAGE
    second = operator.get(str(link(first, "Older →")))
    assert second.text.count('scope="row"') == 5
    assert link(second, "Older →") is None
    assert link(second, "Newest") == f"{LETTERS}?status=all&task={org_id}.task&code=unknown_task&view=letters"
    none = operator.get(LETTERS, params={**of_task, "code": "conflict"})
    assert "No dead letters match the filter." in none.text
    past = operator.get(LETTERS, params={**of_task, "before_id": "1"})
    assert "There are no older dead letters." in past.text
    assert "No dead letters" not in past.text
    assert link(past, "Back to the newest") == f"{LETTERS}?status=open&task={org_id}.task&view=letters"
    wrong = {"status": "gone", "before_id": "x", "code": "conflcit", "since": "soon", "view": "x"}
    for name, value in (wrong | dict.fromkeys(("task", "org_id", "cause"), "a\0b")).items():
        refused = operator.get(LETTERS, params={name: value})
        assert (refused.status_code, f"<li>{name} must " in refused.text) == (422, True)
    unknown = operator.get(LETTERS, params={"error_code": "conflict", "status": ["all", "open"]})
    assert unknown.status_code == 422
    assert "<li>error_code is not a filter; did you mean code?</li>" in unknown.text
    assert "<li>status is given more than once.</li>" in unknown.text


@pytest.mark.parametrize("action", ["replay", "discard"])
@pytest.mark.parametrize("form", [{}, {"form": ""}, {"form": "wrong"}])
def test_a_form_of_another_site_changes_no_letter(
    ledger: Installation, operator: Visitor, letter: str, action: str, form: dict[str, str]
) -> None:
    refused = operator.post(f"{letter}/{action}", data={"reason": "a test", **form})
    assert refused.status_code == 403
    assert "This form is not from a page of your session. Reload the page." in refused.text
    assert sql(ledger.engine, "SELECT status FROM dead_letters WHERE id = :id", id=int(letter.rpartition("/")[2])) == [
        ("open",)
    ]


def test_a_form_of_another_session_changes_no_letter(operator: Visitor, letter: str) -> None:
    form = form_token(operator.get(letter))
    operator.sign_in(token(sub="oscar", scope="operator"))
    assert operator.post(f"{letter}/discard", data={"reason": "a test", "form": form}).status_code == 403


def reason_field(page: httpx.Response) -> tuple[str, str]:
    """What stands in the field for the reason, and what the page says is wrong with it."""
    field = re.search(
        r'<input id="reason" name="reason" value="([^"]*)"[^>]* aria-describedby="reason-wrong"', page.text
    )
    said = re.search(r'<p class="wrong" id="reason-wrong">([^<]*)</p>', page.text)
    assert field is not None
    assert said is not None
    return unescape(field[1]), unescape(said[1])


def test_discarding_needs_a_reason_and_keeps_who_did_it(operator: Visitor, letter: str) -> None:
    form = form_token(operator.get(letter))
    for reason, problem in (
        ("", "Say why, in a sentence: it is recorded with your name."),
        ("   ", "Say why, in a sentence: it is recorded with your name."),
        ("x" * 501, "The reason is too long: 501 characters, and at most 500 are kept."),
        ("a\0b", "The reason must not contain control characters."),
    ):
        refused = operator.post(f"{letter}/discard", data={"form": form, "reason": reason})
        assert refused.status_code == 422
        assert reason_field(refused) == (reason.replace("\0", "\\x00"), problem)
    done = operator.post(f"{letter}/discard", data={"form": form, "reason": "sent by <b>mistake</b>"})
    assert (done.status_code, done.headers["location"]) == (303, letter)
    page = operator.get(letter)
    assert '<dd id="resolved-by">olga</dd>' in page.text
    assert '<dd id="resolution">sent by &lt;b&gt;mistake&lt;/b&gt;</dd>' in page.text
    assert "<form" not in page.text.partition("<main")[2]
    again = operator.post(f"{letter}/discard", data={"form": form, "reason": "again"})
    replayed = operator.post(f"{letter}/replay", data={"form": form})
    assert (again.status_code, replayed.status_code) == (409, 409)
    assert "was discarded by olga: sent by &lt;b&gt;mistake&lt;/b&gt;" in again.text


def test_replaying_without_a_worker_says_that_no_answer_came(
    operator: Visitor, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters, "ANSWER_TIMEOUT_S", 0.2)
    form = form_token(operator.get(letter))
    assert operator.post(f"{letter}/replay", data={"form": form}).status_code == 303
    page = operator.get(letter)
    assert '<dd id="resolved-by">olga</dd>' in page.text
    assert "no answer came within 0.2 s" in page.text


def test_what_is_no_message_is_shown_as_it_arrived_and_cannot_be_replayed(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    [(number,)] = sql(
        ledger.engine,
        """
        INSERT INTO dead_letters (task, body, body_sha256, org_id, error_code, error, traceback, attempts)
        VALUES ('', :body, :body, :org_id, 'undecodable', E'no JSON: \x7f', E'Traceback …\n\x1b[0m', 1) RETURNING id
        """,
        body=b"\xff<b>\x00\n" + b"x" * 100_000,
        org_id=org_id,
    )
    page = operator.get(f"{LETTERS}/{number}")
    assert "\\xff&lt;b&gt;\\x00\nxxx" in page.text
    rest = f"The command `holdfast failed show {number} --json` prints all that is kept."
    assert f"… and 34,473 characters more. {rest}" in page.text
    assert "no JSON: \\x7f" in page.text
    assert "Traceback …\n\\x1b[0m" in page.text
    assert re.search(r"<dt>Task</dt><dd[^>]*>unknown</dd>", page.text)
    assert f"Dead letter {number} holds no message that could be sent again." in page.text
    assert "Replay the message" not in page.text
    refused = operator.post(f"{LETTERS}/{number}/replay", data={"form": form_token(page)})
    assert refused.status_code == 409
    assert f"Dead letter {number} holds no message that could be sent again." in refused.text


def test_however_long_a_text_is_pages_show_its_beginning(ledger: Installation, operator: Visitor, letter: str) -> None:
    sql(
        ledger.engine,
        "UPDATE dead_letters SET body = :body, error = :text, traceback = :text WHERE id = :id",
        body=b'[[{"text": "' + "\u200b".encode() * 2_000_000 + b'"}], {}, {}]',
        text="<" * 2_000_000,
        id=int(letter.rpartition("/")[2]),
    )
    [listed, page] = [operator.get(ONE_BY_ONE), operator.get(letter)]
    assert (f'<a href="{letter}">' in listed.text, "&lt;&lt;&lt;…</span>" in listed.text) == (True, True)
    assert "&lt;&lt;&lt;…</p>" in page.text
    assert (len(listed.content) < 200_000, len(page.content) < 700_000) == (True, True)
