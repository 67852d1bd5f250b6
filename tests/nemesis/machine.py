"""Two workers, two beats, PostgreSQL and a broker, all of them the nemesis's own, and what it does to them.

Nothing is done to the worker of the other application.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from threading import Event
from time import monotonic
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ledger import migrations
from ledger.database import connect
from tests.acceptance.installation import environment
from tests.nemesis import neighbour
from tests.nemesis.producer import Producer
from tests.support import sql
from worker.broker import QUEUE
from worker.embedded import Embedded
from worker.process import Process
from worker.transport import UNACKED, UNACKED_INDEX

VISIBILITY_TIMEOUT_S = 3

# The worker as it is, except that its minute lasts three seconds, and that what it holds says who holds it.
WORKER = f"""
import os, sys, uuid
from worker import celery, transport
transport.uuid4 = lambda: f"{{os.getpid()}}-{{uuid.uuid4()}}"
celery.conf.broker_transport_options["visibility_timeout"] = {VISIBILITY_TIMEOUT_S}
celery.worker_main(["worker", "--hostname", sys.argv[1]])
"""

# The beat as it is, except that its minute lasts a second.
BEAT = """
from worker import celery
for entry in celery.conf.beat_schedule.values():
    entry["schedule"] = 1.0
celery.Beat(loglevel="INFO").run()
"""

DECK = (
    *["kill_worker"] * 5,
    *["kill_both_workers", "stop_and_continue_worker", "stop_and_continue_worker"],
    *["crash_postgres"] * 2,
    *["kill_broker"] * 2,
    "kill_beat",
)
"""What happens, in a random order, before it happens again."""

HELD = (1, 1, 3, 10)
"""How many messages a worker is to hold when it is hit; then how much longer to wait."""
MOMENTS_S = (0, 0, 0.001, 0.002, 0.005, 0.01)
BUSY_WITHIN_S = 2.0
POLL_S = 0.0005


class Machine:
    """The system, from its start to its end, as a context manager."""

    def __init__(self, folder: Path, seed: int, note: Callable[[str], None], *, patience: float) -> None:
        self.kills = 0
        """How often a worker, the broker or PostgreSQL was killed; a beat does not count."""
        self.kills_at_work = 0
        """How often it was a worker that held messages."""
        self.stops_at_work = 0
        self.well_since = monotonic()
        """When the last fault was over."""
        self._folder = folder
        self._order = Random(seed)
        self._random = Random(seed + 1)
        self._note = note
        self._busy_within_s = BUSY_WITHIN_S * patience
        self._cleanup = ExitStack()
        self._deck: list[str] = []
        self._decks = 0
        self._stopped: tuple[Process, float] | None = None
        self._found_dead: list[str] = []
        self._never = Event()
        self.services = Embedded(folder, durable=False)
        self.workers: list[Process] = []
        self.beats: list[Process] = []

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.enter_context(self.services)
            self.engine = connect(self.services.database_url)
            cleanup.callback(self.engine.dispose)
            migrations.upgrade(self.engine)
            self.broker = redis.Redis.from_url(self.services.broker_url, retry=Retry(NoBackoff(), 0))
            cleanup.callback(self.broker.close)
            for number in (1, 2):
                self.workers.append(self._child(cleanup, f"worker-{number}", WORKER))
                self.beats.append(self._child(cleanup, f"beat-{number}", BEAT))
            self._child(cleanup, "neighbour", neighbour.WORKER)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _child(self, cleanup: ExitStack, name: str, script: str) -> Process:
        env = environment(
            HOLDFAST_DATABASE_URL=self.services.database_url, HOLDFAST_BROKER_URL=self.services.broker_url
        )
        # SIGKILL, also when we are killed ourselves: it may be stopped just then, and would not hear a SIGTERM.
        process = Process(
            name,
            [sys.executable, "-c", script, f"{name}@nemesis"],
            self._folder,
            env=env,
            cwd=self._folder,
            stop_signal=signal.SIGKILL,
        )
        cleanup.callback(process.kill)
        process.start()
        return process

    # What can be seen from outside

    def waiting(self) -> dict[str, int]:
        """How many messages are where, at one instant."""
        with self.broker.pipeline(transaction=True) as pipe:
            pipe.llen(QUEUE).hlen(UNACKED).zcard(UNACKED_INDEX)
            return dict(zip((QUEUE, UNACKED, UNACKED_INDEX), pipe.execute(), strict=True))

    def is_drained(self) -> bool:
        return not any(self.waiting().values())

    def is_nothing_due(self) -> bool:
        """Whether no period and no expiry waits to be posted."""
        [(due,)] = sql(
            self.engine,
            "SELECT count(*) FROM wallets WHERE least(next_period_at, next_hold_expiry) <= clock_timestamp()",
        )
        return due == 0

    def held_by(self, pid: int) -> int:
        """How many messages the worker with this process id holds; 0 if the broker cannot say."""
        with suppress(redis.RedisError):
            return sum(tag.startswith(b"%d-" % pid) for tag in self.broker.hkeys(UNACKED))  # type: ignore[union-attr]
        return 0

    def dead_by_themselves(self) -> list[str]:
        """Who is not there, although nobody has killed it."""
        children = [*self.workers, *self.beats, self.services.postgres, self.services.broker]
        return self._found_dead + [_end_of(child) for child in children if not child.is_running]

    # Faults. Each ends with everything running again, except for one worker that may be stopped for a while.

    def next_fault(self, producer: Producer) -> None:
        """One fault of the deck."""
        if not self._deck:
            self._deck = self._order.sample(DECK, len(DECK))
            self._decks += 1
        match self._deck.pop():
            case "kill_worker":
                self._kill_workers([self._random.choice(self._awake)])
            case "kill_both_workers":
                self._kill_workers(self._awake)
            case "stop_and_continue_worker":
                self._stop_worker()
            case "crash_postgres":
                self._crash_postgres()
            case "kill_broker":
                self._kill_broker(producer)
            case "kill_beat":
                self._kill_beat()
        self.well_since = monotonic()

    def last_fault(self) -> None:
        """Both workers at work, when nobody is stopped any more."""
        self.heal(wait=True)
        self._kill_workers(self._awake)
        self.well_since = monotonic()

    @property
    def has_done_all(self) -> bool:
        """Whether everything in the deck has happened."""
        return self._decks > 1 or (self._decks == 1 and not self._deck)

    def heal(self, *, wait: bool = False) -> None:
        """Continue the worker that was stopped, if it was stopped for long enough, or when it was."""
        if self._stopped is None:
            return
        worker, until = self._stopped
        if wait:
            self._never.wait(max(0, until - monotonic()))
        if wait or monotonic() >= until:
            self._stopped = None
            os.kill(worker.pid, signal.SIGCONT)
            self.well_since = monotonic()
            self._note(f"{worker.name} goes on")

    @property
    def _awake(self) -> list[Process]:
        return [worker for worker in self.workers if self._stopped is None or self._stopped[0] is not worker]

    def _kill_workers(self, victims: list[Process]) -> None:
        for worker in victims:
            self._wait_until_busy(worker)
            pid = worker.pid
            if not worker.is_running:
                self._found_dead.append(_end_of(worker))
                continue
            os.kill(pid, signal.SIGKILL)
            worker.kill()  # and wait for its end
            held = self.held_by(pid)
            self.kills += 1
            self.kills_at_work += held > 0
            self._note(f"SIGKILL {worker.name}, which held {held} messages")
        for worker in victims:
            worker.start()

    def _stop_worker(self) -> None:
        if self._stopped is not None:
            return
        worker = self._random.choice(self.workers)
        self._wait_until_busy(worker)
        os.kill(worker.pid, signal.SIGSTOP)
        stop_s = VISIBILITY_TIMEOUT_S + self._random.uniform(1.5, 3)
        self._stopped = worker, monotonic() + stop_s
        held = self.held_by(worker.pid)
        self.stops_at_work += held > 0
        self._note(f"SIGSTOP {worker.name} for {stop_s:.1f} s, which held {held} messages")

    def _crash_postgres(self) -> None:
        down_s = self._random.uniform(0, 2)
        self.services.postgres.stop("immediate")
        self.engine.dispose()
        self.kills += 1
        self._note(f"PostgreSQL ended as by a crash, for {down_s:.1f} s")
        if self._random.random() < 0.5:
            self._kill_workers([self._random.choice(self._awake)])
        self._never.wait(down_s)
        self.services.postgres.start()

    def _kill_broker(self, producer: Producer) -> None:
        down_s = self._random.uniform(0, 1)
        knew_all_until = self._moment_without_postponed_writes()
        self.services.broker.kill()
        producer.broker_was_killed(knew_all_until=knew_all_until)
        self.kills += 1
        self._note(f"SIGKILL broker, for {down_s:.1f} s")
        if self._random.random() < 0.3:
            self._kill_workers([self._random.choice(self._awake)])
        self._never.wait(down_s)
        self.services.broker.start()

    def _kill_beat(self) -> None:
        beat = self._random.choice(self.beats)
        beat.kill()
        beat.start()
        self._note(f"SIGKILL {beat.name}")

    def _moment_without_postponed_writes(self) -> float:
        """The kernel has all that the broker has confirmed before this moment."""
        for _ in range(10_000):
            asked_at = monotonic()
            if self.broker.info("persistence")["aof_buffer_length"] == 0:  # type: ignore[index]
                return asked_at
        raise TimeoutError("the broker does not write its append-only file")

    def _wait_until_busy(self, worker: Process) -> None:
        """Wait until it holds some messages, and then a moment more, so that it is hit in every phase of a batch."""
        at_least, began_at = self._random.choice(HELD), monotonic()
        while self.services.broker.is_running and monotonic() < began_at + self._busy_within_s:
            held = self.held_by(worker.pid)
            if held >= at_least or (held > 0 and monotonic() > began_at + BUSY_WITHIN_S):
                break
            self._never.wait(POLL_S)
        self._never.wait(self._random.choice(MOMENTS_S))


def _end_of(process: Process) -> str:
    return f"{process.name}: {process.last_words()[:500]}"
