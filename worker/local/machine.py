"""What a server needs from this machine: a free port, the folder of a wheel, a folder that its account can enter."""

import random
import socket
import subprocess
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from worker.local.process import Account, ServiceError, run_as

_PORTS = range(10_000, 32_768)
"""Below the ports that systems give to outgoing connections: what is free now is likely to be free tomorrow."""


def free_port(*, besides: Collection[int] = ()) -> int:
    """A port of 127.0.0.1 that is free now, and none of `besides`. Raises ServiceError if there is none."""
    ports = [port for port in _PORTS if port not in besides]
    for port in random.sample(ports, len(ports)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise ServiceError("No port of 127.0.0.1 is free.")


def wheel(package: str) -> Path:
    """The folder of a wheel's files, found without running its code."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServiceError(f"The package {package} is missing: pip install 'holdfast[embedded]'.")
    return Path(spec.submodule_search_locations[0])


def closed_folder(folder: Path, account: Account | None) -> Path | None:
    """The first existing folder on the way to `folder` that the account cannot enter, found by trying."""
    if account is None:
        return None
    for step in (*reversed(folder.parents), folder):
        cd = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(step)]
        tried = subprocess.run(cd, check=False, stderr=subprocess.DEVNULL, **run_as(account))
        if tried.returncode != 0 and step.exists():
            return step
    return None
