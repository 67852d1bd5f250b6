"""The credit history by run: one receipt for each workflow, and one for each event that belongs to none. Only reads.

The receipts of a filter are those of which at least one event matches it. A receipt's place in the list is its newest
matching event: a refund brings an old run back to where people look for it, and a filter finds receipts as quickly as
events. A later page would lose a run that changes in the meantime, so all pages that continue one another are of one
moment: a `Place` says of which. Their credits add up to the credits of all events until then.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self, cast

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Connection,
    Label,
    RowMapping,
    Text,
    and_,
    any_,
    case,
    func,
    literal,
    select,
)

from holdfast_client.results import WorkflowState
from ledger import history
from ledger.archived import Archived
from ledger.filters import EVERY_EVENT, EventFilter
from ledger.history import MAX_PAGE, Day, Found
from ledger.state import EventType
from ledger.tables import credit_events, posted_messages

MOST_EVENTS = 5_000
"""The most events that one page looks at. One that finds less than it was asked for among them is shorter."""

_STEP = 2_000
"""The most of them in one statement."""


PLACE_PATTERN = "[0-9]{1,16}-[0-9]{1,16}"
"""A `Place` as text."""


class Place(NamedTuple):
    """Where a page begins: with the receipts before event number `before`, as they were before number `end`."""

    end: int
    before: int

    def __str__(self) -> str:
        return f"{self.end}-{self.before}"

    @classmethod
    def of(cls, text: str) -> Self:
        """The place that is written as `text`. Raises ValueError, as `filters.when` does."""
        if not re.fullmatch(PLACE_PATTERN, text):
            raise ValueError("must be the next_cursor of a page that is grouped by workflow")
        return cls(*map(int, text.split("-")))


class Step(NamedTuple):
    """One event of a workflow."""

    seq: int
    created_at: datetime
    event_type: EventType
    source: str
    project_id: str | None
    activity_name: str | None
    credits: int
    reason: str | None
    """Of the end of a reservation: why. Of others: whatever their sender says."""
    expires_at: str | None
    """Of a reservation: when it expires, in ISO 8601."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one workflow has done to the balance, or one event that belongs to no workflow. In credits."""

    workflow_id: str | None
    event: RowMapping | None
    """The event, if it belongs to no workflow."""
    state: WorkflowState | None
    project_id: str | None
    activity_name: str | None
    reserved_credits: int | None
    """What was reserved for the workflow; None: nothing."""
    used_credits: int | None
    """What it was charged; None: it has not finished."""
    refunded_credits: int
    credits: int
    """The effect of all its events on the available balance."""
    began_at: datetime
    changed_at: datetime
    placed_at: datetime
    """When the newest event was that matches the filter."""
    last_seq: int
    expires_at: datetime | None
    """When its open reservation expires."""
    steps: Sequence[Step] = ()
    """The events of the workflow, oldest first."""
    is_archived_in_part: bool = False
    """Whether older events of the workflow are in the archive, so that only the others are counted here."""

    @classmethod
    def of_event(cls, event: RowMapping) -> Self:
        """The receipt of an event that belongs to no workflow."""
        at = event["created_at"]
        return cls(
            workflow_id=None,
            event=event,
            state=None,
            project_id=event["project_id"],
            activity_name=event["activity_name"],
            reserved_credits=None,
            used_credits=None,
            refunded_credits=event["credits"] if event["event_type"] == "refund" else 0,
            credits=event["credits"],
            began_at=at,
            changed_at=at,
            placed_at=at,
            last_seq=event["seq"],
            expires_at=None,
        )

    @classmethod
    def of_run(cls, workflow_id: str, steps: Sequence[Step], placed_at: datetime) -> Self:
        """The receipt of a workflow with these events, oldest first."""
        reserved = [step for step in steps if step.event_type == "reservation"]
        used = [step for step in steps if step.event_type == "usage"]
        state = _state(steps)
        return cls(
            workflow_id=workflow_id,
            event=None,
            state=state,
            project_id=next((step.project_id for step in reversed(steps) if step.project_id), None),
            activity_name=next((step.activity_name for step in reversed(steps) if step.activity_name), None),
            reserved_credits=-reserved[0].credits if reserved else None,
            used_credits=-used[0].credits if used else None,
            refunded_credits=sum(step.credits for step in steps if step.event_type == "refund"),
            credits=sum(step.credits for step in steps),
            began_at=steps[0].created_at,
            changed_at=steps[-1].created_at,
            placed_at=placed_at,
            last_seq=steps[-1].seq,
            expires_at=datetime.fromisoformat(reserved[0].expires_at or "") if state == "reserved" else None,
            steps=steps,
            is_archived_in_part=steps[0].event_type not in ("reservation", "usage"),
        )


def _state(steps: Sequence[Step]) -> WorkflowState:
    state: WorkflowState = "reserved"
    for step in steps:
        if step.event_type in ("usage", "refund"):
            return "settled"  # only what was charged is refunded
        if step.event_type == "reservation_released":
            state = cast(WorkflowState, step.reason)  # its usage, if it has settled, comes next
    return state


def as_item(receipt: Receipt) -> dict[str, Any]:
    """A receipt as a customer sees it: the fields of a JSON object."""
    names = ("state", "project_id", "activity_name", "reserved_credits", "used_credits", "refunded_credits", "credits")
    return {
        "workflow_id": receipt.workflow_id,
        **{name: getattr(receipt, name) for name in names},
        "began_at": receipt.began_at.isoformat(),
        "changed_at": receipt.changed_at.isoformat(),
        "expires_at": None if receipt.expires_at is None else receipt.expires_at.isoformat(),
        "archived_in_part": receipt.is_archived_in_part,
        "last_id": receipt.last_seq,
        "event": None if receipt.event is None else history.as_item(receipt.event),
    }


@dataclass(frozen=True, slots=True)
class Page:
    """A page of receipts, newest first, and the number and the credits of all matching events of that moment."""

    receipts: list[Receipt]
    events: int
    credits: int
    next: Place | None
    """Where the next page begins; None: this is the last one."""
    archived: Archived | None
    """The archived events, if some may match; they are in no receipt."""


def page(
    connection: Connection,
    org_id: str,
    matching: EventFilter = EVERY_EVENT,
    *,
    limit: int = MAX_PAGE,
    place: Place | None = None,
) -> Page:
    """A page of the receipts of `org_id`: `limit` of them (1-100), newest first, from `place` on.

    It has fewer, or none, if there are no more among `MOST_EVENTS` events; `next` still leads on.
    """
    assert 1 <= limit <= MAX_PAGE
    found = history.find(connection, org_id, matching)
    if place is not None:
        found = found.before(place.end)
    before = found.end if place is None else place.before
    older = found.before(before)
    days: list[Day] = []
    if found.conditions:
        days = older.days(connection)
        total = found.totals_with(connection, days, before_seq=None if place is None else before)
    else:
        total = found.totals(connection)
    runs: dict[str, _Run] = {}
    lines: list[tuple[int, str | None]] = []
    seen, step = 0, 2 * limit + 1
    while len(lines) <= limit and seen < MOST_EVENTS:
        step = min(step, _STEP, MOST_EVENTS - seen)
        events = _events(connection, older, days, offset=seen, limit=step)
        new = {run for _, run in events if run is not None} - runs.keys()
        runs |= _runs(connection, found, new)
        lines += [(seq, run) for seq, run in events if run is None or runs[run].place.seq == seq]
        if len(events) < step:
            before = 0
            break
        before = events[-1][0]
        seen += step
        step *= 2
    more = lines[limit - 1][0] if len(lines) > limit else before
    shown = lines[:limit]
    others = _whole(connection, org_id, [seq for seq, run in shown if run is None])
    receipts = [
        Receipt.of_event(others[seq])
        if run is None
        else Receipt.of_run(run, runs[run].steps, runs[run].place.created_at)
        for seq, run in shown
    ]
    return Page(receipts, *total, Place(found.end, more) if more else None, found.archived(connection))


def _events(
    connection: Connection, found: Found, days: list[Day], *, offset: int, limit: int
) -> Sequence[tuple[int, str | None]]:
    """The numbers of `limit` events after the `offset` newest, each with its workflow. `days`: those of `found`."""
    columns = credit_events.c
    if found.conditions:
        numbers = found.numbers_on(connection, days, offset=offset, limit=limit)
        chosen = select(credit_events).where(columns.org_id == found.org_id, columns.seq.in_(numbers or [0]))
        chosen = chosen.order_by(columns.seq.desc())
    else:
        chosen = found.before(found.end - offset).select().limit(limit)
    return [(seq, run) for seq, run in connection.execute(chosen.with_only_columns(columns.seq, _run_of(found.org_id)))]


class _Run(NamedTuple):
    steps: list[Step]
    place: Step
    """The newest that matches."""


def _run_of(org_id: str) -> Label[str | None]:
    """The workflow of an event of `org_id`.

    A refund that was written before revision 0017 names its workflow in its message alone. Citus asks one node alone
    only if both tables are limited to the organization.
    """
    columns = posted_messages.c
    message_id = func.substr(credit_events.c.idempotency_key, len("refund:") + 1)
    refunded = (
        select(columns.terms["workflow_id"].astext)
        .where(columns.org_id == org_id, columns.kind == "refund", columns.message_id == message_id)
        .scalar_subquery()
    )
    return case(
        (credit_events.c.workflow_id.is_not(None), credit_events.c.workflow_id),
        (credit_events.c.event_type == "refund", refunded),
    ).label("run")


def _runs(connection: Connection, found: Found, workflow_ids: Collection[str]) -> dict[str, _Run]:
    """These workflows, each of which has a matching event: their events before the end of what was found."""
    if not workflow_ids:
        return {}
    columns = credit_events.c
    runs = history.keys_of_workflows(connection, found.org_id, workflow_ids)
    steps = (
        select(
            *(columns[name] for name in Step._fields[:-2]),
            columns.metadata["reason"].astext,
            columns.metadata["expires_at"].astext,
            columns.idempotency_key,
            and_(columns.seq >= found.first, *found.conditions),
        )
        .where(
            columns.org_id == found.org_id,
            columns.idempotency_key == any_(literal(list(runs), ARRAY(Text))),
            columns.seq < found.end,
        )
        .order_by(columns.seq)
    )
    of: dict[str, list[Step]] = {workflow_id: [] for workflow_id in workflow_ids}
    places: dict[str, Step] = {}
    for *values, key, matches in connection.execute(steps):
        step = Step(*values)
        of[runs[key]].append(step)
        if matches:
            places[runs[key]] = step
    return {run: _Run(of[run], places[run]) for run in workflow_ids}


def _whole(connection: Connection, org_id: str, numbers: list[int]) -> dict[int, RowMapping]:
    """The events with these numbers, by number."""
    if not numbers:
        return {}
    columns = credit_events.c
    numbered = columns.seq == any_(literal(numbers, ARRAY(BigInteger)))
    events = connection.execute(select(credit_events).where(columns.org_id == org_id, numbered)).mappings()
    return {event["seq"]: event for event in events}
