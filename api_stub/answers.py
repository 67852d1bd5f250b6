"""The answers of the JSON API: models that describe them in the OpenAPI document and validate them."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainSerializer, WithJsonSchema

from ledger.state import EventType, WorkflowState
from ledger.views import MOST_ENDS


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


Moment = Annotated[
    datetime,
    PlainSerializer(_text, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time", "examples": ["2026-01-31T09:00:00.123456+00:00"]}),
]
"""A time in UTC, always written as `+00:00`."""


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


class EventPage(_Answer):
    """Events, newest first."""

    items: list[Event]
    total: Annotated[int, Field(description="The number of all matching events.")]
    limit: int
    offset: int
    next_cursor: Annotated[int | None, Field(description="The `cursor` of the next page; null: there is none.")]


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
    next_plan: Annotated[NextPlan | None, Field(description="The plan that comes next; null: the same, or none.")]
    current_period: Period | None
    ending: Annotated[list[Ending], Field(description=f"What ends by itself, at most {MOST_ENDS}, soonest first.")]


class WalletThen(_Answer):
    """The wallet as it was at a time."""

    org_id: str
    at: Moment
    available: int
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    used_this_period: int


class Workflow(_Answer):
    """A workflow: its state, its credits and its events."""

    workflow_id: str
    state: WorkflowState
    project_id: str | None
    activity_name: str | None
    reserved_credits: Annotated[int | None, Field(description="The credits reserved for it; null: none.")]
    expires_at: Annotated[Moment | None, Field(description="When its reservation expires, or would have expired.")]
    used_credits: Annotated[int | None, Field(description="The credits charged; null: it has not finished.")]
    refunded_credits: int
    events: Annotated[list[Event], Field(description="Its events and those of its refunds, oldest first.")]


class Accepted(_Answer):
    """The broker has the message."""

    status: Literal["accepted"]
    task: str
    org_id: str
    workflow_id: str


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
