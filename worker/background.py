"""Work that must not delay the batches: messages that wait for their organization, and the runs of the scheduler.

Two threads of the worker do it, each with a database connection of its own. One checks twice a second for organizations
whose messages wait (see `ledger.waiting`). It applies them as soon as possible, and reports those that keep waiting.
The other one is patient: it takes the organizations for which PostgreSQL has taken too long, and does the runs of the
scheduler, step by step.

Guarantee: a message that waits is committed, so nothing is lost with these threads, and any worker continues with it. A
run that has not ended is lost with its worker, without harm: the next one does the same.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from psycopg.errors import QueryCanceled
from sqlalchemy import Engine

from ledger import clocks, scheduler, waiting
from ledger.database import LONG_PATIENCE_S
from ledger.faults import is_about_a_node, is_transient, may_be_local
from ledger.store import Applied, DeadLettered, apply_waiting, reason_to_wait
from ledger.waiting import MUCH_DUE, WaitingOrganization
from ledger.working_set import SHORT_PATIENCE_S, SHORTEST_PATIENCE_S
from worker import metrics, spans
from worker.answers import Answers, tell_dead_letter
from worker.outage import Outage
from worker.runs import Run, RunEnded

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5

SLICE_S = 0.25
"""How long to work for one organization, or on a run of the scheduler, before the others have their turn."""

LOOK_S = 1.0
"""After this long, a round over the organizations ends, and the next one begins with the locked wallets again."""

MOST_MESSAGES = 500
"""The most waiting messages that one transaction applies."""

FIRST_DELAY_S, LONGEST_DELAY_S, LONGEST_PATIENT_DELAY_S = 0.5, 1.0, 30.0
"""The pause of an organization after a failure. It doubles each time, up to a bound, which is larger for slow ones."""

TOLD_AFTER_S = 2.0
"""After how long the log names an organization that waits."""

MOST_NAMED = 10
"""The most organizations that one line of the log names."""

THIRD_CLOCK_EVERY_S = 60.0
"""How often the third clock is read."""

END_WITHIN_S = 0.5
"""How long a worker that ends waits for its threads. Unfinished work is rolled back, and another worker does it."""


class _Pace:
    """How many messages of one organization a thread tries at once, and when it tries again."""

    def __init__(self, longest_delay_s: float) -> None:
        self.limit = MOST_MESSAGES
        self.next_at = 0.0
        self._longest_delay_s = longest_delay_s
        self._delay_s = FIRST_DELAY_S

    def succeeded(self) -> None:
        self.limit = min(2 * self.limit, MOST_MESSAGES)
        self._delay_s = FIRST_DELAY_S

    def failed(self) -> None:
        """Try with fewer messages; with a single one, later."""
        if self.limit > 1:
            self.limit = max(1, self.limit // 8)
        else:
            self.pause()

    def pause(self) -> None:
        """Try later: the messages had no part in it."""
        self.next_at = time.monotonic() + self._delay_s
        self._delay_s = min(2 * self._delay_s, self._longest_delay_s)


class _Attempts:
    """The attempts to apply the waiting messages of one organization."""

    def __init__(self) -> None:
        self.in_hand = Lock()
        """Held by the thread that applies them."""
        self.pace, self.patient_pace = _Pace(LONGEST_DELAY_S), _Pace(LONGEST_PATIENT_DELAY_S)
        self.is_slow = False
        """Whether PostgreSQL took too long in the last attempt."""
        self.is_locked = False
        self.reason: str | None = None
        self.served_at = 0.0

    @property
    def turn(self) -> tuple[bool, bool, float]:
        """The sort key: the organization that costs least comes first."""
        return not self.is_locked, self.is_slow, self.served_at


class Background:
    """The threads. They retry what fails, until `stop`."""

    def __init__(self, engine: Engine, answers: Answers, outage: Outage) -> None:
        self._engine = engine
        self._answers = answers
        self._outage = outage
        self._stopped = Event()
        self._asked: SimpleQueue[Run] = SimpleQueue()
        self._run: Run | None = None
        self._steps: Iterator[int] = iter(())
        self._written = 0
        self._third_clock_at = 0.0
        self._attempts: dict[str, _Attempts] = {}
        self._known_to_wait: dict[str, float] = {}
        """The organizations that wait, and when that became known."""
        self._seen_at: dict[str, float] = {}
        self._told: set[str] = set()
        self._threads = [
            Thread(name=name, target=self._look_again_and_again, args=(name, look), daemon=True)
            for name, look in (("waiting", self._look), ("patient", self._look_patiently))
        ]

    def start(self) -> None:
        """Start the threads."""
        self._ask_third_clock()
        for thread in self._threads:
            thread.start()

    def ask(self, run: Run) -> None:
        """Ask for a run of the scheduler. Returns at once."""
        self._asked.put(run)

    def known_to_wait(self) -> frozenset[str]:
        """The organizations whose messages wait, as far as this worker knows."""
        return frozenset(self._known_to_wait.copy())

    def note(self, org_ids: Iterable[str]) -> None:
        """Record that messages of these organizations have just been kept waiting."""
        self._known_to_wait.update(dict.fromkeys(org_ids, time.monotonic()))

    def stop(self) -> None:
        """Begin no further work, and wait for the threads, at most END_WITHIN_S."""
        self._stopped.set()
        until = time.monotonic() + END_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _look_again_and_again(self, who: str, look: Callable[[], bool]) -> None:
        is_busy = False
        while not self._stopped.wait(0 if is_busy else LOOK_EVERY_S):
            try:
                is_busy = look()
            except Exception as error:
                is_busy = False
                if not is_transient(error):
                    logger.exception("Unexpected error; trying again")
                self._outage.failed(who, error)
            else:
                self._outage.answered(who)

    def _look(self) -> bool:
        """Apply some messages of every organization that waits. Returns whether there is more to do."""
        looked_at = time.monotonic()
        if looked_at >= self._third_clock_at:
            self._ask_third_clock()
        with self._outage.asking("waiting"), self._engine.connect() as connection:
            organizations = waiting.organizations(connection)
        self._know(organizations, looked_at)
        self._tell(organizations)
        attempts = {one.org_id: self._attempts.setdefault(one.org_id, _Attempts()) for one in organizations}
        # Trying a wallet that is still locked costs almost nothing.
        in_order = sorted(attempts, key=lambda org_id: attempts[org_id].turn)
        is_busy = False
        for org_id in in_order:
            if time.monotonic() > looked_at + LOOK_S:
                return True
            one = attempts[org_id]
            # When many organizations were put aside at once, most have no fault, and must not wait for those that have.
            patience_s = SHORTEST_PATIENCE_S if one.reason is None else SHORT_PATIENCE_S
            is_busy |= self._go_on_with(org_id, one, one.pace, patience_s)
        return is_busy

    def _look_patiently(self) -> bool:
        """Do some of the work that may take long. Returns whether there is more to do."""
        is_busy = False
        for org_id, attempts in self._attempts.copy().items():
            if attempts.is_slow:
                is_busy |= self._go_on_with(org_id, attempts, attempts.patient_pace, LONG_PATIENCE_S)
        return self._go_on_with_run() or is_busy

    def _ask_third_clock(self) -> None:
        clocks.heard(self._answers.server_time())
        self._third_clock_at = time.monotonic() + THIRD_CLOCK_EVERY_S

    def _know(self, organizations: Sequence[WaitingOrganization], looked_at: float) -> None:
        now_waiting = {organization.org_id for organization in organizations}
        for org_id, noted_at in self._known_to_wait.copy().items():
            if org_id not in now_waiting and noted_at < looked_at:
                self._known_to_wait.pop(org_id, None)
        self.note(now_waiting)

    def _go_on_with(self, org_id: str, attempts: _Attempts, pace: _Pace, patience_s: float) -> bool:
        """Apply waiting messages for a while. Returns whether more of them may be applied now."""
        if not attempts.in_hand.acquire(blocking=False):
            return False
        try:
            return self._apply_for_a_while(org_id, attempts, pace, patience_s)
        finally:
            attempts.in_hand.release()

    def _apply_for_a_while(self, org_id: str, attempts: _Attempts, pace: _Pace, patience_s: float) -> bool:
        for _ in _for_a_while(self._stopped.is_set):
            if time.monotonic() < pace.next_at:
                return False
            attempts.served_at, began_at = time.monotonic(), time.time()
            try:
                applied = apply_waiting(self._engine, org_id, limit=pace.limit, patience_s=patience_s)
            except Exception as error:
                if not is_transient(error):
                    logger.exception("Unexpected error; the organization %s waits", org_id)
                elif not may_be_local(error):
                    raise
                if pace is attempts.pace:
                    attempts.is_slow = isinstance(error, QueryCanceled)
                attempts.reason, attempts.is_locked = reason_to_wait(error), False
                if is_about_a_node(error):
                    pace.pause()
                else:
                    pace.failed()
                return True
            self._applied(applied)
            spans.waited([delivery.traceparent for delivery, _ in applied.answers], began_at=began_at)
            attempts.reason = applied.problem
            attempts.is_locked = applied.problem not in (None, MUCH_DUE)
            if attempts.is_locked:
                pace.limit = 1  # taking a message costs a write
                return False
            pace.succeeded()
            attempts.is_slow &= pace is not attempts.pace
            if not applied.answers and applied.problem is None:
                self._known_to_wait.pop(org_id, None)
                return False
        return True

    def _applied(self, applied: Applied) -> None:
        for delivery, answer in applied.answers:
            if isinstance(answer, DeadLettered):
                tell_dead_letter(delivery, answer)
        self._answers.store([(delivery.answer_to, answer) for delivery, answer in applied.answers])
        metrics.count_answers([(delivery.task, answer) for delivery, answer in applied.answers])

    def _go_on_with_run(self) -> bool:
        """Do some steps of a run of the scheduler. Returns whether there may be more."""
        for _ in _for_a_while(self._stopped.is_set):
            if self._run is None:
                try:
                    self._run = self._asked.get_nowait()
                except Empty:
                    return False
                self._steps, self._written = scheduler.steps(self._engine, self._run.task), 0
            try:
                self._written += next(self._steps)
            except StopIteration:
                ended = RunEnded(self._written)
                self._answers.store([(self._run.answer_to, ended)])
                metrics.count_answers([(self._run.task, ended)])
                self._run = None
            except Exception:
                self._steps = scheduler.steps(self._engine, self._run.task)  # it begins again
                raise
        return True

    def _tell(self, organizations: list[WaitingOrganization]) -> None:
        """Report in the log and in the metrics which organizations wait, since when, and why."""
        now = time.monotonic()
        waiting_ids = {organization.org_id for organization in organizations}
        for org_id in self._seen_at.keys() - waiting_ids:
            if org_id in self._told:
                logger.warning("%s: nothing waits any more, after %.1f s", _named(org_id), now - self._seen_at[org_id])
            del self._seen_at[org_id]
            self._attempts.pop(org_id, None)
        self._told &= waiting_ids
        reasons = {organization.org_id: self._reason(organization) for organization in organizations}
        for org_id in waiting_ids:
            self._seen_at.setdefault(org_id, now)
        new = sorted(org_id for org_id in waiting_ids - self._told if now - self._seen_at[org_id] > TOLD_AFTER_S)
        if new:
            named = "; ".join(f"{_named(org_id)}: {reasons[org_id]}" for org_id in new[:MOST_NAMED])
            others = f"; and {len(new) - MOST_NAMED} others" if len(new) > MOST_NAMED else ""
            logger.warning("Messages wait for their organizations. %s%s", named, others)
            self._told |= set(new)
        metrics.tell_who_waits(
            [
                (organization.org_id, reasons[organization.org_id], organization.since.timestamp())
                for organization in sorted(organizations, key=lambda organization: organization.since)
            ]
        )

    def _reason(self, organization: WaitingOrganization) -> str:
        attempts = self._attempts.get(organization.org_id)
        return organization.reason if attempts is None or attempts.reason is None else attempts.reason


def _named(org_id: str) -> str:
    return "Messages that name no organization" if org_id == waiting.NOBODY else f"The organization {org_id}"


def _for_a_while(is_stopped: Callable[[], bool]) -> Iterator[None]:
    until = time.monotonic() + SLICE_S
    while not is_stopped() and time.monotonic() < until:
        yield
