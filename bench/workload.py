"""The measured messages, and the state that they must leave behind.

That state is computed from the messages alone, with neither the ledger's rules nor those of the naive way. So both are
checked against the same figures.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Engine, text

from bench.envelopes import Message, envelopes
from ledger import bodies
from ledger.store import Delivery

FUNDS = 1_000_000_000
"""The prepaid credits that every organization has before a workload: so many that no start is rejected."""

_OUTCOMES = {"workflow.finish": "settled", "workflow.cancel": "cancelled", "workflow.fail": "failed"}


class NotAccountedError(Exception):
    """The measured system did not do its work; the text says what is wrong. Its figures mean nothing."""


def organization(number: int, name: str = "org") -> str:
    """The id of an organization."""
    return f"{name}-{number}"


@dataclass(frozen=True)
class Workload:
    """Lifecycle messages, in the order in which they are sent."""

    messages: Sequence[Message]

    @classmethod
    def lifecycle(cls, count: int, *, organizations: int, name: str = "org") -> "Workload":
        """`count` messages of workflows that start, run while a quarter of all others start, and end.

        Of ten workflows eight finish, one is cancelled and one fails. One in a hundred is finished twice, as by an
        engine that retries. Every organization has the same number.
        """
        messages: list[Message] = []
        started = ended = 0
        while len(messages) < count:
            if started < count // 2 and started - ended < count // 8:
                messages.append(_start(started, organizations, name))
                started += 1
            else:
                messages += [_end(ended, organizations, name)] * (2 if ended % 100 == 51 else 1)
                ended += 1
                if started < count // 2:
                    messages.append(_start(started, organizations, name))
                    started += 1
        return cls(messages[:count])

    @classmethod
    def without_effect(cls, count: int, *, organizations: int) -> "Workload":
        """`count` workflows that finish with 0 credits: they change no balance, and `check` ignores them."""
        names = [{"org_id": organization(n % organizations), "workflow_id": f"warm-{n}"} for n in range(count)]
        return cls([("workflow.finish", {**named, "credits": 0}) for named in names])

    @classmethod
    def starts(cls, count: int, *, organizations: int) -> "Workload":
        """`count` workflows that only start."""
        return cls([_start(number, organizations) for number in range(count)])

    @cached_property
    def envelopes(self) -> list[bytes]:
        """The messages as they wait in the queue."""
        return envelopes(self.messages)

    @cached_property
    def deliveries(self) -> list[Delivery]:
        """The messages as a worker hands them to the ledger."""
        return [Delivery(task, payload, bodies.written([payload], {})) for task, payload in self.messages]

    def check(self, engine: Engine, *, used_before: int = 0) -> None:
        """Check that every message had its effect, once, and the balances are right. Raises NotAccountedError.

        `used_before`: the credits that every organization had used already. Works on the ledger's tables and on those
        of the naive way: their names, and the columns read here, are the same.
        """
        workflows: dict[tuple[str, str], tuple[int | None, str, int]] = {}
        used = defaultdict[str, int](int)
        held = defaultdict[str, int](int)
        for task, payload in self.messages:
            org_id, key = payload["org_id"], (payload["org_id"], payload["workflow_id"])
            if task == "workflow.start":
                workflows[key] = payload["credits"], "reserved", -payload["credits"]
                held[org_id] += payload["credits"]
            elif workflows[key][1] == "reserved":
                start_credits, _, _ = workflows[key]
                assert start_credits is not None
                charged = payload.get("credits", 0)
                workflows[key] = start_credits, _OUTCOMES[task], -charged
                held[org_id] -= start_credits
                used[org_id] += charged
        with engine.connect() as connection:
            connection.execute(text("ANALYZE"))  # the planner does not know yet how much was written
            orgs = {"orgs": list(held)}
            found = {(row[0], row[1]): tuple(row[2:]) for row in connection.execute(_WORKFLOWS, orgs)}
            balances = {row[0]: tuple(row[1:]) for row in connection.execute(_BALANCES, orgs)}
        wrong = [key for key in workflows.keys() | found.keys() if workflows.get(key) != found.get(key)]
        if wrong:
            key = min(wrong)
            raise NotAccountedError(
                f"{len(wrong):,} of {len(workflows):,} workflows differ from their messages; {' '.join(key)} should be"
                f" {workflows.get(key)}, but is {found.get(key)} (started with, state, effect on the available balance)"
            )
        for org_id in held:
            expected = FUNDS - used_before - used[org_id], held[org_id]
            if balances.get(org_id) != expected:
                raise NotAccountedError(
                    f"{org_id} should have a prepaid balance and reservations of {expected} credits,"
                    f" but has {balances.get(org_id)}"
                )


_WORKFLOWS = text(
    "SELECT workflows.org_id, workflow_id, start_credits, state, COALESCE(sum(credits), 0)::bigint"
    " FROM workflows LEFT JOIN credit_events USING (org_id, workflow_id)"
    " WHERE org_id = ANY(:orgs) AND workflow_id LIKE 'run-%'"
    " GROUP BY 1, 2, 3, 4"
)
_BALANCES = text("SELECT org_id, prepaid_balance, reserved FROM wallets WHERE org_id = ANY(:orgs)")


def _start(number: int, organizations: int, name: str = "org") -> Message:
    return "workflow.start", {
        **_names(number, organizations, name),
        "credits": _estimate(number),
        "project_id": f"project-{number % 7}",
        "activity_name": "Weekly report",
    }


def _end(number: int, organizations: int, name: str) -> Message:
    names = _names(number, organizations, name)
    match number % 10:
        case 0:
            return "workflow.cancel", {**names, "reason": "the user changed their mind"}
        case 5:
            return "workflow.fail", {**names, "reason": "the service did not answer"}
        case _:
            return "workflow.finish", {**names, "credits": _estimate(number) - 5 + number % 9}


def _names(number: int, organizations: int, name: str) -> dict[str, str]:
    # 7,919 is prime, so neighbours in the queue are not neighbours in an index.
    return {"org_id": organization(number * 7_919 % organizations, name), "workflow_id": f"run-{number}"}


def _estimate(number: int) -> int:
    return 10 + number % 90
