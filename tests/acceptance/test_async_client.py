"""The producer for asyncio, against a running worker: all calls that wait share one connection, and leave nothing."""

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from holdfast_client.async_client import AsyncClient
from holdfast_client.client import (
    BrokerUnavailableError,
    DeadLetteredError,
    InvalidMessageError,
    NoAnswerError,
    NoAnswersError,
    NotSentError,
)
from holdfast_client.publishing import TIMEOUT_S
from holdfast_client.results import Limit, Result
from holdfast_client.silence import what_is_seen
from tests.acceptance.story import STORY
from tests.cut import cut_way_to
from tests.installation import Installation
from tests.support import PATIENCE_S, eventually, sql

ANSWERS = "celery-task-meta-*"


def with_client(broker_url: str, act: Callable[[AsyncClient], Awaitable[None]], result_url: str | None = None) -> None:
    """Run `act` with a client, which must leave no task of its own, and no error that nobody has looked at."""
    unseen: list[object] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        async with AsyncClient(broker_url, result_url=result_url) as client:
            await act(client)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        gc.collect()

    asyncio.run(run())
    assert unseen == []


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    async with asyncio.timeout(PATIENCE_S):
        yield


def connections(installation: Installation) -> tuple[int, int]:
    """How many connections there are to the installation's database of the broker, and how many have subscribed."""
    number = installation.broker_url.rsplit("/", 1)[1]
    found = [other for other in installation.broker.client_list() if other["db"] == number]
    return len(found), sum(1 for other in found if int(other["sub"]) > 0)


def test_every_method_sends_its_message_and_returns_the_answer(running: Installation) -> None:
    async def act(client: AsyncClient) -> None:
        for task, fields, expected in STORY:
            answer = await getattr(client, task.split(".")[1])(org_id="awaited", wait_s=PATIENCE_S, **fields)
            limit = None if expected["limit"] is None else Limit(**expected["limit"])
            values = {**expected, "event_seqs": tuple(expected["event_seqs"]), "limit": limit}
            assert (task, answer) == (task, Result(org_id="awaited", **values))
        await client.fail(org_id="awaited", workflow_id="run-4")

    with_client(running.broker_url, act)


def test_five_hundred_calls_wait_at_once_on_one_connection_and_leave_nothing(running: Installation) -> None:
    running.broker.delete("none", *running.broker.keys(ANSWERS))
    _, before = connections(running)

    async def act(client: AsyncClient) -> None:
        await client.purchase(org_id="crowd", purchase_id="order", credits=400, wait_s=PATIENCE_S)
        with running.locked("crowd"):
            starts = [
                asyncio.create_task(client.start(org_id="crowd", workflow_id=f"run-{n}", credits=1, wait_s=PATIENCE_S))
                for n in range(500)
            ]
            async with in_time():
                while running.count("waiting_messages") < 500:
                    await asyncio.sleep(0.05)
            assert connections(running)[1] == before + 1
        answers = await asyncio.gather(*starts)
        assert [answer.workflow_id for answer in answers] == [f"run-{n}" for n in range(500)]
        assert sorted(answer.outcome for answer in answers) == ["rejected"] * 100 + ["reserved"] * 400

    with_client(running.broker_url, act)
    eventually(lambda: connections(running)[1] == before)
    assert running.broker.keys(ANSWERS) == []


def test_a_batch_is_applied_in_the_order_of_its_calls_and_is_not_sent_if_its_block_raises(
    running: Installation,
) -> None:
    async def grant_twice(client: AsyncClient) -> None:
        async with client.batch() as batch:
            batch.grant(org_id="gathered", grant_id="gift", credits=1)
            batch.grant(org_id="gathered", grant_id="gift", credits=-1)

    async def act(client: AsyncClient) -> None:
        async with client.batch() as batch:
            batch.purchase(org_id="gathered", purchase_id="order", credits=100)
            for number in range(50):
                batch.start(org_id="gathered", workflow_id=f"run-{number}", credits=2)
                batch.finish(org_id="gathered", workflow_id=f"run-{number}", credits=1)
            assert len(batch) == 101
        with pytest.raises(InvalidMessageError):
            await grant_twice(client)

    with_client(running.broker_url, act)
    eventually(running.is_drained)
    kept = sql(running.engine, "SELECT workflow_id, credits FROM credit_events WHERE org_id = 'gathered' ORDER BY seq")
    runs = [(f"run-{number}", effect) for number in range(50) for effect in (-2, 2, -1)]
    assert kept == [(None, 100), *runs]


def test_a_conflict_is_an_error_with_the_number_of_its_dead_letter(running: Installation) -> None:
    async def act(client: AsyncClient) -> None:
        await client.purchase(org_id="contrary", purchase_id="order", credits=5)
        with pytest.raises(DeadLetteredError, match="this message contradicts it") as told:
            await client.purchase(org_id="contrary", purchase_id="order", credits=6, wait_s=PATIENCE_S)
        [(letter_id,)] = sql(running.engine, "SELECT id FROM dead_letters WHERE org_id = 'contrary'")
        assert (told.value.letter_id, told.value.code) == (letter_id, "conflict")

    with_client(running.broker_url, act)


def test_without_a_worker_there_is_no_answer_and_the_message_is_kept(installation: Installation) -> None:
    before = connections(installation)

    async def act(client: AsyncClient) -> None:
        told = r"^workflow.start was sent, but no answer came within 0.2 s: 1 message waits .* no worker answers"
        with pytest.raises(NoAnswerError, match=told):
            await client.start(org_id="acme", workflow_id="run", credits=1, wait_s=0.2)
        assert (await client.waiting())["credits"].messages == 1

    with_client(installation.broker_url, act)
    eventually(lambda: connections(installation) == before)


def test_why_no_answer_came_is_looked_up_once_for_all_who_ask_at_the_same_time(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(*of_the_client: Any) -> str:
        looks.append(what_is_seen(*of_the_client))
        return looks[-1]

    async def act(client: AsyncClient) -> None:
        calls = (client.cancel(org_id="acme", workflow_id=f"run-{n}", wait_s=0.5) for n in range(200))
        late = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(error) for error in late} == {NoAnswerError}
        assert all("no worker answers" in str(error) for error in late)
        assert 1 <= len(looks) < 20

    monkeypatch.setattr("holdfast_client.async_client.what_is_seen", look)
    with_client(installation.broker_url, act)


def test_a_call_that_is_cancelled_disturbs_no_other(installation: Installation) -> None:
    async def act(client: AsyncClient) -> None:
        def ask(workflow_id: str) -> asyncio.Task[Result]:
            return asyncio.create_task(
                client.start(org_id="acme", workflow_id=workflow_id, credits=1, wait_s=PATIENCE_S)
            )

        cancelled, other = ask("one"), ask("two")
        while installation.broker.llen("credits") < 2:
            await asyncio.sleep(0.01)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        worker = installation.start_worker()
        assert (await other).workflow_id == "two"
        worker.kill()

    with_client(installation.broker_url, act)


def test_calls_that_are_cancelled_at_any_moment_disturb_no_other(running: Installation) -> None:
    async def act(client: AsyncClient) -> None:
        async def start(number: int) -> Result:
            return await client.start(org_id="hasty", workflow_id=f"run-{number}", credits=0, wait_s=PATIENCE_S)

        async def cancel_soon(number: int) -> None:
            call = asyncio.create_task(start(number))
            for _ in range(number % 97):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])

        for begin in range(0, 900, 300):
            patient = [asyncio.create_task(start(number)) for number in range(begin, begin + 100)]
            await asyncio.gather(*(cancel_soon(number) for number in range(begin + 100, begin + 300)))
            assert {answer.outcome for answer in await asyncio.gather(*patient)} == {"reserved"}

    before = connections(running)[1]
    with_client(running.broker_url, act)
    eventually(lambda: connections(running)[1] == before)


def test_if_the_connection_breaks_all_who_wait_are_told_and_the_next_one_has_a_new_one(
    installation: Installation,
) -> None:
    async def act(client: AsyncClient) -> None:
        def ask(workflow_id: str) -> asyncio.Task[Result]:
            return asyncio.create_task(
                client.start(org_id="acme", workflow_id=workflow_id, credits=1, wait_s=PATIENCE_S)
            )

        unlucky = [ask("one"), ask("two")]
        while installation.broker.llen("credits") < 2:
            await asyncio.sleep(0.01)
        installation.broker.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        for each in unlucky:
            with pytest.raises(NoAnswerError, match=r"^workflow.start was sent, but its answer could not be read: "):
                await each
        worker = installation.start_worker()
        assert (await ask("one")).duplicate
        worker.kill()

    with_client(installation.broker_url, act)


def test_what_cannot_be_waited_for_is_not_sent(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast_client.async_client.TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"redis://user:sekrit@127.0.0.1:{silent.getsockname()[1]}/0"

        async def act(client: AsyncClient) -> None:
            loop = asyncio.get_running_loop()
            began = loop.time()
            calls = (client.cancel(org_id="acme", workflow_id=f"run-{n}", wait_s=1) for n in range(20))
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert loop.time() - began < 3.5 * TIMEOUT_S
            assert {type(error) for error in errors} == {NoAnswersError}
            assert not any("sekrit" in str(error) for error in errors)
            await client.cancel(org_id="acme", workflow_id="run")

        with_client(installation.broker_url, act, result_url=silent_url)
    assert installation.waiting() == {"credits": 1, "unacked": 0}


def test_a_broker_that_is_away_is_told_and_keeps_nobody_else_waiting() -> None:
    async def act(client: AsyncClient) -> None:
        sending = asyncio.create_task(client.cancel(org_id="acme", workflow_id="run"))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(lambda: "others go on") == "others go on"
        with pytest.raises(NotSentError, match=r"^workflow.cancel could not be handed to the broker at redis://"):
            await sending
        with pytest.raises(NotSentError, match=r"^workflow.cancel was not sent"):
            await client.cancel(org_id="acme", workflow_id="run", wait_s=1)
        with pytest.raises(BrokerUnavailableError):
            await client.waiting()

    with_client("redis://127.0.0.1:1/0", act)


def test_a_broker_that_is_away_for_a_moment_is_waited_for(running: Installation) -> None:
    port = urlsplit(running.broker_url).port
    assert port is not None
    with cut_way_to(port) as way:

        async def act(client: AsyncClient) -> None:
            for number in range(2):
                with way.closed_for(0.4):
                    starts = [
                        client.start(org_id="moment", workflow_id=f"run-{number}-{n}", credits=0, wait_s=PATIENCE_S)
                        for n in range(20)
                    ]
                    answers = await asyncio.gather(*starts)
                assert {answer.outcome for answer in answers} == {"reserved"}

        with_client(way.to(running.broker_url), act)


def test_idle_connections_that_the_server_has_closed_do_not_fail_the_next_calls(running: Installation) -> None:
    port = urlsplit(running.broker_url).port
    assert port is not None
    with cut_way_to(port) as way:

        async def burst(client: AsyncClient, name: str) -> set[str]:
            starts = [
                client.start(org_id="idle", workflow_id=f"{name}-{n}", credits=0, wait_s=PATIENCE_S) for n in range(50)
            ]
            return {answer.outcome for answer in await asyncio.gather(*starts)}

        async def act(client: AsyncClient) -> None:
            for name in ("first", "second", "third"):
                assert await burst(client, name) == {"reserved"}
                way.reset()
                await asyncio.sleep(0.1)  # the client's side has noticed

        with_client(way.to(running.broker_url), act)


def test_a_loop_that_is_busy_is_not_a_store_that_is_silent(
    running: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast_client.async_client.TIMEOUT_S", 0.2)

    async def act(client: AsyncClient) -> None:
        asked = asyncio.create_task(client.start(org_id="busy", workflow_id="run", credits=0, wait_s=PATIENCE_S))
        await asyncio.sleep(0)
        time.sleep(0.5)
        assert (await asked).outcome == "reserved"

    with_client(running.broker_url, act)


def test_a_client_belongs_to_one_event_loop() -> None:
    client = AsyncClient("redis://127.0.0.1:1/0")
    with pytest.raises(BrokerUnavailableError):
        asyncio.run(client.waiting())
    with pytest.raises(RuntimeError, match="this AsyncClient is used by another event loop already: make one for each"):
        asyncio.run(client.start(org_id="acme", workflow_id="run", credits=1, wait_s=1))
    asyncio.run(client.close())


def test_a_batch_of_which_the_answer_is_lost_may_have_arrived_and_is_sent_again(running: Installation) -> None:
    port = urlsplit(running.broker_url).port
    assert port is not None

    async def grant_all(client: AsyncClient) -> None:
        async with client.batch() as batch:
            for number in range(100):
                batch.grant(org_id="half", grant_id=f"gift-{number}", credits=1)

    async def unlucky(client: AsyncClient) -> None:
        with pytest.raises(NotSentError, match=r"^a batch of 100 messages, of which some may have arrived, could not"):
            await grant_all(client)

    with cut_way_to(port, after_bytes=50_000) as way:
        with_client(way.to(running.broker_url), unlucky)
    with_client(running.broker_url, grant_all)
    eventually(running.is_drained)
    assert sql(running.engine, "SELECT count(*) FROM credit_events WHERE org_id = 'half'") == [(100,)]


def test_who_cannot_be_answered_is_told_before_anything_is_sent() -> None:
    async def act(client: AsyncClient) -> None:
        assert not client.keeps_answers
        with pytest.raises(ValueError, match="wait_s needs a result_url: this broker keeps no answers"):
            await client.start(org_id="acme", workflow_id="run", credits=1, wait_s=1)

    with_client("amqp://127.0.0.1:1//", act)
