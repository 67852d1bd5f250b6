"""Whether a Redis or Valkey server can be the broker."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from redis import Redis
from redis.exceptions import NoPermissionError

OLDEST_REDIS = (6, 2)


class UnsupportedServerError(Exception):
    """The server cannot be the broker; the text says why."""


def server_problem(info: Mapping[str, Any]) -> str | None:
    """Why a server with this `info` cannot be the broker, in words. None: it can."""
    version = str(info["redis_version"])
    if tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS:
        return f"the broker is Redis {version}; Holdfast needs {'.'.join(map(str, OLDEST_REDIS))} or newer, or Valkey"
    if info.get("cluster_enabled"):
        return "the broker is a Redis cluster; Holdfast needs a single server"
    if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):  # the latter is Valkey's
        return "the broker is a Redis Sentinel; Holdfast needs the server itself"
    return None


def check_server(client: Redis) -> None:
    """Raise UnsupportedServerError if the server of `client` cannot be the broker. It may be one that must not ask."""
    with suppress(NoPermissionError):
        if problem := server_problem(client.info()):  # all of it: before Redis 7, INFO takes one section at most
            raise UnsupportedServerError(problem)
