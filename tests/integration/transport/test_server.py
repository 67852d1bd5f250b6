"""Which servers the Redis transport takes for a broker, and how it speaks to them."""

import asyncio
import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kombu
import pytest
import redis
from celery import Celery
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kombu.connection import Connection

from holdfast_client.redis_server import UnsupportedServerError, server_problem
from tests.installation import closing_broker, environment, open_folder
from tests.integration.transport.kombu_worker import OURS, QUEUE, channel_of, held, numbers, send, working
from tests.support import PATIENCE_S
from worker.broker import create_celery
from worker.local.machine import free_port
from worker.transport import SetAside

pytestmark = pytest.mark.timeout(300)  # seconds, on a slow machine

CLUSTER = {"cluster-enabled": "yes"}


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"redis_version": "6.0.16"}, "the broker is Redis 6.0.16; Holdfast needs 6.2 or newer, or Valkey"),
        ({"redis_version": "6.2.0", "cluster_enabled": 0}, None),
        ({"redis_version": "7.2.4"}, None),
        (
            {"redis_version": "8.0.1", "cluster_enabled": 1},
            "the broker is a Redis cluster; Holdfast needs a single server",
        ),
    ],
)
def test_which_servers_can_be_the_broker(info: dict[str, Any], problem: str | None) -> None:
    assert server_problem(info) == problem


def test_a_worker_ends_with_one_line_at_a_cluster() -> None:
    with open_folder() as folder, closing_broker(folder, **CLUSTER, **{"cluster-port": str(free_port())}) as broker:
        broker.start()
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "celery", "--quiet", "-A", "worker", "worker"],
            env=environment(
                HOLDFAST_DATABASE_URL="postgresql+psycopg://u@127.0.0.1:1/d", HOLDFAST_BROKER_URL=broker.url
            ),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    [line] = ended.stderr.splitlines()
    problem = "the broker is a Redis cluster; Holdfast needs a single server"
    assert (ended.returncode, ended.stdout, json.loads(line)["message"]) == (2, "", problem)


def test_a_cluster_is_refused() -> None:
    with (
        open_folder() as folder,
        closing_broker(folder, **CLUSTER, **{"cluster-port": str(free_port())}) as broker,
    ):
        broker.start()
        with Connection(broker.url, transport=OURS) as connection, pytest.raises(UnsupportedServerError):
            channel_of(connection).check_server()


def test_it_speaks_tls(broker_url: str, broker: redis.Redis) -> None:
    """The wheel's server does not, so something in front of it does, as a cloud's proxy would."""
    with open_folder() as folder, tls_in_front_of(broker_url, folder) as (secure_url, certificate):
        with Celery(broker=secure_url, set_as_current=False) as producer:
            producer.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(certificate)}
            send(producer, 1)
        query = f"?ssl_cert_reqs=required&ssl_ca_certs={certificate}"
        with working(f"{secure_url}{query}") as worker:
            assert numbers(worker.receive(1)) == [1]
            worker.acknowledge()
            broker.lpush(QUEUE, b"x" * 20_000_000)
            assert isinstance(worker.receive(1)[0], SetAside)
            worker.acknowledge()
            broker.lpush(QUEUE, b"small")
            assert worker.receive(1)[0].body == b"small"
            worker.acknowledge()
        assert held(broker) == 0


@contextmanager
def tls_in_front_of(broker_url: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """A rediss:// URL for the server at `broker_url`, and the certificate to trust."""
    server = urlsplit(broker_url)
    certificate = self_signed(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, folder / "key.pem")

    address: Future[int] = Future()
    stopped = threading.Event()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(server.hostname, server.port)
        await asyncio.gather(copy(reader, upstream_writer), copy(upstream_reader, writer))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one of the two went away
        finally:
            writer.transport.abort()

    async def serve() -> None:
        proxy = await asyncio.start_server(connect, "127.0.0.1", 0, ssl=context)
        address.set_result(proxy.sockets[0].getsockname()[1])
        await asyncio.to_thread(stopped.wait)
        proxy.close()
        connections = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        port = address.result(PATIENCE_S)
        yield f"rediss://{server.username}:{server.password}@127.0.0.1:{port}{server.path}", certificate
    finally:
        stopped.set()
        thread.join()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1, for an hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


def test_the_settings_of_the_worker_are_those_that_are_tested_here() -> None:
    with create_celery("test", "redis://127.0.0.1:1/0", None) as app:
        options = app.conf.broker_transport_options
    assert options["unacked_restore_interval"] == 1
    assert options["priority_steps"] == [0]


def test_the_pinned_kombu_is_here() -> None:
    assert kombu.VERSION[:2] == (5, 7), "read worker/transport.py again, with this kombu's transport/redis.py beside it"
