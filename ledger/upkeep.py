"""What only the owner of the tables does, and only one process at a time: archiving and erasing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

_LOCK_ID = 4_877_002


class UpkeepError(Exception):
    """It cannot be done; the text says why, and what to do."""


@contextmanager
def alone(engine: Engine) -> Iterator[Connection]:
    """A connection without timeouts that only one process has at a time. Raises UpkeepError if another one has it."""
    with engine.connect() as connection:
        try:
            if not connection.scalar(text("SELECT pg_try_advisory_lock(:id)"), {"id": _LOCK_ID}):
                raise UpkeepError(
                    "another `holdfast archive`, `erase` or `verify --archive` is running: wait until it has ended"
                )
            connection.execute(
                text("SELECT set_config(name, '0', false) FROM pg_settings WHERE name = ANY(:names)"),
                {"names": ["statement_timeout", "transaction_timeout", "idle_in_transaction_session_timeout"]},
            )
            connection.commit()
            yield connection
        finally:
            with suppress(SQLAlchemyError):  # the lock ends at once; with a closed connection, a bit later
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock_all()"))
            connection.invalidate()  # ends its settings and its temporary tables


def refuse_others(connection: Connection) -> None:
    """Raise UpkeepError unless the role of `connection` owns the events."""
    if not connection.scalar(_OWNS):
        raise UpkeepError(
            "only the owner of the tables may do this: give HOLDFAST_DATABASE_URL the role that `holdfast migrate` "
            "runs with"
        )


_OWNS = text("SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass('credit_events')")
