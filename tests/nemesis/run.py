"""One run of the nemesis: set up, send and strike, let it recover, and judge."""

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from signal import SIGTERM
from threading import Event
from time import monotonic
from typing import Literal

from ledger.working_set import MOST_DUE
from tests.nemesis import checker
from tests.nemesis.checker import Finding
from tests.nemesis.machine import Machine
from tests.nemesis.neighbour import Neighbour, hold
from tests.nemesis.producer import Producer
from tests.nemesis.workload import Message, Workload
from tests.support import sql
from worker.local.process import Process

DRAINED_WITHIN_S = 15.0
LATE_S = 30.0
READY_WITHIN_S = 60.0
ANSWERED_WITHIN_S = 15.0
NEIGHBOUR_WITHIN_S = 60.0
STOPPED_WITHIN_S = 10.0
DUE_WITHIN_S = 5.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Goal:
    """What a run has to reach before it may end; it gives up after three times `seconds`."""

    seconds: float
    messages: int
    kills: int
    patience: float = 1.0
    """By how much every time limit is longer, for a machine that has other things to do."""


@dataclass(slots=True)
class AnyReport(ABC):
    """What happened, and what was found, whatever the faults are."""

    seed: int
    goal: Goal
    folder: Path
    messages: int = 0
    """Without those of the opening."""
    sends: int = 0
    drained_after_s: float | None = None
    history: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    @abstractmethod
    def doubts(self) -> list[str]:
        """Why the run proves nothing, should it have found nothing."""

    @property
    @abstractmethod
    def faults_in_words(self) -> str:
        """How many faults there were, and what they met."""

    @property
    def verdict(self) -> Literal["PASS", "FAIL", "UNKNOWN"]:
        if self.findings:
            return "FAIL"
        return "UNKNOWN" if self.doubts else "PASS"

    def __str__(self) -> str:
        drained = "never" if self.drained_after_s is None else f"{self.drained_after_s:.1f} s after the last fault"
        summary = f"{self.verdict}: seed {self.seed}, {self.messages} messages sent {self.sends} times, "
        lines = [f"{summary}{self.faults_in_words}, drained {drained}", *self.measured()]
        if self.verdict != "PASS":
            lines += ["", *map(str, self.findings[:50]), *(f"UNKNOWN, as {doubt}" for doubt in self.doubts)]
            lines += ["", "What happened:", *self.history, "", f"Logs and data: {self.folder}"]
        return "\n".join(lines)

    def measured(self) -> list[str]:
        """More lines, of what was measured."""
        return []


@dataclass(slots=True)
class Report(AnyReport):
    """The same of processes that are killed and stopped, of locks, and of much that is due at once."""

    kills: int = 0
    has_done_all: bool = False
    """Whether every kind of fault happened."""
    kills_at_work: int = 0
    stops_at_work: int = 0
    locks_at_work: int = 0
    """How often messages waited for locked wallets when these were given up."""
    largest_flood: int = 0
    """How many reservations of one organization were made to expire at once."""
    absorbed: int = 0
    """Deliveries of what was committed already."""
    neighbour_tasks: int = 0
    """How many tasks of the other application ran; none, if it did not work until the end."""

    @property
    def doubts(self) -> list[str]:
        return [
            doubt
            for is_so, doubt in (
                (self.messages < self.goal.messages, f"{self.messages} messages of {self.goal.messages} were sent"),
                (self.kills < self.goal.kills, f"{self.kills} kills of {self.goal.kills} happened"),
                (not self.has_done_all, "some kind of fault did not happen"),
                (self.kills_at_work == 0, "no worker was killed at work"),
                (self.locks_at_work == 0, "no message waited for a locked wallet"),
                (self.largest_flood <= MOST_DUE, f"{self.largest_flood} reservations expired at once, a few"),
                (self.absorbed == 0, "no message was delivered again after its commit"),
                (self.neighbour_tasks == 0, "the other application did not work until the end"),
            )
            if is_so
        ]

    @property
    def faults_in_words(self) -> str:
        return (
            f"{self.kills} kills, {self.kills_at_work} of workers at work, {self.stops_at_work} workers stopped at "
            f"work, {self.locks_at_work} locked wallets waited for, {self.largest_flood} reservations expired at once, "
            f"{self.absorbed} deliveries of what was committed already, {self.neighbour_tasks} tasks of another "
            "application"
        )


def run(seed: int, goal: Goal, folder: Path, *, say: Callable[[str], None] = lambda _line: None) -> Report:
    """Run it in `folder`, which every account can enter. What it starts has ended when this returns or raises."""
    report = Report(seed, goal, folder)
    began_at = monotonic()

    def note(line: str) -> None:
        report.history.append(f"{monotonic() - began_at:8.2f} s  {line}")
        say(report.history[-1])

    with ExitStack() as cleanup:
        machine = cleanup.enter_context(Machine(folder, seed, note, patience=goal.patience))
        workload = Workload(seed, datetime.now(UTC))
        opening = workload.opening(), workload.flood()
        opened = sum(map(len, opening))
        # Faster than the goal needs, as nothing is sent while the broker is away.
        rate = 1.5 * goal.messages / goal.seconds
        producer = Producer(machine.services.broker.url, workload, seed=seed, messages_per_s=rate)
        cleanup.enter_context(closing(producer))
        neighbour = cleanup.enter_context(closing(Neighbour(machine.services.broker.url, folder)))
        try:
            hold(machine.broker, machine.services.broker.url)
            _open(machine, producer, opening, goal)
            note("everything runs")
            producer.start()
            neighbour.start()
            _strike(machine, producer, goal, report, opened=opened)
            note("no more faults")
            _recover(machine, producer, neighbour, workload, report, note)
        except Exception as error:  # noqa: BLE001 - what happened until then is worth a report
            report.findings.append(Finding("broken", "".join(traceback.format_exception(error))))
        after_opening = list(producer.sent.values())[opened:]
        report.messages, report.sends = len(after_opening), sum(sent.calls for sent in after_opening)
        report.kills, report.kills_at_work = machine.kills, machine.kills_at_work
        report.stops_at_work, report.has_done_all = machine.stops_at_work, machine.has_done_all
        report.locks_at_work, report.largest_flood = machine.locks_at_work, machine.largest_flood
    return report


def _open(machine: Machine, producer: Producer, opening: Iterable[list[Message]], goal: Goal) -> None:
    """Have applied what the rest builds upon, one part after the other."""
    for part in opening:
        producer.send(part)
        if not wait(machine.is_drained, READY_WITHIN_S * goal.patience):
            raise TimeoutError(f"the opening was not applied in time: {machine.waiting()}")


def _strike(machine: Machine, producer: Producer, goal: Goal, report: Report, *, opened: int) -> None:
    began_at, pause, random = monotonic(), Event(), Random(report.seed)

    def has_done_enough() -> bool:
        return (
            monotonic() > began_at + goal.seconds
            and machine.has_done_all
            and machine.kills >= goal.kills
            and machine.kills_at_work > 0
            and machine.stops_at_work > 0
            and machine.locks_at_work > 0
            and len(producer.sent) - opened >= goal.messages
            # A worker that could not store an answer stores none for ten seconds, so this one is a matter of luck.
            and checker.answered_again(list(producer.sent.values()), checker.answers(machine.broker)) > 0
        )

    while not (has_done_enough() or report.findings or monotonic() > began_at + 3 * goal.seconds * goal.patience):
        if producer.error is not None:
            raise producer.error
        machine.heal()
        machine.next_fault(producer)
        pause.wait(random.uniform(0.2, 2))
        report.findings += [Finding("liveness", what) for what in machine.held_up]
        report.findings += [Finding("process", f"it ended by itself: {who}") for who in machine.dead_by_themselves()]
    if report.findings:
        machine.heal(wait=True)
    else:
        machine.last_fault()


def _recover(
    machine: Machine,
    producer: Producer,
    neighbour: Neighbour,
    workload: Workload,
    report: Report,
    note: Callable[[str], None],
) -> None:
    """Wait for the end of it all, and look."""
    producer.finish()
    patience = report.goal.patience
    if wait(machine.is_drained, machine.well_since + DRAINED_WITHIN_S * patience - monotonic()):
        report.drained_after_s = monotonic() - machine.well_since
        note("drained")
    else:
        what = f"not drained {DRAINED_WITHIN_S * patience:g} s after the last fault: {machine.waiting()}"
        report.findings.append(Finding("drain", what))
        wait(machine.is_drained, LATE_S * patience)  # what is only late need not look lost
    _ask_again(machine, producer, report, note)
    machine.renew_neighbour()
    report.neighbour_tasks = neighbour.finish(within_s=NEIGHBOUR_WITHIN_S * patience)
    rest_s = max(0.0, (workload.last_anchor - datetime.now(UTC)).total_seconds())
    wait(lambda: datetime.now(UTC) > workload.last_anchor, rest_s + 1)
    [(due_until,)] = sql(machine.engine, "SELECT clock_timestamp()")
    if not wait(machine.is_nothing_due, DUE_WITHIN_S * patience):
        report.findings.append(Finding("drain", f"what is due is not posted within {DUE_WITHIN_S * patience:g} s"))
    if not any(finding.kind == "process" for finding in report.findings):
        report.findings += [Finding("process", f"it ended by itself: {who}") for who in machine.dead_by_themselves()]
    for beat in machine.beats:
        beat.kill()
    wait(machine.is_drained, DRAINED_WITHIN_S * patience)
    report.findings += [finding for worker in machine.workers for finding in terminate(worker, patience)]
    if not machine.is_drained():
        report.findings.append(Finding("drain", f"something was left behind: {machine.waiting()}"))
    seen = checker.observe(machine.engine, machine.broker, due_until)
    checker.observe_neighbour(seen, machine.broker)
    report.findings += checker.check(producer.sent.values(), seen)
    report.absorbed = checker.absorbed(producer.sent.values(), seen)


def _ask_again(machine: Machine, producer: Producer, report: Report, note: Callable[[str], None]) -> None:
    """As engines do: an answer is not stored if the broker is away just then."""
    unanswered = checker.unanswered(producer.sent.values(), checker.answers(machine.broker))
    producer.send(sent.message for sent in unanswered)
    note(f"asked again for the answers to {len(unanswered)} starts")
    if not wait(machine.is_drained, ANSWERED_WITHIN_S * report.goal.patience):
        report.findings.append(Finding("drain", f"not drained after asking again: {machine.waiting()}"))


def terminate(worker: Process, patience: float) -> list[Finding]:
    """Have a worker stop in order."""
    if not worker.is_running:
        return []
    os.kill(worker.pid, SIGTERM)
    if not wait(lambda: not worker.is_running, STOPPED_WITHIN_S * patience):
        return [Finding("process", f"{worker.name} does not stop within {STOPPED_WITHIN_S * patience:g} s")]
    assert worker._child is not None
    code = worker._child.returncode
    return [Finding("process", f"{worker.name} stopped with exit code {code}: {worker.last_words()}")] if code else []


def wait(is_so: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it is so within `timeout_s`."""
    deadline, pause = monotonic() + timeout_s, Event()
    while not is_so():
        if monotonic() > deadline:
            return False
        pause.wait(POLL_S)
    return True
