"""Two workers, two beats, PostgreSQL and a broker, all of them the nemesis's own, and what it does to them.

Nothing is done to the worker of the other application; it is started again if it ends.
"""

import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Event
from time import monotonic
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from holdfast_client.broker import QUEUE
from ledger import migrations
from ledger.database import connect
from ledger.roles import WORKER as WORKER_ROLE
from tests import citus
from tests.installation import Fork, environment
from tests.nemesis import neighbour
from tests.nemesis.producer import Producer
from tests.nemesis.workload import FLOOD_ORG_ID, Message
from tests.support import as_role, raw, sql
from worker.local.embedded import Embedded
from worker.local.process import Process
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
import datetime
from worker import celery
for entry in celery.conf.beat_schedule.values():
    entry["schedule"].run_every = datetime.timedelta(seconds=1)
celery.Beat(loglevel="INFO").run()
"""

DECK = (
    *["kill_worker"] * 5,
    *["kill_both_workers", "stop_and_continue_worker", "stop_and_continue_worker"],
    *["crash_postgres"] * 2,
    *["kill_broker"] * 2,
    *["lock_wallets"] * 2,
    *["kill_beat", "expire_flood"],
)
"""What happens, in a random order, before it happens again. In the first round, everything happens once."""

HELD = (1, 1, 3, 10)
"""How many messages a worker is to hold when it is hit; then how much longer to wait."""
MOMENTS_S = (0, 0, 0.001, 0.002, 0.005, 0.01)
BUSY_WITHIN_S = 2.0
POLL_S = 0.0005

WAITING = "waiting_messages"
LOCKED_WALLETS = 5
OTHERS = 10
"""How many messages of other organizations, at least, have to be applied while some wallets are locked."""
RECOVERED_WITHIN_S, APPLIED_WITHIN_S, LOOK_S = 15.0, 5.0, 0.02
LOCK_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class _Lock:
    """Some wallets that are locked in a session of ours."""

    connection: Connection
    org_ids: frozenset[str]
    until: float


class Machine:
    """The system, from its start to its end, as a context manager."""

    def __init__(self, folder: Path, seed: int, note: Callable[[str], None], *, patience: float) -> None:
        self.kills = 0
        """How often a worker, the broker or PostgreSQL was killed; a beat does not count."""
        self.kills_at_work = 0
        """How often it was a worker that held messages."""
        self.stops_at_work = 0
        self.locks_at_work = 0
        """How often messages waited for the wallets that were locked, when they were given up."""
        self.largest_flood = 0
        """The most reservations of one organization that were made to expire at once."""
        self.held_up: list[str] = []
        """Who had to wait while the wallets of others were locked."""
        self.well_since = monotonic()
        """When the last fault was over."""
        self._folder = folder
        self._order = Random(seed)
        self._random = Random(seed + 1)
        self._note = note
        self._patience = patience
        self._cleanup = ExitStack()
        self._deck: list[str] = []
        self._decks = 0
        self._stopped: tuple[Process, float] | None = None
        self._lock: _Lock | None = None
        self._found_dead: list[str] = []
        self._never = Event()
        self.services = Embedded(folder, durable=False)
        self._cluster = citus.cluster()
        """Somebody else's, where it is the database."""
        self.workers: list[Process] = []
        self.beats: list[Process] = []

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.enter_context(self.services)
            self.database_url = self.services.database_url
            if self._cluster is not None:
                cleanup.callback(self._cluster.dispose)
                own = citus.new_database(self._cluster, "nemesis", migrated=False)
                self.database_url = cleanup.enter_context(own)
            self.engine = connect(self.database_url)
            cleanup.callback(self.engine.dispose)
            migrations.upgrade(self.engine)
            migrations.grant(self.engine)
            self.broker = redis.Redis.from_url(self.services.broker.url, retry=Retry(NoBackoff(), 0))
            cleanup.callback(self.broker.close)
            for number in (1, 2):
                self.workers.append(self._child(cleanup, f"worker-{number}", WORKER))
                self.beats.append(self._child(cleanup, f"beat-{number}", BEAT))
            self._neighbour = self._child(cleanup, "neighbour", neighbour.WORKER)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.connection.close()
        self._cleanup.close()

    def _child(self, cleanup: ExitStack, name: str, script: str) -> Process:
        url = as_role(WORKER_ROLE, self.database_url)
        env = environment(HOLDFAST_DATABASE_URL=url, HOLDFAST_BROKER_URL=self.services.broker.url)
        # SIGKILL, also when we are killed ourselves: it may be stopped just then, and would not hear a SIGTERM.
        process = Fork(
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

    def waiting(self) -> dict[str, int | None]:
        """How many messages are where: first in the broker, at one instant, then in the database; None: it is down."""
        with self.broker.pipeline(transaction=True) as pipe:
            pipe.llen(QUEUE)
            pipe.hlen(UNACKED)
            pipe.zcard(UNACKED_INDEX)
            found = dict(zip((QUEUE, UNACKED, UNACKED_INDEX), pipe.execute(), strict=True))
        try:
            [(found[WAITING],)] = sql(self.engine, f"SELECT count(*) FROM {WAITING}")
        except DBAPIError:
            found[WAITING] = None
        return found

    def is_drained(self) -> bool:
        return all(messages == 0 for messages in self.waiting().values())

    def is_nothing_due(self) -> bool:
        """Whether no period and no expiry waits to be posted."""
        [(due,)] = sql(
            self.engine,
            "SELECT count(*) FROM wallets WHERE least(next_period_at, next_hold_expiry, "
            "next_ending_at, scheduled_at) <= clock_timestamp()",
        )
        return bool(due == 0)

    def held_by(self, pid: int) -> int:
        """How many messages the worker with this process id holds; 0 if the broker cannot say."""
        with suppress(redis.RedisError):
            return sum(raw(tag).startswith(b"%d-" % pid) for tag in self.broker.hkeys(UNACKED))
        return 0

    def dead_by_themselves(self) -> list[str]:
        """Who is not there, although nobody has killed it."""
        children = [*self.workers, *self.beats, self.services.postgres, self.services.broker]
        return self._found_dead + [_end_of(child) for child in children if not child.is_running]

    # Faults. Each ends with everything running again, but a worker may be stopped, and wallets locked, for a while.

    def next_fault(self, producer: Producer) -> None:
        """One fault of the deck."""
        if not self._deck:
            deck = DECK if self._decks else tuple(dict.fromkeys(DECK))
            self._deck = self._order.sample(deck, len(deck))
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
            case "lock_wallets":
                self._lock_wallets(producer)
            case "expire_flood":
                self._expire_flood()
        self.well_since = monotonic()

    def last_fault(self) -> None:
        """Both workers at work, when nobody is stopped and nothing is locked any more."""
        self.heal(wait=True)
        self._kill_workers(self._awake)
        self.well_since = monotonic()

    @property
    def has_done_all(self) -> bool:
        """Whether every kind of fault has happened."""
        return self._decks > 1 or (self._decks == 1 and not self._deck)

    def renew_neighbour(self) -> None:
        """Have a new worker of the neighbour's: Celery's own may hang for good once it has lost its connection."""
        self._neighbour.kill()
        self._neighbour.start()

    def heal(self, *, wait: bool = False) -> None:
        """End what was to last for a while, if it has lasted long enough, or when it has."""
        if not self._neighbour.is_running:  # Celery's own worker does not always survive the loss of its connection
            self._note(f"the neighbour is started again, which ended: {self._neighbour.last_words()[:200]}")
            self._neighbour.start()
        if self._stopped is not None and self._is_over(self._stopped[1], wait=wait):
            worker, _ = self._stopped
            self._stopped = None
            os.kill(worker.pid, signal.SIGCONT)
            self.well_since = monotonic()
            self._note(f"{worker.name} goes on")
        if self._lock is not None and self._is_over(self._lock.until, wait=wait):
            lock, self._lock = self._lock, None
            self._give_up(lock)
            self.well_since = monotonic()

    def _is_over(self, until: float, *, wait: bool) -> bool:
        if wait:
            self._never.wait(max(0, until - monotonic()))
        return wait or monotonic() >= until

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
        if self._cluster is not None:
            self._end_sessions(self._cluster)
            return
        down_s = self._random.uniform(0, 2)
        self.services.postgres.stop("immediate")
        self.engine.dispose()
        self.kills += 1
        self._note(f"PostgreSQL ended as by a crash, for {down_s:.1f} s")
        if self._random.random() < 0.5:
            self._kill_workers([self._random.choice(self._awake)])
        self._never.wait(down_s)
        self.services.postgres.start()

    def _end_sessions(self, cluster: citus.Cluster) -> None:
        """As when one server of the cluster crashes, which is not ours and has other databases."""
        place = self._random.randrange(len(cluster.nodes) + 1)
        admin = cluster.administrator_of(place, "postgres")
        [(ended,)] = sql(admin, _END_SESSIONS, name=self.engine.url.database)
        admin.dispose()
        self.engine.dispose()
        self.kills += 1
        self._note(f"{ended} sessions of {'node ' + str(place) if place else 'the coordinator'} ended")

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

    def _lock_wallets(self, producer: Producer) -> None:
        if self._lock is not None:
            return
        connection, until = self.engine.connect(), monotonic() + LOCK_TIMEOUT_S
        some: dict[str, str | int] = {"salt": str(self._random.random()), "most": LOCKED_WALLETS}
        while not (locked := _lock_some(connection, some)) and monotonic() < until:
            self.heal(wait=True)  # a worker that is stopped may have locked them all
            self._never.wait(LOOK_S)
        before = len(producer.sent)
        self._lock = _Lock(connection, locked, monotonic())
        others = "a worker is stopped: others may wait"
        if self._stopped is None:  # it may have locked what it likes
            others = self._watch_others(producer, before)
        lock_s = self._random.uniform(2, 4)
        self._lock = _Lock(connection, locked, monotonic() + lock_s)
        self._note(f"{', '.join(sorted(locked))} locked for {lock_s:.1f} s; {others}")

    def _watch_others(self, producer: Producer, before: int) -> str:
        """Nothing but the lock is the matter: others must not notice.

        How soon the workers are back from the fault before is another question, so the time counts from the first sign
        of life.
        """
        assert self._lock is not None
        began_at, locked = monotonic(), self._lock.org_ids
        until = began_at + RECOVERED_WITHIN_S * self._patience
        finishes: list[Message] = []
        while len(finishes) < OTHERS:
            if monotonic() > until or producer.error is not None:
                return "too little was sent to see whether others wait"
            self._never.wait(LOOK_S)
            finishes = [
                one.message
                for one in list(producer.sent.values())[before:]
                if (one.message.task, one.message.fate) == ("workflow.finish", "applied")
                and one.confirmed
                and one.message.org_id not in locked
            ]
        applied, is_alive = 0, False
        while (applied := self._count_applied(finishes)) < len(finishes):
            if applied > 0 and not is_alive:
                is_alive, until = True, monotonic() + APPLIED_WITHIN_S * self._patience
            if monotonic() > until:
                what = f"of {len(finishes)} messages of others only {applied} were applied"
                self.held_up.append(f"while {', '.join(sorted(locked))} were locked, {what}")
                return what
            self._never.wait(LOOK_S)
        return f"{applied} messages of others were applied within {monotonic() - began_at:.1f} s"

    def _count_applied(self, finishes: Collection[Message]) -> int:
        org_ids, workflow_ids = zip(*[(one.org_id, one.fields["workflow_id"]) for one in finishes], strict=True)
        [(applied,)] = sql(self.engine, _APPLIED, org_ids=list(org_ids), workflow_ids=list(workflow_ids))
        return int(applied)

    def _give_up(self, lock: _Lock) -> None:
        names = ", ".join(sorted(lock.org_ids))
        with lock.connection:
            try:
                waiting = lock.connection.execute(_WAITING_FOR, {"org_ids": list(lock.org_ids)}).scalar_one()
            except DBAPIError:
                self._note(f"{names} locked no more, since PostgreSQL ended")
                return
        self.locks_at_work += waiting > 0
        self._note(f"{names} locked no more; {waiting} messages waited")

    def _expire_flood(self) -> None:
        self.heal(wait=True)  # a worker that is stopped may have locked the wallet
        expired = expire_all(self.engine, FLOOD_ORG_ID)
        self.largest_flood = max(self.largest_flood, expired)
        self._note(f"{expired} reservations of {FLOOD_ORG_ID} expire at once")

    def _moment_without_postponed_writes(self) -> float:
        """The kernel has all that the broker has confirmed before this moment."""
        for _ in range(10_000):
            asked_at = monotonic()
            if self.broker.info("persistence")["aof_buffer_length"] == 0:
                return asked_at
        raise TimeoutError("the broker does not write its append-only file")

    def _wait_until_busy(self, worker: Process) -> None:
        """Wait until it holds some messages, and then a moment more, so that it is hit in every phase of a batch."""
        at_least, began_at = self._random.choice(HELD), monotonic()
        while self.services.broker.is_running and monotonic() < began_at + BUSY_WITHIN_S * self._patience:
            held = self.held_by(worker.pid)
            if held >= at_least or (held > 0 and monotonic() > began_at + BUSY_WITHIN_S):
                break
            self._never.wait(POLL_S)
        self._never.wait(self._random.choice(MOMENTS_S))


_SOME = text("SELECT org_id FROM wallets WHERE org_id ~ '^(ample|scarce)-' ORDER BY md5(org_id || :salt) LIMIT :most")
_LOCK = text("SELECT org_id FROM wallets WHERE org_id = :org_id FOR UPDATE SKIP LOCKED")
_END_SESSIONS = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name"


def _lock_some(connection: Connection, some: dict[str, str | int]) -> frozenset[str]:
    """Lock some wallets that nobody has locked, one by one: they may be in several shards."""
    found = connection.scalars(_SOME, some).all()
    return frozenset(org_id for each in found for org_id in connection.scalars(_LOCK, {"org_id": each}))


_WAITING_FOR = text(f"SELECT count(*) FROM {WAITING} WHERE org_id = ANY(:org_ids)")
_APPLIED = (
    "SELECT count(*) FROM workflows JOIN unnest(CAST(:org_ids AS text[]), CAST(:workflow_ids AS text[])) "
    "AS finished (org_id, workflow_id) USING (org_id, workflow_id) WHERE finish_credits IS NOT NULL"
)


def expire_all(engine: Engine, org_id: str) -> int:
    """Have all open reservations of `org_id` expire a moment ago, as if time had passed; returns how many."""
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'"))
        lock = text("SELECT clock_timestamp() FROM wallets WHERE org_id = :org_id FOR UPDATE")
        now = connection.execute(lock, {"org_id": org_id}).scalar_one()
        expired = connection.execute(
            text("UPDATE workflows SET expires_at = :now WHERE org_id = :org_id AND state = 'reserved'"),
            {"org_id": org_id, "now": now},
        )
        connection.execute(
            text("UPDATE wallets SET next_hold_expiry = :now WHERE org_id = :org_id"), {"org_id": org_id, "now": now}
        )
        return int(expired.rowcount)


def _end_of(process: Process) -> str:
    return f"{process.name}: {process.last_words()[:500]}"
