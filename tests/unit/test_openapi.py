"""The OpenAPI document tells the form of all that is sent: a value that it allows is not refused for its form."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from api_stub.app import create_app
from holdfast_client.messages import MESSAGES, WORKFLOW_TASKS, InvalidMessage, parse
from ledger.filters import when
from ledger.message_lines import MessageLine, numbered_lines, read_line
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


def request_body(task: str) -> dict[str, Any]:
    """What the document says of the body with a message."""
    kind, _, name = task.partition(".")
    path = f"{OF_A_WORKFLOW}/{name}" if kind == "workflow" else f"/api/organizations/{{orgId}}/{kind}/{name}"
    found: dict[str, Any] = PATHS[path]["post"]["requestBody"]
    return found


def body(task: str) -> dict[str, Any]:
    """The schema of the body with a message."""
    schema: dict[str, Any] = request_body(task)["content"]["application/json"]["schema"]
    return schema


def in_path(task: str) -> set[str]:
    """The fields of a message that its path has."""
    return {"org_id", "workflow_id"} if task in WORKFLOW_TASKS else {"org_id"}


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
                assert {"format", "pattern", "enum", "const", "maxLength"} & set(part), (where, part)
            case {"type": "integer"}:
                assert {"minimum", "exclusiveMinimum"} & set(part), (where, part)
                assert "maximum" in part, (where, part)
            case _:
                assert {"type", "anyOf"} & set(part), (where, part)


def test_no_parameter_is_said_to_be_null_which_nobody_can_send() -> None:
    for path, methods in PATHS.items():
        for operation in methods.values():
            for found in operation.get("parameters", []):
                assert {"type": "null"} not in parts(found["schema"]), (path, found["name"])


@pytest.mark.parametrize("task", MESSAGES)
def test_the_body_of_each_message_is_told_with_an_example_and_where_it_is_needed(task: str) -> None:
    fields = {name: field for name, field in MESSAGES[task].model_fields.items() if name not in in_path(task)}
    assert set(body(task)["properties"]) == set(fields)
    assert set(body(task)["required"]) == {name for name, field in fields.items() if field.is_required()}
    assert request_body(task)["required"] == (task not in ("workflow.cancel", "workflow.fail"))
    example = request_body(task)["content"]["application/json"]["example"]
    assert allows(body(task), example)
    assert not isinstance(parse(task, example | dict.fromkeys(in_path(task), "acme")), InvalidMessage)


@pytest.mark.parametrize("task", MESSAGES)
def test_every_answer_to_a_message_is_told(task: str) -> None:
    kind, _, name = task.partition(".")
    place = "workflows/{workflowId}" if task in WORKFLOW_TASKS else kind
    operation = PATHS[f"/api/organizations/{{orgId}}/{place}/{name}"]["post"]
    expected = ["200", "202", "400", "401", "403", "404", "409", "413", "422", "503", "default"]
    assert sorted(operation["responses"]) == expected
    assert ("Location" in operation["responses"]["202"]["headers"]) == (task in WORKFLOW_TASKS)
    assert operation["summary"] == task
    [wait] = [found for found in operation["parameters"] if found["in"] == "header"]
    assert (wait["name"], wait["required"]) == ("Prefer", False)


def test_the_example_of_a_batch_is_one() -> None:
    content = PATHS["/api/messages"]["post"]["requestBody"]["content"]["application/jsonl"]
    lines = [read_line(line) for _, line in numbered_lines([content["example"].encode()])]
    assert [line.task for line in lines if isinstance(line, MessageLine)] == list(MESSAGES)
    assert allows(content["schema"], content["example"])


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("workflow.start", {}),
        ("workflow.start", {"credits": -1}),
        ("workflow.start", {"credits": 10**12 + 1}),
        ("workflow.start", {"credits": "5"}),
        ("workflow.start", {"credits": 5, "expires_in_s": 59}),
        ("workflow.start", {"credits": 5, "project_id": "a b"}),
        ("workflow.start", {"credits": 5, "activity_name": ""}),
        ("workflow.start", {"credits": 5, "activity_name": "x" * 257}),
        ("workflow.start", {"credits": 5, "activity_name": "a\x00b"}),
        ("workflow.start", {"credits": 5, "reason": "not a field of this message"}),
        ("workflow.cancel", {"credits": 5}),
        ("workflow.cancel", {"reason": "a\x00b"}),
        ("workflow.cancel", {"reason": "x" * 501}),
        ("workflow.cancel", {"reason": 5}),
        ("workflow.cancel", {"source": ""}),
        ("workflow.cancel", {"metadata": None}),
        ("workflow.cancel", {"metadata": []}),
        ("workflow.cancel", {"metadata": "text"}),
        ("workflow.cancel", {"metadata": {"a\x00b": 1}}),
        ("workflow.cancel", {"metadata": {"a": "a\x00b"}}),
        ("workflow.cancel", {"metadata": {"a": [{"b": "a\x00b"}]}}),
        ("workflow.cancel", {"occurred_at": 5}),
        ("workflow.cancel", {"occurred_at": "yesterday"}),
        ("workflow.cancel", {"occurred_at": "2026-01-31"}),
        ("workflow.cancel", {"occurred_at": "2026-02-30T09:00:00Z"}),
        ("workflow.cancel", {"occurred_at": "2026-01-31T09:00:00"}),
        ("workflow.cancel", {"occurred_at": "2026-01-31T23:59:60Z"}),
        ("workflow.cancel", {"occurred_at": "1970-12-31T23:59:59Z"}),
        ("workflow.cancel", {"occurred_at": "3000-01-01T00:00:00Z"}),
        ("wallet.purchase", {"purchase_id": "p", "credits": 0}),
        ("wallet.purchase", {"purchase_id": "p", "credits": 5, "expires_at": "tomorrow"}),
        ("wallet.purchase", {"purchase_id": "a b", "credits": 5}),
        ("wallet.adjust", {"adjustment_id": "a", "credits": 0, "reason": "typo"}),
        ("wallet.adjust", {"adjustment_id": "a", "credits": 5}),
        ("wallet.adjust", {"adjustment_id": "a", "credits": 5, "reason": "grant_expired"}),
        ("wallet.adjust", {"adjustment_id": "a", "credits": 5, "reason": "typo", "allow_negative": "yes"}),
        ("wallet.bill", {"billing_id": "b", "credits": -(10**12) - 1}),
        ("wallet.reverse", {"reversal_id": "r", "purchase_id": "p", "reason": "bored"}),
        ("wallet.subscribe", {"subscription_id": "s", "version": 0, "plan": "team", "monthly_credits": 5}),
        ("wallet.subscribe", {"subscription_id": "s", "version": 1, "plan": "", "monthly_credits": 5}),
        ("wallet.configure", {"version": 1, "period_cap": -1}),
        ("wallet.configure", {"version": 2**53}),
    ],
)
def test_what_is_refused_for_its_form_the_document_does_not_allow(task: str, fields: dict[str, Any]) -> None:
    given = dict.fromkeys(in_path(task), "acme") | fields
    assert isinstance(parse(task, given), InvalidMessage)
    assert not allows(body(task), fields)


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        (
            "workflow.start",
            {"credits": 0, "expires_in_s": 60, "project_id": "a:b", "activity_name": "größe\n", "source": "crm"},
        ),
        ("workflow.finish", {"credits": 10**12, "project_id": None, "activity_name": None}),
        ("workflow.cancel", {}),
        (
            "workflow.fail",
            {"reason": "\x01", "occurred_at": None, "metadata": {"": [None, True, 1.5, -1, "größe", {"a": {}}]}},
        ),
        ("workflow.cancel", {"occurred_at": "1971-01-01T00:00:00Z"}),
        ("workflow.cancel", {"occurred_at": "2999-12-31T23:59:59.1234567+23:59"}),
        ("wallet.bill", {"billing_id": "b", "credits": 0, "source": "billing", "invoice_id": None}),
        ("wallet.adjust", {"adjustment_id": "a", "credits": -1, "reason": "expired", "allow_negative": True}),
        ("wallet.configure", {"version": 2**53 - 1, "credit_limit": 0, "period_cap": None}),
    ],
)
def test_what_the_document_allows_is_taken(task: str, fields: dict[str, Any]) -> None:
    given = dict.fromkeys(in_path(task), "acme") | fields
    assert not isinstance(parse(task, given), InvalidMessage)
    assert allows(body(task), fields)


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
