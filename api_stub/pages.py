"""The pages for customers: an organization's credit history, as a page and as a CSV file. Only reads."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from http import HTTPStatus
from itertools import chain
from typing import Annotated, Any, TypeVar, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from api_stub import exports, queries, sessions
from api_stub.chart import step_chart
from api_stub.console import no_wallet
from api_stub.problems import NO_PAGE, Problem
from api_stub.rendering import PageRoute, add_assets, page, see_other
from api_stub.rights import NO_ACCESS, OrgId, require
from api_stub.services import Services, Using
from api_stub.sessions import Session, SignedIn, signed_in
from ledger import directory, filters, history, receipts, views
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.messages import ID_PATTERN, MAX_CREDITS, MAX_ID_LENGTH
from ledger.readable import beginning
from ledger.receipts import Place, Receipt
from ledger.state import EventType
from ledger.views import Reservation, WalletView

EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
CHART_POINTS = 240
VIEWS = "activity", "ledger"
"""The tabs of the history: by run, and every event. The first is shown unless another is asked for."""
PLACES = "before", "reservations_after"
"""The parameters that select the page, not its content."""
FIELDS = ("date_from", "date_to", "project_id", "workflow_id", "limit", "view", *PLACES)
"""The parameters with one value."""
ID = re.compile(ID_PATTERN)

Value = TypeVar("Value")

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class HistoryQuery:
    """The query of a page: as typed, as understood, and its errors."""

    typed: Mapping[str, str]
    event_types: tuple[str, ...]
    """As typed."""
    matching: EventFilter
    view: str
    limit: int
    before_seq: int | None
    """Where the page of events begins."""
    place: Place | None
    """Where the page of receipts begins."""
    reservations_after: int
    """How many of the oldest reservations to skip."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """By parameter, a sentence about what is wrong with it."""

    def query(self, **changes: object) -> str:
        """The query of the same filter, on the newest page, with `changes`."""
        given = {name: value for name, value in self.typed.items() if value and name not in PLACES} | changes
        types = [("event_type", name) for name in self.event_types]
        return urlencode([*given.items(), *types])

    def kind_of_field(self, name: str) -> str:
        """`date` for a day, otherwise `text`: a field for a date would lose anything else that was typed."""
        return "date" if not self.typed[name] or _is_day(self.typed[name]) else "text"

    @property
    def is_filtered(self) -> bool:
        """Whether there is any condition on the events."""
        return self.matching != EVERY_EVENT


def history_query(request: Request) -> HistoryQuery:
    """Read the query. An empty field of the form counts as missing."""
    query = request.query_params
    typed = {name: query.get(name, "").strip() for name in FIELDS}
    event_types = tuple(dict.fromkeys(name for name in query.getlist("event_type") if name))
    errors = queries.complaints(query, ("event_type", *FIELDS), repeatable=("event_type",))

    first = _understood(typed, "date_from", filters.when, errors)
    last = _understood(typed, "date_to", filters.when, errors)
    created_from, created_before = None, None
    try:
        created_from, created_before = filters.time_range(first, last)
    except ValueError:
        errors["date_to"] = "date_to must not be before date_from."
    limit = _understood(typed, "limit", lambda text: _number(text, history.MAX_PAGE), errors)
    known_types = tuple(name for name in EVENT_TYPES if name in event_types)
    if len(known_types) < len(event_types):
        errors["event_type"] = f"event_type must be one of {', '.join(EVENT_TYPES)}."
    project_id = _understood(typed, "project_id", filters.identifier, errors)
    workflow_id = _understood(typed, "workflow_id", filters.identifier, errors)
    view = _understood(typed, "view", _view, errors) or VIEWS[0]
    before_seq, place = None, None
    if view == "ledger":
        before_seq = _understood(typed, "before", lambda text: _number(text, MAX_CREDITS), errors)
    else:
        place = _understood(typed, "before", _place, errors)
    return HistoryQuery(
        typed=typed,
        event_types=event_types,
        matching=EventFilter(
            created_from=created_from,
            created_before=created_before,
            event_types=known_types,
            project_id=project_id,
            workflow_id=workflow_id,
        ),
        view=view,
        limit=limit or history.MAX_PAGE,
        before_seq=before_seq,
        place=place,
        reservations_after=_understood(typed, PLACES[1], lambda text: _number(text, MAX_CREDITS), errors) or 0,
        errors=errors,
    )


Query = Annotated[HistoryQuery, Depends(history_query)]


def readable(org_id: OrgId, session: SignedIn) -> str:
    """A dependency: the organization in the path, if the session may read it. Otherwise 404 or 403.

    Staff may read every organization.
    """
    if not (session.is_staff and ID.fullmatch(org_id)):
        require(session.principal, org_id, "credits:read")
    return org_id


VisibleOrg = Annotated[str, Depends(readable)]


@router.get("/")
def start(request: Request, session: SignedIn, using: Using, organization: str = "") -> Response:
    """Redirect staff to their own start page, and others to their only page; or list the organizations."""
    principal = session.principal
    may_read = "credits:read" in principal.scopes
    if session.is_staff and not organization:
        return see_other("/operators")
    if not may_read:
        raise Problem(HTTPStatus.FORBIDDEN, "The token lacks the scope credits:read.", on_page=NO_ACCESS)
    if organization:
        if ID.fullmatch(organization) and principal.may_see(organization):
            return see_other(f"/organizations/{organization}/credit-history")
        return _start_page(request, session, using, HTTPStatus.NOT_FOUND, typed=organization)
    org_ids = _org_ids(session)
    if org_ids is not None and len(org_ids) == 1:
        return see_other(f"/organizations/{org_ids[0]}/credit-history")
    return _start_page(request, session, using)


@router.get("/organizations/{orgId}/credit-history")
def credit_history(request: Request, org_id: VisibleOrg, asked_for: Query, using: Using, session: SignedIn) -> Response:
    """The wallet, the course of its balance, its open reservations, and a page of its events."""
    now = datetime.now(UTC)
    found: dict[str, Any] = {"events": None, "receipts": None, "chart": None}
    with using.reading(through=org_id) as ledger:  # the chart reads many events
        wallet = views.wallet(ledger, org_id)
        if wallet is None and session.is_staff:
            return no_wallet(request, ledger, org_id)
        if not asked_for.errors:
            matching = history.find(ledger, org_id, asked_for.matching)
            course = matching.course(ledger, points=CHART_POINTS, now=now)
            if asked_for.view == "ledger":
                found["events"] = _page_of_events(ledger, matching, asked_for)
            else:
                found["receipts"] = receipts_of(ledger, org_id, asked_for)
            found["chart"] = None if course is None else step_chart(course)
        found["wallet"] = wallet or WalletView(org_id)
        found["reservations"] = _open_reservations(ledger, org_id, asked_for)
    return page(
        request,
        "credit_history.html",
        HTTPStatus.UNPROCESSABLE_ENTITY if asked_for.errors else HTTPStatus.OK,
        org_id=org_id,
        is_new=wallet is None,
        event_types=EVENT_TYPES,
        views=VIEWS,
        asked=asked_for,
        now=now,
        **found,
    )


@router.get("/organizations/{orgId}/credit-history.csv")
def credit_history_as_csv(org_id: VisibleOrg, asked_for: Query, using: Using) -> Response:
    """Every matching event, newest first, as a file."""
    if asked_for.errors:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, " ".join(asked_for.errors.values()))
    pieces = exports.pieces(history.all_events(using.engine, org_id, asked_for.matching))
    first = next(pieces)  # before the answer begins, so that a fault of the database still gets an error page
    return StreamingResponse(
        chain((first,), pieces),
        media_type=exports.MEDIA_TYPE,
        headers=exports.as_file(f"credit-history-{org_id}.csv"),
    )


@router.get("/organizations/{orgId}/runs/{workflowId}")
def run(
    request: Request, org_id: VisibleOrg, workflow_id: Annotated[str, Path(alias="workflowId")], using: Using
) -> Response:
    """A run: how it stands, and each of its steps."""
    found = None
    if ID.fullmatch(workflow_id):
        with using.reading() as ledger:
            found = views.workflow(ledger, org_id, workflow_id)
    if found is None:
        raise Problem(
            HTTPStatus.NOT_FOUND, f"{org_id} has no run {beginning(workflow_id, MAX_ID_LENGTH)}. Is its id complete?"
        )
    return page(request, "run.html", org_id=org_id, run=found, now=datetime.now(UTC))


@router.get("/organizations/{rest:path}", dependencies=[Depends(signed_in)])
def nothing() -> Response:
    """Answer 404 for any other page."""
    raise Problem(HTTPStatus.NOT_FOUND, "There is no such page.", on_page=NO_PAGE)


def add(app: FastAPI) -> None:
    """Add the customers' pages, signing in and out, and the pages' assets."""
    app.include_router(sessions.router)
    app.include_router(router)
    add_assets(app)


@dataclass(frozen=True, slots=True)
class Events:
    """A page of events and its place among all that match."""

    page: history.Page
    first: int
    """The number of the page's first event, counted from the newest: 1, 101, …"""
    newest: str | None
    newer: str | None
    older: str | None
    """The queries of other pages; None: there is no such page."""

    @property
    def last(self) -> int:
        """The number of the page's last event."""
        return self.first + len(self.page.events) - 1


def _page_of_events(ledger: Connection, matching: history.Found, asked_for: HistoryQuery) -> Events:
    limit, before = asked_for.limit, asked_for.before_seq
    found = matching.page(ledger, limit=limit, before_seq=before)
    passed, newer = 0, None
    if before is not None:
        passed, newer = matching.newer(ledger, limit=limit, before_seq=before)
    newest = asked_for.query()
    return Events(
        page=found,
        first=passed + 1,
        newest=newest if passed else None,
        newer=None if not passed else newest if newer is None else asked_for.query(before=newer),
        older=None if found.next_before_seq is None else asked_for.query(before=found.next_before_seq),
    )


@dataclass(frozen=True, slots=True)
class Receipts:
    """A page of receipts."""

    shown: list[Receipt]
    newest: str | None
    older: str | None
    """The queries of other pages; None: there is no such page."""


def receipts_of(ledger: Connection, org_id: str, asked_for: HistoryQuery) -> Receipts:
    """The receipts that the query asks for."""
    found = receipts.page(ledger, org_id, asked_for.matching, limit=asked_for.limit, place=asked_for.place)
    return Receipts(
        shown=found.receipts,
        newest=None if asked_for.place is None else asked_for.query(),
        older=None if found.next is None else asked_for.query(before=found.next),
    )


@dataclass(frozen=True, slots=True)
class Reservations:
    """Some of the open reservations, oldest first, and their place among all."""

    shown: list[Reservation]
    total: int
    credits: int
    """The credits that all of them hold."""
    passed: int
    """The number of older ones that are not shown."""
    oldest: str
    newer: str | None
    """The queries of other pages; None: there is no such page."""

    @property
    def last(self) -> int:
        """The number of the last one shown, counted from the oldest: 1, 2, …"""
        return self.passed + len(self.shown)


def _open_reservations(ledger: Connection, org_id: str, asked_for: HistoryQuery) -> Reservations:
    passed = asked_for.reservations_after
    shown = views.open_reservations(ledger, org_id=org_id, offset=passed)
    total, held = views.reservations_held(ledger, org_id)
    # The page of the events stays as it is.
    place = {"before": asked_for.typed["before"]} if asked_for.before_seq or asked_for.place else {}
    last = passed + len(shown)
    newer = asked_for.query(**place, reservations_after=last) if shown and last < total else None
    return Reservations(shown, total, held, passed, asked_for.query(**place), newer)


def _start_page(
    request: Request, session: Session, using: Services, status: HTTPStatus = HTTPStatus.OK, *, typed: str = ""
) -> Response:
    """The session's organizations, each with what it has available."""
    org_ids = _org_ids(session)
    found: dict[str, directory.Listed] = {}
    if org_ids:
        with using.reading() as ledger:
            found = directory.named(ledger, org_ids)
    return page(request, "start.html", status, org_ids=org_ids, found=found, typed=typed)


def _org_ids(session: Session) -> list[str] | None:
    """The organizations of a session whose ids are valid; None: all organizations."""
    orgs = session.principal.orgs
    return None if orgs == "*" else sorted(filter(ID.fullmatch, orgs))


def _understood(
    typed: Mapping[str, str], name: str, read: Callable[[str], Value], errors: dict[str, str]
) -> Value | None:
    """The value that `read` returns for a parameter; None if it is missing or wrong, which adds to `errors`."""
    try:
        return read(typed[name]) if typed[name] else None
    except ValueError as error:
        errors[name] = f"{name} {str(error).rstrip('.')}."
        return None


def _is_day(text: str) -> bool:
    """Whether a field for a date can hold `text`."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _view(text: str) -> str:
    if text not in VIEWS:
        raise ValueError(f"must be {' or '.join(VIEWS)}.")
    return text


def _place(text: str) -> Place:
    try:
        return Place.of(text)
    except ValueError:
        raise ValueError("must be as in a link to older activity.") from None


def _number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,16}", text) or not 1 <= int(text) <= most:
        raise ValueError(f"must be a number from 1 to {most:,}.")
    return int(text)
