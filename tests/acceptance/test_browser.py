"""The web pages in a real Chromium: what a person sees and does, with a mouse, with the keyboard, on a phone, at night.

Skipped where Chromium or its driver is not installed. With HOLDFAST_TEST_SCREENSHOT set to a path, the picture of the
README is written there.
"""

import base64
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from sqlalchemy import Engine

from api_stub import console, letters
from ledger.store import apply_batch
from tests.acceptance.website import HISTORY, LETTERS, ONE_BY_ONE, operator_token, served, spread, token
from tests.installation import Installation
from tests.messages import delivery
from tests.support import PATIENCE_S, eventually, sql

LEDGER = f"{HISTORY}?view=ledger"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SCREENSHOT = os.environ.get("HOLDFAST_TEST_SCREENSHOT")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--lang=en-GB",
    "--window-size=1280,900",
)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)


def widths(*pixels: int, more: Sequence[int]) -> list[Any]:
    """Widths of a screen: at every push, the narrowest and another one; `make soak` has `more`."""
    return [*pixels, *(pytest.param(width, marks=pytest.mark.soak) for width in more)]


# Of every text that is shown: the smallest ratio of contrast to the ground that it stands on, and the text.
CONTRAST = """
    const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = element => {
        for (let e = element; e; e = e.parentElement) {
            const color = rgb(getComputedStyle(e).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
        }
        return matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255];
    };
    let worst = [21, ''];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        const shown = element.checkVisibility({visibilityProperty: true}) && !element.closest('.unseen, .skip, svg');
        if (!texts.currentNode.textContent.trim() || !shown) continue;
        const [a, b] = [light(rgb(getComputedStyle(element).color)), light(ground(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < worst[0]) worst = [ratio, texts.currentNode.textContent.trim()];
    }
    return worst;
"""


# How much reaches over the right edge of the screen.
STICKING_OUT = """
    return [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length
"""

# What a table holds that can be seen only after scrolling to the side.
HIDDEN = """
    return [...document.querySelectorAll('.scroll')]
        .filter(each => getComputedStyle(each).overflowX === 'auto' && each.scrollWidth > each.clientWidth)
        .map(each => each.getAttribute('aria-labelledby') + ' ' + (each.scrollWidth - each.clientWidth));
"""

# The numbers, except those of metadata, that begin on one line and end on another.
BROKEN = """
    const broken = [], number = document.createRange();
    const texts = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        if (texts.currentNode.parentElement.closest('.metadata')) continue;
        for (const found of texts.currentNode.data.matchAll(/\\d[\\d,]*/g)) {
            number.setStart(texts.currentNode, found.index);
            number.setEnd(texts.currentNode, found.index + found[0].length);
            if (number.getClientRects().length > 1) broken.push(found[0]);
        }
    }
    return broken;
"""


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody in front of a browser."""

    driver: Chrome
    address: str

    def open(self, path: str) -> None:
        self.driver.get(self.address + path)

    def sign_in(self, token: str, path: str) -> None:
        """As people do: open the page, be asked for the token, type it, and be on the page."""
        self.open(path)
        self.find("#token").send_keys(token, Keys.ENTER)
        self.wait_for(path)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def click(self, text: str) -> None:
        """Click on the link or the button with this text, and wait for the next page."""
        before = self.find("html")
        path = f"//main//*[(self::a or self::button) and normalize-space()={text!r}]"
        self.driver.find_element(By.XPATH, path).click()
        self.wait_for_page_after(before)

    def wait_for_page_after(self, before: WebElement) -> None:
        WebDriverWait(self.driver, PATIENCE_S).until(lambda _: self.find("html") != before and self.is_loaded())

    def wait_for(self, path: str) -> None:
        address = self.address + path
        WebDriverWait(self.driver, PATIENCE_S).until(lambda driver: driver.current_url == address and self.is_loaded())

    def is_loaded(self) -> bool:
        return bool(self.driver.execute_script("return document.readyState") == "complete")

    def press(self, *keys: str) -> WebElement:
        """Press keys; answers with what has the focus then."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)
        return self.driver.switch_to.active_element

    def events(self) -> list[int]:
        """The numbers of the events on the page."""
        rows = self.driver.find_elements(By.CSS_SELECTOR, "tr[data-event]")
        numbers: list[int] = self.driver.execute_script(
            "return arguments[0].map(row => Number(row.dataset.event))", rows
        )
        return numbers

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def hold_phone(self, width: int = 360, height: int = 740) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def put_phone_away(self) -> None:
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def width_needed(self) -> int:
        return int(self.driver.execute_script("return document.documentElement.scrollWidth"))

    def height(self) -> int:
        """The height of the whole page, in pixels of the design."""
        return int(self.driver.execute_script("return document.documentElement.scrollHeight"))

    def complaints(self) -> list[str]:
        """What the browser wrote to its console since it was asked last: errors, violations of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chrome(downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    assert CHROMIUM is not None
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both paths given, selenium looks for nothing and downloads nothing.
    driver = Chrome(options, Service(DRIVER))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(running: Installation) -> Iterator[str]:
    tell_the_story(running.engine)
    with pytest.MonkeyPatch.context() as patched:
        for pages in (letters, console):
            patched.setattr(pages, "ANSWER_TIMEOUT_S", PATIENCE_S)
        buy = "https://billing.example.com/credits"
        with served(running.database_url, running.broker_url, buy_credits_url=buy) as address:
            yield address


@pytest.fixture
def person(chrome: Chrome, address: str) -> Iterator[Person]:
    """Somebody who has not been here yet, and whose browser has nothing to complain about in the end."""
    person = Person(chrome, address)
    person.open("/signin")
    chrome.delete_all_cookies()
    person.complaints()
    yield person
    person.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    person.prefer("light")
    person.put_phone_away()
    assert person.complaints() == []


@pytest.fixture(scope="module")
def cookies(chrome: Chrome, address: str) -> list[dict[str, Any]]:
    """What a customer's browser keeps after signing in."""
    person = Person(chrome, address)
    person.open("/signin")
    chrome.delete_all_cookies()  # of whoever was here before
    person.sign_in(token(sub="ann@acme.example"), HISTORY)
    return list(chrome.get_cookies())


@pytest.fixture
def customer(person: Person, cookies: list[dict[str, Any]]) -> Person:
    for cookie in cookies:
        person.driver.add_cookie(cookie)
    person.open(LEDGER)
    return person


def tell_the_story(engine: Engine) -> None:
    """Fifty workflows of acme in eight days, three of them still running: 148 events."""
    anchor = (datetime.now(UTC) - timedelta(days=9)).isoformat()
    activities = ("Weekly report", "Import contacts", "Train ranking", "Render video")
    projects = ("website", "crm", "search")

    def acme(task: str, **fields: Any) -> None:
        apply_batch(engine, [delivery(task, org_id="acme", **fields)])

    acme("wallet.subscribe", subscription_id="s", version=1, plan="Team", monthly_credits=12_000, anchor=anchor)
    acme("wallet.purchase", purchase_id="order-1", credits=5_000, metadata={"invoice": "INV-2041"})
    for number in range(50):
        workflow = {"workflow_id": f"run-{number}", "project_id": projects[number % 3]}
        estimate = 100 + number * 37 % 400
        acme("workflow.start", **workflow, credits=estimate, activity_name=activities[number % 4])
        if number == 30:
            acme("wallet.purchase", purchase_id="order-2", credits=8_000)
        if number < 47:
            acme("workflow.finish", **workflow, credits=estimate - number % 7)
    long = {"note": "word " * 400, "list": list(range(300))}
    acme("wallet.grant", grant_id="sorry", credits=250, reason="<b>sorry</b> for the trouble", metadata=long)
    spread(engine, "acme", days=8)


# What a customer does


def test_a_customer_signs_in_and_sees_the_figures(customer: Person) -> None:
    assert customer.driver.title == "Credit history of acme · Holdfast"
    assert customer.find("h1").text == "Credit history of\nacme · Team 12,000"
    assert customer.find(".equation").text == "11,061 available = 11,889 prepaid + 0 plan − 828 held"
    assert re.fullmatch(r"About 1,\d{3} a day; enough until about \d+ \w{3}\. On .*", customer.find("#outlook").text)
    assert customer.find(".period p").text.startswith("13,361 / 12,000 included")
    assert customer.find("#count").text == "1–25 of 148, newest first"
    assert len(customer.events()) == 25
    customer.find("#reservations").click()
    assert customer.find("#reservations").text == "3 runs hold 828"
    assert customer.texts("[aria-labelledby=reservations] tbody th") == ["run-47", "run-48", "run-49"]


def test_a_customer_sees_what_used_the_credits_and_follows_it(customer: Person) -> None:
    assert customer.find("#used").text == "Used 13,361"
    assert [text.split("\n")[0] for text in customer.texts("[aria-labelledby=by-project] li")] == [
        "crm",
        "website",
        "search",
    ]
    bars = customer.driver.find_elements(By.CSS_SELECTOR, ".bars g")
    assert len(bars) >= 8
    assert all(bar.size["height"] > 0 for bar in bars)
    customer.click("crm")
    assert customer.find("#sum").text == "49 events, sum −4,978 credits"
    assert customer.find("#project_id").get_attribute("value") == "crm"
    customer.click("Train ranking")
    assert set(customer.texts("tr[data-event] .activity")) == {"Train ranking"}
    assert customer.find(".choice input[name=activity_name]").is_selected()
    customer.click("Clear")
    assert customer.find("#count").text == "1–25 of 148, newest first"


def test_a_customer_whose_run_was_refused_finds_out_why_and_what_to_do(running: Installation, person: Person) -> None:
    """Ann's nightly export did not run. She looks at the page, tops up, and sees that it can be started again."""

    def initech(task: str, **fields: Any) -> None:
        apply_batch(running.engine, [delivery(task, org_id="initech", **fields)])

    initech("wallet.purchase", purchase_id="first", credits=1_000)
    for number in range(9):
        initech("workflow.finish", workflow_id=f"export-{number}", credits=100, activity_name="Nightly export")
    initech("workflow.start", workflow_id="export-9", credits=350, activity_name="Nightly export")

    person.sign_in(token(sub="ann@initech.example", orgs=["initech"]), HISTORY.replace("acme", "initech"))
    assert person.texts(".banner p") == [
        "A run was refused. Top up at least 250 credits, then start it again, as a new run.",
        person.texts(".banner .refused")[0],
    ]
    assert re.fullmatch(
        r"The run export-9, estimated at 350, was refused on \d+ \w{3} at [\d:]{8}: too few credits were available\.",
        person.find(".banner .refused").text,
    )
    run = person.find(".banner a")
    assert run.get_attribute("href") == f"{person.address}/organizations/initech/runs/export-9"
    buy = person.driver.find_element(By.LINK_TEXT, "Buy credits")
    assert buy.get_attribute("href") == "https://billing.example.com/credits"

    initech("wallet.purchase", purchase_id="second", credits=250)
    person.driver.refresh()
    assert person.find(".equation").text == "350 available = 350 prepaid"
    assert person.find(".banner p").text == (
        "A run was refused. There is room for it now: start it again, as a new run."
    )
    initech("workflow.start", workflow_id="export-10", credits=350, activity_name="Nightly export")
    person.driver.refresh()
    assert person.find(".banner.urgent p").text == ("There are no credits. New runs are refused until you top up.")


def test_a_wrong_token_is_told_and_the_right_one_leads_on(person: Person) -> None:
    person.open(HISTORY)
    before = person.find("html")
    person.find("#token").send_keys("nonsense", Keys.ENTER)
    person.wait_for_page_after(before)
    assert person.find("#wrong").text == "The token is not valid."
    person.find("#token").send_keys(token(), Keys.ENTER)
    person.wait_for(HISTORY)
    assert [complaint.endswith("401 (Unauthorized)") for complaint in eventually(person.complaints)] == [True]


def test_a_customer_filters_the_events(customer: Person) -> None:
    customer.find(".more summary").click()
    customer.find("[value=usage]").click()
    customer.find("#project_id").send_keys("crm")
    customer.click("Apply filter")
    assert set(customer.texts("tr[data-event] .type")) == {"Usage"}
    assert set(customer.texts("tr[data-event] .project")) == {"crm"}
    assert customer.find("#count").text == "1–16 of 16, newest first"
    assert customer.find("[aria-label=Kind] [aria-current]").text == "Usage"
    assert not customer.find("[value=usage]").is_displayed()  # a kind needs none of the less usual fields
    assert customer.find("[value=usage]").is_selected()
    assert customer.find("#project_id").get_attribute("value") == "crm"
    customer.click("Clear")
    assert customer.find("#count").text == "1–25 of 148, newest first"


def test_a_customer_follows_a_workflow_and_mistypes_a_filter(customer: Person) -> None:
    customer.find("#search").send_keys("run-46")
    customer.click("Search")
    assert customer.texts("tr[data-event] .workflow") == ["run-46"] * 3
    customer.open(f"{LEDGER}&type=usage")
    assert customer.texts(".alert li") == ["type is not a filter; did you mean event_type?"]
    assert customer.events() == []
    assert ["422" in complaint for complaint in eventually(customer.complaints)] == [True]
    customer.open(f"{LEDGER}&date_to=tomorrow")
    assert customer.find("#date_to-wrong").text == "Enter a date like 31 Jan 2026."
    assert customer.find("#date_to").get_attribute("value") == "tomorrow"
    customer.find("#date_to").clear()
    customer.find("#date_to").send_keys("31 Jan 2099")
    customer.click("Apply filter")
    assert ["422" in complaint for complaint in eventually(customer.complaints)] == [True]
    assert len(customer.events()) == 25


def test_a_customer_finds_out_what_a_run_cost_and_what_came_back(running: Installation, person: Person) -> None:
    messages: list[tuple[str, dict[str, Any]]] = [
        ("wallet.purchase", {"purchase_id": "order-1", "credits": 1_000}),
        ("workflow.start", {"workflow_id": "wf_77", "credits": 129, "project_id": "churn", "activity_name": "Train"}),
        ("workflow.finish", {"workflow_id": "wf_77", "credits": 66}),
        ("wallet.grant", {"grant_id": "sorry", "credits": 5}),
        ("wallet.refund", {"refund_id": "SUP-8821", "credits": 20, "workflow_id": "wf_77", "source": "support"}),
    ]
    apply_batch(running.engine, [delivery(task, org_id="with-runs", **fields) for task, fields in messages])
    person.sign_in(token(orgs=["with-runs"]), HISTORY.replace("acme", "with-runs"))
    assert person.texts("tr[data-receipt] .what") == ["Train wf_77", "Grant · sorry", "Purchase · order-1"]
    assert person.texts("tr[data-receipt] .credits") == ["−46", "+5", "+1,000"]
    opened = person.find("tr[data-receipt] details")
    assert opened.text == "used 66 of 129 held, 20 refunded"
    person.driver.execute_script("arguments[0].focus()", opened.find_element(By.TAG_NAME, "summary"))
    person.press(Keys.ENTER)
    steps = [text.split("\n")[-2:] for text in person.texts("tr[data-receipt] .steps li")]
    assert steps == [["Held", "−129"], ["Returned", "+129"], ["Used", "−66"], ["Refund", "+20"]]
    person.click("Ledger")
    person.click("wf_77")  # of the refund, which is the newest event
    person.wait_for("/organizations/with-runs/runs/wf_77")
    assert person.find(".sentence").text == "It used 66 of the 129 that were held for it. 20 were refunded."
    assert person.texts("tr[data-event] .lead") == ["Held", "Returned", "Used", "Refund · SUP-8821"]
    assert person.texts("tr[data-event] .source")[-1] == "support"
    assert person.texts("tr[data-event] td:last-child") == ["871", "1,000", "934", "959"]
    person.click("← Credit history")
    person.wait_for(HISTORY.replace("acme", "with-runs"))


def test_a_customer_reads_on_to_older_events_and_back(customer: Person) -> None:
    customer.click("100 events on a page")
    newest = customer.events()
    customer.click("Older →")
    assert customer.events() == list(range(48, 0, -1))
    assert customer.find("#count").text == "101–148 of 148, newest first"
    customer.click("← Newer")
    assert customer.events() == newest == list(range(148, 48, -1))


def test_a_customer_downloads_what_is_filtered(customer: Person, downloads: Path) -> None:
    customer.find(".more summary").click()
    customer.find("[value=prepaid_purchase]").click()
    customer.click("Apply filter")
    customer.find(".download").click()
    file = downloads / "credit-history-acme.csv"
    eventually(lambda: file.exists() and file.stat().st_size > 0)
    header, *lines = file.read_text(encoding="utf-8").splitlines()
    assert header.startswith("created_at,event_type,source,project_id,activity_name,credits,")
    assert [line.split(",")[1] for line in lines] == ["prepaid_purchase", "prepaid_purchase"]


def test_long_metadata_opens_without_a_script(customer: Person) -> None:
    metadata = customer.find("tr[data-event='148'] .metadata details")
    assert "word word" not in metadata.text
    metadata.find_element(By.TAG_NAME, "summary").click()
    assert '"reason": "<b>sorry</b> for the trouble"' in metadata.text
    assert customer.width_needed() == 1280


def test_a_customer_signs_out(customer: Person) -> None:
    customer.find(".account button").click()
    customer.wait_for("/signin")
    assert customer.driver.get_cookies() == [
        cookie for cookie in customer.driver.get_cookies() if cookie["name"] == "holdfast_signin"
    ]
    customer.open(HISTORY)
    assert customer.find("h1").text == "Sign in to Holdfast"


def test_a_link_asks_before_it_replaces_a_session_and_then_signs_in(customer: Person) -> None:
    link = f"/signin?token={token(sub='eve')}&next={HISTORY}"
    customer.open(link)
    customer.click("Stay signed in as ann@acme.example")
    assert customer.find(".who").text.endswith("ann@acme.example")
    customer.open(link)
    customer.click("Sign in as eve")
    customer.wait_for(HISTORY)
    assert customer.find(".who").text.endswith("eve")


def test_a_link_signs_in_at_one_click_and_on_another_site_at_two(person: Person) -> None:
    link = f"/signin?token={token()}&next={HISTORY}"
    person.driver.get(f"data:text/html,<main><a href='{person.address}{link}'>Look here</a></main>")
    person.click("Look here")
    assert person.find("h1").text == "Sign in to Holdfast?"
    person.click("Sign in as ann")
    person.wait_for(HISTORY)
    person.find(".account button").click()
    person.wait_for("/signin")
    person.open(link)
    person.wait_for(HISTORY)


# How it is used without a mouse, and heard


def test_the_first_key_skips_to_the_content(customer: Person) -> None:
    skip = customer.press(Keys.TAB)
    assert (skip.text, skip.is_displayed()) == ("Skip to content", True)
    assert customer.press(Keys.ENTER, Keys.TAB).text == "Buy credits"


def test_the_keyboard_reaches_everything_and_shows_where_it_is(customer: Person) -> None:
    seen, outlines = [], set()
    for _ in range(60):
        focused = customer.press(Keys.TAB)
        seen.append(focused.get_attribute("name") or focused.text.split("\n")[0])
        outlines.add(
            customer.driver.execute_script(
                "return getComputedStyle(arguments[0].closest('.choice') || arguments[0]).outlineStyle", focused
            )
        )
        if seen[-1] == "Older →":
            break
    assert seen == [
        *("Skip to content", "Holdfast", "Credit history", "Sign out", "Buy credits", "3 runs hold 828"),
        *("crm", "website", "search", "Train ranking", "Import contacts", "Weekly report", "Render video"),
        *("Available balance", "Activity", "Ledger", "This period", "30 days", "All"),
        *("Every kind", "Usage", "Top-ups & plan", "Corrections", "Holds"),
        *("project_id", "search", "Search", "More", "Download as CSV", "Older →"),
    ]
    assert outlines == {"solid"}


def test_the_keyboard_alone_filters(customer: Person) -> None:
    project = customer.find("#project_id")
    customer.driver.execute_script("arguments[0].focus()", project)
    before = customer.find("html")
    customer.press("search", Keys.TAB, Keys.TAB, Keys.TAB, Keys.SPACE)
    assert customer.press(*[Keys.TAB] * 11).get_attribute("value") == "usage"
    customer.press(Keys.SPACE, Keys.ENTER)
    customer.wait_for_page_after(before)
    assert set(customer.texts("tr[data-event] .type")) == {"Usage"}
    assert set(customer.texts("tr[data-event] .project")) == {"search"}


def test_a_screen_reader_finds_its_way(customer: Person) -> None:
    tree = customer.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [(node["role"]["value"], node["name"]["value"]) for node in tree if "name" in node and not node["ignored"]]
    roles = [role for role, _ in nodes]
    for landmark in ("banner", "main", "contentinfo"):
        assert roles.count(landmark) == 1
    assert [name for role, name in nodes if role == "heading"] == [
        "Credit history of acme · Team 12,000",
        "Wallet",
        "Used 13,361",
        "By project",
        "By activity",
        "Filter",
        "Events",
    ]
    assert ("navigation", "Main") in nodes
    assert ("navigation", "Views") in nodes
    assert ("navigation", "Pages, above the table") in nodes
    assert ("table", "Events of the credit history, newest first; times in UTC") in nodes
    assert ("columnheader", "Prepaid balance") in nodes
    assert ("navigation", "Period") in nodes
    assert ("navigation", "Kind") in nodes
    chart = next(name for role, name in nodes if role in ("image", "img"))
    assert chart.startswith("Bar chart of the credits used each day, by project The most in a day: ")
    for role, name in nodes:
        assert name or role not in ("textbox", "checkbox", "button", "link", "combobox", "Date")


# On a phone, and at night


@pytest.mark.parametrize("width", [320, 360])
@pytest.mark.parametrize(
    "query",
    [
        "",
        "?view=ledger",
        "?view=ledger&event_type=grant",
        "?type=grant",
        "?date_from=x&event_type=" + "y" * 200,
        "?project_id=none",
    ],
)
def test_nothing_sticks_out_of_a_phone(customer: Person, query: str, width: int) -> None:
    customer.hold_phone(width)
    customer.open(HISTORY + query)
    for columns in ("the usual", "every"):
        customer.driver.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert customer.width_needed() == width, columns
        assert customer.driver.execute_script(STICKING_OUT) == 0, columns
        customer.driver.execute_script("document.querySelectorAll('.every-column input').forEach(e => e.click())")
    assert all("422 (Unprocessable Entity)" in complaint for complaint in customer.complaints())


@pytest.mark.parametrize(("width", "highest"), [(320, 3_600), (390, 3_300)])
def test_a_page_of_events_is_short_on_a_phone_and_has_every_column_at_a_tap(
    customer: Person, width: int, highest: int
) -> None:
    customer.hold_phone(width)
    customer.open(LEDGER)
    assert len(customer.events()) == 25
    assert customer.height() <= highest
    row = customer.find("tr[data-event='147']")
    assert row.size["height"] <= 56  # two lines
    when, *others = [each for each in customer.texts("tr[data-event='147'] td") if each]
    assert re.fullmatch(r"\d+ \w{3} \d\d:\d\d:\d\d", when)
    assert others == ["Reservation", "crm", "Import contacts", "−313"]
    customer.find(".every-column").click()
    shown = [each for each in customer.texts("tr[data-event='147'] td") if each]
    assert shown[1:-1] == [
        "Reservation",
        "workflow-engine",
        "run-49",
        "crm",
        "Import contacts",
        "−313",
        "11,639",
        "13,361",
    ]


def test_on_a_laptop_the_history_begins_above_the_fold(running: Installation, customer: Person) -> None:
    customer.hold_phone(1440, 900)
    for path, heading in ((HISTORY, "#activity"), (LEDGER, "#events")):
        customer.open(path)
        assert customer.find(heading).rect["y"] < 900


@pytest.mark.parametrize("width", [768, 1024, 1280, 1440])
def test_no_column_is_cut_where_there_is_a_table(customer: Person, width: int) -> None:
    customer.hold_phone(width, 900)
    customer.open(LEDGER)
    for column in ("created_at", "credits", "period_usage_after", "metadata"):
        right = customer.driver.execute_script(
            "return document.querySelector(arguments[0]).getBoundingClientRect().right", f"[data-column={column}]"
        )
        assert 0 < right <= width, column
    heads, cells = (
        customer.driver.execute_script(
            "return [...arguments[0].children].map(cell => Math.round(cell.getBoundingClientRect().right))",
            customer.find(row),
        )
        for row in (".events thead tr", "tr[data-event='147']")
    )
    assert heads[6:9] == cells[6:9]  # amounts stand under their headings
    assert customer.width_needed() == width
    customer.driver.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert customer.driver.execute_script(HIDDEN) == []


@pytest.mark.parametrize("width", widths(320, 1280, more=[360]))
def test_the_longest_names_stick_out_of_nothing(running: Installation, person: Person, width: int) -> None:
    org_id = "W" * 128
    fields = {"workflow_id": "M" * 128, "project_id": "W" * 128, "activity_name": "M" * 128, "source": "W" * 64}
    messages = [
        ("wallet.subscribe", {"subscription_id": "W" * 128, "version": 1, "plan": "W" * 256, "monthly_credits": 1_000}),
        ("wallet.purchase", {"purchase_id": "W" * 128, "credits": 2_000_000}),
        ("workflow.start", {**fields, "credits": 1_000_000, "metadata": {"M" * 50: 1}}),
        ("wallet.bill", {"billing_id": "W" * 128, "credits": 1, "invoice_id": "M" * 128}),
        ("wallet.refund", {"refund_id": "M" * 128, "credits": 10**12, "workflow_id": "W" * 128}),
        ("W" * 128, {}),
    ]
    apply_batch(running.engine, [delivery(task, org_id=org_id, **fields) for task, fields in messages])
    numbers = sql(running.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id", org_id=org_id)
    both = token(orgs=[org_id], scope="credits:read operator", sub="ann@" + "w" * 128)
    person.hold_phone(width)
    person.sign_in(both, HISTORY.replace("acme", org_id))
    person.find("#reservations").click()
    assert person.texts("[aria-labelledby=reservations] tbody th") == ["M" * 128]
    assert len(numbers) >= 2
    history, ledger = HISTORY.replace("acme", org_id), LEDGER.replace("acme", org_id)
    run = f"/organizations/{org_id}/runs/{'M' * 128}"
    of_letters = "/operators", LETTERS, ONE_BY_ONE, *(f"{LETTERS}/{number}" for (number,) in numbers)
    for path in (history, ledger, run, *of_letters, "/"):
        person.open(path)
        person.driver.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert person.width_needed() == width, path
        assert person.driver.execute_script(STICKING_OUT) == 0, path
        assert person.driver.execute_script(HIDDEN) == [], path


@pytest.mark.parametrize("credits", [45, 1_246_567_890, 999_998_020_172])
def test_no_number_is_broken_on_any_screen(running: Installation, person: Person, credits: int) -> None:
    org_id = f"has-{credits}"
    workflow = {"workflow_id": "run", "credits": credits // 3}
    messages: list[tuple[str, dict[str, Any]]] = [
        ("wallet.configure", {"version": 1, "credit_limit": credits, "period_cap": credits}),
        ("wallet.subscribe", {"subscription_id": "s", "version": 1, "plan": "Team", "monthly_credits": credits}),
        ("wallet.purchase", {"purchase_id": "p", "credits": credits}),
        ("workflow.finish", workflow),
        ("workflow.start", {**workflow, "workflow_id": "next"}),
    ]
    if credits > 10**11:  # more than one message brings
        messages += [("wallet.purchase", {"purchase_id": f"p{n}", "credits": 10**12}) for n in range(9_000)]
    apply_batch(running.engine, [delivery(task, org_id=org_id, **fields) for task, fields in messages])
    person.sign_in(token(orgs=[org_id]), HISTORY.replace("acme", org_id))
    used = f"{credits // 3:,}"
    assert person.texts(".wallet strong")[2:] == [f"{credits - credits // 3:,}", used, used]
    for width in (320, 360, 500, 620, 768, 1024, 1280):
        person.hold_phone(width)
        assert (width, person.driver.execute_script(BROKEN), person.width_needed()) == (width, [], width)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_ends_of_a_chart_are_told_on_any_screen(customer: Person, width: int) -> None:
    customer.hold_phone(width)
    customer.find("#course").click()
    for chart, form in ((".bars", r"\d+ \w{3}"), ("details .chart", r"\d+ \w{3} \d\d:\d\d:\d\d")):
        begins, ends = customer.texts(f"{chart} .times > span")
        assert begins != ends
        assert re.fullmatch(form, begins)
        assert re.fullmatch(form, ends)


@pytest.mark.parametrize(
    ("path", "heading", "sentence"),
    [
        ("/none", "There is no such page", "Check the address. If a link led you here, tell whoever gave it to you."),
        (
            "/signout",
            "This is not an address to open",
            "A button of another page leads here. Go back, and use that button.",
        ),
        (
            "/organizations/other/credit-history",
            "There is no such organization, or it is not yours",
            "Check the address. If it is your organization, ask whoever gave you the link for one that opens it.",
        ),
    ],
)
def test_what_goes_wrong_is_a_page_that_leads_on(customer: Person, path: str, heading: str, sentence: str) -> None:
    customer.hold_phone()
    customer.open(path)
    assert (customer.find("h1").text, customer.find("h1 + p").text) == (heading, sentence)
    assert customer.width_needed() == 360
    customer.click("Go to the start page")
    customer.wait_for(HISTORY)
    assert all("Failed to load resource" in complaint for complaint in customer.complaints())


def test_on_a_phone_the_table_is_still_a_table_for_who_listens(customer: Person) -> None:
    customer.hold_phone()
    customer.open(f"{LEDGER}&event_type=grant")
    tree = customer.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [node["role"]["value"] for node in tree if not node["ignored"]]
    assert roles.count("row") == 1 + 1
    assert roles.count("cell") == 3  # when, what, and how much: a grant has no project and no activity
    customer.find(".every-column").click()
    tree = customer.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    assert [node["role"]["value"] for node in tree if not node["ignored"]].count("cell") == 7


@pytest.mark.parametrize("width", [600, 820, 1024])
def test_a_wide_table_scrolls_within_its_own_region(customer: Person, width: int) -> None:
    customer.hold_phone(width)
    for path in (HISTORY, LEDGER, "/organizations/acme/runs/run-46"):
        customer.open(path)
        assert customer.width_needed() == width


# On paper

PAPER = {"paperWidth": 8.27, "paperHeight": 11.69}
"""A4, in inches."""


def printed(person: Person) -> bytes:
    """The page as a PDF file."""
    return base64.b64decode(person.driver.execute_cdp_cmd("Page.printToPDF", PAPER)["data"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_twenty_five_events_are_two_pages_of_paper(customer: Person, scheme: str) -> None:
    customer.prefer(scheme)
    for path in (HISTORY, LEDGER):
        customer.open(path)
        pages = re.findall(rb"/Type\s*/Page\b(?!s)", printed(customer))
        assert 1 <= len(pages) <= 2, path


def test_paper_is_black_on_white_and_has_the_organization_the_range_and_a_table(customer: Person) -> None:
    customer.open(f"{LEDGER}&date_from=2026-01-01&event_type=usage&project_id=crm")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    customer.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    colors = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    assert customer.driver.execute_script(colors) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert customer.find("main h1").text.startswith("Credit history of")
    assert re.fullmatch(
        r"Events: from 1 Jan 2026; types: Usage; project: crm. Printed on \d{1,2} \w{3} \d{4} \d\d:\d\d:\d\d UTC.",
        customer.find(".on-paper").text,
    )
    displays = (
        "return arguments[0].map(each => [...document.querySelectorAll(each)].map(e => getComputedStyle(e).display))"
    )
    shown, hidden = (
        ["tr[data-event]", ".events thead"],
        ["form", "nav", ".filter", ".pager", ".download", "header.site"],
    )
    rows, heads = customer.driver.execute_script(displays, shown)
    assert (set(rows), heads) == ({"table-row"}, ["table-header-group"])
    left = customer.driver.execute_script(displays, [f"{each}:not(header *)" for each in hidden])
    assert {display for displays_of_one in left for display in displays_of_one} == {"none"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(customer: Person, scheme: str) -> None:
    customer.prefer(scheme)
    paths = HISTORY, f"{LEDGER}&event_type=usage&project_id=crm", f"{HISTORY}?limit=0", "/organizations/none", "/none"
    for path in (*paths, "/organizations/acme/runs/run-46"):
        customer.open(path)
        ratio, text = customer.driver.execute_script(CONTRAST)
        assert ratio >= 4.5, (path, text, ratio)
    assert all("Failed to load resource" in complaint for complaint in customer.complaints())


def test_the_night_is_dark(customer: Person) -> None:
    color = "return getComputedStyle(document.body).backgroundColor"
    customer.prefer("light")
    assert customer.driver.execute_script(color) == "rgb(245, 247, 247)"
    customer.prefer("dark")
    assert customer.driver.execute_script(color) == "rgb(14, 20, 20)"


# What an operator does


@pytest.fixture
def letter(running: Installation, request: pytest.FixtureRequest) -> str:
    """The address of a dead letter that is this test's own: a refund that comes before the usage it gives back."""
    org_id = request.node.name.replace("_", "-")[:100]
    refund = delivery("wallet.refund", org_id=org_id, refund_id="r", credits=5, workflow_id="w")
    apply_batch(running.engine, [refund])
    [(number,)] = sql(running.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id", org_id=org_id)
    return f"{LETTERS}/{number}"


@pytest.fixture
def operator(person: Person) -> Person:
    person.sign_in(operator_token(), LETTERS)
    return person


def test_an_operator_replays_what_can_be_applied_now(
    running: Installation, operator: Person, letter: str, request: pytest.FixtureRequest
) -> None:
    org_id = request.node.name.replace("_", "-")[:100]
    operator.open(letter)
    operator.click("Replay the message")
    assert "The message was sent and failed again: " in operator.find("#failure").text
    assert operator.texts(".title .status") == ["Open"]
    assert [complaint.endswith("409 (Conflict)") for complaint in eventually(operator.complaints)] == [True]
    apply_batch(running.engine, [delivery("workflow.finish", org_id=org_id, workflow_id="w", credits=5)])
    operator.click("Replay the message")
    assert operator.texts(".title .status") == ["Replayed"]
    assert (operator.find("#resolved-by").text, operator.find("#resolution").text) == ("olga", "posted")
    events = sql(
        running.engine, "SELECT event_type FROM credit_events WHERE org_id = :org_id ORDER BY seq", org_id=org_id
    )
    assert events == [("usage",), ("refund",)]


def test_an_operator_discards_with_a_reason(letter: str, operator: Person) -> None:
    operator.click("one by one")
    operator.click(f"Dead letter {letter.rpartition('/')[2]}")
    operator.find("#reason").send_keys("sent by mistake")
    operator.click("Discard the message")
    assert operator.texts(".title .status") == ["Discarded"]
    assert (operator.find("#resolved-by").text, operator.find("#resolution").text) == ("olga", "sent by mistake")
    operator.click("← Dead letters")
    operator.driver.find_element(By.PARTIAL_LINK_TEXT, "Discarded").click()
    operator.click("one by one")
    assert letter.rpartition("/")[2] in [text.split()[-1] for text in operator.texts("tbody th")]


INCIDENT = 60


@pytest.fixture
def incident(running: Installation, request: pytest.FixtureRequest) -> Iterator[str]:
    """An organization of this test's own, and nobody else, of which sixty purchases could not be applied."""
    sql(running.engine, "DELETE FROM dead_letters")
    org_id = request.node.name.replace("_", "-").replace("[", "-").rstrip("]")[:60]
    purchases = [
        delivery("wallet.purchase", org_id=org_id, purchase_id=f"order-{number}", credits=f"{number},5")
        for number in range(INCIDENT)
    ]
    apply_batch(running.engine, purchases)
    yield org_id
    sql(running.engine, "DELETE FROM dead_letters")


def test_an_operator_clears_an_incident_of_sixty_letters_in_four_clicks(
    running: Installation, person: Person, incident: str
) -> None:
    person.open("/")
    person.find("#token").send_keys(operator_token(), Keys.ENTER)
    person.wait_for("/operators")
    assert person.texts("[data-part=letters] li strong") == [str(INCIDENT)]
    clicks = iter((f"{incident} · wallet.purchase: credits must be an integer", f"Discard all {INCIDENT}"))
    person.click(next(clicks))
    assert person.texts("h1") == ["credits must be an integer"]
    assert person.find("button.primary").text == f"Discard all {INCIDENT}"
    assert f'"org_id": "{incident}"' in person.find("pre").text
    person.find("#reason").send_keys("the sender is fixed, and has sent them again")
    person.click(next(clicks))
    assert person.find("#progress").text == f"{INCIDENT} of {INCIDENT} discarded."
    person.click("Next: dead letters by cause")
    assert person.texts(".nothing strong") == ["No dead letters are open."]
    marks = sql(running.engine, "SELECT DISTINCT status, resolved_by, resolution FROM dead_letters")
    assert marks == [("discarded", "olga", "the sender is fixed, and has sent them again")]


def test_a_reason_that_is_missing_is_said_at_its_field(operator: Person, letter: str) -> None:
    operator.open(letter)
    field = operator.find("#reason")
    field.send_keys("   ")
    operator.click("Discard the message")
    field = operator.find("#reason")
    described = operator.find(f"#{field.get_attribute('aria-describedby')}")
    assert described.text == "Say why, in a sentence: it is recorded with your name."
    assert operator.driver.switch_to.active_element == field
    assert field.get_attribute("value") == "   "
    eventually(operator.complaints)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", widths(320, 1024, more=[360, 768]))
def test_the_operators_pages_are_readable_everywhere(
    running: Installation, operator: Person, incident: str, letter: str, scheme: str, width: int
) -> None:
    operator.prefer(scheme)
    operator.hold_phone(width)
    plan = {"subscription_id": "s", "plan": "Team", "monthly_credits": 10**12, "anchor": "2026-01-31T00:00:00Z"}
    other = plan | {"anchor": "2026-01-30T00:00:00Z", "monthly_credits": 1}
    versions = [delivery("wallet.subscribe", org_id=incident, version=1, **each) for each in (plan, other)]
    apply_batch(running.engine, versions)
    [(conflict,)] = sql(running.engine, "SELECT id FROM dead_letters WHERE error_code = 'conflict'")
    group = f"{LETTERS}?status=open&org_id={incident}&task=wallet.purchase&code=invalid_message&cause="
    group += "credits+must+be+an+integer"
    for path in ("/operators", LETTERS, ONE_BY_ONE, group, letter, f"{LETTERS}/{conflict}", f"{LETTERS}?code=x"):
        operator.open(path)
        operator.driver.execute_script("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert operator.width_needed() == width, path
        assert operator.driver.execute_script(STICKING_OUT) == 0, path
        ratio, text = operator.driver.execute_script(CONTRAST)
        assert ratio >= 5, (path, text, ratio)
    assert all("Failed to load resource" in complaint for complaint in operator.complaints())


# For the README


@pytest.mark.skipif(SCREENSHOT is None, reason="HOLDFAST_TEST_SCREENSHOT does not say where to write the picture")
def test_the_picture_of_the_readme(running: Installation, person: Person) -> None:
    assert SCREENSHOT is not None
    copy_over_nine_days(running.engine, "northwind")
    person.sign_in(token(sub="ann@northwind.example", orgs=["northwind"]), HISTORY.replace("acme", "northwind"))
    clip = {"x": 0, "y": 0, "width": 1280, "height": 1240, "scale": 1}
    picture = person.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    content = base64.b64decode(picture["data"])
    assert len(content) <= 250_000
    Path(SCREENSHOT).write_bytes(content)


def copy_over_nine_days(engine: Engine, org_id: str) -> None:
    """Give another organization the history of acme, as if it had taken days and not a second."""
    back = "now() - (148 - seq) * INTERVAL '87 minutes'"
    times = {
        "wallets": "NULL",
        "subscriptions": "NULL",
        "credit_events": f"""
            jsonb_build_object('created_at', {back}, 'metadata', CASE event_type WHEN 'reservation'
              THEN jsonb_build_object('expires_at', {back} + INTERVAL '1 day') ELSE metadata END)
        """,
        "workflows": """
            (SELECT jsonb_build_object('expires_at', created_at + INTERVAL '1 day') FROM credit_events
             WHERE org_id = :org_id AND idempotency_key = 'start:' || copied.workflow_id)
        """,
    }
    for table, changes in times.items():
        sql(
            engine,
            f"""
            INSERT INTO {table} SELECT (jsonb_populate_record(
              copied, jsonb_build_object('org_id', CAST(:org_id AS text)) || COALESCE({changes}, '{{}}'::jsonb))).*
            FROM {table} copied WHERE org_id = 'acme'
            """,
            org_id=org_id,
        )


# Support gives back the credits of a failed run


def test_support_gives_back_the_credits_of_a_failed_run(person: Person) -> None:
    person.sign_in(token(sub="olga", orgs="*", scope="credits:read operator"), "/operators/organizations")
    before = person.find("html")
    person.find("#q").send_keys("run-46", Keys.ENTER)
    person.wait_for_page_after(before)
    [run] = person.texts("[aria-labelledby=runs] li")
    assert " ".join(run.split()).startswith("run-46 of acme settled, used 198 ")

    person.click("Refund")
    assert person.find("#workflow_id").get_attribute("value") == "run-46"
    assert person.find("#credits").get_attribute("value") == "198"
    person.click("Preview")
    assert person.find("#why-wrong").text == "Say why, in a few words."
    assert ["422" in complaint for complaint in eventually(person.complaints)] == [True]
    person.find("#why").send_keys("SUP-8821: it failed")
    person.click("Preview")
    available, *_ = person.texts("[data-change] dd")
    assert available.split() == ["11,061", "→", "becomes", "11,259"]
    assert "Refund +198" in person.find("main").text

    person.click("Refund a run")
    assert person.find("#done").text.startswith("✓ Refunded 198 to the run run-46; ")
    address = person.driver.current_url
    person.driver.refresh()
    assert (person.driver.current_url, person.find("#done").text[:1]) == (address, "✓")

    person.open(f"{HISTORY}?workflow_id=run-46")
    assert "SUP-8821: it failed" in str(person.find("main").get_attribute("textContent"))  # also what opens at a click
    person.open("/operators/audit?kind=refund")
    [listed] = person.texts("[data-action]")
    assert all(said in listed for said in ("olga", "acme", "+198", "SUP-8821: it failed"))

    person.driver.delete_all_cookies()
    person.sign_in(token(sub="ann@acme.example"), f"{HISTORY}?workflow_id=run-46")
    assert "SUP-8821: it failed" in str(person.find("main").get_attribute("textContent"))  # also what opens at a click


@pytest.mark.parametrize("width", widths(320, 1024, more=[390, 768, 1440]))
def test_the_console_fits_every_screen_and_can_be_read_by_night(person: Person, width: int) -> None:
    person.sign_in(token(sub="olga", orgs="*", scope="credits:read operator"), "/operators/organizations")
    organization = "/operators/organizations/acme"
    for path in (
        *("/operators/organizations", "/operators/search?q=run-46", "/operators/search?q=acne", organization),
        *(f"{organization}/grant", f"{organization}/reverse", "/operators/audit"),
    ):
        for scheme in ("light", "dark"):
            person.hold_phone(width, 900)
            person.prefer(scheme)
            person.open(path)
            assert (path, person.driver.execute_script(STICKING_OUT), person.width_needed()) == (path, 0, width)
            worst, text = person.driver.execute_script(CONTRAST)
            assert worst >= 5, (path, scheme, text)
    assert all("404" in complaint for complaint in person.complaints())  # of the name that nobody has
