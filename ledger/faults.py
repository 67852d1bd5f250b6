"""Which errors of PostgreSQL are transient, which may concern a single organization, and their text for a person."""

import psycopg
from sqlalchemy.exc import DBAPIError

# No message can cause these, and they end when the database recovers: connection (08), read-only (25), prepared
# statements (26), rollback and deadlock (40), missing schema or privileges (42), resources (53), lock not available
# (55), operator intervention (57), system (58); and damaged files (XX001, XX002).
_TRANSIENT_CLASSES = frozenset({"08", "25", "26", "40", "42", "53", "55", "57", "58"})
_TRANSIENT_STATES = frozenset({"XX001", "XX002"})
# Of these, the ones that may concern a single organization or message: locked rows, a slow statement, a deadlock, too
# little memory for a statement, a damaged page. They do if others can be applied.
_LOCAL_CLASSES = frozenset({"25", "40", "53", "55", "58"})
_LOCAL_STATES = frozenset({"57014", "XX001", "XX002"})
# The functions of Citus that report, as an internal error, that a node has gone away before or at the commit. Unlike
# the text of an error, their names are never translated.
_LOSES_A_NODE = frozenset(
    {"ErrorIfPostCommitFailedShardPlacements", "CheckRemoteTransactionsHealth", "MarkRemoteTransactionFailed"}
)


class WrongClockError(Exception):
    """The database's clock differs from the others; the message says how. Transient: it ends when the clock is set."""


def is_transient(error: BaseException) -> bool:
    """Whether `error` is a passing fault of the database, not one of the statement."""
    if isinstance(error, WrongClockError):
        return True
    if isinstance(error, DBAPIError):
        return error.orig is not None and is_transient(error.orig)
    if not isinstance(error, psycopg.Error):
        return False
    if is_about_a_node(error):
        return True
    if error.sqlstate is not None:
        return error.sqlstate[:2] in _TRANSIENT_CLASSES or error.sqlstate in _TRANSIENT_STATES
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)


def may_be_local(error: BaseException) -> bool:
    """Whether `error`, which is transient, may concern a single organization or message, so that others can go on."""
    if is_lost_connection(error) or is_about_a_node(error):
        return True
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    return state is not None and (state[:2] in _LOCAL_CLASSES or state in _LOCAL_STATES)


def is_about_schema(error: BaseException) -> bool:
    """Whether `error` says that a table or a column is missing, so that the schema may be another version's."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(original, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn)


def took_too_long(error: DBAPIError) -> bool:
    """Whether PostgreSQL ended a statement because of its timeout."""
    return isinstance(error.orig, psycopg.errors.QueryCanceled)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an open connection was lost: because of a statement on it, or because the database went away."""
    if not isinstance(error, psycopg.OperationalError):
        return False
    return error.sqlstate is None or error.sqlstate[:2] == "08" or error.sqlstate in ("57P01", "57P02")


def is_about_a_node(error: BaseException) -> bool:
    """Whether the database, which can be reached itself, does not reach the node of an organization."""
    if isinstance(error, DBAPIError):
        return error.orig is not None and is_about_a_node(error.orig)
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return False
    return error.sqlstate in ("08001", "08006") or error.diag.source_function in _LOSES_A_NODE


def describe(error: BaseException) -> str:
    """A database error in one line, for a person."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(original).strip().splitlines()
    line = lines[0] if lines else type(original).__name__
    if isinstance(original, psycopg.errors.InsufficientPrivilege):
        return (
            f"{line}; run `holdfast migrate --roles` as the owner of the tables, or connect as a role that may do this"
        )
    return line
