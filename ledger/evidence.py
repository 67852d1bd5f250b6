"""What the ledger says about the message of a dead letter: what came first, and what it did when it was replayed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from sqlalchemy import Connection, func, select

from holdfast_client.messages import (
    ERASED,
    AnyMessage,
    Cancel,
    Fail,
    Finish,
    InvalidMessage,
    Start,
    Subscribe,
    WalletMessage,
    parse,
)
from ledger import bodies
from ledger.dead_letters import KeptLetter
from ledger.tables import credit_events, posted_messages, subscriptions, workflows


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of a message that says something else than what was applied before."""

    name: str
    ledger: Any
    message: Any
    """Both as JSON values."""


def message_of(letter: KeptLetter) -> AnyMessage | None:
    """The message that a dead letter holds, if it is a valid one."""
    found = bodies.arguments(letter.body)
    if found is None:
        return None
    message = parse(letter.task, bodies.only_argument(letter.task, *found))
    return None if isinstance(message, InvalidMessage) else message


def differences(connection: Connection, message: AnyMessage) -> list[Difference]:
    """Where `message` contradicts what was applied under the same id. None: it does not."""
    applied, said = _applied(connection, message), _said(message)
    differ = [name for name in applied if applied[name] not in (said.get(name), ERASED)]
    return [Difference(name, applied[name], said[name]) for name in differ]


def change(connection: Connection, message: AnyMessage) -> int | None:
    """The credits that `message` has moved, or held or released; None if it has written no event."""
    columns = credit_events.c
    moved = select(func.sum(columns.credits)).where(
        columns.org_id == message.org_id, columns.idempotency_key.in_(_keys(message))
    )
    found = connection.scalar(moved)
    return None if found is None else int(found)


def _said(message: AnyMessage) -> dict[str, Any]:
    if isinstance(message, WalletMessage):
        return message.terms()
    return {"credits": message.credits} if isinstance(message, Start | Finish) else {}


def _applied(connection: Connection, message: AnyMessage) -> dict[str, Any]:
    """What the ledger has under the message's id, by the names of the message's fields."""
    match message:
        case Start() | Finish():
            columns = workflows.c
            column = columns.start_credits if isinstance(message, Start) else columns.finish_credits
            amount = connection.scalar(
                select(column).where(columns.org_id == message.org_id, columns.workflow_id == message.workflow_id)
            )
            return {} if amount is None else {"credits": amount}
        case Cancel() | Fail():
            return {}
    posted = posted_messages.c
    is_same = posted.org_id == message.org_id, posted.kind == message.kind, posted.message_id == message.message_id
    terms = connection.scalar(select(posted.terms).where(*is_same))
    if terms is not None:
        return {name: terms.get(name) for name in message.terms()}
    return _anchor(connection, message) if isinstance(message, Subscribe) else {}


def _anchor(connection: Connection, message: Subscribe) -> dict[str, Any]:
    """The anchor of the message's subscription, which a message may leave out, and none may change."""
    columns = subscriptions.c
    anchor = connection.scalar(
        select(columns.anchor).where(
            columns.org_id == message.org_id, columns.subscription_id == message.subscription_id
        )
    )
    if anchor is None or message.anchor in (None, anchor):
        return {}
    return {"anchor": anchor.astimezone(UTC).isoformat().replace("+00:00", "Z")}


def _keys(message: AnyMessage) -> Sequence[str]:
    """The idempotency keys of the events that a message writes."""
    match message:
        case Start():
            return (f"start:{message.workflow_id}",)
        case Finish():
            return (f"finish:{message.workflow_id}",)
        case Cancel() | Fail():
            return (f"release:{message.workflow_id}",)
    return (f"{message.kind}:{message.message_id}",)
