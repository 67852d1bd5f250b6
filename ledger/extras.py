"""The error of an installation without the extra `server`, such as that of the client alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("holdfast_client", "ledger", "worker", "api_stub")


@contextmanager
def of_the_server() -> Iterator[None]:
    """For imports that need the extra `server`. If a package is missing, print one line, and exit with code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in OURS:
            raise
        cure = "install the extra `server`, in a checkout with: pip install ./client '.[server]'"
        print(f"holdfast: The package {package} is missing: {cure}", file=sys.stderr)
        raise SystemExit(2) from None
