"""docs/asyncapi.json describes the queues in AsyncAPI, as they are: what the client sends fits, and nothing else."""

import json
import warnings
from typing import Any

import pytest
from jsonschema import Draft7Validator

from docs.generate_asyncapi import DOCUMENT, key, render
from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.client import Client
from holdfast_client.messages import MESSAGES, WORKFLOW_TASKS
from ledger.examples import EXAMPLES

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic's, about a field that is named as AsyncAPI names it
    from asyncapi3 import AsyncAPI3

TEXT = DOCUMENT.read_text(encoding="utf-8")
DESCRIBED: dict[str, Any] = json.loads(TEXT)


def of(task: str, part: str) -> Draft7Validator:
    described = DESCRIBED["components"]["messages"][key(task)][part]
    assert described["schemaFormat"] == "application/schema+json;version=draft-07"
    Draft7Validator.check_schema(described["schema"])
    return Draft7Validator(described["schema"])


def test_the_file_is_what_make_docs_writes() -> None:
    assert render() == TEXT


def test_it_is_valid() -> None:
    AsyncAPI3.model_validate(DESCRIBED)


def test_every_reference_leads_somewhere() -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            nested = [each for part in value.values() for each in references(part)]
            return [*nested, *([value["$ref"]] if isinstance(value.get("$ref"), str) else [])]
        return [each for part in value for each in references(part)] if isinstance(value, list) else []

    found = references({name: DESCRIBED[name] for name in ("channels", "operations")})
    assert len(found) > len(MESSAGES)
    for reference in found:
        place: Any = DESCRIBED
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


def test_each_queue_has_the_messages_that_are_taken_from_it() -> None:
    taken = {channel["address"]: set(channel["messages"]) for channel in DESCRIBED["channels"].values()}
    assert taken == {QUEUE: set(map(key, MESSAGES)), ENGINE_QUEUE: set(map(key, WORKFLOW_TASKS))}


@pytest.mark.parametrize("task", MESSAGES)
def test_what_the_client_sends_is_what_is_described(task: str) -> None:
    with Client("redis://127.0.0.1:1/0") as client:
        sent = client._publisher.encode(task, [EXAMPLES[task]], {})
    body = json.loads(sent.body)
    assert of(task, "payload").is_valid(body)
    assert of(task, "headers").is_valid(sent.headers)
    [example] = DESCRIBED["components"]["messages"][key(task)]["examples"]
    assert of(task, "payload").is_valid(example["payload"])
    assert of(task, "headers").is_valid(example["headers"])
    wrong_ones: list[Any] = [
        [[], {}, {}],
        [[EXAMPLES[task]], {"org_id": "acme"}, {}],
        [[{**EXAMPLES[task], "colour": 1}], {}, {}],
    ]
    for wrong in wrong_ones:
        assert not of(task, "payload").is_valid(wrong)
    assert not of(task, "headers").is_valid({**sent.headers, "task": "workflow.finnish"})
