"""The credit history and the balances of an organization, for programs."""

import re
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query
from pydantic import AfterValidator, PlainValidator, WithJsonSchema
from sqlalchemy import Connection

from api_stub import answers, errors
from api_stub.openapi import IS_A_NAME, IS_A_TIME
from api_stub.problems import Problem
from api_stub.reader import Reader
from api_stub.rights import IS_AN_ID, ReadableOrg
from api_stub.services import Using
from holdfast_client.messages import MAX_CREDITS
from ledger import archived, filters, history, receipts, views
from ledger.filters import EventFilter
from ledger.receipts import Place
from ledger.state import EventType
from ledger.views import WalletView

Moment = Annotated[datetime, PlainValidator(filters.moment), IS_A_TIME]
# To FastAPI, a dataclass such as filters.When would be a body.
DayOrTime = Annotated[Any, PlainValidator(filters.when), IS_A_TIME]


def cursor_of(text: str) -> int | Place:
    """Where a page of events, or of receipts, begins. Raises ValueError, as `filters.when` does."""
    if re.fullmatch(receipts.PLACE_PATTERN, text):
        return Place.of(text)
    if not re.fullmatch("-?[0-9]+", text):
        raise ValueError("must be an integer")
    if not re.fullmatch("[0-9]{1,16}", text) or not 1 <= int(text) <= MAX_CREDITS:
        raise ValueError(f"must be from 1 to {MAX_CREDITS}")
    return int(text)


IS_A_CURSOR = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": MAX_CREDITS},
            {"type": "string", "pattern": f"^{receipts.PLACE_PATTERN}$"},
        ]
    }
)
Cursor = Annotated[
    Annotated[Any, PlainValidator(cursor_of), IS_A_CURSOR] | None,
    Query(description="`next_cursor` of a page; not with `offset`."),
]
GroupBy = Annotated[
    Literal["workflow"] | None,
    Query(
        description="Receipts in place of events: one for each workflow of which an event matches, and one for each "
        "matching event that belongs to none. Not with `offset`."
    ),
]


DateFrom = Annotated[DayOrTime | None, Query(description="First day or moment (ISO 8601).")]
DateTo = Annotated[
    DayOrTime | None, Query(description="Last day, or the moment before which to end; not before `date_from`.")
]


def time_range(date_from: DateFrom, date_to: DateTo) -> tuple[datetime | None, datetime | None]:
    """The range of time in a query: its first moment, and the one before which it ends. Raises Problem."""
    try:
        return filters.time_range(date_from, date_to)
    except ValueError:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "date_to must not be before date_from") from None


def event_filter(
    date_from: DateFrom = None,
    date_to: DateTo = None,
    event_type: Annotated[list[EventType] | None, Query(description="Repeatable: any of these types.")] = None,
    project_id: Annotated[
        str | None,
        Query(description="Only of this project.", json_schema_extra=IS_AN_ID),
        AfterValidator(filters.identifier),
    ] = None,
    activity_name: Annotated[
        list[Annotated[str, AfterValidator(filters.activity_name), IS_A_NAME]] | None,
        Query(description="Repeatable: any of these activities."),
    ] = None,
    workflow_id: Annotated[
        str | None,
        Query(description="Only of this workflow and its refunds.", json_schema_extra=IS_AN_ID),
        AfterValidator(filters.identifier),
    ] = None,
) -> EventFilter:
    """The filter of events in a query."""
    created_from, created_before = time_range(date_from, date_to)
    return EventFilter(
        created_from=created_from,
        created_before=created_before,
        event_types=tuple(event_type or ()),
        project_id=project_id,
        activity_names=tuple(activity_name or ()),
        workflow_id=workflow_id,
    )


def add(app: FastAPI) -> None:
    """Add the routes for the credit history and the wallet."""

    @app.get(
        "/api/organizations/{orgId}/credit-events",
        tags=["credits"],
        response_model=answers.EventPage | answers.ReceiptPage,
        responses=errors.READ_RESPONSES,
    )
    def credit_events(
        org_id: ReadableOrg,
        using: Using,
        matching: Annotated[EventFilter, Depends(event_filter)],
        group_by: GroupBy = None,
        limit: Annotated[int, Query(ge=1, le=history.MAX_PAGE)] = history.MAX_PAGE,
        offset: Annotated[int, Query(ge=0, le=MAX_CREDITS)] = 0,
        cursor: Cursor = None,
    ) -> dict[str, Any]:
        """The credit history, newest first. Follow `next_cursor` to read on while events are being added."""
        _check(cursor, offset, group_by)
        reader = Reader(using)
        reader.go_on_from(org_id, cursor)
        through = (org_id, matching) if matching.looks_at_each else None
        if group_by is not None:
            grouped = partial(receipts.page, org_id=org_id, matching=matching, limit=limit, place=cursor)
            found = _receipts(reader.read(grouped, through=through), org_id, limit, cursor)
        else:
            each = partial(
                history.events, org_id=org_id, matching=matching, limit=limit, offset=offset, before_seq=cursor
            )
            found = _events(reader.read(each, through=through), limit, offset)
        return {**found, "as_of": reader.as_of}

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
            Query(
                description="The wallet after all events until this time (ISO 8601), one at that moment included; now "
                "at the latest. A date alone is the beginning of that UTC day."
            ),
        ] = None,
    ) -> dict[str, Any]:
        """The wallet, now or as of a time."""
        with using.reading() as ledger:
            if at is not None:
                return _as_of(ledger, org_id, min(at, datetime.now(UTC)))
            return views.as_item(views.wallet(ledger, org_id) or WalletView(org_id))


def _as_of(ledger: Connection, org_id: str, then: datetime) -> dict[str, Any]:
    balances = history.balances_at(ledger, org_id, then)
    if balances is None:
        raise Problem(HTTPStatus.NOT_FOUND, "The events of that time are in the archive, and so are the balances.")
    return {"org_id": org_id, "at": then, **asdict(balances)}


def _check(cursor: int | Place | None, offset: int, group_by: str | None) -> None:
    """Answer 422 if these parameters do not go together."""
    wrong = None
    if cursor is not None and offset:
        wrong = "cursor cannot be combined with offset"
    elif group_by is not None and offset:
        wrong = "offset cannot be combined with group_by: follow next_cursor"
    elif cursor is not None and isinstance(cursor, Place) != (group_by is not None):
        wrong = "cursor must be of a page with the same group_by"
    if wrong is not None:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, wrong)


def _events(page: history.Page, limit: int, offset: int) -> dict[str, Any]:
    return {
        "items": [history.as_item(event) for event in page.events],
        "total": page.total,
        "credits": page.credits,
        "limit": limit,
        "offset": offset,
        "next_cursor": page.next_before_seq,
        "archived": archived.as_item(page.archived),
    }


def _receipts(page: receipts.Page, org_id: str, limit: int, place: Place | None) -> dict[str, Any]:
    events = f"/api/organizations/{org_id}/credit-events?workflow_id="
    return {
        "items": [
            receipts.as_item(each) | {"events_url": None if each.workflow_id is None else events + each.workflow_id}
            for each in page.receipts
        ],
        "total": len(page.receipts) if place is None and page.next is None else None,
        "credits": page.credits,
        "limit": limit,
        "offset": 0,
        "next_cursor": None if page.next is None else str(page.next),
        "archived": archived.as_item(page.archived),
    }
