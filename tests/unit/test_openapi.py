"""The OpenAPI document tells the form of all that is sent: a value that it allows is not refused for its form."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api_stub.app import create_app
from api_stub.workflows import STEPS
from ledger.filters import when
from ledger.messages import MESSAGES, InvalidMessage, parse
from ledger.settings import Settings

DOCUMENT: dict[str, Any] = create_app(
    Settings(
        database_url="postgresql+psycopg://user:password@host/database",
        broker_url="redis://host",
        jwt_secret="a secret of at least thirty-two characters",
    )
).openapi()
PATHS: dict[str, dict[str, Any]] = DOCUMENT["paths"]

OF_A_WORKFLOW = "/api/organizations/{orgId}/workflows/{workflowId}"


def body(step: str) -> dict[str, Any]:
    """What the document says of the body of a report."""
    schema: dict[str, Any] = PATHS[f"{OF_A_WORKFLOW}/{step}"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    return schema


def parameter(path: str, name: str) -> dict[str, Any]:
    """What the document says of a parameter."""
    [found] = [found for found in PATHS[path]["get"]["parameters"] if found["name"] == name]
    schema: dict[str, Any] = found["schema"]
    return schema


def allows(schema: dict[str, Any], value: object) -> bool:
    formats = Draft202012Validator.FORMAT_CHECKER
    whole = {**schema, "components": DOCUMENT["components"]}
    return bool(Draft202012Validator(whole, format_checker=formats).is_valid(value))


def parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and everything in it that describes a value."""
    yield schema
    nested = [*schema.get("properties", {}).values(), *schema.get("anyOf", []), *filter(None, [schema.get("items")])]
    for each in nested:
        yield from parts(each)


def told() -> Iterator[tuple[str, dict[str, Any]]]:
    """Whatever the document says of parameters and bodies, with where it says so."""
    for path, methods in PATHS.items():
        for method, operation in methods.items():
            for found in operation.get("parameters", []):
                yield from ((f"{method} {path} {found['name']}", part) for part in parts(found["schema"]))
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from ((f"{method} {path}", part) for part in parts(content["schema"]))


def test_every_text_has_a_form_every_number_bounds_and_everything_a_type() -> None:
    assert len({where for where, _ in told()}) > 15
    for where, part in told():
        match part:
            case {"type": "string"}:
                assert {"format", "pattern", "enum", "maxLength"} & set(part), (where, part)
            case {"type": "integer"}:
                assert {"minimum", "maximum"} <= set(part), (where, part)
            case _:
                assert {"type", "anyOf"} & set(part), (where, part)


def test_no_parameter_is_said_to_be_null_which_nobody_can_send() -> None:
    for path, methods in PATHS.items():
        for operation in methods.values():
            for found in operation.get("parameters", []):
                assert {"type": "null"} not in parts(found["schema"]), (path, found["name"])


def test_the_body_of_each_report_is_told_and_where_it_is_needed() -> None:
    required = {step: PATHS[f"{OF_A_WORKFLOW}/{step}"]["post"]["requestBody"]["required"] for step in STEPS}
    assert required == {"start": True, "finish": True, "cancel": False, "fail": False}
    for step in STEPS:
        fields = set(MESSAGES[f"workflow.{step}"].model_fields) - {"org_id", "workflow_id"}
        assert set(body(step)["properties"]) == fields


@pytest.mark.parametrize(
    ("step", "fields"),
    [
        ("start", {}),
        ("start", {"credits": -1}),
        ("start", {"credits": 10**12 + 1}),
        ("start", {"credits": "5"}),
        ("start", {"credits": 5, "expires_in_s": 59}),
        ("start", {"credits": 5, "project_id": "a b"}),
        ("start", {"credits": 5, "activity_name": ""}),
        ("start", {"credits": 5, "activity_name": "x" * 257}),
        ("start", {"credits": 5, "activity_name": "a\x00b"}),
        ("start", {"credits": 5, "reason": "not a field of this message"}),
        ("cancel", {"credits": 5}),
        ("cancel", {"reason": "a\x00b"}),
        ("cancel", {"reason": "x" * 501}),
        ("cancel", {"reason": 5}),
        ("cancel", {"source": ""}),
        ("cancel", {"metadata": None}),
        ("cancel", {"metadata": []}),
        ("cancel", {"metadata": "text"}),
        ("cancel", {"metadata": {"a\x00b": 1}}),
        ("cancel", {"metadata": {"a": "a\x00b"}}),
        ("cancel", {"metadata": {"a": [{"b": "a\x00b"}]}}),
        ("cancel", {"occurred_at": 5}),
        ("cancel", {"occurred_at": "yesterday"}),
        ("cancel", {"occurred_at": "2026-01-31"}),
        ("cancel", {"occurred_at": "2026-02-30T09:00:00Z"}),
        ("cancel", {"occurred_at": "2026-01-31T09:00:00"}),
        ("cancel", {"occurred_at": "2026-01-31T23:59:60Z"}),
        ("cancel", {"occurred_at": "1970-12-31T23:59:59Z"}),
        ("cancel", {"occurred_at": "3000-01-01T00:00:00Z"}),
    ],
)
def test_what_is_refused_for_its_form_the_document_does_not_allow(step: str, fields: dict[str, Any]) -> None:
    given = {"org_id": "acme", "workflow_id": "w1", **fields}
    assert isinstance(parse(f"workflow.{step}", given), InvalidMessage)
    assert not allows(body(step), fields)


@pytest.mark.parametrize(
    ("step", "fields"),
    [
        ("start", {"credits": 0, "expires_in_s": 60, "project_id": "a:b", "activity_name": "größe\n", "source": "crm"}),
        ("finish", {"credits": 10**12, "project_id": None, "activity_name": None}),
        ("cancel", {}),
        ("fail", {"reason": "\x01", "occurred_at": None, "metadata": {"": [None, True, 1.5, -1, "größe", {"a": {}}]}}),
        ("cancel", {"occurred_at": "1971-01-01T00:00:00Z"}),
        ("cancel", {"occurred_at": "2999-12-31T23:59:59.1234567+23:59"}),
    ],
)
def test_what_the_document_allows_is_taken(step: str, fields: dict[str, Any]) -> None:
    given = {"org_id": "acme", "workflow_id": "w1", **fields}
    assert not isinstance(parse(f"workflow.{step}", given), InvalidMessage)
    assert allows(body(step), fields)


TIMES = [
    ("/api/organizations/{orgId}/credits", "at"),
    ("/api/organizations/{orgId}/credit-events", "date_from"),
    ("/api/organizations/{orgId}/credit-events", "date_to"),
]


@pytest.mark.parametrize(("path", "name"), TIMES)
def test_a_time_that_the_document_allows_is_understood(path: str, name: str) -> None:
    schema = parameter(path, name)
    for text in ("2026-01-31", "1000-01-01", "2999-12-31", "2026-01-31T09:00:00Z", "2026-01-31T09:00:00.5+02:00"):
        assert allows(schema, text), text
        assert when(text)
    for text in ("1000-01-01T00:00:00+23:59", "2999-12-31T23:59:59.999999999-23:59"):
        assert allows(schema, text), text
        assert when(text)
    for text in ("", "yesterday", "0000-01-01", "2026-02-30", "2026-01-31T24:01:00Z", "2026-01-31T23:59:60Z"):
        assert not allows(schema, text), text
        with pytest.raises(ValueError, match="must be a date or time"):
            when(text)


@pytest.mark.parametrize("typed", ["", "a b", "a\x00", "x" * 129, "größe"])
def test_an_id_that_cannot_be_one_is_not_allowed(typed: str) -> None:
    assert not allows(parameter("/api/organizations/{orgId}/credit-events", "project_id"), typed)
    for path, methods in PATHS.items():
        for operation in methods.values():
            for found in operation.get("parameters", []):
                if found["in"] == "path":
                    assert not allows(found["schema"], typed), path
                    assert allows(found["schema"], "a_B-1.2:3"), path
    assert not re.search(r"\{(?!orgId|workflowId)", "".join(PATHS))
