"""The naive way, which Holdfast is measured against: what a good engineer writes in an afternoon.

A Celery worker with processes on the stock transport, and SQLAlchemy's ORM. Each message is one transaction, which
locks the wallet, checks whether the message is a repetition, writes the workflow and its events, and changes the
wallet. It is correct for the measured messages, and keeps every message through a crash of a task. It has no
subscriptions, expiry or dead letters, and the stock transport may lose messages.
"""

import os
from datetime import datetime
from typing import Any, ClassVar

from celery import Celery
from celery.signals import worker_process_init
from sqlalchemy import BigInteger, DateTime, Identity, UniqueConstraint, create_engine, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from holdfast_client.broker import QUEUE

app = Celery("naive")  # the broker is CELERY_BROKER_URL of the environment
app.conf.update(
    task_default_queue=QUEUE,
    control_exchange="holdfast",  # so that the stand can ask both kinds of workers whether they are ready
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_concurrency=2,
    worker_prefetch_multiplier=16,  # from 4 to 64 it makes no difference here
)
sessions = sessionmaker(expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables of the naive way."""

    type_annotation_map: ClassVar = {int: BigInteger, datetime: DateTime(timezone=True), dict[str, Any]: JSONB}


class Wallet(Base):
    """An organization's balances."""

    __tablename__ = "wallets"
    org_id: Mapped[str] = mapped_column(primary_key=True)
    prepaid_balance: Mapped[int] = mapped_column(default=0)
    reserved: Mapped[int] = mapped_column(default=0)
    period_usage: Mapped[int] = mapped_column(default=0)


class Workflow(Base):
    """A workflow: its reservation, and how it ended."""

    __tablename__ = "workflows"
    org_id: Mapped[str] = mapped_column(primary_key=True)
    workflow_id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    start_credits: Mapped[int | None]
    finish_credits: Mapped[int | None]
    project_id: Mapped[str | None]
    activity_name: Mapped[str | None]


class CreditEvent(Base):
    """A line of the credit history."""

    __tablename__ = "credit_events"
    __table_args__ = (UniqueConstraint("org_id", "idempotency_key"),)
    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    org_id: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    event_type: Mapped[str]
    source: Mapped[str]
    workflow_id: Mapped[str | None]
    project_id: Mapped[str | None]
    activity_name: Mapped[str | None]
    credits: Mapped[int]
    prepaid_balance_after: Mapped[int]
    period_usage_after: Mapped[int]
    idempotency_key: Mapped[str]
    details: Mapped[dict[str, Any]] = mapped_column("metadata")


@worker_process_init.connect  # type: ignore[untyped-decorator]
def connect(**_: object) -> None:
    """Give every process a connection of its own."""
    sessions.configure(bind=create_engine(os.environ["DATABASE_URL"]))


@app.task(name="workflow.start", autoretry_for=(DBAPIError,), retry_backoff=True)  # type: ignore[untyped-decorator]
def start(message: dict[str, Any]) -> None:
    """Reserve credits for a workflow, or reject it."""
    with sessions.begin() as session:
        wallet = _locked_wallet(session, message["org_id"])
        workflow = _workflow(session, message)
        if workflow is not None:
            if workflow.start_credits is None:  # it has ended before it started
                workflow.start_credits = message["credits"]
            return
        is_covered = wallet.prepaid_balance - wallet.reserved >= message["credits"]
        workflow = Workflow(
            org_id=wallet.org_id,
            workflow_id=message["workflow_id"],
            state="reserved" if is_covered else "rejected",
            start_credits=message["credits"],
            project_id=message.get("project_id"),
            activity_name=message.get("activity_name"),
        )
        session.add(workflow)
        if is_covered:
            wallet.reserved += message["credits"]
            session.add(_event(wallet, workflow, "reservation", -message["credits"], "start", {}))


@app.task(name="workflow.finish", autoretry_for=(DBAPIError,), retry_backoff=True)  # type: ignore[untyped-decorator]
def finish(message: dict[str, Any]) -> None:
    """Release the workflow's reservation and charge its usage."""
    with sessions.begin() as session:
        wallet = _locked_wallet(session, message["org_id"])
        workflow = _workflow(session, message)
        if workflow is None:
            workflow = Workflow(org_id=wallet.org_id, workflow_id=message["workflow_id"], state="new")
            session.add(workflow)
        if workflow.state == "settled":
            return
        if workflow.state == "reserved":
            session.add(_release(wallet, workflow, "settled"))
        workflow.state = "settled"
        workflow.finish_credits = message["credits"]
        wallet.prepaid_balance -= message["credits"]
        wallet.period_usage += message["credits"]
        session.add(_event(wallet, workflow, "usage", -message["credits"], "finish", {}))


@app.task(name="workflow.cancel", autoretry_for=(DBAPIError,), retry_backoff=True)  # type: ignore[untyped-decorator]
def cancel(message: dict[str, Any]) -> None:
    """Release the workflow's reservation."""
    _end(message, "cancelled")


@app.task(name="workflow.fail", autoretry_for=(DBAPIError,), retry_backoff=True)  # type: ignore[untyped-decorator]
def fail(message: dict[str, Any]) -> None:
    """Release the workflow's reservation."""
    _end(message, "failed")


@app.task(name="noop")  # type: ignore[untyped-decorator]
def noop(_message: dict[str, Any]) -> None:
    """Do nothing, to measure the cost of Celery itself."""


def _end(message: dict[str, Any], state: str) -> None:
    with sessions.begin() as session:
        wallet = _locked_wallet(session, message["org_id"])
        workflow = _workflow(session, message)
        if workflow is None:
            session.add(Workflow(org_id=wallet.org_id, workflow_id=message["workflow_id"], state=state))
        elif workflow.state == "reserved":
            session.add(_release(wallet, workflow, state))
            workflow.state = state


def _locked_wallet(session: Session, org_id: str) -> Wallet:
    wallet = session.get(Wallet, org_id, with_for_update=True)
    if wallet is None:
        wallet = Wallet(org_id=org_id, prepaid_balance=0, reserved=0, period_usage=0)
        session.add(wallet)
        session.flush()  # if another process was faster, the task is tried again
    return wallet


def _workflow(session: Session, message: dict[str, Any]) -> Workflow | None:
    return session.get(Workflow, (message["org_id"], message["workflow_id"]))


def _release(wallet: Wallet, workflow: Workflow, reason: str) -> CreditEvent:
    assert workflow.start_credits is not None
    wallet.reserved -= workflow.start_credits
    return _event(wallet, workflow, "reservation_released", workflow.start_credits, "release", {"reason": reason})


def _event(
    wallet: Wallet, workflow: Workflow, event_type: str, credits: int, step: str, details: dict[str, Any]
) -> CreditEvent:
    return CreditEvent(
        org_id=wallet.org_id,
        event_type=event_type,
        source="workflow-engine",
        workflow_id=workflow.workflow_id,
        project_id=workflow.project_id,
        activity_name=workflow.activity_name,
        credits=credits,
        prepaid_balance_after=wallet.prepaid_balance,
        period_usage_after=wallet.period_usage,
        idempotency_key=f"{step}:{workflow.workflow_id}",
        details=details,
    )
