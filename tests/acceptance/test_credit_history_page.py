"""The page of the credit history, served for real: figures, filters, pages, the chart and the open reservations."""

import re
from datetime import UTC, date, datetime, timedelta
from html import unescape
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from api_stub.formats import days
from api_stub.pages import PLACES
from ledger import history, views
from ledger.readable import escaped
from ledger.wording import near_day
from tests.acceptance.website import (
    LEDGER,
    Visitor,
    figures,
    history_of,
    link,
    rows,
    served,
    shown,
    spread,
    text_of,
    token,
    write,
)
from tests.installation import Installation
from tests.support import eventually, sql

COLUMNS = (
    "created_at,event_type,source,workflow_id,project_id,activity_name,credits,prepaid_balance_after,"
    "period_usage_after,metadata"
)


def test_the_page_shows_the_wallet(ledger: Installation, customer: Visitor, org_id: str) -> None:
    anchor = datetime.now(UTC) - timedelta(days=3)
    write(
        ledger.engine,
        org_id,
        (
            "wallet.subscribe",
            {
                "subscription_id": "s",
                "version": 1,
                "plan": "Team & Co",
                "monthly_credits": 1_000,
                "anchor": anchor.isoformat(),
            },
        ),
        ("wallet.purchase", {"purchase_id": "p", "credits": 25_000}),
        ("workflow.finish", {"workflow_id": "w1", "credits": 1_234}),
        ("workflow.start", {"workflow_id": "w2", "credits": 300, "project_id": "web", "activity_name": "Crawl"}),
    )
    page = customer.get(history_of(org_id), params=LEDGER)
    assert figures(page) == {
        "available": "24,466",
        "prepaid": "24,766",
        "subscription": "0",
        "reserved": "300",
        "used": "1,234",
    }
    with ledger.engine.connect() as connection:
        view = views.wallet(connection, org_id)
    assert view is not None
    assert view.current_period_start is not None
    assert view.current_period_end is not None
    text = text_of(page.text)
    assert "24,466 available = 24,766 prepaid + 0 plan − 300 held" in text
    period = days(view.current_period_start, view.current_period_end, datetime.now(UTC))
    assert f"1,234 / 1,000 included {period}" in text
    assert f"{org_id} · Team & Co 1,000" in text
    assert "1 run holds 300" in text
    assert re.search(
        r'scope="row" class="mono lead">w2</th>.*?>web<.*?>Crawl<.*?>300<.*?>\d+ s ago<', page.text, re.DOTALL
    )
    assert "in 23 h 59 min" in page.text


def test_the_page_says_when_a_plan_ends_and_what_is_owed(ledger: Installation, customer: Visitor, org_id: str) -> None:
    plan = {"subscription_id": "s", "plan": "Team", "monthly_credits": 10, "anchor": "2026-01-31T00:00:00Z"}
    write(
        ledger.engine,
        org_id,
        ("wallet.subscribe", {**plan, "version": 1}),
        ("wallet.unsubscribe", {"subscription_id": "s", "version": 2}),
        ("workflow.finish", {"workflow_id": "w1", "credits": 17}),
    )
    text = text_of(customer.get(history_of(org_id), params=LEDGER).text)
    with ledger.engine.connect() as connection:
        view = views.wallet(connection, org_id)
    assert view is not None
    assert view.plan_ends_at is not None
    assert f"plan Team ends {near_day(view.plan_ends_at, datetime.now(UTC))}" in text
    assert "−7 available = −7 prepaid + 0 plan " in text
    assert "7 owed: what comes in settles it" in text
    assert "Overdrawn by 7. New runs are refused until you top up." in text


def test_the_page_says_that_credits_are_kept_past_their_end(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    write(
        ledger.engine,
        org_id,
        ("wallet.grant", {"grant_id": "g", "credits": 20, "expires_at": soon.isoformat()}),
        ("workflow.start", {"workflow_id": "w1", "credits": 20}),
    )
    assert f"20 prepaid end {near_day(soon, soon)}" in text_of(customer.get(history_of(org_id), params=LEDGER).text)
    eventually(
        lambda: (
            "20 prepaid kept past their end by workflows"
            in text_of(customer.get(history_of(org_id), params=LEDGER).text)
        )
    )


def test_the_page_says_that_credits_end_now(ledger: Installation, customer: Visitor, org_id: str) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    write(
        ledger.engine,
        org_id,
        ("wallet.grant", {"grant_id": "g", "credits": 20, "expires_at": soon.isoformat()}),
        ("workflow.start", {"workflow_id": "w1", "credits": 19}),
    )
    eventually(lambda: "20 prepaid end now" in text_of(customer.get(history_of(org_id), params=LEDGER).text))


def test_the_page_shows_the_columns_in_the_order_of_the_contract_and_the_workflow(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 5_000}),
        ("workflow.finish", {"workflow_id": "w", "credits": 1_250, "project_id": "web", "activity_name": "Crawl"}),
    )
    page = customer.get(history_of(org_id), params=LEDGER)
    assert ",".join(re.findall(r'data-column="(\w+)"', page.text)) == COLUMNS
    usage, purchase = rows(page)
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]{2} 20\d\d \d\d:\d\d:\d\d", usage[0])
    assert usage[1:] == [
        "Usage",
        "workflow-engine",
        "w",
        "web",
        "Crawl",
        "−1,250",
        "3,750",
        "1,250",
        "Paid by prepaid 1,250 Nothing was reserved",
    ]
    assert purchase[1:] == ["Prepaid purchase", "billing", "", "", "", "+5,000", "5,000", "0", "Purchase p"]


def test_markup_in_the_data_is_text(ledger: Installation, customer: Visitor, org_id: str) -> None:
    markup = "<b onclick='x'>&amp;\"</b>"
    write(
        ledger.engine,
        org_id,
        (
            "workflow.start",
            {"workflow_id": "w", "credits": 0, "activity_name": markup, "source": markup, "metadata": {markup: markup}},
        ),
        ("workflow.cancel", {"workflow_id": "w", "reason": markup}),
    )
    page = customer.get(history_of(org_id), params=LEDGER)
    assert "<b" not in page.text.replace("<body", "").replace("<button", "")
    released, reserved = rows(page)
    assert (reserved[2], reserved[5], released[9]) == (markup, markup, f"The run was cancelled Reason: {markup}")


def test_an_empty_history_says_how_it_begins(customer: Visitor, org_id: str) -> None:
    page = customer.get(history_of(org_id), params=LEDGER)
    assert page.status_code == 200
    assert set(figures(page).values()) == {"0"}
    assert "No events yet." in page.text
    by_run = customer.get(history_of(org_id))
    assert "No activity yet." in by_run.text
    for each in (page, by_run):
        assert "<figure" not in each.text
        assert ".csv" not in each.text


def test_events_can_be_filtered_by_type_project_and_day(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500}),
        ("workflow.start", {"workflow_id": "w1", "credits": 10, "project_id": "web"}),
        ("workflow.start", {"workflow_id": "w2", "credits": 10, "project_id": "crm"}),
        ("workflow.finish", {"workflow_id": "w1", "credits": 10}),
    )
    today = datetime.now(UTC).date()

    def found(**params: Any) -> list[int]:
        return shown(customer.get(history_of(org_id), params=LEDGER | params))

    assert found() == [5, 4, 3, 2, 1]
    assert found(event_type=["usage", "prepaid_purchase"]) == [5, 1]
    assert found(project_id="crm") == [3]
    assert found(project_id="crm", event_type="usage", date_from="", date_to="") == []
    assert found(date_from=today - timedelta(days=1), date_to=today) == [5, 4, 3, 2, 1]
    assert found(date_to=today - timedelta(days=2)) == []
    assert found(date_from=today - timedelta(days=1), date_to="9999-12-31") == [5, 4, 3, 2, 1]
    page = customer.get(history_of(org_id), params=LEDGER | {"project_id": "nobody", "event_type": "refund"})
    assert "No event matches the filter." in page.text
    assert 'value="nobody"' in page.text
    assert re.findall(r'value="(\w+)" checked', page.text) == ["refund"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("date_from=31.01.2026", "Enter a date like 31 Jan 2026."),
        ("date_from=2026-02-31", "Enter a date like 31 Jan 2026."),
        ("date_to=31+Feb+2026", "Enter a date like 31 Jan 2026."),
        ("date_from=2026-11-23&date_to=2026-11-22", "The last day is before the first one."),
        ("date_from=1+Feb+2026&date_to=31+Jan+2026", "The last day is before the first one."),
        ("event_type=usage&event_type=gift", "There is no such type of event. Choose from these."),
        ("project_id=a%00b", "There is no such project. It has at most 128 letters, digits and _ . : -."),
        ("search=" + "x" * 257, "Search for at most 256 characters."),
        ("activity_name=" + "x" * 257, "There is no activity of such a name."),
        ("limit=101", "Enter a number from 1 to 100."),
        ("limit=٣", "Enter a number from 1 to 100."),
        ("reservations_after=-1", "The link to this page is not complete."),
        ("workflow_id=a%00b", "There is no such run. It has at most 128 letters, digits and _ . : -."),
        ("before=0", "The link to this page is not complete."),
        ("view=pie", "There is no such view. Choose "),
    ],
)
def test_a_filter_that_makes_no_sense_is_explained_beside_what_was_typed(
    customer: Visitor, org_id: str, query: str, sentence: str
) -> None:
    page = customer.get(f"{history_of(org_id)}?view=ledger&{query}")
    assert (page.status_code, sentence in page.text) == (422, True)
    typed = httpx.QueryParams(query).multi_items()
    for name, value in typed:
        assert name in PLACES or f'value="{escaped(value)}"' in page.text
        assert not re.search(rf'type="date" value="{re.escape(value)}"', page.text) or date.fromisoformat(value)
    assert '<section class="card" aria-labelledby="events">' not in page.text
    file = customer.get(f"{history_of(org_id)}.csv?view=ledger&{query}")
    assert (file.status_code, sentence in file.text) == (422, True)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("type=usage", "type is not a filter; did you mean event_type?"),
        ("run=1&project_id=web", "run is not a filter; there are event_type, activity_name, date_from, date_to, "),
        ("project_id=web&project_id=crm", "project_id is given more than once."),
        ("<b>=1", "&lt;b&gt; is not a filter; there are "),
    ],
)
def test_a_filter_that_there_is_not_is_refused_and_said(
    customer: Visitor, org_id: str, query: str, sentence: str
) -> None:
    page = customer.get(f"{history_of(org_id)}?view=ledger&{query}")
    assert (page.status_code, sentence in page.text, "The filter was not applied" in page.text) == (422, True, True)
    assert '<section class="card" aria-labelledby="events">' not in page.text
    assert link(page, "Clear") == f"{history_of(org_id)}?view=ledger"
    file = customer.get(f"{history_of(org_id)}.csv?view=ledger&{query}")
    assert (file.status_code, sentence in file.text) == (422, True)


def test_the_events_of_a_workflow_are_shown_and_downloaded(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500}),
        ("workflow.finish", {"workflow_id": "w1", "credits": 10}),
        ("workflow.finish", {"workflow_id": "w2", "credits": 10}),
        ("wallet.refund", {"refund_id": "r", "credits": 5, "workflow_id": "w1"}),
    )
    page = customer.get(history_of(org_id), params=LEDGER | {"workflow_id": "w1"})
    assert (shown(page), [row[3] for row in rows(page)]) == ([4, 2], ["w1", "w1"])
    assert "2 events, sum −5 credits" in page.text
    assert re.search(r'name="workflow_id" type="text" value="w1"', page.text)
    [file] = re.findall(r'href="([^"]*\.csv[^"]*)"', page.text)
    lines = customer.get(unescape(file)).text.splitlines()
    assert [line.rpartition(",")[2] for line in lines] == ["workflow_id", "w1", "w1"]


def test_pages_continue_one_another_while_events_are_added(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(ledger.engine, org_id, *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(250)))
    usual = customer.get(history_of(org_id), params=LEDGER)
    assert (shown(usual), "1–25 of 250" in usual.text) == (list(range(250, 225, -1)), True)
    first = customer.get(str(link(usual, "100 events on a page")))
    assert link(first, "100 events on a page") is None
    assert (shown(first), "1–100 of 250" in first.text) == (list(range(250, 150, -1)), True)
    assert (link(first, "Newest"), link(first, "← Newer")) == (None, None)
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "late", "credits": 1}))
    second = customer.get(str(link(first, "Older →")))
    assert (shown(second), "102–201 of 251" in second.text) == (list(range(150, 50, -1)), True)
    third = customer.get(str(link(second, "Older →")))
    assert (shown(third), "202–251 of 251" in third.text) == (list(range(50, 0, -1)), True)
    assert link(third, "Older →") is None
    assert shown(customer.get(str(link(third, "← Newer")))) == shown(second)
    newer = customer.get(str(link(second, "← Newer")))
    assert (shown(newer), "2–101 of 251" in newer.text) == (list(range(250, 150, -1)), True)
    assert shown(customer.get(str(link(newer, "← Newer")))) == list(range(251, 151, -1))
    assert shown(customer.get(str(link(third, "Newest")))) == list(range(251, 151, -1))


def test_the_links_of_a_filtered_page_keep_the_filter(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(ledger.engine, org_id, *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(5)))
    write(ledger.engine, org_id, *(("wallet.refund", {"refund_id": f"r{number}", "credits": 1}) for number in range(5)))
    first = customer.get(history_of(org_id), params=LEDGER | {"event_type": ["grant", "usage"], "limit": 2})
    second = customer.get(str(link(first, "Older →")))
    assert (shown(second), "3–4 of 5" in second.text) == ([3, 2], True)
    [file] = re.findall(r'href="([^"]*\.csv[^"]*)"', second.text)
    assert customer.get(unescape(file)).text.count("\r\n") == 6
    nothing = customer.get(history_of(org_id), params=LEDGER | {"before": 1})
    assert "There are no older events." in nothing.text


def test_long_metadata_can_be_opened_and_is_bounded(ledger: Installation, customer: Visitor, org_id: str) -> None:
    largest = {"text": "<" * 4_000, "list": [0] * 2_000}
    write(
        ledger.engine,
        org_id,
        *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1, "metadata": largest}) for number in range(100)),
    )
    page = customer.get(history_of(org_id), params=LEDGER | {"limit": 100})
    assert page.text.count('<summary>3 entries<span class="unseen"> of metadata</span></summary>') == 100
    assert len(page.content) < 5_000_000


def test_the_chart_shows_the_balance_in_the_range_and_says_it_in_words(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 1_000}),
        ("workflow.finish", {"workflow_id": "w", "credits": 750}),
    )
    assert "<figure" not in customer.get(history_of(org_id), params=LEDGER).text  # so soon, there is nothing to draw
    spread(ledger.engine, org_id, days=3)
    page = customer.get(history_of(org_id), params=LEDGER)
    words = "From 1,000 to 250 credits; lowest 250, highest 1,000."
    assert words in page.text
    assert '<title id="chart-title">Step chart of the available balance</title>' in page.text
    [(moment,)] = sql(ledger.engine, "SELECT max(created_at) FROM credit_events WHERE org_id = :org_id", org_id=org_id)
    later = customer.get(history_of(org_id), params=LEDGER | {"date_from": (moment - timedelta(days=2)).isoformat()})
    assert "From 1,000 to 250 credits; lowest 250, highest 1,000." in later.text
    before = customer.get(history_of(org_id), params=LEDGER | {"date_to": (moment - timedelta(hours=1)).isoformat()})
    assert "From 1,000 to 1,000 credits; lowest 1,000, highest 1,000." in before.text
    earlier = customer.get(history_of(org_id), params=LEDGER | {"date_to": "2020-01-01"})
    assert "<figure" not in earlier.text
    last = customer.get(history_of(org_id), params=LEDGER | {"date_from": moment.isoformat()})
    assert "<figure" not in last.text


def test_the_chart_is_told_truly_however_many_events_there_are(
    ledger: Installation, customer: Visitor, org_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        (f"workflow.{step}", {"workflow_id": f"w{number}"} | ({"credits": number} if step == "start" else {}))
        for number in range(600)
        for step in ("start", "cancel")
    ]
    purchase = ("wallet.purchase", {"purchase_id": "p", "credits": 1_000})
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "g", "credits": 7}), purchase, *runs)
    spread(ledger.engine, org_id, days=3)
    page = customer.get(history_of(org_id), params=LEDGER)
    assert "From 7 to 1,007 credits; lowest 7, highest 1,007." in page.text
    assert re.search(r"From 7 to 1,007 credits, [^<]*, between 7 and 1,007\.</desc>", page.text)
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "h", "credits": 1}))
    monkeypatch.setattr(history, "MAX_COMPARED", 1_202)
    page = customer.get(history_of(org_id), params=LEDGER)
    assert "From 7 to 1,008 credits. The line shows some of the events; a shorter time shows more." in page.text
    assert re.search(r"From 7 to 1,008 credits, [^<,]*\.</desc>", page.text)
    assert "lowest" not in page.text


@pytest.mark.parametrize(
    ("number", "words", "pages"),
    [
        (0, None, []),
        (1, "1 run holds 3", []),
        (100, "100 runs hold 300", []),
        (101, "101 runs hold 303 The 100 oldest of 101", [1]),
        (250, "250 runs hold 750 The 100 oldest of 250", [100, 50]),
    ],
)
def test_all_open_reservations_can_be_reached(
    ledger: Installation, customer: Visitor, org_id: str, number: int, words: str | None, pages: list[int]
) -> None:
    names = [f"run-{each:03}" for each in range(number)]
    starts = [("workflow.start", {"workflow_id": name, "credits": 3}) for name in names]
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 1_000}), *starts)
    page = customer.get(history_of(org_id), params=LEDGER | {"event_type": "reservation", "limit": 1})
    assert said_of_reservations(page) == words
    seen = held_by(page)
    for size in pages:
        page = customer.get(str(link(page, "More →")))
        assert (len(held_by(page)), len(shown(page)), said_of_reservations(page)) == (
            size,
            1,
            f"{number} runs hold {3 * number} {len(seen) + 1}–{len(seen) + size} of {number}, oldest first",
        )
        seen += held_by(page)
    assert seen == names
    assert link(page, "More →") is None
    if pages:
        assert held_by(customer.get(str(link(page, "Oldest")))) == names[:100]
        beyond = customer.get(history_of(org_id), params=LEDGER | {"reservations_after": number})
        assert said_of_reservations(beyond) == f"{number} runs hold {3 * number} There are no newer ones."


def said_of_reservations(page: httpx.Response) -> str | None:
    found = re.search(r'<summary id="reservations">(.*?</summary>(\s*<p class="note">.*?</p>)?)', page.text, re.DOTALL)
    return None if found is None else text_of(found[1])


def held_by(page: httpx.Response) -> list[str]:
    """The workflows whose reservations the page shows."""
    return re.findall(r'<th role="rowheader" scope="row" class="mono lead">([^<]*)</th>', page.text)


# By run


def receipts_of(page: httpx.Response) -> list[list[str]]:
    """The cells of the receipts that the page shows, without the time."""
    found = re.findall(r'<tr role="row" data-receipt="\d+">(.*?)</tr>', page.text, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)][1:] for row in found]


def test_the_first_view_has_a_line_for_each_run(ledger: Installation, customer: Visitor, org_id: str) -> None:
    run = {"workflow_id": "wf_77", "project_id": "churn", "activity_name": "<b>Train</b>"}
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "ord-1", "credits": 5_000}),
        ("workflow.start", {**run, "credits": 129}),
        ("workflow.finish", {**run, "credits": 66}),
        ("workflow.finish", {"workflow_id": "..", "credits": 1_250}),
        ("wallet.refund", {"refund_id": "r", "credits": 120, "metadata": {"reason": "goodwill SUP-8821"}}),
    )
    page = customer.get(history_of(org_id))
    refund, unnamed, named, purchase = receipts_of(page)
    assert refund == ["Refund · goodwill SUP-8821", "", "", "+120"]
    assert (unnamed[:2], unnamed[2].split(" nothing")[0], unnamed[3]) == (["Run ..", ""], "used 1,250,", "−1,250")
    assert (named[:2], named[3]) == (["<b>Train</b> wf_77", "churn"], "−66")
    assert re.fullmatch(r"used 66 of 129 held .* Held −129 .* Returned \+129 .* Used −66", named[2])
    assert purchase == ["Purchase · ord-1", "", "", "+5,000"]
    assert shown(page) == []
    assert f'<a href="/organizations/{org_id}/runs/wf_77">&lt;b&gt;Train&lt;/b&gt;</a>' in page.text
    # A browser takes the last two characters of /runs/.. for the folder above.
    of_the_unnamed = customer.get(str(link(page, "Run")))
    assert (shown(of_the_unnamed), link(of_the_unnamed, "Activity")) == (
        [5],
        f"{history_of(org_id)}?workflow_id=..&view=activity",
    )


def test_pages_of_receipts_continue_one_another_while_events_are_added(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 500}))
    write(ledger.engine, org_id, *(("workflow.start", {"workflow_id": f"w{n}", "credits": 1}) for n in range(5)))
    page = customer.get(history_of(org_id), params={"limit": 2})
    assert link(page, "Newest") is None
    seen = [[cells[0] for cells in receipts_of(page)]]
    for number in (2, 0):
        write(ledger.engine, org_id, ("workflow.finish", {"workflow_id": f"w{number}", "credits": 1}))
        page = customer.get(str(link(page, "Older →")))
        seen.append([cells[0] for cells in receipts_of(page)])
    assert seen == [["Run w4", "Run w3"], ["Run w2", "Run w1"], ["Run w0", "Purchase · p"]]
    assert link(page, "Older →") is None
    newest = customer.get(str(link(page, "Newest")))
    assert [cells[0] for cells in receipts_of(newest)] == ["Run w0", "Run w2"]
    beyond = customer.get(history_of(org_id), params={"before": "9-1"})
    assert "There is no older activity." in beyond.text


def test_receipts_are_filtered_and_the_filter_is_kept_by_both_tabs(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500}),
        ("workflow.start", {"workflow_id": "w1", "credits": 10, "project_id": "web"}),
        ("workflow.start", {"workflow_id": "w2", "credits": 10, "project_id": "crm"}),
    )
    page = customer.get(history_of(org_id), params={"project_id": "crm"})
    assert [cells[:2] for cells in receipts_of(page)] == [["Run w2", "crm"]]
    events = customer.get(str(link(page, "Ledger")))
    assert shown(events) == [3]
    assert receipts_of(customer.get(str(link(events, "Activity")))) == receipts_of(page)
    assert 'type="hidden" name="view" value="ledger"' in events.text
    nothing = customer.get(history_of(org_id), params={"project_id": "nobody"})
    assert "Nothing matches the filter." in nothing.text


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("view=runs", "There is no such view. Choose activity or ledger."),
        ("before=7", "The link to this page is not complete."),
        ("before=7-3&view=ledger", "The link to this page is not complete."),
    ],
)
def test_a_place_that_there_is_not_is_explained(customer: Visitor, org_id: str, query: str, sentence: str) -> None:
    page = customer.get(f"{history_of(org_id)}?{query}")
    assert (page.status_code, sentence in page.text, receipts_of(page)) == (422, True, [])


def test_a_run_has_a_page_of_its_steps(ledger: Installation, customer: Visitor, org_id: str) -> None:
    run = {"workflow_id": "a:b", "project_id": "churn", "activity_name": "Train"}
    refund = {"refund_id": "r1", "credits": 6, "workflow_id": "a:b", "source": "support"}
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 500}),
        ("workflow.start", {**run, "credits": 129}),
        ("workflow.finish", {**run, "credits": 66}),
        ("wallet.refund", {**refund, "metadata": {"reason": "crashed", "ticket": "<i>9</i>"}}),
    )
    page = customer.get(f"/organizations/{org_id}/runs/a:b")
    assert [row[1:] for row in rows(page)] == [
        ["Held", "workflow-engine", "", "−129", "371"],
        ["Returned", "workflow-engine", "", "+129", "500"],
        ["Used", "workflow-engine", "", "−66", "434"],
        ["Refund · crashed", "support", "Refund r1 ticket <i>9</i>", "+6", "440"],
    ]
    text = text_of(page.text)
    assert "It used 66 of the 129 that were held for it. 6 were refunded." in text
    assert "Effect on the balance −60" in text
    assert shown(customer.get(str(link(page, "In the ledger")))) == [5, 4, 3, 2]
    assert link(page, "← Credit history") == history_of(org_id)


def test_a_refund_of_an_older_version_leads_to_its_run_too(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    refund = {"refund_id": "r1", "credits": 6, "workflow_id": "w1"}
    write(ledger.engine, org_id, ("workflow.finish", {"workflow_id": "w1", "credits": 9}), ("wallet.refund", refund))
    sql(ledger.engine, "ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only")
    sql(ledger.engine, "UPDATE credit_events SET workflow_id = NULL WHERE seq = 2 AND org_id = :org_id", org_id=org_id)
    sql(ledger.engine, "ALTER TABLE credit_events ENABLE TRIGGER credit_events_append_only")
    page = customer.get(history_of(org_id), params=LEDGER | {"event_type": "refund"})
    run = customer.get(str(link(page, "w1")))
    assert [row[1] for row in rows(run)] == ["Used", "Refund · r1"]
    assert [cells[0] for cells in receipts_of(customer.get(history_of(org_id)))] == ["Run w1"]


def test_a_run_that_was_refused_says_why(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(ledger.engine, org_id, ("workflow.start", {"workflow_id": "w1", "credits": 1_290}))
    page = customer.get(f"/organizations/{org_id}/runs/w1")
    assert "It was refused. It asked for 1,290, which was more than was available." in text_of(page.text)
    assert rows(page) == []
    assert link(page, "In the ledger") is None


def test_the_page_of_a_run_is_bounded(ledger: Installation, customer: Visitor, org_id: str) -> None:
    refunds = [("wallet.refund", {"refund_id": f"r{n}", "credits": 1, "workflow_id": "w1"}) for n in range(150)]
    write(ledger.engine, org_id, ("workflow.finish", {"workflow_id": "w1", "credits": 500}), *refunds)
    page = customer.get(f"/organizations/{org_id}/runs/w1")
    assert (len(rows(page)), "the oldest 100 of 151" in page.text) == (100, True)
    history = customer.get(history_of(org_id))
    [[name, _, steps, change]] = receipts_of(history)
    assert (name, change, steps.count("Refund")) == ("Run w1", "−350", 12)
    assert link(history, "all of them") == f"/organizations/{org_id}/runs/w1"


@pytest.mark.parametrize("run", ["nightly-3", "x" * 128, "a%20b", "x" * 300])
def test_a_run_that_there_is_not_is_told(customer: Visitor, org_id: str, run: str) -> None:
    page = customer.get(f"/organizations/{org_id}/runs/{run}")
    assert (page.status_code, f"{org_id} has no run " in text_of(page.text)) == (404, True)
    assert customer.get(f"/organizations/other/runs/{run}").status_code == 404


# What used the credits, and what has to be done


def runs_of(ledger: Installation, org_id: str) -> None:
    """1,000 credits, of which seven runs of three projects used 280."""
    runs = [
        ("web", "Crawl"),
        ("web", "Train <b>"),
        ("crm", "Crawl"),
        (None, "Train <b>"),
        ("crm", None),
        ("crm", "Sync"),
    ]
    finish = [
        (
            "workflow.finish",
            {"workflow_id": f"w{n}", "credits": 10 * (n + 1)}
            | {name: value for name, value in (("project_id", project), ("activity_name", activity)) if value},
        )
        for n, (project, activity) in enumerate([*runs, ("web", "Crawl")])
    ]
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 1_000}), *finish)


def ranked(page: httpx.Response, what: str) -> list[str]:
    [found] = re.findall(rf'<ol aria-labelledby="by-{what}">(.*?)</ol>', page.text, re.DOTALL)
    return [text_of(item) for item in re.findall(r"<li>(.*?)</li>", found, re.DOTALL)]


def test_what_used_the_credits_is_ranked_and_each_leads_to_its_events(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    runs_of(ledger, org_id)
    spread(ledger.engine, org_id, days=4)
    page = customer.get(history_of(org_id), params=LEDGER)
    assert "Used 280" in page.text
    assert ranked(page, "project") == ["crm 140 50 %", "web 100 36 %", "No project 40 14 %"]
    assert ranked(page, "activity") == [
        "Crawl 110 39 %",
        "Train <b> 60 21 %",
        "Sync 60 21 %",
        "No activity 50 18 %",
    ] or (ranked(page, "activity") == ["Crawl 110 39 %", "Sync 60 21 %", "Train <b> 60 21 %", "No activity 50 18 %"])
    assert re.search(r'<title id="bars-title">Bar chart of the credits used each day, by project</title>', page.text)
    crm = customer.get(str(link(page, "crm")))
    assert [row[4] for row in rows(crm)] == ["crm"] * 3
    assert "3 events, sum −140 credits" in crm.text
    assert "Bar chart of the credits used each day, by activity" in crm.text
    train = customer.get(str(link(page, "Train &lt;b&gt;")))
    assert [row[5] for row in rows(train)] == ["Train <b>"] * 2
    both = customer.get(str(link(crm, "Crawl")))
    assert shown(both) == [4]
    assert 'name="activity_name" value="Crawl" checked' in both.text


def test_the_range_of_what_was_used_ends_with_its_last_day(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    runs_of(ledger, org_id)
    spread(ledger.engine, org_id, days=9)
    now = datetime.now(UTC)
    first, last = (now - timedelta(days=6)).date(), (now - timedelta(days=3)).date()
    page = customer.get(history_of(org_id), params=LEDGER | {"date_from": str(first), "date_to": str(last)})
    begin = datetime.combine(first, datetime.min.time(), UTC)
    assert f"{days(begin, begin + timedelta(days=4), now)} · " in page.text
    in_words = {"date_from": f"{first:%d %b %Y}", "date_to": f"{last:%d %B %Y}"}
    assert shown(customer.get(history_of(org_id), params=LEDGER | in_words)) == shown(page)
    file = customer.get(f"{history_of(org_id)}.csv", params=in_words)
    assert file.text.count("\r\n") == 1 + len(shown(page))


def test_a_search_finds_a_run_by_its_id_and_otherwise_activities_by_a_part_of_their_name(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    runs_of(ledger, org_id)

    def found(search: str, **params: str) -> list[int]:
        return shown(customer.get(history_of(org_id), params=LEDGER | {"search": search, **params}))

    assert found("w3") == [5]
    assert found("CRAWL") == [8, 4, 2]
    assert found("n <") == [5, 3]
    assert found("crawl", project_id="web") == [8, 2]
    assert found("Crawl", activity_name="Sync") == []
    assert found("Crawl", activity_name="Crawl") == [8, 4, 2]
    assert found("w") == [8, 4, 2]
    assert found("%") == []
    nothing = customer.get(history_of(org_id), params=LEDGER | {"search": "w33"})
    assert "No event matches the filter." in nothing.text
    file = customer.get(f"{history_of(org_id)}.csv", params={"search": "sync"})
    assert file.text.count("\r\n") == 2


def test_usage_is_that_of_the_last_days_until_another_range_is_asked_for(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    finish = [("workflow.finish", {"workflow_id": f"w{n}", "credits": 10}) for n in range(60)]
    write(ledger.engine, org_id, *finish)
    spread(ledger.engine, org_id, days=59)
    page = customer.get(history_of(org_id))
    assert "Used 300" in page.text
    whole = customer.get(str(link(page, re.search(r">(Since [^<]*)</a>", page.text)[1])))  # type: ignore[index]
    assert "Used 600" in whole.text
    assert "Since " not in whole.text
    month = customer.get(str(link(page, "30 days")))
    assert "Used 300" in month.text
    assert "30 events, sum −300 credits" in month.text
    assert "Since " not in month.text


def test_usage_is_that_of_the_current_period_if_there_is_one(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    plan = {"subscription_id": "s", "version": 1, "plan": "Team", "monthly_credits": 500, "rollover_limit": 0}
    finish = [("workflow.finish", {"workflow_id": f"w{n}", "credits": 10}) for n in range(3)]
    write(ledger.engine, org_id, *finish[:2])
    write(ledger.engine, org_id, ("wallet.subscribe", plan))
    write(ledger.engine, org_id, finish[2])
    page = customer.get(history_of(org_id))
    assert "Used 10" in page.text
    assert re.search(r"1 run\b", page.text)


def test_the_links_of_a_period_and_a_kind_keep_the_rest_of_the_filter(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    runs_of(ledger, org_id)
    write(
        ledger.engine,
        org_id,
        ("wallet.subscribe", {"subscription_id": "s", "version": 1, "plan": "Team", "monthly_credits": 9}),
        ("wallet.refund", {"refund_id": "r", "credits": 2, "workflow_id": "w0"}),
        ("workflow.start", {"workflow_id": "last", "credits": 3, "project_id": "web"}),
    )
    page = customer.get(history_of(org_id), params=LEDGER)
    for kind, numbers in {
        "Usage": [8, 7, 6, 5, 4, 3, 2],
        "Top-ups &amp; plan": [9, 1],
        "Corrections": [10],
        "Holds": [11],
        "Every kind": [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1],
    }.items():
        page = customer.get(str(link(page, kind)))
        assert (kind, shown(page)) == (kind, numbers)
        assert re.search(rf'aria-current="true">{kind}</a>', page.text)
    web = customer.get(history_of(org_id), params=LEDGER | {"project_id": "web"})
    assert shown(customer.get(str(link(web, "Usage")))) == [8, 3, 2]
    this_period = customer.get(str(link(web, "This period")))
    assert shown(this_period)[:1] == [11]
    assert 'aria-current="true">This period</a>' in this_period.text
    assert 'aria-current="true">30 days</a>' in customer.get(str(link(this_period, "30 days"))).text
    assert shown(customer.get(str(link(this_period, "All")))) == [11, 10, 8, 3, 2]


def test_a_refused_run_is_shown_with_why_and_what_to_do(ledger: Installation, customer: Visitor, org_id: str) -> None:
    write(
        ledger.engine,
        org_id,
        ("wallet.purchase", {"purchase_id": "p", "credits": 120}),
        ("workflow.start", {"workflow_id": "nightly:3", "credits": 500}),
    )
    page = customer.get(history_of(org_id), params=LEDGER)
    text = text_of(page.text)
    assert "A run was refused. Top up at least 380 credits, then start it again, as a new run." in text
    assert re.search(
        r"The run nightly:3 , estimated at 500, was refused on \d+ \w{3} at [\d:]{8}: too few credits were available\.",
        text,
    )
    assert link(page, "nightly:3") == f"/organizations/{org_id}/runs/nightly:3"
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "q", "credits": 380}))
    assert (
        "There is room for it now: start it again, as a new run."
        in customer.get(history_of(org_id), params=LEDGER).text
    )


def test_without_a_wallet_and_with_enough_there_is_no_banner(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    assert 'class="banner' not in customer.get(history_of(org_id), params=LEDGER).text
    write(ledger.engine, org_id, ("wallet.purchase", {"purchase_id": "p", "credits": 120}))
    assert 'class="banner' not in customer.get(history_of(org_id), params=LEDGER).text


def test_the_page_says_how_long_the_credits_last(ledger: Installation, customer: Visitor, org_id: str) -> None:
    anchor = datetime.now(UTC) - timedelta(days=9)
    plan = {"subscription_id": "s", "version": 1, "plan": "Team", "monthly_credits": 500, "anchor": anchor.isoformat()}
    runs_of(ledger, org_id)
    write(ledger.engine, org_id, ("wallet.subscribe", {**plan, "rollover_limit": 50}))
    assert "a day" not in customer.get(history_of(org_id), params=LEDGER).text
    spread(ledger.engine, org_id, days=8)
    with ledger.engine.connect() as connection:
        view = views.wallet(connection, org_id)
    assert view is not None
    assert view.next_credits is not None
    text = text_of(customer.get(history_of(org_id), params=LEDGER).text)
    end = near_day(view.next_credits.at, datetime.now(UTC))
    assert re.search(rf"About \d+ a day; enough until {end}, when Team adds 500 \(up to 50 unused are kept\)\.", text)


def test_credits_are_bought_where_the_deployment_says(ledger: Installation, customer: Visitor, org_id: str) -> None:
    assert link(customer.get(history_of(org_id), params=LEDGER), "Buy credits") is None
    buy = "https://billing.example.com/credits?from=holdfast&x=<y>"
    with (
        served(ledger.database_url, ledger.broker_url, buy_credits_url=quote(buy, safe=":/?=&")) as address,
        Visitor(base_url=address) as visitor,
    ):
        visitor.sign_in(token(orgs=[org_id]))
        page = visitor.get(history_of(org_id))
        assert link(page, "Buy credits") == "https://billing.example.com/credits?from=holdfast&x=%3Cy%3E"
        assert "default-src 'none'" in page.headers["content-security-policy"]


# Size


def test_a_history_of_100_000_events_is_shown_page_by_page(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    sql(
        ledger.engine,
        """
        INSERT INTO credit_events
        SELECT :org_id, n, TIMESTAMPTZ '2026-01-01Z' + n * INTERVAL '1 minute', 'grant', 'admin', NULL, 'web', 'Import',
               1, n, 0, 0, 0, 'grant:' || n, '{}'
        FROM generate_series(1, 100000) n
        """,
        org_id=org_id,
    )
    newest = customer.get(history_of(org_id), params=LEDGER | {"limit": 100})
    assert (len(shown(newest)), "1–100 of 100,000" in newest.text) == (100, True)
    assert len(newest.content) < 200_000
    middle = customer.get(history_of(org_id), params=LEDGER | {"before": 50_001, "project_id": "web", "limit": 100})
    assert (shown(middle)[0], "50,001–50,100 of 100,000" in middle.text) == (50_000, True)
    with customer.stream("GET", f"{history_of(org_id)}.csv") as file:
        assert sum(1 for _ in file.iter_lines()) == 100_001
