"""A filter of the credit history can be given everywhere where events are asked for, and is a condition."""

from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
import typer
from starlette.requests import Request

from api_stub.pages import history_query
from api_stub.wallets import event_filter
from ledger.filters import EVERY_EVENT, TIME_RANGE, EventFilter
from worker import cli

PLACES = {
    "created_from": ("date_from", "--from", "2026-01-31"),
    "created_before": ("date_to", "--to", "2026-01-31"),
    "event_types": ("event_type", "--type", "usage"),
    "project_id": ("project_id", "--project", "website"),
}
"""Each field of the filter: its name over HTTP and on the page, its option of the command line, and a value."""

FIELDS = [field.name for field in fields(EventFilter)]


def test_every_field_of_the_filter_is_listed_here() -> None:
    assert list(PLACES) == FIELDS
    assert set(TIME_RANGE) <= set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_can_be_given_wherever_events_are_asked_for(name: str) -> None:
    parameter, option, value = PLACES[name]
    assert parameter in signature(event_filter).parameters
    page = history_query(Request({"type": "http", "query_string": f"{parameter}={value}".encode()}))
    assert not page.errors
    assert f"{parameter}={value}" in page.query()
    assert getattr(page.matching, name) != getattr(EVERY_EVENT, name)
    assert option in options_of("history")


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in TIME_RANGE])
def test_a_field_that_is_given_is_a_condition(name: str) -> None:
    value: Any = PLACES[name][2]
    given: dict[str, Any] = {name: (value,) if isinstance(getattr(EVERY_EVENT, name), tuple) else value}
    matching = EventFilter(**given)
    assert len(matching.conditions()) == 1
    assert matching.looks_at_each
    assert EVERY_EVENT.conditions() == ()


def options_of(command: str) -> set[str]:
    return {text for each in typer.main.get_group(cli.app).commands[command].params for text in each.opts}
