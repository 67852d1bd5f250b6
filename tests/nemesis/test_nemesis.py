"""A short run of the nemesis; `python -m tests.nemesis` makes longer ones."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import rabbitmq
from tests.installation import open_folder
from tests.nemesis import cluster
from tests.nemesis.__main__ import new_folder
from tests.nemesis.run import Goal, run
from tests.support import PATIENCE_S, eventually

GOAL = Goal(seconds=12, messages=1_500, kills=8, patience=4)

pytestmark = pytest.mark.timeout(900)


def test_whatever_is_killed_nothing_is_lost_and_nothing_applied_twice() -> None:
    folder = new_folder()
    report = run(secrets.randbits(32), GOAL, folder)
    assert report.verdict == "PASS", str(report)
    print(report)
    shutil.rmtree(folder)


@pytest.mark.soak
def test_interrupted_it_ends_everything_it_has_started() -> None:
    with open_folder() as folder, (folder / "output").open("w+b") as output:
        nemesis = subprocess.Popen(
            [sys.executable, "-m", "tests.nemesis", "--minutes", "1", "--seed", "7"],
            env={**os.environ, "TMPDIR": str(folder)},
            cwd=Path(__file__).parents[2],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            eventually(lambda: b"SIGKILL" in (folder / "output").read_bytes())
            family = psutil.Process(nemesis.pid).children(recursive=True)
            assert len(family) > 5
            nemesis.send_signal(signal.SIGINT)
            assert nemesis.wait(PATIENCE_S) == 130
        finally:
            nemesis.kill()
            nemesis.wait(10)
        assert b"seed 7" in (folder / "output").read_bytes()
        eventually(lambda: not [child for child in family if child.is_running()])


@pytest.mark.soak
@pytest.mark.skipif(not rabbitmq.is_installed(), reason="RabbitMQ (rabbitmq-server) is not installed")
def test_whichever_node_of_rabbitmq_is_killed_or_frozen_the_others_are_gone_on_with() -> None:
    folder = new_folder()
    report = cluster.run(secrets.randbits(32), Goal(seconds=60, messages=500, kills=0, patience=2), folder)
    assert report.verdict == "PASS", str(report)
    print(report)
    shutil.rmtree(folder)
