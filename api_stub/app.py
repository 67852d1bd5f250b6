"""The HTTP API: credit history and wallets for customers, lifecycle messages for engines that are not in Python.

`uvicorn api_stub.app:app` serves it. Reads come from the ledger, each request from one snapshot; what engines send goes
through the broker, as it does from `worker.client`.
"""

import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator
from sqlalchemy import Connection

from api_stub import metrics, operators, pages, problems
from api_stub.problems import Problem
from api_stub.services import Services, connection, organization, services
from ledger import history, logs
from ledger.history import EventFilter, WalletView
from ledger.messages import ID_PATTERN, MAX_CREDITS, InvalidMessage, parse
from ledger.settings import Settings, SettingsError
from ledger.state import EventType
from worker.client import NotSentError

MAX_BODY_BYTES = 64 * 1024
"""The largest request body; the largest message is well below it."""

ReadableOrg = Annotated[str, Depends(organization("credits:read"))]
WritableOrg = Annotated[str, Depends(organization("workflows:write"))]
Ledger = Annotated[Connection, Depends(connection)]
WorkflowId = Annotated[str, Path(alias="workflowId", description="The workflow's id.")]


def _moment(text: str) -> str:
    history.moment(text)
    return text


def _storable(text: str) -> str:
    if "\x00" in text or not text.isprintable():
        raise ValueError("must not contain control characters")
    return text


Moment = Annotated[str, AfterValidator(_moment)]


def event_filter(
    date_from: Annotated[Moment | None, Query(description="First day or moment (ISO 8601).")] = None,
    date_to: Annotated[Moment | None, Query(description="Last day, or the moment before which (ISO 8601).")] = None,
    event_type: Annotated[list[EventType] | None, Query(description="Repeatable: any of these types.")] = None,
    project_id: Annotated[str | None, Query(max_length=128), AfterValidator(_storable)] = None,
) -> EventFilter:
    """The events that a request asks for."""
    return EventFilter(
        created_from=None if date_from is None else history.moment(date_from),
        created_before=None if date_to is None else history.moment(date_to, ends_range=True),
        event_types=tuple(event_type or ()),
        project_id=project_id,
    )


def create_app(settings: Settings) -> FastAPI:
    """The API for these settings. Raises SettingsError."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.services.close()

    app = FastAPI(
        title="Holdfast",
        summary="The credit ledger.",
        version=version("holdfast"),
        lifespan=lifespan,
        # Their scripts would come from elsewhere; /openapi.json is what they show.
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = Services(settings)
    problems.install(app)
    _add_credits(app)
    _add_workflows(app)
    metrics.add(app)
    pages.add(app)
    operators.add(app)
    return app


def _add_credits(app: FastAPI) -> None:
    @app.get("/api/organizations/{orgId}/credit-events", tags=["credits"])
    def credit_events(
        org_id: ReadableOrg,
        ledger: Ledger,
        matching: Annotated[EventFilter, Depends(event_filter)],
        limit: Annotated[int, Query(ge=1, le=history.MAX_PAGE)] = history.MAX_PAGE,
        offset: Annotated[int, Query(ge=0, le=MAX_CREDITS)] = 0,
        cursor: Annotated[int | None, Query(ge=1, le=MAX_CREDITS, description="`next_cursor` of a page.")] = None,
    ) -> dict[str, Any]:
        """The credit history, newest first. Follow `next_cursor` to read on while events are being added."""
        if cursor is not None and offset:
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "cursor cannot be combined with offset")
        page = history.events(ledger, org_id, matching, limit=limit, offset=offset, before_seq=cursor)
        return {
            "items": [history.as_item(event) for event in page.events],
            "total": page.total,
            "limit": limit,
            "offset": offset,
            "next_cursor": page.next_before_seq,
        }

    @app.get("/api/organizations/{orgId}/credits", tags=["credits"])
    def credits_of(
        org_id: ReadableOrg,
        ledger: Ledger,
        at: Annotated[Moment | None, Query(description="The wallet as of this time (ISO 8601).")] = None,
    ) -> dict[str, Any]:
        """The wallet, now or as of a time."""
        if at is not None:
            return {"org_id": org_id, "at": at, **asdict(history.balances_at(ledger, org_id, history.moment(at)))}
        return _wallet_json(history.wallet(ledger, org_id) or history.WalletView(org_id))

    @app.get("/api/organizations/{orgId}/workflows/{workflowId}", tags=["workflows"])
    def workflow(org_id: ReadableOrg, workflow_id: WorkflowId, ledger: Ledger) -> dict[str, Any]:
        """What became of a workflow: its state, reservation and usage, and its events, oldest first."""
        found = history.workflow(ledger, org_id, workflow_id) if re.fullmatch(ID_PATTERN, workflow_id) else None
        if found is None:
            raise Problem(HTTPStatus.NOT_FOUND, "There is no such workflow in this organization.")
        return {**asdict(found), "events": [history.as_item(event) for event in found.events]}


def _wallet_json(view: WalletView) -> dict[str, Any]:
    fields = asdict(view)
    start, end = fields.pop("current_period_start"), fields.pop("current_period_end")
    return {**fields, "current_period": None if start is None else {"start": start, "end": end}}


def _add_workflows(app: FastAPI) -> None:
    @app.post("/api/organizations/{orgId}/workflows/{workflowId}/{step}", tags=["workflows"], status_code=202)
    async def report(
        org_id: WritableOrg,
        workflow_id: WorkflowId,
        step: Literal["start", "finish", "cancel", "fail"],
        request: Request,
        using: Annotated[Services, Depends(services)],
    ) -> dict[str, str]:
        """Hand a lifecycle message to the ledger. The body has the message's other fields, as JSON.

        202 says that the broker has the message. Sending it again is always safe.
        """
        task = f"workflow.{step}"
        payload = {**await _json_object(request), "org_id": org_id, "workflow_id": workflow_id}
        message = parse(task, payload)
        if isinstance(message, InvalidMessage):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, message.error)
        try:
            await run_in_threadpool(using.client.send_as_is, task, [payload], {})
        except NotSentError:
            detail = "The message could not be handed over; send it again."
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, {"Retry-After": "5"}) from None
        return {"status": "accepted", "task": task, "org_id": org_id, "workflow_id": workflow_id}


async def _json_object(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is larger than {MAX_BODY_BYTES:,} bytes.")
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise Problem(HTTPStatus.BAD_REQUEST, "The body is not JSON.") from None
    if not isinstance(value, dict):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "The body must be a JSON object.")
    return value


def __getattr__(name: str) -> FastAPI:
    """`app`, made when a server asks for it; wrong settings are one line and exit code 2."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not logs.are_for_a_person():
        logs.reformat("uvicorn", "uvicorn.access")
    try:
        return create_app(Settings.load("database_url", "broker_url"))
    except SettingsError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
