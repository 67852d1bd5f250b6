"""The pages for operators: list, show, replay and discard dead letters.

`ledger.dead_letters` does the work, and records the name that the token gives (`sub`).
"""

import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response

from api_stub import queries
from api_stub.problems import Problem
from api_stub.rendering import PageRoute, page, see_other
from api_stub.services import Services, Using
from api_stub.sessions import Operator, checked_form, operator_reads
from ledger import dead_letters
from ledger.dead_letters import (
    KeptLetter,
    LetterFilter,
    NotOpenError,
    NotReplayableError,
    StillFailsError,
    UnknownLetterError,
)
from ledger.messages import MAX_CREDITS, MAX_REASON_LENGTH, MESSAGES
from ledger.readable import shortened
from ledger.state import ErrorCode
from worker.client import NotSentError
from worker.replaying import Replayer

STATUSES = ("open", "replayed", "discarded", "all")
PAGE = 50
ERROR_LISTED = 300
"""The most characters of an error that the list shows."""
ANSWER_TIMEOUT_S = 5
"""How long, in seconds, the page of a letter waits for the result of a replay."""
MAX_SHOWN = 64 * 1024
"""The most characters of a message or a traceback that are shown."""


router = APIRouter(
    prefix="/operators", route_class=PageRoute, include_in_schema=False, dependencies=[Depends(operator_reads)]
)


@dataclass(frozen=True, slots=True)
class LetterQuery:
    """The query of the list of dead letters: as typed, and as understood."""

    status: str
    code: str
    task: str
    before_id: int | None
    errors: dict[str, str]

    @property
    def matching(self) -> LetterFilter:
        """The query as a filter of dead letters."""
        return LetterFilter(None if self.status == "all" else self.status, self.code or None, self.task or None)

    def query(self, **changes: object) -> str:
        """The query of the same filter, on the newest page, with `changes`."""
        kept = {"status": self.status, "code": self.code, "task": self.task}
        return urlencode({name: value for name, value in kept.items() if value} | changes)


def letter_query(
    request: Request, status: str = "open", code: str = "", task: str = "", before_id: str = ""
) -> LetterQuery:
    """Read the query."""
    errors = queries.complaints(request.query_params, ("status", "code", "task", "before_id"))
    if status not in STATUSES:
        errors["status"] = f"status must be one of {', '.join(STATUSES)}."
    if before_id and _letter_id(before_id) is None:
        errors["before_id"] = "before_id must be the number of a dead letter."
    if code.strip() and code.strip() not in get_args(ErrorCode):
        errors["code"] = f"code must be one of {', '.join(get_args(ErrorCode))}."
    for name, text in (("code", code), ("task", task)):
        if not text.isprintable():
            errors[name] = f"{name} must not contain control characters."
    return LetterQuery(status, code.strip(), task.strip(), _letter_id(before_id), errors)


def found(letter_id: str, using: Using) -> KeptLetter:
    """A dependency: the dead letter in the path. Otherwise 404."""
    try:
        return _as_it_is_now(using, _letter_id(letter_id) or 0)
    except UnknownLetterError:
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such dead letter.") from None


Query = Annotated[LetterQuery, Depends(letter_query)]
Found = Annotated[KeptLetter, Depends(found)]


@router.get("/dead-letters")
def dead_letter_list(request: Request, asked_for: Query, using: Using) -> Response:
    """The dead letters that match, newest first."""
    letters = []
    if not asked_for.errors:
        with using.reading() as ledger:
            letters = dead_letters.letters(ledger, asked_for.matching, limit=PAGE + 1, before_id=asked_for.before_id)
    older = asked_for.query(before_id=letters[PAGE - 1].id) if len(letters) > PAGE else None
    return page(
        request,
        "dead_letters.html",
        HTTPStatus.UNPROCESSABLE_ENTITY if asked_for.errors else HTTPStatus.OK,
        asked=asked_for,
        letters=letters[:PAGE],
        older=older,
        statuses=STATUSES,
        tasks=MESSAGES,
        max_error=ERROR_LISTED,
    )


@router.get("/dead-letters/{letter_id}")
def dead_letter(request: Request, letter: Found) -> Response:
    """Everything about one dead letter, with the forms to replay and discard it."""
    return _letter_page(request, letter)


@router.post("/dead-letters/{letter_id}/replay", dependencies=[Depends(checked_form)])
def replay(request: Request, letter: Found, session: Operator, using: Using) -> Response:
    """Send the message again, and wait for the result, for ANSWER_TIMEOUT_S at most."""
    try:
        Replayer(using.engine, using.client, by=session.principal.subject, wait_s=ANSWER_TIMEOUT_S).replay(letter.id)
    except StillFailsError as error:
        failure = f"The message was sent and failed again: {error}"
        return _letter_page(request, _as_it_is_now(using, letter.id), HTTPStatus.CONFLICT, failure)
    except NotReplayableError as error:
        return _letter_page(request, _as_it_is_now(using, letter.id), HTTPStatus.CONFLICT, _sentence(error))
    except NotSentError:
        failure = "The message could not be handed to the broker. Replaying it again is safe."
        return _letter_page(request, letter, HTTPStatus.SERVICE_UNAVAILABLE, failure)
    return see_other(f"/operators/dead-letters/{letter.id}")


@router.post("/dead-letters/{letter_id}/discard", dependencies=[Depends(checked_form)])
def discard(
    request: Request, letter: Found, session: Operator, using: Using, reason: Annotated[str, Form()] = ""
) -> Response:
    """Discard the dead letter, with a reason."""
    why = " ".join(reason.split())
    if not why or len(why) > MAX_REASON_LENGTH or not why.isprintable():
        failure = f"reason must be a text of 1 to {MAX_REASON_LENGTH} characters."
        return _letter_page(request, letter, HTTPStatus.UNPROCESSABLE_ENTITY, failure, reason=reason)
    try:
        dead_letters.discard(using.engine, letter.id, by=session.principal.subject, why=why)
    except NotOpenError as error:
        return _letter_page(request, _as_it_is_now(using, letter.id), HTTPStatus.CONFLICT, _sentence(error))
    return see_other(f"/operators/dead-letters/{letter.id}")


@router.get("/{rest:path}")
def nothing() -> Response:
    """Answer 404 for any other page."""
    raise Problem(HTTPStatus.NOT_FOUND, "There is no such page.")


def add(app: FastAPI) -> None:
    """Add the operators' pages."""
    app.include_router(router)


def _letter_page(
    request: Request, letter: KeptLetter, status: HTTPStatus = HTTPStatus.OK, failure: str = "", *, reason: str = ""
) -> Response:
    rest = f"The command `holdfast failed show {letter.id} --json` prints all that is kept."
    return page(
        request,
        "dead_letter.html",
        status,
        letter=letter,
        message=dead_letters.readable(letter.body, MAX_SHOWN, rest),
        traceback=shortened(letter.traceback or "", MAX_SHOWN, rest),
        max_error=dead_letters.MAX_ERROR_LENGTH,
        unreplayable=_unreplayable(letter),
        answer_timeout_s=ANSWER_TIMEOUT_S,
        failure=failure,
        reason=reason,
        max_reason=MAX_REASON_LENGTH,
    )


def _as_it_is_now(using: Services, letter_id: int) -> KeptLetter:
    with using.reading() as ledger:
        return dead_letters.letter(ledger, letter_id)


def _unreplayable(letter: KeptLetter) -> str:
    """Why the message of a dead letter cannot be sent again; empty if it can."""
    try:
        dead_letters.sent_with(letter)
    except NotReplayableError as error:
        return _sentence(error)
    return ""


def _letter_id(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,16}", text) and 1 <= int(text) <= MAX_CREDITS else None


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
