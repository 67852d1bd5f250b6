"""The ledger on several machines: where the database has the extension Citus, its tables are distributed over nodes.

A table whose key begins with `org_id` is distributed by it, and all of these together. So everything of one
organization is in one shard, and a transaction about organizations of one shard is one of a single PostgreSQL. What
waits, dead letters and the schema's revision stay on the coordinator, so they can be written while a node is away.

On a database without the extension, nothing of this applies.
"""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import Connection, Table, event, text

from ledger.tables import metadata, waiting_messages, wallets, workflows


def is_distributed(table: Table) -> bool:
    """Whether `table` is distributed over nodes, if there are any."""
    return table.primary_key.columns[0].name == "org_id" and table is not waiting_messages


def left_to_distribute(existing: Collection[str], distributed: Collection[str]) -> list[str]:
    """Those of the `existing` tables that are not `distributed` yet: `wallets`, which the others go with, first."""
    names = [table.name for table in metadata.sorted_tables if is_distributed(table)]
    left = [name for name in names if name in existing and name not in distributed]
    return sorted(left, key=lambda name: name != wallets.name)


def allow_triggers(connection: Connection) -> None:
    """Let this session give distributed tables triggers.

    The one that refuses changes of events acts in every shard, and looks at no other.
    """
    connection.execute(_ALLOW_TRIGGERS)


def distribute(connection: Connection) -> list[str]:
    """Distribute the tables that are not yet. Returns their names. Needs `allow_triggers`.

    Commits after each, so it can be interrupted.
    """
    if not connection.scalar(_HAS_CITUS):
        return []
    existing = set(connection.scalars(_EXISTING, {"names": [table.name for table in metadata.sorted_tables]}))
    left = left_to_distribute(existing, _distributed(connection))
    connection.commit()
    for name in left:
        together_with = "none" if name == wallets.name else wallets.name
        connection.execute(_DISTRIBUTE, {"name": name, "together_with": together_with})
        connection.commit()
    return left


def gather(connection: Connection) -> None:
    """Put the distributed tables back on the coordinator. Needs `allow_triggers`. Commits after each."""
    distributed = _distributed(connection)
    connection.commit()
    for name in distributed:
        connection.execute(_GATHER, {"name": name})
        connection.commit()


def limit_lock_waits(connection: Connection, wait_s: float) -> None:
    """Let no later transaction of `connection` wait longer for a lock on a node. It tells them by `SET LOCAL` alone."""

    def tell_nodes(connection: Connection) -> None:
        if not connection.connection.driver_connection.autocommit:  # type: ignore[union-attr]
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{wait_s * 1e3:.0f}ms'")

    if connection.scalar(_HAS_CITUS):
        event.listen(connection, "begin", tell_nodes)


def lock_shards(connection: Connection, table: str, mode: str, wait_s: float) -> None:
    """Lock each shard of `table`, if it has any, and release it at once.

    Ignores those that take longer than `wait_s`.
    """
    if table in _distributed(connection):
        lock = _LOCK_SHARD.format(mode=mode, wait_ms=f"{wait_s * 1e3:.0f}")
        connection.execute(_ON_SHARDS, {"table": table, "statement": lock})


def found_in_shards(connection: Connection, query: str) -> list[dict[str, Any]]:
    """The rows that `query` finds in each shard whose node is there. It names one table or two, each after a FROM."""
    first, second = [*dict.fromkeys(_AFTER_FROM.findall(query)), workflows.name][:2]  # Citus wants two
    for place, table in enumerate((first, second), start=1):
        query = re.sub(rf"\bFROM {table}\b", f"FROM %{place}$s AS {table}", query)
    about = {"first": first, "second": second, "statement": _AS_JSON.format(query)}
    return [row for result in connection.scalars(_ON_SHARDS_TOGETHER, about) for row in json.loads(result)]


def described(connection: Connection) -> str | None:
    """Over what the ledger is distributed, in words. None: it is not."""
    if not connection.scalar(_HAS_CITUS):
        return None
    shards, nodes = connection.execute(_PLACES).one()
    return f"{_counted(shards, 'shard')} on {_counted(nodes, 'node')} of Citus" if shards else None


class Place(NamedTuple):
    """Where an organization is."""

    shard: int
    node: int


def places(connection: psycopg.Connection[Any], org_ids: Collection[str]) -> dict[str, Place]:
    """The place of each organization, whether it has a wallet or not."""
    return {org_id: Place(shard, node) for org_id, shard, node in connection.execute(_PLACED, [list(org_ids)])}


def _distributed(connection: Connection) -> set[str]:
    return set(connection.scalars(_DISTRIBUTED)) if connection.scalar(_HAS_CITUS) else set()


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


_PLACED = """
    SELECT org_id, shard, groupid FROM (
        SELECT org_id, get_shard_id_for_distribution_column('wallets', org_id) AS shard
        FROM unnest(%b::text[]) AS named (org_id)
    ) AS named JOIN pg_dist_placement ON shardid = shard
"""
_HAS_CITUS = text("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')")
_ALLOW_TRIGGERS = text(
    "SELECT set_config('citus.enable_unsafe_triggers', 'on', false) FROM pg_extension WHERE extname = 'citus'"
)
_EXISTING = text("SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(name) IS NOT NULL")
_DISTRIBUTED = text("SELECT relname FROM pg_dist_partition JOIN pg_class ON oid = logicalrelid WHERE partmethod = 'h'")
# Citus locks no rows of a shard that it keeps twice: a standby of each node is what keeps a copy.
_DISTRIBUTE = text(
    "SELECT create_distributed_table(CAST(:name AS regclass), 'org_id', colocate_with => :together_with)"
    " FROM set_config('citus.shard_replication_factor', '1', true)"
)
_GATHER = text("SELECT undistribute_table(CAST(:name AS regclass))")
_ON_SHARDS = text("SELECT run_command_on_shards(CAST(:table AS regclass), :statement)")
_AFTER_FROM = re.compile(r"\bFROM (\w+)")
_AS_JSON = "SELECT json_agg(found) FROM ({}) AS found"
_ON_SHARDS_TOGETHER = text("""
    SELECT result FROM run_command_on_colocated_placements(
        CAST(:first AS regclass), CAST(:second AS regclass), :statement
    ) WHERE success AND result <> ''
""")
# Citus refuses to lock a shard, which is no table of its own, unless it is told that this is on purpose.
_LOCK_SHARD = """
    DO $$ BEGIN
        SET LOCAL citus.enable_manual_changes_to_shards = on;
        SET LOCAL lock_timeout = {wait_ms};
        LOCK TABLE %s IN {mode} MODE;
    END $$
"""
_PLACES = text("""
    SELECT count(*), count(DISTINCT groupid) FROM pg_dist_shard JOIN pg_dist_placement USING (shardid)
    WHERE logicalrelid = to_regclass('wallets')
""")
