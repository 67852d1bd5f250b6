"""From what waits at the broker to one commit and one acknowledgement.

Guarantee: a message is acknowledged when it is applied, or kept as a dead letter, and not before. A batch is what has
arrived when the worker comes to look; nothing waits for a batch to fill. While the database does not answer, all
messages stay with this worker, no more than the prefetch limit, and are tried again and again; a worker that is told to
stop meanwhile gives them back.

What it can get wrong: a worker that dies between the commit and the acknowledgement gets its messages again. The
ledger knows them, so they change nothing.
"""

import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from celery import Celery, Task
from celery.worker.consumer import Consumer
from kombu.message import Message
from redis.exceptions import RedisError

from ledger.database import describe, is_transient
from ledger.messages import only_argument
from ledger.state import Result
from ledger.store import DeadLettered, Delivery, apply_batch
from worker import metrics
from worker.monitoring import Monitored
from worker.tasks import SCHEDULER_TASKS, as_value
from worker.transport import Channel

logger = logging.getLogger(__name__)
# It reports every connection that breaks while it is used; we report the outage.
logging.getLogger("psycopg").setLevel(logging.ERROR)

MOST_MESSAGES = 500
"""How many messages one batch has at most."""

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0
STORE_PAUSE_S = 10
"""How long no answers are stored after that has failed."""

REMINDER_S = 60.0
"""How often the log is reminded of an outage, and of its reason."""

Answer = Result | DeadLettered | int
"""What became of a message; of a run of the scheduler, the number of events that it wrote."""


class Arrival(NamedTuple):
    """A message that is not acknowledged yet."""

    message: Message
    delivery: Delivery
    answer_to: str | None
    """The task's id, if somebody wants the answer."""
    monitored: Monitored | None


def raw_body(message: Message) -> bytes:
    """The body as it arrived; without one, what kombu has in its place."""
    body = message.body
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    try:
        return str(body).encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair
        return str(body).encode(errors="surrogatepass")


def strategy(task: Task, _app: Celery, consumer: Consumer) -> Callable[..., None]:
    """How the messages of `task` are taken: Celery's hook, set as the task's `Strategy`."""
    batch: Batch = consumer.batch

    def receive(message: Message, body: Sequence[Any], *_: object) -> None:
        args, kwargs, _embed = body
        payload = None if task.name in SCHEDULER_TASKS else only_argument(task.name, args, kwargs)
        wants_answer = message.headers.get("ignore_result") is False
        batch.add(
            Arrival(
                message,
                Delivery(task.name, payload, raw_body(message)),
                message.headers["id"] if wants_answer else None,
                Monitored.received(task, message, consumer),
            )
        )

    return receive


class Batch:
    """What has arrived at one consumer and is not acknowledged."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._engine = consumer.app.ledger_engine
        self._arrivals: list[Arrival] = []
        self._applied: list[Message] = []
        self._failing_since: float | None = None
        self._reminded_at = 0.0
        self._delay_s = FIRST_DELAY_S
        self._next_try_at = 0.0
        self._store_again_at = 0.0

    def add(self, arrival: Arrival) -> None:
        """Apply `arrival` with whatever else arrives, soon."""
        self._arrivals.append(arrival)
        if self._consumer.hub is None:
            self._consumer.call_soon(self.flush)  # with a hub, it calls

    def flush(self) -> None:
        """Apply and acknowledge what has arrived. Raises what the broker's connection raises."""
        if self._applied:  # the last acknowledgement failed
            self._acknowledge()
        if not self._arrivals or time.monotonic() < self._next_try_at:
            return
        self._drain()
        while self._arrivals and self._apply(self._arrivals[:MOST_MESSAGES]):
            pass

    def reconnected(self) -> None:
        """There is a new connection to the broker: give back what the old one left; `flush` acknowledges the rest."""
        channel = self._consumer.task_consumer.channel
        if isinstance(channel, Channel):
            channel.restore([arrival.message.delivery_tag for arrival in self._arrivals])
        else:  # the broker has taken back everything itself
            self._applied = []
        self._arrivals = []

    def _drain(self) -> None:
        # Our Redis transport has delivered all there is; RabbitMQ delivers one message at a time.
        connection = self._consumer.connection
        if connection.transport.driver_type == "amqp":
            with suppress(TimeoutError):
                while len(self._arrivals) < MOST_MESSAGES:
                    connection.drain_events(timeout=0)

    def _apply(self, arrivals: Sequence[Arrival]) -> bool:
        """Apply the first of what has arrived; answers whether that worked."""
        began_at = time.monotonic()
        monitored = [arrival.monitored for arrival in arrivals if arrival.monitored is not None]
        for one in monitored:
            one.started()
        try:
            answers = self._answers([arrival.delivery for arrival in arrivals])
        except Exception as error:  # noqa: BLE001 - to let it pass would end the worker; to acknowledge would lose them
            self._wait(error)
            return False
        self._end_wait()
        del self._arrivals[: len(arrivals)]
        self._applied += [arrival.message for arrival in arrivals]
        metrics.count([arrival.delivery for arrival in arrivals], answers, took_s=time.monotonic() - began_at)
        for arrival, answer in zip(arrivals, answers, strict=True):
            if isinstance(answer, DeadLettered):
                logger.warning("Dead letter %d, %s: %s", answer.letter_id, answer.code, answer.error)
            if arrival.monitored is not None:
                arrival.monitored.ended(_value(answer), took_s=time.monotonic() - began_at)
        self._store_answers(arrivals, answers)
        self._acknowledge()
        return True

    def _answers(self, deliveries: Sequence[Delivery]) -> list[Answer]:
        runs = [
            SCHEDULER_TASKS[delivery.task](self._engine) for delivery in deliveries if delivery.task in SCHEDULER_TASKS
        ]
        written = iter(runs)
        messages = [delivery for delivery in deliveries if delivery.task not in SCHEDULER_TASKS]
        applied = iter(apply_batch(self._engine, messages))
        return [next(written if delivery.task in SCHEDULER_TASKS else applied) for delivery in deliveries]

    def _wait(self, error: Exception) -> None:
        now = time.monotonic()
        if self._failing_since is None or now - self._reminded_at > REMINDER_S:
            what = "The database does not answer" if is_transient(error) else "Nothing can be written"
            logger.warning("%s, the messages wait: %s", what, describe(error))
            self._reminded_at = now
            self._failing_since = self._failing_since or now
            metrics.waiting_for_database.set(1)
        self._next_try_at = now + self._delay_s
        self._consumer.timer.call_after(self._delay_s, self._consumer.call_soon, (self.flush,))
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def _end_wait(self) -> None:
        if self._failing_since is not None:
            logger.warning("The database answers again after %.1f s", time.monotonic() - self._failing_since)
            self._failing_since = None
            self._delay_s = FIRST_DELAY_S
            metrics.waiting_for_database.set(0)

    def _store_answers(self, arrivals: Sequence[Arrival], answers: Sequence[Answer]) -> None:
        backend = self._consumer.app.backend
        asked = [
            (arrival.answer_to, answer)
            for arrival, answer in zip(arrivals, answers, strict=True)
            if arrival.answer_to is not None
        ]
        if not asked or not hasattr(backend, "client") or time.monotonic() < self._store_again_at:
            return
        try:
            with backend.client.pipeline(transaction=False) as pipe:
                for task_id, answer in asked:
                    key, stored = backend.get_key_for_task(task_id), _stored(backend, task_id, answer)
                    pipe.setex(key, backend.expires, stored)
                    pipe.publish(key, stored)
                pipe.execute()
        except (RedisError, OSError) as error:
            # Whoever waits asks again: the messages are applied, and asking is safe. They must not wait for this.
            logger.warning("Answers cannot be stored, none is for %d s: %s", STORE_PAUSE_S, error)
            self._store_again_at = time.monotonic() + STORE_PAUSE_S

    def _acknowledge(self) -> None:
        channel = self._consumer.task_consumer.channel
        if isinstance(channel, Channel):
            channel.qos.acknowledge([message.delivery_tag for message in self._applied])
        else:
            # In the order of arrival, so everything before the last one is applied too.
            self._applied[-1].ack(multiple=True)
        self._applied = []


def collect_garbage_seldom() -> None:
    """Tell Python that what this process makes, batch after batch, is hardly ever part of a cycle.

    Looking for cycles among the thousands of values of a batch, and all that was ever imported, took a quarter of a
    worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _value(answer: Answer) -> Any:
    return answer if isinstance(answer, int) else as_value(answer)


def _stored(backend: Any, task_id: str, answer: Answer) -> str:
    """An answer as Celery's own workers store it, so that any Celery client can read it."""
    value = _value(answer)
    if isinstance(value, Exception):
        meta = backend._get_result_meta(backend.prepare_exception(value), "FAILURE", None, None)  # noqa: SLF001
    else:
        meta = backend._get_result_meta(value, "SUCCESS", None, None)  # noqa: SLF001
    return json.dumps({**meta, "task_id": task_id})
