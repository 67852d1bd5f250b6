"""The Celery app of the worker and the beat: every option that matters, with its reason."""

import logging
import os
import signal
import sys
import time
from datetime import UTC, datetime
from functools import partial
from threading import Timer
from typing import Any, NoReturn

import celery.apps.worker
from celery import Celery
from celery.schedules import schedule
from celery.signals import beat_init, setup_logging, worker_init, worker_ready, worker_shutting_down
from sqlalchemy import Engine

from holdfast_client.broker import masked
from holdfast_client.messages import MAX_BODY_BYTES
from holdfast_client.publishing import BROKER_ERRORS
from holdfast_client.redis_server import UnsupportedServerError
from ledger import logs
from ledger.database import TRANSACTION_TIMEOUT_S, UnsuitableDatabaseError, abandon, connect, refuse_unsuitable
from ledger.settings import Settings, SettingsError
from worker import metrics, spans
from worker.batching import MOST_MESSAGES, collect_garbage_seldom
from worker.broker import create_celery, queues, reason
from worker.compression import inflate_within
from worker.tasks import SCHEDULER_TASKS, register
from worker.transport import Channel

logger = logging.getLogger(__name__)

DATABASE_PATIENCE_S, PATIENCE_S = 6.0, 9.0
"""How long a worker that is told to stop waits for the database, and in all."""

BEAT_INTERVAL_S = 60.0


def create_app(settings: Settings) -> Celery:
    """Create the app. The settings must name a database and a broker. Connects to nothing yet."""
    assert settings.broker_url is not None
    app = create_celery("holdfast", settings.broker_url, settings.result_store_url)
    app.conf.update(
        task_queues=queues(settings.broker_url),
        # What Celery would drop becomes a dead letter too.
        worker_consumer="worker.consumer:Consumer",
        # One process is one database connection; more workers give more throughput.
        worker_pool="solo",
        worker_concurrency=1,
        # One batch in hand, and the next.
        worker_prefetch_multiplier=2 * MOST_MESSAGES,
        # Results are stored only for callers that ask, for an hour.
        task_ignore_result=True,
        result_expires=3600,
        # The ledger does not wait for the result store: a caller without an answer sends its message again.
        redis_socket_timeout=1.0,
        redis_socket_connect_timeout=1.0,
        # Worker and beat try again if the broker is late or gone, or closes the channel of a worker that has waited too
        # long for the database.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # A worker notices within 12 seconds that its node of RabbitMQ is silent, and RabbitMQ within 15 that the worker
        # is.
        broker_heartbeat=5,
        broker_heartbeat_checkrate=5,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # The beat keeps no state between two runs: what is due is found in the database.
        beat_scheduler="celery.beat:Scheduler",
        # With the wall clock, the beat would pause for as long as that clock is set back.
        beat_schedule={
            name: {"task": name, "schedule": schedule(BEAT_INTERVAL_S, nowfun=_monotonic_now)}
            for name in SCHEDULER_TASKS
        },
        timezone="UTC",
    )
    inflate_within(MAX_BODY_BYTES)
    app.events.dispatcher_cls = "worker.monitoring:Dispatcher"
    # Checking its connections would cost every batch a round trip; a batch that fails is applied again.
    app.ledger_engine = _engine(settings)
    register(app, app.ledger_engine)
    worker_init.connect(_say_that_all_is_well, weak=False)
    worker_shutting_down.connect(lambda **_: _end_in_time(app.ledger_engine), weak=False)
    worker_ready.connect(lambda **_: collect_garbage_seldom(), weak=False)
    beat_init.connect(_end_when_told, weak=False)
    beat_init.connect(lambda **_: _confirm_publishing(app), weak=False)
    beat_init.connect(_end_if_unsupported, weak=False)
    if not logs.are_for_a_person():
        setup_logging.connect(logs.set_up)
        celery.apps.worker.safe_say = logs.write
    worker_init.connect(lambda **_: _refuse_unsuitable(app.ledger_engine), weak=False)
    worker_init.connect(lambda **_: _make_spans(), weak=False)
    if (address := settings.metrics_address) is not None:
        worker_init.connect(lambda **_: _serve_metrics(address), weak=False)
    # Imports its modules now: a signal during a later import would leave half a module, and an error at exit.
    assert app.backend is not None
    return app


def _engine(settings: Settings) -> Engine:
    assert settings.database_url is not None
    return connect(
        settings.database_url,
        transaction_timeout_s=TRANSACTION_TIMEOUT_S,
        shard_connections=settings.shard_connections,
    )


def _monotonic_now() -> datetime:
    """A time for measuring intervals only: its origin is arbitrary, and nobody can set it."""
    return datetime.fromtimestamp(time.monotonic(), UTC)


def _serve_metrics(address: str) -> None:
    try:
        metrics.serve(address)
    except SettingsError as error:
        _fail(error)


def _make_spans() -> None:
    try:
        spans.start(most_messages=MOST_MESSAGES)
    except SettingsError as error:
        _fail(error)


def _refuse_unsuitable(engine: Engine) -> None:
    try:
        refuse_unsuitable(engine)
    except UnsuitableDatabaseError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    print(f"holdfast: {error}", file=sys.stderr)
    raise SystemExit(2) from None  # Celery would only log an Exception


def _say_that_all_is_well(sender: Any, **_: object) -> None:
    """Log the few INFO lines of our own modules also at Celery's default level, WARNING."""
    if sender.loglevel <= logging.WARNING:
        logging.getLogger(__package__).setLevel(min(sender.loglevel, logging.INFO))


def _end_in_time(engine: Engine) -> None:
    """End within ten seconds, whatever is stuck. The broker takes back messages that are not given back by then."""
    for after_s, act in ((DATABASE_PATIENCE_S, partial(abandon, engine)), (PATIENCE_S, partial(os._exit, 0))):
        timer = Timer(after_s, act)
        timer.daemon = True
        timer.start()


def _confirm_publishing(app: Celery) -> None:
    """Raise an error for a message that RabbitMQ did not take, instead of losing it.

    In the beat only. All that a worker publishes may be lost, and it must not wait for a confirmation while RabbitMQ is
    full: the worker is what makes room.
    """
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "confirm_publish": True}


def _end_if_unsupported(sender: Any, **_: object) -> None:
    """End the beat if its broker is there and can never be used."""
    try:
        channel = sender.scheduler.producer.channel
        if isinstance(channel, Channel):
            channel.check_server()
    except UnsupportedServerError as error:
        _fail(error)
    except BROKER_ERRORS as error:  # such as a refused login; the beat tries again with its next run
        logger.warning("Cannot send to %s, trying again: %s", masked(sender.app.conf.broker_url), reason(error))


def _end_when_told(**_: object) -> None:
    """End the beat at once on a signal. It keeps no state, and the broker drops a half-sent message.

    Celery's handler closes the connection while it is being read, so its SystemExit may get lost.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
