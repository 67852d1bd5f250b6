"""The HTTP API: credit history and wallets for customers, and every message for programs in any language.

`uvicorn api_stub.app:app --http api_stub.protocol:PromptProtocol` serves it. Each request reads one snapshot of the
ledger. Messages go through the broker, as from `holdfast_client`. This module only assembles the parts.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from ledger import extras

with extras.of("server"):
    from fastapi import FastAPI

    from api_stub import (
        access_log,
        batches,
        console,
        errors,
        messages,
        operators,
        pages,
        probes,
        quotes,
        tracing,
        usage,
        wallets,
        workflows,
    )
    from api_stub.middleware import around_every_answer
    from api_stub.openapi import DescribedAPI
    from api_stub.protocol import STOPPING
    from api_stub.services import Services
    from api_stub.turns import Turns
    from holdfast_client.client import BrokerUnavailableError, Client, UnsupportedBrokerError
    from ledger import logs
    from ledger.settings import Settings, SettingsError


def create_app(settings: Settings) -> FastAPI:
    """Create the API for these settings. Raises SettingsError."""
    tracing.start()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, asyncio.Event]]:
        app.state.services.start()
        yield {STOPPING: asyncio.Event()}
        await app.state.services.close()

    app = DescribedAPI(
        title="Holdfast",
        summary="The credit ledger.",
        version=version("holdfast"),
        lifespan=lifespan,
        # These pages would load scripts from other sites; /openapi.json has the same content.
        docs_url=None,
        redoc_url=None,
        # A redirection would name the scheme and host that this process sees, not those of a proxy in front of it.
        redirect_slashes=False,
        responses=errors.RESPONSES,
        telemetry=tracing.TELEMETRY,
    )
    app.state.services = Services(settings)
    app.add_middleware(Turns, authenticator=app.state.services.authenticator)
    app.add_middleware(around_every_answer)
    app.add_middleware(tracing.carry_on)
    errors.install(app)
    access_log.install()
    for part in (wallets, usage, workflows, messages, batches, quotes, probes, pages, console, operators):
        part.add(app)
    return app


def __getattr__(name: str) -> FastAPI:
    """`app`, created when a server asks for it. Wrong settings, or a wrong broker, are one line and exit code 2."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not logs.are_for_a_person():
        logs.reformat("uvicorn", "uvicorn.access")
    try:
        app = create_app(Settings.load("database_url", "broker_url"))
        _refuse_unsupported(app.state.services.client)
    except (SettingsError, UnsupportedBrokerError) as error:
        print(f"holdfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return app


def _refuse_unsupported(broker: Client) -> None:
    """Raise UnsupportedBrokerError if the broker is there and can never be used."""
    try:
        broker.waiting()
    except UnsupportedBrokerError:
        raise
    except BrokerUnavailableError:
        pass  # it is checked again before anything is sent to it
