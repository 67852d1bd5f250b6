"""From a delivery to its answer, however long the database takes.

Guarantee: when `apply_patiently` returns, the message is applied or is a dead letter, and may be acknowledged. While
the database does not answer it waits, with a capped backoff; a worker that is told to stop meanwhile gives the message
back.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from celery.exceptions import Reject
from celery.worker import state
from sqlalchemy import Engine

from ledger.database import describe
from ledger.state import Result
from ledger.store import DeadLettered, Delivery, apply_batch
from worker import metrics

logger = logging.getLogger(__name__)
# It reports every connection that breaks while it is used; we report the outage.
logging.getLogger("psycopg").setLevel(logging.ERROR)

FIRST_DELAY_S = 0.05
LONGEST_DELAY_S = 2.0
REMINDER_S = 60.0
"""How often the log is reminded of an outage, and of its reason."""

Answer = TypeVar("Answer")


def apply_patiently(engine: Engine, deliveries: Sequence[Delivery]) -> list[Result | DeadLettered]:
    """Apply `deliveries`. Raises Reject, to give them back to the broker, if the worker stops before they are.

    A message that fails for a reason of its own is a dead letter by now. An exception, whatever it is, means that not
    even that could be written: to let it end the task would acknowledge the message and lose it. So all are waited out.
    """
    began_at = time.monotonic()
    answers = patiently(lambda: apply_batch(engine, deliveries), waits_for=Exception)
    metrics.count(deliveries, answers, took_s=time.monotonic() - began_at)
    for answer in answers:
        if isinstance(answer, DeadLettered):
            logger.warning("Dead letter %d, %s: %s", answer.letter_id, answer.code, answer.error)
    return answers


def patiently(attempt: Callable[[], Answer], *, waits_for: type[Exception]) -> Answer:
    """What `attempt` answers, once it does. Raises Reject if the worker stops before that."""
    delay_s = FIRST_DELAY_S
    began_at = reminded_at = time.monotonic()
    is_failing = False
    while True:
        try:
            answer = attempt()
        except waits_for as error:
            now = time.monotonic()
            if not is_failing or now - reminded_at > REMINDER_S:
                is_failing, reminded_at = True, now
                logger.warning("The database does not answer, the message waits: %s", describe(error))
            if _is_stopping():
                # Unacknowledged, it would wait for the visibility timeout; given back, the next worker takes it.
                raise Reject("the worker stops", requeue=True) from error
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        else:
            if is_failing:
                logger.warning("The database answers again after %.1f s", time.monotonic() - began_at)
            return answer


def _is_stopping() -> bool:
    # What is set is an exit code, and the good one is 0.
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))
