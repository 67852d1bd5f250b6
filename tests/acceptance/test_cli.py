"""The installed command `holdfast`, run as a person runs it."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import Engine, make_url

from holdfast_client.broker import ENGINE_QUEUE
from holdfast_client.client import Client
from ledger import audit, migrations, roles
from ledger.store import DeadLettered, apply_batch
from tests.acceptance import commands
from tests.acceptance.commands import Ended, drawn
from tests.installation import HOLDFAST, Installation, environment, installed, open_folder
from tests.messages import delivery
from tests.support import PATIENCE_S, eventually, sql
from tests.wheels import Environment, Wheels, required
from worker.local.embedded import Embedded

COMMANDS = "migrate", "up", "demo", "verify", "wallet", "history", "usage", "totals", "send"
TIMEOUT_S = 300

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


def run(*arguments: str, **settings: str) -> Ended:
    return commands.run(*arguments, env=environment(**settings))


def assert_one_line(ended: Ended, line: str, *, code: int = 2) -> None:
    """It says `line`, a pattern, on standard error and nothing else."""
    assert (ended.returncode, ended.stdout) == (code, "")
    assert re.fullmatch(f"holdfast: {line}\n", ended.stderr), ended.stderr


def apply(engine: Engine, task: str, **fields: Any) -> None:
    [answer] = apply_batch(engine, [delivery(task, **fields)])
    assert not isinstance(answer, DeadLettered)


@pytest.fixture(scope="module")
def books(services: Embedded) -> Iterator[Installation]:
    """A ledger with the history of `acme`, six events, and one wallet without any."""
    with installed(services) as own:
        engine = own.engine
        apply(
            engine, "wallet.purchase", org_id="acme", purchase_id="p-1", credits=5000, metadata={"note": "[bold]x[/]"}
        )
        apply(
            engine,
            "workflow.start",
            org_id="acme",
            workflow_id="run-1",
            credits=120,
            project_id="web",
            activity_name="[red]Report[/red]",
        )
        apply(engine, "workflow.finish", org_id="acme", workflow_id="run-1", credits=80)
        apply(engine, "workflow.start", org_id="acme", workflow_id="run-2", credits=10, project_id="crm")
        apply(engine, "wallet.grant", org_id="acme", grant_id="g-1", credits=5, reason="sorry")
        apply(engine, "wallet.configure", org_id="empty", version=1)
        yield own


@pytest.fixture
def holdfast(books: Installation) -> Any:
    """Runs a command on the books."""
    return lambda *arguments: run(*arguments, **books.environment)


# Help


def test_every_help_shows_an_example() -> None:
    helps = {command: run(command, "--help") for command in COMMANDS}
    assert {command: shown.returncode for command, shown in helps.items()} == dict.fromkeys(COMMANDS, 0)
    assert [command for command, shown in helps.items() if f"holdfast {command}" not in after_example(shown)] == []


def test_the_help_of_all_shows_an_example_and_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert [command for command in COMMANDS if f" {command} " not in shown.stdout] == []
    assert "holdfast" in after_example(shown)


def after_example(shown: Ended) -> str:
    return " ".join(shown.stdout.partition("Example")[2].split())


# Reading the books


def test_a_wallet_shows_its_balances(holdfast: Any) -> None:
    shown = holdfast("wallet", "acme")
    assert (shown.returncode, shown.stderr) == (0, "")
    rows = dict(re.findall(r"│ ([a-z ]+?) +│ +(.*?) │", shown.stdout))
    assert rows == {
        "available": "4,915",
        "prepaid": "4,925",
        "subscription left": "0",
        "reserved": "10",
        "used this period": "80",
        "included this period": "0",
        "plan": "none",
        "period ends": "",
        "credit limit": "0",
        "period cap": "none",
    }


def test_a_wallet_says_what_its_balances_mean(holdfast: Any) -> None:
    assert holdfast("wallet", "acme").stdout.splitlines()[0] == "4,915 available = 4,925 prepaid − 10 held"
    [first, second, *_] = holdfast("wallet", "empty").stdout.splitlines()
    assert first == "0 available = 0 prepaid"
    assert second == "Nothing is available: new runs are refused until credits are added."


def test_a_wallet_as_json_has_every_field(holdfast: Any) -> None:
    assert json.loads(holdfast("wallet", "acme", "--json").stdout) == {
        "org_id": "acme",
        "balance": 4925,
        "available": 4915,
        "prepaid_balance": 4925,
        "subscription_balance": 0,
        "reserved_credits": 10,
        "credit_limit": 0,
        "period_cap": None,
        "used_this_period": 80,
        "included_this_period": 0,
        "plan": None,
        "plan_ends_at": None,
        "current_period": None,
        "ending": [],
        "prepaid_ending": 0,
        "next_plan": None,
    }


def test_a_wallet_nobody_knows_is_exit_code_1(holdfast: Any) -> None:
    line = r"\[bold\]x\[/\] has no wallet: no message has named it yet"
    assert_one_line(holdfast("wallet", "[bold]x[/]"), line, code=1)


def test_a_history_shows_the_newest_first_and_markup_as_it_is(holdfast: Any) -> None:
    shown = holdfast("history", "acme")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    types = [found[1] for line in lines if (found := re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\W+(\w+)", line))]
    assert types == ["grant", "reservation", "usage", "reservation_released", "reservation", "prepaid_purchase"]
    assert "[bold]x[/]" in shown.stdout
    assert shown.stdout.count("[red]Report[/red]") == 3
    assert (shown.stdout.count(" run-1 "), shown.stdout.count(" run-2 ")) == (3, 1)


def test_a_history_as_json_has_the_nine_columns_and_what_names_the_event(books: Installation, holdfast: Any) -> None:
    page = json.loads(holdfast("history", "acme", "--json", "--limit", "2", "--offset", "2").stdout)
    times = sql(books.engine, "SELECT created_at FROM credit_events WHERE seq IN (3, 4) ORDER BY seq DESC")
    workflow = {"workflow_id": "run-1", "project_id": "web", "activity_name": "[red]Report[/red]"}
    assert page == {
        "items": [
            {
                "id": 4,
                "created_at": times[0][0].isoformat(),
                "event_type": "usage",
                "source": "workflow-engine",
                "credits": -80,
                "prepaid_balance_after": 4920,
                "period_usage_after": 80,
                "metadata": {"paid_by": {"prepaid": 80}},
                **workflow,
            },
            {
                "id": 3,
                "created_at": times[1][0].isoformat(),
                "event_type": "reservation_released",
                "source": "workflow-engine",
                "credits": 120,
                "prepaid_balance_after": 5000,
                "period_usage_after": 0,
                "metadata": {"reason": "settled"},
                **workflow,
            },
        ],
        "total": 6,
        "credits": 4_915,
        "limit": 2,
        "offset": 2,
        "archived": None,
    }


def test_a_history_is_filtered(books: Installation, holdfast: Any) -> None:
    [(grant_at, day)] = sql(books.engine, "SELECT created_at, created_at::date FROM credit_events WHERE seq = 6")
    cases: dict[tuple[str, ...], list[int]] = {
        ("--type", "usage", "--type", "grant"): [6, 4],
        ("--project", "web", "--type", "reservation"): [2],
        ("--activity", "[red]Report[/red]", "--activity", "Crawl"): [4, 3, 2],
        ("--activity", "Crawl"): [],
        ("--workflow", "run-1"): [4, 3, 2],
        ("--workflow", "run-1", "--type", "usage"): [4],
        ("--workflow", "run-9"): [],
        ("--activity", "Report"): [],
        ("--from", grant_at.isoformat()): [6],
        ("--to", grant_at.isoformat()): [5, 4, 3, 2, 1],
        ("--from", f"{day}", "--to", f"{day}", "--limit", "2", "--offset", "3"): [3, 2],
        ("--from", "2100-01-01"): [],
        ("--from", f"{day}", "--to", "9999-12-31", "--type", "grant"): [6],
    }

    def ids(arguments: tuple[str, ...]) -> list[int]:
        return [item["id"] for item in json.loads(holdfast("history", "acme", "--json", *arguments).stdout)["items"]]

    with ThreadPoolExecutor(2) as two:
        found = dict(zip(cases, two.map(ids, cases), strict=True))
    assert found == cases


def test_a_history_by_run_has_a_line_for_each_run_and_fits_a_terminal(books: Installation, holdfast: Any) -> None:
    lines = drawn("history", "acme", "--by-run", env=books.environment, width=80)
    told = [line.split()[2:] for line in lines if re.match(r" ?\d{4}-\d\d-\d\d ", line)]
    assert told == [
        ["grant", "5"],
        ["run-2", "reserved", "-10"],
        ["run-1", "settled", "80", "-80"],
        ["prepaid_purchase", "5,000"],
    ]
    assert max(map(len, lines)) <= 80
    left_out = "project_id, activity_name, reserved_credits, refunded_credits"
    assert left_out in " ".join(" ".join(lines).split())


def test_a_history_by_run_as_json_goes_on_where_a_page_ends(holdfast: Any) -> None:
    options = ("history", "acme", "--by-run", "--json", "--limit", "3")
    first = json.loads(holdfast(*options).stdout)
    rest = json.loads(holdfast(*options, "--cursor", first["next_cursor"]).stdout)
    items = first["items"] + rest["items"]
    assert [(item["workflow_id"], item["last_id"], item["credits"]) for item in items] == [
        (None, 6, 5),
        ("run-2", 5, -10),
        ("run-1", 4, -80),
        (None, 1, 5000),
    ]
    assert (rest["next_cursor"], items[3]["event"]["event_type"]) == (None, "prepaid_purchase")
    assert holdfast(*options[:3], "--limit", "3").stdout.splitlines()[-1] == f"Older: --cursor {first['next_cursor']}"


def test_a_history_without_events_says_so(holdfast: Any) -> None:
    for options in ((), ("--by-run",)):
        shown = holdfast("history", "empty", *options)
        assert (shown.returncode, shown.stdout, shown.stderr) == (0, "No events.\n", "")


def test_a_history_that_nobody_has_says_so_and_names_similar_ones(holdfast: Any) -> None:
    line = r"\[bold\]x\[/\] has no wallet: no message has named it yet"
    assert_one_line(holdfast("history", "[bold]x[/]"), line, code=1)
    for command in ("wallet", "history"):
        line = "acne has no wallet: no message has named it yet; similar: acme"
        assert_one_line(holdfast(command, "acne"), line, code=1)
    as_json = holdfast("history", "acne", "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)["items"]) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--limit", "0"), "'--limit': must be greater than or equal to 1, got 0"),
        (("--limit", "101"), "'--limit': must be less than or equal to 100, got 101"),
        (("--activity", ""), "'--activity': must have 1 to 256 characters, and no NUL or invalid character among them"),
        (("--from", "2026-02-30"), "--from: 2026-02-30 is not a date or time such as 2026-01-31"),
        (("--to", "9999-12-32"), "--to: 9999-12-32 is not a date or time such as 2026-01-31"),
        (("--from", "2026-11-23", "--to", "2026-11-22"), "--to: must not be before --from"),
        (("--from", "\x1b[2J"), r"--from: \x1b[2J is not a date or time"),
        (("--by-run", "--offset", "1"), "--offset: cannot be combined with --by-run: use --cursor"),
        (("--cursor", "7-3"), "--cursor: needs --by-run"),
        (("--by-run", "--cursor", "7"), "--cursor: must be the next_cursor of lines that --by-run shows"),
        (("--type", "[bold]x[/]"), "--type: [bold]x[/] is not one of usage, prepaid_purchase, "),
        (("--type", "\udcff"), r"--type: \udcff is not one of usage, prepaid_purchase, "),
        *(
            ((option, typed), f"'{option}': must have 1 to 128 characters, and only letters, digits and _ . : -")
            for option in ("--project", "--workflow")
            for typed in ("\udcff", "bad id", "")
        ),
        *(
            (
                ("--activity", typed),
                "'--activity': must have 1 to 256 characters, and no NUL or invalid character among them",
            )
            for typed in ("\udcff", "", "x" * 257)
        ),
    ],
)
def test_a_wrong_option_is_named_and_exit_code_2(holdfast: Any, arguments: tuple[str, ...], problem: str) -> None:
    ended = holdfast("history", "acme", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert problem in " ".join(ended.stderr.replace("│", " ").split())
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [("failed", "discard", "1"), ("release", "acme", "run-2")])
def test_a_reason_is_as_short_as_in_a_message(holdfast: Any, command: tuple[str, ...]) -> None:
    ended = holdfast(*command, "--why", "x" * 501)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "'--why': must not be longer than 500 characters" in ended.stderr


def test_a_terminal_may_be_narrow_but_no_figure_is_ever_cut_off(installation: Installation) -> None:
    engine, most, amount = installation.engine, 2**53 - 1, 10**12
    apply(engine, "wallet.purchase", org_id="acme", purchase_id="p-1", credits=amount)
    apply(engine, "workflow.finish", org_id="acme", workflow_id="run-1", credits=amount)
    apply(engine, "wallet.purchase", org_id="acme", purchase_id="p-2", credits=amount)
    sql(engine, "UPDATE wallets SET prepaid_balance = :most", most=most)  # as after nine thousand more
    apply(engine, "workflow.start", org_id="acme", workflow_id="run-2", credits=amount)
    apply(engine, "workflow.cancel", org_id="acme", workflow_id="run-2")
    apply(engine, "workflow.start", org_id="acme", workflow_id="x" * 128, credits=amount)
    sql(engine, "SELECT setval(pg_get_serial_sequence('dead_letters', 'id'), :id)", id=most - 1)
    apply_batch(engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p-3", credits=0)])

    time_of_day = r"\b\d\d:\d\d:\d\d\b"
    whole = {f"{most:,}", f"{amount:,}", f"{most - amount:,}"}
    types = ["reservation", "reservation_released", "reservation", "prepaid_purchase", "usage", "prepaid_purchase"]
    # How often a pattern is found on the screen.
    expected = {
        ("history", "acme"): {time_of_day: 6} | {rf"\d +{name} ": types.count(name) for name in types},
        ("history", "acme", "--by-run"): {time_of_day: 5},
        ("wallet", "acme"): {rf"\b{most:,} ": 2, rf"\b{amount:,} ": 3, rf"\b{most - amount:,} ": 2},
        ("holds",): {rf" {amount:,} ": 1, time_of_day: 1},
        ("failed", "list"): {str(most): 1},
    }
    for command, width in itertools.product(expected, (40, 70, 80)):
        lines = drawn(*command, env=installation.environment, width=width)
        screen = "\n".join(lines)
        assert set(re.findall(r"[19],[\d,]*", screen)) <= whole, screen
        found = {pattern: len(re.findall(pattern, screen)) for pattern in expected[command]}
        assert found == expected[command], screen
        assert width < 80 or max(map(len, lines)) <= width, screen


def test_usage_has_shares_and_a_sum(installation: Installation) -> None:
    engine = installation.engine
    apply(engine, "wallet.purchase", org_id="acme", purchase_id="p-1", credits=5_000)
    for number, (project, used) in enumerate([("web", 750), ("web", 1_000), ("crm", 248), (None, 2)]):
        apply(engine, "workflow.finish", org_id="acme", workflow_id=f"w{number}", credits=used, project_id=project)
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    lines = [line.split() for line in drawn("usage", "acme", env=installation.environment, width=80)]
    assert [line for line in lines if line][:1] == [["Usage", "of", "acme"]]
    assert [line for line in lines if line and line[-1].isdecimal()] == [
        ["web", "1,750", "88", "%", "2"],
        ["crm", "248", "12", "%", "1"],
        ["–", "2", "<1", "%", "1"],
        ["all", "2,000", "4"],
    ]
    told = partial(run, "usage", "acme", **installation.environment)
    assert told("--by", "day", "--csv").stdout == f"day,credits,runs\r\n{day},2000,4\r\n"
    assert json.loads(told("--by", "project", "--by", "day", "--json").stdout) == {
        "groups": [
            {"project": "web", "day": day, "credits": 1750, "runs": 2},
            {"project": "crm", "day": day, "credits": 248, "runs": 1},
            {"project": None, "day": day, "credits": 2, "runs": 1},
        ],
        "total": {"credits": 2000, "runs": 4},
        "truncated": False,
    }
    assert told("--to", "2020-01-01").stdout == "No usage.\n"
    assert run("totals", **installation.environment).stdout.startswith("1 wallet ")
    assert "at most 2" in told("--by", "day", "--by", "project", "--by", "source").stderr
    assert "is not combined with --json" in told("--csv", "--json").stderr
    assert_one_line(run("usage", "none", **installation.environment), "none has no wallet: .*", code=1)


def test_totals_are_balances_and_events_by_type(holdfast: Any) -> None:
    shown = holdfast("totals")
    assert (shown.returncode, shown.stderr) == (0, "")
    balances = dict(re.findall(r"│ ([a-z ]+?) +│ +(.*?) │", shown.stdout))
    assert "All 2 wallets" in shown.stdout
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", balances.pop("at"))
    assert balances == {
        "available": "4,915",
        "reserved": "10",
        "balance": "4,925",
        "prepaid": "4,925",
        "subscription left": "0",
    }
    events = {words[0]: words[1:] for line in shown.stdout.splitlines() if len(words := line.split()) == 3}
    assert events["reservation"] == ["2", "-130"]
    assert events["refund"] == ["0", "0"]
    assert events["all"] == ["6", "4,915"]


def test_totals_as_json_are_of_a_range(books: Installation, holdfast: Any) -> None:
    [(at,)] = sql(books.engine, "SELECT created_at FROM credit_events WHERE seq = 6")
    shown = json.loads(holdfast("totals", "--json", "--from", at.isoformat(), "--to", "9999-12-30").stdout)
    assert (shown["wallets"], shown["available"], shown["prepaid_balance"]) == (2, 4915, 4925)
    assert (shown["created_from"], shown["created_before"]) == (at.isoformat(), "9999-12-31T00:00:00+00:00")
    assert [each for each in shown["events"] if each["events"]] == [
        {"event_type": "grant", "reason": None, "events": 1, "credits": 5}
    ]
    wrong = holdfast("totals", "--from", "2026-11-23", "--to", "2026-11-22")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--to: must not be before --from" in wrong.stderr


def test_verify_on_sound_books_is_exit_code_0(holdfast: Any) -> None:
    plain, as_json = holdfast("verify"), holdfast("verify", "--json")
    assert (plain.returncode, plain.stderr, as_json.returncode) == (0, "", 0)
    assert "Verified: every invariant holds (wallets: 2, events: 6, open dead letters: 0)." in plain.stdout
    verdict = json.loads(as_json.stdout)
    assert {name: verdict[name] for name in ("clean", "wallets", "events", "open_dead_letters")} == {
        "clean": True,
        "wallets": 2,
        "events": 6,
        "open_dead_letters": 0,
    }
    assert [check["offenders"] for check in verdict["checks"]] == [[] for _ in audit.CHECKS]


def test_verify_on_broken_books_names_the_offenders_and_is_exit_code_1(installation: Installation) -> None:
    apply(installation.engine, "wallet.purchase", org_id="acme", purchase_id="p-1", credits=500)
    sql(installation.engine, "ALTER TABLE credit_events DISABLE TRIGGER USER")
    sql(installation.engine, "UPDATE credit_events SET credits = 501")
    plain, as_json = (run("verify", *option, **installation.environment) for option in ([], ["--json"]))
    assert (plain.returncode, plain.stderr, as_json.returncode, as_json.stderr) == (1, "", 1, "")
    assert "acme: events add up to 501, available is 500" in plain.stdout
    assert "credit_events: the trigger credit_events_append_only is disabled" in plain.stdout
    assert "Not clean:" in plain.stdout
    verdict = json.loads(as_json.stdout)
    assert verdict["clean"] is False
    assert {check["name"]: check["offenders"] for check in verdict["checks"] if check["offenders"]} == {
        "arithmetic": [["acme", "event 1, prepaid_purchase"]],
        "sum": [["acme", "events add up to 501, available is 500"]],
        "messages": [["acme", "purchase:p-1"]],
        "append-only": [
            ["credit_events", "the trigger credit_events_append_only is disabled"],
            ["credit_events", "the trigger credit_events_no_truncate is disabled"],
        ],
    }


def test_migrate_twice_does_nothing_the_second_time(empty_database_url: str) -> None:
    head = migrations.head_revision()
    first, second = (run("migrate", HOLDFAST_DATABASE_URL=empty_database_url) for _ in range(2))
    assert (first.returncode, first.stdout, first.stderr) == (0, f"The database is at {head} now.\n", "")
    assert (second.returncode, second.stdout, second.stderr) == (0, f"The database was at {head} already.\n", "")


def test_an_older_program_refuses_a_newer_schema_in_one_line_that_tells_the_way_back(
    database_url: str, engine: Engine
) -> None:
    sql(engine, "UPDATE alembic_version SET version_num = '9999'")
    for arguments in (["migrate"], ["migrate", "--to", "0001"]):
        assert_one_line(
            run(*arguments, HOLDFAST_DATABASE_URL=database_url),
            "the database is at revision 9999, and this version of Holdfast knows none after "
            rf"{migrations.head_revision()}: .*`holdfast migrate --to {migrations.head_revision()}`.*",
        )
    assert sql(engine, "SELECT version_num FROM alembic_version") == [("9999",)]


def test_a_schema_is_taken_back_and_forth_with_what_is_in_it(database_url: str, engine: Engine) -> None:
    apply_batch(engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p-1", credits=500)])
    back, same, forth = (
        run("migrate", *to, HOLDFAST_DATABASE_URL=database_url) for to in (["--to", "0003"], ["--to", "0003"], [])
    )
    assert (back.returncode, back.stdout, back.stderr) == (0, "The database is at 0003 now.\n", "")
    assert (same.returncode, same.stdout, same.stderr) == (0, "The database was at 0003 already.\n", "")
    assert (forth.returncode, forth.stderr) == (0, "")
    assert migrations.current_revision(engine) == migrations.head_revision()
    assert audit.verify(engine).is_clean
    assert sql(engine, "SELECT prepaid_balance FROM wallets") == [(500,)]


def test_a_schema_is_not_taken_back_where_that_would_lose_something(database_url: str, engine: Engine) -> None:
    sql(
        engine,
        "INSERT INTO waiting_messages (org_id, task, body, reason) VALUES ('acme', 'wallet.grant', '', 'locked')",
    )
    refused = run("migrate", "--to", "0002", HOLDFAST_DATABASE_URL=database_url)
    assert_one_line(refused, "messages still wait in waiting_messages: let the workers apply them first")
    assert migrations.current_revision(engine) == "0003"  # each step is one of its own
    for nonsense in ("base", "head", "-1", "9999"):  # what Alembic knows too would drop everything
        refused = run("migrate", f"--to={nonsense}", HOLDFAST_DATABASE_URL=database_url)
        assert refused.returncode == 2
        assert f"{nonsense} is not one of 0001, 0002" in refused.stderr
    assert sql(engine, "SELECT org_id FROM waiting_messages") == [("acme",)]


# What cannot be carried out


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        pytest.param({}, r"HOLDFAST_DATABASE_URL is not set\. .*postgresql\+psycopg://user:password@.*", id="missing"),
        pytest.param(
            {"HOLDFAST_DATABASE_URL": "postgres://u:sekrit@h/d"},
            r"HOLDFAST_DATABASE_URL must begin with postgresql\+psycopg://, not postgres://",
            id="malformed",
        ),
        pytest.param(
            {"HOLDFAST_DATABSASE_URL": "postgresql+psycopg://u:sekrit@h/d"},
            r"HOLDFAST_DATABSASE_URL is not a setting; did you mean HOLDFAST_DATABASE_URL\?",
            id="misspelled",
        ),
        pytest.param(
            {"HOLDFAST_DATABASE_URL": "postgresql+psycopg://u:sekrit@127.0.0.1:1/d"},
            r".*127\.0\.0\.1.*port 1 failed: Connection refused.*",
            id="nobody listens",
        ),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(settings: dict[str, str], line: str) -> None:
    ended = run("wallet", "acme", **settings)
    assert_one_line(ended, line)
    assert "sekrit" not in ended.stderr


def test_a_wrong_role_or_database_is_one_line_and_exit_code_2(services: Embedded) -> None:
    stranger = services.database_url.replace("//holdfast@", "//stranger:sekrit@")
    assert_one_line(run("wallet", "acme", HOLDFAST_DATABASE_URL=stranger), '.*role "stranger" does not exist')
    nowhere = services.database_url.replace("/holdfast?", "/nowhere?")
    assert_one_line(run("verify", HOLDFAST_DATABASE_URL=nowhere), '.*database "nowhere" does not exist')


@pytest.mark.parametrize("arguments", [("wallet", "acme"), ("verify",)])
def test_a_database_that_is_not_migrated_is_one_line_that_says_what_to_run(
    empty_database_url: str, arguments: tuple[str, ...]
) -> None:
    assert_one_line(run(*arguments, HOLDFAST_DATABASE_URL=empty_database_url), ".*run `holdfast migrate`")


def test_a_data_folder_that_is_a_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(
        run("up", "--data-dir", str(tmp_path / "file")), "The data folder .*/file cannot be used: Not a directory."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="not even root can write there, on Linux")
def test_a_data_folder_that_cannot_be_made_is_one_line_and_exit_code_2() -> None:
    assert_one_line(run("up", "--data-dir", "/proc/data"), "The data folder /proc/data cannot be used: .*")


# Everything on one machine


def processes_in(folder: Path) -> list[psutil.Process]:
    """Who uses `folder`: as an argument, as the current folder or for temporary files."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and (
                str(folder) in " ".join(process.cmdline())
                or process.cwd().startswith(str(folder))
                or process.environ().get("TMPDIR") == str(folder)
            ):
                found.append(process)
    return found


class Command:
    """A command that goes on by itself, with a folder of its own for temporary files."""

    def __init__(self, folder: Path, *arguments: str, program: str = HOLDFAST) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [program, *arguments],
                env=environment(TMPDIR=str(folder), HOLDFAST_PRODUCT_NAME="Acme"),
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.output.read_text()

    def wait_to_say(self, words: str) -> None:
        eventually(lambda: words in self.said() or self.process.poll() is not None, timeout_s=TIMEOUT_S)
        assert words in self.said()

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def exit_code(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(TIMEOUT_S)


@contextmanager
def started(folder: Path, *arguments: str, program: str = HOLDFAST) -> Iterator[Command]:
    command = Command(folder, *arguments, program=program)
    try:
        yield command
    finally:
        command.end()


@pytest.fixture
def folder() -> Iterator[Path]:
    with open_folder() as own:
        yield own


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("output"))


@pytest.mark.soak
def test_two_demos_at_once_tell_their_story_and_leave_nothing_behind(folder: Path) -> None:
    with started(folder, "demo") as one, started(folder, "demo") as other:
        assert (one.exit_code(), other.exit_code()) == (0, 0), one.said() + other.said()
    for demo in (one, other):
        assert "finish train-3, which used 710: over its estimate    → settled; 20 available" in demo.said()
        assert "Verified: every invariant holds (wallets: 1, events: 15, open dead letters: 0)." in demo.said()
        assert "Traceback" not in demo.said()
    assert left_in(folder) == []
    assert eventually(lambda: processes_in(folder) == [])


@pytest.mark.parametrize("moment", ["Starting PostgreSQL", "Messages sent"])
def test_ctrl_c_ends_a_demo_at_any_moment(folder: Path, moment: str) -> None:
    with started(folder, "demo") as demo:
        eventually(lambda: len(processes_in(folder)) > 1)
        demo.wait_to_say(moment)
        demo.interrupt()
        assert demo.exit_code() == 2, demo.said()
    assert demo.said().splitlines()[-1] == "holdfast: interrupted; everything is stopped"
    assert "Traceback" not in demo.said()
    assert left_in(folder) == []
    assert eventually(lambda: processes_in(folder) == [])


def exported(command: Command) -> dict[str, str]:
    """The settings that it tells for another terminal."""
    return dict(re.findall(r'export ([A-Z]+_\w+)="([^"]+)"', command.said()))


def settings_of(part: str, data_dir: Path) -> dict[str, str]:
    """What a part of `holdfast up` is told."""
    pid, _ = (data_dir / f"{part}.pid").read_text().split()
    environ = psutil.Process(int(pid)).environ()
    return {name: value for name, value in environ.items() if name.startswith("HOLDFAST_")}


@pytest.fixture
def from_the_wheels(wheels: Wheels, empty: Environment) -> str:
    """`holdfast`, installed from the wheels alone, outside the checkout."""
    empty.install_alone(wheels.holdfast, wheels.client)
    empty.link(required(wheels.holdfast, "server", "embedded"))
    return str(empty.folder / "bin" / "holdfast")


def assert_the_page_is_served(link: str) -> None:
    with httpx.Client(follow_redirects=True) as browser:
        page = browser.get(link)
        [style] = re.findall(r'href="(/static/[^"]+\.css[^"]*)"', page.text)
        assert (page.status_code, browser.get(page.url.join(style)).status_code) == (200, 200)
    assert "Credit history of acme" in page.text


def test_up_serves_until_ctrl_c_and_keeps_its_data(folder: Path, from_the_wheels: str) -> None:
    data_dir = folder / "data"
    with started(folder, "up", "--data-dir", str(data_dir), "--empty", program=from_the_wheels) as first:
        first.wait_to_say("Data and logs are in")
        assert "The credit history of the demo organization, acme, in a browser" in first.said()
        with Client(exported(first)["HOLDFAST_BROKER_URL"]) as client:
            assert client.purchase(org_id="acme", purchase_id="p-1", credits=500, wait_s=PATIENCE_S).available == 500
        with Client(exported(first)["HOLDFAST_ENGINE_BROKER_URL"], queue=ENGINE_QUEUE) as engine:
            assert engine.start(org_id="acme", workflow_id="run-1", credits=0, wait_s=PATIENCE_S).holds
        [link] = re.findall(r"http\S+/signin\S+", first.said())
        assert_the_page_is_served(link)
        shown = run("wallet", "acme", "--json", HOLDFAST_DATABASE_URL=exported(first)["HOLDFAST_DATABASE_URL"])
        assert json.loads(shown.stdout)["available"] == 500
        settings = {part: settings_of(part, data_dir) for part in ("worker", "beat", "api")}
        assert {part: make_url(told["HOLDFAST_DATABASE_URL"]).username for part, told in settings.items()} == {
            "worker": roles.WORKER,
            "beat": roles.WORKER,
            "api": roles.READER,
        }
        for name in ("HOLDFAST_JWT_SECRET", "HOLDFAST_PRODUCT_NAME"):
            assert [part for part, told in settings.items() if name in told] == ["api"]
        assert make_url(exported(first)["HOLDFAST_DATABASE_URL"]).username == roles.READER
        assert_one_line(
            run("up", "--data-dir", str(data_dir)), f"Holdfast already runs on the data folder {data_dir}: stop it .*"
        )
        signed = run("token", "--org", "acme", "--scope", "credits:read", **exported(first)).stdout.strip()

        worker, _ = (data_dir / "worker.pid").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
        first.wait_to_say("worker ended: it was killed by SIGKILL (by somebody, or by the kernel when memory ran out);")
        with Client(exported(first)["HOLDFAST_BROKER_URL"]) as client:
            assert client.purchase(org_id="acme", purchase_id="p-2", credits=50, wait_s=PATIENCE_S).available == 550
        assert (data_dir / "worker.pid").read_text().split()[0] != worker

        first.interrupt()
        assert first.exit_code() == 0, first.said()
    assert first.said().splitlines()[-1] == "Everything is stopped."
    assert "Traceback" not in first.said()
    assert eventually(lambda: processes_in(folder) == [])
    assert left_in(folder) == ["data"]

    with started(folder, "up", "--data-dir", str(data_dir)) as second:
        second.wait_to_say("Data and logs are in")
        assert exported(second) == exported(first)
        assert "The credit history of the demo organization, acme, in a browser" in second.said()
        no_story = run("wallet", "northwind", HOLDFAST_DATABASE_URL=exported(first)["HOLDFAST_DATABASE_URL"])
        assert no_story.returncode == 1
        shown = run("wallet", "acme", "--json", HOLDFAST_DATABASE_URL=exported(first)["HOLDFAST_DATABASE_URL"])
        assert json.loads(shown.stdout)["available"] == 550
        over_http = httpx.get(
            f"{exported(first)['API_URL']}/api/organizations/acme/credits",
            headers={"Authorization": f"Bearer {signed}"},
        )
        assert over_http.json()["available"] == 550
        with Client(exported(first)["HOLDFAST_BROKER_URL"]) as client:
            again = client.purchase(org_id="acme", purchase_id="p-2", credits=50, wait_s=PATIENCE_S)
        assert (again.duplicate, again.available) == (True, 550)
        second.process.terminate()  # as a service manager does
        assert second.exit_code() == 0, second.said()
    assert eventually(lambda: processes_in(folder) == [])


@pytest.mark.parametrize("command", ["wallet acme", "history acme --json"])
def test_output_that_cannot_be_written_is_exit_code_2(books: Installation, command: str) -> None:
    shell = ["bash", "-c", f"{HOLDFAST} {command} >/dev/full"]
    ended = subprocess.run(shell, env=books.environment, capture_output=True, text=True, timeout=PATIENCE_S)
    told = "holdfast: the output could not be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == (2, told)
