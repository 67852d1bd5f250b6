"""Messages that wait for their organization, so that nobody else has to.

A message that cannot be applied now (somebody has locked the wallet, PostgreSQL takes too long over it) is kept in the
table `waiting_messages` and acknowledged. While an organization has messages there, its later ones go behind them, so
they are applied in the order of their arrival. `store.apply_waiting` applies them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.errors import SerializationFailure
from psycopg.rows import args_row
from sqlalchemy import Connection, text

from ledger import arrays

NOBODY = ""
"""Stands for the organization of a message that names none."""

MAX_NAMED = 10_000
"""The most organizations that `organizations` returns."""


class WaitingMessage(NamedTuple):
    """A message that waits: a row of `waiting_messages`, but for what the database adds."""

    org_id: str
    task: str
    body: bytes
    """The message as received."""
    answer_to: str | None
    """Who wants its answer; only the sender's side knows what that means."""
    error_code: str | None
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
    error_code: str | None
    error: str | None


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
_FIRST = """
    SELECT number, task, body, answer_to, error_code, error FROM waiting_messages
    WHERE org_id = %b ORDER BY number LIMIT %b
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


def first(connection: psycopg.Connection[Any], org_id: str, limit: int) -> "psycopg.Cursor[NumberedMessage]":
    """The messages of `org_id` that wait longest, at most `limit`. Whoever holds its wallet's lock may apply them."""
    cursor = connection.cursor(row_factory=args_row(NumberedMessage), binary=True)
    return cursor.execute(_FIRST, [org_id, limit])


def remove(connection: psycopg.Connection[Any], org_id: str, numbers: Sequence[int]) -> None:
    """Have these messages of `org_id` wait no more, in the transaction of `connection`.

    Raises SerializationFailure if somebody else has done that already, as without a wallet they can.
    """
    if connection.execute(_REMOVE, [org_id, arrays.bigint(numbers)]).rowcount != len(numbers):
        raise SerializationFailure("somebody else has applied these messages")


def organizations(connection: Connection, *, most: int = MAX_NAMED) -> list[WaitingOrganization]:
    """The organizations whose messages wait, at most `most`, in the order of their ids."""
    return [WaitingOrganization(*row) for row in connection.execute(_ORGANIZATIONS, {"most": most})]


def counted(connection: Connection, found: Sequence[WaitingOrganization]) -> list[WaitingOrganization]:
    """The same, with the number of messages of each, which takes a look at all of them."""
    rows = connection.execute(_COUNT, {"org_ids": [organization.org_id for organization in found]})
    number: dict[str, int] = {org_id: messages for org_id, messages in rows}  # noqa: C416 # rows are no tuples to mypy
    return [replace(organization, messages=number.get(organization.org_id, 0)) for organization in found]
