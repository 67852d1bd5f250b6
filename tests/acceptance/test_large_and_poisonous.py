"""Messages that are too large, or that end their worker: dead letters, which cost their neighbours nothing."""

import base64
import bz2
import hashlib
import json
import lzma
import os
import re
import signal
import sys
import zlib
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from holdfast_client.client import Client
from holdfast_client.messages import DELIVERY_LIMIT, MAX_BODY_BYTES
from ledger import audit
from tests.acceptance import commands
from tests.acceptance.website import LETTERS, Visitor, form_token, operator_token, served
from tests.installation import (
    IMPATIENT_WORKER,
    Installation,
    Producer,
    envelope,
    log_of,
    warnings_in,
)
from tests.messages import EMBED
from tests.support import eventually, raw, sql
from worker.local.process import Process
from worker.transport import TAKES_MANY, TAKES_ONE

pytestmark = pytest.mark.timeout(600)  # seconds, for whole systems that start on a slow machine


def make_bombs() -> dict[str, bytes]:
    """Each has less than 64 KiB. More than a thousand times its size is more than gzip can say."""
    return {
        "application/x-gzip": zlib.compress(b" " * 60_000_000),
        "application/x-bz2": bz2.compress(b" " * 300_000_000),
        "application/x-lzma": lzma.compress(b" " * 300_000_000, preset=0),
    }


def purchase(purchase_id: str) -> dict[str, Any]:
    return {"org_id": "acme", "purchase_id": purchase_id, "credits": 5}


def entry(body: bytes, **headers: str) -> str:
    """What kombu puts on the list for a purchase with this body."""
    return envelope(body, headers={"task": "wallet.purchase", "id": str(uuid4()), **headers})


def test_large_messages_pile_up_while_the_database_is_down_and_the_good_one_among_them_is_applied(
    installation: Installation, producer: Producer
) -> None:
    bombs = make_bombs()
    worker = installation.start_worker()
    producer.answer("wallet.purchase", purchase("first"))
    rename_table(installation, "wallets", "away")
    large = [f"{number} {'x' * 3_000_000}" for number in range(40)]
    for number, padding in enumerate(large):
        producer.send("workflow.finish", {"org_id": "acme", "workflow_id": padding, "credits": number})
        if number == 20:
            asked = producer.ask("wallet.purchase", purchase("good"))
    for _ in range(3):
        for compression, bomb in bombs.items():
            installation.broker.lpush("credits", entry(bomb, compression=compression))
    small = json.dumps([[purchase("compressed")], {}, EMBED]).encode()
    installation.broker.lpush("credits", entry(zlib.compress(small), compression="application/x-gzip"))
    eventually(lambda: installation.broker.llen("credits") == 0)
    rename_table(installation, "away", "wallets")
    assert asked.get(timeout=60)["outcome"] == "posted"
    eventually(installation.is_drained)
    assert psutil.Process(worker.pid).memory_info().rss < 300 * 2**20
    assert sql(installation.engine, "SELECT prepaid_balance FROM wallets") == [(15,)]
    letters = sql(installation.engine, "SELECT error_code, task, error, length(body), attempts FROM dead_letters")
    assert sorted({(code, task) for code, task, *_ in letters}) == [
        ("too_large", "workflow.finish"),
        ("undecodable_message", "wallet.purchase"),
    ]
    assert len(letters) == len(large) + len(bombs)
    for code, _, error, length, attempts in letters:
        if code == "too_large":
            assert re.fullmatch(
                r"the message's entry in the queue has 4,\d{3},\d{3} bytes, more than 262,144: "
                r"only the body in its first 65,536 is kept; the SHA-1 of the whole entry is [0-9a-f]{40}",
                error,
            )
            assert 40_000 < length <= MAX_BODY_BYTES
            assert attempts == 1
        else:
            assert error == "the body cannot be decoded: it has more than 65,536 bytes when it is decompressed"
            assert attempts == 3
    assert audit.verify(installation.engine).is_clean


def rename_table(installation: Installation, name: str, new_name: str) -> None:
    """What a worker takes for a database that is not there: it is not migrated."""
    sql(installation.engine, f"ALTER TABLE {name} RENAME TO {new_name}")


def test_an_entry_of_a_hundred_mib_is_never_in_the_memory_of_a_worker(
    installation: Installation, producer: Producer
) -> None:
    """Neither of one that waits for messages, nor of one that takes it: the kernel would kill one after the other."""
    worker = installation.start_worker()
    producer.answer("wallet.purchase", purchase("first"))
    size = 100 * 2**20
    installation.broker.lpush("credits", entry(b"x" * (size // 4 * 3)))
    eventually(lambda: installation.count("dead_letters") == 1)
    assert producer.answer("wallet.purchase", purchase("second"))["available"] == 10
    assert peak_memory(worker) < 200 * 2**20


def test_who_asks_what_waits_is_not_sent_what_waits(installation: Installation) -> None:
    """The API asks at every scrape, and whenever it tells whether it is ready."""

    def sent_bytes() -> int:
        return int(installation.broker.info("stats")["total_net_output_bytes"])

    with Client(installation.broker_url) as client:
        oldest = []
        before = sent_bytes()
        for body in (b"x" * 10_000_000, b"x" * 10_000_000, b"small"):
            installation.broker.rpush("credits", entry(body))
            oldest += [client.waiting()["credits"].oldest for _ in range(2)]
        assert sent_bytes() - before < 1_000_000
    assert None not in oldest
    assert [first == second for first, second in pairwise(oldest)] == [True, False, True, False, True]


def peak_memory(process: Process) -> int:
    """The most memory that it ever had, in bytes."""
    [kib] = re.findall(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return int(kib) * 1024


def test_a_letter_that_is_too_large_is_shown_and_not_replayed(installation: Installation, producer: Producer) -> None:
    installation.start_worker()
    # Its first part is a whole message, as only white space follows.
    body = json.dumps([[purchase("spaced")], {}, EMBED]).encode() + b" " * MAX_BODY_BYTES
    cut = json.dumps([[purchase("spaced") | {"metadata": {"note": "x" * MAX_BODY_BYTES}}], {}, EMBED]).encode()
    installation.broker.lpush("credits", entry(body))
    eventually(lambda: installation.count("dead_letters") == 1)
    installation.broker.lpush("credits", entry(cut))
    eventually(lambda: installation.count("dead_letters") == 2)
    shown = commands.run("failed", "show", "1", env=installation.environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "too_large" in shown.stdout
    shown = commands.run("failed", "show", "2", env=installation.environment)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert len(shown.stdout) < 5_000
    assert 'Message\n[[{"org_id": "acme", "purchase_id": "spaced", ' in shown.stdout
    assert shown.stdout.endswith("xxx\n… and 63,536 characters more. Use --json to see all that is kept.\n")
    as_json = json.loads(commands.run("failed", "show", "2", "--json", env=installation.environment).stdout)
    assert base64.b64decode(as_json["body_base64"]) == cut[:MAX_BODY_BYTES]
    assert {error for (error,) in sql(installation.engine, "SELECT error FROM dead_letters")} == {
        f"the body has {len(large):,} bytes, more than 65,536: only the first 65,536 are kept; "
        f"the SHA-256 of the whole body is {hashlib.sha256(large).hexdigest()}"
        for large in (body, cut)
    }
    replayed = commands.run("failed", "replay", "1", env=installation.environment)
    assert (replayed.returncode, replayed.stderr) == (
        1,
        "holdfast: dead letter 1 holds only the first part of its message: its sender must send a smaller one\n",
    )
    assert installation.count("credit_events") == 0


def sent(purchase_id: str) -> bytes:
    return json.dumps([[purchase(purchase_id)], {}, EMBED]).encode()


def are_kept(installation: Installation, letters: int) -> bool:
    return installation.count("dead_letters") == letters


def delivered_too_often(body: bytes) -> str:
    return f'{{"restored": {DELIVERY_LIMIT}, {entry(body)[1:]}'


def holdfast_failed(installation: Installation, *arguments: str) -> tuple[int, list[str], list[str]]:
    ended = commands.run("failed", *arguments, env=installation.environment)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()


def test_operators_are_told_which_letters_cannot_be_sent_again_and_the_others_are(
    installation: Installation, producer: Producer
) -> None:
    installation.start_worker()
    for number, arriving in enumerate(
        (
            entry(sent("cut") + b" " * MAX_BODY_BYTES),
            delivered_too_often(sent("1")),
            delivered_too_often(b"\xff\x00"),
            entry(b"\xff\x01"),
            entry(sent("2"), eta="soon"),
            delivered_too_often(sent("3")),
        )
    ):
        installation.broker.lpush("credits", arriving)
        eventually(partial(are_kept, installation, number + 1))
    part = "ead letter 1 holds only the first part of its message: its sender must send a smaller one"
    nothing = "ead letter {} holds no message that could be sent again"

    with served(installation.database_url, installation.broker_url) as address, Visitor(base_url=address) as operator:
        operator.sign_in(operator_token())

        def press(action: str, letter_id: int) -> httpx.Response:
            form = form_token(operator.get(f"{LETTERS}/{letter_id}"))
            return operator.post(f"{LETTERS}/{letter_id}/{action}", data={"form": form, "reason": "a test"})

        for letter_id, sentence in ((1, part), (3, nothing.format(3)), (4, nothing.format(4))):
            page = operator.get(f"{LETTERS}/{letter_id}")
            assert (f"D{sentence}." in page.text, "Replay the message" in page.text) == (True, False)
            refused = press("replay", letter_id)
            assert (refused.status_code, f'<p id="failure">D{sentence}.</p>' in refused.text) == (409, True)
        assert press("replay", 2).status_code == 303
        assert '<dd id="resolution">posted</dd>' in operator.get(f"{LETTERS}/2").text

        failed = partial(holdfast_failed, installation)
        plan = [
            "      2 × delivery_limit, wallet.purchase",
            "      1 × too_large, wallet.purchase",
            "      2 × undecodable_message, wallet.purchase",
        ]
        told = [f"holdfast: d{sentence}" for sentence in (part, nothing.format(3), nothing.format(4))]
        would = "Would replay 2 dead letters. Nothing was sent."
        assert failed("replay", "--all", "--dry-run") == (1, [*plan, would], told)
        posted = ["Dead letter 5: posted.", "Dead letter 6: posted.", "2 of 5 dead letters replayed."]
        assert failed("replay", "--all", "--yes") == (1, [*plan, *posted], told)
        assert failed("discard", "1", "2", "3", "--why", "a test") == (
            1,
            ["Dead letter 1 is discarded.", "Dead letter 3 is discarded."],
            ["holdfast: dead letter 2 was replayed by olga: posted"],
        )
        assert press("discard", 4).status_code == 303
        kept = operator.get(f"{LETTERS}/4").text
        assert ('<dd id="resolution">a test</dd>' in kept, "\\xff\\x01" in kept) == (True, True)
    assert sql(installation.engine, "SELECT status FROM dead_letters ORDER BY id") == [
        (status,) for status in ("discarded", "replayed", "discarded", "discarded", "replayed", "replayed")
    ]
    assert sql(installation.engine, "SELECT prepaid_balance FROM wallets") == [(15,)]
    assert audit.verify(installation.engine).is_clean


def test_a_message_that_ends_its_worker_each_time_becomes_a_dead_letter(
    installation: Installation, producer: Producer
) -> None:
    """Whatever ends it, as long as it holds it: here the worker cannot write it, and is killed."""
    rename_table(installation, "wallets", "away")
    ended = DELIVERY_LIMIT - 3
    poison = entry(json.dumps([[purchase("0")], {}, EMBED]).encode())
    installation.broker.lpush("credits", f'{{"restored": {ended}, {poison[1:]}')  # so many workers it has ended before
    for number in range(ended, DELIVERY_LIMIT):
        worker = start_impatient(installation, f"worker-{number}")
        eventually(partial(is_held, installation, restored_times=number))
        os.kill(worker.pid, signal.SIGKILL)
        worker.kill()
    for number in (1, 2):
        producer.send("wallet.purchase", purchase(str(number)))
    rename_table(installation, "away", "wallets")
    last = start_impatient(installation, "last")
    eventually(lambda: installation.count("dead_letters") == 1)
    eventually(installation.is_drained)
    [(code, task, body, error)] = sql(installation.engine, "SELECT error_code, task, body, error FROM dead_letters")
    assert (code, task, error) == (
        "delivery_limit",
        "wallet.purchase",
        "it was delivered too often and never acknowledged",
    )
    assert json.loads(bytes(body))[0] == [purchase("0")]
    assert sql(installation.engine, "SELECT prepaid_balance FROM wallets") == [(10,)]
    assert commands.run("failed", "replay", "1", env=installation.environment).stdout == "Dead letter 1: posted.\n"
    assert sql(installation.engine, "SELECT prepaid_balance FROM wallets") == [(15,)]
    assert "Traceback" not in log_of(last)


def is_held(installation: Installation, *, restored_times: int) -> bool:
    return restored(installation) == [restored_times]


def restored(installation: Installation) -> list[int]:
    """How often what is held was restored."""
    held = re.compile(rb'^\[{"restored": (\d+), ')
    counts = [held.match(raw(value)) for value in installation.broker.hvals("credits.unacked")]
    return [0 if count is None else int(count[1]) for count in counts]


def test_an_outage_that_is_longer_than_the_visibility_timeout_counts_for_nothing(
    installation: Installation, producer: Producer
) -> None:
    process = start_impatient(installation, "worker")
    producer.answer("wallet.purchase", purchase("first"))
    rename_table(installation, "wallets", "away")
    asked = producer.ask("wallet.purchase", purchase("second"))
    eventually(lambda: len(warnings_in(process)) == 1)
    held = installation.broker.hgetall("credits.unacked")
    for _ in range(2):
        eventually(lambda: installation.broker.time()[0] % 2 == 0)
        eventually(lambda: installation.broker.time()[0] % 2 == 1)
    assert installation.broker.hgetall("credits.unacked") == held
    rename_table(installation, "away", "wallets")
    answer = asked.get(timeout=60)
    assert (answer["outcome"], answer["duplicate"], answer["available"]) == ("posted", False, 10)


def start_impatient(installation: Installation, name: str) -> Process:
    return installation.start(name, sys.executable, "-c", IMPATIENT_WORKER)


def test_what_a_worker_held_that_was_killed_three_times_is_taken_one_by_one_without_a_pause(
    installation: Installation, producer: Producer
) -> None:
    """Its harmless neighbours are suspects too, and whoever comes after them waits for them."""
    for number in range(300):
        suspect = entry(json.dumps([[purchase(str(number))], {}, EMBED]).encode())
        installation.broker.lpush("credits", f'{{"restored": 3, {suspect[1:]}')
    with installation.serving_figures() as (worker, figures):
        assert producer.answer("wallet.purchase", purchase("last"))["available"] == 1_505
        eventually(installation.is_drained)
        assert installation.count("dead_letters") == 0
        assert warnings_in(worker) == [TAKES_ONE, TAKES_MANY]
        assert "holdfast_suspect_messages_total 300.0" in figures.get("/metrics").text
