"""Applies the messages that have arrived with one commit, and acknowledges them in one round trip.

Guarantee: a message is acknowledged only after it is applied, kept as a dead letter, or kept to wait for its
organization (see `worker.background`). A batch is what has arrived when the worker checks; nothing waits for a batch to
fill. While the database does not answer, all messages up to the prefetch limit stay with this worker, which retries
them. A worker that is told to stop meanwhile gives them back.

What it can get wrong: a worker that dies between the commit and the acknowledgement leaves its messages to be delivered
again. The ledger knows them, so they change nothing.
"""

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from celery.worker.consumer import Consumer
from kombu.message import Message

from holdfast_client.results import Result
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.waiting import Waits
from worker import metrics, spans
from worker.answers import Answer, Answers, tell_dead_letter, value_of
from worker.background import Background
from worker.monitoring import Monitored, count
from worker.outage import Outage
from worker.runs import Run
from worker.tasks import TASKS
from worker.transport import Channel

# psycopg reports every connection that breaks in use; we report the outage.
logging.getLogger("psycopg").setLevel(logging.ERROR)

MOST_MESSAGES = 500
"""The most messages of one batch."""

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0
_WHO = "batches"


class Arrival(NamedTuple):
    """A message that is not acknowledged yet."""

    message: Message
    content: Delivery | Run
    monitored: Monitored | None


class Inbox:
    """The messages that have arrived at one consumer and are not acknowledged."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._engine = consumer.app.ledger_engine
        self._arrivals: list[Arrival] = []
        self._applied: list[Message] = []
        self._delay_s = FIRST_DELAY_S
        self._next_try_at = 0.0
        self._answers = Answers(consumer.app)
        self._outage = Outage(self._engine)
        self._outage.start()
        self._background = Background(self._engine, self._answers, self._outage)
        self._background.start()

    def add(self, arrival: Arrival) -> None:
        """Put `arrival` into the next batch."""
        self._arrivals.append(arrival)
        if self._consumer.hub is None:
            self._consumer.call_soon(self.flush)  # a hub calls it itself

    def flush(self) -> None:
        """Apply and acknowledge what has arrived. Raises the errors of the broker's connection."""
        if self._applied:  # the last acknowledgement failed
            self._acknowledge()
        if not self._arrivals or time.monotonic() < self._next_try_at:
            return
        self._drain()
        while self._arrivals and self._apply(self._arrivals[:MOST_MESSAGES]):
            pass

    def reconnected(self) -> None:
        """After a reconnection, give back the messages that are not applied. `flush` acknowledges the applied ones."""
        channel = self._consumer.task_consumer.channel
        if isinstance(channel, Channel):
            channel.restore([arrival.message.delivery_tag for arrival in self._arrivals])
        else:  # RabbitMQ has taken back everything itself
            self._applied = []
        self._arrivals = []

    def stop(self) -> None:
        """Stop the background threads, as the worker ends."""
        self._background.stop()

    def _drain(self) -> None:
        # The Redis transport has delivered everything already; RabbitMQ delivers one message at a time.
        connection = self._consumer.connection
        if connection.transport.driver_type == "amqp":
            with suppress(TimeoutError):
                while len(self._arrivals) < MOST_MESSAGES:
                    connection.drain_events(timeout=0)

    def _apply(self, arrivals: Sequence[Arrival]) -> bool:
        """Apply `arrivals`, the first of those that have arrived. Returns whether that worked."""
        with spans.processing([arrival.content.traceparent for arrival in arrivals]) as span:
            return self._apply_within(span, arrivals)

    def _apply_within(self, span: spans.Processing, arrivals: Sequence[Arrival]) -> bool:
        began_at = time.monotonic()
        deliveries: list[Delivery] = []
        monitors: list[Monitored | None] = []
        runs: list[tuple[Run, Monitored | None]] = []
        for _, content, monitor in arrivals:
            if monitor is not None:
                monitor.started()
            if isinstance(content, Run):
                runs.append((content, monitor))
            else:
                deliveries.append(content)
                monitors.append(monitor)
        try:
            with self._outage.asking(_WHO), span.applying():
                outcomes = apply_batch(self._engine, deliveries, known_to_wait=self._background.known_to_wait())
        except Exception as error:  # noqa: BLE001 - raising ends the worker; acknowledging loses the messages
            self._outage.failed(_WHO, error)
            span.failed(error)
            self._try_again_later()
            return False
        self._outage.answered(_WHO)
        self._delay_s = FIRST_DELAY_S
        took_s = time.monotonic() - began_at
        del self._arrivals[: len(arrivals)]
        self._applied += [arrival.message for arrival in arrivals]
        answered: list[tuple[str | None, Answer]] = []
        for delivery, monitor, outcome in zip(deliveries, monitors, outcomes, strict=True):
            if isinstance(outcome, Waits):
                self._background.note([outcome.org_id])
            else:
                answered.append((delivery.answer_to, outcome))
            if isinstance(outcome, DeadLettered):
                tell_dead_letter(delivery, outcome)
            if monitor is not None:
                monitor.ended(_told(outcome), took_s=took_s)
        for run, monitor in runs:
            self._background.ask(run)
            if monitor is not None:
                monitor.ended(None, took_s=took_s)
        span.ended(outcomes)
        count(content.task for _, content, monitor in arrivals if monitor is None and content.task in TASKS)
        metrics.count_batch(len(arrivals), took_s=took_s)
        metrics.count_answers((delivery.task, outcome) for delivery, outcome in zip(deliveries, outcomes, strict=True))
        self._answers.store(answered)
        self._acknowledge()
        return True

    def _try_again_later(self) -> None:
        self._next_try_at = time.monotonic() + self._delay_s
        self._consumer.timer.call_after(self._delay_s, self._consumer.call_soon, (self.flush,))
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)

    def _acknowledge(self) -> None:
        channel = self._consumer.task_consumer.channel
        if isinstance(channel, Channel):
            channel.qos.acknowledge([message.delivery_tag for message in self._applied])
        else:
            # In the order of arrival, so everything before the last one is applied too.
            self._applied[-1].ack(multiple=True)
        self._applied = []


def collect_garbage_seldom() -> None:
    """Make Python collect garbage less often, as the values of a batch are hardly ever part of a cycle.

    Searching the thousands of values of a batch and all imported modules for cycles took a quarter of a worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _told(outcome: Result | DeadLettered | Waits) -> Any:
    """The result for monitors."""
    if isinstance(outcome, Waits):
        return {"outcome": "waits", "reason": outcome.reason}
    return value_of(outcome)
