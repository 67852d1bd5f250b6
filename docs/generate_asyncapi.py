"""Writes docs/asyncapi.json, the description of the queues for tools: `make docs`.

It says what docs/messages.md says to people. Both come from `holdfast_client.messages`.
"""

import json
from pathlib import Path
from typing import Any

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.messages import MESSAGES, WORKFLOW_TASKS, AnyMessage
from ledger.examples import EXAMPLES

DOCUMENT = Path(__file__).with_name("asyncapi.json")
JSON_SCHEMA = "application/schema+json;version=draft-07"
CHANNELS = {
    QUEUE: (sorted(MESSAGES), "Every message: for billing, and for whoever may change any balance."),
    ENGINE_QUEUE: (
        sorted(WORKFLOW_TASKS),
        "Messages about workflows, for engines: nothing else is taken from here, and no `source`.",
    ),
}


def document() -> dict[str, Any]:
    """The description, in AsyncAPI 3.1."""
    return {
        "asyncapi": "3.1.0",
        "info": {
            "title": "Holdfast",
            "version": "1",
            "description": "The messages of the credit ledger, as Celery tasks (task protocol 2) on Redis, Valkey or "
            "RabbitMQ. A message that is sent again changes nothing.",
        },
        "defaultContentType": "application/json",
        "channels": {key(queue): _channel(queue, tasks, why) for queue, (tasks, why) in CHANNELS.items()},
        "operations": {
            f"take_{key(queue)}": {
                "action": "receive",
                "channel": {"$ref": f"#/channels/{key(queue)}"},
                "messages": [{"$ref": f"#/channels/{key(queue)}/messages/{key(task)}"} for task in tasks],
            }
            for queue, (tasks, _) in CHANNELS.items()
        },
        "components": {"messages": {key(task): _message(task, model) for task, model in MESSAGES.items()}},
    }


def key(name: str) -> str:
    """The name of a queue or of a task as a key of the description, where a dot is not allowed."""
    return name.replace(".", "_")


def _channel(queue: str, tasks: list[str], why: str) -> dict[str, Any]:
    return {
        "address": queue,
        "description": why,
        "messages": {key(task): {"$ref": f"#/components/messages/{key(task)}"} for task in tasks},
        "bindings": {"amqp": {"is": "queue", "queue": {"name": queue, "durable": True}, "bindingVersion": "0.3.0"}},
    }


def _message(task: str, model: type[AnyMessage]) -> dict[str, Any]:
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    described = " ".join((model.__doc__ or "").split())
    arguments = {"type": "array", "items": [schema], "minItems": 1, "additionalItems": False}
    no_keywords = {"type": "object", "maxProperties": 0}
    body = {"type": "array", "items": [arguments, no_keywords, {"type": "object"}], "minItems": 3}
    return {
        "name": task,
        "title": task,
        "summary": described,
        "contentType": "application/json",
        "headers": {
            "schemaFormat": JSON_SCHEMA,
            "schema": {
                "type": "object",
                "required": ["task", "id"],
                "properties": {
                    "task": {"const": task},
                    "id": {"type": "string", "description": "The task's id, a UUID, under which the answer is kept."},
                    "ignore_result": {"type": "boolean", "description": "false: the sender waits for the answer."},
                },
            },
        },
        "payload": {"schemaFormat": JSON_SCHEMA, "schema": body | ({"$defs": definitions} if definitions else {})},
        "examples": [{"headers": {"task": task, "id": "00000000-0000-0000-0000-000000000000"}, "payload": _body(task)}],
    }


def _body(task: str) -> list[Any]:
    return [[EXAMPLES[task]], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def render() -> str:
    """The file."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
