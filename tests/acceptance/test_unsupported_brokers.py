"""A server that can never be the broker is refused by everybody: nobody takes a message that no worker would take."""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import redis

from holdfast_client.client import Client, NotSentError, UnsupportedBrokerError
from ledger.store import apply_batch
from tests.acceptance import commands
from tests.acceptance.website import SECRET, token
from tests.installation import (
    HOLDFAST,
    Fork,
    Installation,
    celery,
    environment,
    exit_code,
    log_of,
    open_folder,
)
from tests.messages import delivery
from tests.support import PATIENCE_S, eventually
from worker.local.broker import _valkey_binary
from worker.local.machine import free_port
from worker.local.process import Process

CLUSTER = "the broker is a Redis cluster; Holdfast needs a single server"
SENTINEL = "the broker is a Redis Sentinel; Holdfast needs the server itself"
DATABASE = "postgresql+psycopg://u@127.0.0.1:1/d"
API = [sys.executable, "-m", "uvicorn", "api_stub.app:app", "--port", "0"]
REPLAY = [HOLDFAST, "failed", "replay", "1"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


def serving(folder: Path, name: str, *arguments: str) -> Iterator[str]:
    """The URL of a server with these arguments."""
    port = free_port()
    config = folder / f"{name}.conf"
    config.write_text(f"bind 127.0.0.1\nport {port}\ndir {folder}\n")
    process = Process(name, [str(_valkey_binary()), str(config), *arguments], folder)
    process.start()
    try:
        with closing(redis.Redis(port=port)) as server:
            eventually(lambda: "ready" in log_of(process).lower() or "Sentinel ID" in log_of(process))
            if name == "cluster":  # of one, which takes whatever is sent to it
                server.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                eventually(lambda: server.cluster("info")["cluster_state"] == "ok")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.stop()


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[str]:
    yield from serving(folder, "cluster", "--cluster-enabled", "yes", "--cluster-port", str(free_port()))


@pytest.fixture(scope="module")
def sentinel(folder: Path) -> Iterator[str]:
    yield from serving(folder, "sentinel", "--sentinel")


@pytest.fixture(params=["cluster", "sentinel"])
def unsupported(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The URL of such a server, and what is said of it."""
    return request.getfixturevalue(request.param), {"cluster": CLUSTER, "sentinel": SENTINEL}[request.param]


@pytest.mark.parametrize("argv", [celery("worker"), celery("beat"), API], ids=["worker", "beat", "api"])
def test_every_process_ends_with_one_line(folder: Path, unsupported: tuple[str, str], argv: list[str]) -> None:
    url, problem = unsupported
    process = Fork(
        "refused",
        argv,
        folder,
        env=environment(HOLDFAST_DATABASE_URL=DATABASE, HOLDFAST_BROKER_URL=url, HOLDFAST_JWT_SECRET=SECRET),
    )
    process.log_file.unlink(missing_ok=True)
    process.start()
    try:
        assert exit_code(process) == 2, log_of(process)
    finally:
        process.kill()
    assert log_of(process).count(problem) == 1
    assert "Traceback" not in log_of(process)


def test_the_client_sends_nothing(unsupported: tuple[str, str]) -> None:
    url, problem = unsupported
    with Client(url) as client:
        for _ in range(2):
            with pytest.raises(NotSentError, match=problem):
                client.grant(org_id="acme", grant_id="gift", credits=1)
        with pytest.raises(NotSentError, match=problem), client.batch() as batch:
            batch.grant(org_id="acme", grant_id="gift", credits=1)
        with pytest.raises(UnsupportedBrokerError, match=problem):
            client.waiting()


def test_nothing_was_left_in_the_cluster(cluster: str) -> None:
    with Client(cluster) as client, pytest.raises(NotSentError):
        client.grant(org_id="acme", grant_id="gift", credits=1)
    with closing(redis.Redis.from_url(cluster)) as server:
        assert server.exists("credits") == 0


@pytest.mark.parametrize("url", ["sentinel://127.0.0.1:26379", "kafka://host", "127.0.0.1:6379"])
def test_the_client_refuses_the_url_of_anything_else(url: str) -> None:
    with pytest.raises(ValueError, match=r"the broker's URL must begin with redis://, rediss://, amqp:// or amqps://"):
        Client(url)


@pytest.mark.parametrize(
    "url",
    ["amqp://ann:s3/sekrit@host//", "redis://:s3#sekrit@host/0", "redis://:sekrit@host:99999/0", "amqp://u:sekrit@h:0"],
)
def test_the_client_refuses_a_malformed_url_without_showing_it(url: str) -> None:
    wanted = r"must begin with redis://.* and name a host; in a password, write %40 for @, %2F for / and %23 for #$"
    with pytest.raises(ValueError, match=f"^the broker's URL {wanted}") as refused:
        Client(url)
    assert "s3" not in str(refused.value)
    with pytest.raises(ValueError, match=r"^the URL for answers must begin with redis:// or rediss:// and name a host"):
        Client("amqp://host//", result_url=url.replace("amqp", "redis"))


def test_the_client_refuses_several_servers_but_by_whole_urls_with_semicolons() -> None:
    with pytest.raises(ValueError, match=r"^the broker's URL must name one server, or .*with semicolons"):
        Client("amqp://a,b,c")
    with Client("amqp://a//;amqp://b//"):
        pass


@pytest.mark.parametrize("argv", [celery("worker"), celery("beat"), API, REPLAY], ids=["worker", "beat", "api", "cli"])
def test_every_process_refuses_several_servers_with_commas(folder: Path, argv: list[str]) -> None:
    settings = environment(
        HOLDFAST_DATABASE_URL=DATABASE, HOLDFAST_BROKER_URL="amqp://u:sekrit@a,b//", HOLDFAST_JWT_SECRET=SECRET
    )
    ended = commands.run_program(argv, env=settings, cwd=folder)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("holdfast: HOLDFAST_BROKER_URL must name one server, or ")
    assert ended.stderr.count("\n") == 1


def test_neither_the_api_nor_a_command_shows_the_password_of_any_node(installation: Installation) -> None:
    url = ";".join(f"amqp://user:sekrit-{number}@127.0.0.1:1//" for number in range(3))
    port = free_port()
    settings = {"HOLDFAST_BROKER_URL": url, "HOLDFAST_JWT_SECRET": SECRET}
    api = installation.start("api", *API[:-1], str(port), "--log-level", "debug", **settings)
    headers = {"Authorization": f"Bearer {token(scope='workflows:write')}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=PATIENCE_S) as web:

        def is_refused() -> bool:
            try:
                sent = web.post("/api/organizations/acme/workflows/run/cancel", json={})
            except httpx.ConnectError:
                return False
            assert sent.status_code == 503, sent.text
            assert "sekrit" not in sent.text
            return True

        eventually(is_refused)
    apply_batch(installation.engine, [delivery("workflow.start", org_id="acme", workflow_id="run", credits=0)])
    released = commands.run("release", "acme", "run", "--why", "lost", env={**installation.environment, **settings})
    assert released.returncode != 0
    for shown in (log_of(api), released.stdout, released.stderr):
        assert "sekrit" not in shown
    assert "amqp://user:**@127.0.0.1:1" in released.stderr
