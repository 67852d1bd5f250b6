"""Another Celery application on the same broker: stock, with default names, and none of Holdfast's business.

Its own worker may repeat or lose its tasks when the broker is killed: Celery promises no more. Certain is that none of
them may become a dead letter of the ledger's, and that nobody may restore what its workers hold. A worker on some other
machine holds a few all the time, for longer than Holdfast's visibility timeout; its own is a day.
"""

from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread
from time import monotonic

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from tests.support import raw

TASKS = ("neighbour.render", "neighbour.archive")
HELD = tuple(f"neighbour-held-{number}" for number in range(10))
"""The delivery tags of what the worker elsewhere holds."""
HELD_FOR_S = 600

RAN_FILE = "neighbour.ran"
LAST = "last"
PAUSE_S = 0.05

WORKER = f"""
import os, sys
from celery import Celery
app = Celery("neighbour", broker=os.environ["HOLDFAST_BROKER_URL"])
app.conf.broker_transport_options = {{"visibility_timeout": 86_400}}

def run(number):
    with open("{RAN_FILE}", "a") as ran:
        ran.write(f"{{number}}\\n")

app.task(name="{TASKS[0]}")(run)
app.task(name="{TASKS[1]}", acks_late=True)(run)
app.worker_main(["worker", "--concurrency", "1", "--hostname", sys.argv[1]])
"""


class Neighbour(Thread):
    """Sends the tasks, until it is told to stop."""

    def __init__(self, broker_url: str, folder: Path) -> None:
        super().__init__(name="neighbour", daemon=True)
        self._celery = Celery(broker=broker_url, set_as_current=False)
        self._ran = folder / RAN_FILE
        self._stopping = Event()

    def run(self) -> None:
        """Send a task every now and then; what the broker does not take is forgotten."""
        for number in count():
            if self._stopping.wait(PAUSE_S):
                return
            with suppress(OperationalError, redis.RedisError, OSError):
                self._send(TASKS[number % 2], number)

    def finish(self, *, within_s: float) -> int:
        """Send one more; how many tasks have run, or none, if this one does not."""
        self.close()
        self._send(TASKS[0], LAST)
        deadline, pause = monotonic() + within_s, Event()
        while LAST not in (ran := self._has_run()):
            if monotonic() > deadline:
                return 0
            pause.wait(PAUSE_S)
        return len(ran)

    def close(self) -> None:
        """Send no more."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=30)

    def _send(self, task: str, number: object) -> None:
        # Not on a connection of kombu's pool, which is the ledger's producer's too.
        with self._celery.connection_for_write() as connection:
            self._celery.send_task(task, args=[number], connection=connection, retry=False)

    def _has_run(self) -> list[str]:
        return self._ran.read_text().split() if self._ran.exists() else []


def hold(broker: redis.Redis, broker_url: str) -> None:
    """Have the worker elsewhere hold `HELD`, as Celery's own transport does."""
    seconds, _ = broker.time()
    with Celery(broker=broker_url, set_as_current=False) as app:
        for tag in HELD:
            app.send_task(TASKS[1], args=[tag], queue="neighbour.staging")
            item = raw(broker.rpop("neighbour.staging"))
            broker.hset("unacked", tag, b'[%s, "", "celery"]' % item)
            broker.zadd("unacked_index", {tag: seconds - HELD_FOR_S})


def restored(broker: redis.Redis) -> list[str]:
    """The tags of what it does not hold any more."""
    held = set(map(raw, broker.hkeys("unacked"))) & set(map(raw, broker.zrange("unacked_index", 0, -1)))
    return [tag for tag in HELD if tag.encode() not in held]
