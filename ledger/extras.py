"""The error of an installation without an extra, such as `server` if only the client is installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("holdfast_client", "ledger", "worker", "api_stub")


@contextmanager
def of(extra: str) -> Iterator[None]:
    """For imports that need `extra`. If a package is missing, print one line, and exit with code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in OURS:
            raise
        cure = f"install the extra `{extra}`, in a checkout with: pip install ./client '.[{extra}]'"
        print(f"holdfast: The package {package} is missing: {cure}", file=sys.stderr)
        raise SystemExit(2) from None
