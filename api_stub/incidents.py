"""Replays or discards a whole group of dead letters, in steps: each request does a part, and says what is left.

A step never goes beyond the letters that the operator was shown. If a request dies, the letters that it has dealt with
are marked, and the others are as they were.
"""

import time
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, Response

from api_stub.letters import (
    ANSWER_TIMEOUT_S,
    HERE,
    NOT_SENT,
    LetterQuery,
    letter_id,
    letter_query,
    list_page,
    read_reason,
)
from api_stub.problems import Problem
from api_stub.rendering import PageRoute, page
from api_stub.services import Services, Using
from api_stub.sessions import Operator, checked_form
from holdfast_client.client import NotSentError
from ledger import dead_letters
from ledger.dead_letters import NotReplayableError, StillFailsError, UnknownLetterError
from worker.replaying import Replayer

REPLAYED_AT_ONCE, DISCARDED_AT_ONCE = 100, 5_000
"""The most letters of one request."""
STEP_S = 10.0
"""How long, in seconds, a request goes on to the next letter."""

router = APIRouter(prefix="/dead-letters", route_class=PageRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a group is: the forms carry it from step to step."""

    up_to: int
    """The newest letter that the operator was shown."""
    total: int
    """How many letters there were then."""
    after: int = 0
    """The last letter that was tried."""
    applied: int = 0
    sent: int = 0
    """Those whose outcome nobody waited for."""
    failed: int = 0
    refused: int = 0
    """Those that cannot be sent again, or that somebody else has dealt with."""

    @property
    def tried(self) -> int:
        """The letters that were dealt with, in all steps."""
        return self.applied + self.sent + self.failed + self.refused


def group_query(request: Request) -> LetterQuery:
    """A dependency: the group in the query, which a form keeps in its address. Otherwise 404."""
    asked_for = letter_query(request)
    if asked_for.errors or not asked_for.is_group or asked_for.status != "open":
        raise Problem(HTTPStatus.NOT_FOUND, "There is no such group of dead letters.")
    return asked_for


def progress(
    up_to: Annotated[str, Form()] = "",
    total: Annotated[str, Form()] = "",
    after: Annotated[str, Form()] = "",
    applied: Annotated[str, Form()] = "",
    sent: Annotated[str, Form()] = "",
    failed: Annotated[str, Form()] = "",
    refused: Annotated[str, Form()] = "",
) -> Progress:
    """A dependency: the progress that the form carries. What is no number counts as 0, which does nothing."""
    return Progress(*(letter_id(text) or 0 for text in (up_to, total, after, applied, sent, failed, refused)))


ChosenGroup = Annotated[LetterQuery, Depends(group_query)]
Begun = Annotated[Progress, Depends(progress)]


@router.post("/replay", dependencies=[Depends(checked_form)])
def replay_group(request: Request, group: ChosenGroup, begun: Begun, session: Operator, using: Using) -> Response:
    """Send the messages of a group again, oldest first: REPLAYED_AT_ONCE, or as many as STEP_S is enough for."""
    done, failure = _replay_step(using, session.principal.subject, group, begun)
    with using.reading() as ledger:
        left = dead_letters.count_open(ledger, group.matching, after_id=done.after, up_to_id=done.up_to)
    status = HTTPStatus.SERVICE_UNAVAILABLE if failure else HTTPStatus.OK
    return page(request, "letters_replayed.html", status, here=HERE, asked=group, done=done, left=left, failure=failure)


def _replay_step(using: Services, by: str, group: LetterQuery, done: Progress) -> tuple[Progress, str]:
    """The progress after one step, and why it ended early; empty: it did not."""
    with using.reading() as ledger:
        ids = dead_letters.open_ids(
            ledger, group.matching, after_id=done.after, up_to_id=done.up_to, limit=REPLAYED_AT_ONCE
        )
    replayer = Replayer(using.engine, using.client, by=by, wait_s=ANSWER_TIMEOUT_S)
    ends_at = time.monotonic() + STEP_S
    for number in ids:
        try:
            what = "applied" if dead_letters.is_known(replayer.replay(number)) else "sent"
        except StillFailsError:
            what = "failed"
        except (NotReplayableError, UnknownLetterError):
            what = "refused"
        except NotSentError:
            return done, NOT_SENT
        done = replace(done, after=number, **{what: getattr(done, what) + 1})
        if time.monotonic() > ends_at:
            break
    return done, ""


@router.post("/discard", dependencies=[Depends(checked_form)])
def discard_group(
    request: Request,
    group: ChosenGroup,
    begun: Begun,
    session: Operator,
    using: Using,
    reason: Annotated[str, Form()] = "",
) -> Response:
    """Discard the letters of a group, with a reason, DISCARDED_AT_ONCE in one request."""
    why, problem = read_reason(reason)
    if problem:
        return list_page(request, group, using, HTTPStatus.UNPROCESSABLE_ENTITY, problem=problem, reason=reason)
    by, limit = session.principal.subject, DISCARDED_AT_ONCE
    number = dead_letters.discard_all(using.engine, group.matching, up_to_id=begun.up_to, by=by, why=why, limit=limit)
    done = replace(begun, applied=begun.applied + number)
    with using.reading() as ledger:
        left = dead_letters.count_open(ledger, group.matching, up_to_id=done.up_to)
    return page(request, "letters_discarded.html", here=HERE, asked=group, done=done, left=left, reason=why)
