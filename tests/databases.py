"""A database of PostgreSQL and one of the broker for one test, on the session's servers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

import redis
from sqlalchemy import Engine, create_engine, make_url

from tests import citus
from tests.support import sql
from worker.local.embedded import Embedded

MIGRATED, EMPTY = "holdfast", "template1"

_numbers = count(1)
_in_use: set[int] = set()


@cache
def administrator(services: Embedded) -> Engine:
    """Who makes and drops databases, on one connection for all of them. At the end of the session: `dispose`."""
    # The ping: a test may have ended the server, and started it again.
    return create_engine(services.admin_url, isolation_level="AUTOCOMMIT", pool_size=1, pool_pre_ping=True)


def administrator_of(services: Embedded, database: str, *, of_rows: bool = False) -> Engine:
    """A superuser's engine for `database` on its server.

    On Citus, that is the coordinator, or, `of_rows`, a node that has some of the rows.
    """
    if (distributed := citus.cluster()) is not None:
        return distributed.administrator_of(int(of_rows), database)
    return create_engine(make_url(services.admin_url).set(database=database), isolation_level="AUTOCOMMIT")


@contextmanager
def new_database(services: Embedded, template: str = MIGRATED, options: str = "") -> Iterator[str]:
    """The URL of a database, as its owner. It is dropped at the end, whoever still uses it."""
    name = f"test_{next(_numbers)}"
    if (distributed := citus.cluster()) is not None and not options:
        with citus.new_database(distributed, name, migrated=template == MIGRATED) as url:
            yield url
        return
    admin = administrator(services)
    sql(admin, f"CREATE DATABASE {name} OWNER holdfast TEMPLATE {template} STRATEGY FILE_COPY {options}")
    try:
        yield services.postgres.url("holdfast", name)
    finally:
        sql(admin, f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def new_broker_database(services: Embedded) -> Iterator[str]:
    """The URL of an empty database of the broker, as its administrator."""
    number = next(number for number in (1 + each % 15 for each in _numbers) if number not in _in_use)
    url = services.broker.url.removesuffix("0") + str(number)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    _in_use.add(number)
    try:
        yield url
    finally:
        _in_use.remove(number)
