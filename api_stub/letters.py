"""The pages of dead letters: by cause, one by one, and each of its own, with what to do about it.

`ledger.dead_letters` does the work, and records the name that the token gives (`sub`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, Request, Response
from sqlalchemy import Connection

from api_stub import queries
from api_stub.problems import OnPage, Problem
from api_stub.rendering import PageRoute, page, see_other
from api_stub.services import Services, Using
from api_stub.sessions import Operator, checked_form
from holdfast_client.client import NotSentError
from holdfast_client.messages import MAX_CREDITS, MAX_REASON_LENGTH, MESSAGES
from holdfast_client.results import ErrorCode
from ledger import dead_letters, evidence, filters, traces, views
from ledger.causes import CODES
from ledger.dead_letters import (
    Group,
    KeptLetter,
    LetterFilter,
    NotOpenError,
    NotReplayableError,
    StillFailsError,
    UnknownLetterError,
)
from ledger.readable import shortened
from ledger.waiting import NOBODY
from worker.replaying import Replayer

HERE = "/operators/dead-letters"
STATUSES = ("open", "replayed", "discarded", "all")
NO_ORGANIZATION = "–"
"""Stands in a query for letters that name no organization: no id has this character."""
FIELDS = ("status", "org_id", "task", "code", "since")
"""The parameters of the filter. `cause` chooses a group, `view` and `before_id` what is shown of the letters."""
VIEWS = ("causes", "letters")
PAGE = 50
GROUPS = 100
"""The most groups that are listed."""
ERROR_LISTED = 300
"""The most characters of an error that the list shows."""
ANSWER_TIMEOUT_S = 5
"""How long, in seconds, the page of a letter waits for the result of a replay."""
MAX_SHOWN = 64 * 1024
"""The most characters of a message or a traceback that are shown."""
EXAMPLE_SHOWN = 1_000
"""The most characters of a group's example that are shown."""

NO_LETTER = OnPage("There is no such dead letter", "Check its number: the list shows every one that there is.")

router = APIRouter(prefix="/dead-letters", route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class LetterQuery:
    """The query of the list of dead letters: as typed, and as understood."""

    typed: Mapping[str, str]
    """The fields of the filter, without those that are empty."""
    cause: str | None
    view: str
    failed_since: datetime | None
    before_id: int | None
    errors: dict[str, str]

    @property
    def status(self) -> str:
        """The status, as typed."""
        return self.typed["status"]

    @property
    def matching(self) -> LetterFilter:
        """The query as a filter of dead letters."""
        org_id, task = self.typed.get("org_id"), self.typed.get("task")
        return LetterFilter(
            status=None if self.status == "all" else self.status,
            code=self.typed.get("code"),
            task=(task or "") if self.is_group else task,
            org_id=NOBODY if org_id == NO_ORGANIZATION else org_id,
            failed_since=self.failed_since,
            cause=self.cause,
        )

    @property
    def is_group(self) -> bool:
        """Whether it chooses one group: the letters of one organization, task, code and cause."""
        return self.cause is not None and "org_id" in self.typed and "code" in self.typed

    @property
    def is_filtered(self) -> bool:
        """Whether there is a condition besides the status."""
        return len(self.typed) > 1 or self.cause is not None

    def query(self, **changes: object) -> str:
        """The query of the same letters, on the newest page, with `changes`; None takes a parameter out."""
        view = {"view": self.view} if self.view != VIEWS[0] else {}
        cause = {} if self.cause is None else {"cause": self.cause}
        kept: dict[str, object] = {**self.typed, **cause, **view, **changes}
        return urlencode({name: value for name, value in kept.items() if value is not None})

    def of_group(self, group: Group) -> str:
        """The query of the letters of `group`."""
        named = {"org_id": group.org_id or NO_ORGANIZATION, "task": group.task or None, "code": group.error_code}
        return self.query(**named, cause=group.cause, view=None)


def letter_query(request: Request) -> LetterQuery:
    """Read the query. An empty field of the form counts as missing."""
    query = request.query_params
    errors = queries.complaints(query, (*FIELDS, "cause", "view", "before_id"))
    cause = query.get("cause")
    exact = () if cause is None else ("org_id", "task")  # a link to a group names them as the sender did
    typed = {name: query.get(name, "") if name in exact else query.get(name, "").strip() for name in FIELDS}
    typed["status"] = typed["status"] or "open"
    if typed["status"] not in STATUSES:
        errors["status"] = f"status must be one of {', '.join(STATUSES)}."
    if typed["code"] and typed["code"] not in get_args(ErrorCode):
        errors["code"] = f"code must be one of {', '.join(get_args(ErrorCode))}."
    failed_since = None
    try:
        failed_since = filters.when(typed["since"]).begin if typed["since"] else None
    except ValueError as error:
        errors["since"] = f"since {str(error).rstrip('.')}."
    view, before_id = query.get("view", VIEWS[0]), query.get("before_id", "")
    if view not in VIEWS:
        errors["view"] = f"view must be one of {', '.join(VIEWS)}."
    if before_id and letter_id(before_id) is None:
        errors["before_id"] = "before_id must be the number of a dead letter."
    for name, text in {**typed, "cause": cause or ""}.items():
        if not text.isprintable() and (name not in exact or "\0" in text):
            errors[name] = f"{name} must not contain control characters."
    given = {name: text for name, text in typed.items() if text}
    return LetterQuery(given, cause, view, failed_since, letter_id(before_id), errors)


def found(number: str, using: Using) -> KeptLetter:
    """A dependency: the dead letter in the path. Otherwise 404."""
    try:
        return _as_it_is_now(using, letter_id(number) or 0)
    except UnknownLetterError:
        raise Problem(HTTPStatus.NOT_FOUND, NO_LETTER.sentence, on_page=NO_LETTER) from None


Query = Annotated[LetterQuery, Depends(letter_query)]
Found = Annotated[KeptLetter, Depends(found)]


@router.get("")
def dead_letter_list(request: Request, asked_for: Query, using: Using) -> Response:
    """The dead letters that match: by cause, the largest group first; or one by one, newest first."""
    return list_page(request, asked_for, using)


def list_page(
    request: Request, asked_for: LetterQuery, using: Services, status: HTTPStatus = HTTPStatus.OK, **values: Any
) -> Response:
    """The list, or the page of a group."""
    shown: dict[str, Any] = {"counts": {}, "groups": None, "letters": [], "older": None, "example": ""}
    if not asked_for.errors:
        with using.reading() as ledger:
            shown |= _shown(ledger, asked_for)
    return page(
        request,
        "letter_group.html" if asked_for.is_group and not asked_for.errors else "dead_letters.html",
        HTTPStatus.UNPROCESSABLE_ENTITY if asked_for.errors else status,
        here=HERE,
        asked=asked_for,
        statuses=STATUSES,
        tasks=MESSAGES,
        codes=CODES,
        max_error=ERROR_LISTED,
        max_reason=MAX_REASON_LENGTH,
        **shown,
        **{"problem": "", "reason": "", **values},
    )


def _shown(ledger: Connection, asked_for: LetterQuery) -> dict[str, Any]:
    matching = asked_for.matching
    counts = dead_letters.counts(ledger, matching)
    shown: dict[str, Any] = {"counts": {**counts, "all": sum(counts.values())}}
    if asked_for.cause is None and asked_for.view == "causes":
        return shown | {"groups": dead_letters.groups(ledger, matching, limit=GROUPS)}
    letters = dead_letters.letters(ledger, matching, limit=PAGE + 1, before_id=asked_for.before_id)
    shown |= {"letters": letters[:PAGE], "unreplayable": "", "newest_id": None}
    if len(letters) > PAGE:
        shown["older"] = asked_for.query(before_id=letters[PAGE - 1].id)
    of_all = letters if asked_for.before_id is None else dead_letters.letters(ledger, matching, limit=1)
    if asked_for.is_group and of_all:  # the forms are about the whole group, on each page of it
        newest = dead_letters.letter(ledger, of_all[0].id)
        shown["newest_id"] = newest.id
        shown["example"] = dead_letters.readable(newest.body, EXAMPLE_SHOWN, "Its own page has all of it.")
        shown["unreplayable"] = _unreplayable(newest)
    return shown


@router.get("/{number}")
def dead_letter(request: Request, letter: Found, using: Using) -> Response:
    """Everything about one dead letter, with the forms to replay and discard it."""
    return _letter_page(request, letter, using)


@router.post("/{number}/replay", dependencies=[Depends(checked_form)])
def replay(request: Request, letter: Found, session: Operator, using: Using) -> Response:
    """Send the message again, and wait for the result, for ANSWER_TIMEOUT_S at most."""
    try:
        Replayer(using.engine, using.client, by=session.principal.subject, wait_s=ANSWER_TIMEOUT_S).replay(letter.id)
    except StillFailsError as error:
        failure = f"The message was sent and failed again: {error}"
        return _letter_page(request, _as_it_is_now(using, letter.id), using, HTTPStatus.CONFLICT, failure)
    except NotReplayableError as error:
        return _letter_page(request, _as_it_is_now(using, letter.id), using, HTTPStatus.CONFLICT, sentence(error))
    except NotSentError:
        return _letter_page(request, letter, using, HTTPStatus.SERVICE_UNAVAILABLE, NOT_SENT)
    return see_other(f"{HERE}/{letter.id}")


NOT_SENT = "The message could not be handed to the broker. Replaying it again is safe."


@router.post("/{number}/discard", dependencies=[Depends(checked_form)])
def discard(
    request: Request, letter: Found, session: Operator, using: Using, reason: Annotated[str, Form()] = ""
) -> Response:
    """Discard the dead letter, with a reason."""
    why, problem = read_reason(reason)
    if problem:
        status = HTTPStatus.UNPROCESSABLE_ENTITY
        return _letter_page(request, letter, using, status, problem=problem, reason=reason)
    try:
        dead_letters.discard(using.engine, letter.id, by=session.principal.subject, why=why)
    except NotOpenError as error:
        return _letter_page(request, _as_it_is_now(using, letter.id), using, HTTPStatus.CONFLICT, sentence(error))
    return see_other(f"{HERE}/{letter.id}")


def read_reason(typed: str) -> tuple[str, str]:
    """A reason as it is recorded, and what is wrong with it; empty: nothing."""
    why = " ".join(typed.split())
    if not why:
        return why, "Say why, in a sentence: it is recorded with your name."
    if len(why) > MAX_REASON_LENGTH:
        return why, f"The reason is too long: {len(why):,} characters, and at most {MAX_REASON_LENGTH} are kept."
    return why, "" if why.isprintable() else "The reason must not contain control characters."


def _letter_page(
    request: Request,
    letter: KeptLetter,
    using: Services,
    status: HTTPStatus = HTTPStatus.OK,
    failure: str = "",
    *,
    problem: str = "",
    reason: str = "",
) -> Response:
    rest = f"The command `holdfast failed show {letter.id} --json` prints all that is kept."
    with using.reading() as ledger:
        known = _known(ledger, letter)
    unreplayable = _unreplayable(letter)
    return page(
        request,
        "dead_letter.html",
        status,
        here=HERE,
        letter=letter,
        message=dead_letters.readable(letter.body, MAX_SHOWN, rest),
        trace_id=traces.trace_id(letter.traceparent),
        traceback=shortened(letter.traceback or "", MAX_SHOWN, rest),
        max_error=dead_letters.MAX_ERROR_LENGTH,
        code=CODES.get(letter.error_code),  # an older version may have had another one
        unreplayable=unreplayable,
        answer_timeout_s=ANSWER_TIMEOUT_S,
        failure=failure,
        problem=problem,
        reason=reason,
        max_reason=MAX_REASON_LENGTH,
        **known,
    )


def _known(ledger: Connection, letter: KeptLetter) -> dict[str, Any]:
    """What the ledger knows besides the letter: its place, the organization's wallet, and what the message is about."""
    message = evidence.message_of(letter)
    is_conflict = message is not None and letter.error_code == "conflict"
    was_answered = letter.status == "replayed" and dead_letters.is_known(letter.resolution or "")
    return {
        "place": dead_letters.place(ledger, letter.id),
        "wallet": None if letter.org_id is None else views.wallet(ledger, letter.org_id),
        "differences": evidence.differences(ledger, message) if message is not None and is_conflict else [],
        "was_answered": was_answered,
        "change": evidence.change(ledger, message) if message is not None and was_answered else None,
    }


def _as_it_is_now(using: Services, number: int) -> KeptLetter:
    with using.reading() as ledger:
        return dead_letters.letter(ledger, number)


def _unreplayable(letter: KeptLetter) -> str:
    """Why the message of a dead letter cannot be sent again; empty if it can."""
    try:
        dead_letters.sent_with(letter)
    except NotReplayableError as error:
        return sentence(error)
    return ""


def letter_id(text: str) -> int | None:
    """The number of a dead letter that is written so, or None."""
    return int(text) if re.fullmatch(r"[0-9]{1,16}", text) and 1 <= int(text) <= MAX_CREDITS else None


def sentence(error: Exception) -> str:
    """The text of an error as a sentence."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
