"""Which errors of the database are faults that pass, whom they concern, and what a person is told of them."""

import psycopg
from sqlalchemy.exc import DBAPIError

# Nothing in a message can cause these, and they end when the database is well again: connection (08), read-only (25),
# prepared statements (26), rollback and deadlock (40), schema or rights not there yet (42), resources (53), lock not
# available (55), operator intervention (57), system (58); and files that are damaged (XX001, XX002).
_TRANSIENT_CLASSES = frozenset({"08", "25", "26", "40", "42", "53", "55", "57", "58"})
_TRANSIENT_STATES = frozenset({"XX001", "XX002"})
# Of these, what may be the fault of one organization or one message, such as rows that somebody has locked, a statement
# that takes too long, a deadlock, too little memory for what was asked, or a damaged page. Whether it is shows when
# others get through.
_LOCAL_CLASSES = frozenset({"25", "40", "53", "55", "58"})
_LOCAL_STATES = frozenset({"57014", "XX001", "XX002"})


class WrongClockError(Exception):
    """The database's clock says something else than the others do; the message says what. It is waited for."""


def is_transient(error: BaseException) -> bool:
    """Whether `error` is a fault of the database that passes, and not of what was asked of it."""
    if isinstance(error, WrongClockError):
        return True
    if isinstance(error, DBAPIError):
        return error.orig is not None and is_transient(error.orig)
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is not None:
        return error.sqlstate[:2] in _TRANSIENT_CLASSES or error.sqlstate in _TRANSIENT_STATES
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)


def may_be_local(error: BaseException) -> bool:
    """Whether `error`, which is transient, may be the fault of one organization or message, and others can go on."""
    if is_lost_connection(error):
        return True
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    return state is not None and (state[:2] in _LOCAL_CLASSES or state in _LOCAL_STATES)


def took_too_long(error: DBAPIError) -> bool:
    """Whether PostgreSQL ended a statement because of its timeout."""
    return isinstance(error.orig, psycopg.errors.QueryCanceled)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a connection that was there is lost: by what was sent on it, or because the database went away."""
    if not isinstance(error, psycopg.OperationalError):
        return False
    return error.sqlstate is None or error.sqlstate[:2] == "08" or error.sqlstate in ("57P01", "57P02")


def describe(error: BaseException) -> str:
    """A database error in one line: what a person needs to know of it."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    if isinstance(original, psycopg.errors.UndefinedTable):
        return "the database is not migrated yet; run `holdfast migrate`"
    lines = str(original).strip().splitlines()
    line = lines[0] if lines else type(original).__name__
    if isinstance(original, psycopg.errors.InsufficientPrivilege):
        return (
            f"{line}; run `holdfast migrate --roles` as the owner of the tables, or connect as a role that may do this"
        )
    return line
