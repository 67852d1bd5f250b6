"""The Celery consumer. It keeps messages that Celery would drop, or that would end it.

Guarantee: every message goes into the batch, and no content ends the worker. A message that no task can take becomes a
dead letter with its raw bytes: its task is unknown, its body is undecodable or not [args, kwargs, embed], or a header
that Celery needs is unreadable. A message with an ETA or an expiry, or one that was revoked, is applied like any other.

From the queue of engines, only workflow messages have an effect, without the `source` that they name. This also holds
after a wait or a replay. Any other message there becomes a dead letter that is never sent again.
"""

import hashlib
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

from amqp.exceptions import IrrecoverableConnectionError
from celery.exceptions import CPendingDeprecationWarning, WorkerShutdown
from celery.worker.consumer import Consumer as CeleryConsumer
from celery.worker.state import maybe_shutdown
from kombu.connection import Connection
from kombu.message import Message
from redis.exceptions import ResponseError

from holdfast_client.broker import DEAD_QUEUES, ENGINE_QUEUE, ENGINE_QUEUES, QUEUE, declare_queues, masked
from holdfast_client.messages import MAX_BODY_BYTES, WORKFLOW_TASKS, InvalidMessage, too_large_body
from holdfast_client.redis_server import UnsupportedServerError
from ledger.bodies import only_argument, strict_arguments, written
from ledger.store import Delivery
from worker import metrics
from worker.batching import Arrival, Inbox
from worker.broker import reason, taken_from
from worker.compression import UNKNOWN_COMPRESSION
from worker.control import answer_questions_only
from worker.envelope import answer_to, named_task, raw_body, replay_of, task_and_arguments, traceparent_of
from worker.monitoring import Monitored
from worker.runs import Run
from worker.tasks import SCHEDULER_TASKS, TASKS
from worker.transport import DELIVERED_TOO_OFTEN, Channel, SetAside, read_json

logger = logging.getLogger(__name__)

EXIT_UNSUPPORTED = 2

_ONLY_WORKFLOWS = f"only workflow messages are taken from {ENGINE_QUEUE}"


class Consumer(CeleryConsumer):  # type: ignore[misc] # Celery ships no types
    """As set by `worker_consumer`."""

    class Blueprint(CeleryConsumer.Blueprint):  # type: ignore[misc]
        """Celery's steps without the wait for an ETA."""

        default_steps: ClassVar[list[str]] = [
            step for step in CeleryConsumer.Blueprint.default_steps if not step.endswith(":DelayedDelivery")
        ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Our workers need not know of one another.
        super().__init__(*args, without_mingle=True, without_gossip=True, **kwargs)
        answer_questions_only()
        self.inbox = Inbox(self)
        self._is_refused = False
        self._left: tuple[str | None, int | None] | None = None
        self._risk: str | None = None

    def connect(self) -> Connection:
        """Open a new connection. The hub forgets the callbacks of the one before."""
        if self.hub is not None:
            self.hub.on_tick.clear()
        connection: Connection = super().connect()
        return connection

    def stop(self) -> None:
        """End with the worker."""
        self.inbox.stop()
        super().stop()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Report a broker that refuses what a consumer needs, and wait a second before the next try."""
        if not self._is_refused:
            logger.warning("Cannot consume from %s, trying again: %s", masked(self.app.conf.broker_url), reason(exc))
        self._is_refused = True
        time.sleep(1)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Handle a lost connection, or a broker that refuses what a consumer needs."""
        self._left = _node(self.connection)
        if isinstance(exc, (ResponseError, IrrecoverableConnectionError)):  # such as a queue that has no leader
            with suppress(Exception):
                self.connection.collect()
            self.on_connection_error_before_connected(exc)
            return
        with suppress(Exception):  # an orderly close of a connection to a node that hangs takes ten seconds
            self.event_dispatcher.connection.collect()
        # Celery warns each time that a later version may cancel tasks then; worker/app.py has switched that off.
        with warnings.catch_warnings(action="ignore", category=CPendingDeprecationWarning):
            super().on_connection_error_after_connected(exc)

    def register_with_event_loop(self, hub: Any) -> None:
        """Flush the inbox in every turn of the event loop."""
        super().register_with_event_loop(hub)
        hub.on_tick.add(self._flush)

    def _flush(self) -> None:
        try:
            self.inbox.flush()
        except self.connection_errors:
            # Reading on from the lost connection would be another error, with a traceback.
            self.hub._pop_ready()  # noqa: SLF001 - kombu has no other way to forget it
            raise

    def create_task_handler(self, *_: Any, **__: Any) -> Callable[[Message], None]:
        """Return the callback for messages. Called at the beginning of each connection."""
        self.inbox.reconnected()
        return self._receive

    def on_ready(self) -> None:
        """Report that messages arrive, at the beginning of each connection."""
        broker = masked(self.app.conf.broker_url)
        if self._is_refused:
            logger.warning("Consuming from %s again", broker)
        else:
            logger.info("Connected and ready: takes messages from %s", broker)
        self._is_refused = False
        super().on_ready()

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Keep a message whose body kombu could not decompress."""
        why = UNKNOWN_COMPRESSION if isinstance(exc, KeyError) else str(exc)[:200] or type(exc).__name__
        problem = InvalidMessage("undecodable_message", f"the body cannot be decoded: {why}", None)
        self._keep(message, _known_problem(message, raw_body(message)) or problem)

    def ensure_connected(self, conn: Connection) -> Connection:
        """Connect to the broker, as soon as it is there. Ends the worker if it can never be used."""
        broker = masked(self.app.conf.broker_url)
        is_told = False

        def tell(error: Exception, _: float) -> None:
            nonlocal is_told
            if not (is_told or self._is_refused):
                logger.warning("Cannot connect to %s, trying again: %s", broker, reason(error))
                is_told = True

        if _node(conn) == self._left:  # the first of several nodes: if it hangs, another try would take seconds
            conn.maybe_switch_next()
        conn.ensure_connection(tell, interval_start=0.1, interval_step=0.3, interval_max=2.0, callback=maybe_shutdown)
        if is_told:
            logger.warning("Connected to %s", broker)
        try:
            self._prepare(conn)
        except BaseException:
            conn.collect()  # nothing else would close it
            raise
        return conn

    def _prepare(self, conn: Connection) -> None:
        declare_queues(conn)
        if isinstance(channel := conn.default_channel, Channel):
            channel.on_risk = self._tell_risk
            try:
                channel.check_server()
            except UnsupportedServerError as error:
                logger.critical("%s", error)
                raise WorkerShutdown(EXIT_UNSUPPORTED) from None
            channel.on_suspect = metrics.suspect_messages.inc

    def _tell_risk(self, risk: str | None) -> None:
        """Report in a metric, and in the log when it changes, how the broker may lose messages."""
        if risk != self._risk:
            not_durable = f"Messages may be lost, as the broker is not durable: {risk}"
            logger.warning("%s", "The broker is durable again" if risk is None else not_durable)
            self._risk = risk
        metrics.broker_is_not_durable.set(risk is not None)

    def _receive(self, message: Message) -> None:
        raw = raw_body(message)
        if (problem := _known_problem(message, raw)) is not None:
            self._keep(message, problem)
            return
        try:
            task, (args, kwargs) = task_and_arguments(message, raw)
        except Exception as error:  # noqa: BLE001 - a message may cause any error, which would end every worker
            self._keep(message, InvalidMessage("undecodable_message", str(error), None))
            return
        if task not in TASKS:
            self._keep(message, InvalidMessage("unknown_task", f"there is no task named {task[:200]!a}", None))
            return
        if taken_from(message) in ENGINE_QUEUES:
            if task not in WORKFLOW_TASKS:
                self._keep(message, _not_allowed(task))
                return
            _take_source_out(message, args, kwargs)
        monitored = Monitored.received(self.app.tasks[task], message, self)
        if task in SCHEDULER_TASKS:
            self.inbox.add(Arrival(message, Run(task, answer_to(message), traceparent_of(message)), monitored))
            return
        payload = only_argument(task, args, kwargs)
        about = answer_to(message), replay_of(message), traceparent_of(message)
        delivery = Delivery(task, payload, raw_body(message), *about)
        self.inbox.add(Arrival(message, delivery, monitored))

    def _keep(self, message: Message, problem: InvalidMessage) -> None:
        """Have the batch make a dead letter of the message."""
        if taken_from(message) in ENGINE_QUEUES:
            problem = _problem_of_engine(message, problem)
        body = raw_body(message)
        message.body = b""  # which may be large, and is not needed to acknowledge it
        about = answer_to(message), replay_of(message), traceparent_of(message)
        delivery = Delivery(named_task(message), problem, body[:MAX_BODY_BYTES], *about)
        self.inbox.add(Arrival(message, delivery, None))


def _node(connection: Connection) -> tuple[str | None, int | None]:
    return connection.hostname, connection.port


def _known_problem(message: Message, raw: bytes) -> InvalidMessage | None:
    """Why a message with the body `raw` must not be parsed, or None."""
    if isinstance(message, SetAside):
        return message.problem
    if len(raw) > MAX_BODY_BYTES:
        return too_large_body(len(raw), hashlib.sha256(raw).hexdigest())
    if taken_from(message) in DEAD_QUEUES:
        return DELIVERED_TOO_OFTEN
    return None


def _problem_of_engine(message: Message, problem: InvalidMessage) -> InvalidMessage:
    """The problem of an engine's message. Its replay goes to `credits`, and must not let in what is refused here."""
    task = named_task(message)
    if problem.code in ("too_large", "not_allowed"):
        return problem
    if task and task not in WORKFLOW_TASKS:
        return _not_allowed(task)
    if problem == DELIVERED_TOO_OFTEN:
        with suppress(ValueError, RecursionError):
            found = strict_arguments(read_json(raw_body(message)))
            if task and found is not None:
                _take_source_out(message, *found)
                return problem
    why = f"{_ONLY_WORKFLOWS}, and this one cannot be read: {problem.error}"
    return InvalidMessage("not_allowed", why, problem.org_id)


def _not_allowed(task: str) -> InvalidMessage:
    if task in TASKS:
        error = f"{_ONLY_WORKFLOWS}: {task!a} must be sent to {QUEUE}, by a system that has the right"
    else:
        error = f"{_ONLY_WORKFLOWS}, and there is no task named {task[:200]!a}"
    return InvalidMessage("not_allowed", error, None)


def _take_source_out(message: Message, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Remove the source from the arguments and from the kept body: the ledger sets it."""
    named = [argument for argument in args if isinstance(argument, dict) and "source" in argument]
    for argument in named:
        del argument["source"]
    if named:
        message.body = written(args, kwargs)
