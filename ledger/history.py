"""Reading the ledger: a wallet as it is, and its credit history. Reads only."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, select

from ledger.state import EventType
from ledger.tables import credit_events, subscriptions, wallets

MAX_PAGE = 100
"""The most events of one page."""

CUSTOMER_COLUMNS = (
    "created_at",
    "event_type",
    "source",
    "project_id",
    "activity_name",
    "credits",
    "prepaid_balance_after",
    "period_usage_after",
    "metadata",
)
"""What a customer sees of an event, in this order."""


@dataclass(frozen=True, slots=True)
class WalletView:
    """An organization's wallet, as it was written last: what is due but not yet posted is not in it."""

    org_id: str
    balance: int
    available: int
    prepaid_balance: int
    subscription_balance: int
    reserved_credits: int
    credit_limit: int
    period_cap: int | None
    used_this_period: int
    included_this_period: int
    plan: str | None
    current_period_start: datetime | None
    current_period_end: datetime | None


def as_item(event: RowMapping) -> dict[str, Any]:
    """An event as a customer sees it, as JSON values: its number as `id`, the workflow, and the nine columns."""
    columns = {name: event[name] for name in CUSTOMER_COLUMNS}
    columns["created_at"] = event["created_at"].isoformat()
    return {"id": event["seq"], "workflow_id": event["workflow_id"], **columns}


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events: every condition that is given holds. `created_from` is inclusive, `created_before` is not."""

    created_from: datetime | None = None
    created_before: datetime | None = None
    event_types: Collection[EventType] = ()
    project_id: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some events of a history, newest first, and how many match in all."""

    events: list[RowMapping]
    total: int


def wallet(connection: Connection, org_id: str) -> WalletView | None:
    """The wallet of `org_id`, or None if no message has ever named it."""
    current = and_(
        subscriptions.c.org_id == wallets.c.org_id,
        subscriptions.c.subscription_id == wallets.c.subscription_id,
    )
    period_start = (
        select(credit_events.c.metadata["period_start"].astext)
        .where(
            credit_events.c.org_id == wallets.c.org_id,
            credit_events.c.idempotency_key
            == func.concat("subscription:", subscriptions.c.subscription_id, ":", subscriptions.c.period),
        )
        .scalar_subquery()
    )
    query = select(wallets, subscriptions.c.plan, subscriptions.c.period_granted, period_start.label("period_start"))
    row = connection.execute(
        query.select_from(wallets.outerjoin(subscriptions, current)).where(wallets.c.org_id == org_id)
    ).first()
    if row is None:
        return None
    balance = row.prepaid_balance + row.subscription_balance
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
        included_this_period=row.period_granted or 0,
        plan=row.plan,
        current_period_start=None if row.period_start is None else datetime.fromisoformat(row.period_start),
        current_period_end=None if row.period_start is None else row.next_period_at,
    )


def events(
    connection: Connection,
    org_id: str,
    matching: EventFilter = EventFilter(),
    *,
    limit: int = MAX_PAGE,
    offset: int = 0,
) -> Page:
    """A page of the credit history of `org_id`: `limit` events (1-100) after the `offset` newest."""
    assert 1 <= limit <= MAX_PAGE
    assert offset >= 0
    conditions = _conditions(org_id, matching)
    page = select(credit_events).where(*conditions).order_by(credit_events.c.seq.desc()).limit(limit).offset(offset)
    total = select(func.count()).select_from(credit_events).where(*conditions)
    return Page(list(connection.execute(page).mappings()), connection.scalar(total) or 0)


def _conditions(org_id: str, matching: EventFilter) -> list[ColumnElement[Any]]:
    columns = credit_events.c
    conditions: list[ColumnElement[Any]] = [columns.org_id == org_id]
    if matching.created_from is not None:
        conditions.append(columns.created_at >= matching.created_from)
    if matching.created_before is not None:
        conditions.append(columns.created_at < matching.created_before)
    if matching.event_types:
        conditions.append(columns.event_type.in_(matching.event_types))
    if matching.project_id is not None:
        conditions.append(columns.project_id == matching.project_id)
    return conditions
