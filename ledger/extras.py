"""What an installation without an extra, which is the client alone, says where a part of the server is started."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OURS = ("ledger", "worker", "api_stub")


@contextmanager
def of_the_server() -> Iterator[None]:
    """Imports that need the extra `server`. Where a package is missing, one line says so, and the exit code is 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in OURS:
            raise
        print(f"holdfast: The package {package} is missing: pip install 'holdfast[server]'.", file=sys.stderr)
        raise SystemExit(2) from None
