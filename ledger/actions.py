"""Who did what, and when: the actions of operators, from the events and the dead letters themselves. Only reads.

An event is an operator's if its source is `OPERATOR`, which nobody else may name over HTTP; `by` in its metadata says
who it was. A dead letter that was replayed or discarded says by whom. Nothing else is kept.
"""

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self

from sqlalchemy import ColumnElement, Connection, func, select, text, tuple_

from holdfast_client.messages import MAX_REASON_LENGTH
from ledger.filters import identifier, when
from ledger.tables import credit_events, dead_letters

MAX_PAGE = 100
"""The most actions of one page."""

LETTERS = ("replayed", "discarded")
"""The kinds of action on a dead letter: the status that it has since."""

KINDS = ("grant", "adjustment", "refund", "reversal", "release", "configure", *LETTERS)
"""What operators do on the pages and with commands. The kind of an event is the beginning of its idempotency key."""


class Place(NamedTuple):
    """The place of an action among all, which are in the order of time. Later in the order means later in time."""

    at: datetime
    is_event: bool
    """At the same time, events come after dead letters."""
    org_id: str
    """Of an event."""
    number: int
    """The `seq` of an event, or the number of a dead letter."""

    def __str__(self) -> str:
        return f"{self.at.isoformat()}~{'event' if self.is_event else 'letter'}~{self.org_id}~{self.number}"

    @classmethod
    def read(cls, written: str) -> Self:
        """The place that was written as text. Raises ValueError."""
        at, kind, org_id, number = written.split("~")
        if kind not in ("event", "letter") or not re.fullmatch("[1-9][0-9]{0,15}", number):
            raise ValueError("there is no such place")
        return cls(when(at).begin, kind == "event", identifier(org_id) if kind == "event" else "", int(number))


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that an operator did."""

    place: Place
    kind: str
    by: str | None
    """Who did it; None: an older version did not keep that."""
    org_id: str | None
    about: str
    """The id of the run, the grant and so on; of a dead letter, its task."""
    credits: int | None
    """What it changed of the available balance; None: it is about a dead letter."""
    reason: str | None
    """Why; of a replayed dead letter, what came of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionFilter:
    """Conditions on actions. All that are given must hold. `done_from` is inclusive, `done_before` is not."""

    by: str | None = None
    org_id: str | None = None
    kind: str | None = None
    """One of `KINDS`."""
    done_from: datetime | None = None
    done_before: datetime | None = None


def actions(
    connection: Connection, matching: ActionFilter = ActionFilter(), *, limit: int, before: Place | None = None
) -> list[Action]:
    """The actions that match, newest first, at most `limit` (1-100); with `before`, only those before that place."""
    assert 1 <= limit <= MAX_PAGE
    parts: list[Iterator[Action]] = []
    if matching.kind not in LETTERS:
        parts.append(_of_events(connection, matching, limit, before))
    if matching.kind is None or matching.kind in LETTERS:
        parts.append(_of_letters(connection, matching, limit, before))
    merged = heapq.merge(*parts, key=lambda action: (action.place.at, action.place.is_event), reverse=True)
    return [action for action, _ in zip(merged, range(limit), strict=False)]


def _said(name: str) -> ColumnElement[Any]:
    """The beginning of a text in the metadata: a sender may have put a long one there."""
    return func.left(credit_events.c.metadata[name].astext, MAX_REASON_LENGTH)


def _of_events(connection: Connection, matching: ActionFilter, limit: int, before: Place | None) -> Iterator[Action]:
    columns = credit_events.c
    reason = func.coalesce(_said("given_reason"), _said("reason"))
    query = select(
        columns.created_at, columns.org_id, columns.seq, columns.idempotency_key, columns.credits, _said("by"), reason
    ).where(text("source = 'operator'"), *_between(columns.created_at, matching))  # as the index has it
    if matching.by is not None:
        query = query.where(columns.metadata["by"].astext == matching.by)
    if matching.org_id is not None:
        query = query.where(columns.org_id == matching.org_id)
    if matching.kind is not None:
        query = query.where(func.starts_with(columns.idempotency_key, f"{matching.kind}:"))
    if before is not None and before.is_event:
        place = tuple_(columns.created_at, columns.org_id, columns.seq)
        query = query.where(place < tuple_(before.at, before.org_id, before.number))
    elif before is not None:
        query = query.where(columns.created_at < before.at)
    newest = query.order_by(columns.created_at.desc(), columns.org_id.desc(), columns.seq.desc()).limit(limit)
    for at, org_id, seq, key, changed, by, why in connection.execute(newest):
        kind, _, about = key.partition(":")
        yield Action(Place(at, True, org_id, seq), kind, by, org_id, about, changed, why)


def _of_letters(connection: Connection, matching: ActionFilter, limit: int, before: Place | None) -> Iterator[Action]:
    columns = dead_letters.c
    query = select(
        *(columns.resolved_at, columns.id, columns.status, columns.resolved_by, columns.org_id, columns.task),
        func.left(columns.resolution, MAX_REASON_LENGTH),
    ).where(columns.resolved_at.is_not(None), *_between(columns.resolved_at, matching))
    for column, value in (
        (columns.resolved_by, matching.by),
        (columns.org_id, matching.org_id),
        (columns.status, matching.kind),
    ):
        if value is not None:
            query = query.where(column == value)
    if before is not None and before.is_event:
        query = query.where(columns.resolved_at <= before.at)
    elif before is not None:
        query = query.where(tuple_(columns.resolved_at, columns.id) < tuple_(before.at, before.number))
    newest = query.order_by(columns.resolved_at.desc(), columns.id.desc()).limit(limit)
    for at, number, status, by, org_id, task, why in connection.execute(newest):
        yield Action(Place(at, False, "", number), status, by, org_id, task, None, why)


def _between(column: Any, matching: ActionFilter) -> list[ColumnElement[bool]]:
    conditions = []
    if matching.done_from is not None:
        conditions.append(column >= matching.done_from)
    if matching.done_before is not None:
        conditions.append(column < matching.done_before)
    return conditions
