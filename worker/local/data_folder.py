"""The data folder of `holdfast up`: who may use it, and what it keeps from one start to the next.

Its file `holdfast.json` marks it as ours. The file has the ports, passwords and secrets, so that URLs and tokens of an
earlier start still work. Nothing is written into a folder that has other files and no mark. One process at a time has
the folder open.
"""

import errno
import fcntl
import os
import pwd
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from worker.local.machine import closed_folder, free_port
from worker.local.process import Account, ServiceError

FORMAT = 1
"""Grows when older versions must not use the folder any more."""

MARK = "holdfast.json"
_LOCK = "lock"
_NEW_MARK = f"{MARK}.new"
_IN_AN_EMPTY_FOLDER = {_LOCK, _NEW_MARK, "lost+found"}
"""The first two are there before the mark; `lost+found` is in the root of a file system."""
_OF_OLDER_VERSIONS = re.compile(
    r"lock|sockets|postgres|postgres\.new|postgres-programs.*|broker|(postgres|broker|worker|beat|api)\.(log|pid)"
)
"""What versions that left no mark have made."""

_OF_THE_FOLDER = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the system that are about the folder, not about our programs."""

_Secret = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{32,128}$")]


class _Mark(BaseModel):
    """What the mark of every version contains."""

    model_config = ConfigDict(strict=True)

    format: Annotated[int, Field(gt=0)]


class _Kept(_Mark):
    """What the mark of this version contains."""

    model_config = ConfigDict(extra="forbid")

    format: Annotated[int, Field(gt=0)] = FORMAT
    ports: dict[str, Annotated[int, Field(gt=0, lt=2**16)]] = {}
    secrets: dict[str, _Secret] = {}


class DataFolder:
    """A data folder that this process has opened (see `opened`)."""

    def __init__(self, path: Path, kept: _Kept) -> None:
        self.path = path
        self._kept = kept
        self._write()

    def port(self, name: str) -> int:
        """The port of 127.0.0.1 that `name` has in this folder; the first time, one that is free now."""
        if name not in self._kept.ports:
            self._kept.ports[name] = free_port(besides=self._kept.ports.values())
            self._write()
        return self._kept.ports[name]

    def secret(self, name: str) -> str:
        """The secret that `name` has in this folder, 43 characters that fit into a URL; the first time, a new one."""
        if name not in self._kept.secrets:
            self._kept.secrets[name] = secrets.token_urlsafe(32)
            self._write()
        return self._kept.secrets[name]

    def _write(self) -> None:
        """Write the mark, under another name first, so that there is never half of it."""
        new = self.path / _NEW_MARK
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(self._kept.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / MARK)


@contextmanager
def opened(path: Path, account: Account | None, *, fresh: bool = False) -> Iterator[DataFolder]:
    """Create the folder if necessary, check that it can be used, and lock it against a second start.

    `account` is PostgreSQL's, which has to pass through. `fresh`: forget the ports and secrets. Raises ServiceError, or
    OSError (see `saying_what_is_wrong_with`).
    """
    try:
        if not path.exists():
            path.mkdir(parents=True)
            path.chmod(0o711 if account else 0o700)  # the account passes through it
        _refuse_what_is_not_ours(path)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        if account and (closed := closed_folder(path, account)):
            raise ServiceError(
                f"PostgreSQL refuses to run as root, and the account that it uses instead, {account.pw_name}, "
                f"cannot enter {closed}: choose a data folder outside it, or run as another user."
            )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(
                f"Holdfast already runs on the data folder {path}: stop it first, or choose another folder with "
                "--data-dir."
            ) from None
        yield DataFolder(path, _kept(path, fresh=fresh))
    finally:
        os.close(lock)


@contextmanager
def saying_what_is_wrong_with(path: Path) -> Iterator[None]:
    """Turn an error of the system that is about the folder, such as a full disk, into a ServiceError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_FOLDER:
            raise
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> ServiceError:
    return ServiceError(f"The data folder {path} cannot be used: {error.strerror}{_belonging_to(path)}.")


def _refuse_what_is_not_ours(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if MARK not in names and not names <= _IN_AN_EMPTY_FOLDER:
        strange = sorted(name for name in names if not _OF_OLDER_VERSIONS.fullmatch(name))
        if strange or _LOCK not in names:
            raise ServiceError(
                f"The data folder {path} is not empty, and was not made by Holdfast: it has {min(strange or names)!r}. "
                "Choose a new or an empty folder with --data-dir."
            )
    for name in names & {MARK, _LOCK}:
        if (path / name).lstat().st_uid != os.geteuid():
            raise ServiceError(f"The data folder {path} cannot be used{_belonging_to(path / name)}.")


def _belonging_to(path: Path) -> str:
    """The end of a sentence, if `path` belongs to another user."""
    with suppress(OSError):
        owner = path.lstat().st_uid
        if owner != os.geteuid():
            return f": it belongs to {_name(owner)}, and this is {_name(os.geteuid())}"
    return ""


def _name(uid: int) -> str:
    with suppress(KeyError):
        return f"the user {pwd.getpwuid(uid).pw_name}"
    return f"the user {uid}"


def _kept(path: Path, *, fresh: bool) -> _Kept:
    try:
        text = (path / MARK).read_bytes()
    except FileNotFoundError:
        return _Kept()
    with suppress(ValidationError):
        version = _Mark.model_validate_json(text).format
        if version > FORMAT:
            raise ServiceError(
                f"The data folder {path} belongs to a newer version of Holdfast (its format is {version}, and this "
                f"version knows {FORMAT}): use that version, or choose another folder with --data-dir."
            )
    if fresh:
        return _Kept()
    try:
        return _Kept.model_validate_json(text)
    except ValidationError:
        raise ServiceError(
            f"{path / MARK} is damaged: start once with --fresh, which makes new ports and secrets and keeps the data."
        ) from None
