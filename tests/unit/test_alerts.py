"""The alerts of deploy/prometheus: each fires when it should, names metrics that there are, and is explained."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.promql import documented_metrics, metrics_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
RULES = FOLDER / "holdfast.rules.yml"
ALERTS: list[dict[str, Any]] = [
    rule for group in YAML(typ="safe").load(RULES.read_text())["groups"] for rule in group["rules"]
]
SECTION = (ROOT / "docs/operating.md").read_text().split("\n## Alerts\n")[1].split("\n## ")[0]
PARAGRAPHS = dict(re.findall(r"^### (\w+)\n\n(.*?)\n(?=\n###|\n?\Z)", SECTION, re.MULTILINE | re.DOTALL))

by_name = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])


def test_each_alert_fires_when_it_should_and_a_system_that_is_well_is_silent() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool here, which is in Debian's package prometheus")
    tested = subprocess.run([promtool, "test", "rules", "holdfast.rules.test.yml"], cwd=FOLDER, capture_output=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@by_name
def test_a_test_lets_each_alert_fire(alert: dict[str, Any]) -> None:
    tests = YAML(typ="safe").load((FOLDER / "holdfast.rules.test.yml").read_text())["tests"]
    fired = {
        str(sample["labels"])
        for test in tests
        for expected in test.get("promql_expr_test", [])
        for sample in expected["exp_samples"]
    } | {
        f'alertname="{expected["alertname"]}"'
        for test in tests
        for expected in test.get("alert_rule_test", [])
        if expected["exp_alerts"]
    }
    assert any(f'alertname="{alert["alert"]}"' in labels for labels in fired)


@by_name
def test_each_metric_is_in_the_list_of_metrics_with_the_labels_that_the_alert_names(alert: dict[str, Any]) -> None:
    documented = documented_metrics()
    named = metrics_of(alert["expr"])
    assert named
    assert named <= set(documented)
    of_metrics = {label for name in named for label in documented[name]}
    kept = {"namespace", "job", "instance"}  # Prometheus' own
    grouped = re.findall(r"by \(([^)]*)\)", alert["expr"])
    assert {label for group in grouped for label in group.split(", ")} <= of_metrics | kept
    told = " ".join(map(str, alert["annotations"].values()))
    shown = set(re.findall(r"\$labels\.(\w+)", told))
    assert all(not grouped or label in group.split(", ") for label in shown for group in grouped)
    assert shown <= of_metrics | kept


@by_name
def test_each_alert_says_how_urgent_it_is_and_what_is_wrong(alert: dict[str, Any]) -> None:
    assert alert["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert list(alert["annotations"]) == ["summary", "description", "runbook_url"]
    for name in ("summary", "description"):
        assert alert["annotations"][name].endswith(".")
    assert "for" in alert or re.search(r"> \d+$|>= \d+$|\[\d+m\]", alert["expr"]), "one bad scrape would be enough"


@by_name
def test_each_alert_leads_to_its_paragraph_which_says_the_same_urgency(alert: dict[str, Any]) -> None:
    assert alert["annotations"]["runbook_url"] == f"docs/operating.md#{alert['alert'].lower()}"
    urgency = {"critical": "Critical", "warning": "A warning"}[alert["labels"]["severity"]]
    assert PARAGRAPHS[alert["alert"]].startswith((f"{urgency}. ", f"{urgency}, "))


def test_there_is_no_paragraph_without_an_alert_and_the_order_is_the_same() -> None:
    assert list(PARAGRAPHS) == [alert["alert"] for alert in ALERTS]
