"""The pages of operators about more than one letter: by cause, a whole incident, and what needs somebody now."""

import json
import re
from collections.abc import Iterator
from html import unescape
from urllib.parse import urlencode

import httpx
import pytest

from api_stub import incidents, letters, operators
from tests.acceptance.website import (
    LETTERS,
    Visitor,
    form_token,
    link,
    operator_token,
    served,
    text_of,
    token,
    write,
)
from tests.installation import Installation
from tests.support import sql

CAUSE = "credits must be greater than 0"
REFUSED = "… would take the prepaid balance, …, below zero"


def group_of(org_id: str, task: str, code: str, cause: str, **more: str) -> str:
    query = {"status": "open", "org_id": org_id, "task": task, "code": code, "cause": cause}
    return f"{LETTERS}?{urlencode(query | more)}"


def purchases(org_id: str) -> str:
    return group_of(org_id, "wallet.purchase", "invalid_message", CAUSE)


def fail_purchases(ledger: Installation, org_id: str, count: int) -> None:
    write(
        ledger.engine,
        org_id,
        *(("wallet.purchase", {"purchase_id": f"p{number}", "credits": -number}) for number in range(count)),
    )


def groups(page: httpx.Response) -> list[str]:
    """What the rows of a list say."""
    return [text_of(row) for row in re.findall(r"<li>\s*<strong class=\"number\">.*?</li>", page.text, re.DOTALL)]


def fields(page: httpx.Response, button: str) -> tuple[str, dict[str, str]]:
    """Where the form with this button leads, and its hidden fields."""
    for action, form in re.findall(r'<form[^>]* action="([^"]*)"[^>]*>(.*?)</form>', page.text, re.DOTALL):
        if re.search(rf">{button}</button>", form):
            hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form)
            return unescape(action), {name: unescape(value) for name, value in hidden}
    raise AssertionError(page.text)


def press(operator: Visitor, page: httpx.Response, button: str, **typed: str) -> httpx.Response:
    action, hidden = fields(page, button)
    return operator.post(action, data=hidden | typed)


def progress(page: httpx.Response) -> str:
    found = re.search(r'<p [^>]*id="progress"[^>]*>(.*?)</p>', page.text, re.DOTALL)
    assert found is not None, page.text
    return text_of(found[1]).replace(" ;", ";")


def statuses(ledger: Installation, org_id: str) -> list[tuple[str, str | None, int]]:
    query = "SELECT status, resolved_by, count(*) FROM dead_letters WHERE org_id = :org_id GROUP BY 1, 2 ORDER BY 1"
    return sql(ledger.engine, query, org_id=org_id)


# By cause


def test_an_incident_of_many_letters_is_one_row_that_leads_to_them(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    fail_purchases(ledger, org_id, letters.PAGE + 10)
    write(ledger.engine, org_id, ("wallet.bill", {"billing_id": "b", "credits": -5}))
    listed = operator.get(LETTERS, params={"org_id": org_id})
    [many, one] = groups(listed)
    assert many.startswith(f"60 {org_id} · wallet.purchase: {CAUSE} invalid_message ; likely: discard since ")
    assert one.startswith(f"1 {org_id} · wallet.bill: {REFUSED} insufficient_credits ; likely: replay ")
    group = operator.get(str(link(listed, re.escape(f"{org_id} · wallet.purchase: {CAUSE}"))))
    assert group.text.count('scope="row"') == letters.PAGE
    example = re.search(r"<pre[^>]*>(.*?)</pre>", group.text, re.DOTALL)
    assert example is not None
    assert json.loads(unescape(example[1]))["org_id"] == org_id
    assert operator.get(str(link(group, "Older →"))).text.count('scope="row"') == 10


def test_the_statuses_are_links_with_their_counts(ledger: Installation, operator: Visitor, org_id: str) -> None:
    fail_purchases(ledger, org_id, 3)
    group = operator.get(purchases(org_id))
    press(operator, group, "Discard all 3", reason="a test")
    write(ledger.engine, org_id, ("wallet.bill", {"billing_id": "b", "credits": -5}))
    page = operator.get(LETTERS, params={"org_id": org_id})
    tabs = re.findall(r'<li><a href="([^"]*)"[^>]*>(\w+) <span class="count">(\d+)</span></a></li>', page.text)
    assert [(name, count) for _, name, count in tabs] == [
        ("Open", "1"),
        ("Replayed", "0"),
        ("Discarded", "3"),
        ("All", "4"),
    ]
    discarded = operator.get(unescape(tabs[2][0]))
    assert [row[:2] for row in groups(discarded)] == ["3 "]


def test_letters_that_name_no_organization_are_a_group_too(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    [(number,)] = sql(
        ledger.engine,
        "INSERT INTO dead_letters (task, body, body_sha256, error_code, error, cause, attempts)"
        " VALUES ('', :body, :body, 'undecodable_message', 'no', :cause, 1) RETURNING id",
        body=org_id.encode(),
        cause=f"cause of {org_id}",
    )
    listed = operator.get(LETTERS, params={"org_id": "–", "code": "undecodable_message"})
    group = operator.get(str(link(listed, f"no organization · no task: cause of {org_id}")))
    assert (f'<a href="{LETTERS}/{number}">' in group.text, group.text.count('scope="row"')) == (True, 1)
    assert "holds no message that could be sent again" in group.text
    press(operator, group, "Discard it", reason="a test")
    assert sql(ledger.engine, "SELECT status FROM dead_letters WHERE id = :id", id=number) == [("discarded",)]


def test_the_forms_on_an_older_page_are_about_the_whole_group(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    fail_purchases(ledger, org_id, letters.PAGE + 10)
    older = operator.get(str(link(operator.get(purchases(org_id)), "Older →")))
    done = press(operator, older, "Discard all 60", reason="a test")
    assert progress(done).startswith("60 of 60 discarded")
    assert statuses(ledger, org_id) == [("discarded", "olga", 60)]


@pytest.mark.parametrize("more", [{}, {"before_id": "1"}])
def test_a_group_of_which_nothing_is_left_is_an_empty_page(
    ledger: Installation, operator: Visitor, org_id: str, more: dict[str, str]
) -> None:
    bill = ("wallet.bill", {"billing_id": "b", "credits": -5})
    write(ledger.engine, org_id, bill)
    address = group_of(org_id, "wallet.bill", "insufficient_credits", REFUSED)
    if not more:
        press(operator, operator.get(address), "Discard it", reason="a test")
    page = operator.get(f"{address}&{urlencode(more)}")
    assert (page.status_code, page.text.count('scope="row"')) == (200, 0)


@pytest.mark.parametrize("task", ["wallet.grant ", " ", "wallet.\nnothing", "\N{RIGHT-TO-LEFT OVERRIDE}tnarg"])
def test_a_task_is_a_group_of_its_own_whatever_its_name(
    ledger: Installation, operator: Visitor, org_id: str, task: str
) -> None:
    for number, name in enumerate((task, task.strip() or "wallet.grant")):
        sql(
            ledger.engine,
            "INSERT INTO dead_letters (org_id, task, body, body_sha256, error_code, error, cause, attempts)"
            " VALUES (:org_id, :task, :body, :body, 'unknown_task', 'no', 'none has this name', 1) RETURNING id",
            org_id=org_id,
            task=name + "x" * number * (name == task),
            body=f"{org_id}{number}".encode(),
        )
    [(number,)] = sql(
        ledger.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id AND task = :task", org_id=org_id, task=task
    )
    group = operator.get(group_of(org_id, task, "unknown_task", "none has this name"))
    assert (f'<a href="{LETTERS}/{number}">' in group.text, group.text.count('scope="row"')) == (True, 1)
    press(operator, group, "Discard it", reason="a test")
    assert statuses(ledger, org_id) == [("discarded", "olga", 1), ("open", None, 1)]


def test_what_an_older_version_kept_is_grouped_by_its_code(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    fail_purchases(ledger, org_id, 2)
    sql(ledger.engine, "UPDATE dead_letters SET cause = '' WHERE org_id = :org_id", org_id=org_id)
    listed = operator.get(LETTERS, params={"org_id": org_id})
    group = operator.get(str(link(listed, f"{org_id} · wallet.purchase: Invalid message")))
    assert (group.text.count('scope="row"'), "<h1>Invalid message</h1>" in group.text) == (2, True)


# Discarding a group


def test_a_group_is_discarded_with_a_reason_and_what_came_later_is_not(
    ledger: Installation, operator: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "DISCARDED_AT_ONCE", 4)
    fail_purchases(ledger, org_id, 6)
    group = operator.get(purchases(org_id))
    refused = press(operator, group, "Discard all 6", reason=" ")
    assert (refused.status_code, statuses(ledger, org_id)) == (422, [("open", None, 6)])
    assert "Say why, in a sentence: it is recorded with your name." in refused.text
    fail_purchases(ledger, org_id, 7)
    done = press(operator, group, "Discard all 6", reason="the sender <b>was</b> fixed")
    assert progress(done) == "4 of 6 discarded; 2 are left."
    done = press(operator, done, "Go on")
    assert progress(done) == "6 of 6 discarded."
    assert statuses(ledger, org_id) == [("discarded", "olga", 6), ("open", None, 1)]
    reasons = "SELECT DISTINCT resolution FROM dead_letters WHERE org_id = :org_id AND status = 'discarded'"
    assert sql(ledger.engine, reasons, org_id=org_id) == [("the sender <b>was</b> fixed",)]


# Replaying a group


def refuse_bills(running: Installation, org_id: str, count: int) -> str:
    write(
        running.engine,
        org_id,
        *(("wallet.bill", {"billing_id": f"b{number}", "credits": -10}) for number in range(count)),
    )
    return group_of(org_id, "wallet.bill", "insufficient_credits", REFUSED)


@pytest.fixture(scope="module")
def answering(running: Installation) -> Iterator[str]:
    """The address of pages whose ledger has a worker."""
    with served(running.database_url, running.broker_url) as address:
        yield address


@pytest.fixture
def olga(answering: str) -> Iterator[Visitor]:
    with Visitor(base_url=answering) as visitor:
        assert visitor.sign_in(operator_token()).status_code == 303
        yield visitor


def test_a_group_is_replayed_in_steps_and_each_says_what_is_left(
    running: Installation, olga: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(letters, "ANSWER_TIMEOUT_S", 60)
    monkeypatch.setattr(incidents, "ANSWER_TIMEOUT_S", 60)
    monkeypatch.setattr(incidents, "STEP_S", 600.0)
    monkeypatch.setattr(incidents, "REPLAYED_AT_ONCE", 5)
    group = olga.get(refuse_bills(running, org_id, 7))
    write(running.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 30}))
    done = press(olga, group, "Replay all 7")
    assert progress(done) == "5 of 7 replayed: 3 applied, 2 failed again; 2 are left."
    assert statuses(running, org_id) == [("open", None, 4), ("replayed", "olga", 3)]
    done = press(olga, done, "Go on")
    assert progress(done) == "7 of 7 replayed: 3 applied, 4 failed again."
    still = olga.get(str(link(done, "Show those that are still open")))
    assert still.text.count('scope="row"') == 4
    write(running.engine, org_id, ("wallet.purchase", {"purchase_id": "q", "credits": 40}))
    done = press(olga, still, "Replay all 4")
    assert progress(done) == "4 of 4 replayed: 4 applied."
    balance = "SELECT prepaid_balance FROM wallets WHERE org_id = :org_id"
    assert sql(running.engine, balance, org_id=org_id) == [(0,)]


def test_a_step_that_takes_long_ends_after_the_letter_at_hand(
    running: Installation, olga: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "STEP_S", -1.0)
    group = olga.get(refuse_bills(running, org_id, 3))
    write(running.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 30}))
    page = press(olga, group, "Replay all 3")
    assert progress(page).endswith("; 2 are left.")
    assert [progress(page := press(olga, page, "Go on"))[:6] for _ in range(2)] == ["2 of 3", "3 of 3"]


def test_without_a_worker_letters_are_sent_and_the_page_says_so(
    ledger: Installation, operator: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incidents, "ANSWER_TIMEOUT_S", 0.1)
    group = operator.get(refuse_bills(ledger, org_id, 3))
    assert progress(press(operator, group, "Replay all 3")) == ("3 of 3 replayed: 3 sent, without an answer in time.")
    assert statuses(ledger, org_id) == [("replayed", "olga", 3)]


def test_a_letter_that_somebody_else_has_dealt_with_is_passed_over(
    ledger: Installation, operator: Visitor, org_id: str
) -> None:
    fail_purchases(ledger, org_id, 2)
    group = operator.get(purchases(org_id))
    press(operator, group, "Discard all 2", reason="a test")
    again = press(operator, group, "Replay all 2")
    assert (progress(again), statuses(ledger, org_id)) == ("0 of 2 replayed.", [("discarded", "olga", 2)])


def test_if_the_broker_is_gone_nothing_is_marked_and_one_can_go_on(ledger: Installation, org_id: str) -> None:
    with (
        served(ledger.database_url, "redis://127.0.0.1:1/0") as address,
        Visitor(base_url=address) as operator,
    ):
        operator.sign_in(operator_token())
        group = operator.get(refuse_bills(ledger, org_id, 2))
        page = press(operator, group, "Replay all 2")
        assert (page.status_code, progress(page)) == (503, "0 of 2 replayed; 2 are left.")
        assert "The message could not be handed to the broker. Replaying it again is safe." in page.text
        assert fields(page, "Go on")[1]["after"] == "0"
    assert statuses(ledger, org_id) == [("open", None, 2)]


# Who may


@pytest.mark.parametrize("action", ["replay", "discard"])
@pytest.mark.parametrize("form", [{}, {"form": ""}, {"form": "wrong"}])
def test_a_form_of_another_site_changes_no_group(
    ledger: Installation, operator: Visitor, org_id: str, action: str, form: dict[str, str]
) -> None:
    fail_purchases(ledger, org_id, 2)
    group = operator.get(purchases(org_id))
    address, hidden = fields(group, f"{action.capitalize()} all 2")
    refused = operator.post(address, data={**hidden, "reason": "a test", "form": "", **form})
    assert (refused.status_code, statuses(ledger, org_id)) == (403, [("open", None, 2)])


def test_staff_that_only_reads_sees_a_group_without_forms(ledger: Installation, operator: Visitor, org_id: str) -> None:
    fail_purchases(ledger, org_id, 2)
    group = operator.get(purchases(org_id))
    addresses = [fields(group, f"{action} all 2")[0] for action in ("Discard", "Replay")]
    operator.sign_in(token(sub="rita", orgs=[], scope="operator:read"))
    seen = operator.get(purchases(org_id))
    assert (seen.status_code, 'method="post"' in seen.text.partition("<main")[2]) == (200, False)
    for address in addresses:
        refused = operator.post(address, data={"form": form_token(seen), "up_to": "999999", "reason": "x"})
        assert (refused.status_code, "change nothing here" in refused.text) == (403, True)
    assert statuses(ledger, org_id) == [("open", None, 2)]


def test_only_a_whole_group_of_open_letters_can_be_acted_on(operator: Visitor, org_id: str) -> None:
    form = form_token(operator.get(LETTERS))
    for query in (
        "",
        "?cause=x",
        f"?cause=x&org_id={org_id}",
        f"?cause=x&org_id={org_id}&code=none",
        f"?cause=x&org_id={org_id}&code=conflict&status=all",
    ):
        for action in ("replay", "discard"):
            refused = operator.post(f"{LETTERS}/{action}{query}", data={"form": form, "up_to": "9", "reason": "x"})
            assert (query, refused.status_code) == (query, 404)
    assert operator.get(f"{LETTERS}/replay").status_code == 404


# What needs somebody now


def parts(page: httpx.Response) -> dict[str, str]:
    found = re.findall(r'<section [^>]*data-part="(\w+)">(.*?)</section>', page.text, re.DOTALL)
    return {name: text_of(content) for name, content in found}


def test_when_all_is_well_each_part_says_so(ledger: Installation, running: Installation) -> None:
    sql(running.engine, "DELETE FROM dead_letters")
    sql(running.engine, "DELETE FROM waiting_messages")
    with served(running.database_url, running.broker_url) as address, Visitor(base_url=address) as operator:
        operator.sign_in(operator_token())
        assert parts(operator.get("/operators")) == {
            "letters": "Dead letters None is open.",
            "waiting": "Organizations that wait None waits.",
            "broker": "Queues and workers 0 credits empty 0 credits.engine empty A worker answers.",
            "overdue": "Overdue wallets None: the beat and the workers are up to date.",
            "holds": "Old reservations None is older than 6 h.",
            "owing": "Wallets below zero None.",
        }


def test_the_first_page_says_what_needs_somebody(
    ledger: Installation, operator: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql(
        ledger.engine,
        "UPDATE dead_letters SET status = 'discarded', resolved_at = now(), resolved_by = 'ann', resolution = 'a test'"
        " WHERE status = 'open'",
    )
    fail_purchases(ledger, org_id, 4)
    write(ledger.engine, org_id, ("workflow.start", {"workflow_id": "r0", "credits": 1}))
    run = {"workflow_id": "run-1", "credits": 30, "activity_name": "Train"}
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 40}),
        ("workflow.start", run),
        ("workflow.finish", {"workflow_id": "never-started", "credits": 1_000}),
    )
    sql(
        ledger.engine,
        "INSERT INTO waiting_messages (org_id, task, body, reason, waiting_since)"
        " VALUES (:org_id, 'wallet.bill', '', 'its wallet is locked', now() - interval '125 s')",
        org_id=org_id,
    )
    sql(
        ledger.engine,
        "UPDATE wallets SET next_hold_expiry = now() - interval '1 h' WHERE org_id = :org_id",
        org_id=org_id,
    )
    monkeypatch.setattr(operators, "OLD_HOLD", operators.OLD_HOLD * 0)
    monkeypatch.setattr(operators, "SHOWN", 1)
    page = operator.get("/operators")
    seen = parts(page)
    assert seen["letters"].startswith(
        f"Dead letters 4 open · 1 organization 4 {org_id} · wallet.purchase: {CAUSE} since "
    )
    assert link(page, re.escape(f"{org_id} · wallet.purchase: {CAUSE}")) == purchases(org_id)
    assert f"2 min {org_id} : its wallet is locked 1 message" in seen["waiting"]
    assert f"1 Reservations have expired such as {org_id}" in seen["overdue"]
    assert f"{org_id} Train 30 credits" in seen["holds"]
    assert f"−960 {org_id}" in seen["owing"]
    assert page.text.count(f'href="/operators/organizations/{org_id}"') == 4
    assert seen["broker"].endswith(
        "No worker answers: none runs, or it is busy or paused. Messages wait until one does."
    )


def test_a_part_that_cannot_be_read_is_a_sentence_in_its_place(ledger: Installation) -> None:
    with served(ledger.database_url, "redis://127.0.0.1:1/0") as address, Visitor(base_url=address) as operator:
        operator.sign_in(operator_token())
        page = operator.get("/operators")
        assert (page.status_code, parts(page)["broker"]) == (200, "Queues and workers The broker does not answer.")
        assert "does not answer" not in parts(page)["owing"]
    nowhere = "postgresql+psycopg://holdfast@/none?host=/nowhere"
    with served(nowhere, ledger.broker_url) as address, Visitor(base_url=address) as operator:
        operator.sign_in(operator_token())
        page = operator.get("/operators")
        assert page.status_code == 200
        broken = [name for name, said in parts(page).items() if said.endswith("The database does not answer.")]
        assert broken == ["letters", "waiting", "overdue", "holds", "owing"]
        assert "0 credits" in parts(page)["broker"]


def test_a_part_that_takes_too_long_keeps_no_other_from_being_seen(
    ledger: Installation, operator: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "PART_TIMEOUT_S", 0.2)
    with ledger.engine.connect() as connection:
        connection.exec_driver_sql("LOCK TABLE dead_letters")
        page = operator.get("/operators")
    seen = parts(page)
    assert seen["letters"] == "Dead letters The database takes too long over this. Reload the page to try again."
    assert [name for name, said in seen.items() if "takes too long" in said] == ["letters"]
