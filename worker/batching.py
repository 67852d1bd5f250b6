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
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from celery.worker.consumer import Consumer
from kombu.message import Message

from ledger.state import Result
from ledger.store import DeadLettered, Delivery, apply_batch
from ledger.waiting import Waits
from worker import metrics
from worker.answers import Answer, Answers, tell_dead_letter, value_of
from worker.background import Background
from worker.monitoring import Monitored
from worker.outage import Outage
from worker.runs import Run
from worker.transport import Channel

# It reports every connection that breaks while it is used; we report the outage.
logging.getLogger("psycopg").setLevel(logging.ERROR)

MOST_MESSAGES = 500
"""How many messages one batch has at most."""

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0
_WHO = "batches"


class Arrival(NamedTuple):
    """A message that is not acknowledged yet."""

    message: Message
    content: Delivery | Run
    monitored: Monitored | None


class Inbox:
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
        """Apply the first of what has arrived; returns whether that worked."""
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
            with self._outage.asking(_WHO):
                outcomes = apply_batch(self._engine, deliveries, known_to_wait=self._background.known_to_wait())
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
        for delivery, monitor, outcome in zip(deliveries, monitors, outcomes, strict=True):
            if isinstance(outcome, Waits):
                self._background.note([outcome.org_id])
            else:
                answered.append((delivery.answer_to, outcome))
            if isinstance(outcome, DeadLettered):
                tell_dead_letter(outcome)
            if monitor is not None:
                monitor.ended(_told(outcome), took_s=took_s)
        for run, monitor in runs:
            self._background.ask(run)
            if monitor is not None:
                monitor.ended(None, took_s=took_s)
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
    """Tell Python that what this process makes, batch after batch, is hardly ever part of a cycle.

    Looking for cycles among the thousands of values of a batch, and all that was ever imported, took a quarter of a
    worker's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _told(outcome: Result | DeadLettered | Waits) -> Any:
    """What monitors are told."""
    if isinstance(outcome, Waits):
        return {"outcome": "waits", "reason": outcome.reason}
    return value_of(outcome)
