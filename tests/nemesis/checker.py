"""What must be there when all is over, computed from the set of messages that were sent; and whether it is.

Written without the ledger's rules. What was sent is enough to know every organization's balance, and for each message
what has to be found of it: an event, a line in its workflow, or one dead letter. What depends on the order (whether a
start was rejected, whether a bill was refused) is read from the database, and then held to its consequences.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import redis
from sqlalchemy import Engine

from holdfast_client.messages import MESSAGES, WalletMessage
from ledger import audit
from tests.nemesis import neighbour
from tests.nemesis.producer import Sent
from tests.nemesis.workload import FLOOD_HOLD_S, SHORT_HOLD_S, Message, marks
from tests.support import sql

ANSWERS = {
    "reserved": ("reserved", None),
    "insufficient_credits": ("rejected", "insufficient_credits"),
    "already_ended": ("ignored", "already_ended"),
}
ENDS = ("finish", "cancel", "fail")
EXPIRING_S = (SHORT_HOLD_S, FLOOD_HOLD_S)
IN_PLENTY = ("ample", "flood")
FIRST_PERIOD = "subscription:plan:0"
ANSWER_KEY = "celery-task-meta-"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be."""

    kind: str
    """lost, applied twice, balance, dead letter, answer, invariant; neighbour, if another application came to harm;
    process, if one ended or did not; drain; liveness, if somebody waited for somebody else; broken."""
    what: str
    numbers: tuple[int, ...] = ()
    """The messages that it is about."""

    def __str__(self) -> str:
        about = f" (nemesis-{', nemesis-'.join(map(str, self.numbers))})" if self.numbers else ""
        return f"{self.kind}: {self.what}{about}"


@dataclass(frozen=True, slots=True)
class Letter:
    code: str
    attempts: int
    status: str


@dataclass(slots=True)
class Observed:
    """What the database and the broker hold."""

    due_until: datetime
    until: datetime
    """When it was read."""
    wallets: dict[str, dict[str, Any]] = field(default_factory=dict)
    workflows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    posted: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    """By organization, kind and message id: the terms."""
    events: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    """By organization and idempotency key: the credits."""
    causes: dict[tuple[str, str], int] = field(default_factory=dict)
    """By organization and idempotency key: the number of the message, if it was one."""
    letters: dict[int, list[Letter]] = field(default_factory=lambda: defaultdict(list))
    """By the number of the message."""
    strange_letters: list[str] = field(default_factory=list)
    taken_from_neighbour: list[str] = field(default_factory=list)
    """What the ledger took, or somebody restored, and is another application's."""
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task id, as a Celery client reads them."""
    invariants: list[str] = field(default_factory=list)
    """What `holdfast verify` found."""


def observe(engine: Engine, store: redis.Redis, due_until: datetime) -> Observed:
    """Read it all. Nobody writes any more, and what time alone does was done until `due_until`.

    `store`: where the answers are.
    """
    [(until,)] = sql(engine, "SELECT clock_timestamp()")
    seen = Observed(due_until, until)
    for org_id, row in sql(engine, "SELECT org_id, to_jsonb(wallets) FROM wallets"):
        seen.wallets[org_id] = row
    for org_id, workflow_id, row in sql(engine, "SELECT org_id, workflow_id, to_jsonb(workflows) FROM workflows"):
        seen.workflows[org_id, workflow_id] = row
    for org_id, kind, message_id, terms in sql(engine, "SELECT org_id, kind, message_id, terms FROM posted_messages"):
        seen.posted[org_id, kind, message_id] = terms
    events = "SELECT org_id, idempotency_key, credits, metadata ->> 'mark' FROM credit_events"
    for org_id, key, effect, mark in sql(engine, events):
        seen.events[org_id][key] = effect
        for number in marks((mark or "").encode()):
            seen.causes[org_id, key] = number
    letters = "SELECT id, task, body, error_code, attempts, status FROM dead_letters"
    for letter_id, task, body, *rest in sql(engine, letters):
        what = f"dead letter {letter_id}, {rest[0]}: {bytes(body)[:200]!r}"
        match marks(bytes(body)):
            case _ if task in neighbour.TASKS:
                seen.taken_from_neighbour.append(f"its {task} is {what}")
            case [number]:
                seen.letters[number].append(Letter(*rest))
            case _:
                seen.strange_letters.append(what)
    seen.answers = answers(store)
    seen.invariants = [
        f"{finding.check.name}: {org_id}, {offender}"
        for finding in audit.verify(engine).findings
        for org_id, offender in finding.offenders
    ]
    return seen


def observe_neighbour(seen: Observed, broker: redis.Redis) -> None:
    """Read also what concerns the other application on the same broker."""
    seen.taken_from_neighbour += [f"its worker no longer holds {tag}" for tag in neighbour.restored(broker)]


def answers(broker: redis.Redis) -> dict[str, dict[str, Any]]:
    """Every answer that is stored, by the task's id."""
    keys = list(broker.scan_iter(f"{ANSWER_KEY}*", count=1_000))
    found = {}
    for first in range(0, len(keys), 1_000):
        some = keys[first : first + 1_000]
        for key, value in zip(some, broker.mget(some), strict=True):
            if value is not None:
                found[key.decode().removeprefix(ANSWER_KEY)] = json.loads(value)
    return found


def check(sent: Collection[Sent], seen: Observed) -> list[Finding]:
    """Everything that is not as it must be after `sent`."""
    findings = [Finding("invariant", what) for what in seen.invariants]
    findings += [Finding("dead letter", f"of nobody's message: {what}") for what in seen.strange_letters]
    findings += [Finding("neighbour", what) for what in seen.taken_from_neighbour]
    for one in sent:
        findings += _check_letters(one, seen)
        findings += _check_answers(one, seen)
    by_org: dict[str, list[Message]] = defaultdict(list)
    for one in sent:
        if one.message.fate in ("applied", "either"):
            by_org[one.message.org_id].append(one.message)
    for org_id in sorted({*by_org, *seen.wallets, *seen.events}):
        findings += _Organization(org_id, by_org[org_id], seen).check()
    return findings


def absorbed(sent: Collection[Sent], seen: Observed) -> int:
    """How many deliveries, at least, were answered as the duplicate of one that was committed before.

    Counts only messages that were sent by one call: so it was the broker that delivered them again.
    """
    return answered_again(sent, seen.answers) + sum(
        max(0, letter.attempts - one.calls) for one in sent for letter in seen.letters[one.message.number]
    )


def answered_again(sent: Collection[Sent], answers: Mapping[str, Any]) -> int:
    """How many of these deliveries can be seen by their answers."""
    return sum(
        bool((answers.get(one.task_ids[0]) or {}).get("result", {}).get("duplicate"))
        for one in sent
        if one.calls == 1 and one.task_ids and one.message.fate == "applied"
    )


def unanswered(sent: Collection[Sent], answers: Mapping[str, Any]) -> list[Sent]:
    """The starts whose answer nobody got: the broker may be gone just when it is to be stored. Engines ask again."""
    return [
        one
        for one in sent
        if (one.message.task, one.message.fate) == ("workflow.start", "applied")
        and not any(task_id in answers for task_id in one.task_ids)
    ]


def _check_letters(one: Sent, seen: Observed) -> Iterator[Finding]:
    message, letters = one.message, seen.letters[one.message.number]
    about = (message.number,)
    if message.fate in ("applied", "either"):
        refused_rightly = message.fate == "either" and {letter.code for letter in letters} <= {"insufficient_credits"}
        if letters and not refused_rightly:
            yield Finding("dead letter", f"{message.task} could be applied, and is a dead letter: {letters}", about)
    elif not letters:
        yield Finding("lost", f"{message.task or message.form} should be a dead letter, {message.fate}", about)
    if len(letters) > 1:
        yield Finding("applied twice", f"{message.task or message.form} is {len(letters)} dead letters", about)
    elif message.fate not in ("applied", "either"):
        for letter in letters:
            if (letter.code, letter.status) != (message.fate, "open"):
                yield Finding("dead letter", f"{message.task or message.form}, {message.fate}, is {letter}", about)
            elif letter.attempts < one.confirmed:
                said = f"was sent {one.confirmed} times and has {letter.attempts} attempts"
                yield Finding("lost", f"{message.task or message.form} {said}", about)


def _check_answers(one: Sent, seen: Observed) -> Iterator[Finding]:
    message = one.message
    if message.fate != "applied":
        return
    answers = [seen.answers[task_id] for task_id in one.task_ids if task_id in seen.answers]
    about = (message.number,)
    if failed := [answer for answer in answers if answer["status"] != "SUCCESS"]:
        yield Finding("answer", f"{message.task} was answered with {failed}", about)
        return
    results = [answer["result"] for answer in answers]
    if len([result for result in results if not result["duplicate"]]) > 1:
        yield Finding("applied twice", f"{message.task} was twice answered as new", about)
    if message.task == "workflow.start":
        workflow = seen.workflows.get((message.org_id, message.fields["workflow_id"]), {})
        if not answers:
            yield Finding("answer", "workflow.start was never answered", about)
        for result in results:
            if (result["outcome"], result["reason"]) != ANSWERS.get(workflow.get("start_answer", "")):
                known = workflow.get("start_answer")
                yield Finding("answer", f"workflow.start was answered with {result}, and is known as {known}", about)


class _Organization:
    """What one organization was sent, and what is there of it."""

    def __init__(self, org_id: str, messages: Collection[Message], seen: Observed) -> None:
        self.org_id = org_id
        self.seen = seen
        self.events: Mapping[str, int] = seen.events[org_id]
        self.wallet: Mapping[str, Any] = seen.wallets.get(org_id, {})
        self.workflows: dict[str, dict[str, Message]] = defaultdict(dict)
        self.postings: list[Message] = []
        self.plans: list[Message] = []
        self.settings: list[Message] = []
        for message in messages:
            if message.task.startswith("workflow."):
                self.workflows[message.fields["workflow_id"]][message.task.removeprefix("workflow.")] = message
            elif message.task == "wallet.subscribe":
                self.plans.append(message)
            elif message.task == "wallet.configure":
                self.settings.append(message)
            else:
                self.postings.append(message)
        self.explained: set[str] = set()
        """The events that a message accounts for."""
        self.balance = self.reserved = 0
        """As the messages want them."""

    def check(self) -> Iterator[Finding]:
        for message in self.postings:
            yield from self._check_posting(message)
        for workflow_id, said in self.workflows.items():
            yield from self._check_workflow(workflow_id, said)
        yield from self._check_plans()
        yield from self._check_settings()
        for key in self.events.keys() - self.explained:
            about = (self.seen.causes[self.org_id, key],) if (self.org_id, key) in self.seen.causes else ()
            yield Finding("applied twice", f"{self.org_id} has the event {key}, which no message accounts for", about)
        for workflow_id in self._known("workflows") - self.workflows.keys():
            yield Finding("applied twice", f"{self.org_id} has the workflow {workflow_id}, which nobody sent")
        balance = self.wallet.get("prepaid_balance", 0) + self.wallet.get("subscription_balance", 0)
        if balance != self.balance:
            yield Finding("balance", f"{self.org_id} has {balance} credits, its messages add up to {self.balance}")
        reserved = self.wallet.get("reserved", 0)
        if reserved != self.reserved:
            yield Finding("balance", f"{self.org_id} has {reserved} reserved, its messages add up to {self.reserved}")

    def _known(self, table: str) -> set[str]:
        return {key[1] for key in getattr(self.seen, table) if key[0] == self.org_id}

    def _event(self, key: str, credits: int, message: Message) -> Iterator[Finding]:
        """The event must be there, with these credits."""
        self.explained.add(key)
        if key not in self.events:
            yield Finding("lost", f"{self.org_id} has no event {key} of {message.task}", (message.number,))
        elif self.events[key] != credits:
            what = f"{self.org_id} has the event {key} with {self.events[key]} credits instead of {credits}"
            yield Finding("balance", what, (message.number,))

    def _check_posting(self, message: Message) -> Iterator[Finding]:
        model = MESSAGES[message.task]
        assert issubclass(model, WalletMessage)
        message_id, amount = message.fields[model.id_field], message.fields["credits"]
        terms = self.seen.posted.get((self.org_id, model.kind, message_id))
        if message.fate == "either" and terms is None:
            if not self.seen.letters[message.number]:
                yield Finding("lost", f"{message.task} {message_id} was neither applied nor refused", (message.number,))
            return
        if terms is None or terms["credits"] != amount:
            what = f"{self.org_id}: {message.task} {message_id} with {amount} credits is known as {terms}"
            yield Finding("lost", what, (message.number,))
        effect = -amount if message.task == "wallet.reverse" else amount
        key = f"{model.kind}:{message_id}"
        self.balance += effect
        yield from self._event(key, effect, message)
        ends_at = message.fields.get("expires_at")
        if ends_at is not None and datetime.fromisoformat(ends_at) <= self.seen.due_until:
            self.balance -= effect
            [ended] = [other for other in self.events if other.startswith(f"{key}/ended/")] or [f"{key}/ended/2"]
            yield from self._event(ended, -effect, message)

    def _check_workflow(self, workflow_id: str, said: Mapping[str, Message]) -> Iterator[Finding]:
        row = self.seen.workflows.get((self.org_id, workflow_id), {})
        for name, column in (("cancel", "cancel_answer"), ("fail", "fail_answer"), ("start", "start_answer")):
            if name in said and row.get(column) is None:
                yield Finding("lost", f"{self.org_id}: {name} of {workflow_id} is not known", (said[name].number,))
        if "finish" in said:
            used = said["finish"].fields["credits"]
            self.balance -= used
            yield from self._event(f"finish:{workflow_id}", -used, said["finish"])
            if row.get("finish_credits") != used:
                what = (
                    f"{self.org_id}: {workflow_id} used {used} credits, and is known with {row.get('finish_credits')}"
                )
                yield Finding("lost", what, (said["finish"].number,))
        if "start" in said:
            yield from self._check_hold(workflow_id, said, row)

    def _check_hold(self, workflow_id: str, said: Mapping[str, Message], row: Mapping[str, Any]) -> Iterator[Finding]:
        start, held = said["start"], said["start"].fields["credits"]
        about = (start.number,)
        if row.get("start_answer") == "insufficient_credits" and self.org_id.startswith(IN_PLENTY):
            yield Finding("balance", f"{self.org_id}: {workflow_id} was rejected, with credits in plenty", about)
        if row.get("start_answer") != "reserved":
            return  # so there may be no event either
        yield from self._event(f"start:{workflow_id}", -held, start)
        ended = any(end in said for end in ENDS)
        expires_at = datetime.fromisoformat(row["expires_at"])
        expired = row["state"] == "expired" and start.fields.get("expires_in_s") in EXPIRING_S
        if row["state"] == "expired" and expires_at > self.seen.until:
            yield Finding("balance", f"{self.org_id}: {workflow_id} expired before its time, {expires_at}", about)
        if ended or expired:
            yield from self._event(f"release:{workflow_id}", held, start)
        else:
            self.reserved += held
            if row["state"] != "reserved":
                yield Finding("balance", f"{self.org_id}: {workflow_id} is {row['state']}, and nobody ended it", about)
            elif expires_at < self.seen.due_until:
                yield Finding("lost", f"{self.org_id}: the hold of {workflow_id} should have expired", about)

    def _check_plans(self) -> Iterator[Finding]:
        raises = {f"{FIRST_PERIOD}/v{plan.fields['version']}" for plan in self.plans}
        keys = self.events.keys() & {FIRST_PERIOD, *raises}
        self.explained |= keys
        granted = max((plan.fields["monthly_credits"] for plan in self.plans), default=0)
        begun = any(datetime.fromisoformat(plan.fields["anchor"]) <= self.seen.due_until for plan in self.plans)
        for plan in self.plans:
            message_id = f"{plan.fields['subscription_id']}:{plan.fields['version']}"
            if (self.org_id, "subscribe", message_id) not in self.seen.posted:
                yield Finding("lost", f"{self.org_id}: wallet.subscribe {message_id} is not known", (plan.number,))
        self.balance += granted if begun else 0
        got, about = sum(self.events[key] for key in keys), tuple(plan.number for plan in self.plans)
        if begun and FIRST_PERIOD not in keys:
            yield Finding("lost", f"{self.org_id}: its period never began", about)
        if got != (granted if begun else 0):
            yield Finding(
                "balance", f"{self.org_id} was allocated {got} credits, its best plan grants {granted}", about
            )

    def _check_settings(self) -> Iterator[Finding]:
        for message in self.settings:
            if (self.org_id, "configure", str(message.fields["version"])) not in self.seen.posted:
                yield Finding("lost", f"{self.org_id}: a wallet.configure is not known", (message.number,))
        newest = max(self.settings, key=lambda message: message.fields["version"], default=None)
        if newest is not None and self.wallet.get("credit_limit") != newest.fields["credit_limit"]:
            limit = self.wallet.get("credit_limit")
            yield Finding("lost", f"{self.org_id} has a credit limit of {limit}, not the newest", (newest.number,))
