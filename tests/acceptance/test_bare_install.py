"""Holdfast installed without an extra: what it was before there was `holdfast-client`, and nothing of the server."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.installation import Installation
from tests.packages import what_runs
from tests.wheels import Environment, Wheels, build, link, required

SENDS = """
import importlib.util, sys
from worker.client import ENGINE_QUEUE, Client
from worker.async_client import AsyncClient
with Client(sys.argv[1]) as client:
    client.grant(org_id="acme", grant_id="gift", credits=5)
print([name for name in sys.argv[2:] if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def bare(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with both wheels and the packages that they require without an extra, taken from ours."""
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.install_alone(wheels.holdfast, wheels.client)
    environment.link(required(wheels.client))
    return environment


def test_it_sends_messages_and_has_nothing_of_the_server(
    wheels: Wheels, bare: Environment, installation: Installation
) -> None:
    of_the_server = what_runs(required(wheels.holdfast, "server")) - what_runs(required(wheels.client))
    provided = importlib.metadata.packages_distributions().items()
    modules = [name for name, packages in provided if {canonicalize_name(one) for one in packages} <= of_the_server]
    assert {"alembic", "celery", "fastapi", "jwt", "psycopg", "rich", "sqlalchemy", "typer", "uvicorn"} <= set(modules)
    sent = bare.run(bare.python, "-c", SENDS, installation.broker_url, *modules)
    assert (sent.returncode, sent.stderr, sent.stdout) == (0, "", "[]\n")
    [entry] = installation.broker.lrange("credits", 0, -1)
    assert json.loads(entry)["headers"]["task"] == "wallet.grant"


@pytest.mark.parametrize(
    "command",
    [["holdfast", "demo"], ["celery", "-A", "worker", "worker"], ["uvicorn", "api_stub.app:app"]],
    ids=" ".join,
)
def test_a_part_of_the_server_says_what_to_install(bare: Environment, tmp_path: Path, command: list[str]) -> None:
    """Also where the engine has a uvicorn or a Celery of its own."""
    link(what_runs(["uvicorn", "celery"]), tmp_path)
    program, *arguments = command
    holdfast = [str(Path(bare.python).with_name("holdfast"))]
    argv = [*(holdfast if program == "holdfast" else [bare.python, "-m", program]), *arguments]
    ended = bare.run(*argv, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    cure = "install the extra `server`, in a checkout with: pip install ./client '.[server]'"
    assert re.fullmatch(rf"holdfast: The package \w+ is missing: {re.escape(cure)}", line)
