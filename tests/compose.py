"""docker-compose.yml as Compose passes it on."""

import os
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

COMPOSE_TEXT = (Path(__file__).parents[1] / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = YAML(typ="safe").load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

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
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)([^}]*)\}")


def interpolated(value: str) -> str:
    """As Compose passes it on, with SECRETS as its environment, in which nothing else is set."""
    values = {**dict.fromkeys(OPTIONAL, ""), **DEFAULTS, **SECRETS}
    return VARIABLE.sub(lambda found: values[found[1]], value).replace("$$", "$")


def environment(service: str) -> dict[str, str]:
    return {name: interpolated(value) for name, value in SERVICES[service].get("environment", {}).items()}


def with_program(name: str, script: str, folder: Path) -> str:
    """A PATH on which `name` is a program that does `script`, before everything else."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{folder}:{os.defpath}"
