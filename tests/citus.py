"""A cluster of Citus for the tests, which somebody else runs: HOLDFAST_TEST_CITUS_URL is its coordinator's.

The URL is a superuser's, of a database in which the nodes are registered, as `postgresql+psycopg://postgres@127.0.0.1/citus`.
Every server of the cluster has the roles `holdfast`, `holdfast_worker` and `holdfast_reader`, and lets anybody in.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import OperationalError

from ledger import migrations
from ledger.database import connect
from tests.support import eventually, sql

VARIABLE = "HOLDFAST_TEST_CITUS_URL"
_URL = os.environ.get(VARIABLE)
ROLES = ("holdfast", "holdfast_worker", "holdfast_reader")


class Cluster:
    """The coordinator first, then the nodes."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        own = create_engine(self.url)
        found = sql(own, "SELECT nodename, nodeport FROM pg_dist_node WHERE groupid <> 0 ORDER BY nodeid")
        own.dispose()
        self.nodes = [(str(host), int(port)) for host, port in found]
        places = [(self.url.host, self.url.port), *self.nodes]
        self._servers = [self.url.set(host=host, port=port, database="postgres") for host, port in places]
        self._administrators = [
            create_engine(server, isolation_level="AUTOCOMMIT", pool_size=1) for server in self._servers
        ]
        self._templates: dict[bool, str] = {}

    def administrator_of(self, place: int, database: str) -> Engine:
        """A superuser's engine for `database`: 0 is the coordinator."""
        return create_engine(self._servers[place].set(database=database), isolation_level="AUTOCOMMIT")

    def owner_url(self, database: str) -> URL:
        """The URL of `database` for the owner of its tables."""
        return self._servers[0].set(username="holdfast", database=database)

    def create(self, name: str, template: str | None = None) -> None:
        """A database on every server, in which the nodes are registered; or a copy of one."""
        for admin in self._administrators:
            sql(admin, f"CREATE DATABASE {name} OWNER holdfast TEMPLATE {template or 'template1'} STRATEGY FILE_COPY")
        # Tests have triggers of their own.
        sql(self._administrators[0], f"ALTER DATABASE {name} SET citus.enable_unsafe_triggers = on")
        if template is not None:
            return
        for place in range(len(self._servers)):
            admin = self.administrator_of(place, name)
            sql(admin, "CREATE EXTENSION citus")
            admin.dispose()
        admin = self.administrator_of(0, name)
        server = self._servers[0]
        sql(admin, "SELECT citus_set_coordinator_host(:host, :port)", host=server.host, port=server.port)
        for host, port in self.nodes:
            sql(admin, "SELECT citus_add_node(:host, :port)", host=host, port=port)
        admin.dispose()

    def drop(self, name: str) -> None:
        """Whoever still uses it."""
        for admin in self._administrators:
            eventually(partial(_is_dropped, admin, name))

    def template(self, *, migrated: bool) -> str:
        """The name of a database that nobody uses, for copies."""
        if (name := self._templates.get(migrated)) is not None:
            return name
        name = f"template_{os.getpid()}_{int(migrated)}"
        self.create(name)
        if migrated:
            engine = connect(self.owner_url(name).render_as_string(hide_password=False))
            migrations.upgrade(engine)
            migrations.grant(engine)
            engine.dispose()
        for admin in self._administrators:  # also of Citus's own process
            sql(admin, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            sql(admin, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name", name=name)
        self._templates[migrated] = name
        return name

    def dispose(self) -> None:
        """Drop the templates, and end the connections."""
        for name in self._templates.values():
            self.drop(name)
        for admin in self._administrators:
            admin.dispose()


def _is_dropped(admin: Engine, name: str) -> bool:
    try:
        sql(admin, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    except OperationalError:  # Citus's own process has just come back
        return False
    return True


@cache
def cluster() -> Cluster | None:
    """The cluster, if there is one."""
    return None if _URL is None else Cluster(_URL)


@contextmanager
def new_database(of: Cluster, name: str, *, migrated: bool) -> Iterator[str]:
    """The URL of a database on all servers of the cluster, as its owner. It is dropped at the end."""
    name = f"{name}_{os.getpid()}"
    of.create(name, of.template(migrated=migrated))
    url = of.owner_url(name)
    try:
        # In the form that the session's own server has: tests add to it.
        server = {"host": str(url.host), "port": str(url.port)}
        yield url.set(host=None, port=None).update_query_dict(server).render_as_string(hide_password=False)
    finally:
        of.drop(name)
