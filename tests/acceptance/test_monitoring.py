"""What monitors see of a worker: Celery's events, its signals and its lists of tasks, while events are on."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.installation import (
    Installation,
    Producer,
    celery,
    exit_code,
    log_of,
    terminate,
    wait_for_workers,
)
from tests.support import PATIENCE_S, eventually

GRANT = {"org_id": "acme", "grant_id": "gift", "credits": 5}
TASK_EVENTS = ["task-received", "task-started", "task-succeeded", "task-received", "task-started", "task-failed"]

# The worker as it is, with a plug-in such as those of Sentry or OpenTelemetry: it listens to Celery's signals.
WITH_A_PLUGIN = """
import json
from celery import signals
from worker import celery

def listen(name, *keys):
    def tell(sender=None, **fields):
        told = {key: repr(fields[key]) if key == "exception" else fields[key] for key in keys}
        print(json.dumps({"signal": name, "task": getattr(sender, "name", None), **told}), flush=True)
    getattr(signals, name).connect(tell, weak=False)

listen("task_received")
listen("task_prerun", "task_id", "args", "kwargs")
listen("task_success", "result")
listen("task_failure", "task_id", "args", "exception")
listen("task_postrun", "task_id", "state")
celery.worker_main(["worker", *__import__("sys").argv[1:]])
"""


@contextmanager
def listening(producer: Producer) -> Iterator[list[dict[str, Any]]]:
    """What a monitor hears, as Flower listens."""
    heard: list[dict[str, Any]] = []
    with producer.celery.connection_for_read() as connection:
        receiver = producer.celery.events.Receiver(connection, handlers={"*": heard.append})
        monitor = threading.Thread(target=lambda: receiver.capture(wakeup=False))
        monitor.start()
        try:
            yield heard
        finally:
            receiver.should_stop = True
            monitor.join()


def one_good_and_one_bad(producer: Producer) -> list[Any]:
    asked = [producer.ask("wallet.grant", GRANT), producer.ask("wallet.grant", {**GRANT, "credits": 6})]
    return [one.get(timeout=PATIENCE_S, propagate=False) for one in asked]


def test_a_monitor_hears_of_every_message_when_events_are_on(installation: Installation, producer: Producer) -> None:
    with listening(producer) as heard:
        eventually(lambda: installation.broker.pubsub_numpat() > 0)
        installation.start("worker", *celery("worker"), "-E", "-n", "watched")
        eventually(lambda: [event for event in heard if event["type"] == "worker-online"])
        asked_at = time.monotonic()
        [posted, refused] = one_good_and_one_bad(producer)
        took_s = time.monotonic() - asked_at
        eventually(lambda: len([event for event in heard if event["type"].startswith("task-")]) >= len(TASK_EVENTS))
        inspect = producer.celery.control.inspect(timeout=PATIENCE_S, limit=1)
        assert inspect.stats()["celery@watched"]["total"] == {"wallet.grant": 2}
        assert inspect.active() == {"celery@watched": []}
    told = [event for event in heard if event["type"].startswith("task-")]
    ids = [event["uuid"] for event in told if event["type"] == "task-received"]
    assert [[event["type"] for event in told if event["uuid"] == task_id] for task_id in ids] == [
        TASK_EVENTS[:3],
        TASK_EVENTS[3:],
    ]
    [received, *_] = told
    assert (received["name"], received["args"]) == ("wallet.grant", repr((GRANT,)))
    [succeeded] = [event for event in told if event["type"] == "task-succeeded"]
    assert succeeded["result"] == repr(posted)
    assert 0 < succeeded["runtime"] < took_s
    [failed] = [event for event in told if event["type"] == "task-failed"]
    assert str(refused) in failed["exception"]


def test_no_header_ends_a_worker_that_is_watched(installation: Installation, producer: Producer) -> None:
    worker = installation.start("worker", *celery("worker"), "-E")
    for number, header in enumerate(("shadow", "root_id", "parent_id", "retries", "argsrepr", "origin", "group")):
        fields = {**GRANT, "grant_id": f"gift-{number}"}
        producer.celery.send_task("wallet.grant", args=[fields], headers={header: [{"odd": 1}]}, queue="credits")
    assert producer.answer("wallet.grant", GRANT)["available"] == 40
    assert worker.is_running
    eventually(installation.is_drained)


def test_signals_come_while_events_are_on_and_only_then(installation: Installation, producer: Producer) -> None:
    quiet = installation.start("quiet", sys.executable, "-c", WITH_A_PLUGIN)
    wait_for_workers(producer)
    one_good_and_one_bad(producer)
    assert '"signal"' not in log_of(quiet)
    terminate(quiet)
    assert exit_code(quiet) == 0
    worker = installation.start("worker", sys.executable, "-c", WITH_A_PLUGIN, "-E")
    wait_for_workers(producer)
    [first, second] = [producer.ask("wallet.grant", fields) for fields in (GRANT, {**GRANT, "credits": 6})]
    first.get(timeout=PATIENCE_S)
    second.get(timeout=PATIENCE_S, propagate=False)
    eventually(lambda: log_of(worker).count("task_postrun") == 2)
    told = [json.loads(line) for line in log_of(worker).splitlines() if line.startswith('{"signal"')]
    of_first = [one for one in told if one.get("task_id") == first.id]
    assert [(one["signal"], one["task"]) for one in of_first] == [
        ("task_prerun", "wallet.grant"),
        ("task_postrun", "wallet.grant"),
    ]
    assert of_first[0]["args"] == [GRANT]
    assert of_first[1]["state"] == "SUCCESS"
    of_second = [one for one in told if one.get("task_id") == second.id]
    assert [one["signal"] for one in of_second] == ["task_prerun", "task_failure", "task_postrun"]
    assert of_second[2]["state"] == "FAILURE"
    [success] = [one for one in told if one["signal"] == "task_success"]
    assert success["result"]["outcome"] == "posted"
    terminate(worker)
