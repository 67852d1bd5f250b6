"""`python -m tests.nemesis --minutes 30 --seed 7`: a longer run; without a seed, one of its own, which it prints."""

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.nemesis import cluster, run
from tests.nemesis.run import Goal

MESSAGES_PER_MINUTE, KILLS_PER_MINUTE = 3_400, 7
IN_CLUSTER_PER_MINUTE = 1_000


def main() -> int:
    """Run it; 0: nothing found, 1: something found, or UNKNOWN, 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.nemesis", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long faults happen (default: 30)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="what decides on all choices")
    brokers = {
        "own": "Valkey, one of many that are killed",
        "cluster": "RabbitMQ, whose three nodes are all that is hit",
    }
    said = "; ".join(f"{name}: {what}" for name, what in brokers.items())
    parser.add_argument("--broker", choices=brokers, default="own", help=said)
    given = parser.parse_args()
    is_cluster = given.broker == "cluster"
    messages = IN_CLUSTER_PER_MINUTE if is_cluster else MESSAGES_PER_MINUTE
    goal = Goal(60 * given.minutes, int(messages * given.minutes), int(KILLS_PER_MINUTE * given.minutes))
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: what a script starts in the background ignores it
        signal.signal(number, signal.default_int_handler)
    folder = new_folder()
    print(f"nemesis: seed {given.seed}, {given.minutes:g} minutes, logs in {folder}", flush=True)
    try:
        report = (cluster if is_cluster else run).run(
            given.seed, goal, folder, say=lambda line: print(line, flush=True)
        )
    except KeyboardInterrupt:
        print(f"nemesis: interrupted; logs in {folder}", file=sys.stderr)
        return 130
    print(report)
    if report.verdict != "PASS":
        return 1
    shutil.rmtree(folder)
    return 0


def new_folder() -> Path:
    """A folder that every account can enter: as root, PostgreSQL runs as another one."""
    folder = Path(tempfile.mkdtemp(prefix="nemesis-"))
    folder.chmod(0o711)
    return folder


if __name__ == "__main__":
    sys.exit(main())
