"""Both lock files name every extra that an installed package asks for.

An older pip looks for the newest version of `package[extra]` where a lock file names only `package`: it then refuses to
install, from the day on which that package has a newer version.
"""

from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK_FILES = ("requirements.txt", "requirements-dev.txt")


def locked(lock_file: str) -> dict[str, set[str]]:
    """The extras that are locked with each package."""
    lines = [line.split("\\")[0] for line in (ROOT / lock_file).read_text().splitlines() if line[:1].isalnum()]
    requirements = [Requirement(line) for line in lines]
    assert all(str(requirement.specifier).startswith("==") for requirement in requirements)
    return {canonicalize_name(requirement.name): requirement.extras for requirement in requirements}


def wanted_extras() -> list[tuple[str, Requirement]]:
    """What installed packages require with an extra, here or on another system, and who does."""
    return [
        (canonicalize_name(distribution.name), requirement)
        for distribution in distributions()
        for requirement in map(Requirement, distribution.requires or ())
        if requirement.extras
    ]


@pytest.mark.parametrize("lock_file", LOCK_FILES)
def test_whatever_is_required_with_an_extra_is_locked_with_it(lock_file: str) -> None:
    packages = locked(lock_file)
    missing = [
        f"{name} requires {requirement}"
        for name, requirement in wanted_extras()
        if name in {*packages, "holdfast", "holdfast-client"} and applies(name, requirement, packages)
        if not requirement.extras <= packages[canonicalize_name(requirement.name)]
    ]
    assert missing == []


def test_what_once_broke_the_install_is_looked_at() -> None:
    assert any((name, requirement.name) == ("pytest-cov", "coverage") for name, requirement in wanted_extras())


def applies(name: str, requirement: Requirement, packages: dict[str, set[str]]) -> bool:
    """Whether it is required as `name` is locked: of its extras, with those alone."""
    if canonicalize_name(requirement.name) not in packages:
        return False  # only for an extra that nobody asks for
    extras = packages.get(name) or {"server", "embedded", "otel", "dev"}
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras})
