"""docs/metrics.md has every metric that is served, and no other: names, types and labels."""

import re
from pathlib import Path
from typing import NamedTuple, get_args

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from holdfast_client.results import OutcomeName
from tests.acceptance.website import app, serving
from tests.installation import Installation, Producer, wait_for_workers
from worker import metrics
from worker.local.embedded import Embedded

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/metrics.md").read_text()
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>\w+) \| (?P<labels>[^|]*)\| .+ \|$", re.MULTILINE)


class Metric(NamedTuple):
    name: str
    kind: str
    labels: tuple[str, ...]


def documented(heading: str) -> set[Metric]:
    section = PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    rows = [
        Metric(row["name"], row["kind"], tuple(re.findall(r"`(\w+)`", row["labels"]))) for row in ROW.finditer(section)
    ]
    assert len(rows) == len(set(rows)) == section.count("\n| `holdfast_")
    return set(rows)


def served_name(name: str, kind: str) -> str:
    return f"{name}_total" if kind == "counter" else name


def registered() -> set[Metric]:
    """What a worker's process registers: whether or not it has counted anything yet."""
    ours = [metric for metric in REGISTRY._collector_to_names if isinstance(metric, MetricWrapperBase)]
    kinds = [(one, str(one._type)) for one in ours]
    found = {Metric(served_name(one._name, kind), kind, tuple(one._labelnames)) for one, kind in kinds}
    return {metric for metric in found if metric.name.startswith("holdfast_")}


def served(text: str) -> dict[str, Metric]:
    """What is served under our name, with the labels of its samples, as far as it has any."""
    return {
        served_name(family.name, family.type): Metric(
            served_name(family.name, family.type),
            family.type,
            tuple(dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")),
        )
        for family in text_string_to_metric_families(text)
        if family.name.startswith("holdfast_") and not family.name.endswith("_created")
    }


def test_the_page_has_what_the_api_serves(database_url: str, services: Embedded) -> None:
    with serving(app(database_url, services.broker_url)) as address:
        text = httpx.get(f"{address}/metrics", trust_env=False).text
    assert set(served(text).values()) == documented("The whole system")


def test_the_page_has_what_a_worker_registers() -> None:
    assert metrics.MOST_NAMED  # it is imported, so it has registered them
    assert registered() == documented("One worker")


def test_a_worker_serves_what_it_registers(installation: Installation, producer: Producer) -> None:
    with installation.serving_figures() as (_, figures):
        wait_for_workers(producer)
        told = served(figures.get("/metrics").text)
    assert {metric.name: metric.kind for metric in told.values()} == {
        metric.name: metric.kind for metric in documented("One worker")
    }


@pytest.mark.parametrize("outcome", [*get_args(OutcomeName), "duplicate", "dead_letter", "waits", "run"])
def test_the_page_has_every_outcome(outcome: str) -> None:
    assert f"`{outcome}`" in PAGE.partition("The label `outcome`")[2]


def test_the_page_says_how_many_organizations_are_named() -> None:
    assert f"the {metrics.MOST_NAMED} that have waited longest" in PAGE


def test_the_readme_leads_to_it() -> None:
    assert "(docs/metrics.md)" in (ROOT / "README.md").read_text()
