"""A real Prometheus scrapes the API and a worker: every panel shows something, every rule is evaluated."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from ledger import audit
from tests.acceptance.website import app, serving
from tests.installation import Installation, Producer
from tests.promql import DASHBOARD, as_grafana_sends, queries_of
from tests.support import PATIENCE_S, eventually
from worker.local.machine import free_port

ROOT = Path(__file__).parents[2]


@contextmanager
def prometheus(folder: Path, **targets: str) -> Iterator[httpx.Client]:
    """Prometheus with our rules, that scrapes each of these addresses every second; the client asks its API."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no prometheus here")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "deploy/prometheus/holdfast.rules.yml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
        ],
    }
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    options = {
        "config.file": folder / "prometheus.json",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
    }
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())], stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=PATIENCE_S) as client:
            yield client
    finally:
        process.kill()
        process.wait()


def asked(client: httpx.Client, path: str, **parameters: str) -> Any:
    """The data of an answer. None: Prometheus does not answer yet."""
    try:
        response = client.get(f"/api/v1/{path}", params=parameters)
    except httpx.TransportError:
        return None
    if response.status_code == 503:  # it is starting
        return None
    assert response.json()["status"] == "success", response.text
    return response.json()["data"]


def test_every_panel_shows_something_and_every_rule_is_evaluated(
    installation: Installation, producer: Producer, tmp_path: Path
) -> None:
    audit.record(installation.engine, audit.verify(installation.engine))
    with (
        serving(app(installation.database_url, installation.broker_url)) as api,
        installation.serving_figures() as (_, worker),
        prometheus(tmp_path, api=api.removeprefix("http://"), worker=worker.base_url.netloc.decode()) as client,
    ):
        producer.answer("wallet.grant", {"org_id": "acme", "grant_id": "first", "credits": 5})
        with installation.locked("acme"):
            producer.send("wallet.grant", {"org_id": "acme", "grant_id": "second", "credits": 5})
            for panel in DASHBOARD["panels"]:
                for query in map(as_grafana_sends, queries_of(panel)):
                    result = eventually(
                        lambda query=query: (asked(client, "query", query=query) or {}).get("result"),  # type: ignore[misc]
                    )
                    assert result, query
        [group] = eventually(
            lambda: [
                group
                for group in (asked(client, "rules") or {}).get("groups", [])
                if all(rule["health"] != "unknown" for rule in group["rules"])
            ]
        )
    written = YAML(typ="safe").load((ROOT / "deploy/prometheus/holdfast.rules.yml").read_text())
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in written["groups"][0]["rules"]]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []
