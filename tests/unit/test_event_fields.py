"""Every place that handles events has every field of an event. Each test names the place that lacks one."""

import re
from pathlib import Path

from api_stub import answers
from bench import past
from ledger.history import CUSTOMER_COLUMNS, TABLE_COLUMNS
from ledger.state import Event

TEMPLATE = (Path(answers.__file__).parent / "templates" / "history_ledger.html").read_text()


def test_no_field_of_an_event_has_a_default_so_that_mypy_names_who_does_not_set_it() -> None:
    assert Event._field_defaults == {}


def test_the_api_describes_every_field_that_a_customer_sees() -> None:
    assert list(answers.Event.model_fields) == ["id", "workflow_id", *CUSTOMER_COLUMNS]


def test_the_page_has_a_heading_and_a_cell_for_every_field_that_a_customer_sees() -> None:
    head, body = TEMPLATE.split("{% for event in events.page.events %}")
    assert tuple(re.findall(r'data-column="(\w+)"', head)) == TABLE_COLUMNS
    cells = re.findall(r"<td .*?event\.(\w+).*?</td>", body, re.DOTALL)
    assert tuple(cells) == TABLE_COLUMNS


def test_a_past_that_is_measured_has_every_field() -> None:
    [columns] = re.findall(r"INSERT INTO credit_events \((.*?)\)", past._PAST_EVENTS, re.DOTALL)
    assert tuple(re.findall(r"\w+", columns)) == Event._fields
