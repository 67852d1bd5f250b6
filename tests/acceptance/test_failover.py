"""A replica of the database or of the broker takes over, and what was lost can be sent again."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
import redis

from holdfast_client.broker import QUEUE
from holdfast_client.client import Client
from ledger import audit, migrations
from ledger.database import connect
from tests.installation import Installation, Producer, celery, installed_on, open_folder, wait_for_workers
from tests.replicas import as_admin, configure, replica_of
from tests.support import PATIENCE_S, eventually, sql
from worker.local.broker import Broker
from worker.local.embedded import Embedded
from worker.local.postgres import Postgres
from worker.transport import UNACKED

SECURITY = (Path(__file__).parents[2] / "docs" / "security.md").read_text()

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


@pytest.fixture
def two() -> Iterator[tuple[Embedded, Postgres, Installation, Producer]]:
    """A primary with a replica, and a ledger whose URL names both."""
    with ExitStack() as stack:
        services = stack.enter_context(Embedded(stack.enter_context(open_folder()), durable=False))
        engine = connect(services.database_url)
        migrations.upgrade(engine)
        migrations.grant(engine)
        engine.dispose()
        replica = stack.enter_context(replica_of(services.postgres))
        hosts = "&".join(f"host={quote(str(one.sockets))}:5432" for one in (services.postgres, replica))
        url = f"postgresql+psycopg://holdfast@/holdfast?{hosts}&target_session_attrs=read-write"
        installation = stack.enter_context(installed_on(url, services.broker.url))
        producer = stack.enter_context(closing(Producer(services.broker.url)))
        installation.start_worker()
        wait_for_workers(producer)
        yield services, replica, installation, producer


def grant(number: int) -> dict[str, Any]:
    return {"org_id": f"org-{number % 7}", "grant_id": str(number), "credits": 1}


def granted(installation: Installation) -> list[int]:
    ids = sql(installation.engine, "SELECT (metadata ->> 'grant_id')::int FROM credit_events ORDER BY 1")
    return [number for (number,) in ids]


def fail_over(primary: Postgres, replica: Postgres, installation: Installation) -> None:
    primary.kill()
    installation.engine.dispose()
    with as_admin(replica) as admin:
        admin.execute("SELECT pg_promote()")


def test_what_was_answered_is_on_a_synchronous_replica_that_takes_over(two: Any) -> None:
    services, replica, installation, producer = two
    configure(services.postgres, "synchronous_standby_names", "replica")
    followers = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
    with as_admin(services.postgres) as admin:
        eventually(lambda: admin.execute(followers).fetchall() == [(1,)])
    asked = [producer.ask("wallet.grant", grant(number)) for number in range(500)]
    eventually(lambda: sum(one.ready() for one in asked) > 0)
    services.postgres.kill()
    answered = [number for number, one in enumerate(asked) if one.ready()]
    fail_over(services.postgres, replica, installation)
    kept = granted(installation)
    assert set(answered) <= set(kept)
    for one in asked:
        assert one.get(timeout=PATIENCE_S)["outcome"] == "posted"
    assert granted(installation) == list(range(500))
    eventually(installation.is_drained)
    assert audit.verify(installation.engine).is_clean


def test_what_an_asynchronous_replica_has_missed_is_sent_again_and_applied_once(two: Any) -> None:
    services, replica, installation, producer = two
    for number in range(10):
        producer.answer("wallet.grant", grant(number))
    with as_admin(replica) as standby:
        eventually(lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver").fetchall() == [(1,)])
    with psycopg.connect(f"host={replica.sockets} port=5432 user=postgres dbname=holdfast", autocommit=True) as standby:
        eventually(lambda: standby.execute("SELECT count(*) FROM credit_events").fetchall() == [(10,)])
    configure(replica, "primary_conninfo", "")  # it falls behind
    with as_admin(replica) as standby:
        eventually(lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver").fetchall() == [(0,)])
    for number in range(10, 30):
        producer.answer("wallet.grant", grant(number))
    fail_over(services.postgres, replica, installation)
    asked = producer.ask("wallet.grant", grant(30))
    assert asked.get(timeout=PATIENCE_S)["outcome"] == "posted"
    assert granted(installation) == [*range(10), 30]
    assert audit.verify(installation.engine).is_clean
    for number in range(31):  # the engine's own records say what it has sent
        producer.answer("wallet.grant", grant(number))
    assert granted(installation) == list(range(31))
    eventually(installation.is_drained)
    assert audit.verify(installation.engine).is_clean


def test_what_a_replica_of_redis_has_missed_is_sent_again_and_applied_once(installation: Installation) -> None:
    with ExitStack() as stack:
        primary, replica = (Broker(stack.enter_context(open_folder())) for _ in range(2))
        for server in (primary, replica):
            stack.callback(server.kill)
            server.start()
        follower = stack.enter_context(closing(redis.Redis.from_url(replica.url)))
        source = urlsplit(primary.url)
        [(name, password, rights)] = re.findall("^user (replica) on >(.+?) (.+)$", SECURITY, re.MULTILINE)
        administrator = stack.enter_context(closing(redis.Redis.from_url(primary.url)))
        administrator.execute_command("ACL", "SETUSER", name, "on", f">{password}", *rights.split())
        follower.config_set("primaryuser", name)
        follower.config_set("primaryauth", password)
        follower.replicaof(source.hostname, source.port)
        sender = stack.enter_context(Client(primary.url))
        for number in range(10):
            sender.grant(**grant(number))
        eventually(lambda: follower.llen(QUEUE) == 10)
        follower.replicaof("NO", "ONE")
        for number in range(10, 15):
            sender.grant(**grant(number))
        primary.kill()
        installation.start("worker", *celery("worker"), HOLDFAST_BROKER_URL=replica.url)
        eventually(lambda: granted(installation) == list(range(10)))
        again = stack.enter_context(Client(replica.url))
        for number in range(15):  # the engine's own records say what it has sent
            again.grant(**grant(number))
        eventually(lambda: granted(installation) == list(range(15)))
        eventually(lambda: follower.llen(QUEUE) == follower.hlen(UNACKED) == 0)
    assert audit.verify(installation.engine).is_clean
