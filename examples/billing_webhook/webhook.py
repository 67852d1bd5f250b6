"""A payment provider's webhook that adds credits: each payment once, however often the provider tells of it.

The id of the provider's event is the id of the purchase, so the ledger knows it again.
"""

import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request

from holdfast_client.async_client import AsyncClient
from holdfast_client.client import InvalidMessageError, NotSentError

SECRET = os.environ["WEBHOOK_SECRET"].encode()
TOLERANCE_S = 300
"""How old a signature may be: an old request that somebody has recorded is refused."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep one client for all requests."""
    async with AsyncClient(os.environ["HOLDFAST_BROKER_URL"]) as app.state.ledger:
        yield


app = FastAPI(lifespan=lifespan)


def signature(timestamp: str, body: bytes) -> str:
    """What the provider sends in `Webhook-Signature`."""
    return hmac.new(SECRET, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


@app.post("/webhook", status_code=202)
async def webhook(request: Request) -> dict[str, str]:
    """Hand over the purchase. The provider sends the event again after any status but 2xx."""
    body = await request.body()
    timestamp = request.headers.get("Webhook-Timestamp", "")
    is_recent = re.fullmatch("[0-9]{1,12}", timestamp) and abs(time.time() - int(timestamp)) <= TOLERANCE_S
    given = request.headers.get("Webhook-Signature", "").encode()
    if not is_recent or not hmac.compare_digest(signature(timestamp, body).encode(), given):
        raise HTTPException(401, "The signature is wrong or too old.")
    try:
        event = json.loads(body)
        if event["type"] != "payment.succeeded":
            return {"status": "ignored"}
        payment = event["data"]
        purchase = {"org_id": payment["org_id"], "purchase_id": event["id"], "credits": payment["credits"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise HTTPException(422, "This is not an event of a payment.") from None
    try:
        await request.app.state.ledger.purchase(**purchase)
    except InvalidMessageError as error:
        raise HTTPException(422, str(error)) from None
    except NotSentError:
        raise HTTPException(503, "The broker is not there: send the event again.") from None
    return {"status": "accepted"}
