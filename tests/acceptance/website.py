"""The API and the pages as they are served: the app in a real server, on a free port of this machine."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from html import unescape
from typing import Any

import httpx
import jwt
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine, text

from api_stub.app import create_app
from api_stub.protocol import PromptProtocol
from ledger.roles import READER
from ledger.settings import Settings
from ledger.store import apply_batch
from tests.messages import delivery
from tests.support import PATIENCE_S, as_role, eventually

SECRET = "a secret for tests, of at least 32 characters"
FUTURE = 4_102_444_800
HISTORY = "/organizations/acme/credit-history"
LEDGER = {"view": "ledger"}
"""The query of the tab with every event."""
LETTERS = "/operators/dead-letters"
ONE_BY_ONE = f"{LETTERS}?view=letters"
SESSION = "holdfast_session"


def token(**claims: Any) -> str:
    return jwt.encode({"sub": "ann", "orgs": ["acme"], "scope": "credits:read", "exp": FUTURE} | claims, SECRET)


def operator_token() -> str:
    return token(sub="olga", orgs=[], scope="operator")


def app(database_url: str, broker_url: str, **settings: Any) -> FastAPI:
    """The app on this database, which is named for its owner: it connects as the reader."""
    database_url = as_role(READER, database_url)
    return create_app(Settings(database_url=database_url, broker_url=broker_url, jwt_secret=SECRET, **settings))


@contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[str]:
    """The address of the app, in a server with these options of uvicorn.

    It trusts no proxy, not even on this machine: in a container it would not.
    """
    config = uvicorn.Config(
        app,
        port=0,
        log_level="error",
        http=PromptProtocol,
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=int(PATIENCE_S),
        **options,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    eventually(lambda: server.started)
    [listener] = server.servers
    port = listener.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextmanager
def served(database_url: str, broker_url: str, **settings: str) -> Iterator[str]:
    """The address of an app with these settings."""
    with serving(app(database_url, broker_url, **settings)) as address:
        yield address


class Patient(httpx.Client):
    """A client that waits for every answer, however slow the machine is, and may be used by many threads."""

    def __init__(self, **options: Any) -> None:
        # One that closed idle connections could close them when another thread has just begun to use them.
        super().__init__(timeout=PATIENCE_S, limits=httpx.Limits(keepalive_expiry=None), **options)


class Visitor(Patient):
    """A browser without a screen: keeps cookies, sends forms, and does not follow redirections by itself."""

    def sign_in(self, token: str, *, next: str = "/") -> httpx.Response:
        form = self.get("/signin", params={"next": next})
        return self.post("/signin", data={"form": form_token(form), "next": next, "token": token})


def form_token(page: httpx.Response) -> str:
    """What the forms of a page carry."""
    found = re.search(r'name="form" value="([^"]+)"', page.text)
    assert found is not None, page.text
    return found[1]


def write(engine: Engine, org_id: str, *messages: tuple[str, dict[str, Any]]) -> None:
    apply_batch(engine, [delivery(task, org_id=org_id, **fields) for task, fields in messages])


def spread(engine: Engine, org_id: str, *, days: float) -> None:
    """Give the events of `org_id` times that are spread evenly over the last `days`."""
    about = {"org_id": org_id, "days": timedelta(days=days)}
    with engine.begin() as connection:  # which no other test may see: the trigger guards every organization
        connection.execute(text("ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only"))
        connection.execute(
            text("""
                UPDATE credit_events SET created_at = now() - :days * (1 - (seq - 1.0) / GREATEST(1, (
                    SELECT last_seq - 1 FROM wallets WHERE org_id = :org_id))) WHERE org_id = :org_id
            """),
            about,
        )
        connection.execute(text("ALTER TABLE credit_events ENABLE TRIGGER credit_events_append_only"))
        connection.execute(
            text("""
                UPDATE wallets SET last_event_at = (SELECT max(created_at) FROM credit_events WHERE org_id = :org_id)
                WHERE org_id = :org_id
            """),
            about,
        )


def history_of(org_id: str) -> str:
    return f"/organizations/{org_id}/credit-history"


def figures(page: httpx.Response) -> dict[str, str]:
    return dict(re.findall(r'data-figure="(\w+)">.*?<strong>([^<]*)</strong>', page.text, re.DOTALL))


def text_of(fragment: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", fragment)).split())


def rows(page: httpx.Response) -> list[list[str]]:
    """The cells of the events that the page shows."""
    found = re.findall(r'<tr role="row" data-event="\d+">(.*?)</tr>', page.text, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in found]


def shown(page: httpx.Response) -> list[int]:
    """The numbers of the events that the page shows."""
    return [int(number) for number in re.findall(r'data-event="(\d+)"', page.text)]


def link(page: httpx.Response, text: str) -> str | None:
    """Where the link with this text leads."""
    found = re.search(rf'<a href="([^"]*)"[^>]*>{text}</a>', page.text)
    return None if found is None else unescape(found[1])
