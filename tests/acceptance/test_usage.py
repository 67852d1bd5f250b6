"""What used the credits: over HTTP, as JSON and as a file, and kept up by a worker and a beat."""

import csv
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ledger.store import apply_batch
from tests.acceptance import website
from tests.acceptance.website import serving, token
from tests.installation import installed
from tests.messages import delivery

USAGE = "/api/organizations/acme/usage"


@pytest.fixture(scope="module")
def api(services: Any) -> Iterator[httpx.Client]:
    """The API, asked by somebody who may read the credits of acme, whose runs have used 100."""
    with installed(services) as ledger:
        finish = {"org_id": "acme", "task": "workflow.finish"}
        apply_batch(
            ledger.engine,
            [
                delivery(**finish, workflow_id="w1", credits=60, project_id="web", activity_name="=Crawl"),
                delivery(**finish, workflow_id="w2", credits=10, project_id="web"),
                delivery(**finish, workflow_id="w3", credits=30),
                delivery("wallet.refund", org_id="acme", refund_id="r1", workflow_id="w3", credits=5),
            ],
        )
        app = website.app(ledger.database_url, ledger.broker_url)
        headers = {"Authorization": f"Bearer {token()}"}
        with serving(app) as address, httpx.Client(base_url=address, headers=headers) as client:
            yield client


def test_usage_is_grouped_the_largest_first_and_refunds_are_not_subtracted(api: httpx.Client) -> None:
    answer = api.get(USAGE, params={"group_by": "project"})
    assert answer.status_code == 200
    assert answer.json() == {
        "as_of": answer.json()["as_of"],
        "groups": [{"project": "web", "credits": 70, "runs": 2}, {"project": None, "credits": 30, "runs": 1}],
        "total": {"credits": 100, "runs": 3},
        "truncated": False,
        "rate": None,
    }


def test_two_groups_at_once(api: httpx.Client) -> None:
    groups = api.get(USAGE, params={"group_by": ["activity", "month"]}).json()["groups"]
    assert [(group["activity"], group["credits"]) for group in groups] == [("=Crawl", 60), (None, 40)]
    assert all(len(group["month"]) == 7 for group in groups)


def test_without_groups_there_is_the_total(api: httpx.Client) -> None:
    answer = api.get(USAGE).json()
    assert (answer["groups"], answer["total"]) == ([], {"credits": 100, "runs": 3})


def test_a_range_without_usage(api: httpx.Client) -> None:
    answer = api.get(USAGE, params={"group_by": "day", "date_to": "2020-12-31"}).json()
    assert (answer["groups"], answer["total"]) == ([], {"credits": 0, "runs": 0})


def test_the_file_has_a_line_for_each_group_and_no_formula(api: httpx.Client) -> None:
    answer = api.get(f"{USAGE}.csv", params={"group_by": ["project", "activity"]})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert answer.headers["content-disposition"] == 'attachment; filename="usage-acme.csv"'
    assert list(csv.reader(io.StringIO(answer.text))) == [
        ["project", "activity", "credits", "runs"],
        ["web", "'=Crawl", "60", "1"],
        ["", "", "30", "1"],
        ["web", "", "10", "1"],
    ]
    assert list(csv.reader(io.StringIO(api.get(f"{USAGE}.csv").text))) == [["credits", "runs"], ["100", "3"]]


def test_a_file_with_too_many_lines_is_refused(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_stub.usage.MOST_LINES", 1)
    answer = api.get(f"{USAGE}.csv", params={"group_by": "project"})
    assert (answer.status_code, answer.json()["detail"]) == (
        422,
        "these are more than 1 groups: ask for a shorter range, or for fewer values of group_by",
    )


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"group_by": "run"}, "group_by must be 'project', 'activity', 'source', 'day' or 'month'"),
        ({"group_by": ["day", "source", "project"]}, "group_by may be given at most 2 times, not more"),
        ({"date_from": "2026-02-02", "date_to": "2026-02-01"}, "date_to must not be before date_from"),
        ({"date_from": "soon"}, "date_from must be a date or time such as 2026-01-31 or 2026-01-31T09:00:00Z"),
    ],
)
def test_what_cannot_be_asked_for_is_said(api: httpx.Client, params: dict[str, Any], told: str) -> None:
    for path in (USAGE, f"{USAGE}.csv"):
        answer = api.get(path, params=params)
        assert (answer.status_code, answer.json()["detail"]) == (422, told)


def test_others_see_nothing(api: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {token(orgs=['globex'])}"}
    assert api.get(USAGE, headers=headers).status_code == 404
    assert api.get(f"{USAGE}.csv", headers=headers).status_code == 404
