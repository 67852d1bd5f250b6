"""The pages for operators. The first says what needs somebody now; `api_stub.letters` has the dead letters."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from api_stub import incidents, letters
from api_stub.problems import NO_PAGE, Problem
from api_stub.rendering import PageRoute, page
from api_stub.services import Services, Using
from api_stub.sessions import operator_reads
from holdfast_client.client import BrokerUnavailableError
from ledger import attention, dead_letters, views, waiting
from ledger.dead_letters import LetterFilter
from ledger.due import POST_DUE, RELEASE_EXPIRED
from ledger.faults import describe, took_too_long

SHOWN = 5
"""The most rows of a part."""
OLD_HOLD = timedelta(hours=6)
"""From which age on a reservation is shown."""
PART_TIMEOUT_S = 2
"""How long the database may take for one part of the page."""

router = APIRouter(
    prefix="/operators", route_class=PageRoute, include_in_schema=False, dependencies=[Depends(operator_reads)]
)
log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the page: what was found, or why it was not."""

    found: Any = None
    problem: str = ""


@router.get("")
def start(request: Request, using: Using) -> Response:
    """What needs somebody now. A part that cannot be read is a sentence in its place."""
    return page(
        request,
        "operators.html",
        here=letters.HERE,
        now=datetime.now(UTC),
        shown=SHOWN,
        old_hold=OLD_HOLD,
        no_organization=letters.NO_ORGANIZATION,
        broker=_of_the_broker(using),
        **_of_the_ledger(using),
    )


router.include_router(incidents.router)
router.include_router(letters.router)


@router.get("/{rest:path}")
def nothing() -> Response:
    """Answer 404 for any other page."""
    raise Problem(HTTPStatus.NOT_FOUND, "There is no such page.", on_page=NO_PAGE)


def add(app: FastAPI) -> None:
    """Add the operators' pages."""
    app.include_router(router)


def _of_the_ledger(using: Services) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, read in _OF_THE_LEDGER.items():
        try:
            with using.reading() as ledger:
                ledger.execute(text(f"SET LOCAL statement_timeout = {round(PART_TIMEOUT_S * 1_000)}"))
                parts[name] = Part(read(ledger))
        except (DBAPIError, PoolTimeoutError) as error:
            log.error("The part %s of the operators' page could not be read: %s", name, describe(error))
            if not (isinstance(error, DBAPIError) and took_too_long(error)):
                # Every other part would wait for the same database.
                return {each: Part(problem="The database does not answer.") for each in _OF_THE_LEDGER} | parts
            parts[name] = Part(problem="The database takes too long over this. Reload the page to try again.")
    return parts


def _of_the_broker(using: Services) -> Part:
    """The queues, and whether a worker answers."""
    try:
        queues = [(queue, number, timedelta(seconds=age_s)) for queue, (number, age_s) in using.queues.look().items()]
        return Part((queues, using.client.sees_worker()))
    except BrokerUnavailableError as error:
        log.error("The queues could not be read for the operators' page: %s", error)
        return Part(problem="The broker does not answer.")


def _waiting(ledger: Connection) -> list[waiting.WaitingOrganization]:
    found = waiting.organizations(ledger)
    longest = sorted(found, key=lambda organization: organization.since)
    return [*waiting.counted(ledger, longest[:SHOWN]), *longest[SHOWN:]]


def _overdue(ledger: Connection) -> list[tuple[str, int, str]]:
    """What is overdue, in how many wallets, and one of them."""
    words = {
        POST_DUE: "A period should have begun, or credits have ended",
        RELEASE_EXPIRED: "Reservations have expired",
    }
    found = attention.overdue_wallets(ledger)
    return [(words[task], count, first) for task, (count, first) in found.items() if count and first is not None]


_OF_THE_LEDGER: Mapping[str, Callable[[Connection], Any]] = {
    "letters": lambda ledger: dead_letters.groups(ledger, LetterFilter(), limit=SHOWN),
    "waiting": _waiting,
    "overdue": _overdue,
    "holds": lambda ledger: views.open_reservations(ledger, older_than=OLD_HOLD, limit=SHOWN + 1),
    "owing": lambda ledger: attention.owing(ledger, limit=SHOWN),
}
