"""The commands of operators, run as a person runs them: on dead letters, on open reservations, and for a token."""

import base64
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jwt
import pytest
from typer.testing import CliRunner

from ledger import audit
from ledger.store import Delivery, apply_batch
from tests.acceptance import commands
from tests.acceptance.commands import Ended, drawn
from tests.installation import Installation, Producer, environment, installed
from tests.messages import delivery
from tests.support import eventually, sql
from worker.cli import app
from worker.local.embedded import Embedded

SECRET = "a secret of at least thirty-two characters"


def run(installation: Installation, *arguments: str, typed: str | None = None, **settings: str) -> Ended:
    return commands.run(*arguments, env=installation.environment | settings, typed=typed)


def marks(installation: Installation, org_id: str) -> list[tuple[Any, ...]]:
    return sql(
        installation.engine,
        "SELECT status, attempts, resolved_by, resolution FROM dead_letters WHERE org_id = :org_id ORDER BY id",
        org_id=org_id,
    )


def letter_ids(installation: Installation, org_id: str) -> list[str]:
    rows = sql(installation.engine, "SELECT id FROM dead_letters WHERE org_id = :org_id ORDER BY id", org_id=org_id)
    return [str(letter_id) for (letter_id,) in rows]


def events(installation: Installation, org_id: str) -> list[tuple[Any, ...]]:
    return sql(
        installation.engine,
        "SELECT event_type, credits FROM credit_events WHERE org_id = :org_id ORDER BY seq",
        org_id=org_id,
    )


def refund_too_early(installation: Installation, org_id: str, *, refunds: int = 1) -> list[str]:
    """Refunds of 10 that arrive before the finish they are about; answers with their letters' numbers."""
    for number in range(1, refunds + 1):
        fields = {"refund_id": f"r-{number}", "credits": 10, "workflow_id": "run"}
        apply_batch(installation.engine, [delivery("wallet.refund", org_id=org_id, **fields)])
    return letter_ids(installation, org_id)


def finish(producer: Producer, org_id: str) -> None:
    producer.answer("workflow.finish", {"org_id": org_id, "workflow_id": "run", "credits": 80})


# Reading dead letters

HOSTILE_TASK = "wallet.\x1b[2J[bold]x[/]"
HOSTILE_BODY = b"\x1b]0;owned\x07 \xff \xe2\x80\xae line\nnext"


@dataclass(frozen=True, slots=True)
class Desk:
    """A ledger with five dead letters, of which the last is discarded."""

    installation: Installation

    def holdfast(self, *arguments: str) -> Ended:
        return run(self.installation, *arguments)


@pytest.fixture(scope="module")
def desk(services: Embedded) -> Iterator[Desk]:
    with installed(services) as own:
        refund_too_early(own, "acme")
        apply_batch(own.engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p-1", credits=0)])
        apply_batch(own.engine, [delivery("wallet.grant", org_id="globex", grant_id="g-1", credits="\x9b[31m")])
        apply_batch(own.engine, [Delivery(HOSTILE_TASK, None, HOSTILE_BODY)])
        apply_batch(own.engine, [delivery("wallet.purchase", org_id="globex", purchase_id="p-1", credits=0)])
        sql(own.engine, "UPDATE dead_letters SET first_failed_at = '2026-01-31', last_failed_at = '2026-01-31 12:00Z'")
        sql(own.engine, "UPDATE dead_letters SET last_failed_at = '2026-02-01', attempts = 3 WHERE id = 2")
        sql(own.engine, "UPDATE dead_letters SET traceback = 'Traceback:\n  line\x1b[0m' WHERE id = 4")
        discarded = run(own, "failed", "discard", "5", "--why", "a [bold]test[/]", "--by", "ann")
        assert (discarded.returncode, discarded.stdout) == (0, "Dead letter 5 is discarded.\n")
        yield Desk(own)


def test_dead_letters_are_listed_by_every_filter(desk: Desk) -> None:
    cases: dict[tuple[str, ...], list[int]] = {
        (): [4, 3, 2, 1],
        ("--error", "invalid_message", "--org", "acme"): [2],
        ("--task", "wallet.refund"): [1],
        ("--org", "globex", "--status", "all"): [5, 3],
        ("--since", "2026-02-01"): [2],
        ("--status", "all", "--limit", "2"): [5, 4],
    }

    def listed(arguments: tuple[str, ...]) -> list[int]:
        page = json.loads(desk.holdfast("failed", "list", "--json", *arguments).stdout)
        assert page["has_more"] == ("--limit" in arguments)
        return [item["id"] for item in page["items"]]

    with ThreadPoolExecutor(2) as two:
        found = dict(zip(cases, two.map(listed, cases), strict=True))
    assert found == cases


def test_a_list_of_one_organization_tells_of_letters_that_name_none(desk: Desk) -> None:
    for org_id in ("acme", "nobody"):
        shown = desk.holdfast("failed", "list", "--org", org_id)
        assert shown.stdout.endswith("\nAlso 1 dead letter without an organization: list it without --org.\n")
    assert "Also" not in desk.holdfast("failed", "list", "--org", "acme", "--error", "conflict").stdout


def test_a_task_that_nobody_knows_is_named_and_one_that_a_dead_letter_has_is_found(desk: Desk) -> None:
    for command in (("list",), ("replay", "--all")):
        ended = desk.holdfast("failed", *command, "--task", "wallet.refnud")
        assert (ended.returncode, ended.stdout) == (2, "")
        said = " ".join(ended.stderr.replace("│", " ").split())
        assert "--task: there is no task wallet.refnud, nor a dead letter of it; did you mean wallet.refund?" in said
    apply_batch(desk.installation.engine, [Delivery("workflow.finnish", None, b"")])
    [(letter_id,)] = sql(desk.installation.engine, "SELECT id FROM dead_letters WHERE task = 'workflow.finnish'")
    shown = desk.holdfast("failed", "list", "--task", "workflow.finnish")
    sql(desk.installation.engine, "DELETE FROM dead_letters WHERE id = :id", id=letter_id)
    assert (shown.returncode, "workflow.finnish" in shown.stdout) == (0, True)


def test_a_list_as_json_is_small_however_large_the_messages_are(desk: Desk) -> None:
    listed = json.loads(desk.holdfast("failed", "list", "--json").stdout)["items"][0]
    shown = json.loads(desk.holdfast("failed", "show", str(listed["id"]), "--json").stdout)
    assert shown.keys() - listed.keys() == {"args", "kwargs", "body_base64", "trace_id", "traceback"}
    assert listed == {name: shown[name] for name in listed}


def test_a_list_shows_markup_as_it_is_and_control_characters_as_escapes(desk: Desk) -> None:
    shown = desk.holdfast("failed", "list")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Open dead letters, newest first: 4" in shown.stdout
    assert "2026-02-01 00:00:00" in shown.stdout
    assert re.search(r"refund_exceeds_usage +wallet\.refund: workflow run used 0 credits", shown.stdout)
    assert r"wallet.\x1b[2J[bold]x[/]" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "\x9b" not in shown.stdout


@pytest.mark.parametrize(("width", "left_out"), [(60, 5), (120, 0)])
def test_a_list_fits_a_narrow_terminal_and_says_what_it_leaves_out(desk: Desk, width: int, left_out: int) -> None:
    lines = drawn("failed", "list", env=desk.installation.environment, width=width)
    assert max(map(len, lines)) <= width
    said = re.search(r"Not shown, as the terminal is narrow: (.*?)\. Use --json", " ".join(map(str.strip, lines)))
    assert len(said[1].split(", ") if said else []) == left_out


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def test_a_list_of_80_columns_has_the_error_and_times_without_seconds(desk: Desk) -> None:
    lines = drawn("failed", "list", "--task", "wallet.purchase", env=desk.installation.environment, width=80)
    assert max(map(len, lines)) <= 80
    [row] = [line for line in lines if line.startswith(" 2 ")]
    assert re.match(r" 2 +2026-02-01 00:00 +acme +wallet\.purchase: credits must be ", row)
    assert "error_code" in words(lines).partition("Not shown, as the terminal is narrow: ")[2]


def test_a_list_by_cause_has_a_line_for_each_incident(desk: Desk) -> None:
    listed = desk.holdfast("failed", "list", "--by-cause")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "Open dead letters by cause: 4, 4 dead letters of 2 organizations" in listed.stdout
    narrow = drawn("failed", "list", "--by-cause", env=desk.installation.environment, width=80)
    assert max(map(len, narrow)) <= 80
    assert any(re.match(r" +1 +acme +wallet\.purchase +credits must be greater ", line) for line in narrow)
    first = json.loads(desk.holdfast("failed", "list", "--by-cause", "--limit", "1", "--json").stdout)
    assert (len(first["items"]), first["has_more"]) == (1, True)
    assert desk.holdfast("failed", "list", "--by-cause", "--status", "replayed").stdout == "No dead letters match.\n"


def test_an_empty_list_says_so(desk: Desk) -> None:
    assert desk.holdfast("failed", "list", "--status", "replayed").stdout == "No dead letters match.\n"


def test_a_letter_is_shown_with_everything_about_it(desk: Desk) -> None:
    shown = desk.holdfast("failed", "show", "2")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert dict(re.findall(r"│ (\w+) +│ (.*?) +│", shown.stdout)) == {
        "status": "open",
        "task": "wallet.purchase",
        "org_id": "acme",
        "error_code": "invalid_message",
        "error": "wallet.purchase: credits must be greater than 0, got 0",
        "attempts": "3",
        "first_failed_at": "2026-01-31 00:00:00",
        "last_failed_at": "2026-02-01 00:00:00",
        "what_to_do": "Correct the sender and send a new message; discard this one.",
    }
    assert json.loads(shown.stdout.partition("Message\n")[2]) == {"org_id": "acme", "purchase_id": "p-1", "credits": 0}
    assert '  "purchase_id": "p-1",\n' in shown.stdout


def test_a_discarded_letter_shows_who_did_it_and_why(desk: Desk) -> None:
    shown = desk.holdfast("failed", "show", "5").stdout
    assert re.search(r"resolved_by +│ ann +│", shown)
    assert re.search(r"resolution +│ a \[bold\]test\[/\] +│", shown)


def test_bytes_that_are_no_message_are_shown_safely(desk: Desk) -> None:
    shown = desk.holdfast("failed", "show", "4")
    message, _, traceback = shown.stdout.partition("Message\n")[2].partition("Traceback\n")
    assert message == r"\x1b]0;owned\x07 \xff \u202e line" + "\nnext\n"
    assert traceback == "Traceback:\n  line\\x1b[0m\n"
    as_json = json.loads(desk.holdfast("failed", "show", "4", "--json").stdout)
    assert base64.b64decode(as_json["body_base64"]) == HOSTILE_BODY
    assert (as_json["args"], as_json["kwargs"], as_json["task"]) == (None, None, HOSTILE_TASK)


def test_json_lets_no_control_character_through(desk: Desk) -> None:
    shown = desk.holdfast("failed", "show", "3", "--json").stdout
    assert "\x9b" not in shown
    assert json.loads(shown)["args"] == [{"org_id": "globex", "grant_id": "g-1", "credits": "\x9b[31m"}]


@pytest.mark.parametrize("command", [("show", "99"), ("discard", "99", "--why", "a test")])
def test_a_letter_that_does_not_exist_is_exit_code_1(desk: Desk, command: tuple[str, ...]) -> None:
    ended = desk.holdfast("failed", *command)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "holdfast: there is no dead letter 99\n")


# Replaying


def test_a_refund_that_came_before_its_finish_is_replayed_after_it(
    running: Installation, workflow_engine: Producer
) -> None:
    [letter_id] = refund_too_early(running, "early")
    too_early = run(running, "failed", "replay", letter_id)
    assert (too_early.returncode, too_early.stdout) == (1, "")
    assert too_early.stderr == (
        f"holdfast: dead letter {letter_id} failed again and is open, attempts: 2: wallet.refund: workflow run used 0 "
        "credits and 0 of them were refunded already, so 10 cannot be "
        f"(dead letter {letter_id}, refund_exceeds_usage)\n"
    )
    assert marks(running, "early") == [("open", 2, None, None)]

    finish(workflow_engine, "early")
    replayed = run(running, "failed", "replay", letter_id, "--by", "ann")
    assert (replayed.returncode, replayed.stdout, replayed.stderr) == (0, f"Dead letter {letter_id}: posted.\n", "")
    assert marks(running, "early") == [("replayed", 2, "ann", "posted")]
    assert events(running, "early") == [("usage", -80), ("refund", 10)]

    again = run(running, "failed", "replay", letter_id, "--by", "bob")
    assert (again.returncode, again.stdout) == (
        0,
        f"Dead letter {letter_id}: posted, a duplicate: nothing changes.\n",
    )
    assert marks(running, "early") == [("replayed", 2, "ann", "posted")]
    assert events(running, "early") == [("usage", -80), ("refund", 10)]
    assert audit.verify(running.engine).is_clean


def test_a_bulk_replay_asks_first_and_takes_the_oldest_first(running: Installation, workflow_engine: Producer) -> None:
    first, second, third = refund_too_early(running, "bulk", refunds=3)
    finish(workflow_engine, "bulk")
    bulk = ("failed", "replay", "--all", "--error", "refund_exceeds_usage", "--org", "bulk")
    plan = "      3 × refund_exceeds_usage, wallet.refund\n"

    dry = run(running, *bulk, "--dry-run")
    assert (dry.returncode, dry.stdout) == (0, f"{plan}Would replay 3 dead letters. Nothing was sent.\n")
    unasked = run(running, *bulk)
    assert (unasked.returncode, unasked.stdout) == (2, plan)
    assert unasked.stderr == "holdfast: cannot ask without a terminal: check with --dry-run, then give --yes\n"
    refused = run(running, *bulk, typed="n\n")
    assert (refused.returncode, refused.stderr) == (1, "holdfast: nothing was sent\n")
    assert "Replay 3 dead letters? [y/N]" in refused.stdout
    assert marks(running, "bulk") == [("open", 1, None, None)] * 3

    agreed = run(running, *bulk, typed="y\n", USER="ann", LOGNAME="ann")
    assert agreed.returncode == 0
    posted = "".join(f"Dead letter {letter_id}: posted.\n" for letter_id in (first, second, third))
    assert agreed.stdout.endswith(f"[y/N]: {posted}3 of 3 dead letters replayed.\n")
    [(_, _, by, _), *_] = marks(running, "bulk")
    assert by == f"ann@{os.uname().nodename}"
    assert events(running, "bulk") == [("usage", -80), ("refund", 10), ("refund", 10), ("refund", 10)]
    nothing = run(running, *bulk)
    assert (nothing.returncode, nothing.stdout) == (0, "No open dead letter matches.\n")


def test_a_bulk_replay_goes_on_after_a_message_that_fails_again(
    running: Installation, workflow_engine: Producer
) -> None:
    apply_batch(running.engine, [delivery("wallet.purchase", org_id="mixed", purchase_id="p-1", credits=0)])
    refund_too_early(running, "mixed")
    finish(workflow_engine, "mixed")
    ended = run(running, "failed", "replay", "--all", "--org", "mixed", "--yes", "--by", "ann")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1] == "1 of 2 dead letters replayed."
    assert "failed again and is open, attempts: 2: wallet.purchase: credits must be" in ended.stderr
    assert marks(running, "mixed") == [("open", 2, None, None), ("replayed", 1, "ann", "posted")]


def test_scripts_read_what_was_done_as_json(running: Installation, workflow_engine: Producer) -> None:
    first, second, third = (int(letter_id) for letter_id in refund_too_early(running, "script", refunds=3))
    finish(workflow_engine, "script")
    workflow_engine.answer("wallet.grant", {"org_id": "script", "grant_id": "g-1", "credits": 1_000})
    workflow_engine.answer("workflow.start", {"org_id": "script", "workflow_id": "stuck", "credits": 5})

    def done(*arguments: object) -> tuple[int, Any]:
        ended = run(running, *map(str, arguments), "--json")
        return ended.returncode, json.loads(ended.stdout)

    def item(letter_id: int, outcome: str | None, error: str | None = None) -> dict[str, object]:
        return {"id": letter_id, "outcome": outcome, "error": error}

    refused = f"dead letter {first} was discarded by ann: a test"
    discard = ("failed", "discard", first, first, "--why", "a test", "--by", "ann")  # once, however often it is named
    assert done(*discard) == (0, {"items": [item(first, "discarded")]})
    assert done(*discard) == (1, {"items": [item(first, None, refused)]})
    bulk = ("failed", "replay", "--all", "--org", "script", "--yes")
    assert done(*bulk, "--dry-run") == (0, {"items": [item(n, "would be replayed") for n in (second, third)]})
    assert done("failed", "replay", first, second, first) == (
        1,
        {"items": [item(first, None, refused), item(second, "posted")]},
    )
    assert done(*bulk) == (0, {"items": [item(third, "posted")]})
    assert done(*bulk) == (0, {"items": []})
    assert done("release", "script", "stuck", "--why", "a test") == (
        0,
        {"org_id": "script", "workflow_id": "stuck", "outcome": "released", "credits": 5, "available": 940},
    )


def test_what_was_done_before_the_broker_went_away_is_told_as_json(installation: Installation) -> None:
    [letter_id] = refund_too_early(installation, "acme")
    away = {"HOLDFAST_BROKER_URL": "redis://127.0.0.1:1/0"}
    ended = run(installation, "failed", "replay", "99", letter_id, "--json", **away)
    assert (ended.returncode, json.loads(ended.stdout)) == (
        2,
        {"items": [{"id": 99, "outcome": None, "error": "there is no dead letter 99"}]},
    )
    assert "could not be handed to the broker" in ended.stderr or "was not sent" in ended.stderr


def test_a_run_of_the_scheduler_is_replayed_too(running: Installation) -> None:
    body = b'[[{"org_id": "scheduled"}], {}, {}]'
    sql(
        running.engine,
        "INSERT INTO dead_letters (task, org_id, body, body_sha256, error_code, error, attempts) VALUES"
        " ('reservations.release_expired', 'scheduled', :body, sha256(:body), 'unexpected_error', 'a defect', 1)",
        body=body,
    )
    [letter_id] = letter_ids(running, "scheduled")
    ended = run(running, "failed", "replay", letter_id, "--by", "ann")
    assert (ended.returncode, ended.stdout) == (0, f"Dead letter {letter_id}: sent; it has run.\n")
    assert marks(running, "scheduled") == [("replayed", 1, "ann", "sent; it has run")]


def test_without_a_worker_the_letter_says_that_its_message_was_sent(installation: Installation) -> None:
    first, second = refund_too_early(installation, "acme", refunds=2)
    ended = run(installation, "failed", "replay", first, second, "--wait-s", "0.2", "--by", "ann")
    assert (ended.returncode, ended.stderr) == (0, "")
    seen = "1 message waits in the queue credits at redis://"
    [(*_, late), _] = marks(installation, "acme")
    assert late.startswith(f"sent; wallet.refund was sent, but no answer came within 0.2 s: {seen}")
    assert marks(installation, "acme") == [
        ("replayed", 1, "ann", late),
        ("replayed", 1, "ann", "sent; not waited for, as the answer before it did not come in time"),
    ]
    assert installation.waiting() == {"credits": 2, "unacked": 0}
    installation.start_worker()
    eventually(lambda: marks(installation, "acme") == [("open", 2, None, None)] * 2)


def test_a_discarded_letter_is_not_replayed(running: Installation) -> None:
    [letter_id] = refund_too_early(running, "discarded")
    run(running, "failed", "discard", letter_id, "--why", "a test message", "--by", "ann")
    refused = f"holdfast: dead letter {letter_id} was discarded by ann: a test message\n"
    dry = run(running, "failed", "replay", letter_id, "--dry-run")
    assert (dry.returncode, dry.stdout, dry.stderr) == (1, "Would replay 0 dead letters. Nothing was sent.\n", refused)
    ended = run(running, "failed", "replay", letter_id)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", refused)
    assert marks(running, "discarded") == [("discarded", 1, "ann", "a test message")]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("failed", "replay"), "give either dead letters or --all"),
        (("failed", "replay", "1", "--all"), "give either dead letters or --all"),
        (("failed", "replay", "1", "--error", "conflict"), "--org and --since need --all"),
        (
            ("failed", "replay", "--error", "conflict"),
            "Invalid value for --all: is missing: without it, --error, --task",
        ),
        (("failed", "replay", "--since", "2026-01-31"), "Invalid value for --all: is missing"),
        (("failed", "replay", "all"), "'ID': must be an integer, got all"),
        (("failed", "replay", "7", "0"), "'ID': must be greater than or equal to 1, got 0"),
        (("failed", "show", "9" * 20), f"'ID': must be less than or equal to {2**63 - 1}, got {'9' * 20}"),
        (("failed", "show", "\x1b[2J"), r"'ID': must be an integer, got \x1b[2J"),
        (("failed", "show", "x" * 200), f"'ID': must be an integer, got {'x' * 39}…"),
        (
            ("failed", "list", "--status", "closed"),
            "'--status': 'closed' is not one of 'open', 'replayed', 'discarded'",
        ),
        (
            ("failed", "list", "--error", "conflcit"),
            "'--error': conflcit is no error of a dead letter; did you mean conf",
        ),
        (
            ("failed", "list", "--error", "x"),
            "'--error': x is no error of a dead letter; the codes are invalid_message,",
        ),
        (
            ("failed", "replay", "--all", "--error", "x"),
            "'--error': x is no error of a dead letter; the codes are inval",
        ),
        (("failed", "discard", "8", "seven", "--why", "typo"), "'ID': must be an integer, got seven"),
        (("failed", "replay", "1", "--wait-s", "soon"), "'--wait-s': must be a valid number, got soon"),
        (("failed", "discard", "1"), "Missing option '--why'"),
        (("failed", "discard", "1", "--why", "a\x1b[2J"), "'--why': must be one line of printable text"),
        (("failed", "list", "--since", "soon"), "--since: soon is not a date or time such as 2026-01-31"),
        (("holds", "--older-than", "2w"), "'--older-than': 2w is not a time such as 90s, 15m, 2h or 3d"),
        (("token", "--org", "acme", "--scope", "admin"), "--scope: admin is not one of credits:read, workflows:"),
        (("token", "--scope", "credits:read"), "give either organizations or --all-orgs"),
        (("token", "--scope", "operator", "--org", "a b"), "--org: a b is not a valid organization id"),
    ],
)
def test_a_wrong_option_is_named_and_exit_code_2(arguments: tuple[str, ...], problem: str) -> None:
    ended = CliRunner().invoke(app, arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert problem in " ".join(ended.stderr.replace("│", " ").split())
    assert "\x1b[2J" not in ended.stderr


# Open reservations


def test_open_reservations_are_listed_and_released(running: Installation, workflow_engine: Producer) -> None:
    workflow_engine.answer("wallet.grant", {"org_id": "stuck", "grant_id": "g-1", "credits": 100})
    for workflow_id, held in (("run-1", 30), ("run-2", 20)):
        fields = {"workflow_id": workflow_id, "credits": held, "project_id": "web", "activity_name": "[red]Report"}
        workflow_engine.answer("workflow.start", {"org_id": "stuck", **fields})
    shown = run(running, "holds", "stuck")
    assert "Open reservations, oldest first: 2" in shown.stdout
    day = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.findall(rf"\d+ (?:s|min) +stuck +(run-\d) +(\d+) +{day} +(\w+) +(\[red\]\w+) +{day}", shown.stdout) == [
        ("run-1", "30", "web", "[red]Report"),
        ("run-2", "20", "web", "[red]Report"),
    ]
    assert run(running, "holds", "stuck", "--older-than", "1h").stdout == "No open reservation matches.\n"

    released = run(running, "release", "stuck", "run-1", "--why", "the engine lost it", "--by", "ann")
    assert (released.returncode, released.stderr) == (0, "")
    assert released.stdout == "Released 30 credits of stuck; 80 are available.\n"
    [event] = json.loads(run(running, "history", "stuck", "--json", "--limit", "1").stdout)["items"]
    assert (event["event_type"], event["source"], event["credits"]) == ("reservation_released", "operator", 30)
    assert event["metadata"] == {"reason": "cancelled", "given_reason": "the engine lost it", "by": "ann"}
    left = json.loads(run(running, "holds", "stuck", "--json").stdout)["items"]
    assert [(hold["workflow_id"], hold["credits"]) for hold in left] == [("run-2", 20)]

    again = run(running, "release", "stuck", "run-1", "--why", "the engine lost it")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "holdfast: workflow run-1 of stuck is cancelled: it holds no reservation\n"
    unknown = run(running, "release", "stuck", "run-9", "--why", "the engine lost it")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr == "holdfast: stuck has no workflow run-9: no message has named it yet\n"


# Tokens


def printed_token(*arguments: str, **settings: str) -> dict[str, Any]:
    ended = commands.run("token", *arguments, env=environment(HOLDFAST_JWT_SECRET=SECRET, **settings))
    assert (ended.returncode, ended.stderr) == (0, "")
    decoded = jwt.decode(ended.stdout.strip(), SECRET, algorithms=["HS256"], options={"verify_aud": False})
    claims: dict[str, Any] = decoded
    return claims


def test_a_token_says_who_may_do_what() -> None:
    before = int(time.time())
    claims = printed_token(
        *("--org", "acme", "--org", "globex", "--scope", "credits:read", "--scope", "workflows:write"),
        *("--expires-in-s", "60", "--subject", "ann"),
    )
    assert before <= claims.pop("exp") - 60 <= time.time()
    assert claims == {"sub": "ann", "orgs": ["acme", "globex"], "scope": "credits:read workflows:write"}
    assert printed_token("--scope", "operator")["orgs"] == []
    assert printed_token("--scope", "operator:read", "--scope", "operator")["scope"] == "operator:read operator"
    everything = printed_token("--all-orgs", "--scope", "operator")
    assert (everything["orgs"], everything["scope"]) == ("*", "operator")


def test_a_token_says_what_the_settings_want_of_one() -> None:
    wanted = {"HOLDFAST_JWT_AUDIENCE": "https://credits.example", "HOLDFAST_JWT_ISSUER": "https://login.example/"}
    claims = printed_token("--all-orgs", "--scope", "operator", **wanted)
    assert (claims["aud"], claims["iss"]) == tuple(wanted.values())


def test_a_token_needs_a_secret(desk: Desk) -> None:
    ended = desk.holdfast("token", "--all-orgs", "--scope", "operator")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("holdfast: HOLDFAST_JWT_SECRET is not set. ")


# Help

COMMANDS = ("failed list", "failed show", "failed replay", "failed discard", "holds", "release", "token")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert f"Example: holdfast {command}" in " ".join(shown.stdout.split())
