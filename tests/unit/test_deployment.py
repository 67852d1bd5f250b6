"""docker-compose.yml and Dockerfile name only what there is: commands, ports, settings, files.

There is no Docker where these tests run: nothing is built or started. What a health check or a service's script does is
run here without its container; the file as a whole is held against the schema of the Compose specification.
"""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
import typer
import uvicorn
from celery.app.utils import find_app
from celery.bin.celery import celery as celery_command
from packaging.utils import canonicalize_name
from uvicorn.importer import import_from_string

from api_stub.protocol import PromptProtocol
from ledger import roles
from ledger.settings import PREFIX, Settings
from tests.compose import (
    COMPOSE,
    COMPOSE_TEXT,
    DEFAULTS,
    OPTIONAL,
    RABBITMQ_FILE,
    RABBITMQ_SECRETS,
    RABBITMQ_SERVICES,
    SECRETS,
    SERVICES,
    VARIABLE,
    environment,
    interpolated,
    with_program,
)
from tests.packages import what_runs
from worker import cli
from worker.local.broker import BROKER_USERS
from worker.local.postgres import INITDB_OPTIONS, POSTGRES_MAJOR
from worker.local.system import API_OPTIONS

ROOT = Path(__file__).parents[2]
LONG_RUNNING = ["postgres", "broker", "worker", "beat", "api"]
OURS = ["migrate", "worker", "beat", "api"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPLOYING = (ROOT / "README.md").read_text().split("\n## Deploying\n")[1].split("\n## ")[0]
VARIABLES = (ROOT / "docs/operating.md").read_text().split("\n## Variables of Compose\n")[1].split("\n## ")[0]

# Every instruction of the Dockerfile: its name and the rest of its line.
INSTRUCTIONS: list[tuple[str, str]] = [
    (name, rest.strip())
    for name, _, rest in (
        line.partition(" ")
        for line in re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text()).splitlines()
        if line and not line.startswith("#")
    )
]


def instructions(name: str) -> list[str]:
    return [rest for found, rest in INSTRUCTIONS if found == name]


def health_check(service: str) -> list[str]:
    """The health check as an argument vector."""
    kind, *rest = [interpolated(word) for word in SERVICES[service]["healthcheck"]["test"]]
    return {"CMD": rest, "CMD-SHELL": ["sh", "-c", *rest]}[kind]


def seconds(duration: str) -> int:
    number, unit = int(duration[:-1]), duration[-1]
    return number * {"s": 1, "m": 60}[unit]


class Command(Protocol):
    """Of click, or of the click inside typer."""

    @property
    def params(self) -> Sequence[Any]: ...


def unknown_options(command: Command, words: list[str]) -> list[str]:
    known = {option for parameter in command.params for option in parameter.opts}
    return [word for word in words if word.startswith("-") and word not in known]


@pytest.fixture
def service_settings(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """Call it with a service: from then on the settings are the ones that it is given."""
    for variable in os.environ:
        if variable.startswith(PREFIX):
            monkeypatch.delenv(variable)

    def apply(service: str) -> Settings:
        for name, value in environment(service).items():
            monkeypatch.setenv(name, value)
        return Settings.load()

    return apply


# The file as a whole


def test_the_compose_files_are_valid_by_the_schema_of_the_specification() -> None:
    # The schema is part of check-jsonschema: nothing is fetched.
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    files = [str(ROOT / "docker-compose.yml"), str(RABBITMQ_FILE)]
    checked = subprocess.run([*command, *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_docker_compose_itself_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("there is no Docker Compose here")
    # The checkout may have an .env, which Compose would read.
    options = ["--env-file", os.devnull, "--file", str(ROOT / "docker-compose.yml")]
    command = [docker, "compose", *options, "config", "--quiet"]
    accepted = subprocess.run(command, env={**os.environ, **SECRETS}, capture_output=True, text=True)
    assert accepted.returncode == 0, accepted.stderr
    refused = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert refused.returncode != 0, "it starts without secrets"


def test_there_are_these_services() -> None:
    assert list(SERVICES) == ["postgres", "broker", "database", "migrate", "worker", "beat", "api"]


# A cluster of RabbitMQ

NODES = ["mq-1", "mq-2", "mq-3"]
WITH_BROKER = ["worker", "beat", "api"]
WITH_THREE_NODES = (ROOT / "docs/reliability.md").read_text().split("\n## RabbitMQ with three nodes\n")[1]


@pytest.fixture
def with_rabbitmq(
    monkeypatch: pytest.MonkeyPatch, service_settings: Callable[[str], Settings]
) -> Callable[[str], Settings]:
    """The same as `service_settings`, with the second file."""

    def apply(service: str) -> Settings:
        service_settings(service)
        for name, value in environment(service, with_rabbitmq=True).items():
            monkeypatch.setenv(name, value)
        return Settings.load()

    return apply


def test_beside_the_compose_file_there_are_three_nodes_and_who_uses_them() -> None:
    assert list(RABBITMQ_SERVICES) == [*NODES, *WITH_BROKER]
    for node in NODES:
        assert RABBITMQ_SERVICES[node]["hostname"] == node
        assert f"rabbit@{node}" in RABBITMQ_SERVICES[node]["command"][0]
        assert f"{node}:/var/lib/rabbitmq" in RABBITMQ_SERVICES[node]["volumes"]
        assert re.fullmatch(r"rabbitmq:\d+\.\d+\.\d+", RABBITMQ_SERVICES[node]["image"])
    for name in ("init", "read_only", "cap_drop", "security_opt", "logging", "pids_limit"):
        assert RABBITMQ_SERVICES["mq-1"][name] == SERVICES["broker"][name], "as every other service"
    for service in WITH_BROKER:
        assert set(RABBITMQ_SERVICES[service]) <= {"environment", "depends_on", "healthcheck"}
        assert RABBITMQ_SERVICES[service]["depends_on"] == {node: {"condition": "service_healthy"} for node in NODES}


@pytest.mark.parametrize("service", WITH_BROKER)
def test_who_uses_the_broker_is_given_the_nodes_and_where_answers_are(
    service: str, with_rabbitmq: Callable[[str], Settings]
) -> None:
    settings = with_rabbitmq(service)
    assert settings.broker_url is not None
    assert settings.result_url is not None
    urls = [urlsplit(url) for url in settings.broker_url.split(";")]
    password = environment("mq-1", with_rabbitmq=True)["RABBITMQ_PASSWORD"]
    assert [(url.scheme, url.username, url.password, url.hostname, url.path) for url in urls] == [
        ("amqp", "holdfast", password, node, "//") for node in NODES
    ]
    assert settings.result_url == environment("worker")["HOLDFAST_BROKER_URL"]


def test_the_beat_with_rabbitmq_is_asked_for_its_connection_to_rabbitmq() -> None:
    ours, theirs = [RABBITMQ_SERVICES["beat"]["healthcheck"]["test"], SERVICES["beat"]["healthcheck"]["test"]]
    assert ours == [word.replace("6379", "5672") for word in theirs]


def test_the_secrets_of_rabbitmq_are_required_and_the_documents_make_them() -> None:
    text = RABBITMQ_FILE.read_text()
    told = {(name, rest) for name, rest in VARIABLE.findall(text) if rest}
    why = ':?see "RabbitMQ with three nodes" in docs/reliability.md'
    assert told == {*((name, why) for name in RABBITMQ_SECRETS), ("PIDS_LIMIT", ":-512")}
    [names] = re.findall(r"^for name in ([^;]*); do$", WITH_THREE_NODES, re.MULTILINE)
    assert names.split() == list(RABBITMQ_SECRETS)
    assert f"--file {RABBITMQ_FILE.relative_to(ROOT)}" in WITH_THREE_NODES


def test_the_documents_tell_what_every_node_has() -> None:
    configuration = (ROOT / "deploy/rabbitmq/cluster.conf").read_text()
    for setting in re.findall(r"^\w+ = \w+$", configuration, re.MULTILINE):
        assert f"`{setting}`" in WITH_THREE_NODES
    [term] = re.findall(r"^\[.*\]\.$", (ROOT / "deploy/rabbitmq/advanced.config").read_text(), re.MULTILINE)
    assert f"`{term}`" in WITH_THREE_NODES


# Secrets


def test_every_secret_is_required_and_none_has_a_default() -> None:
    variables = VARIABLE.findall(COMPOSE_TEXT)
    assert {name for name, _ in variables} == {*SECRETS, *OPTIONAL, *DEFAULTS}
    assert {rest for name, rest in variables if name in SECRETS} == {':?see "Deploying" in README.md'}
    assert {rest for name, rest in variables if name in OPTIONAL} == {":-"}
    assert {(name, rest) for name, rest in variables if name in DEFAULTS} == {
        (name, f":-{default}") for name, default in DEFAULTS.items()
    }


def test_no_secret_is_written_in_the_file() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH", name):
                assert VARIABLE.fullmatch(value), name
    for url in re.findall(r"://\S+", COMPOSE_TEXT):
        assert "@" not in url or re.search(r":\$\{\w+$", url.split(":?")[0]), url


def test_the_documents_tell_every_variable_and_how_to_make_them() -> None:
    for name in (*SECRETS, *OPTIONAL):
        assert f"`{name}`" in VARIABLES
    for name, default in DEFAULTS.items():
        assert re.search(rf"^\| .*`{name}`.*default: {default}\b", VARIABLES, re.MULTILINE)
    [names] = re.findall(r"^ *for name in ([^;]*); do$", DEPLOYING, re.MULTILINE)
    assert names.replace("\\\n", "").split() == list(SECRETS)


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_secrets_are_made_with_what_every_system_has_and_never_again(shell: str, tmp_path: Path) -> None:
    [snippet] = re.findall(r"^\( umask .*? > \.env \)$", DEPLOYING, re.MULTILINE | re.DOTALL)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("od", "tr"):
        (programs / name).symlink_to(str(shutil.which(name)))
    command, env = [str(shutil.which(shell)), "-c", snippet], {"PATH": str(programs)}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    made = (tmp_path / ".env").read_text()
    secrets = dict(line.split("=") for line in made.splitlines())
    assert list(secrets) == list(SECRETS)
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in secrets.values())
    assert len(set(secrets.values())) == len(SECRETS)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert again.returncode != 0
    assert (tmp_path / ".env").read_text() == made


def test_the_readme_names_services_and_commands_that_exist() -> None:
    assert set(re.findall(r"--scale (\w+)=", DEPLOYING)) == {"worker"}
    assert re.findall(r"^docker compose exec (\w+) holdfast (\w+)$", DEPLOYING, re.MULTILINE) == [("api", "verify")]
    assert "`holdfast_engines`" in DEPLOYING
    assert COMPOSE["name"] == "holdfast"


def test_an_update_migrates_first_and_replaces_nothing_if_that_fails() -> None:
    [update] = [block for block in re.findall(r"^```shell\n(.*?)^```$", DEPLOYING, re.M | re.S) if "git pull" in block]
    assert [step.split() for step in update.split("&&")] == [
        ["git", "pull"],
        ["docker", "compose", "build"],
        ["docker", "compose", "run", "--rm", "migrate"],
        ["docker", "compose", "up", "--detach", "--wait", "--scale", "worker=2"],
    ]


def test_the_file_of_secrets_reaches_neither_git_nor_the_image() -> None:
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert allowed_in_the_build() == {"requirements.txt", "pyproject.toml", "client", "ledger", "worker", "api_stub"}


# Settings


@pytest.mark.parametrize(
    ("service", "names"),
    [
        ("migrate", ["HOLDFAST_DATABASE_URL"]),
        (
            "worker",
            [
                "HOLDFAST_DATABASE_URL",
                "HOLDFAST_BROKER_URL",
                "HOLDFAST_METRICS_ADDRESS",
                "HOLDFAST_SHARD_CONNECTIONS",
            ],
        ),
        ("beat", ["HOLDFAST_DATABASE_URL", "HOLDFAST_BROKER_URL"]),
        ("api", ["HOLDFAST_DATABASE_URL", "HOLDFAST_BROKER_URL", "HOLDFAST_JWT_SECRET"]),
    ],
)
def test_a_service_is_given_the_settings_it_needs_and_no_secret_more(
    service: str, names: list[str], service_settings: Callable[[str], Settings]
) -> None:
    given_names = [name for name in environment(service) if name.startswith(PREFIX)]
    assert sorted(given_names) == sorted([*names, *(OPTIONAL if service == "api" else [])])
    settings = service_settings(service)
    given = {f"{PREFIX}{field.upper()}" for field in settings.model_fields_set if getattr(settings, field) is not None}
    assert given == set(names)


def test_every_setting_is_given_to_a_service_or_is_for_none() -> None:
    given = {name for service in SERVICES for name in environment(service) if name.startswith(PREFIX)}
    given |= {name for name in environment("worker", with_rabbitmq=True) if name.startswith(PREFIX)}
    for_none = {"HOLDFAST_ENGINE_BROKER_URL", "HOLDFAST_DATA_DIR"}
    assert given | for_none == {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_api_is_given_what_is_optional_where_it_is_set(
    name: str, service_settings: Callable[[str], Settings]
) -> None:
    assert SERVICES["api"]["environment"][name] == f"${{{name}:-}}"
    field = name.removeprefix(PREFIX).lower()
    assert getattr(service_settings("api"), field) is None, "an empty variable is as good as none"


def test_every_worker_serves_its_figures_within_the_network_alone(service_settings: Callable[[str], Settings]) -> None:
    address = service_settings("worker").metrics_address
    assert address is not None
    host, port = address.split(":")
    assert host == "0.0.0.0", "a container's own loopback is nobody else's"
    assert SERVICES["worker"]["expose"] == [str(port)]
    assert "ports" not in SERVICES["worker"]
    operating = (ROOT / "README.md").read_text().split("\n## Operating\n")[1].split("\n## ")[0]
    assert f"port {port} of every" in operating
    assert "`holdfast_engines`" in operating


@pytest.mark.parametrize(
    ("service", "role", "password"),
    [
        ("migrate", "holdfast", "DATABASE_PASSWORD"),
        ("worker", roles.WORKER, "WORKER_DATABASE_PASSWORD"),
        ("beat", roles.WORKER, "WORKER_DATABASE_PASSWORD"),
        ("api", roles.READER, "READER_DATABASE_PASSWORD"),
    ],
)
def test_every_service_connects_as_the_role_that_it_needs(
    service: str, role: str, password: str, service_settings: Callable[[str], Settings]
) -> None:
    database = urlsplit(service_settings(service).database_url)
    assert (database.hostname, database.port, database.path) == ("postgres", 5432, "/holdfast")
    assert (database.username, database.password) == (role, environment("database")[password])


def test_the_settings_lead_to_the_broker_with_its_password(service_settings: Callable[[str], Settings]) -> None:
    settings = service_settings("worker")
    broker = urlsplit(settings.broker_url)
    assert (broker.hostname, broker.port, broker.path) == ("broker", 6379, "/0")
    assert (broker.username, broker.password) == ("holdfast", environment("broker")["BROKER_PASSWORD"])


# Commands


def test_the_migration_is_a_command_of_holdfast() -> None:
    assert SERVICES["migrate"]["command"] == ["holdfast", "migrate", "--roles"]
    assert unknown_options(typer.main.get_group(cli.app).commands["migrate"], ["--roles"]) == []
    assert PROJECT["project"]["scripts"]["holdfast"] == "worker.cli:main"
    assert {"migrate", "verify"} <= set(typer.main.get_group(cli.app).commands)


@pytest.mark.parametrize("service", ["worker", "beat"])
def test_celery_knows_the_command_and_finds_the_app(service: str, service_settings: Callable[[str], Settings]) -> None:
    assert SERVICES[service]["command"] == ["celery", "--quiet", "-A", "worker", service]
    assert service in celery_command.commands
    settings = service_settings(service)
    app = find_app("worker")
    assert app.main == "holdfast"
    assert app.conf.broker_url == settings.broker_url


def test_uvicorn_finds_the_api_and_listens_where_it_is_published(service_settings: Callable[[str], Settings]) -> None:
    program, target, *options = SERVICES["api"]["command"]
    assert (program, target) == ("uvicorn", "api_stub.app:app")
    assert unknown_options(uvicorn.main, options) == []
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert (given["--host"], given["--port"]) == ("0.0.0.0", "8000")
    assert list(map(interpolated, SERVICES["api"]["ports"])) == ["127.0.0.1:8000:8000"]
    assert given.items() >= dict(zip(API_OPTIONS[::2], API_OPTIONS[1::2], strict=True)).items()
    assert import_from_string(given["--http"]) is PromptProtocol
    assert int(given["--timeout-graceful-shutdown"]) < seconds(SERVICES["api"]["stop_grace_period"])
    service_settings("api")
    assert "/readyz" in import_from_string(target).openapi()["paths"]


def test_no_command_goes_through_a_shell_that_would_keep_signals_to_itself() -> None:
    for service in OURS:
        assert isinstance(SERVICES[service]["command"], list)
        assert SERVICES[service]["command"][0] not in ("sh", "bash")
        assert "entrypoint" not in SERVICES[service]
    assert SERVICES["broker"]["command"][0].startswith("exec valkey-server ")


# Health checks


@pytest.mark.parametrize("service", LONG_RUNNING)
def test_every_long_running_service_has_a_health_check_that_ends_before_the_next(service: str) -> None:
    check = SERVICES[service]["healthcheck"]
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert check["retries"] >= 2
    assert "start_period" in check


def test_postgres_is_initialized_as_the_one_that_every_test_runs_on() -> None:
    assert environment("postgres")["POSTGRES_INITDB_ARGS"].split() == list(INITDB_OPTIONS)


def test_postgres_is_not_asked_while_it_initializes_nor_for_what_is_not_there_yet() -> None:
    assert health_check("postgres") == [
        *("pg_isready", "--quiet"),
        "--host=127.0.0.1",  # the server that initializes the volume listens on a socket alone
        *("--username=postgres", "--dbname=postgres"),
    ]


@pytest.mark.parametrize(
    ("answer", "exit_code"),
    [
        ("PONG", 0),
        ("LOADING Valkey is loading the dataset in memory", 1),
        ("NOAUTH Authentication required.", 1),
        ("", 1),
    ],
)
def test_the_broker_is_healthy_when_it_answers_pong(answer: str, exit_code: int, tmp_path: Path) -> None:
    path = with_program("valkey-cli", f'test "$*" = "--user holdfast ping" && echo "{answer}"', tmp_path)
    checked = subprocess.run(health_check("broker"), env={**environment("broker"), "PATH": path}, capture_output=True)
    assert checked.returncode == exit_code
    assert environment("broker")["VALKEYCLI_AUTH"] == SECRETS["BROKER_PASSWORD"]


def test_the_worker_is_asked_by_its_own_name_whether_it_takes_messages() -> None:
    program, command, *options = health_check("worker")
    assert (program, command, options) == ("holdfast", "consuming", ["--wait-s", "10"])
    asking = typer.main.get_group(cli.app).commands[command]
    assert unknown_options(asking, options) == []
    assert asking.params[0].default == f"celery@{socket.gethostname()}", "as Celery names a worker by itself"
    assert seconds(SERVICES["worker"]["healthcheck"]["timeout"]) > 10


def test_the_beat_is_healthy_as_long_as_it_has_a_connection_to_the_broker() -> None:
    python, flag, program = health_check("beat")
    assert (python, flag) == ("python", "-c")
    assert "6379" in program
    with socket.create_server(("127.0.0.1", 0)) as broker:
        port = broker.getsockname()[1]
        probe = [sys.executable, "-c", program.replace("6379", str(port))]
        with socket.create_connection(("127.0.0.1", port)):
            assert subprocess.run(probe).returncode == 0
        unconnected = subprocess.run(probe, capture_output=True, text=True)
    assert (unconnected.returncode, unconnected.stderr) == (1, "the beat is not connected to the broker\n")


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_api_is_healthy_when_it_says_that_it_is_ready(status: int, healthy: bool) -> None:
    asked: list[str] = []

    class Api(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    python, flag, program = health_check("api")
    assert (python, flag) == ("python", "-c")
    assert '("127.0.0.1", 8000, ' in program
    with http.server.HTTPServer(("127.0.0.1", 0), Api) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        probe = [sys.executable, "-c", program.replace(" 8000,", f" {server.server_port},")]
        checked = subprocess.run(probe, capture_output=True)
        server.shutdown()
        thread.join()
    assert (checked.returncode == 0) == healthy
    assert asked == ["/readyz"]


# What the services are made of


def test_every_image_is_pinned_to_a_version_that_the_code_is_for() -> None:
    assert SERVICES["postgres"]["image"].startswith(f"postgres:{POSTGRES_MAJOR}.")
    assert SERVICES["database"]["image"] == SERVICES["postgres"]["image"]
    assert re.fullmatch(r"valkey/valkey:\d+\.\d+\.\d+", SERVICES["broker"]["image"])
    assert {SERVICES[service]["image"] for service in OURS} == {f"holdfast:{PROJECT['project']['version']}"}


def test_our_image_is_built_once_and_never_pulled() -> None:
    assert [name for name, service in SERVICES.items() if "build" in service] == ["migrate"]
    assert {SERVICES[service]["pull_policy"] for service in OURS} == {"never"}


def test_the_broker_keeps_what_it_was_given(tmp_path: Path) -> None:
    service = SERVICES["broker"]
    path = with_program("valkey-server", 'test "$*" = - && exec cat', tmp_path)
    started = subprocess.run(
        [*service["entrypoint"], *map(interpolated, service["command"])],
        env={**environment("broker"), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert started.stderr == ""
    assert started.stdout.splitlines() == [
        f"user default {BROKER_USERS['default']}",
        f"user holdfast on >{SECRETS['BROKER_PASSWORD']} {BROKER_USERS['holdfast']}",
        f"user engine on >{SECRETS['ENGINE_BROKER_PASSWORD']} {BROKER_USERS['engine']}",
        "dir /data",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory 512mb",
        "maxmemory-policy noeviction",
        "client-query-buffer-limit 32mb",
        "client-output-buffer-limit normal 64mb 0 0",
    ]
    assert interpolated(service["mem_limit"]) == "1024m"


def test_data_is_kept_in_named_volumes_where_the_images_have_it() -> None:
    # PostgreSQL's image has its data in a folder of the major version's below this, from 18 on.
    assert SERVICES["postgres"]["volumes"][0] == "postgres:/var/lib/postgresql"
    assert SERVICES["broker"]["volumes"] == ["broker:/data"]
    assert set(COMPOSE["volumes"]) == {"postgres", "broker"}
    for service in ("database", *OURS):
        assert "volumes" not in SERVICES[service]
    assert "/var/lib/postgresql" in SERVICES["database"]["tmpfs"], "else each run leaves a volume of the image's"


def test_nothing_is_read_from_the_checkout_which_the_containers_may_not_be_allowed_to_read() -> None:
    for service in SERVICES.values():
        assert all(re.match(r"\w+:/", volume) for volume in service.get("volumes", []))


# How they run


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_runs_with_no_right_it_does_not_need(service: str) -> None:
    running = SERVICES[service]
    assert running["read_only"] is True
    assert running["cap_drop"] == ["ALL"]
    assert running["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in running.get("tmpfs", []) or service == "broker"
    assert not {"privileged", "cap_add", "container_name", "network_mode", "pid"} & set(running)
    assert service in OURS or running["user"] == running["image"].split(":")[0].split("/")[0]


@pytest.mark.parametrize("service", LONG_RUNNING)
def test_every_long_running_service_has_limits_that_can_be_set(service: str) -> None:
    assert SERVICES[service]["pids_limit"] == "${PIDS_LIMIT:-512}"
    for limit in ("cpus", "mem_limit"):
        [(variable, _)] = VARIABLE.findall(SERVICES[service][limit])
        assert variable.split("_")[0] == service.replace("beat", "worker").upper()


def test_postgres_alone_may_use_the_folder_of_its_socket() -> None:
    assert SERVICES["postgres"]["tmpfs"] == ["/tmp", "/var/run/postgresql:uid=999,gid=999,mode=3775"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_logs_of_every_service_are_bounded(service: str) -> None:
    assert SERVICES[service]["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}


def test_what_is_meant_to_run_is_started_again_and_the_migration_is_not() -> None:
    assert {name: service["restart"] for name, service in SERVICES.items()} == {
        **dict.fromkeys(LONG_RUNNING, "unless-stopped"),
        **dict.fromkeys(["database", "migrate"], "no"),
    }


def test_only_the_api_can_be_reached_and_only_from_this_machine() -> None:
    assert COMPOSE["networks"] == {"backend": {"internal": True}, "engines": {"internal": True}, "frontend": {}}
    assert [name for name, service in SERVICES.items() if "frontend" in service["networks"]] == ["api"]
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert ("ports" in service) == (name == "api")


def test_an_engine_meets_the_broker_and_never_the_database() -> None:
    joined = {name: set(service["networks"]) - {"frontend"} for name, service in SERVICES.items()}
    assert joined == {
        "broker": {"engines"},
        **{name: {"backend"} for name in ("postgres", "database", "migrate")},
        **{name: {"backend", "engines"} for name in ("worker", "beat", "api")},
    }


@pytest.mark.parametrize("service", OURS)
def test_a_service_shares_a_network_with_each_server_that_it_is_told_of(service: str) -> None:
    for name, url in environment(service).items():
        if name.endswith("_URL") and url:
            assert set(SERVICES[service]["networks"]) & set(SERVICES[str(urlsplit(url).hostname)]["networks"])


def test_nothing_starts_before_what_it_needs() -> None:
    assert SERVICES["database"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert SERVICES["migrate"]["depends_on"] == {"database": {"condition": "service_completed_successfully"}}
    for service in ("worker", "beat", "api"):
        assert SERVICES[service]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "broker": {"condition": "service_healthy"},
        }


def test_a_service_is_given_the_time_that_it_needs_to_stop() -> None:
    assert seconds(SERVICES["worker"]["stop_grace_period"]) >= 30  # it needs at most 10
    assert seconds(SERVICES["postgres"]["stop_grace_period"]) >= 90
    assert {name for name in LONG_RUNNING if "stop_grace_period" not in SERVICES[name]} == set()


def test_signals_and_orphans_are_taken_care_of() -> None:
    # PostgreSQL is the first process of its container by intention.
    assert {name: service["init"] for name, service in SERVICES.items()} == {
        "postgres": False,
        **dict.fromkeys(["broker", "database", *OURS], True),
    }


# The image


def allowed_in_the_build() -> set[str]:
    """The names that .dockerignore lets through: it shuts out everything, then lets in."""
    first, *rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    assert rules.pop() == "**/__pycache__"
    return {rule.removeprefix("!") for rule in rules if rule.startswith("!")}


def test_the_image_is_made_of_files_that_exist_and_of_every_package() -> None:
    copied = [words.split()[:-1] for words in instructions("COPY") if not words.startswith("--from=")]
    sources = {source for words in copied for source in words}
    assert sources == allowed_in_the_build()
    assert all((ROOT / source).exists() for source in sources)
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= sources


def test_both_stages_are_of_one_pinned_python_that_holdfast_supports() -> None:
    build, final = instructions("FROM")
    assert build == f"{final} AS build"
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-\w+", final)
    assert version is not None
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert (int(version[1]), int(version[2])) >= (3, 11)


def test_everything_is_installed_from_the_lock_file_by_its_hash() -> None:
    _, install, project, *_ = map(json.loads, instructions("RUN"))
    pip = ["pip", "--python", "/opt/holdfast/bin/python", "install"]
    options = ["--require-hashes", "--only-binary", ":all:", "--requirement", "requirements.txt"]
    assert install == [*pip, *options]
    assert project == [*pip, "--no-deps", "--no-build-isolation", "./client", "."]


def test_only_what_runs_is_in_the_image() -> None:
    [uninstall] = [words for words in map(json.loads, instructions("RUN")) if "uninstall" in words]
    # What has a marker is for other systems or older Pythons, and is not installed there.
    locked = re.findall(r"^([\w.-]+)(?:\[.*\])?==[^ ]+ \\$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"]
    unneeded = {canonicalize_name(name) for name in locked} - what_runs(
        [*PROJECT["project"]["dependencies"], *extras["server"], *extras["otel"], *extras["archive"]]
    )
    assert sorted(uninstall[uninstall.index("--yes") + 1 :]) == sorted(unneeded)


def test_the_final_stage_builds_nothing_and_runs_as_nobody_in_a_group_that_celery_finds() -> None:
    final = INSTRUCTIONS[[name for name, _ in INSTRUCTIONS].index("FROM", 1) :]
    assert [name for name, _ in final] == ["FROM", "COPY", "ENV", "RUN", "USER", "CMD"]
    assert json.loads(dict(final)["RUN"]) == ["groupadd", "--system", "--gid", "10001", "holdfast"]
    assert dict(final)["USER"] == "10001:10001"
    assert "PYTHONUNBUFFERED=1" in dict(final)["ENV"].split()


def test_the_image_alone_is_a_worker_in_exec_form() -> None:
    [command] = map(json.loads, instructions("CMD"))
    assert command == SERVICES["worker"]["command"]
