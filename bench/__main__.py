"""`python -m bench`: measures everything on embedded services, and prints the table in docs/performance.md.

Exit codes: 0 the measurement is complete, and the report says which bars are met; 2 it could not run, or the measured
system did not do its work.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from redis import RedisError
from sqlalchemy.exc import DBAPIError

from bench.measures import FULL, QUICK, repetitions
from bench.report import Report, describe_machine
from bench.stand import Stand
from bench.workload import NotAccountedError
from holdfast_client.client import NotSentError
from ledger.faults import describe
from worker.batching import collect_garbage_seldom
from worker.cli.terminal import fail
from worker.local.embedded import Embedded
from worker.local.process import ServiceError

_BEGAN_AT = time.monotonic()


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Shorter runs, at most two minutes: rough figures.")] = False,
    json_file: Annotated[
        typer.FileTextWrite | None,
        typer.Option("--json", metavar="FILE", lazy=False, help="Also write everything to a JSON file."),
    ] = None,
) -> None:
    """Measure Holdfast on this machine, with services and data in a temporary folder on disk."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # everything is stopped in order
    collect_garbage_seldom()  # as a worker does: one measurement runs the ledger in this process
    folder = Path(tempfile.mkdtemp(prefix="holdfast-bench-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as an account that has to pass through
    sizes = QUICK if quick else FULL
    try:
        with Embedded(folder, progress=_progress) as embedded, Stand(embedded) as stand:
            circumstances = describe_machine(stand) | {
                "command": f"`python -m bench{' --quick' if quick else ''}`, {sizes.repetitions} repetitions"
                + (": rough figures, of short runs" if quick else "")
            }
            _progress(f"The data is in {folder}: {circumstances['database']}.")
            report = Report.of(repetitions(stand, sizes, progress=_progress), circumstances)
    except (ServiceError, NotAccountedError, NotSentError) as error:
        fail(str(error))
    except RedisError as error:
        fail(f"the broker does not answer as it should: {error}")
    except DBAPIError as error:
        fail(f"the database does not answer as it should: {describe(error)}")
    except KeyboardInterrupt:
        fail("interrupted; everything is stopped")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(report.as_markdown())
    if json_file is not None:
        json.dump(report.as_json(), json_file, indent=2)


def _progress(line: str) -> None:
    print(f"{time.monotonic() - _BEGAN_AT:5.0f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
