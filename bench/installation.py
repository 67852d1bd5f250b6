"""Measures an installation that runs somewhere: its broker, its workers, its database, whatever they are.

Its organizations are new, and so are their names. They stay there, as a ledger never deletes what happened.
"""

import secrets
import time
from collections.abc import Callable
from functools import partial

from sqlalchemy import Engine, text

from bench.workload import FUNDS, NotAccountedError, Workload
from holdfast_client.client import Client
from ledger.database import connect

POLL_S = 0.2
STALLED_S = 60.0
"""After so long without any progress, the installation has stalled: it may have no worker."""


def messages_per_s(
    database_url: str, broker_url: str, *, messages: int, organizations: int, progress: Callable[[str], None]
) -> float:
    """Send `messages` to the installation. Returns how many a second it has applied, from the first one sent on.

    Raises NotAccountedError if it stalls, or if a message did not have its effect.
    """
    name = f"bench-{secrets.token_hex(4)}"
    load = Workload.lifecycle(messages, organizations=organizations, name=name)
    org_ids = sorted({payload["org_id"] for _, payload in load.messages})
    engine = connect(database_url)
    try:
        with Client(broker_url) as client:
            progress(f"The organizations {name}-0 to {name}-{organizations - 1} get their credits …")
            with client.batch() as batch:
                for org_id in org_ids:
                    batch.grant(org_id=org_id, grant_id="funds", credits=FUNDS)
            _wait(partial(_count, engine, _FUNDED, org_ids), len(org_ids))
            ended = {payload["workflow_id"] for task, payload in load.messages if task != "workflow.start"}
            progress(f"{messages:,} messages …")
            began_at = time.perf_counter()
            with client.batch() as batch:
                for task, payload in load.messages:
                    getattr(batch, task.partition(".")[2])(**payload)
            _wait(partial(_count, engine, _ENDED, org_ids), len(ended))
            took_s = time.perf_counter() - began_at
        load.check(engine)
    finally:
        engine.dispose()
    return messages / took_s


_FUNDED = "SELECT count(*) FROM wallets WHERE prepaid_balance > 0 AND org_id = ANY(:org_ids)"
_ENDED = "SELECT count(*) FROM workflows WHERE state <> 'reserved' AND org_id = ANY(:org_ids)"


def _count(engine: Engine, query: str, org_ids: list[str]) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(text(query), {"org_ids": org_ids}) or 0)


def _wait(count: Callable[[], int], until: int) -> None:
    counted, moved_at = -1, time.monotonic()
    while (now_counted := count()) < until:
        now = time.monotonic()
        if now_counted != counted:
            counted, moved_at = now_counted, now
        if now - moved_at > STALLED_S:
            raise NotAccountedError(
                f"the installation has done {counted:,} of {until:,}, and nothing for {STALLED_S:g} s: has it a worker?"
            )
        time.sleep(POLL_S)
