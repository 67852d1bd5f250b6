"""Somebody in finance reconciles some days: the page, its file, the usage and the totals have to agree."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from selenium.webdriver import Chrome

from ledger.wording import amount
from tests.acceptance.commands import run
from tests.acceptance.test_browser import CHROMIUM, DRIVER, Person, chrome, downloads  # noqa: F401 - fixtures
from tests.acceptance.website import history_of, served, token
from tests.installation import Installation
from tests.support import eventually
from worker.local import weeks

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)

CUSTOMERS = (weeks.ORGANIZATION, weeks.OVERDRAWN)
NOW = datetime.now(UTC)
FIRST, LAST = (f"{NOW - timedelta(days=days):%Y-%m-%d}" for days in (12, 2))


@pytest.fixture(scope="module")
def address(ledger: Installation) -> Iterator[str]:
    weeks.tell(ledger.engine, NOW)
    with served(ledger.database_url, ledger.broker_url) as address:
        yield address


@pytest.fixture
def finance(chrome: Chrome, address: str) -> Person:  # noqa: F811 - the fixture
    person = Person(chrome, address)
    person.open("/signin")
    chrome.delete_all_cookies()
    person.sign_in(token(sub="finn", orgs=list(CUSTOMERS)), history_of(CUSTOMERS[0]))
    return person


def test_the_page_its_file_the_usage_and_the_totals_agree(
    finance: Person,
    ledger: Installation,
    downloads: Path,  # noqa: F811
) -> None:
    events: list[dict[str, str]] = []
    for org_id in CUSTOMERS:
        finance.open(f"{history_of(org_id)}?view=ledger&date_from={FIRST}&date_to={LAST}")
        counted = finance.find("#count").text
        of_customer = downloaded(finance, downloads / f"credit-history-{org_id}.csv")
        assert f"of {len(of_customer):,}" in counted
        assert all(FIRST <= event["created_at"][:10] <= LAST for event in of_customer)
        used = -sum(int(event["credits"]) for event in of_customer if event["event_type"] == "usage")
        file = run("usage", org_id, "--from", FIRST, "--to", LAST, "--by", "project", "--csv", env=ledger.environment)
        assert used == sum(int(line["credits"]) for line in csv.DictReader(io.StringIO(file.stdout)))
        assert file.stdout == usage_over_http(finance.address, org_id)
        events += of_customer
    shown = run("totals", "--from", FIRST, "--to", LAST, "--json", env=ledger.environment)
    totals = json.loads(shown.stdout)["events"]
    assert sum_by_type(events) == {
        event_type: sum(each["credits"] for each in totals if each["event_type"] == event_type)
        for event_type in {each["event_type"] for each in totals if each["events"]}
    }


def test_all_that_ever_happened_adds_up_to_what_is_available(
    finance: Person,
    ledger: Installation,
    downloads: Path,  # noqa: F811
) -> None:
    for org_id in CUSTOMERS:
        finance.open(history_of(org_id))
        whole = downloaded(finance, downloads / f"credit-history-{org_id}.csv")
        available = sum(int(event["credits"]) for event in whole)
        assert amount(available) in finance.find("main").text
        told = run("wallet", org_id, env=ledger.environment).stdout
        assert told.startswith(f"{amount(available)} available = ")


def downloaded(person: Person, file: Path) -> list[dict[str, str]]:
    """The events of the file that the page offers."""
    file.unlink(missing_ok=True)
    person.find(".download").click()
    eventually(lambda: file.exists() and file.stat().st_size > 0)
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))


def usage_over_http(address: str, org_id: str) -> str:
    read = httpx.get(
        f"{address}/api/organizations/{org_id}/usage.csv",
        params={"group_by": "project", "date_from": FIRST, "date_to": LAST},
        headers={"Authorization": f"Bearer {token(orgs=[org_id])}"},
    )
    assert read.status_code == 200
    return read.text


def sum_by_type(events: list[dict[str, str]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for event in events:
        sums[event["event_type"]] += int(event["credits"])
    return dict(sums)
