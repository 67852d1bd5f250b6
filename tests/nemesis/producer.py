"""The workflow engine, billing and some vandal: a thread that sends in plain Celery, and remembers what it sent.

A message counts as sent when the broker has confirmed it; what raised is sent again under the same ids. What the broker
confirmed a moment before it was killed counts only if it had handed it to the kernel by then: with `appendfsync
everysec` Valkey may reply first, while an fsync is under way. That is Valkey's promise, and not what is tested here.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any
from uuid import uuid4

import redis
from amqp.exceptions import AMQPError
from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError

from holdfast_client.broker import QUEUE
from tests.nemesis.workload import Message, Workload

RETRY_S = 0.05
BROKER_ERRORS = (OperationalError, redis.RedisError, AMQPError, OSError)


@dataclass(slots=True)
class Sent:
    """A message, and what became of sending it."""

    message: Message
    calls: int = 0
    confirmed: int = 0
    task_ids: list[str] = field(default_factory=list)
    """Under which it asked for an answer."""


class Producer(Thread):
    """Sends a workload, chunk by chunk, until it is told to stop."""

    queue: str | Queue = QUEUE
    exchange = QUEUE

    def __init__(self, broker_url: str, workload: Workload, *, seed: int, messages_per_s: float) -> None:
        super().__init__(name="producer", daemon=True)
        self.sent: dict[int, Sent] = {}
        self.confirmed = 0
        self.error: BaseException | None = None
        self._workload = workload
        self._random = Random(seed)
        self._messages_per_s = messages_per_s
        self._celery = self._connect(broker_url)
        self._stopping = Event()
        self._closed = Event()
        self._lock = Lock()
        self._broker_lives = 0
        self._recent: deque[tuple[float, Sent]] = deque(maxlen=1_000)
        self._doubted: list[Sent] = []

    def send(self, messages: Iterable[Message]) -> None:
        """Send `messages`, each as often as it takes until it is confirmed; gives up once this is closed."""
        for message in messages:
            self._send(self.sent.setdefault(message.number, Sent(message)))
            while self._doubted:
                self._send(self._doubted.pop())

    def run(self) -> None:
        """Send chunk after chunk, each as fast as possible, with breaks between them."""
        try:
            next_at = monotonic()
            while not self._stopping.is_set():
                chunk = self._workload.chunk(datetime.now(UTC))
                self.send(chunk)
                next_at = max(monotonic(), next_at + len(chunk) / self._messages_per_s)
                self._stopping.wait(next_at - monotonic())
        except BaseException as error:  # noqa: BLE001 - whoever reads the verdict has to know
            self.error = error

    def finish(self) -> None:
        """End with the chunk that is being sent, and send again what is in doubt."""
        self._stopping.set()
        if self.is_alive():
            self.join()
        while self._doubted:
            self._send(self._doubted.pop())

    def broker_was_killed(self, *, knew_all_until: float) -> None:
        """What was confirmed after that moment, or is being sent now, does not count as sent."""
        with self._lock:
            self._broker_lives += 1
            while self._recent and self._recent[-1][0] >= knew_all_until:
                _, sent = self._recent.pop()
                sent.confirmed -= 1
                self.confirmed -= 1
                self._doubted.append(sent)

    def close(self) -> None:
        """Stop at once, whatever is not sent yet."""
        self._closed.set()
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=30)
        self._celery.close()

    def _connect(self, broker_url: str) -> Celery:
        self._broker = redis.Redis.from_url(broker_url)
        return Celery(broker=broker_url, set_as_current=False)

    def _send(self, sent: Sent) -> None:
        while not self._closed.is_set():
            with self._lock:
                lives = self._broker_lives
            sent.calls += 1
            try:
                self._call(sent)
            except BROKER_ERRORS:
                self._closed.wait(RETRY_S)
                continue
            with self._lock:
                if lives == self._broker_lives:
                    sent.confirmed += 1
                    self.confirmed += 1
                    self._recent.append((monotonic(), sent))
                    return

    def _call(self, sent: Sent) -> None:
        message = sent.message
        match message.form:
            case "task":
                task_id = str(uuid4())
                asks = message.task == "workflow.start" or self._random.random() < 0.5
                if asks:
                    sent.task_ids.append(task_id)
                self._celery.send_task(
                    message.task, args=[message.fields], queue=self.queue, task_id=task_id, ignore_result=not asks
                )
            case "body":
                self._publish(
                    message.text,
                    content_type="application/json",
                    content_encoding="utf-8",
                    headers={"task": message.task, "id": str(uuid4())},
                )
            case "entry":
                self._put(message.text)

    def _publish(self, text: str, **properties: Any) -> None:
        with self._celery.producer_or_acquire() as producer:
            producer.publish(text, routing_key=QUEUE, exchange=self.exchange, retry=True, **properties)

    def _put(self, text: str) -> None:
        """What is not a message, as far as the broker takes it."""
        self._broker.lpush(QUEUE, text)


class ClusterProducer(Producer):
    """The same for RabbitMQ: with the settings of docs/operating.md. What it confirmed once, it has for good."""

    queue = Queue(QUEUE, no_declare=True)
    exchange = ""

    def _connect(self, broker_url: str) -> Celery:
        options = {"confirm_publish": True, "read_timeout": 5, "write_timeout": 5}
        return Celery(broker=broker_url, broker_transport_options=options, set_as_current=False)

    def _put(self, text: str) -> None:
        self._publish(text, content_type="text/plain", content_encoding="utf-8")
