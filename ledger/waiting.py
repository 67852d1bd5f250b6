"""Messages that wait for their organization, so that no other organization has to.

A message that cannot be applied now, because its wallet is locked or PostgreSQL takes too long, is kept in the table
`waiting_messages` and acknowledged. While an organization has messages there, its later ones are put behind them. So
they are applied in the order of their arrival. `store.apply_waiting` applies them.

An attempt is counted before a message is applied, and taken back if the worker is still there afterwards. A message
that has ended `SUSPECT` workers is taken alone; one that has ended `DELIVERY_LIMIT` workers is not applied again.
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

from holdfast_client.messages import SUSPECT
from holdfast_client.results import ErrorCode
from ledger import arrays

NOBODY = ""
"""Stands for the organization of a message that names none."""

LOCKED = "its wallet is locked"
RECORD_LOCKED = "one of its workflows, subscriptions or ending credits is locked"
BEING_CREATED = "its wallet is being created"
BEHIND = "its earlier messages wait"
MUCH_DUE = "more is due in its wallet than one transaction does"
SLOW = "the database takes too long over its messages"
BLOCKED = "a row that its messages need is locked"
AWAY = "the node of the database that has it is away"

MAX_NAMED = 10_000
"""The most organizations that `organizations` returns."""


@dataclass(frozen=True, slots=True)
class Waits:
    """The result of a message that waits for its organization. It is kept, and may be acknowledged."""

    org_id: str
    """`NOBODY`, if the message names none."""
    reason: str


class WaitingMessage(NamedTuple):
    """A message that waits: a row of `waiting_messages` without the columns that the database fills."""

    org_id: str
    task: str
    body: bytes
    """The message as received."""
    answer_to: str | None
    """Where to send the answer; opaque to the ledger."""
    error_code: ErrorCode | None
    error: str | None
    """Why it will be a dead letter, if that is known already."""
    reason: str
    """Why it has to wait."""
    replay_of: int | None = None
    """The dead letter whose message this is, sent again."""
    traceparent: str | None = None
    """The trace that the message belongs to."""


class NumberedMessage(NamedTuple):
    """A message that waits, with its number."""

    number: int
    task: str
    body: bytes
    answer_to: str | None
    error_code: ErrorCode | None
    error: str | None
    replay_of: int | None
    traceparent: str | None


class Taken(NamedTuple):
    """Messages of one organization that are about to be applied."""

    numbers: list[int]
    attempts: int
    """The attempts counted for the first of them, this one included."""


@dataclass(frozen=True, slots=True)
class WaitingOrganization:
    """An organization whose messages wait."""

    org_id: str
    """`NOBODY` for messages that name none."""
    reason: str
    since: datetime
    """Since when its first message waits."""
    messages: int | None = None
    """How many messages wait, if that was counted."""


_KEEP = """
    INSERT INTO waiting_messages (org_id, task, body, answer_to, error_code, error, reason, replay_of, traceparent)
    SELECT org_id, task, body, answer_to, error_code, error, reason, replay_of, traceparent
    FROM unnest(
        %b::text[], %b::text[], %b::bytea[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bigint[], %b::text[]
    ) WITH ORDINALITY AS new (org_id, task, body, answer_to, error_code, error, reason, replay_of, traceparent, place)
    ORDER BY place
"""
_FIRST = "SELECT number, attempts FROM waiting_messages WHERE org_id = %b ORDER BY number LIMIT %b"
_COUNT_ATTEMPT = """
    UPDATE waiting_messages SET attempts = attempts + %b WHERE org_id = %b AND number = ANY(%b::bigint[])
"""
_READ = """
    SELECT number, task, body, answer_to, error_code, error, replay_of, traceparent FROM waiting_messages
    WHERE org_id = %b AND number = ANY(%b::bigint[]) ORDER BY number
"""
_REMOVE = "DELETE FROM waiting_messages WHERE org_id = %b AND number = ANY(%b::bigint[])"

# Goes from one organization to the next in the index, however many messages each of them has.
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
    """Keep `messages`, in this order, in the transaction of `connection`."""
    connection.execute(_KEEP, [list(column) for column in zip(*messages, strict=True)])


def take(connection: psycopg.Connection[Any], org_id: str, limit: int) -> Taken | None:
    """Take the first messages of `org_id`, at most `limit`: count an attempt, in the transaction of `connection`.

    A message that is suspected of ending its worker is taken alone. None: no message waits. The caller must hold the
    lock of the wallet, if there is one.
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
    """Take back the attempt: the messages were not applied, and the worker goes on."""
    connection.execute(_COUNT_ATTEMPT, [-1, org_id, arrays.bigint(taken.numbers)])


def read(connection: psycopg.Connection[Any], org_id: str, taken: Taken) -> list[NumberedMessage]:
    """The messages that were taken, in order. Raises SerializationFailure if another worker has applied some."""
    cursor = connection.cursor(row_factory=args_row(NumberedMessage), binary=True)
    messages = cursor.execute(_READ, [org_id, arrays.bigint(taken.numbers)]).fetchall()
    if len(messages) != len(taken.numbers):
        raise SerializationFailure(_APPLIED)
    return messages


def remove(connection: psycopg.Connection[Any], org_id: str, taken: Taken) -> None:
    """Delete the messages that were taken, in the transaction of `connection`.

    Raises SerializationFailure if another worker has deleted some: without a wallet, no lock prevents that.
    """
    if connection.execute(_REMOVE, [org_id, arrays.bigint(taken.numbers)]).rowcount != len(taken.numbers):
        raise SerializationFailure(_APPLIED)


_APPLIED = "another worker has applied these messages"


def organizations(connection: Connection, *, most: int = MAX_NAMED) -> list[WaitingOrganization]:
    """The organizations whose messages wait, at most `most`, in the order of their ids."""
    return [WaitingOrganization(*row) for row in connection.execute(_ORGANIZATIONS, {"most": most})]


def counted(connection: Connection, found: Sequence[WaitingOrganization]) -> list[WaitingOrganization]:
    """The same organizations with the number of messages of each. Reads all of these messages."""
    rows = connection.execute(_COUNT, {"org_ids": [organization.org_id for organization in found]})
    number: dict[str, int] = {org_id: messages for org_id, messages in rows}  # noqa: C416 # rows are no tuples to mypy
    return [replace(organization, messages=number.get(organization.org_id, 0)) for organization in found]
