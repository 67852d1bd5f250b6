"""A database whose schema is missing, older or newer is not said to be away: each part says what to run."""

from collections.abc import Iterator

import httpx
import pytest

from holdfast_client.client import Client
from ledger import migrations
from tests.acceptance import commands
from tests.acceptance.website import served, token
from tests.databases import EMPTY, MIGRATED
from tests.installation import Installation, installed, warnings_in
from tests.support import PATIENCE_S, eventually, sql
from worker.local.embedded import Embedded

HEAD = migrations.head_revision()
SENTENCES = {
    "missing": "the database is not migrated yet: run `holdfast migrate`",
    "older": f"the database is at revision 0009, and this version needs {HEAD}: run `holdfast migrate`",
    "newer": (
        f"the database is at revision 9999, and this version of Holdfast knows none after {HEAD}: run the newer "
        f"version, or first use it to take the database back, with `holdfast migrate --to {HEAD}`"
    ),
}


@pytest.fixture(scope="module", params=SENTENCES)
def unfit(request: pytest.FixtureRequest, services: Embedded) -> Iterator[tuple[Installation, str]]:
    """An installation whose schema does not fit, and the sentence about it."""
    with installed(services, template=EMPTY if request.param == "missing" else MIGRATED) as own:
        if request.param == "older":
            migrations.downgrade(own.engine, "0009")
            migrations.grant(own.engine)
        if request.param == "newer":
            sql(own.engine, "ALTER TABLE wallets RENAME COLUMN plan_version TO newest_version")
            sql(own.engine, "UPDATE alembic_version SET version_num = '9999'")
        yield own, SENTENCES[request.param]


def test_a_command_says_what_to_run(unfit: tuple[Installation, str]) -> None:
    installation, sentence = unfit
    ended = commands.run("wallet", "acme", env=installation.environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"holdfast: {sentence}\n")


def test_the_api_says_what_to_run(unfit: tuple[Installation, str]) -> None:
    installation, sentence = unfit
    with served(installation.database_url, installation.broker_url) as address:
        ready = httpx.get(f"{address}/readyz", timeout=PATIENCE_S)
        assert (ready.status_code, ready.json()) == (503, {"database": sentence, "broker": "ok"})
        bearer = {"Authorization": f"Bearer {token(orgs=['acme'])}"}
        read = httpx.get(f"{address}/api/organizations/acme/credits", headers=bearer, timeout=PATIENCE_S)
    assert (read.status_code, read.headers["retry-after"]) == (503, "5")
    assert read.json()["detail"] == f"{sentence[0].upper()}{sentence[1:]}."


def test_a_worker_that_may_not_read_the_revision_says_what_is_missing(services: Embedded) -> None:
    with installed(services) as own, Client(own.broker_url) as client:
        migrations.downgrade(own.engine, "0009")
        migrations.grant(own.engine)
        sql(own.engine, "REVOKE ALL ON alembic_version FROM holdfast_worker")
        client.grant(org_id="acme", grant_id="gift", credits=1)
        worker = own.start_worker()
        eventually(lambda: warnings_in(worker))
        [line] = warnings_in(worker)
        assert line.startswith("The database cannot be used as it is; the messages wait: column ")
        assert line.endswith("the database is not migrated for this version; run `holdfast migrate --roles`")


def test_a_worker_says_what_to_run_and_keeps_its_messages(unfit: tuple[Installation, str]) -> None:
    installation, sentence = unfit
    with Client(installation.broker_url) as client:
        client.grant(org_id="acme", grant_id="gift", credits=1)
    worker = installation.start_worker()
    eventually(lambda: warnings_in(worker))
    assert warnings_in(worker) == [f"The database cannot be used as it is; the messages wait: {sentence}"]
    worker.stop()
    assert installation.waiting() == {"credits": 1, "unacked": 0}
