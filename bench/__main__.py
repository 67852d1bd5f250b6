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

from bench.installation import messages_per_s
from bench.measures import FULL, QUICK, repetitions
from bench.report import Report, describe_machine
from bench.stand import Stand
from bench.workload import NotAccountedError
from holdfast_client.client import NotSentError
from ledger.database import DatabaseURLError
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
    database: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Instead, measure the installation with this database, end to end."),
    ] = None,
    broker: Annotated[str | None, typer.Option(metavar="URL", help="Its broker, whose workers have to run.")] = None,
    messages: Annotated[int, typer.Option(min=100, help="How many messages it gets.")] = 20_000,
) -> None:
    """Measure Holdfast on this machine, with services and data in a temporary folder on disk."""
    if (database is None) != (broker is None):
        fail("--database and --broker name one installation: give both or neither")
    if database is not None and broker is not None:
        _measure_installation(database, broker, messages)
        return
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


def _measure_installation(database: str, broker: str, messages: int) -> None:
    sizes = {"messages": messages, "organizations": min(FULL.organizations, messages // 10)}
    try:
        rate = messages_per_s(database, broker, **sizes, progress=_progress)
    except (NotAccountedError, NotSentError, DatabaseURLError) as error:
        fail(str(error))
    except DBAPIError as error:
        fail(f"the database does not answer as it should: {describe(error)}")
    print(f"{rate:,.0f} messages/s, end to end ({messages:,} messages of {sizes['organizations']:,} organizations)")


def _progress(line: str) -> None:
    print(f"{time.monotonic() - _BEGAN_AT:5.0f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
