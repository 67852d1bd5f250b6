"""Every message of the ledger over HTTP, for engines and billing in any language: one address for each message class.

An answer of 202 means that the broker has the message. A client that prefers to wait gets the ledger's own answer, as a
caller of `AsyncClient` does. While a request waits it holds no thread, and it stops waiting when its client hangs up
or the server stops.
"""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from api_stub import answers, errors
from api_stub.auth import Principal
from api_stub.openapi import ANY_OBJECT
from api_stub.prefer import MOST_WAIT_S, applied, preferred_wait_s
from api_stub.problems import RETRY, Problem
from api_stub.protocol import STOPPING
from api_stub.rights import Caller, organization, scope_of
from api_stub.services import Services, Using
from api_stub.sources import OTHERS_SOURCES, SOURCE_PATTERN, one_of, refused_source
from api_stub.workflows import WorkflowId
from holdfast_client.async_client import Asked
from holdfast_client.client import DeadLetteredError, NoAnswerError, NoAnswersError, NotSentError
from holdfast_client.messages import MAX_BODY_BYTES, MESSAGES, AnyMessage, InvalidMessage, WorkflowMessage, parse
from holdfast_client.results import Result
from ledger.examples import EXAMPLES
from ledger.message_lines import strict_json

NOT_SENT = "The message could not be handed to the broker; send it again."

_WAIT = {
    "name": "Prefer",
    "in": "header",
    "required": False,
    "description": f"`wait=N`: wait up to N seconds for the ledger's answer, at most {MOST_WAIT_S}.",
    "schema": {"type": "string", "pattern": "^wait=[0-9]+$", "examples": ["wait=10"]},
}


def add(app: FastAPI) -> None:
    """Add an address for every message."""
    for model in MESSAGES.values():
        _add(app, model)


def _add(app: FastAPI, model: type[AnyMessage]) -> None:
    task = model.task
    kind, _, name = task.partition(".")

    org = organization(scope_of(task))

    async def of_workflow(
        org_id: Annotated[str, Depends(org)], workflow_id: WorkflowId, caller: Caller, request: Request, using: Using
    ) -> Response:
        return await _take(task, {"org_id": org_id, "workflow_id": workflow_id}, caller, request, using)

    async def of_wallet(
        org_id: Annotated[str, Depends(org)], caller: Caller, request: Request, using: Using
    ) -> Response:
        return await _take(task, {"org_id": org_id}, caller, request, using)

    is_of_workflow = issubclass(model, WorkflowMessage)
    in_path = ("org_id", "workflow_id") if is_of_workflow else ("org_id",)
    app.post(
        f"/api/organizations/{{orgId}}/{'workflows/{workflowId}' if is_of_workflow else kind}/{name}",
        name=f"{kind}_{name}",
        tags=["workflows" if is_of_workflow else kind],
        summary=task,
        description=_description(model),
        status_code=HTTPStatus.ACCEPTED,
        response_model=answers.Accepted,
        responses=_responses(has_location=is_of_workflow),
        openapi_extra={"parameters": [_WAIT], "requestBody": _body(model, in_path)},
    )(of_workflow if is_of_workflow else of_wallet)


async def _take(
    task: str, of_the_path: dict[str, str], caller: Principal, request: Request, using: Services
) -> Response:
    """Check the message, hand it over, and answer."""
    body = await _json_object(request)
    for name in of_the_path:
        if name in body:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{name} belongs in the path, not in the body.")
    payload = {**body, **of_the_path}
    message = parse(task, payload)
    problem = message.error if isinstance(message, InvalidMessage) else refused_source(message)
    if problem is not None:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, problem)
    wait_s = preferred_wait_s(request) if using.async_client.keeps_answers else 0
    with using.places.one_for(caller) if wait_s else nullcontext(False) as may_wait:
        result, waited_s = await _hand_over(task, payload, wait_s if may_wait else 0, request, using)
    headers = applied(waited_s) if waited_s else {}
    if result is not None:
        return JSONResponse(answers.Result.of(result), HTTPStatus.OK, headers)
    workflow_id = of_the_path.get("workflow_id")
    if workflow_id is not None:
        headers["Location"] = f"/api/organizations/{message.org_id}/workflows/{workflow_id}"
    accepted = {"status": "accepted", "task": task, "org_id": message.org_id, "workflow_id": workflow_id}
    return JSONResponse(accepted, HTTPStatus.ACCEPTED, headers)


async def _hand_over(
    task: str, payload: dict[str, Any], wait_s: int, request: Request, using: Services
) -> tuple[Result | None, int]:
    """Send the message. Returns the ledger's answer, if it came in time, and how long it might have taken."""
    try:
        if wait_s:
            try:
                async with using.async_client.asking(task, [payload], {}) as asked:
                    return await _answer(asked, wait_s, request), wait_s
            except NoAnswersError:
                pass  # it was not sent; without its answer, it can be
        return await using.async_client.send_as_is(task, [payload], {}), 0
    except DeadLetteredError as error:
        status = HTTPStatus.CONFLICT if error.code == "conflict" else HTTPStatus.UNPROCESSABLE_ENTITY
        raise Problem(status, f"{error}.", applied(wait_s), code=error.code, dead_letter=error.letter_id) from None
    except NotSentError:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, NOT_SENT, RETRY) from None


async def _answer(asked: Asked, wait_s: int, request: Request) -> Result | None:
    """The answer, unless it takes longer, the client hangs up or the server stops. Raises DeadLetteredError."""
    answer = asyncio.ensure_future(asked.answer(wait_s))
    ends: list[asyncio.Future[object]] = [asyncio.ensure_future(_hung_up(request))]
    if (stopping := getattr(request.state, STOPPING, None)) is not None:
        ends.append(asyncio.ensure_future(stopping.wait()))
    everything: list[asyncio.Future[Any]] = [answer, *ends]
    try:
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    except NoAnswerError:
        return None
    finally:
        for future in everything:
            future.cancel()
        await asyncio.wait(everything)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json_object(request: Request) -> dict[str, Any]:
    try:
        value = strict_json(await whole_body(request, MAX_BODY_BYTES) or b"{}")
    except ValueError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"The body cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "The body must be a JSON object.")
    return value


async def whole_body(request: Request, most_bytes: int) -> bytes:
    """The body of a request. If it is larger than `most_bytes`, the answer is 413."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most_bytes:
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is larger than {most_bytes:,} bytes.")
    return bytes(body)


def _description(model: type[AnyMessage]) -> str:
    meaning = " ".join((model.__doc__ or "").split())
    scope = scope_of(model.task)
    others = one_of([f"`{source}`" for source in OTHERS_SOURCES[scope]])
    return f"""{meaning}

The body has the message's other fields, as JSON. The token needs the scope `{scope}`. Sending the message
again is always safe.

- **202**: the broker has the message, and the ledger will apply it.
- **200**: with `Prefer: wait=N`, what the ledger did. A start that is rejected is an answer, too, and not an error.

`source` is printable ASCII. One that looks like {others} is refused."""


def _body(model: type[AnyMessage], in_path: Sequence[str]) -> dict[str, Any]:
    """The body, for the API's description: the message without the fields in the path."""
    schema = model.model_json_schema()
    for name in in_path:
        del schema["properties"][name]
        schema["required"].remove(name)
    others = OTHERS_SOURCES[scope_of(model.task)]
    source = schema["properties"]["source"]
    source["description"] += f" Printable ASCII; not {one_of(others)}, which are reserved."
    source["not"] = {"enum": list(others)}
    source["pattern"] = f"^{SOURCE_PATTERN}$"
    schema["properties"]["metadata"] |= ANY_OBJECT
    example = {name: value for name, value in EXAMPLES[model.task].items() if name not in in_path}
    content = {"schema": schema, "example": example}
    return {"content": {"application/json": content}, "required": bool(schema["required"])}


def _responses(*, has_location: bool) -> dict[int | str, dict[str, Any]]:
    text = {"schema": {"type": "string"}}
    waited = {"Preference-Applied": {"description": "How long was waited, at most: `wait=10`.", **text}}
    location = {"Location": {"description": "Where the workflow can be read.", **text}} if has_location else {}
    return {
        HTTPStatus.OK.value: {
            "model": answers.Result,
            "description": "What the ledger did, for a client that waited.",
            "headers": waited,
        },
        HTTPStatus.ACCEPTED.value: {"description": "The broker has the message.", "headers": waited | location},
        **errors.of_messages(
            {
                HTTPStatus.CONFLICT: "The message was kept as a dead letter: it contradicts an earlier one.",
                HTTPStatus.UNPROCESSABLE_ENTITY: "The message is not valid. Or, if the problem has a `dead_letter`: it "
                "could not be applied, and was kept.",
            }
        ),
    }
