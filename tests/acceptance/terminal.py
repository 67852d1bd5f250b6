"""A terminal beside `make up`, into which the lines that it prints were pasted."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ledger.settings import PREFIX
from tests.installation import open_folder
from tests.support import PATIENCE_S, eventually

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def outside() -> dict[str, str]:
    """The environment of a terminal in which nothing was activated or exported."""
    path = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder).resolve() != BIN.resolve()]
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | {
        "PATH": os.pathsep.join(path)
    }


@contextmanager
def beside(*starting: str) -> Iterator[dict[str, str]]:
    """The environment of a terminal beside this command, which starts on an empty folder. `SAID` is what it printed."""
    with open_folder() as folder, (folder / "output").open("w") as output:
        up = subprocess.Popen(
            starting,
            cwd=ROOT,
            env={**outside(), f"{PREFIX}DATA_DIR": str(folder / "data")},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            eventually(lambda: "Data and logs" in (folder / "output").read_text() or up.poll() is not None)
            said = (folder / "output").read_text()
            pasted = [line for line in said.splitlines() if line.strip().startswith("export ")]
            script = "\n".join([*pasted, "env -0"])
            shown = subprocess.run(["bash", "-euc", script], env=outside(), capture_output=True, text=True, check=True)
            yield dict(line.split("=", 1) for line in shown.stdout.split("\0") if line) | {"SAID": said}
        finally:
            os.killpg(up.pid, signal.SIGINT)  # Ctrl-C
            up.wait(PATIENCE_S)
        assert (folder / "output").read_text().count("Everything is stopped.") == 1
