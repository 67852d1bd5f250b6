"""The story of `holdfast demo`: sample messages of a billing system and a workflow engine."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

from api_stub.auth import sign
from holdfast_client.client import Client
from holdfast_client.results import Result
from worker.local import weeks
from worker.local.system import System

ORGANIZATION = "acme"

STORY: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "subscribe to the plan team, 1,000 credits a month",
        "subscribe",
        {"subscription_id": "sub-1", "version": 1, "plan": "team", "monthly_credits": 1_000},
    ),
    ("buy 500 credits on top", "purchase", {"purchase_id": "order-1", "credits": 500}),
    (
        "start report-1, estimated at 120",
        "start",
        {"workflow_id": "report-1", "credits": 120, "project_id": "website", "activity_name": "Weekly report"},
    ),
    (
        "start import-2, estimated at 400",
        "start",
        {"workflow_id": "import-2", "credits": 400, "project_id": "crm", "activity_name": "Import contacts"},
    ),
    (
        "start train-3, estimated at 600",
        "start",
        {"workflow_id": "train-3", "credits": 600, "project_id": "search", "activity_name": "Train ranking"},
    ),
    (
        "start render-4, estimated at 5,000",
        "start",
        {"workflow_id": "render-4", "credits": 5_000, "project_id": "website", "activity_name": "Render video"},
    ),
    (
        "start crawl-5, estimated at 200",
        "start",
        {"workflow_id": "crawl-5", "credits": 200, "project_id": "search", "activity_name": "Crawl pages"},
    ),
    (
        "start sync-6, estimated at 90",
        "start",
        {"workflow_id": "sync-6", "credits": 90, "project_id": "crm", "activity_name": "Sync calendar"},
    ),
    ("finish report-1, which used 80: under its estimate", "finish", {"workflow_id": "report-1", "credits": 80}),
    ("finish import-2, which used 400: as estimated", "finish", {"workflow_id": "import-2", "credits": 400}),
    ("finish train-3, which used 710: over its estimate", "finish", {"workflow_id": "train-3", "credits": 710}),
    ("the same message once more", "finish", {"workflow_id": "train-3", "credits": 710}),
    ("cancel crawl-5", "cancel", {"workflow_id": "crawl-5", "reason": "the user changed their mind"}),
    ("fail sync-6", "fail", {"workflow_id": "sync-6", "reason": "the calendar did not answer"}),
)
"""Each step in words, the client's method, and the message's fields."""


def tell(client: Client) -> Iterator[tuple[str, Result]]:
    """Send the messages one by one, each after the one before is applied. Yields the words and the answer of each."""
    for words, method, fields in STORY:
        yield words, getattr(client, method)(org_id=ORGANIZATION, wait_s=30.0, **fields)


def sign_in_link(system: System, org_id: str) -> str:
    """The link that signs a browser in for a day, and opens the credit history of `org_id`."""
    page = quote(f"/organizations/{org_id}/credit-history", safe="")
    return f"{system.url}/signin?token={_token(system)}&next={page}"


def events_url(system: System) -> str:
    """The URL at which a program reads the credit history."""
    return f"{system.url}/api/organizations/{ORGANIZATION}/credit-events"


def fetch_events(system: System) -> list[dict[str, Any]]:
    """The credit history over HTTP, as a customer's program reads it."""
    request = Request(events_url(system), headers={"Authorization": f"Bearer {_token(system)}"})  # noqa: S310 - ours
    with urlopen(request, timeout=10) as response:  # noqa: S310 - ours
        items: list[dict[str, Any]] = json.load(response)["items"]
        return items


def _token(system: System) -> str:
    scopes = ["credits:read", "workflows:write", "operator"]
    return sign(
        system.jwt_secret,
        orgs=[ORGANIZATION, weeks.ORGANIZATION, weeks.OVERDRAWN],
        scopes=scopes,
        subject="demo",
        expires_in_s=86_400,
    )
