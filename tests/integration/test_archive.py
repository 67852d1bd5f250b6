"""The archive: whatever leaves, what stays continues from it, and nothing is lost, whatever is killed."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from holdfast_client.messages import AnyMessage, InvalidMessage, parse
from holdfast_client.results import Result
from ledger import archive, archive_files, audit, erasing, history, migrations, receipts, roles, totals, views
from ledger.archive_files import Folder
from ledger.archived import Archived, archived_events
from ledger.database import connect, snapshot
from ledger.filters import EventFilter
from ledger.store import apply_batch, apply_past
from ledger.upkeep import UpkeepError
from ledger.usage import usage
from tests.databases import new_database
from tests.messages import delivery
from tests.support import as_role, eventually, reads_of, sql
from worker.local.embedded import Embedded

MAIN = "from worker.cli import main; main()"
ROOT = Path(__file__).parents[2]
NOW = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
BEFORE = (NOW - timedelta(days=40)).date()

Sent = tuple[float, str, dict[str, Any]]
"""A message: how many days ago, its task, and its fields."""


def past(engine: Engine, org_id: str, *sent: Sent) -> None:
    """Apply messages as if they had come some days ago."""
    apply_past(
        engine, [(NOW - timedelta(days=days), message(task, org_id=org_id, **fields)) for days, task, fields in sent]
    )


def message(task: str, **fields: Any) -> AnyMessage:
    parsed = parse(task, fields)
    assert not isinstance(parsed, InvalidMessage), parsed
    return parsed


def run(days: float, name: str, credits: int = 5, **fields: Any) -> list[Sent]:
    """A run that reserves and finishes, some days ago."""
    named = {"workflow_id": name, **fields}
    return [
        (days, "workflow.start", {**named, "credits": credits + 1}),
        (days - 0.01, "workflow.finish", {**named, "credits": credits}),
    ]


YEAR: list[Sent] = [
    (90.5, "wallet.purchase", {"purchase_id": "p1", "credits": 500}),
    (90.4, "wallet.grant", {"grant_id": "g1", "credits": 50, "reason": "welcome", "metadata": {"note": "by phone"}}),
    *run(90.3, "r1", project_id="red", activity_name="Crawl"),
    (90.2, "wallet.reverse", {"reversal_id": "v1", "purchase_id": "p1", "credits": 20, "reason": "disputed"}),
    (90.1, "wallet.grant", {"grant_id": "g2", "credits": 30, "expires_at": "2999-01-01T00:00:00Z"}),
    (90.1, "wallet.grant", {"grant_id": "g3", "credits": 7, "expires_at": (NOW - timedelta(days=80)).isoformat()}),
    *run(60.3, "r2", activity_name="Train"),
    (60.2, "workflow.start", {"workflow_id": "r3", "credits": 9}),
    (60.1, "workflow.cancel", {"workflow_id": "r3"}),
    (60.1, "wallet.bill", {"billing_id": "b1", "credits": 0}),
    (60.1, "wallet.configure", {"version": 1, "credit_limit": 10}),
    (59.99, "workflow.start", {"workflow_id": "r4", "credits": 9}),
    *run(31.3, "r5", project_id="red"),
    (31.1, "wallet.refund", {"refund_id": "f1", "credits": 2, "workflow_id": "r1"}),
    (1.1, "wallet.refund", {"refund_id": "f2", "credits": 1, "workflow_id": "r2"}),
]


def found(engine: Engine) -> dict[str, list[tuple[str, str]]]:
    return {each.check.name: each.offenders for each in audit.verify(engine).findings if each.offenders}


def found_with(engine: Engine, folder: Path) -> dict[str, list[tuple[str, str]]]:
    return {each.check.name: each.offenders for each in archive.verify(engine, folder).findings if each.offenders}


def numbers(engine: Engine, org_id: str = "acme") -> list[int]:
    return [
        seq for (seq,) in sql(engine, "SELECT seq FROM credit_events WHERE org_id = :org_id ORDER BY 1", org_id=org_id)
    ]


def test_the_closed_days_leave_and_the_rest_continues_from_them(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    past(engine, "globex", (70, "wallet.purchase", {"purchase_id": "p1", "credits": 5}))
    before = numbers(engine)
    moved = list(archive.archive(engine, BEFORE, tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == [*(each.entry.file for each in moved), "manifest.json"]
    [(through,)] = sql(engine, "SELECT seq FROM archived")
    assert numbers(engine) == before[through:]
    assert sum(each.events for each in moved) == through > 10
    assert numbers(engine, "globex") == [1]  # the last event stays
    assert found(engine) == {}
    assert found_with(engine, tmp_path) == {}
    verdict, whole = audit.verify(engine), archive.verify(engine, tmp_path)
    assert (verdict.events + verdict.archived, verdict.archived) == (whole.events, through)
    assert list(archive.archive(engine, BEFORE, tmp_path)) == []


def seen(engine: Engine, org_id: str = "acme") -> dict[str, Any]:
    """What must not depend on where the older events are."""
    days = [NOW - timedelta(days=days) for days in (90, 89, 60, 45, 30)]
    filters = [
        EventFilter(),
        EventFilter(event_types=("usage", "grant")),
        EventFilter(project_id="red"),
        EventFilter(activity_names=("Crawl", "Train")),
        *(EventFilter(created_from=day) for day in days),
        *(EventFilter(created_before=day, event_types=("usage",)) for day in days),
        *(EventFilter(created_from=first, created_before=last) for first, last in pairwise(days)),
    ]
    with snapshot(engine) as connection:
        wallet = views.wallet(connection, org_id)
        totals = [history.find(connection, org_id, each).totals(connection) for each in filters]
        used = [usage(connection, org_id, ["project", "day"], created_from=day).groups for day in (None, *days[:2])]
        steps = history.find(connection, org_id).steps(connection, points=3)
    return {"wallet": wallet, "totals": totals, "used": used, "last": steps[-1]}


def test_balances_totals_and_usage_are_those_of_a_ledger_that_never_archived(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    before = seen(engine)
    for age in (89, 60, 40):
        list(archive.archive(engine, (NOW - timedelta(days=age)).date(), tmp_path))
        assert (age, seen(engine)) == (age, before)
        assert (age, found(engine)) == (age, {})
    assert found_with(engine, tmp_path) == {}


def test_pages_say_where_the_older_events_are(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    with snapshot(engine) as connection:
        assert history.events(connection, "acme").archived is None
        all_of_them = history.events(connection, "acme").events
    list(archive.archive(engine, BEFORE, tmp_path))
    left, recent = numbers(engine), NOW - timedelta(days=35)
    older = Archived(left[0] - 1, all_of_them[-(left[0] - 1)]["created_at"])
    with snapshot(engine) as connection:
        page = history.events(connection, "acme", limit=2)
        assert [event["seq"] for event in page.events] == left[:-3:-1]
        assert (page.total, page.archived) == (left[-1], older)
        page = history.events(connection, "acme", before_seq=page.next_before_seq)
        assert [event["seq"] for event in page.events] == left[-3::-1]
        assert (page.next_before_seq, page.archived) == (None, older)
        gone = EventFilter(created_before=older.through)
        of_the_past = history.events(connection, "acme", gone)
        assert (of_the_past.events, of_the_past.archived) == ([], older)
        assert of_the_past.total > 0
        assert history.events(connection, "acme", EventFilter(created_from=recent)).archived is None
    exported = list(history.all_events(reads_of(engine), "acme", EventFilter()))
    assert [event["seq"] for event in exported] == left[::-1]


def test_runs_say_that_they_are_archived_in_part(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    list(archive.archive(engine, BEFORE, tmp_path))
    with snapshot(engine) as connection:
        older = archived_events(connection, "acme")
        receipts_ = receipts.page(connection, "acme")
        assert receipts_.archived == older
        assert {each.workflow_id: each.is_archived_in_part for each in receipts_.receipts if each.workflow_id} == {
            "r1": True,
            "r2": True,
            "r5": False,
        }
        of_r1 = next(each for each in receipts_.receipts if each.workflow_id == "r1")
        assert (of_r1.state, of_r1.credits, of_r1.refunded_credits) == ("settled", 2, 2)
        for workflow_id, is_gone in {"r1": True, "r3": True, "r5": False}.items():
            view = views.workflow(connection, "acme", workflow_id)
            assert view is not None
            assert (workflow_id, view.archived_in_part) == (workflow_id, is_gone)
            filtered = history.events(connection, "acme", EventFilter(workflow_id=workflow_id))
            assert (workflow_id, filtered.archived) == (workflow_id, older if is_gone else None)


def test_balances_and_their_course_continue_from_the_archive(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    list(archive.archive(engine, BEFORE, tmp_path))
    with snapshot(engine) as connection:
        older = archived_events(connection, "acme")
        assert older is not None
        assert history.balances_at(connection, "acme", older.through - timedelta(seconds=1)) is None
        at_the_end = history.balances_at(connection, "acme", older.through)
        assert at_the_end == history.balances_after(connection, "acme", older.events)
        course = history.find(connection, "acme").course(connection, points=500, now=datetime.now(UTC))
        assert course is not None
        assert course.points[0][1] == 0
        assert [at for at, _ in course.points] == sorted(at for at, _ in course.points)
        assert at_the_end is not None
        assert at_the_end.available in [balance for _, balance in course.points]


def test_the_totals_of_all_organizations_stay_exact(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    past(engine, "globex", *run(50, "r1"), *run(0.5, "r2"))
    ranges: list[dict[str, datetime]] = [
        {},
        {"created_from": NOW - timedelta(days=61)},
        {"created_from": NOW - timedelta(days=61), "created_before": NOW - timedelta(days=51)},
        {"created_before": NOW - timedelta(days=31)},
    ]

    def of_types(created: dict[str, datetime]) -> dict[str, tuple[int, int]]:
        sums: dict[str, tuple[int, int]] = {}
        for each in totals.read(engine, **created).events:
            number, credits_ = sums.get(each.event_type, (0, 0))
            sums[each.event_type] = number + each.events, credits_ + each.credits
        return sums

    before = [of_types(each) for each in ranges]
    list(archive.archive(engine, BEFORE, tmp_path))
    assert [of_types(each) for each in ranges] == before
    assert {each.reason for each in totals.read(engine).events} == {None, totals.ARCHIVED}


def test_what_is_repeated_or_refunded_finds_what_it_needs(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    list(archive.archive(engine, BEFORE, tmp_path))
    again = [delivery(task, org_id="acme", **fields) for _, task, fields in YEAR]
    answers = apply_batch(engine, again)
    assert [answer.duplicate for answer in answers if isinstance(answer, Result)] == [True] * len(YEAR)
    [refund, reversal] = apply_batch(
        engine,
        [
            delivery("wallet.refund", org_id="acme", refund_id="f3", credits=1, workflow_id="r1"),
            delivery("wallet.reverse", org_id="acme", reversal_id="v2", purchase_id="p1", reason="refunded"),
        ],
    )
    assert isinstance(refund, Result)
    assert isinstance(reversal, Result)
    assert found(engine) == {}
    assert found_with(engine, tmp_path) == {}


def test_a_day_stays_as_long_as_an_event_of_it_is_needed(engine: Engine, tmp_path: Path) -> None:
    hold = {"workflow_id": "long", "credits": 1, "expires_in_s": 29 * 86_400}
    past(engine, "acme", (60, "wallet.purchase", {"purchase_id": "p1", "credits": 9}), (59, "workflow.start", hold))
    past(engine, "acme", *run(50.5, "r1"), *run(49.5, "r2"), *run(42, "r3"))
    plan = {"subscription_id": "s1", "version": 1, "plan": "team", "monthly_credits": 9}
    anchor = (NOW - timedelta(days=20)).isoformat()
    past(engine, "globex", (50, "wallet.purchase", {"purchase_id": "p1", "credits": 1}))
    past(engine, "globex", (20, "wallet.subscribe", {**plan, "anchor": anchor}), (1, "workflow.finish", FINISH))
    past(engine, "initech", (50.1, "wallet.purchase", {"purchase_id": "p1", "credits": 1}))
    list(archive.archive(engine, BEFORE, tmp_path))
    assert sql(engine, "SELECT org_id, seq FROM archived ORDER BY 1") == [("acme", 1), ("globex", 1)]
    apply_batch(engine, [delivery("workflow.cancel", org_id="acme", workflow_id="long")])
    moved = list(archive.archive(engine, BEFORE, tmp_path))
    # A day that was archived before has got another file for what was left.
    day = (NOW - timedelta(days=50)).date()
    assert f"{day}-0002.parquet" in [each.entry.file for each in moved]
    assert numbers(engine)[0] > 4
    assert (found(engine), found_with(engine, tmp_path)) == ({}, {})


FINISH = {"workflow_id": "w1", "credits": 2}


HARMS = {
    "UPDATE workflows SET finish_credits = 6 WHERE workflow_id = 'r2'": "workflows",
    "UPDATE workflows SET workflow_id = 'other' WHERE workflow_id = 'r5'": "workflows",
    """UPDATE posted_messages SET terms = terms || '{"credits": 51}' WHERE message_id = 'g1'""": "messages",
    "UPDATE posted_messages SET reversed = 21 WHERE message_id = 'p1'": "reversals",
    "UPDATE archived SET ending = ending + 1": "uses",
    "UPDATE archived SET prepaid_balance = prepaid_balance + 1": "sum",
    "UPDATE archived SET seq = seq - 1": "numbering",
    "DELETE FROM daily_sums WHERE day = (SELECT min(day) FROM daily_sums)": "daily sums",
    "DELETE FROM archived": "numbering",
}


def test_whatever_is_wrong_with_what_has_left_is_found_without_the_files(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    list(archive.archive(engine, BEFORE, tmp_path))
    for harm, check in HARMS.items():
        with engine.connect() as connection:
            connection.execute(text(harm))
            broken = [each.name for each in audit.CHECKS if connection.execute(text(each.offenders)).all()]
        assert check in broken, (harm, broken)
    assert found(engine) == {}


# Whatever is killed


class KilledError(BaseException):
    """The process ends here."""


def in_files(folder: Path, org_id: str = "acme") -> set[int]:
    """The numbers of the events in complete files that the manifest names."""
    if not (folder / "manifest.json").exists():
        return set()
    installation = json.loads((folder / "manifest.json").read_text())["installation"]
    opened = Folder.open(folder, installation)
    rows = (row for entry in opened.entries for group in opened.groups(entry) for row in group)
    return {row[1] for row in rows if row[0] == org_id}


def test_killed_at_every_step_each_event_is_in_the_database_or_in_a_complete_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "STEP", 4)
    monkeypatch.setattr(archive, "GROUPS_OF_A_FILE", 2)
    past(engine, "acme", *YEAR)
    left = numbers(engine)
    every = set(left)
    passed = kill_at = 0

    def may_end(function: Any) -> Any:
        def step() -> None:
            nonlocal passed
            passed += 1
            if passed == kill_at:
                raise KilledError

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            step()
            result = function(*args, **kwargs)
            step()
            return result

        return wrapped

    for owner, name in (
        (archive_files, "_digest"),
        (archive_files, "_sync"),
        (Folder, "_write_manifest"),
        (Folder, "finish_renaming"),
        (Path, "rename"),
        (archive, "_delete_some"),
    ):
        monkeypatch.setattr(owner, name, may_end(getattr(owner, name)))
    for number in count(1):
        passed, kill_at = 0, number
        with suppress(KilledError):
            list(archive.archive(engine, BEFORE, tmp_path))
            break
        kill_at, left_before, left = 0, left, numbers(engine)
        assert set(left) | in_files(tmp_path) == every
        if left != left_before:
            assert found(engine) == {}
    assert number > 15
    kill_at = 0
    assert numbers(engine)[0] > 10
    assert (found(engine), found_with(engine, tmp_path)) == ({}, {})
    assert in_files(tmp_path).isdisjoint(numbers(engine))


def test_a_database_that_was_restored_from_a_backup_finds_its_events_in_the_files(
    engine: Engine, tmp_path: Path
) -> None:
    past(engine, "acme", *YEAR)
    tables = "credit_events, archived, archive_head"
    list(archive.archive(engine, (NOW - timedelta(days=89)).date(), tmp_path))
    for name in tables.split(", "):
        sql(engine, f"CREATE TABLE backup_{name} AS SELECT * FROM {name}")
    [first, *later] = list(archive.archive(engine, BEFORE, tmp_path))
    assert later
    for name in tables.split(", "):
        sql(engine, f"ALTER TABLE {name} DISABLE TRIGGER USER")
        sql(engine, f"DELETE FROM {name}")
        sql(engine, f"INSERT INTO {name} SELECT * FROM backup_{name}")
        sql(engine, f"ALTER TABLE {name} ENABLE TRIGGER USER")
    again = list(archive.archive(engine, BEFORE, tmp_path))
    assert again == [first, *later]
    assert (found(engine), found_with(engine, tmp_path)) == ({}, {})


def test_text_that_a_backup_brought_back_is_erased_again_before_it_leaves(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    sql(engine, "CREATE TABLE backup_credit_events AS SELECT * FROM credit_events")
    erasing.erase(engine, "acme", by="ann", why="asked for")
    copy = tmp_path / "of_the_erased"
    copy.mkdir()
    list(archive.archive(engine, BEFORE, copy))
    for name in ("credit_events", "erasures", "archived", "archive_head"):
        sql(engine, f"ALTER TABLE {name} DISABLE TRIGGER USER")
        if name != "archive_head":
            sql(engine, f"DELETE FROM {name}")
    sql(engine, "UPDATE archive_head SET head = :head", head=archive_head_before_all(copy))
    sql(engine, "INSERT INTO credit_events SELECT * FROM backup_credit_events")
    for name in ("credit_events", "erasures", "archived", "archive_head"):
        sql(engine, f"ALTER TABLE {name} ENABLE TRIGGER USER")
    with pytest.raises(UpkeepError, match="erase it again"):
        list(archive.archive(engine, BEFORE, copy))
    # After an error, a closed connection keeps the lock for a moment.
    eventually(lambda: sql(engine, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'") == [])
    erasing.erase(engine, "acme", by="ann", why="asked for, before the restore")
    assert list(archive.archive(engine, BEFORE, copy))
    assert (found(engine), found_with(engine, copy)) == ({}, {})


def archive_head_before_all(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["files"][0]["previous"])


@pytest.mark.parametrize("name", ["photo.jpeg", "manifest.json.bak"])
def test_a_new_archive_is_not_begun_in_a_folder_with_other_files(engine: Engine, tmp_path: Path, name: str) -> None:
    past(engine, "acme", *YEAR)
    (tmp_path / name).write_text("of somebody else")
    with pytest.raises(UpkeepError, match=f"has no manifest, but {name}: name an empty folder"):
        list(archive.archive(engine, BEFORE, tmp_path))
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_a_new_archive_may_be_begun_on_a_new_disk(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    (tmp_path / "lost+found").mkdir()
    assert list(archive.archive(engine, BEFORE, tmp_path))


def test_what_is_erased_after_it_was_archived_or_while_that_is_unfinished_stays_provable(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past(engine, "acme", *YEAR)
    list(archive.archive(engine, (NOW - timedelta(days=70)).date(), tmp_path))
    with monkeypatch.context() as patched, suppress(KilledError):
        patched.setattr(archive, "_delete_some", unable)
        list(archive.archive(engine, BEFORE, tmp_path))
    before = erasing.erase(engine, "acme", by="ann", why="asked for")
    assert before.archived_events == numbers(engine)[0] - 1 > 0
    assert found(engine) == {}
    list(archive.archive(engine, BEFORE, tmp_path))
    assert (found(engine), found_with(engine, tmp_path)) == ({}, {})


def unable(*_: Any) -> int:
    raise KilledError


# What is refused


@dataclass(frozen=True)
class Kept:
    """A ledger with an archive, which these tests leave as it is, and a copy of the folder, which they harm."""

    engine: Engine
    folder: Path


@pytest.fixture(scope="module")
def original(services: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("archive")
    with new_database(services) as url:
        engine = connect(url)
        past(engine, "acme", *YEAR)
        list(archive.archive(engine, BEFORE, folder))
        yield Kept(engine, folder)
        engine.dispose()


@pytest.fixture
def kept(original: Kept, tmp_path: Path) -> Kept:
    return Kept(original.engine, shutil.copytree(original.folder, tmp_path / "archive"))


def changed_byte(folder: Path) -> str:
    path = sorted(folder.glob("*.parquet"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path.name} was changed after it was written"


def missing_file(folder: Path) -> str:
    path = sorted(folder.glob("*.parquet"))[-1]
    path.unlink()
    return f"{path.name}: No such file or directory"


def swapped_files(folder: Path) -> str:
    first, second, *_ = sorted(folder.glob("*.parquet"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return f"{first.name} was changed after it was written"


def one_more_file(folder: Path) -> str:
    (folder / "2020-01-01-0001.parquet").write_bytes(b"")
    return "2020-01-01-0001.parquet is not in the manifest"


def last_entry_removed(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / manifest["files"].pop()["file"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "the manifest lacks the last files"


@pytest.mark.parametrize("harm", [changed_byte, missing_file, swapped_files, one_more_file, last_entry_removed])
def test_an_archive_that_is_not_as_it_was_written_is_found(kept: Kept, harm: Any) -> None:
    expected = harm(kept.folder)
    offenders = found_with(kept.engine, kept.folder)
    assert list(offenders) == ["archive"]
    assert offenders["archive"][0] == ("archive", expected)


def first_entry_removed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][0]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def entry_changed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["credits"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def not_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": [')


def of_another(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"installation": "another", "files": []}))


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def stranger(folder: Path) -> None:
    day = (NOW - timedelta(days=32)).date()
    (folder / f"{day}-0001.parquet").write_bytes(b"mine")


def link(folder: Path) -> None:
    day = (NOW - timedelta(days=32)).date()
    (folder / f"{day}-0001.parquet.part").symlink_to(folder / "manifest.json")


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (first_entry_removed, "its entries do not continue one another"),
        (entry_changed, "its entries do not continue one another"),
        (not_json, "is damaged"),
        (of_another, "is the archive of another installation"),
        (emptied, "is not the archive that this database has written to last"),
        (last_entry_removed, "is not the archive that this database has written to last"),
        (stranger, "is there, but the manifest does not name it"),
        (link, "a symbolic link is not followed"),
        (no_folder, "is not a folder"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_a_sentence(kept: Kept, harm: Any, why: str) -> None:
    before = numbers(kept.engine)
    harm(kept.folder)
    with pytest.raises(UpkeepError, match=why):
        list(archive.archive(kept.engine, (NOW - timedelta(days=31)).date(), kept.folder))
    assert numbers(kept.engine) == before


def test_whoever_failed_is_not_in_the_way_of_the_next_attempt(kept: Kept) -> None:
    not_json(kept.folder)
    for _ in range(30):
        with pytest.raises(UpkeepError, match="is damaged"):
            list(archive.archive(kept.engine, (NOW - timedelta(days=31)).date(), kept.folder))


def test_recent_events_stay_and_only_the_owner_may_archive(engine: Engine, database_url: str, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    before = numbers(engine)
    latest = datetime.now(UTC).date() - timedelta(days=31)
    for date in (latest + timedelta(days=1), datetime.now(UTC).date() + timedelta(days=400)):
        with pytest.raises(UpkeepError, match=f"name {latest} or an earlier day"):
            list(archive.archive(engine, date, tmp_path))
    for role in (roles.WORKER, roles.READER):
        other = connect(as_role(role, database_url))
        with pytest.raises(UpkeepError, match="only the owner of the tables"):
            list(archive.archive(other, BEFORE, tmp_path))
        with pytest.raises(DBAPIError, match="permission denied"):
            sql(other, "DELETE FROM credit_events")
        with pytest.raises(DBAPIError, match="permission denied"):
            sql(other, "UPDATE archived SET seq = seq + 1")
        other.dispose()
    assert numbers(engine) == before
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused_and_workers_go_on(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    moving = archive.archive(engine, BEFORE, tmp_path)
    next(moving)
    with pytest.raises(UpkeepError, match="is running: wait until it has ended"):
        list(archive.archive(engine, BEFORE, tmp_path))
    with pytest.raises(UpkeepError, match="is running: wait until it has ended"):
        archive.verify(engine, tmp_path)
    [answer] = apply_batch(engine, [delivery("workflow.finish", org_id="acme", workflow_id="new", credits=1)])
    assert isinstance(answer, Result)
    assert list(moving)
    assert found(engine) == {}


def test_there_is_no_way_back_to_an_older_version(kept: Kept) -> None:
    with pytest.raises(DBAPIError, match="an older version knows neither archived events nor erased text"):
        migrations.downgrade(kept.engine, "0030")
    migrations.upgrade(kept.engine)
    assert found(kept.engine) == {}


def test_only_what_is_archived_can_be_deleted(engine: Engine, tmp_path: Path) -> None:
    past(engine, "acme", *YEAR)
    list(archive.archive(engine, BEFORE, tmp_path))
    for statement in ("DELETE FROM credit_events", "TRUNCATE credit_events", "UPDATE credit_events SET credits = 1"):
        with pytest.raises(DBAPIError, match="credit_events is append-only"):
            sql(engine, statement)


def test_a_disk_that_is_full_is_one_sentence_and_the_next_run_goes_on(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    past(engine, "acme", *YEAR)
    before = numbers(engine)
    command = f"ulimit -f 1; exec {sys.executable} -c '{MAIN}' archive --before {BEFORE} --to {tmp_path}"
    environment = {"HOLDFAST_DATABASE_URL": database_url, "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
    full = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (full.returncode, full.stdout) == (2, "")
    assert re.fullmatch(r"holdfast: .*\.parquet\.part: File too large\n", full.stderr)
    assert numbers(engine) == before
    assert list(tmp_path.iterdir()) == []
    assert list(archive.archive(engine, BEFORE, tmp_path))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_killed_at_any_moment_it_goes_on(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """The process itself, with SIGKILL, a little later each time."""
    runs = [step for age in range(90, 40, -1) for number in range(20) for step in run(age, f"r-{age}-{number}")]
    past(engine, "acme", (91, "wallet.purchase", {"purchase_id": "p1", "credits": 100_000}))
    past(engine, "acme", *sorted(runs, key=lambda sent: -sent[0]))
    past(engine, "acme", *run(1, "last"))
    every, kills = set(numbers(engine)), 0
    arguments = [
        sys.executable,
        "-c",
        "from worker.cli import main; main()",
        "archive",
        "--before",
        str(BEFORE),
        "--to",
        str(tmp_path),
    ]
    while True:
        process = subprocess.Popen(arguments, env={"HOLDFAST_DATABASE_URL": database_url}, cwd=ROOT)
        with suppress(subprocess.TimeoutExpired):
            assert process.wait(2 + kills * 0.5) == 0
            break
        process.kill()
        process.wait()
        kills += 1
        eventually(lambda: not sql(engine, "SELECT FROM pg_locks WHERE locktype = 'advisory'"))
        assert set(numbers(engine)) | in_files(tmp_path) == every
        assert found(engine) == {}
    assert kills > 3
    assert (found(engine), found_with(engine, tmp_path)) == ({}, {})
    assert in_files(tmp_path).isdisjoint(numbers(engine))


# Whatever comes, and whenever it is archived

_kinds = st.sampled_from(
    ["purchase", "grant", "ending", "run", "hold", "cancel", "refund", "adjust", "plan", "archive"]
)
_steps = st.lists(st.tuples(_kinds, st.integers(0, 96), st.integers(1, 9)), min_size=5, max_size=25)


def sent(kind: str, number: int, credits: int, at: datetime) -> list[tuple[str, dict[str, Any]]]:
    """The messages of a step."""
    match kind:
        case "purchase":
            return [("wallet.purchase", {"purchase_id": f"p{number}", "credits": 50 * credits})]
        case "grant":
            return [("wallet.grant", {"grant_id": f"g{number}", "credits": credits, "reason": "why not"})]
        case "ending":
            ends = (at + timedelta(days=credits)).isoformat()
            return [("wallet.grant", {"grant_id": f"g{number}", "credits": credits, "expires_at": ends})]
        case "adjust":
            return [("wallet.adjust", {"adjustment_id": f"a{number}", "credits": credits, "reason": "typo"})]
        case "plan":
            plan = {"subscription_id": "s1", "version": number + 1, "plan": "team", "monthly_credits": 9}
            return [("wallet.subscribe", {**plan, "anchor": (NOW - timedelta(days=120)).isoformat()})]
        case "refund":
            return [("wallet.refund", {"refund_id": f"f{number}", "credits": 1, "workflow_id": "r"})]
    run = {"workflow_id": f"r{number}"}
    named = {**run, "credits": credits, "project_id": "red", "activity_name": ["Crawl", "Train"][credits % 2]}
    endings: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "run": [("workflow.finish", named)],
        "hold": [],
        "cancel": [("workflow.cancel", run)],
    }
    return [("workflow.start", named), *endings[kind]]


def test_a_ledger_that_archives_is_its_twin_that_never_does(services: Embedded, tmp_path: Path) -> None:
    numbers_ = count(1)

    @settings(max_examples=max(3, settings().max_examples // 16))
    @given(_steps)
    def check(steps: list[tuple[str, int, int]]) -> None:
        folder = tmp_path / str(next(numbers_))
        folder.mkdir()
        with new_database(services) as url, new_database(services) as twin_url:
            both = engine, twin = connect(url), connect(twin_url)
            at = NOW - timedelta(days=110)
            begin: list[tuple[str, dict[str, Any]]] = [
                ("wallet.purchase", {"purchase_id": "p", "credits": 900}),
                ("workflow.finish", {"workflow_id": "r", "credits": 100}),
            ]
            for number, (kind, hours, credits_) in enumerate([("begin", 0, 1), *steps, ("archive", 0, 1)]):
                at = min(at + timedelta(hours=hours), NOW - timedelta(days=32))
                if kind == "archive":
                    list(archive.archive(engine, at.date(), folder))
                    continue
                messages = begin if kind == "begin" else sent(kind, number, credits_, at)
                for each in both:
                    apply_past(each, [(at, message(task, org_id="acme", **fields)) for task, fields in messages])
            assert seen(engine) == seen(twin)
            assert (found(engine), found(twin)) == ({}, {})
            if list(folder.iterdir()):
                assert found_with(engine, folder) == {}
                assert in_files(folder) | set(numbers(engine)) == set(numbers(twin))
            for each in both:
                each.dispose()

    check()
