"""Dead letters: messages that could not be applied, kept with the reason until an operator replays or discards them.

A dead letter is written in the transaction that decides the message, so before the message is acknowledged. The same
message failing again counts as another attempt of the same open dead letter.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

import psycopg
from psycopg.errors import UniqueViolation
from sqlalchemy import ColumnElement, Connection, Engine, Update, func, or_, select, update

from holdfast_client.messages import MAX_BODY_BYTES
from holdfast_client.results import ErrorCode, Result
from ledger.bodies import arguments, written
from ledger.causes import cause_of
from ledger.readable import escaped, escaped_json, readable_json, shortened
from ledger.tables import dead_letters
from ledger.waiting import NOBODY

MAX_ERROR_LENGTH = 4_000
"""The most characters of an error, when it is written and in lists."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter before it is written."""

    task: str
    body: bytes
    """The message as received."""
    org_id: str | None
    code: ErrorCode
    error: str
    """One sentence for a person: what is wrong with the message."""
    traceback: str | None = None
    replay_of: int | None = None
    """The dead letter whose message was sent again with this one."""
    traceparent: str | None = None
    """The trace that the message belongs to."""


# It also locks a letter that is open: whoever replays it must see this attempt before the letter is marked.
_REOPEN = """
    UPDATE dead_letters SET status = 'open', resolved_at = NULL, resolved_by = NULL, resolution = NULL
    WHERE id = %b AND status IN ('open', 'replayed') AND task = %b AND body_sha256 = %b AND NOT EXISTS (
        SELECT FROM dead_letters AS other WHERE other.id <> dead_letters.id AND other.status = 'open'
        AND other.task = dead_letters.task AND other.body_sha256 = dead_letters.body_sha256
    )
"""

_RECORD = """
    INSERT INTO dead_letters
      (task, body, body_sha256, org_id, error_code, error, cause, traceback, attempts, traceparent)
    SELECT task, body, body_sha256, org_id, error_code, error, cause, traceback, attempts, traceparent
    FROM unnest(
        %b::text[], %b::bytea[], %b::bytea[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bigint[],
        %b::text[]
    ) AS letter (task, body, body_sha256, org_id, error_code, error, cause, traceback, attempts, traceparent)
    ON CONFLICT (task, body_sha256) WHERE status = 'open' DO UPDATE
      SET attempts = dead_letters.attempts + excluded.attempts,
          last_failed_at = GREATEST(dead_letters.last_failed_at, excluded.last_failed_at),
          org_id = excluded.org_id,
          error_code = excluded.error_code,
          error = excluded.error,
          cause = excluded.cause,
          traceback = excluded.traceback,
          traceparent = COALESCE(excluded.traceparent, dead_letters.traceparent)
    RETURNING task, body_sha256, id
"""


def record(connection: psycopg.Connection[Any], letters: Sequence[DeadLetter]) -> list[int]:
    """Write `letters` in the transaction of `connection`. Returns the id of each, in order.

    The same message twice is one dead letter with two attempts, however its JSON is formatted. A message that is the
    replay of a letter, and fails again, is another attempt of that letter, which is open again. A letter that holds
    another message stays as it is, whatever `replay_of` says; so does a discarded one.
    """
    distinct: dict[tuple[str, bytes], tuple[DeadLetter, int]] = {}
    keys = [(letter.task, _digest(letter)) for letter in letters]
    for key, letter in zip(keys, letters, strict=True):
        _, attempts = distinct.get(key, (letter, 0))
        distinct[key] = (letter, attempts + 1)
    # In one order everywhere, so that two writers of the same letters cannot deadlock.
    replays = {(*key, letter.replay_of) for key, letter in zip(keys, letters, strict=True) if letter.replay_of}
    for task, digest, replay_of in sorted(replays):
        with suppress(UniqueViolation), connection.transaction():  # somebody else has just opened one
            connection.execute(_REOPEN, [replay_of, task, digest])
    rows = [
        (
            letter.task,
            letter.body,
            digest,
            letter.org_id,
            letter.code,
            letter.error,
            cause_of(letter.error),
            letter.traceback,
            attempts,
            letter.traceparent,
        )
        for (_, digest), (letter, attempts) in sorted(distinct.items(), key=lambda item: item[0])
    ]
    recorded = connection.execute(_RECORD, [list(column) for column in zip(*rows, strict=True)])
    id_by_key = {(task, bytes(digest)): letter_id for task, digest, letter_id in recorded}
    return [id_by_key[key] for key in keys]


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Conditions on dead letters. All that are given must hold."""

    status: str | None = "open"
    code: str | None = None
    task: str | None = None
    org_id: str | None = None
    """`NOBODY`: those that name no organization."""
    failed_since: datetime | None = None
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class ListedLetter:
    """A dead letter in a list: without what may be large, and with only the beginning of its error."""

    id: int
    status: str
    task: str
    org_id: str | None
    error_code: str
    error: str
    attempts: int
    first_failed_at: datetime
    last_failed_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None
    resolution: str | None
    cause: str


@dataclass(frozen=True, slots=True)
class KeptLetter(ListedLetter):
    """A dead letter as it is kept."""

    body: bytes
    traceback: str | None
    traceparent: str | None


class UnknownLetterError(LookupError):
    """There is no dead letter with this number."""


class NotReplayableError(Exception):
    """The dead letter cannot be sent again; the text says why."""


class NotOpenError(Exception):
    """The dead letter was replayed or discarded before; the text says by whom and how."""


class StillFailsError(Exception):
    """The message was sent again and failed again; the text says why. The dead letter stays open."""


def letters(
    connection: Connection, matching: LetterFilter = LetterFilter(), *, limit: int = 100, before_id: int | None = None
) -> list[ListedLetter]:
    """The dead letters that match, newest first; with `before_id`, only those with a smaller id."""
    columns = dead_letters.c
    # Older versions, without this bound, wrote errors of millions of characters.
    short = {"error": func.left(columns.error, MAX_ERROR_LENGTH)}
    names = [field.name for field in fields(ListedLetter)]
    query = select(*(short.get(name, columns[name]) for name in names)).where(*_conditions(matching))
    if before_id is not None:
        query = query.where(columns.id < before_id)
    return [ListedLetter(*row) for row in connection.execute(query.order_by(columns.id.desc()).limit(limit))]


def counts(connection: Connection, matching: LetterFilter) -> dict[str, int]:
    """The number of dead letters of each status that there is, of those that match but for their status."""
    status = dead_letters.c.status
    query = select(status, func.count()).where(*_conditions(replace(matching, status=None))).group_by(status)
    return {name: count for name, count in connection.execute(query)}  # noqa: C416 # rows are no tuples to mypy


@dataclass(frozen=True, slots=True)
class Group:
    """The dead letters of one organization, task, code and cause: as a rule, those of one incident."""

    org_id: str | None
    task: str
    error_code: str
    cause: str
    """Empty for letters that an older version wrote."""
    count: int
    first_failed_at: datetime
    last_failed_at: datetime
    newest_id: int

    def filter(self, status: str | None) -> LetterFilter:
        """What its letters match, and no other does."""
        org_id = NOBODY if self.org_id is None else self.org_id
        return LetterFilter(status, self.error_code, self.task, org_id, cause=self.cause)


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of dead letters, the largest first."""

    listed: list[Group]
    total: int
    """How many groups there are, those that are not listed included."""
    letters: int
    organizations: int
    """How many letters and organizations all of them have."""


def groups(connection: Connection, matching: LetterFilter, *, limit: int) -> Groups:
    """The dead letters that match, by cause: the `limit` largest groups. Reads an index alone."""
    columns = dead_letters.c
    of_group = (columns.org_id, columns.task, columns.error_code, columns.cause)
    count = func.count().label("count")
    grouped = (
        select(
            *of_group,
            count,
            func.min(columns.first_failed_at).label("first_failed_at"),
            func.max(columns.last_failed_at).label("last_failed_at"),
            func.max(columns.id).label("newest_id"),
        )
        .where(*_conditions(matching))
        .group_by(*of_group)
        .cte("grouped")
    )
    sums = (
        select(function).select_from(grouped).scalar_subquery()
        for function in (func.count(), func.sum(grouped.c.count), func.count(grouped.c.org_id.distinct()))
    )
    largest = select(grouped, *sums).order_by(grouped.c.count.desc(), grouped.c.newest_id.desc()).limit(limit)
    rows = connection.execute(largest).all()
    total, letters, organizations = rows[0][-3:] if rows else (0, 0, 0)
    return Groups([Group(*row[:-3]) for row in rows], total, int(letters), organizations)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an open dead letter is among all open ones, newest first."""

    number: int
    """1 for the newest."""
    total: int
    newer_id: int | None
    older_id: int | None


def place(connection: Connection, letter_id: int) -> Place:
    """The place of the dead letter `letter_id` among the open ones; it need not be one of them."""
    columns = dead_letters.c
    is_newer, is_older = columns.id > letter_id, columns.id < letter_id
    row = connection.execute(
        select(
            func.count().filter(is_newer),
            func.count(),
            func.min(columns.id).filter(is_newer),
            func.max(columns.id).filter(is_older),
        ).where(columns.status == "open")
    ).one()
    return Place(row[0] + 1, *row[1:])


def open_ids(
    connection: Connection, matching: LetterFilter, *, after_id: int = 0, up_to_id: int, limit: int
) -> list[int]:
    """The numbers of the open dead letters that match, oldest first, in this range: at most `limit`."""
    column = dead_letters.c.id
    query = select(column).where(*_open_between(matching, after_id, up_to_id)).order_by(column).limit(limit)
    return list(connection.scalars(query))


def count_open(connection: Connection, matching: LetterFilter, *, after_id: int = 0, up_to_id: int) -> int:
    """How many open dead letters match in this range."""
    query = select(func.count()).where(*_open_between(matching, after_id, up_to_id))
    return connection.execute(query).scalar_one()


def _open_between(matching: LetterFilter, after_id: int, up_to_id: int) -> list[ColumnElement[bool]]:
    column = dead_letters.c.id
    return [*_conditions(replace(matching, status="open")), column > after_id, column <= up_to_id]


def _conditions(matching: LetterFilter) -> list[ColumnElement[bool]]:
    columns = dead_letters.c
    conditions = [
        columns[name] == value
        for name, value in (
            ("status", matching.status),
            ("error_code", matching.code),
            ("task", matching.task),
            ("org_id", None if matching.org_id == NOBODY else matching.org_id),
            ("cause", matching.cause),
        )
        if value is not None
    ]
    if matching.org_id == NOBODY:
        conditions.append(columns.org_id.is_(None))
    if matching.failed_since is not None:
        conditions.append(columns.last_failed_at >= matching.failed_since)
    return conditions


def letter(connection: Connection, letter_id: int) -> KeptLetter:
    """The dead letter with this number. Raises UnknownLetterError."""
    query = select(*(dead_letters.c[field.name] for field in fields(KeptLetter))).where(dead_letters.c.id == letter_id)
    row = connection.execute(query).first()
    if row is None:
        raise UnknownLetterError(f"there is no dead letter {letter_id}")
    return KeptLetter(*row)


def kept_of(connection: Connection, org_id: str, task: str, *, limit: int) -> list[KeptLetter]:
    """The newest dead letters of an organization and a task, whatever became of them."""
    columns = dead_letters.c
    query = select(*(columns[field.name] for field in fields(KeptLetter)))
    query = query.where(columns.org_id == org_id, columns.task == task).order_by(columns.id.desc()).limit(limit)
    return [KeptLetter(*row) for row in connection.execute(query)]


_NEVER_REPLAYED = {
    "too_large": "holds only the first part of its message: its sender must send a smaller one",
    "not_allowed": "holds a message that its sender may not send: if it is intended, send it from a system that may",
}
"""Why a dead letter with such a code cannot be sent again."""

_SENT = "sent; "
"""The beginning of a resolution when the outcome of the message is not known."""


def _digest(letter: DeadLetter) -> bytes:
    body = letter.body
    # These never share a digest with a letter that may be replayed. The error of one that is too large has the size and
    # the digest of the whole message.
    if letter.code in _NEVER_REPLAYED:
        return hashlib.sha256(letter.error.encode() + body).digest()
    found = arguments(body)
    if found is not None:
        with suppress(RecursionError):  # nested so deeply that it can be read, but not written
            body = json.dumps(found).encode()
    return hashlib.sha256(body).digest()


def readable(body: bytes, most: int, rest: str) -> str:
    """A message for a person: its fields, or the raw body if it has none. Control characters are escaped.

    Shows at most `most` characters, counted before they are escaped; `rest` says how to see the others.
    """
    # Older versions, without this bound, kept larger messages, which take seconds to parse.
    found = arguments(body) if len(body) <= MAX_BODY_BYTES else None
    if found is not None:
        args, kwargs = found
        message = args[0] if len(args) == 1 and not kwargs else {"args": args, "kwargs": kwargs}
        with suppress(RecursionError):  # nested so deeply that it can be read, but not written
            return escaped_json(shortened(readable_json(message), most, rest))
    return escaped(shortened(body.decode("utf-8", "backslashreplace"), most, rest), keep="\n")


_MOST_SENT_BYTES = MAX_BODY_BYTES - 128
"""The largest arguments that are sent again: Celery adds some to the body."""


def sent_with(letter: KeptLetter) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with which to send the message of `letter` again. Raises NotReplayableError."""
    if letter.status == "discarded":
        raise NotReplayableError(f"dead letter {letter.id} was discarded by {letter.resolved_by}: {letter.resolution}")
    if letter.error_code in _NEVER_REPLAYED:
        raise NotReplayableError(f"dead letter {letter.id} {_NEVER_REPLAYED[letter.error_code]}")
    found = arguments(letter.body)
    if found is None:
        raise NotReplayableError(f"dead letter {letter.id} holds no message that could be sent again")
    if not letter.task:
        raise NotReplayableError(f"dead letter {letter.id} names no task, so it cannot be sent again")
    with suppress(RecursionError):  # whoever encodes it says so
        if len(written(*found)) > _MOST_SENT_BYTES:
            # Celery escapes all that is not ASCII, so a message may be larger than it was.
            raise NotReplayableError(f"dead letter {letter.id} is too large to be sent again as Celery writes it")
    return found


def replay(engine: Engine, letter_id: int, *, by: str, send: Callable[..., Result | str]) -> str:
    """Send a dead letter's message again, unchanged, and mark the letter with the outcome. Returns the outcome.

    `send` takes the task, its positional and its named arguments, and the `traceparent` or None. It returns what the
    message did or, if that is not known, a text that says why. It raises StillFailsError if the message failed again.
    Replaying twice is safe, as the message keeps its ids; the letter keeps the first known outcome. Raises
    UnknownLetterError, NotReplayableError and StillFailsError.
    """
    with engine.connect() as connection:
        kept = letter(connection, letter_id)
    answer = send(kept.task, *sent_with(kept), kept.traceparent)
    outcome = f"{_SENT}{answer}" if isinstance(answer, str) else described(answer)
    mark = _resolve(letter_id, status="replayed", by=by, resolution=outcome).where(
        or_(dead_letters.c.status != "replayed", dead_letters.c.resolution.startswith(_SENT))
    )
    if isinstance(answer, str):
        # A message that fails before this mark is another attempt; one that fails after it opens the letter again.
        mark = mark.where(dead_letters.c.attempts == kept.attempts)
    with engine.begin() as connection:
        connection.execute(mark)
        now = letter(connection, letter_id)
    if isinstance(answer, str) and now.attempts > kept.attempts:
        raise StillFailsError(f"{now.error} (dead letter {letter_id}, {now.error_code})")
    return outcome


def is_known(outcome: str) -> bool:
    """Whether a replay with this outcome was answered; otherwise the message was sent, and nobody knows more."""
    return not outcome.startswith(_SENT)


def described(answer: Result) -> str:
    """What a message did, in words."""
    reason = "" if answer.reason is None else f" ({answer.reason})"
    repeated = ", a duplicate: nothing changes" if answer.duplicate else ""
    # The first outcome of a start does not say whether it still holds credits.
    ended = answer.outcome == "reserved" and answer.state is not None and not answer.holds
    since = f", and the workflow is now {answer.state}" if ended else ""
    return f"{answer.outcome}{reason}{repeated}{since}"


def discard(engine: Engine, letter_id: int, *, by: str, why: str) -> None:
    """Discard an open dead letter, and record why. Raises UnknownLetterError and NotOpenError."""
    mark = _resolve(letter_id, status="discarded", by=by, resolution=why).where(dead_letters.c.status == "open")
    with engine.begin() as connection:
        if connection.execute(mark).rowcount == 0:
            kept = letter(connection, letter_id)
            raise NotOpenError(f"dead letter {letter_id} was {kept.status} by {kept.resolved_by}: {kept.resolution}")


def discard_all(engine: Engine, matching: LetterFilter, *, up_to_id: int, by: str, why: str, limit: int) -> int:
    """Discard the open dead letters that match up to this number, oldest first, at most `limit`, and record why.

    Returns how many it discarded. All of them are discarded, or none.
    """
    with engine.begin() as connection:
        ids = open_ids(connection, matching, up_to_id=up_to_id, limit=limit)
        columns = dead_letters.c
        mark = update(dead_letters).where(columns.id == func.any(ids), columns.status == "open")
        return connection.execute(mark.values(_resolved("discarded", by, why))).rowcount


def _resolve(letter_id: int, *, status: str, by: str, resolution: str) -> Update:
    return update(dead_letters).where(dead_letters.c.id == letter_id).values(_resolved(status, by, resolution))


def _resolved(status: str, by: str, resolution: str) -> dict[str, Any]:
    return {"status": status, "resolved_at": func.clock_timestamp(), "resolved_by": by, "resolution": resolution}
