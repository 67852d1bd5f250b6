"""Reads a message's headers and body, as kombu delivers them and Celery defines them."""

from typing import TypeGuard

from celery.utils.time import maybe_iso8601
from kombu.message import Message

from holdfast_client.broker import ENGINE_QUEUES, REPLAY_OF
from holdfast_client.tracing import TRACEPARENT
from ledger import traces
from ledger.bodies import Arguments, strict_arguments
from worker.answers import ONLY_FAILURES
from worker.broker import taken_from
from worker.transport import read_json


def raw_body(message: Message) -> bytes:
    """The body as it arrived. If kombu has a value other than bytes in its place: that value as text."""
    body = message.body
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    try:
        return str(body).encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair
        return str(body).encode(errors="surrogatepass")


def answer_to(message: Message) -> str | None:
    """Where `Answers` stores the answer, or None: nobody waits for it."""
    headers = message.headers
    task_id = headers.get("id") if isinstance(headers, dict) else None
    if not is_text(task_id):
        return None
    match headers.get("ignore_result"):
        case False:
            return task_id
        case None:  # Celery's default: a sender that may wait, and does not know that it has to ask
            return f"{ONLY_FAILURES}{task_id}"
        case _:
            return None


def replay_of(message: Message) -> int | None:
    """The dead letter that the message says it replays, or None. A message of an engine can replay none."""
    number = message.headers.get(REPLAY_OF) if isinstance(message.headers, dict) else None
    is_number = isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**63
    return number if is_number and taken_from(message) not in ENGINE_QUEUES else None


def traceparent_of(message: Message) -> str | None:
    """The trace that the message says it belongs to, or None."""
    return traces.valid(message.headers.get(TRACEPARENT)) if isinstance(message.headers, dict) else None


def is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is a string that can be sent and stored: one without half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def named_task(message: Message) -> str:
    """The task that the message names; empty if it names none."""
    task = message.headers.get("task") if isinstance(message.headers, dict) else None
    return task if isinstance(task, str) else ""


def task_and_arguments(message: Message, raw: bytes) -> tuple[str, Arguments]:
    """The task that a message with the body `raw` names, and its arguments. Raises ValueError: the text says why."""
    headers = message.headers
    if not isinstance(headers, dict):
        raise ValueError("the message's headers must be an object")
    if message.content_type != "application/json":
        raise ValueError(f"the body must be application/json, not {str(message.content_type)[:100]!a}")
    try:
        body = read_json(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body cannot be decoded: {error}") from None
    if "task" not in headers:
        return _first_protocol(message, body)
    if not isinstance(headers["task"], str):
        raise ValueError("the message's header task must be a string")
    if not is_text(headers.get("id")):
        raise ValueError("the message's header id must be a string")
    for name in ("eta", "expires"):
        if headers.get(name) is None:
            continue
        try:
            maybe_iso8601(headers[name])
        except (AttributeError, ValueError, TypeError, OverflowError):
            raise ValueError(f"the message's header {name} is not a time") from None
    found = strict_arguments(body)
    if found is None:
        raise ValueError("the body must be [args, kwargs, embed], as Celery sends it")
    return headers["task"], found


def _first_protocol(message: Message, body: object) -> tuple[str, Arguments]:
    match body:
        case {"task": str(task), "id": str(task_id), "args": list(args), **rest} if isinstance(
            kwargs := rest.get("kwargs", {}), dict
        ) and is_text(task_id):
            message.headers["id"] = task_id
            return task, (args, kwargs)
        case _:
            raise ValueError("the message names no task")
