"""The page of the credit history, served for real: figures, filters, pages, the chart and the open reservations."""

import re
from datetime import UTC, date, datetime, timedelta
from html import unescape
from typing import Any

import httpx
import pytest

from api_stub.pages import PLACES
from ledger import history, views
from ledger.readable import escaped
from tests.acceptance.website import LEDGER, Visitor, figures, history_of, link, rows, shown, text_of, write
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
    assert "of 1,000 included" in page.text
    assert 'plan <span class="plan">Team &amp; Co</span>' in page.text
    assert f"{anchor.day} {anchor:%b %Y} – " in page.text
    assert "holding 300 credits" in page.text
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
    assert f"plan Team , ends {view.plan_ends_at.day} {view.plan_ends_at:%b %Y}" in text
    assert "Prepaid -7 owed: what comes in settles it" in text.replace("−", "-")


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
    assert f"20 end {soon.day} {soon:%b %Y}" in text_of(customer.get(history_of(org_id), params=LEDGER).text)
    eventually(
        lambda: "20 kept past their end by workflows" in text_of(customer.get(history_of(org_id), params=LEDGER).text)
    )


def test_the_page_says_that_credits_end_now(ledger: Installation, customer: Visitor, org_id: str) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "g", "credits": 20, "expires_at": soon.isoformat()}))
    eventually(lambda: "20 end now" in text_of(customer.get(history_of(org_id), params=LEDGER).text))


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
    assert "<figure" not in page.text
    assert ".csv" not in page.text


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
        ("date_from=31.01.2026", "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z."),
        ("date_from=2026-02-31", "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z."),
        ("date_from=2026-11-23&date_to=2026-11-22", "date_to must not be before date_from."),
        ("date_from=2026-02-01&date_to=2026-01-01", "date_to must not be before date_from."),
        ("event_type=usage&event_type=gift", "event_type must be one of usage, prepaid_purchase, "),
        (
            "project_id=a%00b",
            "project_id must have 1 to 128 characters, and only letters, digits and _ . : - among them.",
        ),
        ("limit=101", "limit must be a number from 1 to 100."),
        ("limit=٣", "limit must be a number from 1 to 100."),
        ("reservations_after=-1", "reservations_after must be a number from 1 to 9,007,199,254,740,991."),
        (
            "workflow_id=a%00b",
            "workflow_id must have 1 to 128 characters, and only letters, digits and _ . : - among them.",
        ),
        ("before=0", "before must be a number from 1 to 9,007,199,254,740,991."),
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
        ("run=1&project_id=web", "run is not a filter; there are event_type, date_from, date_to, project_id, "),
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
    assert re.search(r'name="workflow_id" type="text" value="w1"', page.text)
    [file] = re.findall(r'href="([^"]*\.csv[^"]*)"', page.text)
    lines = customer.get(unescape(file)).text.splitlines()
    assert [line.rpartition(",")[2] for line in lines] == ["workflow_id", "w1", "w1"]


def test_pages_continue_one_another_while_events_are_added(
    ledger: Installation, customer: Visitor, org_id: str
) -> None:
    write(ledger.engine, org_id, *(("wallet.grant", {"grant_id": f"g{number}", "credits": 1}) for number in range(250)))
    first = customer.get(history_of(org_id), params=LEDGER)
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
    page = customer.get(history_of(org_id), params=LEDGER)
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
    page = customer.get(history_of(org_id), params=LEDGER)
    words = "From 1,000 to 250 credits; lowest 250, highest 1,000."
    assert words in page.text
    assert '<title id="chart-title">Step chart of the available balance</title>' in page.text
    [(moment,)] = sql(ledger.engine, "SELECT max(created_at) FROM credit_events WHERE org_id = :org_id", org_id=org_id)
    later = customer.get(
        history_of(org_id), params=LEDGER | {"date_from": (moment + timedelta(microseconds=1)).isoformat()}
    )
    assert "From 250 to 250 credits; lowest 250, highest 250." in later.text
    earlier = customer.get(history_of(org_id), params=LEDGER | {"date_to": "2020-01-01"})
    assert "<figure" not in earlier.text
    last = customer.get(history_of(org_id), params=LEDGER | {"date_from": moment.isoformat()})
    assert "From 1,000 to 250 credits; lowest 250, highest 1,000." in last.text


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
    page = customer.get(history_of(org_id), params=LEDGER)
    assert "From 7 to 1,007 credits; lowest 7, highest 1,007." in page.text
    assert re.search(r"From 7 credits on [^<]* to 1,007 on [^<]*, between 7 and 1,007\.</desc>", page.text)
    write(ledger.engine, org_id, ("wallet.grant", {"grant_id": "h", "credits": 1}))
    monkeypatch.setattr(history, "MAX_COMPARED", 1_202)
    page = customer.get(history_of(org_id), params=LEDGER)
    assert "From 7 to 1,008 credits. The line shows some of the events; a shorter time shows more." in page.text
    assert re.search(r"From 7 credits on [^<,]* to 1,008 on [^<,]*\.</desc>", page.text)
    assert "lowest" not in page.text


@pytest.mark.parametrize(
    ("number", "words", "pages"),
    [
        (0, None, []),
        (1, "1, holding 3 credits", []),
        (100, "100, holding 300 credits", []),
        (101, "the 100 oldest of 101, which hold 303 credits in all", [1]),
        (250, "the 100 oldest of 250, which hold 750 credits in all", [100, 50]),
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
            f"{len(seen) + 1}–{len(seen) + size} of {number}, oldest first, which hold {3 * number} credits in all",
        )
        seen += held_by(page)
    assert seen == names
    assert link(page, "More →") is None
    if pages:
        assert held_by(customer.get(str(link(page, "Oldest")))) == names[:100]
        beyond = customer.get(history_of(org_id), params=LEDGER | {"reservations_after": number})
        assert "There are no newer reservations." in beyond.text
        assert said_of_reservations(beyond) == f"0 of {number}, which hold {3 * number} credits in all"


def said_of_reservations(page: httpx.Response) -> str | None:
    found = re.search(r'Open reservations</h2>\s*<p class="note">(.*?)</p>', page.text, re.DOTALL)
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
    assert link(page, "&lt;b&gt;Train&lt;/b&gt;") == f"/organizations/{org_id}/runs/wf_77"
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
        ("view=runs", "view must be activity or ledger."),
        ("before=7", "before must be as in a link to older activity."),
        ("before=7-3&view=ledger", "before must be a number from 1 to 9,007,199,254,740,991."),
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
        ["Refund · crashed", "support", "ticket <i>9</i> refund_id r1", "+6", "440"],
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
    newest = customer.get(history_of(org_id), params=LEDGER)
    assert (len(shown(newest)), "1–100 of 100,000" in newest.text) == (100, True)
    assert len(newest.content) < 200_000
    middle = customer.get(history_of(org_id), params=LEDGER | {"before": 50_001, "project_id": "web"})
    assert (shown(middle)[0], "50,001–50,100 of 100,000" in middle.text) == (50_000, True)
    with customer.stream("GET", f"{history_of(org_id)}.csv") as file:
        assert sum(1 for _ in file.iter_lines()) == 100_001
