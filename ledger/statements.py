"""Generates statements for sets of records, which are sent as one array for each column.

Citus plans a statement in a tenth of the time if it says which organizations it is about, as those name the shard. One
PostgreSQL finds rows by their keys without that, and would take longer with it. So such a statement has two forms.

The fields of a record are the columns of its table; those of `Wallet` also have its rows of another table, last.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import args_row
from sqlalchemy import BigInteger, Dialect, Table, Text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

from ledger import arrays
from ledger.database import LedgerConnection

Connection = LedgerConnection


class Statement(NamedTuple):
    """A statement whose first parameter is an array of the organizations that it is about, all of one shard."""

    plain: str
    distributed: str
    """It has two more parameters, the last ones: the first one again."""


def statement(sql: str, table: str) -> Statement:
    """`sql` for one PostgreSQL, and for Citus: there `{in_shard}` is a condition on `table`, which may be an alias."""
    return Statement(sql.format(in_shard=""), sql.format(in_shard=f" AND {_in_shard(table)}"))


def _in_shard(table: str) -> str:
    # The second half adds nothing, and keeps the node from using the first one as a condition on an index, for which it
    # would sort the array once for every row.
    return f"({table}.org_id = ANY(%b::text[]) OR {table}.org_id = ANY((%b::text[])[1:1]))"


def execute(connection: Connection, statement: Statement | str, parameters: Sequence[Any]) -> psycopg.Cursor[Any]:
    """Execute `statement` in the form that is for this database."""
    return connection.execute(*_form(connection, statement, parameters))


def select(
    connection: Connection, record: type[Any], statement: Statement | str, parameters: Sequence[Any]
) -> psycopg.Cursor[Any]:
    """Execute `statement`. The cursor returns values of the type `record`."""
    cursor = connection.cursor(row_factory=args_row(record), binary=True)
    return cursor.execute(*_form(connection, statement, parameters))


def _form(connection: Connection, statement: Statement | str, parameters: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    if isinstance(statement, str):
        return statement, parameters
    if not connection.is_distributed:
        return statement.plain, parameters
    return statement.distributed, [*parameters, parameters[0], parameters[0]]


def find(
    connection: Connection, record: type[Any], statement: Statement, keys: set[Any]
) -> Callable[[], Sequence[Any]]:
    """Select the records with `keys`, if there are any. Returns a function that returns them after the round trip."""
    if not keys:
        return tuple
    return select(
        connection, record, statement, [arrays.text(column) for column in zip(*sorted(keys), strict=True)]
    ).fetchall


class Write(NamedTuple):
    """A statement that writes rows, which are sent as one array for each column."""

    sql: Statement | str
    encoders: tuple[Callable[[Sequence[Any]], object], ...]

    def of(self, rows: Sequence[Any]) -> tuple[Statement | str, list[object]]:
        """The statement that writes `rows`, and its parameters."""
        columns = zip(*sorted(rows), strict=True)  # in the order of the index, which costs less
        # A field after the columns is no column.
        return self.sql, [encode(column) for encode, column in zip(self.encoders, columns, strict=False)]


# Other types are rare: psycopg finds out how to send them.
_ENCODERS: dict[type, Callable[[Any], object]] = {
    Text: arrays.text,
    BigInteger: arrays.bigint,
    TIMESTAMP: arrays.timestamptz,
    JSONB: arrays.jsonb,
}
_DIALECT: Dialect = postgresql.dialect()


def _columns(table: Table, record: type[Any], until: str | None = None) -> list[str]:
    fields = record._fields if until is None else record._fields[: record._fields.index(until) + 1]
    return [name for name in fields if name in table.c]


def column_names(table: Table, record: type[Any], until: str | None = None) -> str:
    """The columns of `table` that `record` has, for a statement: all, or the first ones `until` a name."""
    return ", ".join(_columns(table, record, until))


def write(
    table: Table, record: type[Any], plain: str, until: str | None = None, *, distributed: str | None = None
) -> Write:
    """A statement with `{rows}` replaced by rows of `record`, sent as arrays; only of the columns `until` a name.

    `distributed`: the form for Citus, see `Statement`. None: there is one form.
    """
    types = [table.c[name].type for name in _columns(table, record, until)]
    columns = ", ".join(f"%b::{column_type.compile(_DIALECT)}[]" for column_type in types)
    rows = f"unnest({columns}) AS new ({column_names(table, record, until)})"
    encoders = tuple(_ENCODERS.get(type(column_type), list) for column_type in types)
    if distributed is None:
        return Write(plain.format(rows=rows), encoders)
    return Write(Statement(plain.format(rows=rows), distributed.format(rows=rows)), encoders)


def insert(
    table: Table, record: type[Any], on_conflict: str = "", until: str | None = None, *, have_wallets: bool = True
) -> Write:
    """Insert records into `table`; of the columns `until` a name, others have their defaults.

    `have_wallets`: whether the organizations of the records have wallets.
    """
    assert _columns(table, record) == list(table.c.keys()), (
        f"{record.__name__} in ledger.state and {table.name} in ledger.tables must have the same fields"
    )
    names = column_names(table, record, until)
    into = f"INSERT INTO {table.name} ({names})"
    # Without a table in its FROM, Citus copies the rows to the node, and the code of an error there is lost.
    of_wallets = ", ".join(f"{'wallets' if name == 'org_id' else 'new'}.{name}" for name in names.split(", "))
    joined = f"FROM wallets JOIN {{rows}} ON wallets.org_id = new.org_id WHERE {_in_shard('wallets')}"
    return write(
        table,
        record,
        f"{into} SELECT {names} FROM {{rows}} {on_conflict}",
        until,
        distributed=f"{into} SELECT {of_wallets} {joined} {on_conflict}" if have_wallets else None,
    )


def change(table: Table, record: type[Any], sql: str, alias: str, until: str | None = None) -> Write:
    """A statement that changes rows of `table`, which it calls `alias`, and that ends with a condition on them."""
    return write(table, record, sql, until, distributed=f"{sql} AND {_in_shard(alias)}")


def update(table: Table, record: type[Any], until: str | None = None) -> Write:
    """Replace the rows of `table` that have the keys of the records, or of them the columns `until` a name."""
    same = " AND ".join(f"{table.name}.{key.name} = new.{key.name}" for key in table.primary_key)
    changes = ", ".join(
        f"{name} = new.{name}" for name in _columns(table, record, until) if not table.c[name].primary_key
    )
    return change(table, record, f"UPDATE {table.name} SET {changes} FROM {{rows}} WHERE {same}", table.name, until)


def by_key(table: Table, record: type[Any]) -> Statement:
    """Select the rows of `table` whose keys are given: an array for each column of the key."""
    keys = [column.name for column in table.primary_key]
    columns = ", ".join("%b::text[]" for _ in keys)
    sql = (
        f"SELECT {column_names(table, record)} FROM {table.name}"
        f" JOIN unnest({columns}) AS named ({', '.join(keys)}) USING ({', '.join(keys)}) WHERE true{{in_shard}}"
    )
    return statement(sql, table.name)


def lock_that_can_be(table: Table) -> Statement:
    """Lock the rows of `table` whose keys are given and that nobody else has locked, and select their keys."""
    keys = ", ".join(column.name for column in table.primary_key)
    sql = (
        f"SELECT {keys} FROM {table.name} JOIN unnest(%b::text[], %b::text[]) AS named ({keys}) USING ({keys})"
        f" WHERE true{{in_shard}} FOR NO KEY UPDATE OF {table.name} SKIP LOCKED"
    )
    return statement(sql, table.name)
