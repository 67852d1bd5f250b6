"""Measures the time from sending a message until its effect can be read."""

import time

from sqlalchemy import Connection, Engine, text

from bench.workload import NotAccountedError, Workload
from holdfast_client.client import Client

POLL_S = 0.001
LOST_S = 30.0
"""A message without an effect after so long is lost."""


def latencies_ms(engine: Engine, client: Client, starts: Workload, *, per_s: int) -> list[float]:
    """The milliseconds of each start, from when it was due to be sent until another connection reads its effect.

    Sends `per_s` evenly, whether or not earlier ones are done, so a slow one cannot hide those behind it. Sending and
    reading take turns, which adds up to about 2 ms. Raises NotAccountedError.
    """
    payloads = iter([payload for _, payload in starts.messages])
    unseen: dict[str, tuple[str, float]] = {}
    latencies: list[float] = []
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        due_at = time.perf_counter()
        while len(latencies) < len(starts.messages):
            if time.perf_counter() >= due_at and (payload := next(payloads, None)) is not None:
                unseen[payload["workflow_id"]] = payload["org_id"], due_at
                client.start(**payload)
                due_at += 1 / per_s
            for workflow_id in _visible(connection, unseen):
                _, sent_at = unseen.pop(workflow_id)
                latencies.append((time.perf_counter() - sent_at) * 1_000)
            if unseen and time.perf_counter() - min(sent_at for _, sent_at in unseen.values()) > LOST_S:
                raise NotAccountedError(f"{len(unseen):,} of {len(starts.messages):,} messages have had no effect")
            time.sleep(POLL_S)
    return latencies


def _visible(connection: Connection, unseen: dict[str, tuple[str, float]]) -> list[str]:
    if not unseen:
        return []
    named = {"orgs": [org_id for org_id, _ in unseen.values()], "workflows": list(unseen)}
    return list(connection.scalars(_VISIBLE, named))


_VISIBLE = text(
    "SELECT workflow_id FROM workflows"
    " JOIN unnest(CAST(:orgs AS text[]), CAST(:workflows AS text[])) AS sent (org_id, workflow_id)"
    " USING (org_id, workflow_id)"
)
