"""`python -m bench.growth`: how much the ledger grows, and what the archive takes: the figures of docs/operating.md.

The runs have a project, an activity and some metadata, as an engine sends them. They are written by the ledger itself,
as if they had come over 200 days.
"""

import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine, text

from bench.stand import MIGRATED, Stand
from holdfast_client.messages import AnyMessage, InvalidMessage, parse
from ledger import archive, daily_sums
from ledger.store import apply_past
from worker.local.embedded import Embedded

ORGANIZATIONS, RUNS_EACH, STEP = 20, 1_500, 1_000
DAYS, YOUNGEST = 200, timedelta(days=archive.LEAST_AGE_DAYS + 1)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="holdfast-growth-") as folder:
        Path(folder).chmod(0o711)  # as root, PostgreSQL runs as an account that has to pass through
        _measure(Path(folder))


def _measure(folder: Path) -> None:
    with Embedded(folder) as embedded, Stand(embedded) as stand, stand.database(MIGRATED) as engine:
        empty = _sizes(engine)
        began_at = time.perf_counter()
        for number in range(ORGANIZATIONS):
            _write(engine, f"org-{number:04}")
        daily_sums.sum_up(engine)
        _vacuum(engine)
        runs = ORGANIZATIONS * RUNS_EACH
        grown = {name: size - empty[name] for name, size in _sizes(engine).items()}
        events = _count(engine)
        print(f"{runs:,} runs, {events:,} events, written in {time.perf_counter() - began_at:.0f} s")
        print(f"{grown['credit_events'] / events:.0f} bytes an event, {grown['workflows'] / runs:.0f} bytes a workflow")
        print(f"{sum(grown.values()) / runs:.0f} bytes a run in all")
        (folder / "archive").mkdir()
        _archive(engine, folder / "archive")


def _archive(engine: Engine, folder: Path) -> None:
    began_at = time.perf_counter()
    before = datetime.now(UTC).date() - timedelta(days=archive.LEAST_AGE_DAYS)
    moved = sum(each.events for each in archive.archive(engine, before, folder))
    took_s = time.perf_counter() - began_at
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{moved:,} events archived in {took_s:.0f} s, {moved / took_s:,.0f} a second; {size / moved:.0f} bytes each")
    began_at = time.perf_counter()
    assert archive.verify(engine, folder).is_clean
    print(f"all of it verified in {time.perf_counter() - began_at:.0f} s")


def _write(engine: Engine, org_id: str) -> None:
    """A purchase, and then runs of a start and a finish, evenly over the days."""
    youngest = datetime.now(UTC) - YOUNGEST
    begun = youngest - timedelta(days=DAYS)
    messages = [(begun, _message("wallet.purchase", org_id, purchase_id="p1", credits=10**9))]
    for number in range(RUNS_EACH):
        at = begun + timedelta(days=DAYS) * number / RUNS_EACH
        run = {
            "workflow_id": f"run-{number:08x}-4f1c-9e2b-a7c04d5518e3",
            "project_id": f"project-{number % 7}",
            "activity_name": f"Crawl the shop {number % 12}",
            "metadata": {"trace": f"4bf92f3577b34da6{number:016x}"},
        }
        messages.append((at, _message("workflow.start", org_id, credits=120, **run)))
        messages.append((at + timedelta(minutes=2), _message("workflow.finish", org_id, credits=97, **run)))
    for first in range(0, len(messages), STEP):
        apply_past(engine, messages[first : first + STEP])
    apply_past(engine, [(datetime.now(UTC), _message("wallet.grant", org_id, grant_id="g1", credits=1))])


def _message(task: str, org_id: str, **fields: object) -> AnyMessage:
    parsed = parse(task, {"org_id": org_id, **fields})
    assert not isinstance(parsed, InvalidMessage)
    return parsed


def _count(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM credit_events")) or 0


def _sizes(engine: Engine) -> dict[str, int]:
    """The bytes of each table, with its indexes."""
    with engine.connect() as connection:
        sizes = text(
            "SELECT relname, pg_total_relation_size(oid) FROM pg_class WHERE relkind = 'r' AND relnamespace = "
            "to_regnamespace(current_schema())"
        )
        return dict(connection.execute(sizes).all())


def _vacuum(engine: Engine) -> None:
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))


if __name__ == "__main__":
    main()
