"""The console of operators: find an organization, see what would come of a change, make it, and read who did what."""

import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import httpx
import pytest

from api_stub import console
from api_stub.forms import FORMS
from tests.acceptance.website import (
    Visitor,
    form_token,
    history_of,
    link,
    operator_token,
    served,
    text_of,
    token,
    write,
)
from tests.installation import Installation
from tests.support import PATIENCE_S, sql

ORGANIZATIONS = "/operators/organizations"
TYPED = {
    "grant": {"credits": "100", "why": "goodwill"},
    "adjust": {"credits": "-30", "why": "counted twice"},
    "refund": {"workflow_id": "run-1", "credits": "60", "why": "it failed"},
    "reverse": {"purchase_id": "order-1", "credits": "200", "payment": "disputed", "why": "chargeback 7"},
    "release": {"workflow_id": "run-2", "why": "the engine lost it"},
    "limits": {"credit_limit": "50", "period_cap": "900", "why": "as agreed"},
}


@pytest.fixture(scope="module")
def address(running: Installation) -> Iterator[str]:
    """The pages of an installation with a worker, which answers in the time that a page waits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(console, "ANSWER_TIMEOUT_S", PATIENCE_S)
        with served(running.database_url, running.broker_url) as address:
            yield address


@pytest.fixture
def wallet(running: Installation, org_id: str) -> str:
    """The page of a wallet with a purchase of 500, a run that used 60, and one that holds 40: 400 are available."""
    write(
        running.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "order-1", "credits": 500}),
        ("workflow.finish", {"workflow_id": "run-1", "credits": 60, "activity_name": "Train model"}),
        ("workflow.start", {"workflow_id": "run-2", "credits": 40}),
    )
    return f"{ORGANIZATIONS}/{org_id}"


@pytest.fixture
def reader(visitor: Visitor) -> Visitor:
    """Somebody of the staff who may look, and change nothing."""
    assert visitor.sign_in(token(sub="rita", orgs=[], scope="operator:read")).status_code == 303
    return visitor


def hidden(page: httpx.Response) -> dict[str, str]:
    """The hidden fields of the page's own form."""
    main = page.text.partition("<main")[2]
    found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', main)
    return {name: unescape(value) for name, value in found}


def preview(operator: Visitor, address: str, typed: dict[str, str]) -> httpx.Response:
    return operator.post(address, data={"form": form_token(operator.get(address)), **typed})


def changes(page: httpx.Response) -> dict[str, str]:
    found = re.findall(r'<div data-change="([^"]+)"><dt>[^<]*</dt><dd>(.*?)</dd>', page.text, re.DOTALL)
    return {name: text_of(change).replace(" becomes", "") for name, change in found}


def sentence(page: httpx.Response) -> str:
    [found] = re.findall(r'<p class="sentence" id="done">(.*?)</p>', page.text, re.DOTALL)
    return text_of(found)


def events_of(running: Installation, org_id: str) -> list[tuple[Any, ...]]:
    return sql(
        running.engine,
        "SELECT event_type, credits, source, metadata FROM credit_events"
        " WHERE org_id = :org_id AND seq > 3 ORDER BY seq",
        org_id=org_id,
    )


# Two steps: what would come of it, and what did


@pytest.mark.parametrize(
    ("form", "foreseen", "done", "event"),
    [
        ("grant", {"Available": "400 → 500", "Prepaid": "440 → 540"}, "✓ Granted 100; 500 available then.", "grant"),
        ("adjust", {"Available": "400 → 370", "Prepaid": "440 → 410"}, "✓ Adjusted by −30; 370", "adjustment"),
        ("refund", {"Available": "400 → 460", "Prepaid": "440 → 500"}, "✓ Refunded 60 to the run run-1; 460", "refund"),
        (
            "reverse",
            {"Available": "400 → 200", "Prepaid": "440 → 240"},
            "✓ Took back 200 of the purchase order-1; 200",
            "billing",
        ),
        (
            "release",
            {"Available": "400 → 440", "Reserved": "40 → 0"},
            "✓ Released 40 of the run run-2; 440",
            "reservation_released",
        ),
        (
            "limits",
            {"Available": "400 → 400", "Credit limit": "0 → 50", "Cap of a period": "none → 900"},
            "✓ Changed the limits: credit limit 50, cap of a period 900; 400",
            "billing",
        ),
    ],
)
def test_a_change_is_foreseen_then_made_and_the_history_says_who_and_why(
    running: Installation,
    operator: Visitor,
    wallet: str,
    org_id: str,
    form: str,
    foreseen: dict[str, str],
    done: str,
    event: str,
) -> None:
    page = preview(operator, f"{wallet}/{form}", TYPED[form])
    assert (page.status_code, changes(page)) == (200, foreseen)
    assert events_of(running, org_id) == []
    sent = operator.post(f"{wallet}/{form}/send", data=hidden(page))
    assert sent.status_code == 303
    outcome = operator.get(sent.headers["location"])
    assert sentence(outcome).startswith(done)
    [(event_type, _, source, metadata)] = events_of(running, org_id)
    why = metadata.get("given_reason", metadata["reason"])
    assert (event_type, source, metadata["by"], why) == (event, "operator", "olga", TYPED[form]["why"])
    [listed] = re.findall(r'data-action="[^"]+">(.*?)</tr>', operator.get(wallet).text, re.DOTALL)
    assert ("olga" in listed, TYPED[form]["why"] in listed) == (True, True)

    again = operator.post(f"{wallet}/{form}/send", data=hidden(page))
    assert (again.status_code, again.headers["location"]) == (303, sent.headers["location"])
    assert len(events_of(running, org_id)) == 1


def test_granted_credits_end_with_the_day_that_is_given(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    day = datetime.now(UTC).date() + timedelta(days=30)
    page = preview(operator, f"{wallet}/grant", {**TYPED["grant"], "last_day": day.isoformat()})
    operator.post(f"{wallet}/grant/send", data=hidden(page))
    [(_, _, _, metadata)] = events_of(running, org_id)
    assert metadata["expires_at"] == f"{day + timedelta(days=1)}T00:00:00+00:00"


def test_limits_are_shown_as_they_are_and_a_cap_is_taken_away(
    running: Installation, operator: Visitor, wallet: str
) -> None:
    for typed in (TYPED["limits"], {"credit_limit": "50", "period_cap": "", "why": "more"}):
        page = preview(operator, f"{wallet}/limits", typed)
        outcome = operator.get(operator.post(f"{wallet}/limits/send", data=hidden(page)).headers["location"])
        form = operator.get(f"{wallet}/limits").text
        assert f'value="{typed["period_cap"]}" inputmode="numeric"' in form
    assert sentence(outcome).startswith("✓ Changed the limits: credit limit 50, cap of a period none;")


def test_limits_that_somebody_else_has_changed_meanwhile_stay(operator: Visitor, wallet: str) -> None:
    first, second = (preview(operator, f"{wallet}/limits", TYPED["limits"] | {"credit_limit": n}) for n in ("1", "2"))
    assert operator.post(f"{wallet}/limits/send", data=hidden(first)).status_code == 303
    late = operator.post(f"{wallet}/limits/send", data=hidden(second))
    assert late.status_code == 422
    assert "Somebody has changed the limits meanwhile." in unescape(late.text)
    assert 'value="1"' in operator.get(f"{wallet}/limits").text


def test_what_nobody_of_the_staff_did_is_not_said_to_be_done_by_them(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    forged = {"grant_id": "gift", "credits": 5, "metadata": {"by": "olga"}}
    write(running.engine, org_id, ("wallet.grant", forged))
    assert "<dd>no operator; its source is admin</dd>" in operator.get(f"{wallet}/grant/gift").text
    ledger = operator.get(f"/organizations/{org_id}/credit-history?view=ledger").text
    assert '<span class="name">By, as its sender says:</span> olga' in ledger


def test_a_change_that_became_a_dead_letter_is_not_said_to_be_under_way(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    sent = {"adjustment_id": "operator-1", "credits": -10_000, "reason": "x", "source": "operator"}
    write(running.engine, org_id, ("wallet.adjust", sent))
    outcome = operator.get(f"{wallet}/adjust/operator-1")
    assert sentence(outcome).startswith("It was not applied, and is kept as a dead letter: wallet.adjust: -10000 would")
    assert sentence(operator.get(f"{wallet}/adjust/operator-2")).startswith("Not answered yet.")


# What is wrong


@pytest.mark.parametrize(
    ("form", "typed", "field", "problem"),
    [
        ("grant", {"credits": ""}, "credits", "Enter a whole number from 1 to 1,000,000,000,000."),
        ("grant", {"credits": "0"}, "credits", "Enter a whole number from 1 to 1,000,000,000,000."),
        ("grant", {"credits": "1.5"}, "credits", "Enter a whole number from 1 to 1,000,000,000,000."),
        ("grant", {"credits": "<b>"}, "credits", "Enter a whole number from 1 to 1,000,000,000,000."),
        ("grant", {"credits": "1000000000001"}, "credits", "Enter a whole number from 1 to 1,000,000,000,000."),
        ("grant", {"why": "  "}, "why", "Say why, in a few words."),
        ("grant", {"why": "x" * 501}, "why", "Say why in at most 500 characters, and in letters that can be seen."),
        ("grant", {"why": "a\x00b"}, "why", "Say why in at most 500 characters, and in letters that can be seen."),
        ("grant", {"why": "Grant_Expired"}, "why", "Use other words: this is a reason that only the ledger gives."),
        ("grant", {"last_day": "soon"}, "last_day", "Enter a date, such as 2027-01-31."),
        ("grant", {"last_day": "2020-01-31"}, "last_day", "Enter a day that is not over yet."),
        ("grant", {"last_day": "9999-12-31"}, "last_day", "Enter a day before the year 3000."),
        ("adjust", {"credits": "0"}, "credits", "Enter a number that is not 0: 50 adds credits, -50 takes them."),
        (
            "adjust",
            {"credits": "-500"},
            "credits",
            "-500 would take what is available, 400, below zero.",
        ),
        ("adjust", {"allow_negative": "maybe"}, "allow_negative", "Choose one of them."),
        (
            "refund",
            {"credits": "61"},
            "credits",
            "Workflow run-1 used 60 credits and 0 of them were refunded already, so 61 cannot be.",
        ),
        (
            "refund",
            {"workflow_id": "nobody"},
            "credits",
            "Workflow nobody used 0 credits and 0 of them were refunded already, so 60 cannot be.",
        ),
        (
            "refund",
            {"workflow_id": "run 1"},
            "workflow_id",
            "Enter the id of a run: letters, digits and _ . : - without spaces.",
        ),
        ("reverse", {"purchase_id": "order-2"}, "purchase_id", "There is no such purchase in this wallet."),
        ("reverse", {"payment": "lost"}, "payment", "Choose one of them."),
        (
            "reverse",
            {"credits": "501"},
            "credits",
            "Purchase order-1 brought 500 credits and 0 of them were reversed already, so 501 cannot be reversed.",
        ),
        ("release", {"workflow_id": "run-1"}, "workflow_id", "This run is settled: it holds no credits any more."),
        ("release", {"workflow_id": "run-9"}, "workflow_id", "There is no such run in this wallet."),
        ("limits", {"credit_limit": "-1"}, "credit_limit", "Enter a whole number from 0 to 9,007,199,254,740,991."),
        ("limits", {"period_cap": "much"}, "period_cap", "Enter a whole number from 0 to 9,007,199,254,740,991."),
    ],
)
def test_what_is_wrong_is_said_at_its_field_and_what_was_typed_is_kept(
    running: Installation,
    operator: Visitor,
    wallet: str,
    org_id: str,
    form: str,
    typed: dict[str, str],
    field: str,
    problem: str,
) -> None:
    for address in (f"{wallet}/{form}", f"{wallet}/{form}/send"):
        data = {"form": form_token(operator.get(wallet)), "message_id": "7", **TYPED[form], **typed}
        page = operator.post(address, data=data)
        assert page.status_code == 422
        [said] = re.findall(rf'<p class="wrong" id="{field}-wrong">(.*?)</p>', page.text)
        assert unescape(said) == problem
        assert re.search(rf'id="{field}" name="{field}" aria-invalid="true" aria-describedby="{field}-wrong', page.text)
        assert "<b>" not in page.text
    assert events_of(running, org_id) == []
    assert sql(running.engine, "SELECT count(*) FROM dead_letters WHERE org_id = :org_id", org_id=org_id) == [(0,)]


def test_a_released_reservation_cannot_be_released_again(operator: Visitor, wallet: str) -> None:
    page = preview(operator, f"{wallet}/release", TYPED["release"])
    operator.post(f"{wallet}/release/send", data=hidden(page))
    again = preview(operator, f"{wallet}/release", TYPED["release"])
    assert (again.status_code, "This run is cancelled: it holds no credits any more." in again.text) == (422, True)


@pytest.mark.parametrize("message_id", ["", "a b", "x" * 129])
def test_a_change_without_its_id_is_not_sent(operator: Visitor, wallet: str, message_id: str) -> None:
    data = {**TYPED["grant"], "form": form_token(operator.get(wallet)), "message_id": message_id}
    refused = operator.post(f"{wallet}/grant/send", data=data)
    assert (refused.status_code, "This form is not complete: begin again." in refused.text) == (422, True)


def test_nobody_can_say_that_somebody_else_did_it(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    page = preview(operator, f"{wallet}/grant", TYPED["grant"])
    forged = {"by": "eve", "source": "billing", "metadata": '{"by": "eve"}', "org_id": "other"}
    operator.post(f"{wallet}/grant/send", data=hidden(page) | forged)
    [(_, _, source, metadata)] = events_of(running, org_id)
    assert (source, metadata["by"]) == ("operator", "olga")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [{}, {"form": ""}, {"form": "wrong"}])
def test_a_form_of_another_site_changes_nothing(
    running: Installation, operator: Visitor, wallet: str, org_id: str, form: str, given: dict[str, str]
) -> None:
    for address in (f"{wallet}/{form}", f"{wallet}/{form}/send"):
        refused = operator.post(address, data={**TYPED[form], "message_id": "7", **given})
        assert refused.status_code == 403
    assert events_of(running, org_id) == []


def test_who_may_only_look_sees_everything_and_changes_nothing(
    running: Installation, reader: Visitor, wallet: str, org_id: str
) -> None:
    page = reader.get(wallet)
    assert (page.status_code, '<div data-figure="available">' in page.text) == (200, True)
    assert "<form" not in page.text.partition("<main")[2]
    assert f'href="{wallet}/' not in page.text
    assert reader.get(history_of(org_id)).status_code == 200
    form = form_token(page)
    for name in FORMS:
        assert reader.get(f"{wallet}/{name}").status_code == 403
        for address in (f"{wallet}/{name}", f"{wallet}/{name}/send"):
            data = {**TYPED[name], "message_id": "7", "form": form}
            assert reader.post(address, data=data).status_code == 403
    assert events_of(running, org_id) == []


def test_the_console_is_for_staff(customer: Visitor, wallet: str) -> None:
    for path in (ORGANIZATIONS, wallet, f"{wallet}/grant", "/operators/search?q=a", "/operators/audit"):
        assert customer.get(path).status_code == 403


def test_there_is_no_other_page(operator: Visitor, wallet: str) -> None:
    for path in (f"{wallet}/bill", f"{wallet}/grant/a%20b", f"{ORGANIZATIONS}/a%20b", f"{wallet}/grant/x/y"):
        assert operator.get(path).status_code == 404


def test_what_is_not_answered_yet_can_be_looked_at_again(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    page = operator.get(f"{wallet}/grant/operator-1")
    assert sentence(page) == "Not answered yet. If it was sent, it will be applied, once."
    assert link(page, "Look again") == f"{wallet}/grant/operator-1"
    write(running.engine, org_id, ("wallet.grant", {"grant_id": "operator-1", "credits": 7}))
    assert sentence(operator.get(f"{wallet}/grant/operator-1")) == "✓ Granted 7; 407 available then."


def test_without_a_worker_a_change_is_sent_and_said_to_be_under_way(
    ledger: Installation, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "ANSWER_TIMEOUT_S", 0.2)
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 5}))
    address = f"{ORGANIZATIONS}/{org_id}/grant"
    with served(ledger.database_url, ledger.broker_url) as site, Visitor(base_url=site) as operator:
        operator.sign_in(operator_token())
        sent = operator.post(f"{address}/send", data=hidden(preview(operator, address, TYPED["grant"])))
        assert sent.status_code == 303
        assert sentence(operator.get(sent.headers["location"])).startswith("Not answered yet.")


def test_without_a_broker_nothing_is_sent_and_the_same_change_can_be_sent_again(
    ledger: Installation, org_id: str
) -> None:
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 5}))
    address = f"{ORGANIZATIONS}/{org_id}/grant"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nobody = f"redis://127.0.0.1:{bound.getsockname()[1]}/0"
        with served(ledger.database_url, nobody) as site, Visitor(base_url=site) as operator:
            operator.sign_in(operator_token())
            page = preview(operator, address, TYPED["grant"])
            failed = operator.post(f"{address}/send", data=hidden(page))
    assert failed.status_code == 503
    assert "It could not be handed to the broker; nothing has changed. Send it again: it applies once." in failed.text
    assert hidden(failed) == hidden(page)


# Finding


def test_an_organization_is_found_by_its_name_or_how_it_begins(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    exact = operator.get("/operators/search", params={"q": f" {org_id} "})
    assert (exact.status_code, exact.headers["location"]) == (303, wallet)
    write(running.engine, f"Prefix-{org_id}", ("wallet.purchase", {"purchase_id": "p", "credits": 5}))
    for begins in ("Pref", "pref", "PREFIX-"):
        found = operator.get("/operators/search", params={"q": begins})
        assert found.status_code == 200
        assert link(found, f"Prefix-{org_id}") == f"{ORGANIZATIONS}/Prefix-{org_id}"
    assert operator.get("/operators/search").headers["location"] == ORGANIZATIONS


def test_a_name_that_nobody_has_is_said_and_similar_ones_are_named(running: Installation, operator: Visitor) -> None:
    write(running.engine, "northwind", ("wallet.purchase", {"purchase_id": "p", "credits": 5}))
    for path in (f"{ORGANIZATIONS}/nortwind", "/operators/search?q=nortwind", history_of("nortwind")):
        page = operator.get(path)
        assert page.status_code == 404
        assert "No wallet called nortwind yet. Similar: northwind ." in text_of(page.text)
        assert "data-figure" not in page.text
    assert operator.post(f"{ORGANIZATIONS}/nortwind/grant", data={"form": form_token(page)}).status_code == 404
    assert operator.get(f"{ORGANIZATIONS}/nortwind/grant").status_code == 404
    strange = operator.get("/operators/search", params={"q": "<b>\x00 " + "x" * 500})
    assert (strange.status_code, "<b>" not in strange.text) == (404, True)


def test_a_run_and_an_order_are_found_whoever_they_belong_to(
    running: Installation, operator: Visitor, org_id: str
) -> None:
    run, order = f"run-of-{org_id}", f"order-of-{org_id}"
    for name in (org_id, f"{org_id}-b"):
        write(
            running.engine,
            name,
            ("wallet.purchase", {"purchase_id": order, "credits": 500}),
            ("workflow.finish", {"workflow_id": run, "credits": 60}),
        )
    found = operator.get("/operators/search", params={"q": run}).text
    for name in (org_id, f"{org_id}-b"):
        assert f'href="{ORGANIZATIONS}/{name}/refund?workflow_id={run}&amp;credits=60"' in found
        assert f'href="{history_of(name)}?workflow_id={run}"' in found
    assert "settled, used 60" in text_of(found)
    orders = operator.get("/operators/search", params={"q": order}).text
    assert f'href="{ORGANIZATIONS}/{org_id}-b/reverse?purchase_id={order}"' in orders


def test_a_customers_new_organization_says_so_and_the_api_has_zeros(customer: Visitor, org_id: str) -> None:
    page = customer.get(history_of(org_id))
    assert (page.status_code, "No credits yet." in page.text) == (200, True)
    headers = {"Authorization": f"Bearer {token(orgs=[org_id])}"}
    assert customer.get(f"/api/organizations/{org_id}/credits", headers=headers).json()["balance"] == 0


def test_the_start_page_of_staff_lists_who_is_active_low_and_overdrawn(
    running: Installation, visitor: Visitor, org_id: str
) -> None:
    debt, idle = f"{org_id}-debt", f"{org_id}-low"
    write(running.engine, debt, ("workflow.finish", {"workflow_id": "w", "credits": 10_000_000}))
    write(
        running.engine,
        idle,
        ("wallet.purchase", {"purchase_id": "p", "credits": 100}),
        ("workflow.finish", {"workflow_id": "w", "credits": 60}),
    )
    visitor.sign_in(token(sub="olga", orgs="*", scope="credits:read operator:read"))
    overview = visitor.get("/", follow_redirects=True)
    assert 'action="/operators/search"' in overview.text
    assert link(overview, "Organizations") == ORGANIZATIONS
    page = visitor.get(ORGANIZATIONS).text
    parts = dict(re.findall(r'<h2 id="(\w+)">(.*?)</section>', page, re.DOTALL))
    assert {name: (debt in part, idle in part) for name, part in parts.items()} == {
        "recent": (True, True),
        "low": (False, True),
        "overdrawn": (True, False),
    }
    assert "−10,000,000" in parts["overdrawn"]


def test_a_customer_with_several_organizations_sees_what_each_has(
    running: Installation, visitor: Visitor, wallet: str, org_id: str
) -> None:
    visitor.sign_in(token(orgs=[org_id, f"{org_id}-new"]))
    listed = text_of(visitor.get("/").text.partition("<main")[2])
    assert f"{org_id} 400 credits available {org_id}-new no credits yet" in listed


# Who did what


def actions_of(page: httpx.Response) -> list[str]:
    assert page.status_code == 200
    return [text_of(row) for row in re.findall(r'data-action="[^"]+">(.*?)</tr>', page.text, re.DOTALL)]


def test_the_audit_lists_what_was_done_and_filters_it(
    running: Installation, operator: Visitor, wallet: str, org_id: str
) -> None:
    for form in ("grant", "release"):
        operator.post(f"{wallet}/{form}/send", data=hidden(preview(operator, f"{wallet}/{form}", TYPED[form])))
    write(running.engine, org_id, ("wallet.purchase", {"purchase_id": "bad", "credits": 0}))
    [(number,)] = sql(running.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id", org_id=org_id)
    letter = f"/operators/dead-letters/{number}"
    operator.post(f"{letter}/discard", data={"form": form_token(operator.get(letter)), "reason": "sent by mistake"})

    def listed(**query: str) -> list[str]:
        return actions_of(operator.get("/operators/audit", params={"organization": org_id, **query}))

    newest, middle, oldest = listed()
    assert ("olga" in newest, f"Discarded dead letter {number}" in newest, "sent by mistake" in newest) == (True,) * 3
    assert ("Released a reservation run-2" in middle, "+40 the engine lost it" in middle) == (True, True)
    assert ("Granted operator-" in oldest, "+100 goodwill" in oldest) == (True, True)
    assert listed(kind="release") == [middle]
    assert listed(kind="discarded") == [newest]
    assert (len(listed(by="olga")), listed(by="eve")) == (3, [])
    today = datetime.now(UTC).date()
    assert len(listed(date_from=str(today - timedelta(days=1)), date_to=str(today + timedelta(days=1)))) == 3
    assert listed(date_to=str(today - timedelta(days=2))) == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("kind=gift", "Choose one of the kinds."),
        ("date_from=soon", "Enter a date, such as 2026-01-31."),
        ("date_from=2026-02-01&date_to=2026-01-31", "The last day must not be before the first one."),
        ("by=a%00b", "Enter a name without control characters."),
        ("before=now", "There is no such page: begin with the newest actions."),
        ("before=2026-01-31~event~acme~0", "There is no such page: begin with the newest actions."),
        ("who=olga", "who is not a filter; there are by, organization, kind, date_from, date_to, before."),
    ],
)
def test_a_bad_filter_of_the_audit_is_said(operator: Visitor, query: str, problem: str) -> None:
    page = operator.get(f"/operators/audit?{query}")
    assert (page.status_code, problem in unescape(page.text)) == (422, True)


def test_the_audit_is_read_page_by_page(
    running: Installation, operator: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PAGE", 2)
    granted = {"credits": 1, "source": "operator", "metadata": {"by": "paula"}}
    write(running.engine, org_id, *(("wallet.grant", {"grant_id": f"g{each}", **granted}) for each in range(5)))
    page = operator.get("/operators/audit", params={"organization": org_id})
    seen = [actions_of(page)]
    while older := link(page, "Older →"):
        page = operator.get(older)
        seen.append(actions_of(page))
    found = [[re.findall(r"Granted (g\d)", row)[0] for row in rows] for rows in seen]
    assert found == [["g4", "g3"], ["g2", "g1"], ["g0"]]
    assert link(page, "Newest") == f"/operators/audit?organization={org_id}"
