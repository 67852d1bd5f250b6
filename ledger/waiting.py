"""Messages that wait for their organization, so that nobody else has to.

A message that cannot be applied now (somebody has locked the wallet, PostgreSQL takes too long over it) is kept in the
table `waiting_messages` and acknowledged. While an organization has messages there, its later ones go behind them, so
they are applied in the order of their arrival. `store.apply_waiting` applies them.

Before a message is applied it is noted that this is attempted, and afterwards that the worker is still there. One that
has ended `SUSPECT` workers is taken alone; one that has ended `DELIVERY_LIMIT` is applied no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

import psycopg
from psycopg.errors import SerializationFailure
from psycopg.rows import args_row
from sqlalchemy import Connection, text

from ledger import arrays
from ledger.messages import SUSPECT
from ledger.state import ErrorCode

NOBODY = ""
"""Stands for the organization of a message that names none."""

LOCKED = "its wallet is locked"
RECORD_LOCKED = "one of its workflows or subscriptions is locked"
BEING_CREATED = "its wallet is being created"
BEHIND = "its earlier messages wait"
MUCH_DUE = "more is due in its wallet than one transaction does"
SLOW = "the database takes too long over its messages"
BLOCKED = "a row that its messages need is locked"

MAX_NAMED = 10_000
"""The most organizations that `organizations` returns."""


@dataclass(frozen=True, slots=True)
class Waits:
    """What became of a message that waits for its organization. It is kept, and may be acknowledged."""

    org_id: str
    """`NOBODY`, if the message names none."""
    reason: str


class WaitingMessage(NamedTuple):
    """A message that waits: a row of `waiting_messages`, but for what the database adds."""

    org_id: str
    task: str
    body: bytes
    """The message as received."""
    answer_to: str | None
    """Who wants its answer; only the sender's side knows what that means."""
    error_code: ErrorCode | None
    error: str | None
    """Why it will be a dead letter, if that is known already."""
    reason: str
    """Why it has to wait."""


class NumberedMessage(NamedTuple):
    """A message that waits, with its place."""

    number: int
    task: str
    body: bytes
    answer_to: str | None
    error_code: ErrorCode | None
    error: str | None


class Taken(NamedTuple):
    """Messages of one organization that are about to be applied."""

    numbers: list[int]
    attempts: int
    """How often that was attempted with the first of them and has ended its worker, and this time."""


@dataclass(frozen=True, slots=True)
class WaitingOrganization:
    """An organization whose messages wait."""

    org_id: str
    """`NOBODY` for messages that name none."""
    reason: str
    since: datetime
    """Since when its first message waits."""
    messages: int | None = None
    """How many of them wait, if that was counted."""


_KEEP = """
    INSERT INTO waiting_messages (org_id, task, body, answer_to, error_code, error, reason)
    SELECT org_id, task, body, answer_to, error_code, error, reason
    FROM unnest(%b::text[], %b::text[], %b::bytea[], %b::text[], %b::text[], %b::text[], %b::text[])
      WITH ORDINALITY AS new (org_id, task, body, answer_to, error_code, error, reason, place)
    ORDER BY place
"""
_FIRST = "SELECT number, attempts FROM waiting_messages WHERE org_id = %b ORDER BY number LIMIT %b"
_COUNT_ATTEMPT = """
    UPDATE waiting_messages SET attempts = attempts + %b WHERE org_id = %b AND number = ANY(%b::bigint[])
"""
_READ = """
    SELECT number, task, body, answer_to, error_code, error FROM waiting_messages
    WHERE org_id = %b AND number = ANY(%b::bigint[]) ORDER BY number
"""
_REMOVE = "DELETE FROM waiting_messages WHERE org_id = %b AND number = ANY(%b::bigint[])"

# From one organization to the next in the index, however many messages each of them has.
_ORGANIZATIONS = text("""
    WITH RECURSIVE organizations (org_id) AS (
        (SELECT org_id FROM waiting_messages ORDER BY org_id LIMIT 1)
        UNION ALL
        SELECT following.org_id FROM organizations CROSS JOIN LATERAL (
            SELECT org_id FROM waiting_messages WHERE org_id > organizations.org_id ORDER BY org_id LIMIT 1
        ) AS following
    )
    SELECT org_id, reason, waiting_since FROM organizations CROSS JOIN LATERAL (
        SELECT reason, waiting_since FROM waiting_messages
        WHERE waiting_messages.org_id = organizations.org_id ORDER BY number LIMIT 1
    ) AS first
    LIMIT :most
""")

_COUNT = text("SELECT org_id, count(*) FROM waiting_messages WHERE org_id = ANY(:org_ids) GROUP BY org_id")


def keep(connection: psycopg.Connection[Any], messages: Sequence[WaitingMessage]) -> None:
    """Have `messages` wait, in this order, in the transaction of `connection`."""
    connection.execute(_KEEP, [list(column) for column in zip(*messages, strict=True)])


def take(connection: psycopg.Connection[Any], org_id: str, limit: int) -> Taken | None:
    """Note, in the transaction of `connection`, that the first messages of `org_id` are about to be applied.

    At most `limit` of them; one that is suspected of ending its worker is taken alone. None: no message waits. Whoever
    holds the lock of the wallet may do it.
    """
    found = connection.execute(_FIRST, [org_id, limit]).fetchall()
    if not found:
        return None
    (first, attempts), *rest = found
    numbers = [first]
    if attempts < SUSPECT:
        numbers += [number for number, _ in takewhile(lambda row: row[1] < SUSPECT, rest)]
    connection.execute(_COUNT_ATTEMPT, [1, org_id, arrays.bigint(numbers)])
    return Taken(numbers, attempts + 1)


def give_back(connection: psycopg.Connection[Any], org_id: str, taken: Taken) -> None:
    """The messages were not applied, and the worker goes on: as if they had not been taken."""
    connection.execute(_COUNT_ATTEMPT, [-1, org_id, arrays.bigint(taken.numbers)])


def read(connection: psycopg.Connection[Any], org_id: str, taken: Taken) -> list[NumberedMessage]:
    """The messages that were taken, in order. Raises SerializationFailure if somebody else has applied some of them."""
    cursor = connection.cursor(row_factory=args_row(NumberedMessage), binary=True)
    messages = cursor.execute(_READ, [org_id, arrays.bigint(taken.numbers)]).fetchall()
    if len(messages) != len(taken.numbers):
        raise SerializationFailure(_APPLIED)
    return messages


def remove(connection: psycopg.Connection[Any], org_id: str, taken: Taken) -> None:
    """Have these messages of `org_id` wait no more, in the transaction of `connection`.

    Raises SerializationFailure if somebody else has done that already, as without a wallet they can.
    """
    if connection.execute(_REMOVE, [org_id, arrays.bigint(taken.numbers)]).rowcount != len(taken.numbers):
        raise SerializationFailure(_APPLIED)


_APPLIED = "somebody else has applied these messages"


def organizations(connection: Connection, *, most: int = MAX_NAMED) -> list[WaitingOrganization]:
    """The organizations whose messages wait, at most `most`, in the order of their ids."""
    return [WaitingOrganization(*row) for row in connection.execute(_ORGANIZATIONS, {"most": most})]


def counted(connection: Connection, found: Sequence[WaitingOrganization]) -> list[WaitingOrganization]:
    """The same, with the number of messages of each, which takes a look at all of them."""
    rows = connection.execute(_COUNT, {"org_ids": [organization.org_id for organization in found]})
    number: dict[str, int] = {org_id: messages for org_id, messages in rows}  # noqa: C416 # rows are no tuples to mypy
    return [replace(organization, messages=number.get(organization.org_id, 0)) for organization in found]
