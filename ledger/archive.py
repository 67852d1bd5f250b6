"""Moves the closed events of past days into an archive, and checks them there.

A day of a wallet is closed if all its events are older than the date that was asked for, in the daily sums, and older
than every event that is still needed: those of open reservations, the begin of the current period, and the last one.
Days leave in order, so what is gone of a wallet is the beginning of its history. `archived` has its balances then, from
which `ledger.audit` goes on. Workflows and posted messages stay: they make repeating safe.

Guarantee: an event is deleted only after it was read again from its file, which the manifest names, and in the same
transaction that moves the checkpoint of its wallet. Whatever is killed, each event is in the database or in a complete
file. The next run finishes what was begun. The trigger of `credit_events` refuses to delete anything else, and only the
owner of the tables may delete at all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, select, text

from ledger import audit, daily_sums, distribution
from ledger.archive_files import Entry, Folder, Row
from ledger.audit import Check, Finding, Verdict
from ledger.database import has_nodes
from ledger.state import Event
from ledger.tables import archive_head, archived, credit_events, metadata
from ledger.upkeep import UpkeepError, alone, refuse_others

LEAST_AGE_DAYS = 31
"""How old an event is at least before it leaves: the pages look at the last weeks, and at the current period."""

STEP = 50_000
"""The most events that one transaction deletes, and one row group of a file has."""

GROUPS_OF_A_FILE = 100
"""The most row groups of a file. A day with more events has several files."""


class Range(NamedTuple):
    """Events of a wallet, both ends included."""

    org_id: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Moved:
    """A file whose events have left the database."""

    entry: Entry
    events: int
    """How many this run has deleted; fewer than the file has if an earlier run had begun."""


def archive(engine: Engine, before: date, path: Path) -> Iterator[Moved]:
    """Move the closed events of the UTC days before `before` into the archive at `path`, day by day.

    Yields each file once its events have left. Raises UpkeepError.
    """
    with alone(engine) as connection:
        with connection.begin():
            _refuse(connection, before)
            installation, head = _head(connection)
        folder = Folder.open(path, installation)
        if head not in folder.heads:
            raise UpkeepError(
                f"{path} is not the archive that this database has written to last: name that folder, or restore it"
            )
        # The last file that the database knows may have left in part; those after it, not at all.
        for number in range(max(1, folder.heads.index(head)), len(folder.entries) + 1):
            if events := _delete(connection, folder, number):
                yield Moved(folder.entries[number - 1], events)
        _sum_up(engine, connection, before)
        days = _find_closed(connection, before)
        for day in days:
            groups = _groups(connection, day)
            while (entry := folder.add(day, islice(groups, GROUPS_OF_A_FILE))) is not None:
                yield Moved(entry, _delete(connection, folder, len(folder.entries)))


def verify(engine: Engine, path: Path) -> Verdict:
    """Check the files of the archive at `path`, and every invariant over the events there and in the database.

    Reads all of it into a temporary table. If a file is not the one that was written, only the database's own events
    are checked. Raises UpkeepError.
    """
    with alone(engine) as connection:
        row = connection.execute(_HEAD).one_or_none()
        if row is None:
            raise UpkeepError("nothing was archived from this database yet: run `holdfast verify` without --archive")
        folder = Folder.open(path, row.installation)
        problems = folder.problems()
        if row.head not in folder.heads:
            problems.append("the manifest lacks the last files")
        connection.rollback()
        if not problems:
            try:
                _load(connection, folder)
            except UpkeepError as error:
                connection.rollback()
                problems.append(str(error))
        verdict = audit.check_all(connection)
        connection.rollback()
    finding = Finding(_FILES, [("archive", problem) for problem in problems[: audit.MAX_OFFENDERS]])
    return Verdict(
        [finding, *verdict.findings], verdict.wallets, verdict.events, verdict.archived, verdict.open_dead_letters
    )


_FILES = Check(
    "archive", "The archive has every file that was written, in order, and each as it was written.", offenders=""
)


def _refuse(connection: Connection, before: date) -> None:
    refuse_others(connection)
    latest = connection.scalar(_TODAY) - timedelta(days=LEAST_AGE_DAYS)
    if before > latest:
        raise UpkeepError(
            f"the events of the last {LEAST_AGE_DAYS} days stay in the database: name {latest} or an earlier day"
        )


def _head(connection: Connection) -> tuple[str, str]:
    """The id of this installation, and the last entry of its archive that events have left for."""
    row = connection.execute(_HEAD).one_or_none()
    if row is None:
        row = connection.execute(_BEGIN).one()
        connection.execute(_SET_HEAD, {"head": Folder(Path(), row.installation, ()).head_after(0)})
        row = connection.execute(_HEAD).one()
    return row.installation, row.head


def _sum_up(engine: Engine, connection: Connection, before: date) -> None:
    """Sum the events before `before` that are in no daily sum yet."""
    org_ids = list(connection.scalars(_NOT_SUMMED, {"before": _midnight(before)}))
    connection.rollback()
    for org_id in org_ids:
        for _ in daily_sums.steps_of(engine, org_id):
            pass


def _find_closed(connection: Connection, before: date) -> list[date]:
    """Write down which days of which wallets are closed. Returns the days, in order."""
    with connection.begin():
        connection.execute(text("DROP TABLE IF EXISTS closed"))
        connection.execute(_CLOSED, {"before": before})
        connection.execute(text("CREATE INDEX ON closed (day)"))
        return list(connection.scalars(text("SELECT DISTINCT day FROM closed ORDER BY day")))


def _groups(connection: Connection, day: date) -> Iterator[list[Row]]:
    """The closed events of a day, at most STEP at a time."""
    with connection.begin():
        wallets = connection.execute(_CLOSED_ON, {"day": day}).all()
    for ranges in _steps(Range(*wallet) for wallet in wallets):
        with connection.begin():
            _find_by_key(connection)
            rows = [tuple(row) for row in connection.execute(_EVENTS, _arrays(ranges))]
        if len(rows) != sum(last - first + 1 for _, first, last in ranges):
            raise UpkeepError(f"the events of {day} are not as many as their numbers say: run `holdfast verify`")
        yield rows


def _find_by_key(connection: Connection) -> None:
    """Have this transaction look its events up one range after the other, whatever the planner estimates."""
    for way in ("hashjoin", "mergejoin", "seqscan"):
        connection.execute(text(f"SET LOCAL enable_{way} = off"))


def _steps(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """The same events in ranges of at most STEP together."""
    step: list[Range] = []
    room = STEP
    for org_id, first, last in ranges:
        begin = first
        while begin <= last:
            end = min(last, begin + room - 1)
            step.append(Range(org_id, begin, end))
            room -= end - begin + 1
            begin = end + 1
            if room == 0:
                yield step
                step, room = [], STEP
    if step:
        yield step


def _delete(connection: Connection, folder: Folder, number: int) -> int:
    """Delete the events of the file with this number from the database, as far as they are there. Returns how many."""
    deleted = 0
    entry, head = folder.entries[number - 1], folder.head_after(number)
    for rows in folder.groups(entry):
        with connection.begin():
            _find_by_key(connection)
            deleted += _delete_some(connection, entry, rows)
            connection.execute(_SET_HEAD, {"head": head})
    return deleted


def _delete_some(connection: Connection, entry: Entry, rows: Sequence[Row]) -> int:
    org_ids = sorted({row[_ORG_ID] for row in rows})
    through = {row.org_id: row.seq for row in connection.execute(_THROUGH, {"org_ids": org_ids})}
    there = [row for row in rows if row[_SEQ] > through.get(row[_ORG_ID], 0)]
    if not there:
        return 0
    ranges = [_range(list(of_one)) for _, of_one in groupby(there, key=lambda row: row[_ORG_ID])]
    for each in ranges:
        if each.first != through.get(each.org_id, 0) + 1:
            raise UpkeepError(
                f"{entry.file} does not continue the archived events of {each.org_id}: run `holdfast verify`"
            )
    arrays = _arrays(ranges)
    connection.execute(_CHECKPOINT, arrays)
    gone = [tuple(row) for row in connection.execute(_DELETE, arrays)]
    erased = erased_through(connection, org_ids)
    if _by_number(gone, erased) != _by_number(there, erased):
        raise UpkeepError(
            f"the events in {entry.file} differ from those of the database, so they stay there: run `holdfast verify`; "
            "if the database was restored from a backup, it lacks events that were archived later, or has "
            "text that was erased before they were: erase it again"
        )
    return len(gone)


def erased_through(connection: Connection, org_ids: Sequence[str]) -> dict[str, int]:
    """The last event whose free text was erased, of each of these organizations that has one."""
    return dict(connection.execute(_ERASED, {"org_ids": org_ids}).all())


def _by_number(rows: Sequence[Row], erased: dict[str, int]) -> dict[tuple[str, int], Row]:
    return {(row[_ORG_ID], row[_SEQ]): _comparable(row, erased) for row in rows}


def _comparable(row: Row, erased: dict[str, int]) -> Row:
    """The row; without its free text, if that was erased: it may have been when the file was there already."""
    if row[_SEQ] > erased.get(row[_ORG_ID], 0):
        return row
    return tuple(value for number, value in enumerate(row) if number not in (_ACTIVITY, _METADATA))


def _load(connection: Connection, folder: Folder) -> None:
    """Have `credit_events` name all events on this connection, and `archived` none."""
    driver = connection.connection.driver_connection
    assert driver is not None
    with connection.begin():
        schema = connection.scalar(text("SELECT quote_ident(current_schema())"))
        connection.execute(text("CREATE TEMPORARY TABLE read_back (LIKE credit_events)"))
        through: dict[str, int] = dict(connection.execute(text("SELECT org_id, seq FROM archived")).all())
        erased: dict[str, int] = dict(
            connection.execute(text("SELECT org_id, max(seq) FROM erasures GROUP BY 1")).all()
        )
        with driver.cursor() as cursor, cursor.copy(f"COPY read_back ({', '.join(Event._fields)}) FROM STDIN") as copy:
            for entry in folder.entries:
                for rows in folder.groups(entry):
                    for row in rows:
                        if row[_SEQ] <= through.get(row[_ORG_ID], 0):
                            is_erased = row[_SEQ] <= erased.get(row[_ORG_ID], 0)
                            copy.write_row((*row[:_ACTIVITY], None, *row[_ACTIVITY + 1 :]) if is_erased else row)
    every_event = "SELECT * FROM read_back"
    if has_nodes(connection):
        _copy_from_nodes(connection, schema)
    else:
        every_event += f" UNION ALL SELECT * FROM {schema}.credit_events"
    with connection.begin():
        connection.execute(text("CREATE INDEX ON read_back (org_id, seq)"))
        connection.execute(text("CREATE INDEX ON read_back (org_id, idempotency_key)"))
        connection.execute(text("ANALYZE read_back"))
        connection.execute(text(f"CREATE TEMPORARY VIEW credit_events AS {every_event}"))
        connection.execute(text(f"CREATE TEMPORARY TABLE archived (LIKE {schema}.archived INCLUDING INDEXES)"))


def _copy_from_nodes(connection: Connection, schema: str) -> None:
    """Have the distributed tables on this connection alone: `read_back` has all events, `archived` is left out.

    A node does not see what only this connection has, and Citus joins it with other tables badly.
    """
    with connection.begin():
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
        # With one connection to each node, everything of an organization is as it was at one moment.
        connection.execute(text("SET LOCAL citus.max_adaptive_executor_pool_size = 1"))
        connection.execute(text(f"INSERT INTO read_back SELECT * FROM {schema}.credit_events"))
        for table in (each.name for each in metadata.sorted_tables if distribution.is_distributed(each)):
            if table not in (credit_events.name, archived.name):
                connection.execute(text(f"CREATE TEMPORARY TABLE {table} (LIKE {schema}.{table} INCLUDING INDEXES)"))
                connection.execute(text(f"INSERT INTO {table} SELECT * FROM {schema}.{table}"))
                connection.execute(text(f"ANALYZE {table}"))


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time.min, UTC)


def _range(rows: Sequence[Row]) -> Range:
    return Range(rows[0][_ORG_ID], rows[0][_SEQ], rows[-1][_SEQ])


def _arrays(ranges: Sequence[Range]) -> dict[str, Any]:
    org_ids, firsts, lasts = zip(*ranges, strict=True)
    return {"org_ids": list(org_ids), "firsts": list(map(str, firsts)), "lasts": list(map(str, lasts))}


_ORG_ID, _SEQ, _ACTIVITY, _METADATA = map(Event._fields.index, ("org_id", "seq", "activity_name", "metadata"))
# As text: psycopg gives the numbers of a list one type, which may be too small for the later ones.
_RANGES = """unnest(
    CAST(:org_ids AS text[]), CAST(CAST(:firsts AS text[]) AS bigint[]), CAST(CAST(:lasts AS text[]) AS bigint[])
) WITH ORDINALITY AS range (org_id, first, last, place)"""
_IN_RANGE = "event.org_id = range.org_id AND event.seq BETWEEN first AND last"
_COLUMNS = ", ".join(
    "CAST(event.metadata AS text)" if name == "metadata" else f"event.{name}" for name in Event._fields
)

_TODAY = text("SELECT CAST(timezone('UTC', clock_timestamp()) AS date)")
_HEAD = select(archive_head.c.installation, archive_head.c.head)
_BEGIN = text("""
    INSERT INTO archive_head (installation, head) VALUES (CAST(gen_random_uuid() AS text), '') RETURNING installation
""")
_SET_HEAD = text("UPDATE archive_head SET head = :head")
_NOT_SUMMED = text("""
    SELECT wallets.org_id FROM wallets LEFT JOIN daily_sums_through AS through USING (org_id)
    JOIN credit_events AS event ON event.org_id = wallets.org_id AND event.seq = COALESCE(through.seq, 0) + 1
    WHERE event.created_at < :before ORDER BY 1
""")
_CLOSED = text("""
    CREATE TEMPORARY TABLE closed AS
    SELECT day, wallet.org_id, GREATEST(first_seq, COALESCE(old.seq, 0) + 1) AS first, last_of_day AS last
    FROM (
        SELECT org_id, LEAST(last_seq, (
            SELECT min(event.seq) FROM workflows JOIN credit_events AS event USING (org_id)
            WHERE workflows.org_id = wallets.org_id AND state = 'reserved'
              AND idempotency_key = concat('start:', workflows.workflow_id)
        ), (
            SELECT event.seq FROM subscriptions JOIN credit_events AS event USING (org_id)
            WHERE subscriptions.org_id = wallets.org_id AND subscription_id = wallets.subscription_id
              AND idempotency_key = concat('subscription:', subscription_id, ':', period)
        )) AS needed FROM wallets
    ) AS wallet
    JOIN (
        SELECT org_id, day, min(first_seq) AS first_seq, max(last_seq) AS last_of_day FROM daily_sums
        WHERE day < :before GROUP BY org_id, day
    ) AS summed USING (org_id)
    LEFT JOIN archived AS old USING (org_id)
    JOIN credit_events AS next ON next.org_id = wallet.org_id AND next.seq = last_of_day + 1
    WHERE last_of_day < needed AND last_of_day > COALESCE(old.seq, 0) AND timezone('UTC', next.created_at) >= day + 1
""")
_CLOSED_ON = text("SELECT org_id, first, last FROM closed WHERE day = :day ORDER BY org_id")
_EVENTS = text(f"""
    SELECT {_COLUMNS} FROM {_RANGES} JOIN credit_events AS event ON {_IN_RANGE} ORDER BY place, seq
""")
_THROUGH = text("SELECT org_id, seq FROM archived WHERE org_id = ANY(:org_ids)")
_ERASED = text("SELECT org_id, max(seq) FROM erasures WHERE org_id = ANY(:org_ids) GROUP BY org_id")
_KEPT = ("created_at", *(f"{name}_after" for name in audit.BALANCES))
_CHECKPOINT = text(f"""
    INSERT INTO archived AS old (org_id, seq, created_at, {", ".join((*audit.BALANCES, *audit.ARCHIVED))})
    SELECT moved.org_id, moved.seq, {", ".join((*(f"final.{name}" for name in _KEPT), *audit.ARCHIVED))}
    FROM (
        SELECT event.org_id, max(seq) AS seq, {", ".join(f"{sums} AS {name}" for name, sums in audit.ARCHIVED.items())}
        FROM {_RANGES} JOIN credit_events AS event ON {_IN_RANGE} GROUP BY event.org_id
    ) AS moved
    JOIN credit_events AS final ON final.org_id = moved.org_id AND final.seq = moved.seq
    ON CONFLICT (org_id) DO UPDATE SET
        {", ".join(f"{name} = excluded.{name}" for name in ("seq", "created_at", *audit.BALANCES))},
        {", ".join(f"{name} = old.{name} + excluded.{name}" for name in audit.ARCHIVED)}
""")
_DELETE = text(f"""
    DELETE FROM credit_events AS event USING {_RANGES} WHERE {_IN_RANGE} RETURNING {_COLUMNS}
""")
