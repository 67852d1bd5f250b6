"""The metrics that a query of Prometheus names, and those that docs/metrics.md has."""

import re
from pathlib import Path

_PAGE = Path(__file__).parents[1] / "docs/metrics.md"
_ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*)\|", re.MULTILINE)


def documented_metrics() -> dict[str, set[str]]:
    """Every name that a query may use, with its labels; a histogram is served as three. Other tests check the page."""
    found: dict[str, set[str]] = {}
    for row in _ROW.finditer(_PAGE.read_text()):
        labels = set(re.findall(r"`(\w+)`", row["labels"]))
        if row["kind"] == "histogram":
            found[f"{row['name']}_bucket"] = {*labels, "le"}
            found[f"{row['name']}_count"] = found[f"{row['name']}_sum"] = labels
        else:
            found[row["name"]] = labels
    assert found
    return found


def metrics_of(query: str) -> set[str]:
    """The names of ours in `query`."""
    return set(re.findall(r"\bholdfast_\w+", query))
