"""The dashboard of deploy/grafana asks only for metrics that there are, and its panels do not overlap."""

import re
from typing import Any

import pytest

from tests.promql import DASHBOARD, documented_metrics, metrics_of, queries_of

by_title = pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])


@by_title
def test_a_panel_asks_for_metrics_of_the_list_with_their_labels(panel: dict[str, Any]) -> None:
    documented = documented_metrics()
    for query in queries_of(panel):
        named = metrics_of(query)
        assert named
        assert named <= set(documented)
        assert len(re.findall(r"\bholdfast_\w+", query)) == query.count('{namespace=~"$namespace"}')
        labels = {label for name in named for label in documented[name]}
        assert {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")} <= labels
    for target in panel["targets"]:
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == set(
            re.findall(r"by \((?!le\)|org_id)(\w+)\)", target["expr"])
        )


@by_title
def test_a_panel_says_what_it_shows_and_asks_the_prometheus_that_is_chosen(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert {source["uid"] for source in (panel["datasource"], *(one["datasource"] for one in panel["targets"]))} == {
        "${datasource}"
    }


def test_every_metric_of_the_system_and_of_a_worker_is_on_it() -> None:
    shown = {name for panel in DASHBOARD["panels"] for query in queries_of(panel) for name in metrics_of(query)}
    assert shown == set(documented_metrics()) - {"holdfast_batch_seconds_count", "holdfast_batch_seconds_sum"} - {
        "holdfast_batch_messages_bucket"
    }


def test_each_panel_has_a_number_and_a_place_of_its_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
