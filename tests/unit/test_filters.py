"""A filter of the credit history can be given everywhere where events are asked for, and is a condition."""

import re
from dataclasses import fields
from datetime import UTC, datetime
from inspect import signature
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from sqlalchemy import Column
from sqlalchemy.sql import visitors
from starlette.requests import Request

from api_stub.pages import EVENT_TYPES, KINDS, VIEWS, Reservations, history_query
from api_stub.rendering import page
from api_stub.wallets import event_filter
from ledger.filters import BY_NUMBER, EVERY_EVENT, EventFilter
from ledger.tables import daily_sums
from ledger.views import WalletView
from worker import cli

PLACES = {
    "created_from": ("date_from", "--from", "2026-01-31"),
    "created_before": ("date_to", "--to", "2026-01-31"),
    "event_types": ("event_type", "--type", "usage"),
    "project_id": ("project_id", "--project", "website"),
    "activity_names": ("activity_name", "--activity", "Crawl"),
    "workflow_id": ("workflow_id", "--workflow", "run-1"),
}
"""Each field of the filter: its name over HTTP and on the page, its option of the command line, and a value."""

SEARCHED = "activity_contains"
"""What only the search of the page asks for, once it has found no run with such an id."""

FIELDS = [field.name for field in fields(EventFilter)]
CONDITIONS = [name for name in FIELDS if name not in BY_NUMBER]


def test_every_field_of_the_filter_is_listed_here() -> None:
    assert {*PLACES, SEARCHED} == set(FIELDS)
    assert set(BY_NUMBER) <= set(FIELDS)


@pytest.mark.parametrize("name", PLACES)
def test_a_field_can_be_given_wherever_events_are_asked_for(name: str) -> None:
    parameter, option, value = PLACES[name]
    assert parameter in signature(event_filter).parameters
    assert option in options_of("history")
    asked = history_query(request(f"{parameter}={value}"))
    assert not asked.errors
    assert f"{parameter}={value}" in asked.query()
    assert getattr(asked.matching, name) != getattr(EVERY_EVENT, name)


@pytest.mark.parametrize("name", PLACES)
def test_the_form_of_the_page_has_a_field_for_it_and_keeps_what_was_typed(name: str) -> None:
    parameter, _, value = PLACES[name]
    kept = re.search(rf'<input [^>]*name="{parameter}"[^>]* value="{value}"[^>]*>', form(f"{parameter}={value}"))
    assert kept is not None, f"the form of credit_history.html has no field {parameter}"
    assert kept[0] not in form("")


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_field_that_is_given_is_a_condition(name: str) -> None:
    assert len(only(name).conditions()) == 1
    assert only(name).looks_at_each
    assert EVERY_EVENT.conditions() == ()


def test_every_type_of_event_is_of_one_kind() -> None:
    assert sorted(chain(*KINDS.values())) == sorted(EVENT_TYPES)


def test_the_views_are_tabs_that_keep_the_filter() -> None:
    assert '?project_id=web&amp;view=activity" aria-current="page">Activity</a>' in form("project_id=web")
    assert '?project_id=web&amp;view=ledger">Ledger</a>' in form("project_id=web")


@pytest.mark.parametrize(
    ("query", "is_open"),
    [
        ("", False),
        ("date_from=2026-01-31&project_id=web&search=x", False),
        ("event_type=refund&event_type=adjustment", False),
        ("event_type=refund", True),
        ("date_to=2026-01-31", True),
        ("workflow_id=w", True),
        ("date_from=x", True),
        ("limit=x", True),
        ("search=" + "x" * 300, False),
    ],
)
def test_the_less_usual_fields_are_open_if_one_is_used(query: str, is_open: bool) -> None:
    assert history_query(request(query)).more_is_open == is_open


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_looks_at_nothing_but_what_the_daily_sums_tell_apart(name: str) -> None:
    [condition] = only(name).conditions()
    looked_at = {part.name for part in visitors.iterate(condition) if isinstance(part, Column)}
    assert looked_at
    assert looked_at <= set(daily_sums.primary_key.columns.keys())


@pytest.mark.parametrize("name", BY_NUMBER)
def test_what_selects_numbers_is_no_condition_and_needs_no_look_at_each_event(name: str) -> None:
    matching = history_query(request("{0}={2}".format(*PLACES[name]))).matching
    assert matching.conditions() == ()
    assert not matching.looks_at_each


def test_of_a_workflow_only_its_own_events_are_checked() -> None:
    asked = history_query(request("workflow_id=run-1&event_type=usage"))
    assert len(asked.matching.conditions()) == 1
    assert not asked.matching.looks_at_each


def only(name: str) -> EventFilter:
    """The filter in which this field alone is given."""
    value: Any = "Crawl" if name == SEARCHED else PLACES[name][2]
    given: dict[str, Any] = {name: (value,) if isinstance(getattr(EVERY_EVENT, name), tuple) else value}
    return EventFilter(**given)


def request(query: str) -> Request:
    app = SimpleNamespace(state=SimpleNamespace(services=SimpleNamespace(product_name="Acme")))
    return Request({"type": "http", "path": "/", "headers": [], "query_string": query.encode(), "app": app})


def form(query: str) -> str:
    """The page's filter."""
    asked_by = request(query)
    answer = page(
        asked_by,
        "credit_history.html",
        org_id="acme",
        event_types=EVENT_TYPES,
        kinds=KINDS,
        most=100,
        periods=[],
        asked=history_query(asked_by),
        now=datetime.now(UTC),
        as_of=None,
        wallet=WalletView("acme"),
        is_new=False,
        reservations=Reservations([], 0, 0, 0, "", None),
        views=VIEWS,
        outlook=None,
        banner=None,
        buy_credits_url=None,
        events=None,
        receipts=None,
        used=None,
    )
    return bytes(answer.body).decode().split('<section class="card filters"')[1].split("</form>")[0]


def options_of(command: str) -> set[str]:
    return {text for each in typer.main.get_group(cli.app).commands[command].params for text in each.opts}
