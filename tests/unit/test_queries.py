"""What a query may name, and what is said of a name that it may not."""

import pytest
from starlette.datastructures import QueryParams

from api_stub.pages import FIELDS
from api_stub.queries import complaints, problems

NAMES = ("event_type", *FIELDS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("type", "event_type"),
        ("eventType", "event_type"),
        ("TYPE", "event_type"),
        ("to", "date_to"),
        ("from", "date_from"),
        ("date", "date_from or date_to"),
        ("project", "project_id"),
        ("workflow", "workflow_id"),
        ("workflowId", "workflow_id"),
        ("id", "project_id or workflow_id"),
        ("type_of_event_type", "event_type"),
        ("limti", "limit"),
    ],
)
def test_the_name_that_was_meant_is_suggested(typed: str, meant: str) -> None:
    assert problems(QueryParams({typed: "x"}), NAMES) == {typed: f"{typed} is not a filter; did you mean {meant}?"}


@pytest.mark.parametrize(
    ("typed", "shown"), [("q", "q"), ("", '""'), ("a\x00b", "a\\x00b"), ("y" * 100, "y" * 63 + "…")]
)
def test_a_name_that_is_like_no_other_is_told_all_of_them(typed: str, shown: str) -> None:
    names = "status, code, task"
    expected = {typed: f"{shown} is not a filter; there are {names}."}
    assert complaints(QueryParams([(typed, "1")]), names.split(", ")) == expected


def test_of_many_unknown_names_the_first_ten_are_told() -> None:
    assert list(problems(QueryParams([(f"n{number}", "") for number in range(10_000)]), NAMES)) == [
        f"n{number}" for number in range(10)
    ]


def test_a_parameter_with_one_value_is_not_repeated() -> None:
    query = QueryParams("limit=1&limit=1&event_type=usage&event_type=grant&q=1&q=2")
    found = problems(query, ("event_type", "limit"), repeatable=("event_type",))
    assert found == {
        "limit": "limit is given more than once",
        "q": "q is not a filter; there are event_type, limit",
    }
    assert problems(QueryParams("event_type=usage&limit=1"), ("event_type", "limit")) == {}
