"""What a message would do now, and what a start would be answered. Only reads, and holds nothing.

What is due in the wallet counts as posted, as a message posts it first. Messages that are on their way, or that wait
for their organization, do not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from holdfast_client.messages import AnyMessage
from holdfast_client.results import Result
from ledger import rules
from ledger.database import LedgerConnection
from ledger.state import Event, Quote, Refusal, Wallet
from ledger.working_set import WorkingSet


class MuchDueError(Exception):
    """More is due in the wallet than one transaction posts. A message would have to wait, too."""


class Preview(NamedTuple):
    """What a message would do now. Nothing of it is written."""

    answer: Result | Refusal
    """What its sender would be told; a Refusal: it would become a dead letter."""
    before: Wallet
    """The wallet without the message. What is due in it is posted."""
    after: Wallet
    """The wallet with the message; the same if it changes nothing."""
    events: tuple[Event, ...]
    """The events that it would write."""


def preview(connection: Connection, message: AnyMessage) -> Preview:
    """What `message` would do. `connection` is a snapshot that only reads. Raises as `quote` does."""
    work = _looked(connection, message.org_id, [message])
    before, due = work.wallets[message.org_id], len(work.events)
    answer = work.apply(message)
    return Preview(answer, before, work.wallets[message.org_id], tuple(work.events[due:]))


def quote(connection: Connection, org_id: str, credits: int) -> Quote:
    """What a start of `org_id` with `credits` would be answered. `connection` is a snapshot that only reads.

    Raises MuchDueError, WrongClockError, and the errors of SQLAlchemy.
    """
    work = _looked(connection, org_id)
    found = rules.quote(work.wallets[org_id], credits)
    return found._replace(as_of_seq=found.as_of_seq - len(work.events))  # which are not written


def _looked(connection: Connection, org_id: str, messages: Sequence[AnyMessage] = ()) -> WorkingSet:
    driver = connection.connection.driver_connection
    assert isinstance(driver, LedgerConnection)
    try:
        work = WorkingSet.look(driver, org_id, messages)
    except psycopg.Error as error:
        raise DBAPIError(None, None, error) from error  # as if SQLAlchemy had sent the statements
    if org_id in work.reasons_to_wait:
        raise MuchDueError
    return work
