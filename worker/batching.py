"""From what waits at the broker to one commit and one acknowledgement.

Guarantee: a message is acknowledged when it is applied, kept as a dead letter, or kept to wait for its organization
(see `worker.background`), and not before. A batch is what has arrived when the worker comes to look; nothing waits for
a batch to fill. While the database does not answer, all messages stay with this worker, no more than the prefetch
limit, and are tried again and again; a worker that is told to stop meanwhile gives them back.

What it can get wrong: a worker that dies between the commit and the acknowledgement gets its messages again. The
ledger knows them, so they change nothing.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

from celery import Celery, Task
from celery.worker.consumer import Consumer
from kombu.message import Message

from ledger.messages import only_argument
from ledger.state import Result
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.waiting import Waits
from worker import metrics
from worker.answers import Answer, Answers, tell_dead_letter, value_of
from worker.background import Background
from worker.monitoring import Monitored
from worker.outage import Outage
from worker.tasks import SCHEDULER_TASKS
from worker.transport import Channel

# It reports every connection that breaks while it is used; we report the outage.
logging.getLogger("psycopg").setLevel(logging.ERROR)

MOST_MESSAGES = 500
"""How many messages one batch has at most."""

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0
Outcome = Result | DeadLettered | Waits | None
"""What became of a message; None: it is a run of the scheduler, which is done in the background."""

_WHO = "batches"


class Arrival(NamedTuple):
    """A message that is not acknowledged yet."""

    message: Message
    delivery: Delivery
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


def answer_to(message: Message) -> str | None:
    """The id under which its sender waits for an answer, if it does."""
    headers = message.headers
    if not isinstance(headers, dict) or headers.get("ignore_result") is not False:
        return None
    task_id = headers.get("id")
    return task_id if is_text(task_id) else None


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string that can be sent and stored, which one with half of a surrogate pair cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def strategy(task: Task, _app: Celery, consumer: Consumer) -> Callable[..., None]:
    """How the messages of `task` are taken: Celery's hook, set as the task's `Strategy`."""
    batch: Batch = consumer.batch

    def receive(message: Message, body: Sequence[Any], *_: object) -> None:
        args, kwargs, _embed = body
        payload = None if task.name in SCHEDULER_TASKS else only_argument(task.name, args, kwargs)
        batch.add(
            Arrival(
                message,
                Delivery(task.name, payload, raw_body(message), answer_to(message)),
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
        self._delay_s = FIRST_DELAY_S
        self._next_try_at = 0.0
        self._answers = Answers(consumer.app)
        self._outage = Outage()
        self._outage.start()
        self._background = Background(self._engine, self._answers, self._outage)
        self._background.start()

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

    def stop(self) -> None:
        """The worker ends: begin nothing more in the background."""
        self._background.stop()

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
            outcomes = self._outcomes(arrivals)
        except Exception as error:  # noqa: BLE001 - to let it pass would end the worker; to acknowledge would lose them
            self._outage.failed(_WHO, error)
            self._try_again_later()
            return False
        self._outage.answered(_WHO)
        self._delay_s = FIRST_DELAY_S
        took_s = time.monotonic() - began_at
        del self._arrivals[: len(arrivals)]
        self._applied += [arrival.message for arrival in arrivals]
        answered: list[tuple[str | None, Answer]] = []
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            if isinstance(outcome, (Result, DeadLettered)):
                answered.append((arrival.delivery.answer_to, outcome))
                if isinstance(outcome, DeadLettered):
                    tell_dead_letter(outcome)
            elif outcome is None:
                self._background.ask(arrival.delivery.task, arrival.delivery.answer_to)
            else:
                self._background.note([outcome.org_id])
            if arrival.monitored is not None:
                arrival.monitored.ended(_told(outcome), took_s=took_s)
        metrics.count_batch(len(arrivals), took_s=took_s)
        metrics.count_answers(
            (arrival.delivery.task, outcome) for arrival, outcome in zip(arrivals, outcomes, strict=True)
        )
        self._answers.store(answered)
        self._acknowledge()
        return True

    def _try_again_later(self) -> None:
        self._next_try_at = time.monotonic() + self._delay_s
        self._consumer.timer.call_after(self._delay_s, self._consumer.call_soon, (self.flush,))
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def _outcomes(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Apply the messages; the scheduler's runs are done in the background."""
        messages = [arrival.delivery for arrival in arrivals if not _is_run(arrival.delivery)]
        with self._outage.asking(_WHO):
            applied = iter(apply_batch(self._engine, messages, known_to_wait=self._background.known_to_wait()))
        if len(messages) == len(arrivals):
            return list(applied)
        return [None if _is_run(arrival.delivery) else next(applied) for arrival in arrivals]

    def _acknowledge(self) -> None:
        channel = self._consumer.task_consumer.channel
        if isinstance(channel, Channel):
            channel.qos.acknowledge([message.delivery_tag for message in self._applied])
        else:
            # In the order of arrival, so everything before the last one is applied too.
            self._applied[-1].ack(multiple=True)
        self._applied = []


def _is_run(delivery: Delivery) -> bool:
    """Whether it is a run of the scheduler, and not one that must become a dead letter."""
    return delivery.task in SCHEDULER_TASKS and delivery.payload is None


def collect_garbage_seldom() -> None:
    """Tell Python that what this process makes, batch after batch, is hardly ever part of a cycle.

    Looking for cycles among the thousands of values of a batch, and all that was ever imported, took a quarter of a
    worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _told(outcome: Outcome) -> Any:
    """What monitors are told."""
    match outcome:
        case None:
            return None
        case Waits():
            return {"outcome": "waits", "reason": outcome.reason}
        case _:
            return value_of(outcome)
