"""A child process that is started, watched and stopped, and that never outlives this one.

Guarantee: it ends with this process. `stop` ends it in order. If this process is killed instead, Linux ends it at once,
and on any system the next start in the same folder ends a survivor. Does not restart a child that died by itself.
"""

import ctypes
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

START_TIMEOUT_S = 60.0  # PostgreSQL's start after a crash replays the log first
KILL_TIMEOUT_S = 5.0
POLL_S = 0.01
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Account = pwd.struct_passwd


class ServiceError(Exception):
    """A service cannot run; the text says why, in one sentence for the person who started it."""


class Process:
    """A child process that is started, watched and stopped, with its descendants.

    `<folder>/<name>.log` collects its output. `<folder>/<name>.pid` names it, so that the next `start` first ends a
    survivor of a crash. The caller must make sure that nothing else uses the folder. The child leads a session of its
    own: Ctrl-C reaches only this process, which stops it. On Linux it gets `stop_signal` when the *thread* that called
    `start` ends, so call `start` from the main thread. `port` is the one of 127.0.0.1 on which it listens, if any:
    `start` raises ServiceError if another program has it.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        folder: Path,
        *,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        account: Account | None = None,
        port: int | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_timeout_s: float = 10.0,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.stdin = stdin
        self.log_file = folder / f"{name}.log"
        self.pid_file = folder / f"{name}.pid"
        self.port = port
        self.stop_signal = stop_signal
        self.stop_timeout_s = stop_timeout_s
        self._options = {"env": env, "cwd": cwd, **run_as(account)}
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        """The process id of the last start. Raises ServiceError before the first one."""
        if self._child is None:
            raise ServiceError(f"{self.name} was never started")
        return self._child.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it. Returns as soon as the program runs, which is before it is ready (see `wait_until`)."""
        if self.is_running:
            return
        self._end_survivor()
        if self.port is not None:
            _refuse_taken(self.port, self.name)
        with signals_postponed():
            self.log_file.touch(mode=0o600)
            with self.log_file.open("ab") as log:
                self._log_start = log.tell()
                self._child = self._spawn(log)
            with suppress(psutil.Error):  # it ended already, so it cannot survive us
                self.pid_file.write_text(f"{self.pid} {psutil.Process(self.pid).create_time()}")
            assert self._child.stdin is not None
            with suppress(BrokenPipeError), self._child.stdin:  # broken if it ended already
                self._child.stdin.write(self.stdin.encode())

    def wait_until(self, is_ready: Callable[[], bool], *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until `is_ready`. Raises ServiceError, with its last words, if it ends or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if not self.is_running or time.monotonic() > deadline:
                why = self.killed_by() or self.last_words()
                raise ServiceError(f"{self.name} did not start: {why} (see {self.log_file})")
            time.sleep(POLL_S)

    def killed_by(self) -> str | None:
        """The signal that ended it, in words, or None: it runs, or it has ended by itself."""
        code = None if self._child is None else self._child.returncode
        if code is None or code >= 0:
            return None
        with suppress(ValueError):
            name = signal.Signals(-code).name
            who = " (by somebody, or by the kernel when memory ran out)" if name == "SIGKILL" else ""
            return f"it was killed by {name}{who}"
        return f"it was killed by signal {-code}"

    def last_words(self) -> str:
        """The line of this start's log that most likely says why it ended."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return most_telling(log.read().decode(errors="replace"))

    def stop(self) -> None:
        """Ask it to stop, and kill it if it has not stopped within `stop_timeout_s`."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """SIGKILL it and all its descendants, as the kernel does when a container runs out of memory."""
        self._end(signal.SIGKILL)

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.argv,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_us(self.stop_signal),
                **self._options,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ServiceError(f"{self.name} could not be started: {error}") from error

    def _end(self, how: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            end_family(self._child.pid, how, self.stop_timeout_s)
            self._child.wait(KILL_TIMEOUT_S)
            self.pid_file.unlink(missing_ok=True)

    def _end_survivor(self) -> None:
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            pid, created_s = self.pid_file.read_text().split()
            # The same age, so the same process. Setting the clock shifts the kernel's report a little.
            if abs(psutil.Process(int(pid)).create_time() - float(created_s)) < 2:
                end_family(int(pid), self.stop_signal, self.stop_timeout_s)
        self.pid_file.unlink(missing_ok=True)


def most_telling(output: str) -> str:
    """The line of a program's output that most likely says why it ended."""
    lines = output.strip().splitlines() or ["it wrote nothing"]
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line or "error:" in line]
    return (fatal or lines)[-1].strip()


def _refuse_taken(port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ServiceError(
                f"The port {port} of 127.0.0.1, which the {name} of this data folder has, is in use by "
                f"{_user_of(port)}: end that, or start with --fresh, which chooses new ports and secrets and keeps the "
                "data."
            ) from None


def _user_of(port: int) -> str:
    with suppress(psutil.Error):  # some systems tell only root
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another program"


@contextmanager
def signals_postponed() -> Iterator[None]:
    """Postpone the handlers of Ctrl-C, SIGTERM and SIGHUP to the end of the block.

    A handler that raises inside Popen would leave an unknown child. One that raises inside a hook of `fork`, where
    Python drops the exception, would leave logging's lock taken forever.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler runs here
        yield
        return
    handlers: dict[signal.Signals, Any] = {}
    caught: list[int] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda received, _frame: caught.append(received))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in caught:
            signal.raise_signal(received)


def run_as(account: Account | None) -> dict[str, Any]:
    """The arguments of Popen that make a program run as `account`; None: as the user of this process."""
    return {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def die_with_us(death_signal: signal.Signals) -> Callable[[], None] | None:
    """A function that a child runs before its program, so that the kernel signals it when we die. Linux only.

    As Popen's `preexec_fn` it runs after the change of user, which would undo it. It takes no lock and imports nothing,
    so our threads cannot block it.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent:  # we died before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child


def end_family(pid: int, how: signal.Signals, grace_s: float) -> None:
    """End a process with `how`. After `grace_s`, SIGKILL it and its descendants if any are left."""
    family: list[psutil.Process] = []
    try:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            process.send_signal(how)
            process.resume()  # a stopped process would not act on it
        _wait_for_end(family[:1], grace_s)
    finally:  # also when a second Ctrl-C ends the wait
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        _wait_for_end(family, KILL_TIMEOUT_S)


def _wait_for_end(processes: list[psutil.Process], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _runs(process: psutil.Process) -> bool:
    """A zombie does not count: in a container, it may never be reaped."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
