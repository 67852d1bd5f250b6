"""The pages for customers: an organization's credit history, as a page and as a CSV file. They only read."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from itertools import chain
from typing import Annotated, Any, TypeVar, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from api_stub import exports, sessions
from api_stub.chart import Chart, step_chart
from api_stub.problems import Problem
from api_stub.rendering import PageRoute, add_assets, page, see_other
from api_stub.services import connection, require
from api_stub.sessions import SignedIn, signed_in
from ledger import history
from ledger.history import EventFilter, WalletView
from ledger.messages import ID_PATTERN, MAX_CREDITS
from ledger.state import EventType

EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
CHART_POINTS = 240
ID = re.compile(ID_PATTERN)

Value = TypeVar("Value")

router = APIRouter(route_class=PageRoute, include_in_schema=False)
Ledger = Annotated[Connection, Depends(connection)]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a page was asked to show: as typed, as understood, and what could not be understood."""

    typed: Mapping[str, str]
    event_types: tuple[str, ...]
    """As typed."""
    matching: EventFilter
    limit: int
    before_seq: int | None
    errors: Mapping[str, str] = field(default_factory=dict)
    """By parameter, a sentence about what is wrong with it."""

    def query(self, **changes: object) -> str:
        """The query of the same filter, on the newest page, with `changes`."""
        kept = [(name, value) for name, value in self.typed.items() if value and name != "before"]
        types = [("event_type", name) for name in self.event_types]
        return urlencode([*kept, *types, *changes.items()])

    def kind_of_field(self, name: str) -> str:
        """`date` for a day; whatever else was typed is lost in such a field, but not in one for `text`."""
        return "date" if re.fullmatch(r"([0-9]{4}-[0-9]{2}-[0-9]{2})?", self.typed[name]) else "text"

    @property
    def is_filtered(self) -> bool:
        """Whether any event is left out."""
        return self.matching != EventFilter()


def asked(request: Request) -> Asked:
    """Read the query. Fields of the form that were left empty are as if they were not there."""
    query = request.query_params
    typed = {name: query.get(name, "").strip() for name in ("date_from", "date_to", "project_id", "limit", "before")}
    event_types = tuple(dict.fromkeys(name for name in query.getlist("event_type") if name))
    errors: dict[str, str] = {}

    created_from = _understood(typed, "date_from", history.moment, errors)
    created_before = _understood(typed, "date_to", lambda text: history.moment(text, ends_range=True), errors)
    limit = _understood(typed, "limit", lambda text: _number(text, history.MAX_PAGE), errors)
    if created_from is not None and created_before is not None and created_from >= created_before:
        errors["date_to"] = "date_to must not be before date_from."
    known = tuple(name for name in EVENT_TYPES if name in event_types)
    if len(known) < len(event_types):
        errors["event_type"] = f"event_type must be one of {', '.join(EVENT_TYPES)}."
    matching = EventFilter(created_from, created_before, known, _understood(typed, "project_id", _project_id, errors))
    return Asked(
        typed=typed,
        event_types=event_types,
        matching=matching,
        limit=limit or history.MAX_PAGE,
        before_seq=_understood(typed, "before", lambda text: _number(text, MAX_CREDITS), errors),
        errors=errors,
    )


AskedFor = Annotated[Asked, Depends(asked)]


def readable(orgId: str, session: SignedIn) -> str:  # noqa: N803 - the path names it so
    """A dependency: the organization in the path, if it exists for whoever is signed in and may be read by them."""
    if not ID.fullmatch(orgId):
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such organization.")
    require(session.principal, orgId, "credits:read")
    return orgId


ReadableOrg = Annotated[str, Depends(readable)]


@router.get("/")
def start(request: Request, session: SignedIn, organization: str = "") -> Response:
    """Leads to the one page that there is for whoever is signed in, or lists what they may see."""
    principal = session.principal
    if organization:
        if ID.fullmatch(organization) and principal.may_see(organization):
            return see_other(f"/organizations/{organization}/credit-history")
        return page(request, "start.html", HTTPStatus.NOT_FOUND, org_ids=_org_ids(session), typed=organization)
    if len(principal.orgs) == 1 and principal.orgs != "*" and "operator" not in principal.scopes:
        return see_other(f"/organizations/{next(iter(principal.orgs))}/credit-history")
    return page(request, "start.html", org_ids=_org_ids(session), typed="")


@router.get("/organizations/{orgId}/credit-history")
def credit_history(request: Request, org_id: ReadableOrg, asked_for: AskedFor, ledger: Ledger) -> Response:
    """The wallet, the course of its balance, its open reservations, and a page of its events."""
    now = datetime.now(UTC)
    values: dict[str, Any] = {"events": None, "chart": None}
    if not asked_for.errors:
        values = {
            "events": _page_of_events(ledger, org_id, asked_for),
            "chart": _chart(ledger, org_id, asked_for.matching, now),
        }
    return page(
        request,
        "credit_history.html",
        HTTPStatus.UNPROCESSABLE_ENTITY if asked_for.errors else HTTPStatus.OK,
        org_id=org_id,
        wallet=history.wallet(ledger, org_id) or WalletView(org_id),
        reservations=history.open_reservations(ledger, org_id=org_id),
        event_types=EVENT_TYPES,
        asked=asked_for,
        now=now,
        **values,
    )


@router.get("/organizations/{orgId}/credit-history.csv")
def credit_history_as_csv(org_id: ReadableOrg, asked_for: AskedFor, ledger: Ledger) -> Response:
    """Every event that the filter lets through, newest first, as a file."""
    if asked_for.errors:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, " ".join(asked_for.errors.values()))
    pieces: Iterator[str] = exports.pieces(history.all_events(ledger, org_id, asked_for.matching))
    first = next(pieces)  # so that a fault of the database is still answered with a page
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"credit-history-{org_id}.csv")
    return StreamingResponse(
        chain((first,), pieces),
        media_type="text/csv; charset=utf-8; header=present",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


@router.get("/organizations/{rest:path}", dependencies=[Depends(signed_in)])
def nothing() -> Response:
    """There is no other page."""
    raise Problem(HTTPStatus.NOT_FOUND, "There is no such page.")


def add(app: FastAPI) -> None:
    """Add the customers' pages, signing in and out, and what pages look like."""
    sessions.keep_tokens_out_of_logs()
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
    """The queries of other pages, where there are any."""

    @property
    def last(self) -> int:
        return self.first + len(self.page.events) - 1


def _page_of_events(ledger: Connection, org_id: str, asked_for: Asked) -> Events:
    limit, before = asked_for.limit, asked_for.before_seq
    found = history.events(ledger, org_id, asked_for.matching, limit=limit, before_seq=before)
    passed, newer = 0, None
    if before is not None:
        passed, newer = history.newer(ledger, org_id, asked_for.matching, limit=limit, before_seq=before)
    newest = asked_for.query()
    return Events(
        page=found,
        first=passed + 1,
        newest=newest if passed else None,
        newer=None if not passed else newest if newer is None else asked_for.query(before=newer),
        older=None if found.next_before_seq is None else asked_for.query(before=found.next_before_seq),
    )


def _chart(ledger: Connection, org_id: str, matching: EventFilter, now: datetime) -> Chart | None:
    """The course of the available balance in the filter's range of time, whatever else it leaves out."""
    begins = history.first_event_at(ledger, org_id)
    ends = now if matching.created_before is None else min(now, matching.created_before)
    if begins is None:
        return None
    points = history.available_over_time(ledger, org_id, matching, points=CHART_POINTS)
    if matching.created_from is not None and matching.created_from > begins:
        before = history.balances_at(ledger, org_id, matching.created_from - timedelta(microseconds=1))
        points = [(matching.created_from, before.available), *points]
    if not points or ends < points[0][0]:
        return None
    return step_chart(points, ends=max(ends, points[-1][0]))  # the database's clock may be ahead of ours


def _org_ids(session: SignedIn) -> list[str] | None:
    """The organizations of whoever is signed in; None: all."""
    orgs = session.principal.orgs
    return None if orgs == "*" else sorted(orgs)


def _understood(
    typed: Mapping[str, str], name: str, read: Callable[[str], Value], errors: dict[str, str]
) -> Value | None:
    """What `read` makes of a parameter; None if it was not given, or else it is among the `errors`."""
    try:
        return read(typed[name]) if typed[name] else None
    except ValueError as error:
        errors[name] = f"{name} {str(error).rstrip('.')}."
        return None


def _number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,16}", text) or not 1 <= int(text) <= most:
        raise ValueError(f"must be a number from 1 to {most:,}.")
    return int(text)


def _project_id(text: str) -> str:
    if not ID.fullmatch(text):
        raise ValueError("must have 1 to 128 characters, and only letters, digits and _ . : - among them")
    return text
