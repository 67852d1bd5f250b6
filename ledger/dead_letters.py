"""Dead letters: what arrived and could not be applied, kept with the reason until an operator has dealt with it.

A letter is written in the transaction that decides about the message, so it is there before the message is
acknowledged. The same message failing again (a redelivery, a second try) counts as another attempt of the same open
letter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import Connection, select

from ledger.tables import dead_letters


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be applied, as it is about to be kept."""

    task: str
    body: bytes
    """The message as received."""
    org_id: str | None
    code: str
    error: str
    """One sentence for a person: what is wrong with the message."""
    traceback: str | None = None


_RECORD = """
    INSERT INTO dead_letters (task, body, body_sha256, org_id, error_code, error, traceback, attempts)
    SELECT task, body, body_sha256, org_id, error_code, error, traceback, attempts
    FROM unnest(%b::text[], %b::bytea[], %b::bytea[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bigint[])
      AS letter (task, body, body_sha256, org_id, error_code, error, traceback, attempts)
    ON CONFLICT (task, body_sha256) WHERE status = 'open' DO UPDATE
      SET attempts = dead_letters.attempts + excluded.attempts,
          last_failed_at = GREATEST(dead_letters.last_failed_at, excluded.last_failed_at),
          org_id = excluded.org_id,
          error_code = excluded.error_code,
          error = excluded.error,
          traceback = excluded.traceback
    RETURNING task, body_sha256, id
"""


def record(connection: psycopg.Connection[Any], letters: Sequence[DeadLetter]) -> list[int]:
    """Keep `letters` in the transaction of `connection`; answers with the id of each, in order.

    The same message twice is one letter with two attempts.
    """
    distinct: dict[tuple[str, bytes], tuple[DeadLetter, int]] = {}
    keys = [(letter.task, hashlib.sha256(letter.body).digest()) for letter in letters]
    for key, letter in zip(keys, letters, strict=True):
        _, attempts = distinct.get(key, (letter, 0))
        distinct[key] = (letter, attempts + 1)
    # In one order everywhere, so that two writers of the same letters cannot deadlock.
    rows = [
        (
            letter.task,
            letter.body,
            digest,
            letter.org_id,
            letter.code,
            letter.error,
            letter.traceback,
            attempts,
        )
        for (_, digest), (letter, attempts) in sorted(distinct.items(), key=lambda item: item[0])
    ]
    recorded = connection.execute(_RECORD, [list(column) for column in zip(*rows, strict=True)])
    id_by_key = {(task, bytes(digest)): letter_id for task, digest, letter_id in recorded}
    return [id_by_key[key] for key in keys]


def open_letters(connection: Connection, *, limit: int = 100) -> Sequence[Any]:
    """The newest open dead letters, as rows of the table."""
    query = select(dead_letters).where(dead_letters.c.status == "open").order_by(dead_letters.c.id.desc())
    return connection.execute(query.limit(limit)).all()
