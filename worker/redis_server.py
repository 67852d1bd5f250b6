"""Whether a Redis or Valkey server can be the broker, and whether its settings can lose messages."""

from collections.abc import Mapping
from typing import Any

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


def server_risk(info: Mapping[str, Any]) -> str | None:
    """How a server with this `info` may lose messages, and what to do, in words. None: it does not."""
    risks = []
    if not info.get("aof_enabled"):
        risks.append("it keeps no append-only file, so it loses messages when it ends: set appendonly yes")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if info.get("maxmemory") and policy.startswith("allkeys"):
        risks.append(f"when its memory is full it removes messages: set maxmemory-policy noeviction, not {policy}")
    return "; ".join(risks) or None
