"""Programs in Python that start at once: forks of a process that has imported the packages of others, and the ledger.

Most of the time that a command, a worker or a beat takes to start is for imports. Each fork is a process like any
other, with arguments, environment, folder and standard streams of its own. It imports itself whatever of ours reads a
setting, registers something or looks at its terminal: the rest of `worker`, and `api_stub`. What must be started anew
is: the demo, the services, what the README shows.
"""

import atexit
import ctypes
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

PACKAGES = """
    alembic.command alembic.config celery.app.amqp celery.app.control celery.app.log celery.apps.beat celery.apps.worker
    celery.backends.redis celery.bin.celery celery.concurrency.solo celery.events.receiver celery.fixups.django
    celery.worker.components celery.worker.consumer celery.worker.strategy fastapi.staticfiles jinja2 jwt.algorithms
    kombu.transport.pyamqp kombu.transport.redis prometheus_client psutil psycopg pydantic_settings
    pythonjsonlogger.json redis.asyncio rich.console rich.table sqlalchemy.dialects.postgresql.psycopg typer uvicorn
"""

OURS = """
    ledger.audit ledger.dead_letters ledger.history ledger.logs ledger.migrations ledger.scheduler ledger.settings
    ledger.store ledger.totals ledger.views ledger.waiting holdfast_client.client
"""

PR_SET_PDEATHSIG = 1  # linux/prctl.h

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(PACKAGES.split() + OURS.split())


def start(
    argv: Sequence[str],
    *streams: int,
    env: Mapping[str, str],
    cwd: Path | None = None,
    death_signal: signal.Signals | None = None,
) -> ForkServerProcess:
    """Start a script, `python -c` or `python -m` with these standard streams.

    With a `death_signal` it leads a session of its own; on Linux it gets that signal when we end, too.
    """
    arguments = list(argv), dict(env), cwd, death_signal, _Streams(streams)
    process = _processes.Process(target=_main, args=arguments, daemon=True)
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


def _main(argv: list[str], env: dict[str, str], cwd: Path | None, death_signal: int | None, _: None) -> None:
    alive_fd: int = vars(forkserver._forkserver)["_forkserver_alive_fd"]
    os.close(alive_fd)  # else the process that was forked would not end before us
    gc.freeze()  # nobody looks again and again at the packages, which are copied for who touches them
    if death_signal is not None:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal))
    if cwd is not None:
        os.chdir(cwd)
    sys.stdin = open(0)  # noqa: SIM115 # until the process ends
    os.environ.clear()
    os.environ.update(env)
    try:
        _run(argv)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _run(argv: list[str]) -> None:
    match argv:
        case [sys.executable, "-c", program, *arguments]:
            sys.argv = ["-c", *arguments]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(program, vars(main))
        case [sys.executable, "-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *_]:
            sys.argv = argv
            runpy.run_path(script, run_name="__main__")
