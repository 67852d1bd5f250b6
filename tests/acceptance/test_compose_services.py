"""The servers of docker-compose.yml, run here without their containers.

The broker stays within its memory, and the database is made, whatever was there.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ledger import roles
from tests import rabbitmq
from tests.compose import RABBITMQ_FILE, RABBITMQ_SERVICES, SERVICES, environment, interpolated, with_program
from tests.installation import open_folder
from tests.support import PATIENCE_S
from worker.local.broker import _valkey_binary
from worker.local.embedded import Embedded
from worker.local.machine import free_port
from worker.local.postgres import Postgres
from worker.local.process import Process


@contextmanager
def broker_in_compose(folder: Path, memory_mb: int) -> Iterator[tuple[Process, int]]:
    """The broker as in Compose, in a container of so much memory, and its port."""
    port, settings = free_port(), folder / "settings"
    # What a container has of its own: a folder /data, and all ports.
    own = f"{{ sed 's|^dir /data$|dir {folder}|'; echo bind 127.0.0.1; echo port {port}; }} >{settings}"
    path = with_program("valkey-server", f'{own}; exec "{_valkey_binary()}" {settings}', folder)
    service = SERVICES["broker"]
    server = Process(
        "broker",
        [*service["entrypoint"], *map(interpolated, service["command"])],
        folder,
        env={**environment("broker"), "MEMORY_MB": str(memory_mb), "PATH": path},
    )
    server.start()
    try:
        with connected("holdfast", port) as broker:
            server.wait_until(lambda: answers(broker))
        yield server, port
    finally:
        server.stop()


def connected(user: str, port: int) -> redis.Redis:
    password = environment("broker")["BROKER_PASSWORD" if user == "holdfast" else "ENGINE_BROKER_PASSWORD"]
    return redis.Redis.from_url(f"redis://{user}:{password}@127.0.0.1:{port}", retry=Retry(NoBackoff(), 0))


def test_the_broker_refuses_what_it_has_no_memory_for_and_gives_back_the_rest(tmp_path: Path) -> None:
    with broker_in_compose(tmp_path, 40) as (server, port), connected("holdfast", port) as broker:
        taken = 0
        with suppress(redis.exceptions.OutOfMemoryError):
            while taken < 400:
                taken = broker.lpush("credits", bytes(100_000))
        assert 100 < taken < 400
        assert psutil.Process(server.pid).memory_info().rss < 40 * 2**20
        assert [broker.ltrim("credits", 0, -2) for _ in range(taken)] == [True] * taken
        assert broker.lpush("credits", b"one more") == 1


@pytest.mark.parametrize(
    ("beginning", "rest", "times"),
    [
        (b"*3\r\n$5\r\nLPUSH\r\n$14\r\ncredits.engine\r\n$100000000\r\n", b"\0", 99_000_000),
        (b"", b"HELLO\r\n", 2_000_000),
    ],
    ids=["half a message", "unread answers"],
)
def test_no_connection_of_an_engine_takes_the_brokers_memory_from_the_others(
    tmp_path: Path, beginning: bytes, rest: bytes, times: int
) -> None:
    sent = beginning + rest * times
    with broker_in_compose(tmp_path, 256) as (server, port), connected("holdfast", port) as broker:
        password = environment("broker")["ENGINE_BROKER_PASSWORD"].encode()
        with ExitStack() as connections:
            for _ in range(3):
                engine = connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
                engine.sendall(b"AUTH engine " + password + b"\r\n")
                with pytest.raises(ConnectionError):
                    engine.sendall(sent)
            assert broker.lpush("credits", b"a message") == 1
            assert psutil.Process(server.pid).memory_info().rss < 256 * 2**20


def answers(broker: redis.Redis) -> bool:
    with suppress(redis.ConnectionError):
        return bool(broker.ping())
    return False


@pytest.mark.soak
@pytest.mark.timeout(600)  # seconds, as RabbitMQ starts twice on a slow machine
@pytest.mark.skipif(not rabbitmq.is_installed(), reason="RabbitMQ (rabbitmq-server) is not installed")
def test_a_node_of_rabbitmq_in_compose_has_our_account_alone_and_our_settings(tmp_path: Path) -> None:
    [script] = RABBITMQ_SERVICES["mq-1"]["command"]
    # What a container has of its own: its folders, and a host's name that others find.
    own = interpolated(script).replace("/tmp/", f"{tmp_path}/").replace("/var/lib/rabbitmq", str(tmp_path))
    own = re.sub("rabbit@mq-([23])", r"absent-\1@localhost", own)
    given = {
        **environment("mq-1", with_rabbitmq=True),
        "RABBITMQ_CONFIG_FILE": f"{tmp_path}/rabbitmq.conf",
        "RABBITMQ_CONFIG_FILES": str(tmp_path / "more"),
        "RABBITMQ_MNESIA_BASE": str(tmp_path / "data"),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "HOME": str(tmp_path),
        "PATH": rabbitmq.PATH,
    }
    shutil.copytree(RABBITMQ_FILE.parent / "rabbitmq", tmp_path / "more")
    with rabbitmq.running() as broker:
        broker.server.stop()
        own = own.replace("rabbit@mq-1", broker.name)
        in_compose = replace(
            broker,
            server=Process(
                "mq-1",
                ["sh", "-euc", own],
                tmp_path,
                env=broker.environment | given,
            ),
            environment=broker.environment | given,
            user=f"holdfast:{given['RABBITMQ_PASSWORD']}",
        )
        in_compose.server.start()
        try:
            in_compose.wait()
            assert in_compose.control("--silent", "list_users").split() == ["holdfast", "[administrator]"]
            assert in_compose.control("eval", "net_kernel:get_net_ticktime().").strip() == "6"
            handled = in_compose.control("eval", "application:get_env(rabbit, cluster_partition_handling).")
            assert handled.strip() == "{ok,autoheal}"
        finally:
            in_compose.server.kill()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL in which Holdfast has nothing yet, that wants a password of its role."""
    with open_folder() as folder, Embedded(folder, durable=False) as running:
        rules = f"local all {','.join(ROLES)} scram-sha-256\nlocal all postgres trust\n"
        (running.postgres.data / "pg_hba.conf").write_text(rules)
        with administrator(running.postgres) as connection:
            connection.execute("SELECT pg_reload_conf()")
            connection.execute("DROP DATABASE holdfast")
            connection.execute(f"DROP ROLE {', '.join(ROLES)}")
        yield running.postgres


ROLES = {
    "holdfast": "DATABASE_PASSWORD",
    roles.WORKER: "WORKER_DATABASE_PASSWORD",
    roles.READER: "READER_DATABASE_PASSWORD",
}


def administrator(postgres: Postgres) -> psycopg.Connection[Any]:
    return psycopg.connect(f"host={postgres.sockets} port=5432 user=postgres dbname=postgres", autocommit=True)


def make_the_database(postgres: Postgres, password: str) -> subprocess.CompletedProcess[str]:
    """What the service `database` does."""
    service = SERVICES["database"]
    own = {"PGHOST": str(postgres.sockets), **{variable: f"{password} of {role}" for role, variable in ROLES.items()}}
    path = f"{Path(postgres.argv[0]).parent}:{os.defpath}"
    return subprocess.run(
        [*service["entrypoint"], *map(interpolated, service["command"])],
        env={**environment("database"), **own, "PATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "half",
    [
        "",
        "CREATE ROLE holdfast",
        "CREATE ROLE holdfast LOGIN PASSWORD 'an older one'",
        f"CREATE ROLE {roles.READER} LOGIN PASSWORD 'an older one'",
    ],
)
def test_the_database_is_holdfasts_own_whatever_of_it_was_there(half: str, postgres: Postgres) -> None:
    with administrator(postgres) as admin:
        admin.execute(half)
        for password in ("first", "it's rotated"):
            made = make_the_database(postgres, password)
            assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
            login: dict[str, Any] = {"dbname": "holdfast", "host": str(postgres.sockets), "port": 5432}
            with psycopg.connect(**login, user="holdfast", password=f"{password} of holdfast") as own:
                own.execute("CREATE TABLE IF NOT EXISTS kept ()")
                owner = own.execute(
                    "SELECT pg_get_userbyid(datdba), rolsuper, rolcreatedb, rolcreaterole"
                    " FROM pg_database, pg_roles WHERE datname = current_database() AND rolname = current_user"
                )
                assert owner.fetchone() == ("holdfast", False, False, False)
            for role in ROLES:
                with psycopg.connect(**login, user=role, password=f"{password} of {role}") as own:
                    rights = (
                        "SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
                    )
                    assert own.execute(rights).fetchone() == (False,)
                with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                    psycopg.connect(**login, user=role, password="another one")
        admin.execute("DROP DATABASE holdfast")
        admin.execute(f"DROP ROLE {', '.join(ROLES)}")


def test_the_database_that_cannot_be_made_is_an_error(postgres: Postgres) -> None:
    with administrator(postgres) as admin:
        admin.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        try:
            made = make_the_database(postgres, "first")
        finally:
            admin.execute("SET default_transaction_read_only = off")
            admin.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
    assert made.returncode == 3
    assert "cannot execute CREATE ROLE in a read-only transaction" in made.stderr
