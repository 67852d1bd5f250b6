"""What the nemesis sends: messages whose effect on the balances depends on their set alone, so that it is known.

Five groups of organizations. `ample-…` can always reserve. `scarce-…` often cannot: which of their starts are
rejected depends on the order, what their finishes charge does not. `idle-…` have a subscription that begins by
itself, `ending-…` a grant that ends by itself, and nobody else ever mentions them. `flood-1` has very many open
reservations.

Every message carries a mark, `nemesis-<number>`, that its dead letter keeps.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from random import Random
from typing import Any, Literal

AMPLE, SCARCE = 36, 12
OPENING_CREDITS = {"ample": 1_000_000_000, "scarce": 400, "flood": 1_000_000_000}
FLOOD_ORG_ID = "flood-1"
FLOOD = 1_500
"""How many open reservations `FLOOD_ORG_ID` has at the beginning."""
MARK = re.compile(rb"nemesis-(\d+)")

WORKFLOWS = {
    ("start", "finish"): 40,
    ("start", "cancel"): 15,
    ("start", "fail"): 10,
    ("start", "cancel", "finish"): 8,
    ("start", "fail", "cancel"): 6,
    ("start",): 8,
    ("finish",): 5,
    ("cancel",): 3,
}
"""What an engine says of a workflow, in parts of the whole. It arrives in any order."""

SHORT_HOLD_S, LONG_HOLD_S, FLOOD_HOLD_S = 60, 86_400, 43_200
"""The last one ends by a fault."""
MOST_KEPT = 500
NEVER = "2999-12-31T00:00:00+00:00"

Form = Literal["task", "body", "entry"]


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent, once or several times, always the same."""

    number: int
    task: str
    fields: dict[str, Any] = field(default_factory=dict)
    form: Form = "task"
    """A task with `fields` as its argument; or `text` as the body of one, or as an entry of the queue."""
    text: str = ""
    fate: str = "applied"
    """"applied"; "either", if the order decides; or the code of its dead letter."""

    @property
    def org_id(self) -> str:
        return str(self.fields["org_id"])


class Workload:
    """An endless stream of messages."""

    def __init__(self, seed: int, begins_at: datetime, *, flood: int = FLOOD) -> None:
        self._random = Random(seed)
        self._numbers = count(1)
        self._versions = count(1)
        self._idle = count(1)
        self._sent: list[Message] = []
        self._flood = [f"flood-{n}" for n in range(flood)]
        self._org_ids = [f"ample-{n}" for n in range(AMPLE)] + [f"scarce-{n}" for n in range(SCARCE)]
        self._anchors = {org_id: begins_at + timedelta(seconds=self._random.uniform(2, 20)) for org_id in self._org_ids}
        self.last_anchor = max(self._anchors.values())

    def opening(self) -> list[Message]:
        """What has to be applied first: the credits that make `ample` ample, and what is contradicted later."""
        return [
            message
            for org_id in [*self._org_ids, FLOOD_ORG_ID]
            for message in (
                self._message(
                    "wallet.purchase",
                    org_id=org_id,
                    purchase_id="opening",
                    credits=OPENING_CREDITS[org_id.split("-")[0]],
                ),
                # None, so that it is never rejected, in whatever order these arrive.
                self._message("workflow.start", org_id=org_id, workflow_id="opening", credits=0),
                self._message("workflow.finish", org_id=org_id, workflow_id="opening", credits=7),
            )
        ]

    def flood(self) -> list[Message]:
        """The open reservations of `FLOOD_ORG_ID`, for which it needs its credits first."""
        return [self._flood_start(workflow_id) for workflow_id in self._flood]

    def chunk(self, now: datetime) -> list[Message]:
        """A hundred messages and more, in any order, some of them repeated, now or from earlier chunks."""
        messages = [message for _ in range(40) for message in self._workflow()]
        messages += [self._posting() for _ in range(20)]
        messages += [self._subscribe(), self._configure(), self._idle_subscription(now), self._ending_grant(now)]
        messages += [self._contradiction(), self._garbage(), self._garbage()]
        messages += self._flood_workflows()
        again = self._random.choices(messages, k=10)
        if self._sent:
            again += self._random.choices(self._sent, k=5)
        self._sent = (self._sent + messages)[-MOST_KEPT:]
        messages += again
        self._random.shuffle(messages)
        return messages

    def one_credit(self, org_id: str) -> Message:
        """A grant to an organization that gets nothing else."""
        return self._message("wallet.grant", org_id=org_id, grant_id=f"posting-{next(self._numbers)}", credits=1)

    def _message(self, task: str, *, fate: str = "applied", **fields: Any) -> Message:
        number = next(self._numbers)
        return Message(number, task, {**fields, "metadata": {"mark": f"nemesis-{number}"}}, fate=fate)

    def _org_id(self) -> str:
        return self._random.choice(self._org_ids)

    def _workflow(self) -> list[Message]:
        org_id, random = self._org_id(), self._random
        tasks = random.choices(list(WORKFLOWS), weights=list(WORKFLOWS.values()))[0]
        reserved = random.randint(0, 100)
        workflow_id = f"run-{next(self._numbers)}"
        fields: dict[str, dict[str, Any]] = {
            "start": {
                "credits": reserved,
                "project_id": f"project-{random.randint(1, 9)}",
                "expires_in_s": SHORT_HOLD_S if random.random() < 0.2 else LONG_HOLD_S,
            },
            "finish": {"credits": random.randint(0, 2 * reserved)},
            "cancel": {"reason": "no longer wanted"},
            "fail": {},
        }
        return [
            self._message(f"workflow.{task}", org_id=org_id, workflow_id=workflow_id, **fields[task]) for task in tasks
        ]

    def _flood_start(self, workflow_id: str) -> Message:
        return self._message(
            "workflow.start",
            org_id=FLOOD_ORG_ID,
            workflow_id=workflow_id,
            credits=self._random.randint(0, 100),
            expires_in_s=FLOOD_HOLD_S,
        )

    def _flood_workflows(self) -> list[Message]:
        """Two that begin and stay open, and the finish of one of those at the beginning, expired by now or not."""
        messages = [self._flood_start(f"run-{next(self._numbers)}") for _ in range(2)]
        if self._flood:
            run = {"org_id": FLOOD_ORG_ID, "workflow_id": self._flood.pop()}
            messages.append(self._message("workflow.finish", **run, credits=self._random.randint(0, 200)))
        return messages

    def _posting(self) -> Message:
        org_id, random = self._org_id(), self._random
        message_id, amount = f"posting-{next(self._numbers)}", random.randint(1, 50)
        match random.randint(1, 8):
            case 7:  # usage draws it first, and it never ends
                return self._message(
                    "wallet.grant", org_id=org_id, grant_id=message_id, credits=amount, expires_at=NEVER
                )
            case 8:
                org_id = f"ample-{random.randrange(AMPLE)}"
                of = {"purchase_id": "opening", "reason": "disputed"}
                return self._message("wallet.reverse", org_id=org_id, reversal_id=message_id, credits=amount, **of)
            case 1:
                return self._message("wallet.purchase", org_id=org_id, purchase_id=message_id, credits=amount)
            case 2:
                return self._message("wallet.grant", org_id=org_id, grant_id=message_id, credits=amount)
            case 3:
                return self._message("wallet.refund", org_id=org_id, refund_id=message_id, credits=amount)
            case 4:
                return self._message("wallet.bill", org_id=org_id, billing_id=message_id, credits=amount)
            case 5:
                fields: dict[str, Any] = {"adjustment_id": message_id, "reason": "nemesis", "allow_negative": True}
                return self._message("wallet.adjust", org_id=org_id, credits=-amount, **fields)
            case _:  # refused, if the prepaid balance is too low just then
                fate = "either" if org_id.startswith("scarce") else "applied"
                return self._message("wallet.bill", fate=fate, org_id=org_id, billing_id=message_id, credits=-amount)

    def _subscribe(self) -> Message:
        """A better plan with every version: whatever the order, the period is granted what the best one grants."""
        org_id, version = self._org_id(), next(self._versions)
        return self._subscription(org_id, self._anchors[org_id], version=version, monthly_credits=100 + version)

    def _idle_subscription(self, now: datetime) -> Message:
        anchor = now + timedelta(seconds=self._random.uniform(0.5, 5))
        self.last_anchor = max(self.last_anchor, anchor)
        return self._subscription(
            f"idle-{next(self._idle)}", anchor, version=1, monthly_credits=self._random.randint(0, 50)
        )

    def _ending_grant(self, now: datetime) -> Message:
        """It ends by itself, or at once if it comes later than that."""
        ends_at = now + timedelta(seconds=self._random.uniform(0.5, 5))
        self.last_anchor = max(self.last_anchor, ends_at)
        return self._message(
            "wallet.grant",
            org_id=f"ending-{next(self._idle)}",
            grant_id="soon",
            credits=self._random.randint(1, 50),
            expires_at=ends_at.isoformat(),
        )

    def _subscription(self, org_id: str, anchor: datetime, **fields: Any) -> Message:
        return self._message(
            "wallet.subscribe",
            org_id=org_id,
            subscription_id="plan",
            plan="Nemesis",
            anchor=anchor.isoformat(),
            **fields,
        )

    def _configure(self) -> Message:
        return self._message(
            "wallet.configure",
            org_id=self._org_id(),
            version=next(self._versions),
            credit_limit=self._random.randint(0, 30),
        )

    def _contradiction(self) -> Message:
        """The ids of a message of the opening, with other credits."""
        task, key = self._random.choice(
            (("wallet.purchase", "purchase_id"), ("workflow.start", "workflow_id"), ("workflow.finish", "workflow_id"))
        )
        ids = {"org_id": self._org_id(), key: "opening"}
        return self._message(task, fate="conflict", **ids, credits=self._random.randint(11, 99))

    def _garbage(self) -> Message:
        org_id, number = self._org_id(), next(self._numbers)
        mark = f"nemesis-{number}"
        match self._random.randint(1, 4):
            case 1:
                fields = {"org_id": org_id, "grant_id": mark, "credits": "75"}
                return Message(number, "wallet.grant", fields, fate="invalid_message")
            case 2:
                return Message(number, "wallet.robbery", {"org_id": org_id, "loot": mark}, fate="unknown_task")
            case 3:
                text = json.dumps({"org_id": org_id, "grant_id": mark})[:-1]
                return Message(number, "wallet.grant", form="body", text=text, fate="undecodable_message")
            case _:
                return Message(number, "", form="entry", text=f"{mark} is not a message", fate="undecodable_message")


def marks(body: bytes) -> Sequence[int]:
    """The numbers of the messages whose marks are in `body`."""
    return [int(number) for number in MARK.findall(body)]
