"""`holdfast` as a person runs it: arguments, environment and standard streams of its own, and its exit code.

Most of a command's time is to import packages that are not ours. Here they are imported once: each command is a fork
of a process that has done nothing else, and imports our code itself, by the installed script. What must be started
anew is: the demo, the services, what the README shows.
"""

import multiprocessing
import os
import pty
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests.acceptance.installation import HOLDFAST

TIMEOUT_S = 60

Ended = subprocess.CompletedProcess[str]

PACKAGES = """
    alembic.command celery.app.amqp fastapi jwt.algorithms kombu.transport.redis psutil psycopg pydantic_settings
    redis.asyncio rich.table sqlalchemy.dialects.postgresql.psycopg typer
"""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PACKAGES.split())


def run(*arguments: str, env: Mapping[str, str], typed: str | None = None) -> Ended:
    """Run it to its end; with `typed`, at a terminal where that is typed."""
    terminal, other_end = pty.openpty()
    with Path(os.devnull).open() as nothing, TemporaryFile() as output, TemporaryFile() as errors:
        try:
            if typed is not None:
                os.write(terminal, typed.encode())
            standard_input = nothing.fileno() if typed is None else other_end
            process = _start(arguments, env, standard_input, output.fileno(), errors.fileno())
            code = _exit_code(process)
        finally:
            os.close(terminal)
            os.close(other_end)
        texts = [os.pread(file.fileno(), 2**30, 0).decode() for file in (output, errors)]
    return subprocess.CompletedProcess(arguments, code, *texts)


def drawn(*arguments: str, env: Mapping[str, str], width: int) -> list[str]:
    """The lines that it prints on a terminal of this width, without the colours."""
    terminal, other_end = pty.openpty()
    with Path(os.devnull).open() as nothing, os.fdopen(terminal, "rb", buffering=0) as screen:
        env = {**env, "COLUMNS": str(width), "TERM": "xterm"}
        process = _start(arguments, env, nothing.fileno(), other_end, 2)
        os.close(other_end)
        output = b""
        try:
            while piece := screen.read(65_536):
                output += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        assert _exit_code(process) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).splitlines()


def _start(arguments: tuple[str, ...], env: Mapping[str, str], *streams: int) -> ForkServerProcess:
    process = _processes.Process(target=_holdfast, args=(arguments, dict(env), _Streams(streams)))
    process.start()
    return process


class _Streams:
    """Standard input, output and error of a process that is about to start."""

    def __init__(self, descriptors: tuple[int, ...]) -> None:
        self._descriptors = descriptors

    def __reduce__(self) -> Any:
        return _taken_over, tuple(DupFd(each) for each in self._descriptors)


def _taken_over(*streams: Any) -> None:
    for number, stream in enumerate(streams):
        descriptor = stream.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)


def _holdfast(arguments: tuple[str, ...], env: dict[str, str], _: None) -> None:
    sys.stdin = open(0)  # noqa: SIM115 # until the process ends
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [HOLDFAST, *arguments]
    runpy.run_path(HOLDFAST, run_name="__main__")


def _exit_code(process: ForkServerProcess) -> int:
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code
