"""From afar a worker is asked, and not told: whoever reaches the broker stops none; a check asks if it consumes."""

from celery.worker.control import Panel

from tests.acceptance import commands
from tests.installation import Installation, Producer, celery, wait_for_workers
from tests.support import PATIENCE_S
from worker.control import QUESTIONS


def consuming(installation: Installation, *arguments: str) -> commands.Ended:
    return commands.run("consuming", *arguments, env=installation.environment)


def test_a_worker_answers_questions_and_refuses_every_command(installation: Installation, producer: Producer) -> None:
    worker = installation.start_worker()
    wait_for_workers(producer)
    assert {"shutdown", "cancel_consumer", "add_consumer", "pool_grow", "revoke", "enable_events"} <= {*Panel.data}
    commanded = sorted({*Panel.data} - QUESTIONS)
    for name in commanded:
        arguments = {"queue": "credits"} if name.endswith("consumer") else {}
        [reply] = producer.celery.control.broadcast(name, arguments=arguments, reply=True, timeout=PATIENCE_S, limit=1)
        [answer] = reply.values()
        assert answer == {"error": "this worker only answers questions; stop it or change its settings where it runs"}
    inspect = producer.celery.control.inspect(timeout=PATIENCE_S, limit=1)
    for question in ("stats", "report", "registered", "active", "reserved", "scheduled", "active_queues"):
        assert inspect._request(question), question
    assert producer.answer("wallet.grant", {"org_id": "acme", "grant_id": "g", "credits": 1})["available"] == 1
    assert worker.is_running
    assert consuming(installation).stdout.endswith(" takes messages.\n")


def test_a_worker_that_answers_but_does_not_consume_is_found_out(
    installation: Installation, producer: Producer
) -> None:
    installation.start("worker", *celery("worker"), "-Q", "credits", "-n", "half@host")
    wait_for_workers(producer)
    asked = consuming(installation, "half@host")
    assert (asked.returncode, asked.stderr) == (
        1,
        "holdfast: half@host answers, but takes no messages from credits.engine\n",
    )
    nobody = consuming(installation, "nobody@host", "--wait-s", "0.5")
    assert (nobody.returncode, nobody.stderr) == (1, "holdfast: nobody@host does not answer\n")


def test_a_check_without_a_broker_fails(installation: Installation) -> None:
    env = {**installation.environment, "HOLDFAST_BROKER_URL": "redis://127.0.0.1:1/0"}
    asked = commands.run("consuming", env=env)
    assert asked.returncode == 1
    assert asked.stderr.startswith("holdfast: the broker does not answer: ")
