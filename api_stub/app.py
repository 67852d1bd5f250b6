"""The HTTP API: credit history and wallets for customers, lifecycle messages for engines that are not in Python.

`uvicorn api_stub.app:app --http api_stub.protocol:PromptProtocol` serves it. Reads come from the ledger, each request
from one snapshot; what engines send goes through the broker, as it does from `worker.client`.
"""

import json
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any

from anyio import CancelScope
from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator, PlainValidator, WithJsonSchema
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_stub import answers, errors, metrics, operators, pages
from api_stub.problems import Problem
from api_stub.rendering import FOR_ALL
from api_stub.services import IS_AN_ID, Services, Using, organization
from api_stub.turns import Turns
from ledger import history, logs
from ledger.history import EventFilter, WalletView
from ledger.messages import (
    ID_PATTERN,
    MAX_CREDITS,
    MESSAGES,
    PLAIN_TEXT_PATTERN,
    TIME_PATTERN,
    InvalidMessage,
    parse,
)
from ledger.settings import Settings, SettingsError
from ledger.state import EventType
from worker.client import BrokerUnavailableError, Client, NotSentError, UnsupportedBrokerError

MAX_BODY_BYTES = 64 * 1024
"""The largest request body; the largest message is well below it."""

OTHERS_SOURCES = ("admin", "billing", "operator", "scheduler")
"""Whom the credit history shows for what comes in other ways: an engine's message cannot pass for theirs."""

SOURCE_PATTERN = "[ -~]+"
"""Of what an engine's `source` consists over HTTP: in all of Unicode, too much looks like something else."""

TWO_LENGTHS = "The request has a Content-Length and a Transfer-Encoding."
CLOSE = {"Connection": "close"}

ReadableOrg = Annotated[str, Depends(organization("credits:read"))]
WritableOrg = Annotated[str, Depends(organization("workflows:write"))]
STEPS = ("start", "finish", "cancel", "fail")
WorkflowId = Annotated[str, Path(alias="workflowId", description="The workflow's id.", json_schema_extra=IS_AN_ID)]

# What the API's description asks for; `history.when` understands more. The years are those which no offset can take out
# of the calendar.
_A_DAY = {"type": "string", "format": "date", "pattern": "^[12][0-9]{3}-[0-9]{2}-[0-9]{2}$"}
_A_TIME = {"type": "string", "format": "date-time", "pattern": f"^[12][0-9]{{3}}-{TIME_PATTERN}$"}
_IS_A_TIME = WithJsonSchema({"anyOf": [_A_DAY, _A_TIME]})
Moment = Annotated[datetime, PlainValidator(history.moment), _IS_A_TIME]
# To FastAPI, a dataclass such as history.When would be a body.
When = Annotated[Any, PlainValidator(history.when), _IS_A_TIME]

_VALUE = {"$ref": "#/components/schemas/Value"}
_OBJECT = {"type": "object", "propertyNames": {"pattern": PLAIN_TEXT_PATTERN}, "additionalProperties": _VALUE}
_VALUES: dict[str, Any] = {
    "anyOf": [
        {"type": ["null", "boolean", "number"]},
        {"type": "string", "pattern": PLAIN_TEXT_PATTERN},
        {"type": "array", "items": _VALUE},
        _OBJECT,
    ]
}
"""Whatever may be in `metadata`."""


def event_filter(
    date_from: Annotated[When | None, Query(description="First day or moment (ISO 8601).")] = None,
    date_to: Annotated[
        When | None, Query(description="Last day, or the moment before which; not before `date_from`.")
    ] = None,
    event_type: Annotated[list[EventType] | None, Query(description="Repeatable: any of these types.")] = None,
    project_id: Annotated[
        str | None,
        Query(description="Only of this project.", json_schema_extra=IS_AN_ID),
        AfterValidator(history.project),
    ] = None,
) -> EventFilter:
    """The events that a request asks for."""
    try:
        created_from, created_before = history.time_range(date_from, date_to)
    except ValueError:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "date_to must not be before date_from") from None
    return EventFilter(created_from, created_before, tuple(event_type or ()), project_id)


def create_app(settings: Settings) -> FastAPI:
    """The API for these settings. Raises SettingsError."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.services.close()

    app = _Api(
        title="Holdfast",
        summary="The credit ledger.",
        version=version("holdfast"),
        lifespan=lifespan,
        # Their scripts would come from elsewhere; /openapi.json is what they show.
        docs_url=None,
        redoc_url=None,
        # They would name the scheme and host that this process sees, not those that a proxy in front of it has.
        redirect_slashes=False,
        responses=errors.RESPONSES,
    )
    app.state.services = Services(settings)
    app.add_middleware(Turns, authenticator=app.state.services.authenticator)
    app.add_middleware(_around_every_answer)
    errors.install(app)
    _add_credits(app)
    _add_workflows(app)
    metrics.add(app)
    pages.add(app)
    operators.add(app)
    return app


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The description, with what bodies refer to, and without null in parameters, where nobody can send it."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"]["Value"] = _VALUES
            operations = [operation for path in document["paths"].values() for operation in path.values()]
            for parameter in (each for operation in operations for each in operation.get("parameters", ())):
                schema = parameter["schema"]
                if given := [each for each in schema.pop("anyOf", ()) if each != {"type": "null"}]:
                    schema |= given[0] if len(given) == 1 else {"anyOf": given}
        return super().openapi()


def _around_every_answer(app: ASGIApp) -> ASGIApp:
    """HEAD is answered as GET, every answer has the headers `FOR_ALL`, and who hangs up is no error."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            # A proxy in front of us may have taken the other one for the length, and what follows for a request.
            refused = await errors.answer(Request(scope), Problem(HTTPStatus.BAD_REQUEST, TWO_LENGTHS, CLOSE))
            await refused(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"

        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in FOR_ALL.items():
                    headers.setdefault(name, value)
            elif is_head:
                return
            await send(message)
            if is_head:
                await send({"type": "http.response.body"})
                rest.cancel()  # so that nobody reads a whole history to throw it away

        with suppress(ClientDisconnect), CancelScope() as rest:
            await app({**scope, "method": "GET"} if is_head else scope, receive, pass_on)

    return answer


def _add_credits(app: FastAPI) -> None:
    @app.get(
        "/api/organizations/{orgId}/credit-events",
        tags=["credits"],
        response_model=answers.EventPage,
        responses=errors.READ_RESPONSES,
    )
    def credit_events(
        org_id: ReadableOrg,
        using: Using,
        matching: Annotated[EventFilter, Depends(event_filter)],
        limit: Annotated[int, Query(ge=1, le=history.MAX_PAGE)] = history.MAX_PAGE,
        offset: Annotated[int, Query(ge=0, le=MAX_CREDITS)] = 0,
        cursor: Annotated[
            int | None, Query(ge=1, le=MAX_CREDITS, description="`next_cursor` of a page; not with `offset`.")
        ] = None,
    ) -> dict[str, Any]:
        """The credit history, newest first. Follow `next_cursor` to read on while events are being added."""
        if cursor is not None and offset:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "cursor cannot be combined with offset")
        with using.reading(through=org_id if matching.looks_at_each else None) as ledger:
            page = history.events(ledger, org_id, matching, limit=limit, offset=offset, before_seq=cursor)
        return {
            "items": [history.as_item(event) for event in page.events],
            "total": page.total,
            "limit": limit,
            "offset": offset,
            "next_cursor": page.next_before_seq,
        }

    @app.get(
        "/api/organizations/{orgId}/credits",
        tags=["credits"],
        response_model=answers.Wallet | answers.WalletThen,
        responses=errors.READ_RESPONSES,
    )
    def credits_of(
        org_id: ReadableOrg,
        using: Using,
        at: Annotated[
            Moment | None,
            Query(description="The wallet as of this time (ISO 8601). A date alone is the beginning of that UTC day."),
        ] = None,
    ) -> dict[str, Any]:
        """The wallet, now or as of a time."""
        with using.reading() as ledger:
            if at is not None:
                return {"org_id": org_id, "at": at, **asdict(history.balances_at(ledger, org_id, at))}
            return _wallet_json(history.wallet(ledger, org_id) or WalletView(org_id))

    @app.get(
        "/api/organizations/{orgId}/workflows/{workflowId}",
        tags=["workflows"],
        response_model=answers.Workflow,
        responses=errors.READ_RESPONSES,
    )
    def workflow(org_id: ReadableOrg, workflow_id: WorkflowId, using: Using) -> dict[str, Any]:
        """What became of a workflow: its state, reservation and usage, and its events and refunds, oldest first."""
        found = None
        if re.fullmatch(ID_PATTERN, workflow_id):
            with using.reading() as ledger:
                found = history.workflow(ledger, org_id, workflow_id)
        if found is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is no such workflow in this organization.")
        return {**asdict(found), "events": [history.as_item(event) for event in found.events]}


def _wallet_json(view: WalletView) -> dict[str, Any]:
    fields = asdict(view)
    start, end = fields.pop("current_period_start"), fields.pop("current_period_end")
    return {**fields, "current_period": None if start is None else {"start": start, "end": end}}


def _add_workflows(app: FastAPI) -> None:
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

        202 says that the broker has the message. Sending it again is always safe. `source` is printable ASCII; one that
        looks like that of other messages, `admin`, `billing`, `operator` or `scheduler`, is refused.
        """
        of_the_path = {"org_id": org_id, "workflow_id": workflow_id}
        body = await _json_object(request)
        for name in of_the_path:
            if name in body:
                raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{name} is in the path, not in the body.")
        payload = {**body, **of_the_path}
        message = parse(task, payload)
        if isinstance(message, InvalidMessage):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, message.error)
        if not re.fullmatch(SOURCE_PATTERN, message.source):
            detail = f"{task}: source must be printable ASCII over HTTP, got {message.source!a}"
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
        if _as_it_looks(message.source) in map(_as_it_looks, OTHERS_SOURCES):
            detail = f"{task}: source must not be {_one_of(OTHERS_SOURCES)}: their messages come in other ways"
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
        try:
            await run_in_threadpool(using.client.send_as_is, task, [payload], {})
        except NotSentError:
            detail = "The message could not be handed over; send it again."
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, {"Retry-After": "5"}) from None
        return {"status": "accepted", "task": task, **of_the_path}


def _body(task: str) -> dict[str, Any]:
    """The body of a report, for the API's description: the message without what the path says."""
    schema = MESSAGES[task].model_json_schema()
    for name in ("org_id", "workflow_id"):
        del schema["properties"][name]
        schema["required"].remove(name)
    source = schema["properties"]["source"]
    source["description"] += f" Printable ASCII; not {_one_of(OTHERS_SOURCES)}, whose messages come in other ways."
    source["not"] = {"enum": list(OTHERS_SOURCES)}
    source["pattern"] = f"^{SOURCE_PATTERN}$"
    schema["properties"]["metadata"] |= _OBJECT
    return {"content": {"application/json": {"schema": schema}}, "required": bool(schema["required"])}


def _as_it_looks(source: str) -> str:
    """`source` without what a reader hardly sees: spaces, capitals, and which of two similar letters it is."""
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
    """A JSON object; a name that comes again is refused, as nobody can know which of its values was meant."""
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


def __getattr__(name: str) -> FastAPI:
    """`app`, made when a server asks for it; wrong settings, or a wrong broker, are one line and exit code 2."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not logs.are_for_a_person():
        logs.reformat("uvicorn", "uvicorn.access")
    try:
        app = create_app(Settings.load("database_url", "broker_url"))
        _refuse_unsupported(app.state.services.client)
    except (SettingsError, UnsupportedBrokerError) as error:
        print(f"holdfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return app


def _refuse_unsupported(broker: Client) -> None:
    """Raise UnsupportedBrokerError if the broker is there, and can never be used."""
    try:
        broker.waiting()
    except UnsupportedBrokerError:
        raise
    except BrokerUnavailableError:
        pass  # it may come; then it is checked before anything is sent to it
