"""The Celery app of the worker and the beat: every option that matters, with its reason."""

from celery import Celery
from celery.signals import setup_logging, worker_ready

from ledger import logs
from ledger.database import connect
from ledger.settings import Settings
from worker import metrics
from worker.broker import QUEUES, create_celery
from worker.tasks import SCHEDULER_TASKS, register


def create_app(settings: Settings) -> Celery:
    """The app for these settings, which name a database and a broker. Connects to nothing yet."""
    assert settings.database_url is not None
    assert settings.broker_url is not None
    app = create_celery("holdfast", settings.broker_url, settings.result_store_url)
    app.conf.update(
        task_queues={name: {"exchange": name, "routing_key": name} for name in QUEUES},
        # A message is acknowledged after its transaction is committed, so a worker that dies loses none.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # What Celery would drop becomes a dead letter too.
        worker_consumer="worker.consumer:Consumer",
        # One process is one database connection; more throughput is more workers.
        worker_pool="solo",
        worker_concurrency=1,
        worker_prefetch_multiplier=100,
        # Only a caller that asks has its result stored, and for an hour.
        task_ignore_result=True,
        result_expires=3600,
        # The broker may be late or go away: the worker waits for it.
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # Nothing about time is kept between two runs of the beat: whatever is due is found in the database.
        beat_scheduler="celery.beat:Scheduler",
        beat_schedule={name: {"task": name, "schedule": 60.0} for name in SCHEDULER_TASKS},
        timezone="UTC",
    )
    app.ledger_engine = connect(settings.database_url)
    register(app, app.ledger_engine)
    if not logs.are_for_a_person():
        setup_logging.connect(logs.set_up)
    if (port := settings.metrics_port) is not None:
        worker_ready.connect(lambda **_: metrics.serve(port), weak=False)
    # Loads its modules now: a signal during a later import would leave half a module, and an error at the end.
    assert app.backend is not None
    return app
