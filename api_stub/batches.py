"""Many messages in one request: JSON Lines, all of which are handed over, or none.

Each line is checked as a request of its own would be, the token's rights included. Nobody waits for the answers.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from api_stub import answers, errors
from api_stub.auth import Principal
from api_stub.messages import whole_body
from api_stub.problems import RETRY, Problem
from api_stub.rights import Anybody, require, scope_of
from api_stub.services import Using
from api_stub.sources import refused_source
from api_stub.turns import BATCHES
from holdfast_client.client import Client, NotSentError
from holdfast_client.messages import MESSAGES, InvalidMessage, named, parse
from ledger.examples import EXAMPLES
from ledger.message_lines import MessageLine, numbered_lines, read_line

MOST_MESSAGES = 1_000
"""The most messages of one batch."""

MOST_BYTES = 4 * 2**20
"""The largest body. The time in which a request must arrive bounds it, too: see `api_stub.protocol`."""

SOME_SENT = "The broker may have some of the messages, but not all; send all of them again: that is safe."
_MEANING = f"""Hand over up to {MOST_MESSAGES:,} messages, as JSON Lines: all of them, or none.

Each line is a message with all its fields, and its `task`. Blank lines are skipped. The token must have the right to
each message. 202 means that the broker has all of them, in this order."""
_SCOPES = sorted({scope_of(task) for task in MESSAGES})


class _Read(NamedTuple):
    messages: list[MessageLine]
    problems: dict[int, str]
    """What is wrong with each line, by its number."""


def add(app: FastAPI) -> None:
    """Add the address for batches."""

    @app.post(
        BATCHES,
        name="send_messages",
        tags=["workflows", "wallet"],
        summary="Many messages",
        description=_MEANING,
        status_code=HTTPStatus.ACCEPTED,
        response_model=answers.BatchAccepted,
        responses={
            HTTPStatus.ACCEPTED.value: {"description": "The broker has all messages."},
            **errors.READ_RESPONSES,
            **errors.of_messages(
                {
                    HTTPStatus.FORBIDDEN: f"The token has neither the scope {' nor '.join(_SCOPES)}.",
                    HTTPStatus.UNPROCESSABLE_ENTITY: "Some lines are not valid: `lines` says which. Nothing was sent.",
                    HTTPStatus.SERVICE_UNAVAILABLE: "The broker may have some of the messages; send all of them again.",
                }
            ),
        },
        openapi_extra={"requestBody": {"content": {"application/jsonl": _description()}, "required": True}},
    )
    async def send(principal: Anybody, request: Request, using: Using) -> Response:
        if principal.scopes.isdisjoint(_SCOPES):
            raise Problem(HTTPStatus.FORBIDDEN, f"The token has neither the scope {' nor '.join(_SCOPES)}.")
        body = await whole_body(request, MOST_BYTES)
        found = await run_in_threadpool(_read, body, principal)
        if found.problems:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                f"Nothing was sent: {named(f'line {number}: {problem}' for number, problem in found.problems.items())}",
                lines=[{"line": number, "detail": problem} for number, problem in found.problems.items()],
            )
        try:
            await run_in_threadpool(_hand_over, using.client, found.messages)
        except NotSentError:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, SOME_SENT, RETRY) from None
        return JSONResponse({"status": "accepted", "messages": len(found.messages)}, HTTPStatus.ACCEPTED)


def _read(body: bytes, principal: Principal) -> _Read:
    """Read all lines. Raises Problem if there are none, or too many."""
    found = _Read([], {})
    lines = 0
    for number, line in numbered_lines([body]):
        lines += 1
        if lines > MOST_MESSAGES:
            detail = f"The body has more than {MOST_MESSAGES:,} messages; send them in several requests."
            raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail)
        message = read_line(line)
        problem = message.error if isinstance(message, InvalidMessage) else _refused(message, principal)
        if problem is not None:
            found.problems[number] = problem
        elif isinstance(message, MessageLine):
            found.messages.append(message)
    if not lines:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "The body has no messages; send one on each line.")
    return found


def _refused(line: MessageLine, principal: Principal) -> str | None:
    """Why the principal must not send the message, or None."""
    message = parse(line.task, line.message)
    assert not isinstance(message, InvalidMessage)
    try:
        require(principal, message.org_id, scope_of(line.task))
    except Problem as problem:
        return problem.detail
    return refused_source(message)


def _hand_over(client: Client, lines: list[MessageLine]) -> None:
    with client.batch() as batch:
        for line in lines:
            batch.send(line.task, line.message)


def _description() -> Mapping[str, Any]:
    schema = {
        "type": "string",
        "maxLength": MOST_BYTES,
        "description": f"One JSON object a line, at most {MOST_MESSAGES:,}: the `task`, such as `workflow.finish`, and "
        "the fields of its message, `org_id` and `workflow_id` included.",
    }
    example = "".join(f"{json.dumps({'task': task, **message})}\n" for task, message in EXAMPLES.items())
    return {"schema": schema, "example": example}
