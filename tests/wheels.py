"""Holdfast and its client as wheels, and environments in which they are installed outside any checkout."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.installation import environment
from tests.packages import what_runs

ROOT = Path(__file__).parents[1]
OURS = {"holdfast", "holdfast-client"}


@dataclass(frozen=True, slots=True)
class Wheels:
    """The two distributions of this checkout."""

    holdfast: Path
    client: Path


def build(folder: Path) -> Wheels:
    """Build both wheels in `folder`."""
    return Wheels(*(_built(ROOT / path, folder / name) for name, path in (("holdfast", "."), ("client", "client"))))


def _built(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [wheel] = folder.iterdir()
    return wheel


class Environment:
    """An environment of Python in `folder`, empty at first and without pip."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.folder = folder
        self.python = str(folder / "bin" / "python")

    def pip(self, *arguments: str | Path, cwd: Path | None = None) -> None:
        """Run our pip on it."""
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        subprocess.run([*pip, *arguments], cwd=cwd, check=True, capture_output=True)

    def install_alone(self, *wheels: Path) -> None:
        """Install these wheels without what they require."""
        self.pip("install", "--no-index", "--no-deps", *wheels)

    def link(self, requirements: Iterable[str]) -> None:
        """Have what these requirements need, as it is installed here: all but our own packages."""
        [packages] = self.folder.glob("lib/*/site-packages")
        link(what_runs(list(requirements)) - OURS, packages)

    def versions(self) -> dict[str, str]:
        """The version of each package that is installed."""
        program = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()))"
        lines = [line.split("==") for line in self.run(self.python, "-c", program).stdout.split()]
        return {canonicalize_name(name): version for name, version in lines}

    def run(self, *argv: str, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a program outside the checkout, whose folders could be imported otherwise."""
        env = environment(**settings)
        return subprocess.run(argv, env=env, cwd=cwd or self.folder, capture_output=True, text=True, timeout=60)


def required(wheel: Path, *extras: str) -> list[str]:
    """What the wheel requires of an installation with these extras, or without any."""
    with ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    needed = map(Requirement, lines)
    return [
        str(one)
        for one in needed
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras or [""])
    ]


def link(packages: Iterable[str], folder: Path) -> None:
    """Have what is installed here as `packages` in `folder`, too."""
    for package in packages:
        files = importlib.metadata.files(package) or []
        for name in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(importlib.metadata.distribution(package).locate_file(name))))
