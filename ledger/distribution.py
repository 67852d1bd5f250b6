"""The ledger on several machines: where the database has the extension Citus, its tables are distributed over nodes.

A table whose key begins with `org_id` is distributed by it, and all of these together. So everything of one
organization is in one shard, and a transaction about organizations of one shard is one of a single PostgreSQL. What
waits, dead letters and the schema's revision stay on the coordinator, so they can be written while a node is away.

On a database without the extension, nothing of this applies.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import Connection, Table, text

from ledger.tables import metadata, waiting_messages, wallets


def is_distributed(table: Table) -> bool:
    """Whether `table` is distributed over nodes, if there are any."""
    return table.primary_key.columns[0].name == "org_id" and table is not waiting_messages


def left_to_distribute(existing: Collection[str], distributed: Collection[str]) -> list[str]:
    """Those of the `existing` tables that are not `distributed` yet: `wallets`, which the others go with, first."""
    names = [table.name for table in metadata.sorted_tables if is_distributed(table)]
    left = [name for name in names if name in existing and name not in distributed]
    return sorted(left, key=lambda name: name != wallets.name)


def distribute(connection: Connection) -> list[str]:
    """Distribute the tables that are not yet. Returns their names. Commits after each, so it can be interrupted."""
    if not connection.scalar(_HAS_CITUS):
        return []
    existing = set(connection.scalars(_EXISTING, {"names": [table.name for table in metadata.sorted_tables]}))
    left = left_to_distribute(existing, set(connection.scalars(_DISTRIBUTED)))
    connection.commit()
    for name in left:
        # The trigger that refuses changes of events acts in every shard, and looks at no other.
        connection.execute(text("SET LOCAL citus.enable_unsafe_triggers = on"))
        together_with = "none" if name == wallets.name else wallets.name
        connection.execute(_DISTRIBUTE, {"name": name, "together_with": together_with})
        connection.commit()
    return left


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


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


_PLACED = """
    SELECT org_id, shard, groupid FROM (
        SELECT org_id, get_shard_id_for_distribution_column('wallets', org_id) AS shard
        FROM unnest(%b::text[]) AS named (org_id)
    ) AS named JOIN pg_dist_placement ON shardid = shard
"""
_HAS_CITUS = text("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')")
_EXISTING = text("SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(name) IS NOT NULL")
_DISTRIBUTED = text("SELECT relname FROM pg_dist_partition JOIN pg_class ON oid = logicalrelid WHERE partmethod = 'h'")
_DISTRIBUTE = text(
    "SELECT create_distributed_table(CAST(:name AS regclass), 'org_id', colocate_with => :together_with)"
)
_PLACES = text("""
    SELECT count(*), count(DISTINCT groupid) FROM pg_dist_shard JOIN pg_dist_placement USING (shardid)
    WHERE logicalrelid = to_regclass('wallets')
""")
