"""Every command of docs/operating.md is run, on a PostgreSQL of this file's own.

There is no Docker here: a program `docker` runs without a container what is to run in one, and only notes the rest.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from holdfast_client.messages import InvalidMessage, parse
from ledger import migrations, roles
from ledger.database import connect
from ledger.store import apply_batch, apply_past
from tests.compose import SERVICES
from tests.installation import open_folder
from tests.messages import delivery
from tests.support import PATIENCE_S, sql
from worker.local.embedded import Embedded

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "operating.md").read_text()

DOCKER = """#!/bin/sh
case "$*" in
  "compose exec -T api "*) shift 4; HOLDFAST_DATABASE_URL=$URL_OF_API exec "$@" ;;
  "compose exec -T "*) shift 4; exec "$@" ;;
  "compose run --rm database") exec sh -euc "$SCRIPT_OF_DATABASE" ;;
  "compose run --rm migrate") exec holdfast migrate --roles ;;
  "compose run --rm migrate "*) shift 4; exec "$@" ;;
  *) echo "docker $*" >> "$NOTES" ;;
esac
"""
GIT = '#!/bin/sh\necho "git $*" >> "$NOTES"\n'

CLEAN = "Verified: every invariant holds (wallets: 1, events: 1, open dead letters: 0)."


@dataclass(frozen=True, slots=True)
class Machine:
    """Where an operator types: a folder, and what the commands find there."""

    folder: Path
    environment: dict[str, str]
    engine: Engine

    def run(self, script: str, *, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", script],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            input=typed,
            start_new_session=True,  # a terminal of ours would be asked
            timeout=PATIENCE_S,
        )

    def notes(self) -> list[str]:
        return (self.folder / "notes").read_text().splitlines()


@pytest.fixture(scope="module")
def own_services() -> Iterator[Embedded]:
    with open_folder() as folder, Embedded(folder, durable=False) as running:
        yield running


@pytest.fixture
def machine(own_services: Embedded, tmp_path: Path) -> Iterator[Machine]:
    for name, program in (("docker", DOCKER), ("git", GIT)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    postgres = own_services.postgres
    programs = [tmp_path, Path(postgres.argv[0]).parent, Path(sys.executable).parent]
    [script] = SERVICES["database"]["command"]
    environment = {
        "PATH": ":".join([*map(str, programs), os.defpath]),
        "NOTES": str(tmp_path / "notes"),
        "SCRIPT_OF_DATABASE": script,
        "PGHOST": str(postgres.sockets),
        "PGUSER": "postgres",
        "DATABASE_PASSWORD": "sekrit",
        "WORKER_DATABASE_PASSWORD": "sekrit",
        "READER_DATABASE_PASSWORD": "sekrit",
        "URL_OF_API": own_services.reader_url,
        "HOLDFAST_DATABASE_URL": own_services.database_url,
    }
    engine = connect(own_services.database_url, checks_connections=True)
    migrations.upgrade(engine)
    migrations.grant(engine)
    purchase(engine, "before", 500)
    yield Machine(tmp_path, environment, engine)
    migrations.downgrade(engine, "base")
    engine.dispose()


def purchase(engine: Engine, purchase_id: str, credits: int) -> None:
    apply_batch(engine, [delivery("wallet.purchase", org_id="acme", purchase_id=purchase_id, credits=credits)])


def block(heading: str, number: int = 0) -> str:
    section = DOCUMENT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return str(re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[number])


def test_a_backup_is_restored(machine: Machine) -> None:
    saved = machine.run(block("Backup"))
    assert (saved.returncode, saved.stdout, saved.stderr) == (0, "", "")
    assert (machine.folder / "holdfast.dump").stat().st_mode & 0o777 == 0o600
    purchase(machine.engine, "after", 7)
    restored = machine.run(block("Restore"))
    assert (restored.returncode, restored.stderr) == (0, "")
    assert CLEAN in restored.stdout
    assert sql(machine.engine, "SELECT prepaid_balance FROM wallets") == [(500,)]
    purchase(machine.engine, "before", 500)
    purchase(machine.engine, "after", 7)
    assert sql(machine.engine, "SELECT prepaid_balance FROM wallets") == [(507,)]
    assert machine.notes() == [
        "docker compose stop worker beat api",
        "docker compose up --detach --wait postgres",
        "docker compose up --detach --wait --scale worker=2",
    ]


def test_a_backup_that_is_cut_short_is_an_error_and_nothing_starts_on_it(machine: Machine) -> None:
    assert machine.run(block("Backup")).returncode == 0
    dump = machine.folder / "holdfast.dump"
    dump.write_bytes(dump.read_bytes()[: dump.stat().st_size // 2])
    failed = machine.run(block("Restore"))
    assert failed.returncode != 0
    assert "pg_restore: error: " in failed.stderr
    assert not any("--scale" in line for line in machine.notes())
    sql(machine.engine, "DROP SCHEMA public CASCADE")
    sql(machine.engine, "CREATE SCHEMA public")
    sql(machine.engine, "GRANT USAGE ON SCHEMA public TO PUBLIC")
    migrations.upgrade(machine.engine)


def test_the_nightly_check_prints_only_what_is_wrong(machine: Machine) -> None:
    line = block("Every night").strip()
    entry = re.fullmatch(r"(\S+ \S+ \* \* \*) cd (\S+) && (.*)", line)
    assert entry is not None
    schedule, folder, command = entry.groups()
    assert (schedule, folder) == ("30 3 * * *", "/srv/holdfast")
    assert "%" not in command, "which cron takes for the end of the line"
    clean = machine.run(command)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "", "")
    sql(machine.engine, "UPDATE wallets SET prepaid_balance = 501")
    assert "acme: events add up to 500, available is 501" in machine.run(command).stdout
    machine.environment["URL_OF_API"] = "postgresql+psycopg://holdfast@127.0.0.1:1/holdfast"
    assert "Connection refused" in machine.run(command).stdout


def test_what_is_old_leaves_and_what_people_wrote_is_erased(machine: Machine) -> None:
    told = [("g1", datetime(2025, 11, 3, tzinfo=UTC)), ("g2", datetime(2025, 12, 31, tzinfo=UTC))]
    terms = {"org_id": "globex", "credits": 5, "reason": "call Ann"}
    parsed = [(at, parse("wallet.grant", {**terms, "grant_id": grant_id})) for grant_id, at in told]
    apply_past(machine.engine, [(at, message) for at, message in parsed if not isinstance(message, InvalidMessage)])
    archived = machine.run(block("Growing for years"))
    assert archived.returncode == 0
    assert re.fullmatch(r"holdfast: warning: this connection's role, holdfast, may do more .*\n", archived.stderr)
    first, second, *verified = archived.stdout.splitlines()
    assert first == "2025-11-03-0001.parquet: 1 event left the database."
    assert second == "1 event of before 2026-01-01 left in all."
    assert verified[-1] == "Verified: every invariant holds (wallets: 2, events: 3, open dead letters: 0)."
    of_compose = machine.run(block("Growing for years", 1))
    assert (of_compose.returncode, of_compose.stderr) == (0, "")
    assert machine.notes() == [f"docker {block('Growing for years', 1).strip().removeprefix('docker ')}"]
    erased = machine.run(block("Growing for years", 2).replace("acme", "globex"))
    assert (erased.returncode, erased.stderr) == (0, "")
    assert erased.stdout.splitlines() == [
        "Erased: the text of 1 event, 0 runs, 2 messages, 0 closed dead letters.",
        "Not erased: its first event, which is in the archive: in files of 2025-11-03 to 2025-11-03. Nor are backups.",
    ]
    verified_again = machine.run("HOLDFAST_DATABASE_URL=$URL_OF_API holdfast verify --archive archive")
    assert (verified_again.returncode, verified_again.stderr) == (0, "")
    for table in ("archived", "erasures"):
        sql(machine.engine, f"DELETE FROM {table}")  # a step back would lose it, and is refused


def test_the_way_back_to_an_older_version(machine: Machine) -> None:
    listing = machine.run(block("Back to an older version"))
    assert listing.returncode == 0
    back = machine.run(block("Back to an older version", 1))
    assert (back.returncode, back.stderr) == (0, "")
    assert back.stdout.splitlines()[0] == "The database is at 0003 now."
    assert machine.notes() == [
        "git ls-tree --name-only OLD ledger/migrations/versions/",
        "docker compose stop worker beat api",
        "git checkout OLD",
        "docker compose build",
        "docker compose up --detach --wait --scale worker=2",
    ]
    [folder] = [ROOT / word for word in machine.notes()[0].split() if "/" in word]
    assert sorted(path.name[:4] for path in folder.glob("0*.py")) == migrations.revisions()


def test_the_roles_are_made_their_passwords_are_asked_for_and_they_are_given_what_they_need(
    machine: Machine, own_services: Embedded
) -> None:
    migrations.downgrade(machine.engine, "base")
    sql(machine.engine, "DROP TABLE alembic_version")
    admin = connect(own_services.admin_url)
    sql(admin, f"DROP ROLE {roles.WORKER}, {roles.READER}")
    refused = machine.run(block("Roles", 2))
    assert (refused.returncode, refused.stdout) == (2, "")
    create, *set_passwords = block("Roles", 1).splitlines()
    for statement in re.findall(r"'(CREATE .*?)'", create):
        assert statement in refused.stderr
    made = machine.run(create)
    assert (made.returncode, made.stderr) == (0, "")
    for command in set_passwords:
        assert machine.run(command, typed="it's secret\nit's secret\n").returncode == 0
    passwords = "SELECT rolname FROM pg_authid WHERE starts_with(rolpassword, 'SCRAM-SHA-256$') ORDER BY 1"
    assert [role for (role,) in sql(admin, passwords) if role != "holdfast"] == [roles.READER, roles.WORKER]
    granted = machine.run(block("Roles", 2))
    assert (granted.returncode, granted.stderr) == (0, "")
    purchase(machine.engine, "before", 500)
    verified = machine.run("docker compose exec -T api holdfast verify")
    assert (verified.returncode, verified.stderr) == (0, "")
    assert CLEAN in verified.stdout
    section = DOCUMENT.split("\n## Roles\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {"holdfast", *roles.PRIVILEGES}
    admin.dispose()


def test_an_older_env_gets_the_two_passwords(machine: Machine) -> None:
    (machine.folder / ".env").write_text("DATABASE_PASSWORD=1\n")
    assert machine.run(block("Roles")).returncode == 0
    first, *added = (machine.folder / ".env").read_text().splitlines()
    assert first == "DATABASE_PASSWORD=1"
    secrets = dict(line.split("=") for line in added)
    assert list(secrets) == ["WORKER_DATABASE_PASSWORD", "READER_DATABASE_PASSWORD", "ENGINE_BROKER_PASSWORD"]
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in secrets.values())


def test_the_images_that_are_pinned_are_all_that_come_from_a_registry() -> None:
    words = block("Images by digest").split()
    assert words[:4] == ["docker", "compose", "--file", "docker-compose.yml"]
    assert words[4:6] == ["config", "--lock-image-digests"]
    output, *services = words[words.index("--output") + 1 :]
    assert set(services) == {name for name, service in SERVICES.items() if service["image"].split(":")[0] != "holdfast"}
    # Compose reads it by this name beside docker-compose.yml, and it stays on its machine.
    assert output == "docker-compose.override.yml"
    assert f"/{output}" in (ROOT / ".gitignore").read_text().splitlines()
    inspected = block("Images by digest", 1).split()[-1]
    assert f"FROM {inspected}\n" in (ROOT / "Dockerfile").read_text()


def test_the_services_and_the_addresses_are_those_of_the_compose_file() -> None:
    scripts = re.findall(r"^docker compose (?:exec -T|run --rm|stop) (.*)$", DOCUMENT, re.MULTILINE)
    assert {words.split()[0] for words in scripts} <= set(SERVICES)
    assert "reverse_proxy 127.0.0.1:8000\n" in block("HTTPS")
    assert SERVICES["api"]["ports"] == ["127.0.0.1:${API_PORT:-8000}:8000"]
    assert "path /metrics /readyz\n" in block("HTTPS")
    assert "`BROKER_MEMORY_MB`" in DOCUMENT
    assert SERVICES["broker"]["mem_limit"].startswith("${BROKER_MEMORY_MB:-")
