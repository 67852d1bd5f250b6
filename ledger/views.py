"""The current state: an organization's wallet, its workflows and its open reservations. Only reads."""

from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, not_, select

from holdfast_client.results import Reason, WorkflowState
from ledger import history
from ledger.archived import has_archived_events
from ledger.filters import EventFilter
from ledger.periods import period_start
from ledger.state import OUTCOMES, StepAnswer
from ledger.tables import credit_events, ending_credits, subscriptions, wallets, workflows

# Joins a workflow with the event of its reservation.
STARTED = and_(
    credit_events.c.org_id == workflows.c.org_id,
    credit_events.c.idempotency_key == func.concat("start:", workflows.c.workflow_id),
)


MOST_ENDS = 100
"""The most ends of credits of one balance that a wallet's view lists."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Credits that end by themselves, besides those of the current period."""

    credits: int
    expires_at: datetime
    origin: str
    """What brought them, and its id: `grant:welcome`, or `subscription:team:3` for what period 3 has left."""

    @property
    def is_from_subscription(self) -> bool:
        """Whether they are part of the subscription balance."""
        return self.origin.startswith("subscription:")


@dataclass(frozen=True, slots=True)
class NextPlan:
    """The plan that comes after the current period's, if it is another one."""

    plan: str
    monthly_credits: int
    starts_at: datetime


@dataclass(frozen=True, slots=True)
class NextCredits:
    """What a plan gives next."""

    plan: str
    credits: int
    at: datetime
    kept: int
    """The most unused credits of the period before that are kept."""


@dataclass(frozen=True, slots=True)
class WalletView:
    """An organization's wallet as last written: without what is due but not yet posted."""

    org_id: str
    balance: int = 0
    available: int = 0
    prepaid_balance: int = 0
    subscription_balance: int = 0
    reserved_credits: int = 0
    credit_limit: int = 0
    period_cap: int | None = None
    used_this_period: int = 0
    included_this_period: int = 0
    plan: str | None = None
    """The plan of the current period."""
    plan_ends_at: datetime | None = None
    """When it ends, if the subscription was ended: no further period of it begins."""
    next_plan: NextPlan | None = None
    next_credits: NextCredits | None = None
    """What a plan gives next. None: none does."""
    current_period_start: datetime | None = None
    current_period_end: datetime | None = None
    ending: tuple[Ending, ...] = ()
    """Of each balance, the first `MOST_ENDS` that end, in the order in which they do."""
    prepaid_ending: int = 0
    """How many of the prepaid credits end by themselves, those that are not listed included."""

    @property
    def left_of_plan(self) -> int:
        """What is left of the present plan: without what earlier plans left, which ends on days of its own."""
        return self.subscription_balance - sum(part.credits for part in self.ending if part.is_from_subscription)

    @property
    def spendable(self) -> int:
        """The largest estimate that is not refused for lack of credits."""
        return self.available + self.credit_limit


@dataclass(frozen=True, slots=True)
class Reservation:
    """An open reservation."""

    org_id: str
    workflow_id: str
    project_id: str | None
    activity_name: str | None
    credits: int
    reserved_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Refused:
    """A workflow whose start was rejected, and which has not run all the same."""

    workflow_id: str
    credits: int
    """What it was estimated to need."""
    reason: StepAnswer
    """`insufficient_credits` or `period_cap`."""
    at: datetime


@dataclass(frozen=True, slots=True)
class WorkflowView:
    """One workflow and its events, oldest first."""

    workflow_id: str
    state: WorkflowState
    project_id: str | None
    activity_name: str | None
    requested_credits: int | None
    """What its start asked for; None: it was never started."""
    reason: Reason | None
    """Why its start reserved nothing."""
    reserved_credits: int | None
    expires_at: datetime | None
    used_credits: int | None
    refunded_credits: int
    archived_in_part: bool
    """Whether events of it are in the archive, and not among `events`."""
    events: list[RowMapping]


def wallet(connection: Connection, org_id: str) -> WalletView | None:
    """The wallet of `org_id`, or None if no message has ever named it."""
    row = connection.execute(_WALLET.where(wallets.c.org_id == org_id)).first()
    if row is None:
        return None
    balance = row.prepaid_balance + row.subscription_balance
    ending: tuple[Ending, ...] = ()
    prepaid_ending = 0
    if row.next_ending_at is not None or row.held_past_end:
        ending, prepaid_ending = _ending(connection, org_id)
    has_period = row.period is not None
    return WalletView(
        org_id=row.org_id,
        balance=balance,
        available=balance - row.reserved,
        prepaid_balance=row.prepaid_balance,
        subscription_balance=row.subscription_balance,
        reserved_credits=row.reserved,
        credit_limit=row.credit_limit,
        period_cap=row.period_cap,
        used_this_period=row.period_usage,
        included_this_period=row.period_granted if has_period else 0,
        plan=row.period_plan or row.plan,
        plan_ends_at=row.next_period_at if has_period and not row.active else None,
        next_plan=_next_plan(row),
        next_credits=_next_credits(row),
        current_period_start=period_start(row.anchor, row.period) if has_period else None,
        current_period_end=row.next_period_at if has_period else None,
        ending=ending,
        prepaid_ending=prepaid_ending,
    )


def as_item(view: WalletView) -> dict[str, Any]:
    """A wallet as its owner sees it: the fields of a JSON object."""
    fields = asdict(view)
    del fields["next_credits"]  # programs know the terms of their plans
    start, end = fields.pop("current_period_start"), fields.pop("current_period_end")
    for part in fields["ending"]:
        part["from"] = part.pop("origin")
    return {**fields, "current_period": None if start is None else {"start": start, "end": end}}


def _subscription_of(wallets_column: ColumnElement[Any], subscription: Any) -> ColumnElement[bool]:
    return and_(subscription.c.org_id == wallets.c.org_id, subscription.c.subscription_id == wallets_column)


_CURRENT, _SCHEDULED = subscriptions.alias("current"), subscriptions.alias("scheduled")
_WALLET = select(
    wallets,
    *(_CURRENT.c[name] for name in ("active", "plan", "period_plan", "monthly_credits", "period_granted")),
    *(_CURRENT.c.rollover_limit, _CURRENT.c.anchor, _CURRENT.c.period),
    _SCHEDULED.c.plan.label("scheduled_plan"),
    _SCHEDULED.c.monthly_credits.label("scheduled_credits"),
    _SCHEDULED.c.first_lacks.label("scheduled_lacks"),
).select_from(
    wallets.outerjoin(_CURRENT, _subscription_of(wallets.c.subscription_id, _CURRENT)).outerjoin(
        _SCHEDULED, _subscription_of(wallets.c.scheduled_id, _SCHEDULED)
    )
)


def _next_plan(row: Any) -> NextPlan | None:
    if row.scheduled_plan is not None:
        return NextPlan(row.scheduled_plan, row.scheduled_credits, row.scheduled_at)
    if not row.active or row.plan == (row.period_plan or row.plan):
        return None
    return NextPlan(row.plan, row.monthly_credits, row.next_period_at)


def _next_credits(row: Any) -> NextCredits | None:
    if row.active and row.next_period_at and (row.scheduled_at is None or row.next_period_at < row.scheduled_at):
        return NextCredits(row.plan, row.monthly_credits, row.next_period_at, row.rollover_limit)
    if row.scheduled_plan is not None:
        # What the plan before it has left is set aside: it ends with its own period.
        first = max(0, row.scheduled_credits - row.scheduled_lacks)
        return NextCredits(row.scheduled_plan, first, row.scheduled_at, kept=0)
    return None


def _ending(connection: Connection, org_id: str) -> tuple[tuple[Ending, ...], int]:
    """What ends, and how much of it is prepaid."""
    columns = ending_credits.c
    of_plans = columns.origin.startswith("subscription:", autoescape=True)
    listed: list[Ending] = []
    for of_one in (of_plans, not_(of_plans)):
        query = select(columns.remaining, columns.expires_at, columns.origin).where(columns.org_id == org_id, of_one)
        rows = connection.execute(query.order_by(columns.expires_at, columns.seq, columns.origin).limit(MOST_ENDS))
        listed += [Ending(*row) for row in rows]
    prepaid = select(func.coalesce(func.sum(columns.remaining), 0)).where(columns.org_id == org_id, not_(of_plans))
    in_order = sorted(listed, key=lambda part: (part.expires_at, not part.is_from_subscription))
    return tuple(in_order), int(connection.scalar(prepaid) or 0)


def open_reservations(
    connection: Connection,
    *,
    org_id: str | None = None,
    older_than: timedelta | None = None,
    limit: int = 100,
    offset: int = 0,
) -> list[Reservation]:
    """The open reservations, oldest first, of one organization or of all: `limit` after the `offset` oldest.

    An expired one is included until the next message for its wallet, or the beat, releases it.
    """
    query = (
        select(workflows, credit_events.c.created_at)
        .select_from(workflows.join(credit_events, STARTED))
        .where(workflows.c.state == "reserved")
        .order_by(credit_events.c.created_at, workflows.c.org_id, workflows.c.workflow_id)
        .limit(limit)
        .offset(offset)
    )
    if org_id is not None:
        query = query.where(workflows.c.org_id == org_id)
    if older_than is not None:
        query = query.where(credit_events.c.created_at < func.clock_timestamp() - older_than)
    return [
        Reservation(
            org_id=row.org_id,
            workflow_id=row.workflow_id,
            project_id=row.project_id,
            activity_name=row.activity_name,
            credits=row.start_credits,
            reserved_at=row.created_at,
            expires_at=row.expires_at,
        )
        for row in connection.execute(query)
    ]


@dataclass(frozen=True, slots=True)
class Held:
    """What the open reservations of an organization hold."""

    reservations: int
    credits: int
    largest: int
    """The credits of the largest of them; 0 if there is none."""


def reservations_held(connection: Connection, org_id: str) -> Held:
    """What the open reservations of `org_id` hold."""
    of_each = workflows.c.start_credits
    held = select(func.count(), func.coalesce(func.sum(of_each), 0), func.coalesce(func.max(of_each), 0))
    row = connection.execute(held.where(workflows.c.org_id == org_id, workflows.c.state == "reserved")).one()
    return Held(row[0], int(row[1]), row[2])


def last_refused(connection: Connection, org_id: str) -> Refused | None:
    """The workflow of `org_id` that was rejected last. None: there is none, or an earlier version rejected it."""
    columns = workflows.c
    rejected = select(columns.workflow_id, columns.start_credits, columns.start_answer, columns.rejected_at).where(
        columns.org_id == org_id, columns.state == "rejected", columns.rejected_at.is_not(None)
    )
    row = connection.execute(rejected.order_by(columns.rejected_at.desc()).limit(1)).first()
    return None if row is None else Refused(*row)


def is_workflow(connection: Connection, org_id: str, workflow_id: str) -> bool:
    """Whether a message has named the workflow `workflow_id` of `org_id`."""
    known = select(workflows.c.workflow_id).where(workflows.c.org_id == org_id, workflows.c.workflow_id == workflow_id)
    return connection.scalar(known) is not None


def config_version(connection: Connection, org_id: str) -> int:
    """The version of the limits of `org_id`; 0: they are the defaults."""
    return connection.scalar(select(wallets.c.config_version).where(wallets.c.org_id == org_id)) or 0


def workflow(connection: Connection, org_id: str, workflow_id: str) -> WorkflowView | None:
    """The workflow `workflow_id` of `org_id`, or None if no message has named it."""
    known = select(workflows).where(workflows.c.org_id == org_id, workflows.c.workflow_id == workflow_id)
    row = connection.execute(known).first()
    if row is None:
        return None
    written = history.find(connection, org_id, EventFilter(workflow_id=workflow_id)).select()
    return WorkflowView(
        workflow_id=row.workflow_id,
        state=row.state,
        project_id=row.project_id,
        activity_name=row.activity_name,
        requested_credits=row.start_credits,
        reason=None if row.start_answer is None else OUTCOMES[row.start_answer][1],
        reserved_credits=row.start_credits if row.start_answer == "reserved" else None,
        expires_at=row.expires_at,
        used_credits=row.finish_credits,
        refunded_credits=row.refunded,
        archived_in_part=has_archived_events(connection, org_id, workflow_id),
        events=list(connection.execute(written).mappings())[::-1],
    )
