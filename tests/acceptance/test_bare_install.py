"""Holdfast installed without an extra: the client, what it needs, and nothing of the server."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.installation import Installation, environment
from tests.packages import what_runs

ROOT = Path(__file__).parents[2]
SENDS = """
import importlib.util, sys
from holdfast_client import messages
from worker.broker import ENGINE_QUEUE, QUEUE
from worker.client import Client
with Client(sys.argv[1]) as client:
    client.grant(org_id="acme", grant_id="gift", credits=5)
print([name for name in sys.argv[2:] if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder], cwd=ROOT, check=True
    )
    [wheel] = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An environment with Holdfast and the packages that it requires without an extra, taken from ours."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = str(folder / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", wheel], check=True)
    [packages] = folder.glob("lib/*/site-packages")
    link(what_runs(required(wheel)), packages)
    return python


def required(wheel: Path, extra: str = "") -> list[str]:
    """What the wheel requires of an installation with this extra, or without any."""
    with ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    needed = map(Requirement, lines)
    return [str(one) for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]


def link(packages: Iterable[str], folder: Path) -> None:
    """Have what is installed here as `packages` in `folder`, too."""
    for package in packages:
        files = importlib.metadata.files(package) or []
        for name in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(importlib.metadata.distribution(package).locate_file(name))))


def run(*argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Outside the checkout, whose folders could be imported otherwise."""
    env = environment(**settings)
    return subprocess.run(argv, env=env, cwd=Path(argv[0]).parent, capture_output=True, text=True, timeout=60)


def test_it_sends_messages_and_has_nothing_of_the_server(wheel: Path, python: str, installation: Installation) -> None:
    of_the_server = what_runs(required(wheel, "server")) - what_runs(required(wheel))
    provided = importlib.metadata.packages_distributions().items()
    modules = [name for name, packages in provided if {canonicalize_name(one) for one in packages} <= of_the_server]
    assert {"alembic", "fastapi", "jwt", "psycopg", "rich", "sqlalchemy", "typer", "uvicorn"} <= set(modules)
    sent = run(python, "-c", SENDS, installation.broker_url, *modules)
    assert (sent.returncode, sent.stderr, sent.stdout) == (0, "", "[]\n")
    [entry] = installation.broker.lrange("credits", 0, -1)
    assert json.loads(entry)["headers"]["task"] == "wallet.grant"


@pytest.mark.parametrize(
    "command",
    [["holdfast", "demo"], ["celery", "-A", "worker", "worker"], ["uvicorn", "api_stub.app:app"]],
    ids=" ".join,
)
def test_a_part_of_the_server_says_what_to_install(python: str, tmp_path: Path, command: list[str]) -> None:
    """Also where the engine has a uvicorn of its own."""
    link(what_runs(["uvicorn"]), tmp_path)
    program, *arguments = command
    holdfast = [str(Path(python).with_name("holdfast"))]
    ended = run(*(holdfast if program == "holdfast" else [python, "-m", program]), *arguments, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    cure = "install the extra `server`, in a checkout with: pip install ./client '.[server]'"
    assert re.fullmatch(rf"holdfast: The package \w+ is missing: {re.escape(cure)}", line)
