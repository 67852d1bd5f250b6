"""The folder of an archive: Parquet files of events, and the manifest that names them in order. Knows no database.

Guarantee: a file that the manifest names is complete, whatever is killed. It is written as `….parquet.part`, named in
the manifest, and then renamed; a renaming that was interrupted is done by the next `Folder.open`. Each entry of the
manifest has the sha256 of its file and of the entry before it, so that no change, removal or swap stays unnoticed.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Self

from ledger import extras
from ledger.state import Event
from ledger.upkeep import UpkeepError

with extras.of("archive"):
    import pyarrow
    from pyarrow import parquet

MANIFEST = "manifest.json"
_OF_A_DISK = "lost+found"
"""What an empty file system has."""
_FILE_PATTERN = re.compile(r"\d{4}-\d\d-\d\d-\d{4,}\.parquet")
_OPTIONAL = ("workflow_id", "project_id", "activity_name")
_TEXTS = (*_OPTIONAL, "org_id", "event_type", "source", "idempotency_key", "metadata")

Row = tuple[Any, ...]
"""The fields of an `Event`, in their order; `metadata` is the text of a JSON object, as PostgreSQL writes it."""


def _type(name: str) -> Any:
    if name == "created_at":
        return pyarrow.timestamp("us", "UTC")
    return pyarrow.string() if name in _TEXTS else pyarrow.int64()


_SCHEMA = pyarrow.schema([pyarrow.field(name, _type(name), nullable=name in _OPTIONAL) for name in Event._fields])
_CREDITS = Event._fields.index("credits")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the manifest: events of one UTC day."""

    file: str
    day: str
    events: int
    credits: int
    """The sum of the credits of its events."""
    sha256: str
    """Of the file."""
    previous: str
    """The digest of the entry before it; of the first one: that of the installation."""

    @property
    def digest(self) -> str:
        """The sha256 of the entry itself."""
        return _sha256(json.dumps(asdict(self), sort_keys=True).encode())


class Folder:
    """An archive. Only one process may write to it at a time."""

    def __init__(self, path: Path, installation: str, entries: Sequence[Entry]) -> None:
        self.path = path
        self.installation = installation
        self.entries = list(entries)

    @classmethod
    def open(cls, path: Path, installation: str) -> Self:
        """The archive of `installation` at `path`; a new one, if the folder is empty. Raises UpkeepError."""
        if not path.is_dir():
            raise UpkeepError(f"{path} is not a folder: make it first, and see that the right disk is mounted there")
        with _told(path):
            folder = cls._read(path) if (path / MANIFEST).exists() else cls(path, installation, ())
            others = sorted(
                each.name
                for each in path.iterdir()
                if each.suffix != ".part" and each.name not in (MANIFEST, _OF_A_DISK)
            )
        if folder.installation != installation:
            raise UpkeepError(f"{path} is the archive of another installation: name this one's own, or an empty folder")
        if others and not folder.entries:
            raise UpkeepError(f"{path} has no manifest, but {others[0]}: name an empty folder for a new archive")
        folder.finish_renaming()
        return folder

    @classmethod
    def _read(cls, path: Path) -> Self:
        manifest = path / MANIFEST
        try:
            with _read(manifest) as file:
                said = json.load(file)
            entries = [Entry(**each) for each in said["files"]]
            folder = cls(path, str(said["installation"]), entries)
            named = [entry for entry in entries if _FILE_PATTERN.fullmatch(entry.file)]
        except (ValueError, KeyError, TypeError):
            raise UpkeepError(f"{manifest} is damaged: restore it from a copy") from None
        links = [folder.head_after(number) for number in range(len(entries))]
        if named != entries or links != [entry.previous for entry in entries]:
            raise UpkeepError(
                f"{manifest} was changed: its entries do not continue one another; restore it from a copy"
            )
        return folder

    def head_after(self, number: int) -> str:
        """The digest of the first `number` entries: it stands for all of them, and for the installation."""
        return self.entries[number - 1].digest if number else _sha256(self.installation.encode())

    @property
    def heads(self) -> list[str]:
        """What `head_after` returns for 0, 1, 2, … entries."""
        return [self.head_after(number) for number in range(len(self.entries) + 1)]

    def add(self, day: date, groups: Iterable[Sequence[Row]]) -> Entry | None:
        """Write the events of `groups`, all of one day, into a new file. None: there are none. Raises UpkeepError.

        Each group is one of the file's row groups, which `groups` reads again one by one.
        """
        number = 1 + sum(entry.day == day.isoformat() for entry in self.entries)
        name = f"{day}-{number:04d}.parquet"
        path, part = self.path / name, self._part(name)
        if os.path.lexists(path):
            raise UpkeepError(f"{path} is there, but the manifest does not name it: move it away")
        events = credits_ = 0
        with _told(part):
            try:
                with _written(part) as file, parquet.ParquetWriter(file, _SCHEMA, compression="zstd") as writer:
                    for rows in groups:
                        writer.write_table(_table(rows), row_group_size=len(rows))
                        events += len(rows)
                        credits_ += sum(row[_CREDITS] for row in rows)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    part.unlink(missing_ok=True)  # a full disk gets its space back
                raise
            if not events:
                part.unlink()
                return None
            entry = Entry(name, day.isoformat(), events, credits_, _digest(part), self.head_after(len(self.entries)))
            self._write_manifest([*self.entries, entry])
        self.entries.append(entry)
        self.finish_renaming()
        return entry

    def groups(self, entry: Entry) -> Iterator[list[Row]]:
        """Yield the groups of events of a file. Raises UpkeepError if it is not the one that was written."""
        path = self.path / entry.file
        with _told(path), _read(path) as file:
            if _digest(path) != entry.sha256:
                raise UpkeepError(f"{path} was changed after it was written: restore it from a copy")
            events = credits_ = 0
            try:
                read = parquet.ParquetFile(file)
                for number in range(read.num_row_groups):
                    table = read.read_row_group(number)
                    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
                    events += len(rows)
                    credits_ += sum(row[_CREDITS] for row in rows)
                    yield rows
            except pyarrow.ArrowException as error:
                raise UpkeepError(f"{path} cannot be read: {error}") from None
        if (events, credits_) != (entry.events, entry.credits):
            raise UpkeepError(
                f"{path} has {events:,} events of {credits_:,} credits, which is not what the manifest says"
            )

    def problems(self) -> list[str]:
        """What is wrong with the files that the manifest names, and which others are there."""
        found = []
        for entry in self.entries:
            try:
                if _digest(self.path / entry.file) != entry.sha256:
                    found.append(f"{entry.file} was changed after it was written")
            except OSError as error:
                found.append(f"{entry.file}: {error.strerror}")
        known = {entry.file for entry in self.entries}
        found += [
            f"{each.name} is not in the manifest"
            for each in sorted(self.path.glob("*.parquet"))
            if each.name not in known
        ]
        return found

    def _part(self, name: str) -> Path:
        return self.path / f"{name}.part"

    def finish_renaming(self) -> None:
        """Give the last file of the manifest its name, which it may still lack."""
        if not self.entries:
            return
        entry = self.entries[-1]
        path, part = self.path / entry.file, self._part(entry.file)
        with _told(path):
            if not os.path.lexists(path) and part.exists():
                part.rename(path)
                _sync(self.path)

    def _write_manifest(self, entries: Sequence[Entry]) -> None:
        part = self._part(MANIFEST)
        said = {"installation": self.installation, "files": [asdict(entry) for entry in entries]}
        with _written(part) as file:
            file.write(json.dumps(said, indent=1).encode() + b"\n")
        part.rename(self.path / MANIFEST)
        _sync(self.path)


def _table(rows: Sequence[Row]) -> Any:
    columns = zip(_SCHEMA, zip(*rows, strict=True), strict=True)
    return pyarrow.Table.from_arrays([pyarrow.array(values, field.type) for field, values in columns], schema=_SCHEMA)


def _read(path: Path) -> BufferedReader:
    """Open a file, which is not a symbolic link."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


@contextmanager
def _written(path: Path) -> Iterator[BufferedWriter]:
    """A new file that only its owner can read. It is on the disk at the end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with _read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _sync(folder: Path) -> None:
    """Write a renaming in `folder` to its disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of the operating system are those of the archive."""
    try:
        yield
    except OSError as error:
        what = ": a symbolic link is not followed" if error.errno == errno.ELOOP else f": {error.strerror}"
        raise UpkeepError(f"{path}{what}") from None
