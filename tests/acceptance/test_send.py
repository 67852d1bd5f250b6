"""`holdfast send`, with one message and with a file: what it sends, what it says, and from where it goes on."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.client import BrokerUnavailableError, Client, NotSentError
from ledger.message_lines import MAX_LINE_BYTES
from tests import forks
from tests.acceptance import commands
from tests.acceptance.commands import Ended
from tests.installation import HOLDFAST, Installation, closing_broker, environment, open_folder
from tests.support import PATIENCE_S, eventually, sql
from worker.cli import transfer
from worker.cli.transfer import MOST_PROBLEMS, Transfer

pytestmark = pytest.mark.timeout(600)  # seconds, for a worker that starts on a slow machine

NOWHERE = "redis://127.0.0.1:1/0"
"""No port listens there."""


def grant(org_id: str, number: int, **fields: Any) -> str:
    """A line."""
    return json.dumps({"task": "wallet.grant", "org_id": org_id, "grant_id": f"gift-{number}", "credits": 1, **fields})


def grants(count: int, org_id: str = "acme") -> bytes:
    return "".join(f"{grant(org_id, number)}\n" for number in range(count)).encode()


def send(installation: Installation, *arguments: str, typed: str | None = None) -> Ended:
    return commands.run("send", *arguments, env=installation.environment, typed=typed)


def written(folder: Path, text: str | bytes) -> str:
    file = folder / "messages.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def available(installation: Installation, org_id: str) -> int:
    rows = sql(installation.engine, "SELECT prepaid_balance FROM wallets WHERE org_id = :org_id", org_id=org_id)
    return int(rows[0][0]) if rows else 0


# One message


def test_a_message_is_sent_and_its_answer_shown(running: Installation, org_id: str) -> None:
    given = ("wallet.grant", f"org_id={org_id}", "grant_id=welcome", "credits=1500")
    first, again, other = (send(running, *given, "--wait"), send(running, *given, "--wait"), send(running, *given))
    assert (first.returncode, first.stdout, first.stderr) == (0, "posted; 1,500 available\n", "")
    assert (again.returncode, again.stdout) == (0, "posted, a duplicate: nothing changes; 1,500 available\n")
    assert (other.returncode, other.stdout) == (0, "Sent to the queue credits.\n")
    conflict = send(running, *given[:3], "credits=1", "--wait")
    assert (conflict.returncode, conflict.stdout) == (1, "")
    expected = r"holdfast: wallet\.grant: welcome was applied with credits 1500, .* \(dead letter \d+, conflict\)\n"
    assert re.fullmatch(expected, conflict.stderr)


def test_a_rejected_start_is_exit_code_1_and_json_has_the_whole_answer(running: Installation, org_id: str) -> None:
    ended = send(running, "workflow.start", f"org_id={org_id}", "workflow_id=run", "credits=5", "--wait", "--json")
    assert (ended.returncode, ended.stderr) == (1, "")
    answer = json.loads(ended.stdout)
    assert (answer["outcome"], answer["reason"], answer["event_seqs"]) == ("rejected", "insufficient_credits", [])
    assert answer["limit"] == {"kind": "insufficient_credits", "limit": 0, "used": 0, "reserved": 0, "resets_at": None}


def test_a_message_is_checked_without_a_broker() -> None:
    given = ("send", "workflow.start", "org_id=acme", "workflow_id=run", "credits=5")
    dry = commands.run(*given, "--dry-run", env=environment())
    assert (dry.returncode, dry.stdout, dry.stderr) == (0, "The message is valid. Nothing was sent.\n", "")
    unset = commands.run(*given, "--json", env=environment())
    assert (unset.returncode, unset.stdout) == (2, "")
    assert unset.stderr.startswith("holdfast: HOLDFAST_BROKER_URL is not set.")
    away = commands.run(*given, env=environment(HOLDFAST_BROKER_URL="amqp://127.0.0.1:1//"))
    assert (away.returncode, away.stdout) == (2, "")
    assert "workflow.start could not be handed to the broker" in away.stderr
    unanswered = commands.run(*given, "--wait", env=environment(HOLDFAST_BROKER_URL="amqp://127.0.0.1:1//"))
    assert unanswered.stderr == (
        "holdfast: this broker keeps no answers: set HOLDFAST_RESULT_URL, or leave out --wait\n"
    )


def test_an_engine_sends_to_the_queue_of_engines(running: Installation, org_id: str) -> None:
    engine = environment(HOLDFAST_ENGINE_BROKER_URL=running.broker_url)
    started = commands.run(
        "send", "workflow.finish", f"org_id={org_id}", "workflow_id=run", "credits=5", "--wait", env=engine
    )
    assert (started.returncode, started.stdout) == (0, "settled; -5 available\n")
    given = ("send", "wallet.grant", f"org_id={org_id}", "grant_id=g", "credits=5")
    for option in ([], ["--dry-run"]):
        refused = commands.run(*given, *option, env=engine)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "wallet.grant is not taken from credits.engine, the queue of engines" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give either a task and its fields, or --file"),
        (("wallet.grant", "--file", "x"), "give either a task and its fields, or --file"),
        (("--file", "x", "--wait"), "only one message can be waited for, not a file"),
        (("wallet.grant", "--from-line", "2"), "--from-line: needs --file"),
        (("--file", "no/such/file"), "holdfast: cannot read no/such/file: No such file or directory"),
        (("--file", "/"), "holdfast: cannot read /: Is a directory"),
    ],
)
def test_what_cannot_be_sent_is_exit_code_2(arguments: tuple[str, ...], problem: str) -> None:
    ended = commands.run("send", *arguments, env=environment(HOLDFAST_BROKER_URL=NOWHERE))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert problem in " ".join(ended.stderr.replace("│", " ").split())


# A file


def test_a_file_is_sent_and_what_is_invalid_is_named_by_line(
    running: Installation, org_id: str, tmp_path: Path
) -> None:
    lines = [
        grant(org_id, 0, metadata={"who": "Zoë"}),
        "",
        grant(org_id, 1, credits="1"),
        '{"task": "wallet.grunt"}',
        "x" * (MAX_LINE_BYTES + 1),
        grant(org_id, 2),
    ]
    file = written(tmp_path, "\r\n".join(lines).encode("utf-8-sig"))
    problems = [
        (3, "wallet.grant: credits must be an integer, got '1'"),
        (4, "there is no task named 'wallet.grunt'; did you mean wallet.grant?"),
        (5, "the line has more than 65,536 bytes"),
    ]
    dry = send(running, "--file", file, "--dry-run", "--json")
    assert dry.returncode == 1
    assert dry.stderr == "".join(f"holdfast: line {number}: {problem}\n" for number, problem in problems)
    assert json.loads(dry.stdout) == {
        "valid": 2,
        "sent": 0,
        "invalid": 3,
        "next_line": 7,
        "problems": [{"line": number, "error": problem} for number, problem in problems],
    }
    for _ in range(2):
        sent = send(running, "--file", file)
        assert (sent.returncode, sent.stderr) == (1, dry.stderr)
        assert re.fullmatch(r"Sent: 2; 3 invalid\. That took [\d.]+ s, [\d,]+ a second\.\n", sent.stdout)
    eventually(running.is_drained)
    assert available(running, org_id) == 2


def test_what_is_typed_is_sent_and_lines_can_be_skipped(running: Installation, org_id: str) -> None:
    typed = "".join(f"{grant(org_id, number)}\n" for number in range(3)) + "\x04"
    sent = send(running, "--file", "-", "--from-line", "2", "--json", typed=typed)
    assert (sent.returncode, json.loads(sent.stdout)["sent"]) == (0, 2)
    eventually(lambda: available(running, org_id) == 2)


def test_a_pipe_is_sent_as_it_comes_and_ctrl_c_says_where_to_go_on(running: Installation, org_id: str) -> None:
    reads, writes = os.pipe()
    with Path(os.devnull).open("wb") as nothing, TemporaryFile() as errors:
        argv = [HOLDFAST, "send", "--file", "-"]
        process = forks.start(argv, reads, nothing.fileno(), errors.fileno(), env=running.environment)
        os.close(reads)
        os.write(writes, f"\n{grant(org_id, 1)}\n{grant(org_id, 2)[:9]}".encode())
        eventually(lambda: available(running, org_id) == 1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(PATIENCE_S)
        os.close(writes)
        assert process.exitcode == 130
        said = os.pread(errors.fileno(), 10_000, 0).decode()
    assert said == (
        "holdfast: interrupted\nholdfast: to go on, add --from-line 3; sending everything again is safe, too\n"
    )


def test_no_more_is_sent_while_many_messages_wait(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MOST_WAITING", 10)
    waited: list[int] = []

    def take() -> None:  # as a worker does
        if file.waiting:
            waited.append(file.waiting)
            installation.broker.delete(QUEUE)

    with Client(installation.broker_url) as client:
        file = Transfer(client, dry_run=False, progress=take)
        file.run([grants(11), grants(3), grants(2)])
    assert (waited, file.valid, file.waiting) == ([11], 16, 0)
    assert installation.broker.llen(QUEUE) == 5


def test_an_engine_is_not_asked_how_many_messages_wait(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "MOST_WAITING", 0)
    line = b'{"task": "workflow.finish", "org_id": "acme", "workflow_id": "run", "credits": 1}\n'
    with Client(installation.broker_url, queue=ENGINE_QUEUE) as client:
        file = Transfer(client, dry_run=False)
        file.run([line, line, grants(1)])
    assert (file.valid, file.invalid, installation.broker.llen(ENGINE_QUEUE)) == (2, 1, 2)


def test_after_the_brokers_end_the_transfer_knows_where_to_go_on() -> None:
    with open_folder() as folder, closing_broker(folder) as broker:
        broker.start()

        def pieces() -> Iterator[bytes]:
            yield b"\nnot JSON\n" + grants(5)
            broker.stop()
            yield grants(1)

        with Client(broker.url) as client:
            file = Transfer(client, dry_run=False)
            with pytest.raises((BrokerUnavailableError, NotSentError)):
                file.run(pieces())
    assert (file.next_line, file.valid, file.invalid) == (8, 5, 1)


def test_of_many_invalid_lines_the_first_are_kept() -> None:
    file = Transfer(None, dry_run=True)
    file.run([b"x\n" * (MOST_PROBLEMS + 5)])
    assert (file.valid, file.invalid, len(file.problems)) == (0, MOST_PROBLEMS + 5, MOST_PROBLEMS)


def test_a_terminal_shows_a_bar_and_then_the_result(tmp_path: Path) -> None:
    file = written(tmp_path, grants(3))
    shown = "\n".join(commands.drawn("send", "--file", file, "--dry-run", env=environment(), width=100))
    assert re.search(r"Valid: 3 .*━ +100% [\d,]+ a second", shown)
    assert shown.endswith("Valid: 3. Nothing was sent.")
