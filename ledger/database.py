"""How the ledger connects to PostgreSQL."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from psycopg import conninfo, pq
from psycopg.errors import Diagnostic, OperatorIntervention
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8BinaryDumper
from sqlalchemy import URL, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from ledger.arrays import Array, ArrayDumper
from ledger.faults import describe

CONNECT_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 0.5
"""How long to wait for a lock. Nobody of ours holds one for so long: a batch looks then for who has to wait."""

STATEMENT_TIMEOUT_S = 60
TRANSACTION_TIMEOUT_S = 60
"""After this, PostgreSQL 17 or newer takes the locks from a worker that was frozen in its transaction."""

POOL_TIMEOUT_S = 5
"""How long to wait for a connection while all are in use."""

_WAITS_FOR_REPLICA = "SyncRepWaitForLSN"
"""The function of PostgreSQL in which a commit waits, whatever the language of its messages."""

_CONNECTION = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "holdfast",
    # A peer that vanished without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""What the URL may set otherwise."""

_SESSION_OPTIONS = " ".join(
    f"-c {option}"
    for option in (
        f"lock_timeout={int(LOCK_TIMEOUT_S * 1_000)}ms",
        f"statement_timeout={STATEMENT_TIMEOUT_S}s",
        f"idle_in_transaction_session_timeout={STATEMENT_TIMEOUT_S}s",
        # The server gives up a peer that vanished without a word, and its locks, within half a minute.
        "tcp_keepalives_idle=10",
        "tcp_keepalives_interval=5",
        "tcp_keepalives_count=3",
        "tcp_user_timeout=30s",
        # A plan made while the tables were empty must not outlive them.
        "plan_cache_mode=force_custom_plan",
        "timezone=UTC",
    )
)

_FOR_QUESTIONS = "-c max_parallel_workers_per_gather=0 -c random_page_cost=1.1"

_abandoned: WeakSet[Engine] = WeakSet()
_connections: WeakKeyDictionary[Engine, WeakSet[psycopg.Connection[Any]]] = WeakKeyDictionary()


class DatabaseURLError(ValueError):
    """The database URL cannot be used; the message says why, without the password."""


class UnsuitableDatabaseError(psycopg.OperationalError):
    """The database can never be used; the message says why."""


class LedgerConnection(psycopg.Connection[Any]):
    """A connection on which a commit that no synchronous replica has confirmed is an error.

    PostgreSQL only warns of it, when somebody cancels a session that waits for the replica. What was committed is
    there, but would be gone if the replica took over now. Whoever asks again waits for the replica again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unconfirmed = unconfirmed = list[Diagnostic]()

        def listen(notice: Diagnostic) -> None:
            if notice.source_function == _WAITS_FOR_REPLICA:
                unconfirmed.append(notice)

        self.add_notice_handler(listen)

    def commit(self) -> None:
        """Commit. Raises OperatorIntervention if no replica has confirmed it."""
        super().commit()
        self.refuse_unconfirmed()

    def refuse_unconfirmed(self) -> None:
        """Raise OperatorIntervention if the commit that was sent last is one that no replica has confirmed."""
        if self._unconfirmed:
            self._unconfirmed.clear()
            raise OperatorIntervention(
                "somebody canceled a commit that waited for the synchronous replica, which may not have it"
            )


def parse_url(url: str) -> URL:
    """The parts of a database URL that `connect` can use. Raises DatabaseURLError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise DatabaseURLError("is not a URL; it looks like postgresql+psycopg://user:password@host/database") from None
    if parsed.drivername != "postgresql+psycopg":
        raise DatabaseURLError(f"must begin with postgresql+psycopg://, not {parsed.drivername}://")
    if "@" in (parsed.host or ""):
        raise DatabaseURLError("names a host with an @ in it; in a user's name or a password, write %40 for @")
    try:
        options = conninfo.make_conninfo(**{name: str(value) for name, value in parsed.query.items()})
    except psycopg.ProgrammingError as error:
        raise DatabaseURLError(f"has an option that PostgreSQL does not know: {describe(error)}") from None
    # There is nothing to connect to, and what is wrong with the options is found before that.
    attempt = pq.PGconn.connect_start(conninfo.make_conninfo(options, host=os.devnull, hostaddr="", port="").encode())
    problem = attempt.error_message.decode(errors="replace").strip()
    attempt.finish()
    if problem.startswith("invalid "):
        raise DatabaseURLError(f"has an option with a wrong value: {problem}")
    return parsed


def connect(
    url: str,
    *,
    keeps_connections: bool = True,
    checks_connections: bool = False,
    transaction_timeout_s: int | None = None,
    answer_timeout_s: int | None = None,
) -> Engine:
    """An engine for the PostgreSQL database at `url` (`postgresql+psycopg://…`). Does not connect yet.

    One that keeps no connections opens one whenever it is asked to: whether the database is there shows within
    `CONNECT_TIMEOUT_S`, also where it hangs and an open connection would wait for ever.

    One that checks connections asks each, before it is used again, whether it is still there. If it broke meanwhile,
    all that are as old are given up and a new one is opened, once: nobody notices that the database was restarted, and
    nothing is ever sent twice.

    With `transaction_timeout_s`, PostgreSQL 17 or newer ends a transaction after so long, and the connection with it:
    who was frozen in it has no locks any more.

    With `answer_timeout_s`, statements are questions of somebody who is not alone: PostgreSQL ends one after so long,
    takes one process for it, and rather reads an index than the whole table. Raises DatabaseURLError.
    """
    questions = "" if answer_timeout_s is None else f"-c statement_timeout={answer_timeout_s}s {_FOR_QUESTIONS}"
    pool: dict[str, Any] = {"pool_timeout": POOL_TIMEOUT_S} if keeps_connections else {"poolclass": NullPool}
    parsed = parse_url(url)
    engine = create_engine(
        parsed,
        **pool,
        pool_pre_ping=checks_connections,
        connect_args={
            **{name: value for name, value in _CONNECTION.items() if name not in parsed.query},
            "options": f"{parsed.query.get('options', '')} {_SESSION_OPTIONS} {questions}",
        },
    )

    connections: WeakSet[psycopg.Connection[Any]] = WeakSet()

    def open_session(*args: Any, **options: Any) -> LedgerConnection:
        connection = LedgerConnection.connect(*args, **options)
        _begin_session(connection, transaction_timeout_s)
        # One parameter type per statement, whatever the size of the numbers in it: one prepared statement, not many.
        connection.adapters.register_dumper(int, Int8BinaryDumper)
        connection.adapters.register_dumper(Array, ArrayDumper)
        connections.add(connection)
        return connection

    # Before SQLAlchemy asks anything, which some databases answer with what it does not understand.
    engine.dialect.connect = open_session  # type: ignore[assignment, method-assign]
    _connections[engine] = connections
    return engine


_KNOWS_TRANSACTION_TIMEOUT = 170_000
_SESSION = """
    SELECT pg_backend_pid(), set_config(
        'synchronous_commit',
        CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
        false
    )
"""


def _begin_session(connection: LedgerConnection, transaction_timeout_s: int | None) -> None:
    """Make sure that what is committed on `connection` is on disk, whatever the server's default.

    Raises UnsuitableDatabaseError, or OperationalError if something between us and PostgreSQL shares its connections
    among clients. Our prepared statements and settings belong to a session: on a shared one, a name may be another
    client's statement.
    """
    encoding = connection.info.parameter_status("server_encoding")
    [(server, _)] = connection.execute(_SESSION).fetchall()
    if transaction_timeout_s is not None and connection.info.server_version >= _KNOWS_TRANSACTION_TIMEOUT:
        connection.execute("SELECT set_config('transaction_timeout', %s, false)", [f"{transaction_timeout_s}s"])
    connection.commit()
    if server != connection.info.backend_pid:
        connection.close()
        raise psycopg.OperationalError(
            "the database URL leads to a connection pooler, such as PgBouncer; it must lead to PostgreSQL itself"
        )
    if encoding != "UTF8":
        name = connection.info.dbname
        connection.close()
        raise UnsuitableDatabaseError(
            f"the database {name} has the encoding {encoding}; Holdfast needs one that was created"
            " with ENCODING 'UTF8' TEMPLATE template0"
        )


def refuse_unsuitable(engine: Engine) -> None:
    """Raise UnsuitableDatabaseError for a database that can never be used. One that cannot be asked may be well."""
    try:
        engine.connect().close()
    except DBAPIError as error:
        if isinstance(error.orig, UnsuitableDatabaseError):
            raise error.orig from None


def is_abandoned(engine: Engine) -> bool:
    """Whether `abandon` was called: nobody should try a new connection, which may take seconds."""
    return engine in _abandoned


def abandon(engine: Engine) -> None:
    """Break the connections of `engine`: who waits for an answer on one, in another thread, fails as in an outage."""
    _abandoned.add(engine)
    for connection in list(_connections[engine]):
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as shared:
            shared.shutdown(socket.SHUT_RDWR)


@contextmanager
def raw_connection(engine: Engine) -> Iterator[LedgerConnection]:
    """A psycopg connection that begins no transaction by itself. One that failed is closed, not used again."""
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, LedgerConnection)
        try:
            connection.autocommit = True  # the BEGIN that psycopg would send costs a round trip of its own
            yield connection
            connection.refuse_unconfirmed()
            connection.autocommit = False
        except BaseException:
            # The server ends a connection that was closed a moment later; until then, it would hold the locks.
            if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
            pooled.invalidate()
            raise
