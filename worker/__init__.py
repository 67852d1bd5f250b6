"""The Celery worker, its beat and the command line.

`celery -A worker worker` finds the app here. It is created on first use, so a program that imports `worker.client`, as
`holdfast_client.client` was called, needs neither the worker's settings nor its packages.
"""

import sys
from typing import Any

from ledger import extras


def __getattr__(name: str) -> Any:
    if name != "celery":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras.of("server"):
        from ledger.settings import Settings, SettingsError
        from worker.app import create_app

    try:
        app = create_app(Settings.load("database_url", "broker_url"))
    except SettingsError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    globals()[name] = app  # one app, however often it is asked for
    return app
