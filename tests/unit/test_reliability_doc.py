"""docs/reliability.md promises nothing that no test shows."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN_BY = re.findall(r"\| `(\w+)` \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)


def names() -> set[str]:
    """The names that `pytest -k` looks at."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    return functions | {file.name for file in files}


@pytest.mark.parametrize("name", SHOWN_BY)
def test_what_shows_it_is_there(name: str) -> None:
    assert any(name in test for test in names())


def test_every_fault_has_something_that_shows_it() -> None:
    faults = (ROOT / "docs/reliability.md").read_text().partition("## Faults")[2].partition("## A replica")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and not line.startswith("| fault ")]
    assert len(rows) == len(SHOWN_BY) > 10


def test_the_readme_leads_to_it() -> None:
    assert "(docs/reliability.md)" in (ROOT / "README.md").read_text()
