"""deploy/helm/holdfast names only what there is, and says the same as docker-compose.yml where both say it.

Helm itself lints and renders it, as a library and in a process of its own. There is no Kubernetes here: what is
rendered is held against its schemas. KEDA's and the Prometheus Operator's kinds are not among them.
"""

import json
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from api_stub.app import create_app
from ledger import roles
from ledger.settings import MAX_PRODUCT_NAME, PREFIX, Settings
from tests.compose import SECRETS, SERVICES
from tests.promql import DASHBOARD, documented_metrics, metrics_of

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/holdfast"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECTION = (ROOT / "docs/operating.md").read_text().split("\n## Kubernetes\n")[1].split("\n## ")[0]
yaml = YAML(typ="safe")
VALUES: dict[str, Any] = yaml.load(CHART / "values.yaml")

HELM = """
import json, sys
import helm_python as helm
folder = sys.argv[1]
def rendered(values):
    try:
        return chart.render(values, name="holdfast", namespace="credits")
    except helm.HelmError as error:
        return str(error)
with helm.Chart.load(folder) as chart:
    result = {"lint": helm.lint(folder, strict=True), "rendered": [rendered(case) for case in json.load(sys.stdin)]}
json.dump(result, sys.stdout)
"""

EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example.com/holdfast", "digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "migrate": {"roles": False},
    "worker": {"taskEvents": True, "scaling": {"enabled": True, "prometheus": "http://prometheus:9090"}},
    "api": {
        "jwtAudience": "credits",
        "jwtIssuer": "https://id.example.com",
        "productName": "A: 'product'",
        "buyCreditsUrl": "https://shop.example.com/credits?of=acme",
    },
    "traces": {"endpoint": "http://collector:4318"},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "podAnnotations": {"example.com/team": "billing"},
    "nodeSelector": {"kubernetes.io/arch": "amd64"},
    "tolerations": [{"key": "only", "operator": "Exists"}],
}
WRONG: dict[str, dict[str, Any]] = {
    "additional properties 'wroker' not allowed": {"wroker": {"replicas": 2}},
    "/worker/scaling/prometheus": {"worker": {"scaling": {"enabled": True}}},
    "/worker/replicas": {"worker": {"replicas": 0}},
    "/worker/scaling/minReplicas": {"worker": {"scaling": {"minReplicas": 0}}},
    "/image/digest": {"image": {"digest": "sha256:1"}},
    "/secrets/api": {"secrets": {"api": ""}},
    "/api/productName": {"api": {"productName": "x" * (MAX_PRODUCT_NAME + 1)}},
    "/verify/schedule": {"verify": {"schedule": "daily"}},
}
CASES = [{}, EVERYTHING, *WRONG.values()]

PARTS = ["migrate", "worker", "beat", "api"]
"""As the services of Compose are called."""
PODS = [*PARTS, "verify"]
LONG_RUNNING = ["worker", "beat", "api"]


@cache
def from_helm() -> dict[str, Any]:
    command = [sys.executable, "-c", HELM, str(CHART)]
    ended = subprocess.run(command, input=json.dumps(CASES), capture_output=True, text=True, check=True)
    return cast(dict[str, Any], json.loads(ended.stdout))


@cache
def objects(case: int) -> dict[tuple[str, str], dict[str, Any]]:
    """What is rendered, by kind and name without the release's."""
    files = from_helm()["rendered"][case]
    assert isinstance(files, dict), files
    found = [
        one
        for name, text in sorted(files.items())
        if name.endswith(".yaml")
        for one in yaml.load_all(text)
        if one is not None
    ]
    named = {(one["kind"], one["metadata"]["name"].removeprefix("holdfast").lstrip("-")): one for one in found}
    assert len(named) == len(found)
    return named


PLAIN, FULL = 0, 1
each_case = pytest.mark.parametrize("case", [PLAIN, FULL], ids=["plain", "everything"])


def pod(part: str, case: int = PLAIN) -> dict[str, Any]:
    """The template of the pods of a part."""
    [found] = [
        one for (kind, name), one in objects(case).items() if name == part and kind in ("Deployment", "Job", "CronJob")
    ]
    spec = found["spec"]["jobTemplate"]["spec"] if found["kind"] == "CronJob" else found["spec"]
    return cast(dict[str, Any], spec["template"])


def container(part: str, case: int = PLAIN) -> dict[str, Any]:
    [only] = pod(part, case)["spec"]["containers"]
    return cast(dict[str, Any], only)


def given(part: str, case: int = PLAIN) -> dict[str, dict[str, Any]]:
    """The environment variables of a part."""
    variables = {one["name"]: one for one in container(part, case)["env"]}
    assert len(variables) == len(container(part, case)["env"])
    return variables


def required(part: str) -> set[str]:
    """The settings without which its pods do not start."""
    return {
        name
        for name, one in given(part).items()
        if name.startswith(PREFIX) and not one.get("valueFrom", {}).get("secretKeyRef", {}).get("optional")
    }


# The chart as a whole


def test_helm_finds_nothing_wrong() -> None:
    lint = from_helm()["lint"]
    assert (lint["total_charts_linted"], lint["errors"]) == (1, [])
    assert [message["error"] for message in lint["messages"]] == ["icon is recommended"]


OLDEST = yaml.load(CHART / "Chart.yaml")["kubeVersion"].removeprefix(">=")


@pytest.mark.parametrize(("case", "version"), [(PLAIN, kubernetes_validate.latest_version()), (FULL, OLDEST)])
def test_kubernetes_knows_every_field_in_the_oldest_and_in_the_newest_version(case: int, version: str) -> None:
    elsewhere = ("keda.sh/", "monitoring.coreos.com/")
    ours = [one for one in objects(case).values() if not one["apiVersion"].startswith(elsewhere)]
    assert len(ours) >= 8
    for one in ours:
        used = kubernetes_validate.validate(one, version, strict=True)
        assert version.startswith(used), "an older schema was used"


def test_a_field_that_kubernetes_does_not_know_is_found() -> None:
    wrong = json.loads(json.dumps(objects(PLAIN)["Deployment", "worker"]))
    wrong["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_these_are_installed_and_neither_a_secret_nor_a_server() -> None:
    assert set(objects(PLAIN)) == {
        ("Job", "migrate"),
        *(("Deployment", part) for part in LONG_RUNNING),
        *(("PodDisruptionBudget", part) for part in ("worker", "api")),
        ("Service", "api"),
        ("CronJob", "verify"),
    }
    assert set(objects(FULL)) - set(objects(PLAIN)) == {
        ("ScaledObject", "worker"),
        ("ServiceMonitor", "api"),
        ("PodMonitor", "worker"),
        ("PrometheusRule", ""),
        ("ConfigMap", "dashboard"),
    }
    assert "dependencies" not in yaml.load(CHART / "Chart.yaml")


@pytest.mark.parametrize("where", WRONG)
def test_a_wrong_value_is_refused_with_its_place(where: str) -> None:
    refusal = from_helm()["rendered"][CASES.index(WRONG[where])]
    assert isinstance(refusal, str)
    assert where in refusal


def paths(tree: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, branch in tree.items():
        if isinstance(branch, dict) and branch and name not in ("resources", "dashboardLabels"):
            yield from paths(branch, f"{path}/{name}")
        else:
            yield f"{path}/{name}"


def test_the_schema_has_exactly_the_values_that_there_are() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def described(part: dict[str, Any], path: str = "") -> Iterator[str]:
        assert part["additionalProperties"] is False
        for name, branch in part["properties"].items():
            if "properties" in branch:
                yield from described(branch, f"{path}/{name}")
            else:
                yield f"{path}/{name}"

    # Helm itself adds `global`.
    assert set(described(schema)) == {*paths(VALUES), "/global"}
    assert schema["properties"]["api"]["properties"]["productName"]["maxLength"] == MAX_PRODUCT_NAME


def test_the_image_is_that_of_this_version_and_the_same_everywhere() -> None:
    assert yaml.load(CHART / "Chart.yaml")["appVersion"] == PROJECT["version"]
    assert {container(part)["image"] for part in PODS} == {f"holdfast:{PROJECT['version']}"}
    pinned = f"registry.example.com/holdfast@sha256:{'0' * 64}"
    assert {container(part, FULL)["image"] for part in PODS} == {pinned}
    assert {service["image"] for name, service in SERVICES.items() if name in PARTS} == {
        f"holdfast:{PROJECT['version']}"
    }


# Settings


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_given_the_settings_that_it_has_in_compose(part: str) -> None:
    in_compose = set(SERVICES[part]["environment"])
    # What needs a Redis beside RabbitMQ, which Compose does not have.
    assert set(given(part, FULL)) - {"HOLDFAST_RESULT_URL"} == in_compose
    assert ("HOLDFAST_RESULT_URL" in given(part)) == ("HOLDFAST_BROKER_URL" in in_compose)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("migrate", {"DATABASE_URL"}),
        ("worker", {"DATABASE_URL", "BROKER_URL", "METRICS_ADDRESS", "SHARD_CONNECTIONS"}),
        ("beat", {"DATABASE_URL", "BROKER_URL"}),
        ("api", {"DATABASE_URL", "BROKER_URL"}),  # and one of the two keys, which the program itself demands
        ("verify", {"DATABASE_URL"}),
    ],
)
def test_a_pod_needs_of_its_secret_what_its_program_needs(part: str, names: set[str]) -> None:
    assert required(part) == {f"{PREFIX}{name}" for name in names}


def test_every_setting_is_given_to_a_part_or_is_for_none() -> None:
    for_none = {"HOLDFAST_ENGINE_BROKER_URL", "HOLDFAST_DATA_DIR"}
    names = {name for part in PODS for name in given(part, FULL) if name.startswith(PREFIX)}
    assert names | for_none == {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert not names & for_none


def test_every_secret_comes_from_a_secret_that_is_there_under_the_name_of_its_setting() -> None:
    secrets = {"migrate": "migrate", "worker": "worker", "beat": "worker", "api": "api", "verify": "api"}
    for part, secret in secrets.items():
        for name, one in given(part, FULL).items():
            if re.search("URL|SECRET|KEY", name) and name != "HOLDFAST_BUY_CREDITS_URL":
                reference = one["valueFrom"]["secretKeyRef"]
                assert (reference["name"], reference["key"]) == (VALUES["secrets"][secret], name)
            else:
                assert set(one) == {"name", "value"}


def test_what_is_written_in_the_values_is_a_setting_that_the_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not {
        "HOLDFAST_JWT_AUDIENCE",
        "HOLDFAST_JWT_ISSUER",
        "HOLDFAST_PRODUCT_NAME",
        "HOLDFAST_BUY_CREDITS_URL",
    } & set(given("api"))
    for part in ("worker", "api"):
        for name, one in given(part, FULL).items():
            if "value" in one:
                monkeypatch.setenv(name, one["value"])
    settings = Settings.load()
    assert settings.metrics_address == SERVICES["worker"]["environment"]["HOLDFAST_METRICS_ADDRESS"]
    taken = settings.jwt_audience, settings.jwt_issuer, settings.product_name, settings.buy_credits_url
    assert list(taken) == list(EVERYTHING["api"].values())


# Commands and probes


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_the_command_that_it_runs_in_compose(part: str) -> None:
    assert container(part)["command"] == SERVICES[part]["command"]


def test_the_roles_are_left_alone_where_there_is_only_one_and_the_check_is_a_command() -> None:
    assert container("migrate", FULL)["command"] == ["holdfast", "migrate"]
    assert container("verify")["command"] == ["holdfast", "verify"]


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


@pytest.mark.parametrize("part", LONG_RUNNING)
def test_a_part_is_given_the_time_that_it_has_in_compose_to_stop(part: str) -> None:
    assert pod(part)["spec"]["terminationGracePeriodSeconds"] == seconds(SERVICES[part]["stop_grace_period"])


def test_the_api_ends_in_the_time_that_it_has_also_when_it_first_waits() -> None:
    command, waits = container("api")["command"], container("api")["lifecycle"]["preStop"]["exec"]["command"]
    graceful = int(command[command.index("--timeout-graceful-shutdown") + 1])
    assert waits[0] == "sleep"
    assert int(waits[1]) + graceful < pod("api")["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("part", LONG_RUNNING)
def test_a_probe_ends_before_the_next_begins_and_never_decides_alone(part: str) -> None:
    for probe in (container(part)["livenessProbe"], container(part)["readinessProbe"]):
        assert probe["timeoutSeconds"] < probe["periodSeconds"]
        assert probe["failureThreshold"] >= 3


def test_the_api_is_asked_at_paths_that_it_has_on_the_port_that_it_listens_on() -> None:
    served = create_app(
        Settings(
            database_url="postgresql+psycopg://holdfast_reader@127.0.0.1:1/holdfast",
            broker_url="redis://127.0.0.1:1/0",
            jwt_secret="0123456789abcdef" * 4,
        )
    ).openapi()["paths"]
    api = container("api")
    probes = [api[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")]
    assert [probe["path"] for probe in probes] == ["/healthz", "/readyz"]
    assert {*(probe["path"] for probe in probes), "/metrics"} <= set(served)
    [port] = api["ports"]
    assert str(port["containerPort"]) == api["command"][api["command"].index("--port") + 1]
    assert {probe["port"] for probe in probes} == {port["name"]}
    [published] = objects(PLAIN)["Service", "api"]["spec"]["ports"]
    assert (published["port"], published["targetPort"]) == (port["containerPort"], port["name"])


def test_a_worker_is_ready_as_it_is_healthy_in_compose_and_alive_while_its_process_answers() -> None:
    worker = container("worker")
    kind, *command = SERVICES["worker"]["healthcheck"]["test"]
    assert kind == "CMD"
    assert worker["readinessProbe"]["exec"]["command"] == command
    assert worker["readinessProbe"]["timeoutSeconds"] == seconds(SERVICES["worker"]["healthcheck"]["timeout"])
    [port] = worker["ports"]
    assert given("worker")["HOLDFAST_METRICS_ADDRESS"]["value"] == f"0.0.0.0:{port['containerPort']}"
    assert worker["livenessProbe"]["httpGet"] == {"path": "/metrics", "port": port["name"]}


@pytest.mark.parametrize("url", ["redis://{}/0", "amqp://user:password@nowhere.invalid:1//;amqp://user:password@{}//"])
def test_the_beat_is_well_as_long_as_it_has_a_connection_to_a_broker(url: str) -> None:
    probes = [container("beat")[name]["exec"]["command"] for name in ("livenessProbe", "readinessProbe")]
    assert probes[0] == probes[1]
    python, *program = probes[0]
    assert python == "python"
    with socket.create_server(("127.0.0.1", 0)) as broker:
        host, port = broker.getsockname()
        environment = {"HOLDFAST_BROKER_URL": url.format(f"{host}:{port}")}
        with socket.create_connection((host, port)):
            assert subprocess.run([sys.executable, *program], env=environment).returncode == 0
        unconnected = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True)
    assert (unconnected.returncode, unconnected.stderr) == (1, "the beat is not connected to the broker\n")


@pytest.mark.parametrize(
    ("url", "port"),
    [("redis://broker/0", 6379), ("rediss://broker/0", 6379), ("amqp://broker//", 5672), ("amqps://broker//", 5671)],
)
def test_the_beats_probe_knows_the_port_of_a_broker_whose_url_has_none(url: str, port: int) -> None:
    program = container("beat")["livenessProbe"]["exec"]["command"][-1]
    asked = program[: program.index("open_to")] + "print(ports)"
    command = [sys.executable, "-c", asked]
    shown = subprocess.run(command, env={"HOLDFAST_BROKER_URL": url}, capture_output=True, text=True, check=True)
    assert shown.stdout == f"{{{port}}}\n"


# How they run


@each_case
@pytest.mark.parametrize("part", PODS)
def test_every_pod_runs_with_no_right_that_it_does_not_need(part: str, case: int) -> None:
    spec = pod(part, case)["spec"]
    user, group = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[0]
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user),
        "runAsGroup": int(group),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(part, case)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert not {"serviceAccountName", "hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    assert container(part, case)["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]


@pytest.mark.parametrize("part", PODS)
def test_every_pod_has_resources_and_a_limit_of_memory_alone(part: str) -> None:
    resources = container(part)["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert set(resources["limits"]) == {"memory"}, "a limit of processors slows down what nobody else needs them for"


@pytest.mark.parametrize("part", PODS)
def test_what_is_for_every_pod_reaches_each(part: str) -> None:
    template = pod(part, FULL)
    assert template["metadata"]["annotations"] == EVERYTHING["podAnnotations"]
    for name in ("imagePullSecrets", "nodeSelector", "tolerations"):
        assert template["spec"][name] == EVERYTHING[name]


def test_the_migration_runs_before_everything_else_and_needs_nothing_of_the_chart() -> None:
    job = objects(PLAIN)["Job", "migrate"]
    assert job["metadata"]["annotations"] == {
        "helm.sh/hook": "pre-install,pre-upgrade",
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
    }
    assert [one for one in objects(PLAIN).values() if "annotations" in one["metadata"]] == [job]
    assert pod("migrate")["spec"]["restartPolicy"] == "Never"


def test_there_is_one_beat_which_ends_before_the_next_begins() -> None:
    spec = objects(FULL)["Deployment", "beat"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def labels_of(part: str) -> set[tuple[str, str]]:
    return set(pod(part)["metadata"]["labels"].items())


def selected(labels: dict[str, str]) -> list[str]:
    return [part for part in PODS if set(labels.items()) <= labels_of(part)]


def test_whatever_selects_pods_selects_those_of_its_own_part() -> None:
    selectors = [
        (name, one["spec"]["selector"].get("matchLabels", one["spec"]["selector"]))
        for (kind, name), one in objects(FULL).items()
        if kind in ("Deployment", "PodDisruptionBudget", "Service", "PodMonitor")
    ]
    assert len(selectors) == 7
    for name, labels in selectors:
        assert selected(labels) == [name]
    for part in ("worker", "api"):
        [spread] = pod(part)["spec"]["topologySpreadConstraints"]
        assert selected(spread["labelSelector"]["matchLabels"]) == [part]


def test_a_node_can_always_be_emptied() -> None:
    for part in ("worker", "api"):
        assert objects(PLAIN)["PodDisruptionBudget", part]["spec"]["maxUnavailable"] == 1


# Scaling and monitoring


def test_workers_are_scaled_by_the_age_of_the_oldest_message_and_by_the_queue_and_at_least_one_runs() -> None:
    assert objects(PLAIN)["Deployment", "worker"]["spec"]["replicas"] == VALUES["worker"]["replicas"]
    assert "replicas" not in objects(FULL)["Deployment", "worker"]["spec"], "an update would undo the scaling"
    spec = objects(FULL)["ScaledObject", "worker"]["spec"]
    assert spec["scaleTargetRef"] == {"name": objects(FULL)["Deployment", "worker"]["metadata"]["name"]}
    assert spec["minReplicaCount"] == 1
    assert spec["fallback"]["replicas"] == VALUES["worker"]["replicas"]
    queries = [trigger["metadata"]["query"] for trigger in spec["triggers"]]
    assert [metrics_of(query) for query in queries] == [
        {"holdfast_queue_oldest_message_age_seconds"},
        {"holdfast_queue_messages"},
    ]
    for trigger, query in zip(spec["triggers"], queries, strict=True):
        assert metrics_of(query) <= set(documented_metrics())
        assert 'namespace="credits"' in query
        assert trigger["metadata"]["serverAddress"] == EVERYTHING["worker"]["scaling"]["prometheus"]
        assert int(trigger["metadata"]["threshold"]) > 0, "KEDA reads a number in a text"


def test_prometheus_scrapes_the_api_and_every_worker() -> None:
    [endpoint] = objects(FULL)["ServiceMonitor", "api"]["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    service = objects(FULL)["Service", "api"]
    wanted = objects(FULL)["ServiceMonitor", "api"]["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    [endpoint] = objects(FULL)["PodMonitor", "worker"]["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in {port["name"] for port in container("worker", FULL)["ports"]}
    for kind, name in (("ServiceMonitor", "api"), ("PodMonitor", "worker"), ("PrometheusRule", "")):
        assert objects(FULL)[kind, name]["metadata"]["labels"]["release"] == "prometheus"


def test_the_alerts_and_the_dashboard_are_those_of_their_folders() -> None:
    rules = yaml.load(ROOT / "deploy/prometheus/holdfast.rules.yml")
    assert objects(FULL)["PrometheusRule", ""]["spec"] == rules
    assert json.loads(objects(FULL)["ConfigMap", "dashboard"]["data"]["holdfast.json"]) == DASHBOARD
    for file in (CHART / "files").iterdir():
        assert file.is_symlink(), "a copy would grow old"


# The documents


def test_the_notes_and_the_page_name_what_there_is() -> None:
    notes = from_helm()["rendered"][PLAIN]["holdfast/templates/NOTES.txt"]
    assert len(notes.splitlines()) < 15
    for text in (notes, SECTION):
        for name in re.findall(r"deployment/holdfast-(\w+)", text):
            assert ("Deployment", name) in objects(PLAIN)
        for name in re.findall(r"Service `?holdfast-(\w+)", text):
            assert ("Service", name) in objects(PLAIN)
        assert "-- holdfast verify" in text


PLACEHOLDER = "64_RANDOM_HEXADECIMAL_DIGITS"  # which is refused, as it is too short


def test_the_commands_of_the_page_make_the_secrets_that_the_chart_needs_and_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        name: dict(line.replace(PLACEHOLDER, SECRETS["HOLDFAST_JWT_SECRET"]).split("=", 1) for line in text.split())
        for name, text in re.findall(r"^# (\w+\.env)\n(.*?)(?=^#|^```)", SECTION, re.M | re.S)
    }
    [script] = re.findall(r"^```shell\n(.*?)^```$", SECTION, re.M | re.S)
    *creates, install, verify = map(shlex.split, script.splitlines())
    made = {words[4]: files[words[5].removeprefix("--from-env-file=")] for words in creates}
    assert all(words[:4] == ["kubectl", "create", "secret", "generic"] for words in creates)
    assert list(made) == list(VALUES["secrets"].values())
    for part, secret in (("migrate", "migrate"), ("worker", "worker"), ("beat", "worker"), ("verify", "api")):
        from_secret = {name for name in required(part) if "valueFrom" in given(part)[name]}
        assert from_secret <= set(made[VALUES["secrets"][secret]])
    assert set(made[VALUES["secrets"]["api"]]) == {*required("api"), "HOLDFAST_JWT_SECRET"}
    for settings, role in zip(made.values(), ("holdfast", roles.WORKER, roles.READER), strict=True):
        with monkeypatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(name, value)
            assert urlsplit(Settings.load().database_url).username == role
    [instead] = re.findall(r"^  ```text\n(.*?)^  ```$", SECTION, re.M | re.S)
    with_rabbitmq = dict(line.split("=", 1) for line in instead.split())
    assert set(with_rabbitmq) <= set(given("worker")) & set(given("api"))
    with monkeypatch.context() as environment:
        for name, value in (made[VALUES["secrets"]["worker"]] | with_rabbitmq).items():
            environment.setenv(name, value)
        assert str(Settings.load().broker_url).count(";") == 2
    assert install[:5] == ["helm", "upgrade", "--install", "holdfast", str(CHART.relative_to(ROOT))]
    assert {option.partition("=")[0] for option in install[5:]} == {"--set", "--timeout"}
    [place] = [option.split("=")[1] for option in install if option.startswith("--set=")]
    assert f"/{place.replace('.', '/')}" in set(paths(VALUES))
    assert verify[:2] == ["kubectl", "exec"]
