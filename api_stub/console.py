"""The pages on which staff find an organization, see its wallet, change it, and read who did what.

A change takes two steps: a form, and a page that says what would come of it. That page carries the id of the message,
so however often it is sent, the ledger applies it once. What was done is read from the ledger itself.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from sqlalchemy import Connection

from api_stub import queries
from api_stub.forms import FORMS, WHY, Form
from api_stub.problems import RETRY, Problem
from api_stub.rendering import PageRoute, page, see_other
from api_stub.rights import OrgId
from api_stub.services import Services, Using
from api_stub.sessions import Operator, checked_form, operator_reads
from holdfast_client.client import DeadLetteredError, NoAnswerError, NotSentError
from holdfast_client.messages import ID_PATTERN, OPERATOR, AnyMessage, InvalidMessage, WalletMessage, parse
from ledger import actions, dead_letters, directory, filters, history, quotes, views
from ledger.actions import KINDS, Action, ActionFilter, Place
from ledger.bodies import arguments
from ledger.dead_letters import KeptLetter
from ledger.filters import EventFilter, When
from ledger.quotes import MuchDueError, Preview
from ledger.state import Refusal
from ledger.views import WalletView

ANSWER_TIMEOUT_S = 5
"""How long, in seconds, a page waits for the ledger's answer to a message."""
PAGE = 50
"""How many actions a page of the audit lists."""
LISTED = 10
"""How many organizations a list has."""
MOST_LETTERS = 100
"""How many dead letters, the newest, are searched for a message that was not applied."""
LATEST = 5
"""How many of each kind the page of an organization lists."""
MUCH_DUE = "Much is due in this wallet, and the change would have to wait for it; try again in a minute."
CHANGED_MEANWHILE = "Somebody has changed the limits meanwhile. Look at them, and begin again."
ID = re.compile(ID_PATTERN)

router = APIRouter(
    prefix="/operators", route_class=PageRoute, include_in_schema=False, dependencies=[Depends(operator_reads)]
)


def an_organization(org_id: OrgId) -> str:
    """A dependency: the organization in the path. Otherwise 404."""
    if not ID.fullmatch(org_id):
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such organization.")
    return org_id


def a_form(kind: str) -> Form:
    """A dependency: the form for the kind of change in the path. Otherwise 404."""
    if kind not in FORMS:
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such page.")
    return FORMS[kind]


async def what_is_typed(request: Request) -> dict[str, str]:
    """A dependency: the fields of a form as they were typed."""
    given = await request.form()
    return {name: value for name, value in given.items() if isinstance(value, str)}


Organization = Annotated[str, Depends(an_organization)]
Chosen = Annotated[Form, Depends(a_form)]
Typed = Annotated[dict[str, str], Depends(what_is_typed)]


# Finding


@router.get("/organizations")
def organizations(request: Request, using: Using) -> Response:
    """A field for a search, and the organizations that somebody may have to look at."""
    now = datetime.now(UTC)
    with using.reading() as ledger:
        recent = directory.recent(ledger)
        found = {
            "recent": recent[:LISTED],
            "low": directory.low(ledger, recent)[:LISTED],
            "overdrawn": directory.overdrawn(ledger, limit=LISTED),
        }
    return page(request, "console_organizations.html", now=now, typed="", **found)


@router.get("/search")
def search(request: Request, using: Using, q: str = "") -> Response:
    """The organizations with a name such as `q`, and the runs and orders with this id, whoever's they are."""
    typed = q.strip()
    if not typed:
        return see_other("/operators/organizations")
    similar: list[str] = []
    with using.reading() as ledger:
        is_an_id = bool(ID.fullmatch(typed))
        found = directory.beginning_with(ledger, typed) if is_an_id else []
        runs = directory.runs(ledger, typed) if is_an_id else []
        orders = directory.orders(ledger, typed) if is_an_id else []
        if not (found or runs or orders) and typed.isprintable():
            similar = directory.similar(ledger, typed)
    if found and found[0].org_id == typed and not (runs or orders):
        return see_other(f"/operators/organizations/{typed}")
    shown = {"organizations": found, "runs": runs, "orders": orders, "similar": similar}
    status = HTTPStatus.OK if found or runs or orders else HTTPStatus.NOT_FOUND
    return page(request, "console_search.html", status, typed=typed, most=directory.MOST_FOUND, **shown)


@router.get("/organizations/{orgId}")
def organization(request: Request, org_id: Organization, using: Using) -> Response:
    """An organization's wallet, what can be changed of it, and what was."""
    with using.reading() as ledger:
        wallet = views.wallet(ledger, org_id)
        if wallet is None:
            return no_wallet(request, ledger, org_id)
        return page(
            request,
            "console_organization.html",
            org_id=org_id,
            wallet=wallet,
            forms=FORMS,
            now=datetime.now(UTC),
            reservations=views.open_reservations(ledger, org_id=org_id, limit=LATEST),
            held=views.reservations_held(ledger, org_id),
            purchases=_newest(ledger, org_id, EventFilter(event_types=("prepaid_purchase",))),
            runs=_newest(ledger, org_id, EventFilter(event_types=("usage",))),
            done=actions.actions(ledger, ActionFilter(org_id=org_id), limit=LATEST),
        )


def no_wallet(request: Request, ledger: Connection, org_id: str) -> Response:
    """The page for staff about an organization that no message has named."""
    return page(
        request,
        "console_no_wallet.html",
        HTTPStatus.NOT_FOUND,
        org_id=org_id,
        similar=directory.similar(ledger, org_id),
    )


def _newest(ledger: Connection, org_id: str, matching: EventFilter) -> list[Any]:
    return list(history.events(ledger, org_id, matching, limit=LATEST).events)


# Changing


@router.get("/organizations/{orgId}/{kind}")
def ask(request: Request, org_id: Organization, form: Chosen, using: Using, _: Operator) -> Response:
    """The form, with what the address says already filled in."""
    typed = {each.name: request.query_params.get(each.name, "") for each in form.fields}
    with using.reading() as ledger:
        wallet = views.wallet(ledger, org_id)
        if wallet is None:
            return no_wallet(request, ledger, org_id)
    if form.name == "limits" and not request.query_params:
        limits = {"credit_limit": wallet.credit_limit, "period_cap": wallet.period_cap}
        typed |= {name: "" if limit is None else str(limit) for name, limit in limits.items()}
    return _form_page(request, org_id, form, typed, wallet)


@router.post("/organizations/{orgId}/{kind}", dependencies=[Depends(checked_form)])
def foresee(
    request: Request, org_id: Organization, form: Chosen, typed: Typed, session: Operator, using: Using
) -> Response:
    """What would come of the change. Nothing is sent yet."""
    return _Change(request, org_id, form, typed, session.principal.subject, using).foreseen()


@router.post("/organizations/{orgId}/{kind}/send", dependencies=[Depends(checked_form)])
def send(
    request: Request, org_id: Organization, form: Chosen, typed: Typed, session: Operator, using: Using
) -> Response:
    """Send the change, and wait for the ledger's answer, for ANSWER_TIMEOUT_S at most."""
    return _Change(request, org_id, form, typed, session.principal.subject, using).sent()


@router.get("/organizations/{orgId}/{kind}/{message_id}")
def outcome(request: Request, org_id: Organization, form: Chosen, message_id: str, using: Using) -> Response:
    """What the change did, as the ledger has it; or that it is still to come."""
    if not ID.fullmatch(message_id):
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such page.")
    with using.reading() as ledger:
        event = history.event_by_key(ledger, org_id, f"{form.key}:{message_id}")
        letter = _letter(ledger, org_id, form, message_id) if event is None else None
        wallet = views.wallet(ledger, org_id)
    return page(
        request,
        "console_outcome.html",
        org_id=org_id,
        form=form,
        event=event,
        letter=letter,
        wallet=wallet or WalletView(org_id),
        message_id=message_id,
    )


def _letter(ledger: Connection, org_id: str, form: Form, message_id: str) -> KeptLetter | None:
    """The operator's message, if it could not be applied."""
    message = form.message
    id_field = message.id_field if issubclass(message, WalletMessage) else "workflow_id"
    for letter in dead_letters.kept_of(ledger, org_id, message.task, limit=MOST_LETTERS):
        args, _ = arguments(letter.body) or ([], {})
        said = args[0] if len(args) == 1 and isinstance(args[0], dict) else {}
        if str(said.get(id_field)) == message_id and said.get("source") == OPERATOR:
            return letter
    return None


@dataclass(frozen=True, slots=True)
class _Considered:
    """A change as a message, and what it would do now."""

    message: AnyMessage
    payload: dict[str, Any]
    preview: Preview

    @property
    def message_id(self) -> str:
        """The id of the message; of a release, that of the run."""
        message = self.message
        return message.message_id if isinstance(message, WalletMessage) else message.workflow_id

    @property
    def is_done(self) -> bool:
        """Whether the message was applied before."""
        return not isinstance(self.preview.answer, Refusal) and self.preview.answer.duplicate


@dataclass(frozen=True, slots=True)
class _Change:
    """A change that somebody has typed into a form."""

    request: Request
    org_id: str
    form: Form
    typed: Mapping[str, str]
    by: str
    using: Services

    def foreseen(self) -> Response:
        """The page that says what would come of it; the form again, if something is wrong."""
        considered = self._considered(None)
        return considered if isinstance(considered, Response) else self._preview_page(considered)

    def sent(self) -> Response:
        """Send it, unless the ledger would refuse it now. Leads to the page that says what it did."""
        message_id = self.typed.get("message_id", "")
        if not re.fullmatch("[1-9][0-9]{0,15}" if self.form.name == "limits" else ID_PATTERN, message_id):
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "This form is not complete: begin again.")
        considered = self._considered(message_id)
        if isinstance(considered, Response):
            return considered
        if not considered.is_done:
            client = self.using.client
            wait_s = ANSWER_TIMEOUT_S if client.keeps_answers else None
            try:
                client.send(considered.message.task, considered.payload, wait_s=wait_s)
            except NoAnswerError:
                pass  # the page that follows says so
            except DeadLetteredError as error:
                raise Problem(
                    HTTPStatus.CONFLICT, f"It was not applied, and is kept as a dead letter: {error}."
                ) from None
            except NotSentError:
                failure = "It could not be handed to the broker; nothing has changed. Send it again: it applies once."
                return self._preview_page(considered, failure)
        return see_other(f"/operators/organizations/{self.org_id}/{self.form.name}/{considered.message_id}")

    def _considered(self, message_id: str | None) -> _Considered | Response:
        """The change with this id, or with a new one; or a page, if it cannot be made."""
        values, errors = self.form.understood(self.typed)
        with self.using.reading() as ledger:
            wallet = views.wallet(ledger, self.org_id)
            if wallet is None:
                return no_wallet(self.request, ledger, self.org_id)
            if not errors:
                new_id = _new_id(ledger, self.org_id, self.form) if message_id is None else message_id
                payload = self.form.payload(self.org_id, new_id, values, by=self.by)
                message = parse(self.form.message.task, payload)
                if isinstance(message, InvalidMessage):  # such as a name that is too long for the metadata
                    raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"{message.error}.")
                considered = _Considered(message, payload, _previewed(ledger, message))
                errors = _problem(self.form, considered, is_new=message_id is None)
                if not errors:
                    return considered
        return _form_page(self.request, self.org_id, self.form, self.typed, wallet, errors)

    def _preview_page(self, considered: _Considered, failure: str = "") -> Response:
        before, after = considered.preview.before, considered.preview.after
        balances = [
            ("Available", before.available, after.available),
            ("Prepaid", before.prepaid_balance, after.prepaid_balance),
            ("Reserved", before.reserved, after.reserved),
            ("Credit limit", before.credit_limit, after.credit_limit),
            ("Cap of a period", before.period_cap, after.period_cap),
        ]
        typed = {each.name: self.typed.get(each.name, "").strip() for each in self.form.fields}
        return page(
            self.request,
            "console_preview.html",
            HTTPStatus.SERVICE_UNAVAILABLE if failure else HTTPStatus.OK,
            org_id=self.org_id,
            form=self.form,
            typed=typed,
            again=urlencode({name: value for name, value in typed.items() if value}),
            changes=[change for change in balances if change[0] == "Available" or change[1] != change[2]],
            events=considered.preview.events,
            by=self.by,
            message_id=considered.message_id,
            failure=failure,
        )


def _new_id(ledger: Connection, org_id: str, form: Form) -> str:
    if form.name == "limits":
        return str(views.config_version(ledger, org_id) + 1)
    return f"operator-{secrets.token_hex(8)}"


def _previewed(ledger: Connection, message: AnyMessage) -> Preview:
    try:
        return quotes.preview(ledger, message)
    except MuchDueError:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, MUCH_DUE, RETRY) from None


def _problem(form: Form, considered: _Considered, *, is_new: bool) -> dict[str, str]:
    """Why the ledger would not apply a change, by the field that is wrong."""
    answer = considered.preview.answer
    if isinstance(answer, Refusal) and form.name == "limits" and answer.code == "conflict":
        return {WHY: CHANGED_MEANWHILE}
    if isinstance(answer, Refusal):
        return dict([form.about_refusal(answer)])
    if considered.is_done and not is_new:
        return {}
    if answer.reason == "not_started":
        return {"workflow_id": "There is no such run in this wallet."}
    if answer.reason == "already_ended" or considered.is_done:
        return {"workflow_id": f"This run is {answer.state}: it holds no credits any more."}
    if answer.reason == "stale_version":
        return {WHY: CHANGED_MEANWHILE}
    return {}


def _form_page(
    request: Request,
    org_id: str,
    form: Form,
    typed: Mapping[str, str],
    wallet: WalletView,
    errors: Mapping[str, str] | None = None,
) -> Response:
    return page(
        request,
        "console_form.html",
        HTTPStatus.UNPROCESSABLE_ENTITY if errors else HTTPStatus.OK,
        org_id=org_id,
        form=form,
        typed={each.name: typed.get(each.name, "") for each in form.fields},
        wallet=wallet,
        errors=errors or {},
    )


# Who did what


@dataclass(frozen=True, slots=True)
class AuditQuery:
    """The query of the audit: as typed, and as understood."""

    typed: Mapping[str, str]
    matching: ActionFilter
    before: Place | None
    errors: Mapping[str, str]

    def query(self, **changes: object) -> str:
        """The query of the same filter, on the newest page, with `changes`."""
        kept = {name: value for name, value in self.typed.items() if value and name != "before"}
        return urlencode(kept | changes)


_AUDIT_FIELDS = ("by", "organization", "kind", "date_from", "date_to", "before")


def audit_query(request: Request) -> AuditQuery:
    """Read the query. An empty field of the form counts as missing."""
    typed = {name: request.query_params.get(name, "").strip() for name in _AUDIT_FIELDS}
    errors = queries.complaints(request.query_params, _AUDIT_FIELDS)
    days: dict[str, When | None] = {}
    for name in ("date_from", "date_to"):
        try:
            days[name] = filters.when(typed[name]) if typed[name] else None
        except ValueError:
            days[name], errors[name] = None, "Enter a date, such as 2026-01-31."
    done_from, done_before = None, None
    try:
        done_from, done_before = filters.time_range(days["date_from"], days["date_to"])
    except ValueError:
        errors["date_to"] = "The last day must not be before the first one."
    if typed["kind"] and typed["kind"] not in KINDS:
        errors["kind"] = "Choose one of the kinds."
    for name in ("by", "organization"):
        if not typed[name].isprintable():
            errors[name] = "Enter a name without control characters."
    before = None
    try:
        before = Place.read(typed["before"]) if typed["before"] else None
    except ValueError:
        errors["before"] = "There is no such page: begin with the newest actions."
    matching = ActionFilter(
        by=typed["by"] or None,
        org_id=typed["organization"] or None,
        kind=typed["kind"] or None,
        done_from=done_from,
        done_before=done_before,
    )
    return AuditQuery(typed, matching, before, errors)


@router.get("/audit")
def audit(request: Request, asked: Annotated[AuditQuery, Depends(audit_query)], using: Using) -> Response:
    """What operators did, newest first."""
    found: list[Action] = []
    if not asked.errors:
        with using.reading() as ledger:
            found = actions.actions(ledger, asked.matching, limit=PAGE + 1, before=asked.before)
    older = asked.query(before=found[PAGE - 1].place) if len(found) > PAGE else None
    status = HTTPStatus.UNPROCESSABLE_ENTITY if asked.errors else HTTPStatus.OK
    return page(request, "console_audit.html", status, asked=asked, done=found[:PAGE], older=older, kinds=KINDS)


def add(app: FastAPI) -> None:
    """Add the pages."""
    app.include_router(router)
