"""Workflows, for programs: one workflow's state, and the reports of engines that are not in Python."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request
from fastapi.concurrency import run_in_threadpool

from api_stub import answers, errors
from api_stub.openapi import ANY_OBJECT
from api_stub.problems import Problem
from api_stub.rights import IS_AN_ID, ReadableOrg, WritableOrg
from api_stub.services import Using
from ledger import history, views
from ledger.messages import ID_PATTERN, MESSAGES, InvalidMessage, parse
from worker.client import NotSentError

MAX_BODY_BYTES = 64 * 1024
"""The largest request body; the largest message is well below it."""

OTHERS_SOURCES = ("admin", "billing", "operator", "scheduler")
"""Sources of messages that come in other ways. An engine's message must not look like theirs in the credit history."""

SOURCE_PATTERN = "[ -~]+"
"""The characters of an engine's `source` over HTTP. In all of Unicode, too many look like others."""

STEPS = ("start", "finish", "cancel", "fail")
WorkflowId = Annotated[str, Path(alias="workflowId", description="The workflow's id.", json_schema_extra=IS_AN_ID)]


def add(app: FastAPI) -> None:
    """Add the routes for one workflow and for the reports of engines."""

    @app.get(
        "/api/organizations/{orgId}/workflows/{workflowId}",
        tags=["workflows"],
        response_model=answers.Workflow,
        responses=errors.READ_RESPONSES,
    )
    def workflow(org_id: ReadableOrg, workflow_id: WorkflowId, using: Using) -> dict[str, Any]:
        """A workflow: its state, reservation and usage, and its events and refunds, oldest first."""
        found = None
        if re.fullmatch(ID_PATTERN, workflow_id):
            with using.reading() as ledger:
                found = views.workflow(ledger, org_id, workflow_id)
        if found is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is no such workflow in this organization.")
        return {**asdict(found), "events": [history.as_item(event) for event in found.events]}

    # One path for each step, as the description of a body cannot depend on a parameter.
    for step in STEPS:
        _add_report(app, step)


def _add_report(app: FastAPI, step: str) -> None:
    task = f"workflow.{step}"

    @app.post(
        f"/api/organizations/{{orgId}}/workflows/{{workflowId}}/{step}",
        name=f"report_{step}",
        tags=["workflows"],
        status_code=HTTPStatus.ACCEPTED,
        response_model=answers.Accepted,
        openapi_extra={"requestBody": _body(task)},
    )
    async def report(org_id: WritableOrg, workflow_id: WorkflowId, request: Request, using: Using) -> dict[str, str]:
        """Hand a lifecycle message to the ledger. The body has the message's other fields, as JSON.

        202 means that the broker has the message. Sending it again is always safe. `source` is printable ASCII. A
        source that looks like `admin`, `billing`, `operator` or `scheduler` is refused.
        """
        of_the_path = {"org_id": org_id, "workflow_id": workflow_id}
        body = await _json_object(request)
        for name in of_the_path:
            if name in body:
                raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{name} belongs in the path, not in the body.")
        payload = {**body, **of_the_path}
        message = parse(task, payload)
        if isinstance(message, InvalidMessage):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, message.error)
        if not re.fullmatch(SOURCE_PATTERN, message.source):
            detail = f"{task}: source must be printable ASCII over HTTP, got {message.source!a}"
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
        if _as_it_looks(message.source) in map(_as_it_looks, OTHERS_SOURCES):
            detail = f"{task}: source must not be {_one_of(OTHERS_SOURCES)}: these are reserved"
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
        try:
            await run_in_threadpool(using.client.send_as_is, task, [payload], {})
        except NotSentError:
            detail = "The message could not be handed to the broker; send it again."
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, {"Retry-After": "5"}) from None
        return {"status": "accepted", "task": task, **of_the_path}


def _body(task: str) -> dict[str, Any]:
    """The body of a report, for the API's description: the message without the fields in the path."""
    schema = MESSAGES[task].model_json_schema()
    for name in ("org_id", "workflow_id"):
        del schema["properties"][name]
        schema["required"].remove(name)
    source = schema["properties"]["source"]
    source["description"] += f" Printable ASCII; not {_one_of(OTHERS_SOURCES)}, which are reserved."
    source["not"] = {"enum": list(OTHERS_SOURCES)}
    source["pattern"] = f"^{SOURCE_PATTERN}$"
    schema["properties"]["metadata"] |= ANY_OBJECT
    return {"content": {"application/json": {"schema": schema}}, "required": bool(schema["required"])}


def _as_it_looks(source: str) -> str:
    """`source` without differences that a reader hardly sees: spaces, capitals, and similar letters."""
    return source.lower().replace(" ", "").replace("rn", "m").translate(str.maketrans("i1|0", "lllo"))


def _one_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


async def _json_object(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is larger than {MAX_BODY_BYTES:,} bytes.")
    try:
        value = json.loads(body or b"{}", object_pairs_hook=_object, parse_int=_integer)
    except (ValueError, RecursionError):
        raise Problem(HTTPStatus.BAD_REQUEST, "The body is not JSON.") from None
    if not isinstance(value, dict):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "The body must be a JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A repeated name is refused, as it is unknown which of its values was meant."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            shown = ascii(name)[1:-1][:64]
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{shown} is given more than once in the same object.")
        found[name] = value
    return found


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads no more than 4,300 digits
        detail = f"The body must not contain an integer of {len(digits.lstrip('-')):,} digits."
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail) from None
