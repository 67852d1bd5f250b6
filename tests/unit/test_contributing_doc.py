"""docs/contributing.md names files, tests, names in the code and commands that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "contributing.md").read_text()
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_every_file_and_folder_that_is_named_is_there() -> None:
    names = re.findall(r"`([\w/]+(?:/|\.(?:py|html|md|yml|toml)))`", DOCUMENT)
    assert len(names) > 40
    beside_a_folder = {path.name for path in TESTS}
    assert [name for name in names if not (ROOT / name).exists() and name not in beside_a_folder] == []


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) > 20
    found = {name for path in TESTS for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)}
    assert named - found == set()


def test_every_name_in_a_file_is_in_that_file() -> None:
    """A place is written as `file`: `name`."""
    for row in re.findall(r"^\| (`[\w/]+\.py`: .*?) \|", DOCUMENT, re.MULTILINE):
        file, *names = re.findall(r"`([^`]+)`", row)
        text = (ROOT / file).read_text() if "/" in file else next(p for p in TESTS if p.name == file).read_text()
        for name in names:
            assert name in text, (file, name)


def test_every_command_that_is_named_is_one_of_the_makefile() -> None:
    commands = set(re.findall(r"`make (\w+)`", DOCUMENT))
    assert commands == {"bench", "docs", "lint", "soak", "test"}
    assert commands <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
