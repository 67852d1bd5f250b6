"""The middleware around every answer: HEAD, common headers, and clients that hang up."""

from contextlib import suppress
from http import HTTPStatus

from anyio import CancelScope
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_stub import errors
from api_stub.problems import Problem
from api_stub.rendering import FOR_ALL

TWO_LENGTHS = "The request has a Content-Length and a Transfer-Encoding."
CLOSE = {"Connection": "close"}


def around_every_answer(app: ASGIApp) -> ASGIApp:
    """Answer HEAD as GET, add the headers `FOR_ALL`, and ignore a client that hangs up."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
            # A proxy in front of us may have used the other header, and read the rest of the body as a request.
            refused = await errors.answer(Request(scope), Problem(HTTPStatus.BAD_REQUEST, TWO_LENGTHS, CLOSE))
            await refused(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"

        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in FOR_ALL.items():
                    headers.setdefault(name, value)
            elif is_head:
                return
            await send(message)
            if is_head:
                await send({"type": "http.response.body"})
                rest.cancel()  # so that no history is read only to be thrown away

        with suppress(ClientDisconnect), CancelScope() as rest:
            await app({**scope, "method": "GET"} if is_head else scope, receive, pass_on)

    return answer
