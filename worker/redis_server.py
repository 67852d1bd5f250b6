"""Whether the settings of a Redis or Valkey server can lose messages."""

from collections.abc import Mapping
from typing import Any


def server_risk(info: Mapping[str, Any]) -> str | None:
    """How a server with this `info` may lose messages, and what to do, in words. None: it does not."""
    risks = []
    if not info.get("aof_enabled"):
        risks.append("it keeps no append-only file, so it loses messages when it ends: set appendonly yes")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if info.get("maxmemory") and policy.startswith("allkeys"):
        risks.append(f"when its memory is full it removes messages: set maxmemory-policy noeviction, not {policy}")
    return "; ".join(risks) or None
