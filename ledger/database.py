"""Connections to PostgreSQL."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from psycopg import conninfo, pq
from psycopg.abc import RV, PQGen
from psycopg.errors import ConnectionFailure, Diagnostic, OperatorIntervention
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8BinaryDumper
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from ledger.arrays import Array, ArrayDumper
from ledger.faults import describe

CONNECT_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 0.5
"""How long to wait for a lock. No worker holds one for so long; after it, a batch looks for the culprit."""

STATEMENT_TIMEOUT_S = 60
TRANSACTION_TIMEOUT_S = 60
"""After this, PostgreSQL 17 or newer ends the transaction of a frozen worker and releases its locks."""

POOL_SIZE = 3
"""How many connections are kept open besides those of a batch."""

LONG_PATIENCE_S = 10.0
"""How long one statement may take when nothing else waits for it."""

ANSWER_MARGIN_S = 2.0
"""How much later than PostgreSQL itself we give up a statement of a distributed ledger."""

FIRST_SILENCE_S, LONGEST_SILENCE_S = 10.0, 160.0
"""For how long a node that hangs is left alone. It doubles each time: each attempt leaves a session on the coordinator
that ends with the node's silence."""

POOL_TIMEOUT_S = 5
"""How long to wait for a connection while all are in use."""

_WAITS_FOR_REPLICA = "SyncRepWaitForLSN"
"""The function of PostgreSQL in which a commit waits. Unlike the text of a notice, it is never translated."""

_WARNING_AT_COMMIT = ("DefaultCitusNoticeReceiver", "DEBUG", "01000")
"""How Citus passes on that a commit waited in vain on a node: no other warning comes with a commit."""

_CONNECTION = {
    "application_name": "holdfast",
    # A peer that vanished silently is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""Defaults that the URL may override."""

_SESSION_OPTIONS = " ".join(
    f"-c {option}"
    for option in (
        f"lock_timeout={int(LOCK_TIMEOUT_S * 1_000)}ms",
        f"statement_timeout={STATEMENT_TIMEOUT_S}s",
        f"idle_in_transaction_session_timeout={STATEMENT_TIMEOUT_S}s",
        # Within half a minute, the server drops a peer that vanished silently and releases its locks.
        "tcp_keepalives_idle=10",
        "tcp_keepalives_interval=5",
        "tcp_keepalives_count=3",
        "tcp_user_timeout=30s",
        # A plan that was made for empty tables must not be used when they are full.
        "plan_cache_mode=force_custom_plan",
        "timezone=UTC",
    )
)

_FOR_QUESTIONS = "-c max_parallel_workers_per_gather=0 -c random_page_cost=1.1"

_abandoned: WeakSet[Engine] = WeakSet()
_known: WeakKeyDictionary[Engine, "_Known"] = WeakKeyDictionary()


class DatabaseURLError(ValueError):
    """The database URL cannot be used; the message says why, without the password."""


class UnsuitableDatabaseError(psycopg.OperationalError):
    """The database can never be used; the message says why."""


class SilenceError(ConnectionFailure):
    """There was no answer in time, although PostgreSQL should have given up earlier: a node of the ledger hangs."""


class LedgerConnection(psycopg.Connection[Any]):
    """A connection on which a commit that no synchronous replica has confirmed raises an error.

    PostgreSQL only warns when somebody cancels a session that waits for the replica. The commit is there, but would be
    lost if the replica took over now. A repeated commit waits for the replica again.
    """

    is_distributed = False
    """Whether the ledger is distributed over nodes, see `ledger.distribution`."""
    answers_within_s: float | None = None
    """How long to wait for one answer. After it, the connection is closed.

    PostgreSQL's own limits do not end the wait of a coordinator for a node that hangs.
    """

    synchronous_commit = "on"
    """The session's setting, of which nodes know nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unconfirmed = unconfirmed = list[Diagnostic]()

        def listen(notice: Diagnostic) -> None:
            passed_on = (notice.source_function, notice.severity_nonlocalized, notice.sqlstate)
            if notice.source_function == _WAITS_FOR_REPLICA or passed_on == _WARNING_AT_COMMIT:
                unconfirmed.append(notice)

        self.add_notice_handler(listen)

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """As psycopg does. Raises SilenceError if there is no answer within `answers_within_s`."""
        if timeout is not None or self.answers_within_s is None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.answers_within_s)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 - there is no public name for it
            self.close()
            raise SilenceError(f"no answer within {self.answers_within_s:g} s") from None

    def commit(self) -> None:
        """Commit. Raises OperatorIntervention if no replica has confirmed it."""
        self._unconfirmed.clear()
        super().commit()
        self.refuse_unconfirmed()

    def refuse_unconfirmed(self) -> None:
        """Raise OperatorIntervention if no replica has confirmed the last commit."""
        if self._unconfirmed:
            self._unconfirmed.clear()
            raise OperatorIntervention(
                "somebody canceled a commit that waited for the synchronous replica, which may not have it"
            )


@dataclass(slots=True)
class _Silence:
    """Of a node that hangs."""

    until: float
    """When to try it again, by the monotonic clock."""
    length_s: float


@dataclass(slots=True)
class _Known:
    """What is known of an engine."""

    shard_connections: int
    connections: WeakSet[LedgerConnection] = field(default_factory=WeakSet)
    is_distributed: bool | None = None
    """What the newest connection has found."""
    silences: dict[int, _Silence] = field(default_factory=dict)
    """By the node."""

    def refuse_silent(self, node: int) -> None:
        """Raise SilenceError if the node did not answer a moment ago."""
        silence = self.silences.get(node)
        if silence is not None and time.monotonic() < silence.until:
            raise SilenceError(f"node {node} does not answer")

    def heard(self, node: int) -> None:
        """Record that the node answers."""
        self.silences.pop(node, None)

    def heard_nothing(self, node: int) -> None:
        """Record that the node does not answer."""
        before = self.silences.get(node)
        length_s = FIRST_SILENCE_S if before is None else min(2 * before.length_s, LONGEST_SILENCE_S)
        self.silences[node] = _Silence(time.monotonic() + length_s, length_s)


def parse_url(url: str) -> URL:
    """Parse a database URL that `connect` can use. Raises DatabaseURLError."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        raise DatabaseURLError("is not a URL; it looks like postgresql+psycopg://user:password@host/database") from None
    if parsed.drivername != "postgresql+psycopg":
        raise DatabaseURLError(f"must begin with postgresql+psycopg://, not {parsed.drivername}://")
    if "@" in (parsed.host or ""):
        raise DatabaseURLError("names a host with an @ in it; in a user's name or a password, write %40 for @")
    try:
        parsed.get_dialect()().create_connect_args(parsed)
    except ArgumentError as error:
        raise DatabaseURLError(f"has an option with a wrong value: {error}") from None
    try:
        options = conninfo.make_conninfo(**{name: str(value) for name, value in parsed.query.items()})
    except psycopg.ProgrammingError as error:
        raise DatabaseURLError(f"has an option that PostgreSQL does not know: {describe(error)}") from None
    # libpq checks the options before it connects. This address leads nowhere.
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
    connect_timeout_s: int = CONNECT_TIMEOUT_S,
    shard_connections: int = 2,
) -> Engine:
    """Return an engine for the PostgreSQL database at `url` (`postgresql+psycopg://…`). Does not connect yet.

    Without `keeps_connections`, each use opens a new connection. So an outage shows within `connect_timeout_s`, also
    when the database hangs, where an open connection would wait forever.

    With `checks_connections`, each connection is checked before it is used again. If it is broken, all that are as old
    are dropped, and a new one is opened, once. So no caller notices a restart of the database, and no statement is sent
    twice.

    With `transaction_timeout_s`, PostgreSQL 17 or newer ends a transaction after so long, with its connection. So a
    frozen process holds no locks for longer.

    With `answer_timeout_s`, the engine is for queries that must not burden others. PostgreSQL ends one after so long,
    uses one process for it, and prefers an index to a whole table.

    A batch uses at most `shard_connections` connections at once, if the ledger is distributed; otherwise one. Raises
    DatabaseURLError.
    """
    questions = "" if answer_timeout_s is None else f"-c statement_timeout={answer_timeout_s}s {_FOR_QUESTIONS}"
    pool: dict[str, Any] = {"poolclass": NullPool}
    if keeps_connections:
        pool = {"pool_timeout": POOL_TIMEOUT_S, "pool_size": POOL_SIZE + shard_connections}
    parsed = parse_url(url)
    settings = _CONNECTION | {"connect_timeout": connect_timeout_s}
    engine = create_engine(
        parsed,
        **pool,
        pool_pre_ping=checks_connections,
        connect_args={
            **{name: value for name, value in settings.items() if name not in parsed.query},
            "options": f"{parsed.query.get('options', '')} {_SESSION_OPTIONS} {questions}",
        },
    )

    known = _known[engine] = _Known(shard_connections)

    def open_session(*args: Any, **options: Any) -> LedgerConnection:
        connection = LedgerConnection.connect(*args, **options)
        _begin_session(connection, transaction_timeout_s)
        limit_s = answer_timeout_s or (transaction_timeout_s and STATEMENT_TIMEOUT_S)
        if connection.is_distributed and limit_s:
            connection.answers_within_s = limit_s + ANSWER_MARGIN_S
        known.connections.add(connection)
        known.is_distributed = connection.is_distributed
        return connection

    # Checks the session before SQLAlchemy's first query, to which some unsuitable databases give an unreadable answer.
    engine.dialect.connect = open_session  # type: ignore[assignment, method-assign]
    return engine


def has_nodes(connection: Connection) -> bool:
    """Whether the ledger is distributed over nodes, as `connection` found when it was opened."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, LedgerConnection)
    return driver.is_distributed


def shard_connections(engine: Engine) -> int | None:
    """How many connections a batch uses at once, at most. None: the ledger is not distributed, and it uses one.

    Connects, if there is no connection yet. Raises database errors.
    """
    known = _known[engine]
    if known.is_distributed is None:
        engine.connect().close()
    return known.shard_connections if known.is_distributed else None


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection that only reads. All its statements see the ledger as it was at the first one."""
    with engine.connect() as opened:
        yield read_only(opened)


def read_only(connection: Connection) -> Connection:
    """The same, when it is not in a transaction: the next one is a snapshot."""
    return connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


_KNOWS_TRANSACTION_TIMEOUT = 170_000
_SESSION = """
    SELECT pg_backend_pid(), EXISTS (SELECT FROM pg_extension WHERE extname = 'citus'), set_config(
        'synchronous_commit',
        CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END,
        false
    )
"""


# What a transaction sets for itself, such as the time that it waits for locks, counts on the nodes, too. Of a node's
# warning at a commit, Citus makes a message for debugging.
_SESSION_OF_CITUS = """
    SELECT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = to_regclass('wallets')),
           set_config('citus.propagate_set_commands', 'local', false),
           set_config('client_min_messages', 'debug1', false)
"""


def _begin_session(connection: LedgerConnection, transaction_timeout_s: int | None) -> None:
    """Make every commit on `connection` wait until it is on disk, whatever the server's default.

    Raises UnsuitableDatabaseError, or OperationalError if a pooler shares PostgreSQL's sessions among clients. Prepared
    statements and settings belong to a session: in a shared one, a name may be another client's statement.
    """
    # One parameter type for integers of any size, so one prepared statement instead of many.
    connection.adapters.register_dumper(int, Int8BinaryDumper)
    connection.adapters.register_dumper(Array, ArrayDumper)
    encoding = connection.info.parameter_status("server_encoding")
    [(server, has_citus, connection.synchronous_commit)] = connection.execute(_SESSION).fetchall()
    if has_citus:
        [(connection.is_distributed, *_)] = connection.execute(_SESSION_OF_CITUS).fetchall()
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
    """Raise UnsuitableDatabaseError for a database that can never be used. Ignores one that cannot be reached."""
    try:
        engine.connect().close()
    except DBAPIError as error:
        if isinstance(error.orig, UnsuitableDatabaseError):
            raise error.orig from None


def is_abandoned(engine: Engine) -> bool:
    """Whether `abandon` was called. Then no new connection should be tried, as that may take seconds."""
    return engine in _abandoned


def abandon(engine: Engine) -> None:
    """Break the connections of `engine`, which is not used any more."""
    _abandoned.add(engine)
    break_connections(engine)


def break_connections(engine: Engine) -> None:
    """Break the open connections of `engine`. A thread that waits for an answer on one fails as in an outage."""
    for connection in list(_known[engine].connections):
        with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as shared:
            shared.shutdown(socket.SHUT_RDWR)


@contextmanager
def raw_connection(
    engine: Engine, *, node: int | None = None, patience_s: float = LONG_PATIENCE_S
) -> Iterator[LedgerConnection]:
    """A psycopg connection that begins no transaction by itself. After an error it is closed, not used again.

    If the ledger is distributed, `node` has what this is about, and PostgreSQL itself gives up a statement after
    `patience_s`. Raises SilenceError if the node hangs; at once, if that is known.
    """
    known = _known[engine]
    if node is not None:
        known.refuse_silent(node)
    with engine.connect() as pooled:
        connection = pooled.connection.driver_connection
        assert isinstance(connection, LedgerConnection)
        try:
            connection.autocommit = True  # psycopg's own BEGIN would cost a round trip
            usually_s = connection.answers_within_s
            if connection.is_distributed:
                connection.answers_within_s = patience_s + ANSWER_MARGIN_S
            yield connection
            connection.refuse_unconfirmed()
            connection.autocommit = False
            connection.answers_within_s = usually_s
            if node is not None:
                known.heard(node)
        except BaseException as error:
            if node is not None and isinstance(error, SilenceError):
                known.heard_nothing(node)
            # The server notices a closed connection a moment later, and would hold the locks until then.
            if connection.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                with suppress(psycopg.Error):
                    connection.execute("ROLLBACK")
            if connection.broken:  # as others may be: SQLAlchemy notices here, and uses none again that is as old
                with suppress(DBAPIError):
                    pooled.exec_driver_sql("SELECT 1")
            pooled.invalidate()
            raise
