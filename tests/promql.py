"""The queries of the dashboard, the metrics that a query names, and those that docs/metrics.md has."""

import json
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
DASHBOARD: dict[str, Any] = json.loads((_ROOT / "deploy/grafana/holdfast.json").read_text())
_ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*)\|", re.MULTILINE)


def documented_metrics() -> dict[str, set[str]]:
    """Every name that a query may use, with its labels; a histogram is served as three. Other tests check the page."""
    found: dict[str, set[str]] = {}
    for row in _ROW.finditer((_ROOT / "docs/metrics.md").read_text()):
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


def queries_of(panel: dict[str, Any]) -> list[str]:
    """The queries of a panel, as they are written."""
    return [target["expr"] for target in panel["targets"]]


def as_grafana_sends(query: str) -> str:
    """A query with the values of its variables."""
    return query.replace("$namespace", ".*").replace("$__rate_interval", "1m")
