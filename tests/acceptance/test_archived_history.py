"""A customer whose older events are in the archive: the page, the run, the file and the API say where they are."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from holdfast_client.messages import InvalidMessage, parse
from ledger import archive
from ledger.store import apply_past
from ledger.wording import day
from tests.acceptance.website import LEDGER, Visitor, history_of, link, text_of, token
from tests.installation import Installation

NOW = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
AGES = (60, 50, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of this module's ledger."""
    return tmp_path_factory.mktemp("archive")


@pytest.fixture
def archived(ledger: Installation, org_id: str, folder: Path) -> str:
    """The time of the last archived event: three runs came, of which the first two are in the archive."""
    past: list[tuple[int, str, dict[str, Any]]] = [(70, "wallet.purchase", {"purchase_id": "p1", "credits": 1_000})]
    for age in AGES:
        run = {"workflow_id": f"run-{age}", "credits": age, "activity_name": "Crawl"}
        past += [(age, "workflow.start", run), (age, "workflow.finish", run)]
    past.append((10, "wallet.refund", {"refund_id": "f1", "credits": 5, "workflow_id": "run-60"}))
    parsed = [(NOW - timedelta(days=age), parse(task, {"org_id": org_id, **fields})) for age, task, fields in past]
    apply_past(ledger.engine, [(at, each) for at, each in parsed if not isinstance(each, InvalidMessage)])
    list(archive.archive(ledger.engine, (NOW - timedelta(days=31)).date(), folder))
    through = NOW - timedelta(days=50)
    return f"The first 7 events are in the archive: until {day(through)}, 12:00:00."


def test_the_pages_say_where_older_events_are(customer: Visitor, org_id: str, archived: str) -> None:
    events = customer.get(history_of(org_id), params=LEDGER)
    assert archived in text_of(events.text)
    assert "1–4 of 11" in text_of(events.text)
    since_the_beginning = customer.get(str(link(events, "Since [^<]*")))
    assert "Used 130" in text_of(since_the_beginning.text)
    runs = text_of(customer.get(history_of(org_id)).text)
    assert archived in runs
    assert "Its older steps are in the archive." in runs
    before = (NOW - timedelta(days=40)).date().isoformat()
    for view in ({}, LEDGER):
        only_old = text_of(customer.get(history_of(org_id), params={"date_to": before, **view}).text)
        assert "These events are in the archive." in only_old
        assert archived in only_old
        assert "Used 110" in only_old
        recent = text_of(customer.get(history_of(org_id), params={"date_from": before, **view}).text)
        assert "in the archive: until" not in recent
    of_run = text_of(customer.get(f"/organizations/{org_id}/runs/run-50").text)
    assert "The steps of this run are in the archive." in of_run
    assert "Effect on the balance –" in of_run
    assert "in the archive" not in text_of(customer.get(f"/organizations/{org_id}/runs/run-20").text)


def test_the_file_ends_with_what_is_there_and_says_so(customer: Visitor, org_id: str, archived: str) -> None:
    file = customer.get(f"{history_of(org_id)}.csv")
    assert len(file.text.splitlines()) == 1 + 4
    through = (NOW - timedelta(days=50)).isoformat()
    assert file.headers["Holdfast-Archived"] == f"events=7; through={through}"
    recent = customer.get(f"{history_of(org_id)}.csv", params={"date_from": (NOW - timedelta(days=30)).isoformat()})
    assert "Holdfast-Archived" not in recent.headers


def test_programs_are_told(address: str, org_id: str, archived: str) -> None:
    bearer = {"Authorization": f"Bearer {token(orgs=[org_id])}"}
    with httpx.Client(base_url=f"{address}/api/organizations/{org_id}", headers=bearer) as api:
        through = (NOW - timedelta(days=50)).isoformat()
        older = {"events": 7, "through": through}
        page = api.get("/credit-events").json()
        assert (page["total"], len(page["items"]), page["archived"]) == (11, 4, older)
        by_run = api.get("/credit-events", params={"group_by": "workflow"}).json()
        assert {each["workflow_id"]: each["archived_in_part"] for each in by_run["items"]} == {
            "run-20": False,
            "run-60": True,
        }
        assert by_run["archived"] == older
        recent = api.get("/credit-events", params={"date_from": (NOW - timedelta(days=30)).isoformat()}).json()
        assert recent["archived"] is None
        assert api.get("/workflows/run-60").json()["archived_in_part"] is True
        assert api.get("/workflows/run-20").json()["archived_in_part"] is False
        at_the_end = api.get("/credits", params={"at": through}).json()
        assert at_the_end["available"] == 1_000 - 110
        long_ago = api.get("/credits", params={"at": (NOW - timedelta(days=55)).isoformat()})
        assert long_ago.status_code == 404
        assert long_ago.json()["detail"] == "The events of that time are in the archive, and so are the balances."
        assert api.get("/usage").json()["total"] == {"credits": 130, "runs": 3}
