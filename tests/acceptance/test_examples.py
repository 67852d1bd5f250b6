"""Every example runs as it is written, against real servers."""

import hashlib
import hmac
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import httpx
import pytest
import redis
from ruamel.yaml import YAML
from sqlalchemy import text

from holdfast_client.client import Client, NoAnswerError, NotSentError
from ledger import views
from ledger.database import connect
from tests.acceptance import commands
from tests.acceptance.terminal import BIN, beside
from tests.installation import HOLDFAST, Installation, environment, installed_on, open_folder
from tests.promql import DASHBOARD, as_grafana_sends, queries_of
from tests.support import PATIENCE_S, eventually, sql
from worker.local.broker import Broker
from worker.local.machine import free_port
from worker.local.process import Process

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.timeout(300)  # seconds, for whole systems that start on a slow machine


@pytest.fixture(scope="module")
def terminal() -> Iterator[dict[str, str]]:
    """The environment of a terminal beside `holdfast up`."""
    with beside(HOLDFAST, "up") as pasted:
        yield pasted


def written(example: str, language: str = "sh") -> list[str]:
    """The commands of an example's README."""
    text = (EXAMPLES / example / "README.md").read_text()
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if not line.startswith("pip install")]


def shell(lines: list[str], env: dict[str, str], folder: Path) -> str:
    """What a terminal in `folder` shows."""
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def running(name: str, command: str, env: dict[str, str], folder: Path, **replaced: str) -> Iterator[Process]:
    """A program of an example, started as its README says, but for what is replaced."""
    for old, new in replaced.items():
        assert old.strip("_") in command
        command = command.replace(old.strip("_"), new)
    program, *arguments = shlex.split(command)
    found = shutil.which(program, path=env["PATH"])
    assert found is not None
    with open_folder() as logs:
        process = Process(name, [found, *arguments], logs, env=env, cwd=folder)
        process.start()
        try:
            yield process
        finally:
            process.kill()
            print(process.log_file.read_text())


def test_the_list_names_every_example() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if path.is_dir()}
    assert set(re.findall(r"^\| \[(\w+)\]\((\w+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)) == {
        (name, name) for name in folders
    }


def test_the_client_is_installed_from_the_checkout_as_no_package_index_has_it() -> None:
    for readme in EXAMPLES.glob("*/README.md"):
        for line in re.findall("^pip install .*client.*", readme.read_text(), re.MULTILINE):
            assert line.split()[-1] == "../../client"
            assert (readme.parent / "../../client/pyproject.toml").exists()


def test_an_engine_in_node_waits_for_its_decision(terminal: dict[str, str]) -> None:
    if shutil.which("node", path=terminal["PATH"]) is None:
        pytest.skip("there is no node here")
    grant, export, run = written("nodejs")
    # Pasted twice, as after an hour, when the token has expired: the variable is none that our commands refuse.
    assert "node-1 used 18; 82 available" in shell([grant, export, export, run], terminal, EXAMPLES / "nodejs")
    # Once more, as after a crash: the run has ended, and is charged once.
    refused = ["set +e", run, run.replace("node-1 20", "node-2 999999999"), "true"]
    shown = shell([export, *refused], terminal, EXAMPLES / "nodejs")
    assert shown.splitlines() == ["node-1 does not run: settled", "node-2 does not run: insufficient_credits"]


def test_a_webhook_adds_the_credits_of_a_payment_once(terminal: dict[str, str]) -> None:
    *exports, serve = written("billing_webhook")
    secret = "0123456789abcdef"
    assert [line.partition("=")[0] for line in exports] == ["export WEBHOOK_SECRET"]
    port = str(free_port())
    body = json.dumps(
        {"id": "evt_1", "type": "payment.succeeded", "data": {"org_id": "paying", "credits": 500}}
    ).encode()

    def tell(client: httpx.Client, body: bytes, age_s: int = 0, key: str = secret) -> int:
        timestamp = str(int(time.time()) - age_s)
        signed = hmac.new(key.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
        headers = {"Webhook-Timestamp": timestamp, "Webhook-Signature": signed}
        return client.post("/webhook", content=body, headers=headers).status_code

    env = {**terminal, "WEBHOOK_SECRET": secret}
    with (
        running("webhook", serve, env, EXAMPLES / "billing_webhook", _8090=port) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as client,
    ):
        process.wait_until(lambda: is_up(client), timeout_s=PATIENCE_S)
        assert [tell(client, body) for _ in range(3)] == [202] * 3
        assert tell(client, body.replace(b"500", b"501"), key="guessed") == 401
        assert tell(client, body.replace(b"500", b"501"), age_s=301) == 401
        assert tell(client, body.replace(b"500", b"0")) == 422
        for wrong in (b"{", b"[]", b"", b"\xff", b"{}", b"[" * 100_000, body.replace(b"credits", b"amount")):
            assert tell(client, wrong) == 422, wrong
        for timestamp in ("9" * 400, "9" * 5000, "-1", "", "1e9"):
            headers = {"Webhook-Timestamp": timestamp, "Webhook-Signature": "guessed"}
            assert client.post("/webhook", content=body, headers=headers).status_code == 401, timestamp
        assert tell(client, body.replace(b"evt_1", b"evt_2").replace(b"succeeded", b"failed")) == 202
    with Client(terminal["HOLDFAST_BROKER_URL"]) as billing:
        # The worker takes messages in their order, so those before this one are applied, too.
        answer = billing.grant(org_id="paying", grant_id="gift", credits=1, wait_s=PATIENCE_S)
    assert answer.available == 501


def test_an_engine_tells_the_ledger_what_was_used_as_soon_as_the_broker_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that fails is acknowledged all the same: nobody would ever send its finish."""
    monkeypatch.setenv("REPORTS_BROKER_URL", "memory://")
    monkeypatch.setenv("HOLDFAST_ENGINE_BROKER_URL", "redis://127.0.0.1:1/0")
    engine = runpy.run_path(str(EXAMPLES / "celery_engine" / "engine.py"))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    away = [NotSentError("away"), NotSentError("away")]
    decision = Mock(holds=True)
    ledger = Mock()
    ledger.start.side_effect = [NoAnswerError("no worker"), *away, decision]
    ledger.finish.side_effect = [*away, None]
    engine["render"].run.__globals__["ledger"] = ledger
    assert engine["render"].apply(args=("acme", 40)).get() == "rendered 36 pages"
    assert {call.kwargs["credits"] for call in ledger.finish.call_args_list} == {72}
    ledger.fail.assert_not_called()


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code == 404
    except httpx.TransportError:
        return False


@pytest.fixture
def shared(database_url: str) -> Iterator[tuple[Installation, Broker]]:
    """A ledger on a broker that it shares with an engine, whose user was made as the example says."""
    with open_folder() as folder:
        server = Broker(folder)
        server.start()
        try:
            [command] = written("celery_engine", "text")
            with redis.Redis.from_url(server.url) as administrator:
                administrator.execute_command(*command.split())
            with installed_on(database_url, server.url_of("holdfast")) as own:
                own.start_worker()
                yield own, server
        finally:
            server.stop()


def test_an_engine_that_is_a_celery_application_shares_the_broker(shared: tuple[Installation, Broker]) -> None:
    ledger, server = shared
    folder = EXAMPLES / "celery_engine"
    export, work, ask = written("celery_engine")
    own_url = export.partition("=")[2].replace("broker:6379", urlsplit(server.url).netloc.rpartition("@")[2])
    env = environment(
        PATH=f"{BIN}:{os.defpath}", REPORTS_BROKER_URL=own_url, HOLDFAST_ENGINE_BROKER_URL=server.url_of("engine")
    )
    with Client(ledger.broker_url) as billing:
        billing.grant(org_id="acme", grant_id="gift", credits=100, wait_s=PATIENCE_S)
    with running("engine", work, env, folder):
        for pages, state in (("40", "settled"), ("20", "rejected"), ("101", "rejected")):
            assert ended(ledger, shell([ask.replace("40", pages)], env, folder).strip()) == state
        with Client(ledger.broker_url) as billing:
            billing.grant(org_id="acme", grant_id="more", credits=1_000, wait_s=PATIENCE_S)
        assert ended(ledger, shell([ask.replace("40", "101")], env, folder).strip()) == "failed"
    with ledger.engine.connect() as connection:
        wallet = views.wallet(connection, "acme")
    assert wallet is not None
    assert wallet.available == 100 - 72 + 1_000


def ended(ledger: Installation, workflow_id: str) -> str:
    """How a run has ended."""
    query = "SELECT state FROM workflows WHERE workflow_id = :workflow_id AND state <> 'reserved'"
    [(state,)] = eventually(lambda: sql(ledger.engine, query, workflow_id=workflow_id))
    return str(state)


@contextmanager
def prometheus(terminal: dict[str, str], folder: Path) -> Iterator[httpx.Client]:
    """The Prometheus of the example, which scrapes every second; the client asks its API."""
    if shutil.which("prometheus", path=terminal["PATH"]) is None:
        pytest.skip("there is no prometheus here")
    for name in ("deploy", "examples"):
        shutil.copytree(ROOT / name, folder / name)
    here = folder / "examples/monitoring"
    config = here / "prometheus.yml"
    config.write_text(config.read_text().replace(": 5s", ": 1s"))
    targets, start = written("monitoring")
    shell([targets], terminal, here)
    port = str(free_port())
    with (
        running("prometheus", start, terminal, here, _9090=port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S) as client,
    ):
        yield client


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


def test_every_panel_shows_something_and_every_rule_is_evaluated(terminal: dict[str, str], tmp_path: Path) -> None:
    assert commands.run("verify", env=terminal).returncode == 0
    owner = connect(terminal["HOLDFAST_DATABASE_URL"].replace("holdfast_reader", "holdfast_worker"))
    with prometheus(terminal, tmp_path) as client, Client(terminal["HOLDFAST_BROKER_URL"]) as billing:
        billing.grant(org_id="watched", grant_id="first", credits=5, wait_s=PATIENCE_S)
        with owner.begin() as locking:
            locking.execute(text("SELECT FROM wallets WHERE org_id = 'watched' FOR UPDATE"))
            billing.grant(org_id="watched", grant_id="second", credits=5)
            for panel in DASHBOARD["panels"]:
                for query in map(as_grafana_sends, queries_of(panel)):
                    if "holdfast_replica_up" in query:  # `holdfast up` has no replica
                        continue
                    assert eventually(
                        lambda query=query: (asked(client, "query", query=query) or {}).get("result"),  # type: ignore[misc]
                    ), query
        [group] = eventually(
            lambda: [
                group
                for group in (asked(client, "rules") or {}).get("groups", [])
                if all(rule["health"] != "unknown" for rule in group["rules"])
            ]
        )
    owner.dispose()
    rules = YAML(typ="safe").load((ROOT / "deploy/prometheus/holdfast.rules.yml").read_text())
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in rules["groups"][0]["rules"]]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []


def test_grafana_is_told_of_that_prometheus_and_of_the_dashboard() -> None:
    folder = EXAMPLES / "monitoring/grafana/provisioning"
    [source] = YAML(typ="safe").load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    assert source["url"].removeprefix("http://") in (EXAMPLES / "monitoring/README.md").read_text()
    [provider] = YAML(typ="safe").load((folder / "dashboards/holdfast.yml").read_text())["providers"]
    path = provider["options"]["path"].replace("$HOLDFAST", str(ROOT))
    assert [file.name for file in Path(path).iterdir()] == ["holdfast.json"]
