"""The credit history and the balances of an organization, for programs."""

from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query
from pydantic import AfterValidator, PlainValidator

from api_stub import answers, errors
from api_stub.openapi import IS_A_TIME
from api_stub.problems import Problem
from api_stub.rights import IS_AN_ID, ReadableOrg
from api_stub.services import Using
from ledger import filters, history, views
from ledger.filters import EventFilter
from ledger.messages import MAX_CREDITS
from ledger.state import EventType
from ledger.views import WalletView

Moment = Annotated[datetime, PlainValidator(filters.moment), IS_A_TIME]
# To FastAPI, a dataclass such as filters.When would be a body.
DayOrTime = Annotated[Any, PlainValidator(filters.when), IS_A_TIME]


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
        workflow_id=workflow_id,
    )


def add(app: FastAPI) -> None:
    """Add the routes for the credit history and the wallet."""

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
            Query(
                description="The wallet after all events until this time (ISO 8601), one at that moment included; now "
                "at the latest. A date alone is the beginning of that UTC day."
            ),
        ] = None,
    ) -> dict[str, Any]:
        """The wallet, now or as of a time."""
        with using.reading() as ledger:
            if at is not None:
                then = min(at, datetime.now(UTC))
                return {"org_id": org_id, "at": then, **asdict(history.balances_at(ledger, org_id, then))}
            return views.as_item(views.wallet(ledger, org_id) or WalletView(org_id))
