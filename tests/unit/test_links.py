"""The documents lead only to what is there: files, headings, and the modules that docs/architecture.md names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("ledger", "worker", "api_stub")


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchor of every heading, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_architecture_is_at_most_a_page_and_names_modules_that_are_there() -> None:
    page = ROOT / "docs" / "architecture.md"
    assert len(page.read_text().splitlines()) <= 80
    named = set(re.findall(r"\b\w+\.py\b", page.read_text()))
    assert named
    assert named <= {path.name for folder in CODE for path in (ROOT / folder).rglob("*.py")}
