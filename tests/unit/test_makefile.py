"""What `make` does about an environment whose Python was upgraded or removed."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAMPS = ("created.stamp", "runtime.stamp", "dev.stamp")
IS_MADE_ANEW = "The Python of .venv was upgraded or removed: .venv is made anew as soon as it is needed.\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is complete, as far as make knows."""
    (tmp_path / "client").mkdir()
    for name in ("Makefile", "pyproject.toml", "client/pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (0, 0))
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages").mkdir(parents=True)
    now = time.time()
    for age, name in enumerate(reversed(STAMPS)):
        (venv / name).touch()
        os.utime(venv / name, (now - age, now - age))
    return tmp_path


def make(checkout: Path, *arguments: str) -> str:
    """What make prints; with -n, what it would run."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    ended = subprocess.run(["make", *arguments], cwd=checkout, env=env, capture_output=True, text=True, check=True)
    return ended.stdout


def test_an_environment_that_works_is_used_as_it_is(checkout: Path) -> None:
    assert make(checkout, "-n", "demo") == ".venv/bin/holdfast demo\n"
    docs = [f".venv/bin/python docs/generate_{name}.py\n" for name in ("messages", "asyncapi")]
    assert make(checkout, "-n", "docs") == "".join(docs)


@pytest.mark.parametrize("event", ["removed", "upgraded", "broken"])
def test_an_environment_whose_python_was_upgraded_or_removed_is_made_anew(checkout: Path, event: str) -> None:
    venv = checkout / ".venv"
    if event == "removed":
        (venv / "bin/python").unlink()
        (venv / "bin/python").symlink_to("/nowhere/python3.10")
    elif event == "upgraded":
        next(venv.glob("lib/python*")).rename(venv / "lib/python3.10")
    else:
        (venv / "bin/python").unlink()
        (venv / "bin/python").symlink_to("/bin/false")
    said = make(checkout, "-n", "demo")
    assert said.startswith(IS_MADE_ANEW)
    assert "-m venv --clear .venv" in said
    assert "--requirement requirements.txt" in said
    assert said.endswith(".venv/bin/holdfast demo\n")


def test_the_list_of_commands_needs_no_environment(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    assert make(checkout).startswith("make help ")
