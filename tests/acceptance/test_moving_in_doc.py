"""docs/moving-in.md, as it stands: the export, both programs and every command, for some hundred customers."""

import csv
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ledger import views
from tests.acceptance import commands
from tests.installation import Installation
from tests.support import PATIENCE_S, eventually

DOCUMENT = (Path(__file__).parents[2] / "docs" / "moving-in.md").read_text()
CUSTOMERS = 200

pytestmark = pytest.mark.timeout(600)  # seconds, for a worker that starts on a slow machine


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the export and the two programs."""
    [export] = blocks("csv")
    more = (f"{number},{number},Team,1000,2025-02-{1 + number % 28:02},{number % 1001}" for number in range(CUSTOMERS))
    (tmp_path / "customers.csv").write_text(encoding="utf-8-sig", data=export + "".join(f"{line}\n" for line in more))
    make_messages, compare = blocks("python")
    (tmp_path / "make_messages.py").write_text(make_messages)
    (tmp_path / "compare.py").write_text(compare)
    return tmp_path


def test_the_customers_move_in_and_the_sums_are_equal(running: Installation, folder: Path) -> None:
    def run(block: str) -> list[str]:
        return [output(line, folder, running.environment) for line in block.splitlines()]

    send, letters, compare, finance = blocks("sh")
    _, dry, sent = run(send)
    assert dry == "Valid: 404. Nothing was sent.\n"
    assert sent.startswith("Sent: 404. ")
    eventually(running.is_drained)
    [listed] = run(letters)
    assert listed.startswith("No dead letters")
    with (folder / "customers.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    together = sum(int(row["balance"]) + int(row["left_this_month"] or 0) for row in rows)
    compared, totals, verified = run(compare)
    assert compared == f"exported: {together:,}, in the ledger: {together:,}\n"
    assert f"All {len(rows):,} wallets" in totals
    assert "Verified: every invariant holds" in verified
    for month in run(finance):
        assert "Events" in month
    with running.engine.connect() as connection:
        wallet = views.wallet(connection, "customer-1001")
    assert wallet is not None
    assert (wallet.prepaid_balance, wallet.subscription_balance, wallet.plan) == (500, 640, "Team")
    assert wallet.current_period_end is not None
    assert wallet.current_period_end > datetime.now(UTC)
    output(send.splitlines()[2], folder, running.environment)  # once more
    eventually(running.is_drained)
    assert output(compare.splitlines()[0], folder, running.environment) == compared


def output(line: str, folder: Path, environment: dict[str, str]) -> str:
    """What a line of the document prints. Without a shell where that is possible, as it starts faster."""
    program, *arguments = shlex.split(line)
    if program == "holdfast" and not {"|", "<", ">"} & {*arguments}:
        done = commands.run(*arguments, env=environment, cwd=folder)
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell = ["bash", "-euo", "pipefail", "-c", line]
        env = {**environment, "PATH": path}
        done = subprocess.run(shell, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, ""), line
    return done.stdout
