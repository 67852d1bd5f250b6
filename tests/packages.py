"""The dependencies of packages, read from those that are installed here."""

import importlib.metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def what_runs(requirements: list[str]) -> set[str]:
    """The names of all packages that these requirements need, directly or not."""
    missing = [Requirement(line) for line in requirements]
    found: set[tuple[str, frozenset[str]]] = set()
    while missing:
        needed = missing.pop()
        key = (canonicalize_name(needed.name), frozenset(needed.extras))
        if key not in found:
            found.add(key)
            for further in map(Requirement, importlib.metadata.requires(needed.name) or []):
                extras = ["", *needed.extras]
                if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                    missing.append(further)
    return {name for name, _ in found}
