"""`holdfast` as a person runs it: arguments, environment and standard streams of its own, and its exit code."""

import os
import pty
import re
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryFile

from tests import forks
from tests.installation import HOLDFAST

TIMEOUT_S = 60

Ended = subprocess.CompletedProcess[str]


def run(*arguments: str, env: Mapping[str, str], typed: str | None = None, cwd: Path | None = None) -> Ended:
    """Run it to its end; with `typed`, at a terminal where that is typed."""
    return run_program([HOLDFAST, *arguments], env=env, typed=typed, cwd=cwd)


def run_program(
    argv: Sequence[str], *, env: Mapping[str, str], typed: str | None = None, cwd: Path | None = None
) -> Ended:
    """The same for another program in Python; see `forks`."""
    terminal, other_end = pty.openpty()
    with Path(os.devnull).open() as nothing, TemporaryFile() as output, TemporaryFile() as errors:
        try:
            if typed is not None:
                os.write(terminal, typed.encode())
            standard_input = nothing.fileno() if typed is None else other_end
            process = forks.start(argv, standard_input, output.fileno(), errors.fileno(), env=env, cwd=cwd)
            code = _exit_code(process)
        finally:
            os.close(terminal)
            os.close(other_end)
        texts = [os.pread(file.fileno(), 2**30, 0).decode() for file in (output, errors)]
    return subprocess.CompletedProcess(argv, code, *texts)


def drawn(*arguments: str, env: Mapping[str, str], width: int) -> list[str]:
    """The lines that it prints on a terminal of this width, without the colours."""
    terminal, other_end = pty.openpty()
    with Path(os.devnull).open() as nothing, os.fdopen(terminal, "rb", buffering=0) as screen:
        env = {**env, "COLUMNS": str(width), "TERM": "xterm"}
        process = forks.start([HOLDFAST, *arguments], nothing.fileno(), other_end, other_end, env=env)
        os.close(other_end)
        output = b""
        try:
            while piece := screen.read(65_536):
                output += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        assert _exit_code(process) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).splitlines()


def _exit_code(process: ForkServerProcess) -> int:
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code
