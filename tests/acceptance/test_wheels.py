"""The two wheels, installed outside any checkout: the client, and Holdfast without an extra.

All of Holdfast: `test_up_serves_until_ctrl_c_and_keeps_its_data`.
"""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from holdfast_client import Client
from tests.acceptance.lone_engine import TOLD, told
from tests.installation import Installation
from tests.packages import what_runs
from tests.support import PATIENCE_S, eventually, sql
from tests.wheels import ROOT, Environment, Wheels, link, required

pytestmark = pytest.mark.timeout(300)  # seconds, for a slow machine and a slow package index

CLIENT_README, README = ((ROOT / path).read_text() for path in ("client/README.md", "README.md"))
BROUGHT = what_runs(["kombu[redis]", "pydantic", "redis"]) | {"holdfast-client"}
OF_OLDER_ONES = {"async-timeout", "pyjwt", "setuptools", "tzdata"}
"""What older versions of these, or of Python, need."""

# A worker of the engine's own, in the folder of the engine.
WORKER = """
from celery import Celery
app = Celery("engine", set_as_current=False)
"""
SENDS = """
import importlib.util, sys
from worker.client import ENGINE_QUEUE, Client
from worker.async_client import AsyncClient
with Client(sys.argv[1]) as client:
    client.grant(org_id="acme", grant_id="gift", credits=5)
print([name for name in sys.argv[2:] if importlib.util.find_spec(name)])
"""


# The client alone


def test_in_an_empty_environment_the_client_brings_what_it_needs_and_its_readme_is_true(
    wheels: Wheels, empty: Environment, running: Installation
) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```$", CLIENT_README, re.MULTILINE | re.DOTALL)
    empty.pip("install", "--no-compile", wheels.client)
    assert empty.versions().keys() <= BROUGHT | OF_OLDER_ONES
    with Client(running.broker_url) as billing:
        billing.grant(org_id="acme", grant_id="gift", credits=100, wait_s=PATIENCE_S)
    done = empty.run(empty.python, "-c", program, HOLDFAST_ENGINE_BROKER_URL=running.broker_url)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    used = "SELECT -credits FROM credit_events WHERE org_id = 'acme' AND event_type = 'usage'"
    eventually(lambda: sql(running.engine, used) == [(60,)])


@pytest.mark.soak
@pytest.mark.parametrize("page", [README, CLIENT_README], ids=["project", "client"])
def test_the_command_of_the_readmes_installs_it(empty: Environment, page: str) -> None:
    [command] = set(re.findall(r"pip install \./client$|(?<=`)pip install \./client(?=`)", page, re.MULTILINE))
    empty.pip(*command.split()[1:], cwd=ROOT)
    assert "holdfast-client" in empty.versions()


@pytest.mark.soak
def test_an_engine_keeps_its_celery_and_its_worker_py(
    wheels: Wheels, empty: Environment, running: Installation
) -> None:
    empty.pip("install", "--no-compile", "celery[redis]==5.4.0", "kombu==5.3.7")
    of_the_engine = empty.versions()
    empty.pip("install", "--no-compile", wheels.client)
    assert empty.versions().items() >= of_the_engine.items()
    assert empty.versions().keys() - of_the_engine.keys() <= BROUGHT
    own = empty.folder / "worker.py"
    own.write_text(WORKER)
    beside = told(empty, "beside", running.broker_url, running.broker_url)
    assert beside == {**TOLD, "beside": [str(own), "engine", "5.4.0"]}


# Holdfast without an extra: what it was before there was `holdfast-client`, and nothing of the server


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
