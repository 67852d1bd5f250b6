"""The pages for customers: an organization's credit history, as a page and as a CSV file. Only reads."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Annotated, Any, TypeVar, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Connection

from api_stub import exports, queries, sessions
from api_stub.banner import banner
from api_stub.bars import LEAST, BarChart, bar_chart, each_of
from api_stub.chart import Chart, step_chart
from api_stub.console import no_wallet
from api_stub.formats import iso, written_day
from api_stub.problems import NO_PAGE, Problem
from api_stub.reader import Reader
from api_stub.rendering import PageRoute, add_assets, page, see_other
from api_stub.rights import NO_ACCESS, OrgId, require
from api_stub.services import Services, Using
from api_stub.sessions import Session, SignedIn, signed_in
from holdfast_client.messages import ID_PATTERN, MAX_CREDITS, MAX_ID_LENGTH, MAX_NAME_LENGTH
from ledger import directory, filters, history, receipts, views
from ledger.archived import Archived
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.outlook import lasting
from ledger.readable import beginning
from ledger.receipts import Place, Receipt
from ledger.state import EventType
from ledger.usage import Breakdown, Stack, breakdown, rate, usage_of
from ledger.views import Held, Reservation, WalletView

EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
KINDS: dict[str, tuple[EventType, ...]] = {
    "Usage": ("usage",),
    "Top-ups & plan": ("prepaid_purchase", "grant", "subscription_credit", "billing"),
    "Corrections": ("adjustment", "refund"),
    "Holds": ("reservation", "reservation_released"),
}
"""The event types in everyday words. Each type is of one kind."""
CHART_POINTS = 240
VIEWS = "activity", "ledger"
"""The tabs of the history: by run, and every event. The first is shown unless another is asked for."""
USUAL_PAGE = 25
"""How many events a page has, unless another number is asked for: few enough for a phone."""
RANKED = 5
"""How many of the largest projects and activities are named."""
USUAL_DAYS = 30
"""Without a plan: how many days of usage are shown, today included, unless another range is asked for."""
LONGEST_PERIOD = timedelta(days=31)
"""No period of a plan is longer, nor are the `USUAL_DAYS`."""
PLACES = "before", "reservations_after"
"""The parameters that select the page, not its content."""
FIELDS = ("date_from", "date_to", "project_id", "search", "workflow_id", "limit", "view", *PLACES)
"""The parameters with one value."""
LISTS = "event_type", "activity_name"
"""Those that may be repeated."""
ID = re.compile(ID_PATTERN)

Value = TypeVar("Value")

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class HistoryQuery:
    """The query of a page: as typed, as understood, and its errors."""

    typed: Mapping[str, str]
    event_types: tuple[str, ...]
    activity_names: tuple[str, ...]
    """As typed."""
    matching: EventFilter
    """Without what `searched` adds."""
    view: str
    """One of `VIEWS`."""
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
        """The query of the same filter, on the newest page, with `changes`: None leaves a parameter out."""
        typed = {name: value for name, value in self.typed.items() if name not in PLACES}
        lists = {"event_type": self.event_types, "activity_name": self.activity_names}
        return urlencode({name: value for name, value in (typed | lists | changes).items() if value}, doseq=True)

    def kind_of_field(self, name: str) -> str:
        """`date` for a day, otherwise `text`: a field for a date would lose anything else that was typed."""
        return "date" if not self.typed[name] or _is_day(self.typed[name]) else "text"

    @property
    def is_filtered(self) -> bool:
        """Whether there is any condition on the events."""
        return self.matching != EVERY_EVENT or bool(self.typed["search"])

    @property
    def has_range(self) -> bool:
        """Whether a range of time is asked for."""
        return self.matching.created_from is not None or self.matching.created_before is not None

    def added_up(self, now: datetime) -> EventFilter:
        """The longest range of time whose events the page adds up: the whole history has its sum already."""
        if self.has_range or self.matching.looks_at_each or self.typed["search"]:
            return self.matching
        return replace(self.matching, created_from=now - LONGEST_PERIOD)

    @property
    def kind(self) -> str | None:
        """The one of `KINDS` that the chosen event types are. None: none are chosen, or others."""
        return next((kind for kind, types in KINDS.items() if set(types) == set(self.event_types)), None)

    @property
    def more_is_open(self) -> bool:
        """Whether one of the less usual fields is used, or wrong."""
        is_used = bool(self.typed["date_to"] or self.typed["workflow_id"] or (self.event_types and not self.kind))
        return is_used or not {"date_from", "date_to", "event_type", "workflow_id", "limit"}.isdisjoint(self.errors)


def history_query(request: Request) -> HistoryQuery:
    """Read the query. An empty field of the form counts as missing."""
    query = request.query_params
    typed = {name: query.get(name, "").strip() for name in FIELDS}
    event_types, activity_names = (tuple(dict.fromkeys(each for each in query.getlist(name) if each)) for name in LISTS)
    errors = queries.complaints(query, (*LISTS, *FIELDS), repeatable=LISTS)

    def understood(name: str, read: Callable[[str], Value], sentence: str) -> Value | None:
        """The value that `read` returns for a parameter; None if it is missing or wrong, which adds to `errors`."""
        try:
            return read(typed[name]) if typed[name] else None
        except ValueError:
            errors[name] = sentence
            return None

    a_date, an_id = "Enter a date like 31 Jan 2026.", f"It has at most {MAX_ID_LENGTH} letters, digits and _ . : -"
    first, last = (understood(name, _when, a_date) for name in ("date_from", "date_to"))
    created_from, created_before = None, None
    try:
        created_from, created_before = filters.time_range(first, last)
    except ValueError:
        errors["date_to"] = "The last day is before the first one."
    known_types = tuple(name for name in EVENT_TYPES if name in event_types)
    if len(known_types) < len(event_types):
        errors["event_type"] = "There is no such type of event. Choose from these."
    no_view = f"There is no such view. Choose {' or '.join(VIEWS)}."
    view = understood("view", lambda text: VIEWS[VIEWS.index(text)], no_view) or VIEWS[0]
    for name in activity_names:
        try:
            filters.activity_name(name)
        except ValueError:
            errors["activity_name"] = "There is no activity of such a name."
    understood("search", filters.activity_name, f"Search for at most {MAX_NAME_LENGTH} characters.")
    a_place = "The link to this page is not complete."
    limit = understood("limit", _page_size, f"Enter a number from 1 to {history.MAX_PAGE}.")
    before_seq, place = None, None
    if view == "ledger":
        before_seq = understood("before", lambda text: _number(text, MAX_CREDITS), a_place)
    else:
        place = understood("before", Place.of, a_place)
    return HistoryQuery(
        typed=typed,
        event_types=event_types,
        activity_names=activity_names,
        matching=EventFilter(
            created_from=created_from,
            created_before=created_before,
            event_types=known_types,
            project_id=understood("project_id", filters.identifier, f"There is no such project. {an_id}."),
            activity_names=activity_names,
            workflow_id=understood("workflow_id", filters.identifier, f"There is no such run. {an_id}."),
        ),
        view=view,
        limit=limit or USUAL_PAGE,
        before_seq=before_seq,
        place=place,
        reservations_after=understood(PLACES[1], lambda text: _number(text, MAX_CREDITS), a_place) or 0,
        errors=errors,
    )


def searched(ledger: Connection, org_id: str, asked: HistoryQuery) -> HistoryQuery:
    """The same query with what it searches for: the run with this id, or else the activities with this text."""
    text = asked.typed["search"]
    if not text or asked.errors:
        return asked
    if ID.fullmatch(text) and asked.matching.workflow_id is None and views.is_workflow(ledger, org_id, text):
        return replace(asked, matching=replace(asked.matching, workflow_id=text))
    return replace(asked, matching=replace(asked.matching, activity_contains=text))


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
    """The wallet, what has to be done, what used the credits, and a page of the history."""
    now = datetime.now(UTC)

    def read(ledger: Connection) -> dict[str, Any] | Response:
        wallet = views.wallet(ledger, org_id)
        if wallet is None and session.is_staff:
            return no_wallet(request, ledger, org_id)
        asked = searched(ledger, org_id, asked_for)
        held = views.reservations_held(ledger, org_id)
        shown = wallet or WalletView(org_id)
        speed = None if wallet is None else rate(ledger, org_id, available=wallet.available, now=now)
        refused = views.last_refused(ledger, org_id)
        found: dict[str, Any] = {"events": None, "receipts": None, "used": None}
        if not asked.errors:
            found["used"] = _used(ledger, org_id, asked, shown, now)
            if asked.view == "ledger":
                found["events"] = _page_of_events(ledger, org_id, asked)
            else:
                found["receipts"] = receipts_of(ledger, org_id, asked)
        return {
            **found,
            "reservations": _open_reservations(ledger, org_id, held, asked),
            "asked": asked,
            "is_new": wallet is None,
            "wallet": shown,
            "periods": periods(shown, now),
            "outlook": lasting(shown, speed, now),
            "banner": banner(wallet, speed, largest_held=held.largest, refused=refused, now=now),
        }

    reader = Reader(using, from_primary=session.is_staff)
    reader.go_on_from(org_id, asked_for.before_seq or asked_for.place)
    found = reader.read(read, through=(org_id, asked_for.added_up(now)))
    if isinstance(found, Response):
        return found
    return page(
        request,
        "credit_history.html",
        HTTPStatus.UNPROCESSABLE_ENTITY if found["asked"].errors else HTTPStatus.OK,
        org_id=org_id,
        event_types=EVENT_TYPES,
        kinds=KINDS,
        views=VIEWS,
        most=history.MAX_PAGE,
        now=now,
        as_of=reader.as_of if reader.is_from_replica else None,
        buy_credits_url=using.buy_credits_url,
        **found,
    )


@router.get("/organizations/{orgId}/credit-history.csv")
def credit_history_as_csv(org_id: VisibleOrg, asked_for: Query, using: Using, session: SignedIn) -> Response:
    """Every matching event, newest first, as a file."""
    reader = Reader(using, from_primary=session.is_staff)

    def read(ledger: Connection) -> tuple[HistoryQuery, Archived | None]:
        asked = searched(ledger, org_id, asked_for)
        return asked, None if asked.errors else history.find(ledger, org_id, asked.matching).archived(ledger)

    asked, older = reader.read(read)
    if asked.errors:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, " ".join(asked.errors.values()))
    pieces = exports.pieces(history.all_events(reader.read, org_id, asked.matching))
    first = next(pieces)  # before the answer begins, so that a fault of the database still gets an error page
    return StreamingResponse(
        chain((first,), pieces),
        media_type=exports.MEDIA_TYPE,
        headers=exports.as_file(f"credit-history-{org_id}.csv", reader.as_of) | exports.archived(older),
    )


@router.get("/organizations/{orgId}/runs/{workflowId}")
def run(
    request: Request,
    org_id: VisibleOrg,
    workflow_id: Annotated[str, Path(alias="workflowId")],
    using: Using,
    session: SignedIn,
) -> Response:
    """A run: how it stands, and each of its steps."""
    reader = Reader(using, from_primary=session.is_staff)
    found = None
    if ID.fullmatch(workflow_id):
        read = partial(views.workflow, org_id=org_id, workflow_id=workflow_id)
        found = reader.read(read)
        if found is None and reader.is_from_replica:  # it may have begun a moment ago
            reader = Reader(using, from_primary=True)
            found = reader.read(read)
    if found is None:
        raise Problem(
            HTTPStatus.NOT_FOUND, f"{org_id} has no run {beginning(workflow_id, MAX_ID_LENGTH)}. Is its id complete?"
        )
    as_of = reader.as_of if reader.is_from_replica else None
    return page(request, "run.html", org_id=org_id, run=found, now=datetime.now(UTC), as_of=as_of)


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
class Period:
    """A period that a link selects."""

    name: str
    date_from: str | None


def periods(wallet: WalletView, now: datetime) -> list[Period]:
    """The periods that people ask for most."""
    chosen = [Period(f"{USUAL_DAYS} days", _last_days(now).date().isoformat()), Period("All", None)]
    if wallet.current_period_start is not None:
        chosen.insert(0, Period("This period", iso(wallet.current_period_start)))
    return chosen


@dataclass(frozen=True, slots=True)
class Used:
    """What used the credits in the range of time, and the course of the balance."""

    begin: datetime
    end: datetime
    of: Breakdown
    stacked_by: str
    bars: BarChart | None
    balance: Chart | None
    all_from: datetime | None
    """When the first event was, in UTC, if that is before a range of time that nobody asked for."""


def _last_days(now: datetime) -> datetime:
    return datetime.combine(now.date() - timedelta(days=USUAL_DAYS - 1), time.min, UTC)


def _used(ledger: Connection, org_id: str, asked_for: HistoryQuery, wallet: WalletView, now: datetime) -> Used | None:
    """What was used in the range that is asked for, or else in the current period. None: there was no event by then."""
    matching, all_from = asked_for.matching, None
    if not asked_for.has_range:
        matching = replace(matching, created_from=wallet.current_period_start or _last_days(now))
    found = history.find(ledger, org_id, usage_of(matching))
    if found.first > 1 and not asked_for.has_range:
        began_at = history.began_at(ledger, org_id)
        all_from = None if began_at is None else began_at.astimezone(UTC)
    course = found.course(ledger, points=CHART_POINTS, now=now)
    if course is None:
        return None
    begin, end = course.points[0][0], course.ends
    stacked_by: Stack = "project" if matching.project_id is None else "activity"
    of = breakdown(ledger, found, stacked_by=stacked_by, each=each_of(begin, end), most=RANKED)
    largest = of.projects if stacked_by == "project" else of.activities
    balance = step_chart(course) if end - begin >= LEAST else None
    return Used(begin, end, of, stacked_by, bar_chart(of.bars, largest, begin, end), balance, all_from)


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


def _page_of_events(ledger: Connection, org_id: str, asked_for: HistoryQuery) -> Events:
    matching = history.find(ledger, org_id, asked_for.matching)
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
    """A page of receipts, and the number and the credits of all matching events."""

    shown: list[Receipt]
    events: int
    credits: int
    archived: Archived | None
    newest: str | None
    older: str | None
    """The queries of other pages; None: there is no such page."""


def receipts_of(ledger: Connection, org_id: str, asked_for: HistoryQuery) -> Receipts:
    """The receipts that the query asks for."""
    found = receipts.page(ledger, org_id, asked_for.matching, limit=asked_for.limit, place=asked_for.place)
    return Receipts(
        shown=found.receipts,
        events=found.events,
        credits=found.credits,
        archived=found.archived,
        newest=None if asked_for.place is None else asked_for.query(),
        older=None if found.next is None else asked_for.query(before=str(found.next)),
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


def _open_reservations(ledger: Connection, org_id: str, held: Held, asked_for: HistoryQuery) -> Reservations:
    passed = asked_for.reservations_after
    total = held.reservations
    shown = views.open_reservations(ledger, org_id=org_id, offset=passed) if total else []
    # The page of the events stays as it is.
    place = {"before": asked_for.typed["before"]} if asked_for.before_seq or asked_for.place else {}
    last = passed + len(shown)
    newer = asked_for.query(**place, reservations_after=last) if shown and last < total else None
    return Reservations(shown, total, held.credits, passed, asked_for.query(**place), newer)


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


def _when(text: str) -> filters.When:
    try:
        return filters.when(written_day(text).isoformat())
    except ValueError:
        return filters.when(text)


def _is_day(text: str) -> bool:
    """Whether a field for a date can hold `text`."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _page_size(text: str) -> int:
    return _number(text, history.MAX_PAGE)


def _number(text: str, most: int) -> int:
    if not re.fullmatch(r"[0-9]{1,16}", text) or not 1 <= int(text) <= most:
        raise ValueError("no such number")
    return int(text)
