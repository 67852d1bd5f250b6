"""Columns of values as PostgreSQL's binary arrays: how a batch is sent to the database.

psycopg can dump lists too, at twice the cost, because it inspects the values to find their type. Here the caller names
the type. Values are not checked: the callers have done so.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import repeat
from struct import Struct
from typing import Any

from psycopg.adapt import Dumper
from psycopg.pq import Format
from pydantic_core import to_json


class Array(bytes):
    """An array in PostgreSQL's binary format, to be passed as `%b::type[]`."""


class ArrayDumper(Dumper):
    """Sends an `Array` unchanged. The statement's cast gives its type."""

    format = Format.BINARY

    def dump(self, obj: Array) -> Array:
        """Return the array unchanged."""
        return obj


def text(values: Sequence[str | None]) -> Array:
    """An array of type `text[]`."""
    elements = {value: _NULL if value is None else _element(value.encode()) for value in set(values)}
    return _array(_TEXT_OID, len(values), map(elements.__getitem__, values))


def bigint(values: Sequence[int | None]) -> Array:
    """An array of type `bigint[]`, of integers of at most 64 bits."""
    if None in values:
        elements: Iterable[bytes] = [_NULL if value is None else _EIGHT_BYTES(8, value) for value in values]
    else:
        elements = map(_EIGHT_BYTES, repeat(8), values)
    return _array(_BIGINT_OID, len(values), elements)


def timestamptz(values: Sequence[datetime | None]) -> Array:
    """An array of type `timestamptz[]`, exact to the microsecond."""
    elements = {
        value: _NULL if value is None else _EIGHT_BYTES(8, (value - _EPOCH) // _MICROSECOND) for value in set(values)
    }
    return _array(_TIMESTAMPTZ_OID, len(values), map(elements.__getitem__, values))


def jsonb(values: Sequence[Mapping[str, Any] | None]) -> Array:
    """An array of type `jsonb[]`."""
    elements = [_NULL if value is None else _element(_JSONB_VERSION + to_json(value)) for value in values]
    return _array(_JSONB_OID, len(values), elements)


# The wire format: `array_send`, `int8send`, `timestamptz_send` and `jsonb_send` in PostgreSQL's sources.
_HEADER = Struct("!5i").pack
_LENGTH = Struct("!i").pack
_EIGHT_BYTES = Struct("!iq").pack
_NULL = _LENGTH(-1)
_TEXT_OID, _BIGINT_OID, _TIMESTAMPTZ_OID, _JSONB_OID = 25, 20, 1184, 3802
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_JSONB_VERSION = b"\x01"


def _element(value: bytes) -> bytes:
    return _LENGTH(len(value)) + value


def _array(element_oid: int, length: int, elements: Iterable[bytes]) -> Array:
    # One dimension, NULLs possible, the type, the length, counted from 1.
    return Array(_HEADER(1, 1, element_oid, length, 1) + b"".join(elements))
