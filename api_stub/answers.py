"""The answers of the JSON API: models that describe them in the OpenAPI document and validate them."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, WithJsonSchema

from holdfast_client.results import OutcomeName, Reason, WorkflowState
from holdfast_client.results import Result as LedgerResult
from ledger.state import EventType
from ledger.usage import FEWEST_RATE_DAYS, MOST_GROUPS, RATE_DAYS
from ledger.views import MOST_ENDS


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


Moment = Annotated[
    datetime,
    PlainSerializer(_text, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-01-31T09:00:00.123456+00:00"]}),
]
"""A time in UTC, always written as `+00:00`."""

AsOf = Annotated[
    Moment,
    Field(description="The answer has everything that was committed until then, and may have more."),
]
"""How old an answer may be that is read from a replica."""


class _Answer(
    BaseModel,
    extra="forbid",  # a field that is not described here is a defect
    json_schema_extra=lambda schema: schema.pop("additionalProperties"),  # clients should accept later fields
):
    """An answer. Every field is always present."""


class Event(_Answer):
    """One event of the credit history."""

    id: Annotated[int, Field(description="Its number in the organization's history: 1, 2, 3, … without a gap.")]
    workflow_id: str | None
    created_at: Moment
    event_type: EventType
    source: str
    project_id: str | None
    activity_name: str | None
    credits: Annotated[int, Field(description="The effect on the available balance.")]
    prepaid_balance_after: int
    period_usage_after: int
    metadata: dict[str, Any]


class Archived(_Answer):
    """The older events of the organization, which are in the archive."""

    events: Annotated[int, Field(description="How many they are: those with an `id` up to this number.")]
    through: Annotated[Moment, Field(description="The time of the last of them.")]


_ARCHIVED = Field(description="The archived events, if some may match. They are in no item; null: there are none.")


class EventPage(_Answer):
    """Events, newest first."""

    items: list[Event]
    total: Annotated[
        int,
        Field(description="The number of all matching events. Of archived ones, those of the UTC days in the range."),
    ]
    credits: Annotated[int, Field(description="The sum of the credits of these events.")]
    limit: int
    offset: int
    next_cursor: Annotated[int | None, Field(description="The `cursor` of the next page; null: there is none.")]
    as_of: AsOf
    archived: Annotated[Archived | None, _ARCHIVED]


class Receipt(_Answer):
    """What one workflow has done to the balance until `date_to`, or one event that belongs to no workflow."""

    workflow_id: Annotated[str | None, Field(description="null: it is an event that belongs to no workflow.")]
    state: Annotated[WorkflowState | None, Field(description="Of the workflow, at `date_to` if that is given.")]
    project_id: str | None
    activity_name: str | None
    reserved_credits: Annotated[int | None, Field(description="The credits reserved for it; null: none.")]
    used_credits: Annotated[int | None, Field(description="The credits charged; null: it has not finished.")]
    refunded_credits: int
    credits: Annotated[int, Field(description="The effect of all its events on the available balance.")]
    began_at: Annotated[Moment, Field(description="When its first event was.")]
    changed_at: Annotated[Moment, Field(description="When its newest event was.")]
    expires_at: Annotated[Moment | None, Field(description="When its open reservation expires; null: it has none.")]
    archived_in_part: Annotated[
        bool, Field(description="Whether older events of the workflow are in the archive, and only the others counted.")
    ]
    last_id: Annotated[int, Field(description="The `id` of its newest event.")]
    event: Annotated[Event | None, Field(description="The event, if it belongs to no workflow.")]
    events_url: Annotated[str | None, Field(description="Where the events of the workflow are; null: it is none.")]


class ReceiptPage(_Answer):
    """Receipts, the one with the newest matching event first."""

    items: list[Receipt]
    total: Annotated[
        int | None,
        Field(description="The number of all receipts, if this page has them all; otherwise null, as nobody counts."),
    ]
    credits: Annotated[int, Field(description="The sum of the credits of all matching events.")]
    limit: int
    offset: Literal[0]
    next_cursor: Annotated[
        str | None,
        Field(description="The `cursor` of the next page; null: there is none. A page may be shorter than its limit."),
    ]
    as_of: AsOf
    archived: Annotated[Archived | None, _ARCHIVED]


class Period(_Answer):
    """A period of the subscription."""

    start: Moment
    end: Moment


class Ending(_Answer):
    """Credits that end by themselves, besides those of the current period."""

    credits: int
    expires_at: Annotated[
        Moment, Field(description="When they end. In the past: they stay as long as a reservation needs them.")
    ]
    origin: Annotated[str, Field(alias="from", description="What brought them, and its id, as in `grant:welcome`.")]


class NextPlan(_Answer):
    """The plan after the current period's."""

    plan: str
    monthly_credits: int
    starts_at: Moment


class Wallet(_Answer):
    """The wallet, now."""

    org_id: str
    balance: int
    available: Annotated[int, Field(description="The balance less the reserved credits.")]
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    credit_limit: Annotated[int, Field(description="How far below zero reservations may take `available`.")]
    period_cap: Annotated[
        int | None,
        Field(
            description="The most usage of one period, or of all time while there is no subscription; null: no limit."
        ),
    ]
    used_this_period: int
    included_this_period: int
    plan: str | None
    plan_ends_at: Annotated[
        Moment | None, Field(description="When the plan ends, as its subscription was ended; null: it goes on.")
    ]
    next_plan: Annotated[NextPlan | None, Field(description="The plan that comes next, if it is another one.")]
    current_period: Period | None
    ending: Annotated[
        list[Ending],
        Field(description=f"What ends by itself, soonest first; of each balance at most {MOST_ENDS} entries."),
    ]
    prepaid_ending: Annotated[
        int,
        Field(description="How many of the prepaid credits end by themselves, also those that `ending` leaves out."),
    ]


class UsageGroup(_Answer):
    """What was used by a project, an activity, a source, a day or a month: it has the names in `group_by`."""

    project: Annotated[str | None, Field(description="null: the runs that named none.")] = None
    activity: Annotated[str | None, Field(description="null: the runs that named none.")] = None
    source: str = ""
    day: Annotated[str, Field(description="In UTC, as in `2026-01-31`.")] = ""
    month: Annotated[str, Field(description="In UTC, as in `2026-01`.")] = ""
    credits: int
    runs: int


class UsageTotal(_Answer):
    """What was used in all."""

    credits: int
    runs: int


class UsageRate(_Answer):
    """How quickly credits are used."""

    credits_per_day: Annotated[
        int, Field(description=f"The mean of the last {RATE_DAYS} full days in UTC, rounded up.")
    ]
    lasts_until: Annotated[
        Moment | None, Field(description="When what is available now is used up at this rate; null: never.")
    ]


class Usage(_Answer):
    """The usage of a range of time: by time, and then the largest first."""

    groups: Annotated[list[UsageGroup], Field(description="None, if `group_by` is not given.")]
    total: Annotated[UsageTotal, Field(description="Of all groups, also those that are left out.")]
    truncated: Annotated[
        bool, Field(description=f"Whether there are more than {MOST_GROUPS} groups, so that the smallest are left out.")
    ]
    rate: Annotated[
        UsageRate | None,
        Field(description=f"Now, whatever the range; null: the first event is less than {FEWEST_RATE_DAYS} days old."),
    ]
    as_of: AsOf


class WalletThen(_Answer):
    """The wallet as it was at a time."""

    org_id: str
    at: Moment
    available: int
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    used_this_period: int


class Limit(_Answer):
    """A limit on what starts may reserve."""

    kind: Annotated[Reason, Field(description="The reason that a start is given which this limit rejects.")]
    limit: Annotated[int, Field(description="What may be reserved in all; or used and reserved within the period.")]
    used: Annotated[int, Field(description="What was used within the period; of a limit without periods, 0.")]
    reserved: int
    resets_at: Annotated[Moment | None, Field(description="When `used` is 0 again; null: there is no period.")]


class QuotedLimit(Limit):
    """A limit on what starts may reserve, with what it still allows."""

    remaining: Annotated[int, Field(description="What it still allows to reserve; may be below 0.")]


class Quote(_Answer):
    """What a start would be answered now."""

    outcome: Literal["reserved", "rejected"]
    reason: Annotated[Reason | None, Field(description="Why it would be rejected; null: it would not be.")]
    available: int
    shortfall: Annotated[int | None, Field(description="How many credits the limit lacks that would reject it.")]
    limits: Annotated[list[QuotedLimit], Field(description="Every limit of the wallet.")]
    as_of_seq: Annotated[int, Field(description="The wallet's last event that is counted; 0: it has none.")]


class Workflow(_Answer):
    """A workflow: its state, its credits and its events."""

    workflow_id: str
    state: WorkflowState
    project_id: str | None
    activity_name: str | None
    requested_credits: Annotated[int | None, Field(description="What its start asked for; null: it was never started.")]
    reason: Annotated[Reason | None, Field(description="Why its start reserved nothing; null: it did, or none came.")]
    reserved_credits: Annotated[int | None, Field(description="The credits reserved for it; null: none.")]
    expires_at: Annotated[Moment | None, Field(description="When its reservation expires, or would have expired.")]
    used_credits: Annotated[int | None, Field(description="The credits charged; null: it has not finished.")]
    refunded_credits: int
    archived_in_part: Annotated[bool, Field(description="Whether events of it are in the archive, not here.")]
    events: Annotated[list[Event], Field(description="Its events and those of its refunds, oldest first.")]


class Accepted(_Answer):
    """The broker has the message."""

    status: Literal["accepted"]
    task: str
    org_id: str
    workflow_id: Annotated[str | None, Field(description="The workflow in the path; null: there is none.")]


class BatchAccepted(_Answer):
    """The broker has all messages."""

    status: Literal["accepted"]
    messages: Annotated[int, Field(description="How many there are.")]


class Result(_Answer):
    """What the ledger did with a message."""

    outcome: OutcomeName
    reason: Annotated[Reason | None, Field(description="Why, where an outcome has more than one reason.")]
    duplicate: Annotated[bool, Field(description="Whether the message was answered before. Then nothing changes.")]
    org_id: str
    workflow_id: str | None
    state: Annotated[
        WorkflowState | None, Field(description="What the workflow is now. Only if it is `reserved`, credits are held.")
    ]
    event_seqs: Annotated[list[int], Field(description="The events that this delivery wrote; none for a duplicate.")]
    available: Annotated[int, Field(description="The credits that a workflow may reserve, after the message.")]
    limit: Annotated[Limit | None, Field(description="The limit that rejects the start, unless it is a duplicate.")]
    shortfall: Annotated[int | None, Field(description="How many credits that limit lacks for it.")]

    @classmethod
    def of(cls, result: LedgerResult) -> dict[str, Any]:
        """The answer as a JSON object."""
        limit = None if result.limit is None else result.limit._asdict()
        answer = cls(**{**result._asdict(), "event_seqs": list(result.event_seqs), "limit": limit})
        return answer.model_dump(mode="json")


class Health(_Answer):
    """The process answers."""

    status: Literal["ok"]


class Readiness(_Answer):
    """The services that requests need."""

    database: Annotated[
        str,
        Field(
            description="`ok`; `unavailable`; or, in a sentence, why its schema is not the one of this version",
            examples=["ok", "the database is not migrated yet: run `holdfast migrate`"],
        ),
    ]
    broker: Literal["ok", "unavailable"]
