"""The documents say what is so: every command and every program in the README runs, every table matches the code."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from holdfast_client.client import Client
from ledger.settings import PREFIX, Settings
from tests.acceptance import commands
from tests.acceptance.terminal import beside
from tests.support import PATIENCE_S, eventually
from worker.local.process import Process

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
OVER_HTTP = (ROOT / "docs" / "http.md").read_text()

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The environment of a terminal beside `make up`."""
    with beside("make", "up") as pasted:
        yield pasted


def run(command: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_fork(command: str, environment: dict[str, str]) -> str:
    """The same for one of our programs, found in the same way, without its imports; see `forks`."""
    program, *arguments = shlex.split(command)
    found = shutil.which(program, path=environment["PATH"])
    assert found is not None
    done = commands.run_program([found, *arguments], env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_names_these_commands_and_every_one_is_run() -> None:
    """Here; `pip` in test_wheels.py."""
    assert COMMANDS == [
        "make demo",
        "make test",
        "make up",
        "pip install ./client",
        "python first.py",
        "holdfast wallet acme",
        "holdfast history acme --type usage --from 2026-01-01",
        "holdfast history acme --by-run",
        "holdfast usage northwind --by project --by day",
        "holdfast verify",
        "TOKEN=$(holdfast token --org acme --scope credits:read)",
        (
            'curl --silent --header "Authorization: Bearer $TOKEN" '
            '"$API_URL/api/organizations/acme/credit-events?event_type=usage"'
        ),
        'curl --silent --header "Authorization: Bearer $TOKEN" "$API_URL/api/organizations/acme/credits"',
        "holdfast migrate",
        "celery -A worker worker",
        "celery -A worker beat",
        "holdfast failed list",
        "holdfast failed list --by-cause",
        "holdfast failed show 1",
        "holdfast failed replay --all --error refund_exceeds_usage --dry-run",
        "holdfast failed replay 1",
        'holdfast failed discard 2 --why "sent by a test"',
        "holdfast holds --older-than 2h",
        "holdfast waiting",
        'holdfast release acme run-7 --why "the engine lost this run"',
    ]


def test_the_demo_tells_the_story_that_the_readme_shows() -> None:
    [story] = blocks("text")
    output = run("make demo")
    assert story in output
    assert "Credit history of acme, newest first: 15" in output
    assert "Verified: every invariant holds (wallets: 1, events: 15, open dead letters: 0)." in output


@pytest.mark.parametrize("target", ["test", "up"])
def test_make_knows_the_targets_that_run_on(target: str) -> None:
    # What they run is tested elsewhere: `make test` is what runs this, and `holdfast up` has tests of its own.
    assert run(f"make --dry-run {target}")


def test_make_alone_lists_the_commands_of_the_readme() -> None:
    listed = run("make")
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command}\b", listed, re.MULTILINE)


def test_the_walk_through_make_up_works_in_the_order_of_the_readme(environment: dict[str, str], tmp_path: Path) -> None:
    first_program, celery_program = blocks("python")
    assert README.index("make up\n") < README.index(first_program) < README.index("python first.py\n")
    (tmp_path / "first.py").write_text(first_program)
    [walk] = [block for block in blocks("sh") if "first.py" in block]
    shown = shell(walk, environment, tmp_path)
    assert "outcome='settled'" in shown
    assert re.search("│ available +│ +420 │", shown)
    assert re.search(r"newest first: 1\s", shown)
    assert "-80" in shown
    assert re.search(r" run-1 +settled .* -80\s", shown)
    assert "support-bot" in shown
    assert "every invariant holds" in shown
    subprocess.run([sys.executable, "-c", celery_program], env=environment, check=True, timeout=PATIENCE_S)
    assert "already" in run("holdfast migrate", environment)
    assert without_times(read_over_http(environment)) == without_times(blocks("json")[0])
    [link] = re.findall(r"http\S+/signin\S+", environment["SAID"])
    with httpx.Client(follow_redirects=True) as browser:
        page = browser.get(link)
        acme = browser.get(str(page.url).replace("northwind", "acme"))
    assert (page.status_code, "Credit history of northwind" in page.text, "Train churn model" in page.text) == (
        200,
        True,
        True,
    )
    assert (acme.status_code, "Credit history of acme" in acme.text, "420" in acme.text) == (200, True, True)


def shell(script: str, environment: dict[str, str], folder: Path) -> str:
    """What a terminal in `folder` shows."""
    return subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=300
    ).stdout


def read_over_http(environment: dict[str, str]) -> str:
    """What the README's block for reading over HTTP prints, one answer a line."""
    [script] = [block for block in blocks("sh") if "curl" in block]
    script = script.replace('/credits"', '/credits"; echo').replace('=usage"', '=usage"; echo')
    return shell(script, environment, ROOT)


def without_times(answers: str) -> list[dict[str, object]]:
    values = [json.loads(line) for line in answers.splitlines()]
    del values[0]["as_of"]
    for event in values[0]["items"]:
        del event["created_at"]
    return values


def test_the_commands_of_operators_do_what_the_readme_says(environment: dict[str, str]) -> None:
    with Client(environment[f"{PREFIX}BROKER_URL"]) as client:
        client.grant(org_id="acme", grant_id="gift", credits=100, wait_s=PATIENCE_S)
        client.start(org_id="acme", workflow_id="run-7", credits=30, wait_s=PATIENCE_S)
    said = [run_fork(command, environment) for command in COMMANDS[COMMANDS.index("holdfast failed list") :]]
    listed, grouped, shown, dry_run, replayed, discarded, held, waiting, released = said
    assert "Open dead letters, newest first: 4" in listed
    assert re.search("Open dead letters by cause: [14], 4 dead letters of 1 organization", grouped)
    assert '"refund_id": "refund-41"' in shown
    assert "Would replay 4 dead letters. Nothing was sent." in dry_run
    assert replayed == "Dead letter 1: posted.\n"
    assert discarded == "Dead letter 2 is discarded.\n"
    assert held == "No open reservation matches.\n"
    assert waiting == "No message waits for its organization.\n"
    assert released.startswith("Released 30 credits of acme; ")


@pytest.mark.parametrize("command", ["celery -A worker worker", "celery -A worker beat"])
def test_the_parts_start_as_written_and_stop(command: str, environment: dict[str, str], tmp_path: Path) -> None:
    process = Process("part", shlex.split(command), tmp_path, env=environment)
    process.start()
    try:
        eventually(lambda: "holdfast" in process.log_file.read_text() or "is starting" in process.log_file.read_text())
        assert process.is_running
    finally:
        process.stop()
    assert not process.is_running


def test_the_table_of_settings_is_complete() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    rows = dict(re.findall(r"^\| `(HOLDFAST_\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert rows == {f"{PREFIX}{name.upper()}": field.description for name, field in Settings.model_fields.items()}


def test_the_commands_of_the_page_about_http_give_what_it_shows(environment: dict[str, str], tmp_path: Path) -> None:
    script = "".join(block for block in blocks("sh", OVER_HTTP)).replace("\ncurl", "\necho; curl")
    done = subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout.split() == "".join(blocks("json", OVER_HTTP)).split(), done.stderr
