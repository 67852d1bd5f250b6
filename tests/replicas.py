"""A replica of a PostgreSQL server, and what an administrator does to both."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from tests.installation import open_folder
from worker.local.postgres import Postgres, postgres_account, socket_folder


@contextmanager
def as_admin(server: Postgres) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(f"host={server.sockets} port=5432 user=postgres", autocommit=True) as connection:
        yield connection


def configure(server: Postgres, name: str, value: str) -> None:
    with as_admin(server) as admin:
        admin.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        admin.execute("SELECT pg_reload_conf()")


@contextmanager
def replica_of(primary: Postgres) -> Iterator[Postgres]:
    """Another server, which has a base backup of `primary` and follows it."""
    with open_folder() as folder, socket_folder(folder, postgres_account()) as sockets:
        replica = Postgres(folder, sockets, durable=False, account=postgres_account())
        with as_admin(primary) as admin:
            admin.execute("SELECT pg_backup_start('replica', true)")
            shutil.copytree(primary.data, replica.data, ignore=shutil.ignore_patterns("postmaster.*"))
            [label] = admin.execute("SELECT labelfile FROM pg_backup_stop()").fetchall()[0]
        replica.data.joinpath("backup_label").write_text(label)
        replica.data.joinpath("standby.signal").touch()
        with replica.data.joinpath("postgresql.auto.conf").open("a") as settings:
            source = f"host={primary.sockets} port=5432 user=postgres application_name=replica"
            settings.write(f"primary_conninfo = '{source}'\nwal_retrieve_retry_interval = 100\n")
        owner = primary.data.stat()
        for path in (replica.data, *replica.data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        try:
            replica.start()
            yield replica
        finally:
            replica.kill()
