"""The data folder of `holdfast up`: it keeps its URLs and secrets, and says plainly why it cannot be used."""

import json
import os
import pwd
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.installation import open_folder
from worker.local import machine
from worker.local.data_folder import FORMAT, MARK, opened
from worker.local.embedded import Embedded, default_data_dir
from worker.local.process import ServiceError

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")

SECRETS = ("holdfast", "engine", "jwt")


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """The test's own."""
    with open_folder() as folder:
        yield folder


def kept(data_dir: Path, *, fresh: bool = False) -> dict[str, int | str]:
    """What a start finds in the folder, or makes."""
    with opened(data_dir, None, fresh=fresh) as folder:
        return {"broker": folder.port("broker")} | {name: folder.secret(name) for name in SECRETS}


def refusal(data_dir: Path, *, fresh: bool = False) -> str:
    """The sentence that a start on the folder ends with."""
    with pytest.raises(ServiceError) as refused:
        Embedded(data_dir, fresh=fresh).start()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def files(data_dir: Path) -> list[str]:
    return sorted(path.name for path in data_dir.iterdir())


# What it keeps


def test_what_the_first_start_makes_is_there_at_the_next(data_dir: Path) -> None:
    first = kept(data_dir)
    assert len(set(first.values())) == len(first)
    assert kept(data_dir) == first


def test_fresh_makes_all_of_it_anew(data_dir: Path) -> None:
    first, fresh = kept(data_dir), kept(data_dir, fresh=True)
    assert [name for name in first if first[name] == fresh[name]] == []
    assert kept(data_dir) == fresh


def test_only_its_owner_can_read_it_also_after_somebody_has_copied_it_carelessly(data_dir: Path) -> None:
    for _ in range(2):
        first = kept(data_dir)
        assert stat.S_IMODE((data_dir / MARK).stat().st_mode) == 0o600
        (data_dir / MARK).chmod(0o644)
    assert kept(data_dir) == first
    assert files(data_dir) == [MARK, "lock"]


def test_no_two_have_the_same_port(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine.free_port()
    two = [first, machine.free_port(besides=[first])]
    monkeypatch.setattr(machine, "_PORTS", two)
    with opened(data_dir, None) as folder:
        assert {folder.port("broker"), folder.port("api")} == set(two)
        with pytest.raises(ServiceError, match=r"^No port of 127\.0\.0\.1 is free\.$"):
            folder.port("metrics")


def test_ports_are_not_of_those_that_systems_give_to_outgoing_connections(data_dir: Path) -> None:
    with opened(data_dir, None) as folder:
        ports = {folder.port(str(number)) for number in range(20)}
    assert min(ports) >= 1024
    assert max(ports) < 32_768  # Linux; elsewhere they begin higher


def test_a_port_that_is_taken_is_named_with_its_user_and_fresh_takes_another(data_dir: Path) -> None:
    with Embedded(data_dir, durable=False) as services:
        before = services.database_url, services.broker_url
    with opened(data_dir, None) as folder, socket.create_server(("127.0.0.1", folder.port("broker"))) as taken:
        port = taken.getsockname()[1]
    with socket.create_server(("127.0.0.1", port)):
        assert refusal(data_dir).startswith(
            f"The port {port} of 127.0.0.1, which the broker of this data folder has, is in use by "
        )
        assert f"(process {os.getpid()}): end that, or start with --fresh, which" in refusal(data_dir)
        with Embedded(data_dir, durable=False, fresh=True) as services:
            assert services.database_url == before[0]
            assert services.broker_url != before[1]
            after = services.database_url, services.broker_url
    with Embedded(data_dir, durable=False) as services:
        assert (services.database_url, services.broker_url) == after


# Folders that it refuses


@pytest.mark.parametrize("name", ["notes.txt", ".git", "postgres"])
def test_a_folder_with_something_else_in_it_is_refused_and_left_as_it_is(data_dir: Path, name: str) -> None:
    (data_dir / name).mkdir()
    assert refusal(data_dir) == (
        f"The data folder {data_dir} is not empty, and was not made by Holdfast: it has '{name}'. "
        "Choose a new or an empty folder with --data-dir."
    )
    assert files(data_dir) == [name]


@pytest.mark.parametrize("names", [["lost+found"], ["lock"], ["lock", f"{MARK}.new"]], ids=str)
def test_the_root_of_a_file_system_and_what_a_first_start_on_a_full_disk_leaves_count_as_empty(
    data_dir: Path, names: list[str]
) -> None:
    for name in names:
        (data_dir / name).touch()
    assert kept(data_dir) == kept(data_dir)


def test_a_folder_of_an_older_version_which_left_no_mark_is_taken_over(data_dir: Path) -> None:
    for name in ("lock", "postgres.log", "api.log", "postgres-programs-0.5.3"):
        (data_dir / name).touch()
    (data_dir / "sockets").symlink_to("/tmp/holdfast-of-then")
    assert kept(data_dir) == kept(data_dir)


def test_an_older_version_has_not_made_what_it_never_made(data_dir: Path) -> None:
    for name in ("lock", "postgres.log", "notes.txt"):
        (data_dir / name).touch()
    assert "it has 'notes.txt'" in refusal(data_dir)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_a_newer_version_is_refused(data_dir: Path, fresh: bool) -> None:
    (data_dir / MARK).write_text(json.dumps({"format": FORMAT + 1, "more": {}}))
    assert refusal(data_dir, fresh=fresh) == (
        f"The data folder {data_dir} belongs to a newer version of Holdfast (its format is {FORMAT + 1}, and this "
        f"version knows {FORMAT}): use that version, or choose another folder with --data-dir."
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"format": "1"}',
        '{"format": 0}',
        '{"ports": {"api": 65536}}',
        '{"ports": {"api": true}}',
        '{"secrets": {"jwt": "short"}}',
        '{"secrets": {"engine": "a space is no part of a URL, nor a line break"}}',
        '{"unknown": 1}',
        "\x00",
        "\xff",
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_mark_is_refused_and_fresh_writes_another(data_dir: Path, text: str) -> None:
    (data_dir / MARK).write_text(text, encoding="latin-1")
    assert refusal(data_dir) == (
        f"{data_dir}/{MARK} is damaged: start once with --fresh, which makes new ports and secrets and keeps the data."
    )
    assert kept(data_dir, fresh=True) == kept(data_dir)


def test_what_is_no_folder_is_refused(data_dir: Path) -> None:
    (data_dir / "file").touch()
    for name, problem in (
        ("file", "Not a directory"),
        ("file/new", "Not a directory"),
        ("x" * 300, "File name too long"),
    ):
        assert refusal(data_dir / name) == f"The data folder {data_dir / name} cannot be used: {problem}."


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(data_dir: Path) -> None:
    data_dir.chmod(0o500)
    for folder in (data_dir, data_dir / "new"):
        assert refusal(folder) == f"The data folder {folder} cannot be used: Permission denied."
    data_dir.chmod(0o700)


@as_root
def test_a_folder_of_another_user_is_refused(data_dir: Path) -> None:
    kept(data_dir)
    nobody = pwd.getpwnam("nobody")
    os.chown(data_dir / MARK, nobody.pw_uid, nobody.pw_gid)
    assert refusal(data_dir) == (
        f"The data folder {data_dir} cannot be used: it belongs to the user nobody, and this is the user root."
    )


@as_root
def test_another_user_is_told_whose_folder_it_is(data_dir: Path) -> None:
    data_dir.chmod(0o700)
    child = os.fork()
    if child == 0:  # only here: a process that gives up root cannot take it back
        os.setuid(pwd.getpwnam("nobody").pw_uid)
        expected = (
            f"The data folder {data_dir} cannot be used: Permission denied: it belongs to the user root, and this is "
            "the user nobody."
        )
        try:
            Embedded(data_dir).start()
        except ServiceError as error:
            os._exit(0 if str(error) == expected else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips where none can be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or not IS_ROOT or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("inside", ["", "new"])
def test_a_disk_that_cannot_be_written_is_refused(data_dir: Path, inside: str) -> None:
    with disk(data_dir, "ro"):
        assert (
            refusal(data_dir / inside) == f"The data folder {data_dir / inside} cannot be used: Read-only file system."
        )


@pytest.mark.parametrize("size", ["4k", "64k", "8m"])
def test_a_disk_that_is_too_small_is_refused(data_dir: Path, size: str) -> None:
    with disk(data_dir, f"size={size},mode=711"):
        assert "No space left on device" in refusal(data_dir)


def test_a_disk_that_is_full_is_refused_and_used_again_when_there_is_room(data_dir: Path) -> None:
    with disk(data_dir, "size=256m,mode=711"):
        with Embedded(data_dir, durable=False) as services:
            before = services.broker_url
        with (data_dir / "lost+found").open("wb", buffering=0) as file:
            while file.write(bytes(65_536)) == 65_536:
                pass
        assert "No space left on device" in refusal(data_dir)
        (data_dir / "lost+found").unlink()
        with Embedded(data_dir, durable=False) as services:
            assert services.broker_url == before


# Where it is


@pytest.mark.skipif(IS_ROOT, reason="root may get another folder")
def test_the_data_folder_is_in_the_checkout(data_dir: Path) -> None:
    assert default_data_dir(data_dir) == data_dir.resolve() / ".holdfast"


@as_root
def test_root_gets_a_data_folder_that_the_account_can_enter(data_dir: Path) -> None:
    assert default_data_dir(data_dir) == data_dir.resolve() / ".holdfast"
    data_dir.chmod(0o700)
    assert default_data_dir(data_dir).parent == Path("/var/lib/holdfast")


@as_root
def test_root_is_told_which_folder_the_account_cannot_enter(data_dir: Path) -> None:
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ServiceError, match=f"cannot enter {closed}: choose a data folder outside it"):
        Embedded(closed / "data").start()
