"""docker-compose.yml as Compose passes it on."""

import os
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

COMPOSE_TEXT = (Path(__file__).parents[1] / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = YAML(typ="safe").load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
RABBITMQ_FILE = Path(__file__).parents[1] / "deploy/compose.rabbitmq.yml"
RABBITMQ_SERVICES: dict[str, dict[str, Any]] = YAML(typ="safe").load(RABBITMQ_FILE)["services"]
"""What is beside docker-compose.yml, or replaces parts of it, for a cluster of RabbitMQ."""

SECRETS = {
    "POSTGRES_PASSWORD": "11" * 32,
    "DATABASE_PASSWORD": "22" * 32,
    "WORKER_DATABASE_PASSWORD": "55" * 32,
    "READER_DATABASE_PASSWORD": "66" * 32,
    "BROKER_PASSWORD": "33" * 32,
    "ENGINE_BROKER_PASSWORD": "77" * 32,
    "HOLDFAST_JWT_SECRET": "0123456789abcdef" * 4,
}
OPTIONAL = [
    "HOLDFAST_READ_DATABASE_URL",
    *("HOLDFAST_JWT_PUBLIC_KEY", "HOLDFAST_JWT_AUDIENCE", "HOLDFAST_JWT_ISSUER"),
    *("HOLDFAST_PRODUCT_NAME", "HOLDFAST_BUY_CREDITS_URL"),
]
DEFAULTS = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "",
    "BROKER_MEMORY_MB": "1024",
    **dict.fromkeys(["POSTGRES_MEMORY", "WORKER_MEMORY", "API_MEMORY"], "0"),
    **dict.fromkeys(["POSTGRES_CPUS", "BROKER_CPUS", "WORKER_CPUS", "API_CPUS"], "0"),
    "PIDS_LIMIT": "512",
    "CELERY_WORKER_TASK_EVENTS": "false",
    "HOLDFAST_SHARD_CONNECTIONS": "4",
    "API_PORT": "8000",
}
RABBITMQ_SECRETS = {"RABBITMQ_PASSWORD": "88" * 32, "RABBITMQ_COOKIE": "99" * 32}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)([^}]*)\}")


def interpolated(value: str) -> str:
    """As Compose passes it on, with SECRETS as its environment, in which nothing else is set."""
    values = {**dict.fromkeys(OPTIONAL, ""), **DEFAULTS, **SECRETS, **RABBITMQ_SECRETS}
    return VARIABLE.sub(lambda found: values[found[1]], value).replace("$$", "$")


def environment(service: str, *, with_rabbitmq: bool = False) -> dict[str, str]:
    """What a service is given; `with_rabbitmq`: with deploy/compose.rabbitmq.yml, as Compose merges the two files."""
    given = dict(SERVICES.get(service, {}).get("environment", {}))
    if with_rabbitmq:
        given |= RABBITMQ_SERVICES[service]["environment"]
    return {name: interpolated(value) for name, value in given.items()}


def with_program(name: str, script: str, folder: Path) -> str:
    """A PATH on which `name` is a program that does `script`, before everything else."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:{os.defpath}"
