"""Writes docs/messages.md: `make docs`.

Names, types, bounds, defaults and meanings of fields come from `holdfast_client.messages`. What has no other home than
prose stands here: what an answer or an event means. `tests/unit/test_messages_doc.py` keeps the page in step with the
code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from holdfast_client.broker import ENGINE_QUEUE, QUEUE
from holdfast_client.messages import (
    MAX_AMOUNT,
    MAX_BODY_BYTES,
    MAX_CREDITS,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    MESSAGES,
    Message,
    VersionedMessage,
    WalletMessage,
    WorkflowMessage,
)
from holdfast_client.results import Result
from ledger.causes import CODES
from ledger.examples import EXAMPLES
from ledger.state import EventType
from worker.transport import MOST_ENTRY_BYTES

PAGE = Path(__file__).with_name("messages.md")
OF_WORKFLOWS = "/api/organizations/{orgId}/workflows/{workflowId}/"
OF_WALLETS = "/api/organizations/{orgId}/wallet/"
COMMON = tuple(Message.model_fields)

TAKES = {
    "workflow.start": "nothing. It holds `credits` of what is available until the workflow ends or its time is over.",
    "workflow.finish": "what was used; and what is past its end and only the reservation had kept.",
    "workflow.cancel": "nothing but what is past its end and only the reservation had kept.",
    "workflow.fail": "nothing but what is past its end and only the reservation had kept.",
    "wallet.purchase": "nothing; if `expires_at` is past, what it brought ends at once.",
    "wallet.grant": "nothing; if `expires_at` is past, what it brought ends at once.",
    "wallet.adjust": (
        "with negative `credits`, so many prepaid credits: first those that end. Without `allow_negative`, neither "
        "more than there are nor what a workflow holds."
    ),
    "wallet.refund": "nothing.",
    "wallet.bill": (
        "with negative `credits`, so many prepaid credits: first those that end; neither more than there are nor what "
        "a workflow holds."
    ),
    "wallet.reverse": (
        "at most what the purchase brought, although it was used or a workflow holds it: the prepaid balance may go "
        "below zero, and new starts are rejected while too little is available. What is left of the purchase itself "
        "goes first, if that has an end; then what ends first."
    ),
    "wallet.subscribe": (
        "nothing at once. The plan that it replaces gives no more; what that has left ends with its own period, and "
        "does not roll over. A subscription that was scheduled never begins. Fewer `monthly_credits` take effect with "
        "the next period."
    ),
    "wallet.unsubscribe": (
        "nothing at once. What the current subscription has left ends with its period, whatever its `rollover_limit`. "
        "A scheduled one never begins, and the current one goes on."
    ),
    "wallet.configure": "no credits. With a lower limit, starts are rejected that were not before; holds stay.",
}
"""What each message can take away."""

ANSWER = {
    "outcome": "What the message did: the table below.",
    "reason": "Why, where an outcome has more than one reason; otherwise null.",
    "duplicate": "True if the message was answered before: `outcome` and `reason` are as then, and nothing changes.",
    "org_id": "As in the message.",
    "workflow_id": "As in the message; null if it has none.",
    "state": (
        "What the workflow is now: `reserved` (the credits are held), `rejected`, `settled`, `cancelled`, `failed` or "
        "`expired`; null if the message names none."
    ),
    "event_seqs": "The numbers of the events that this delivery wrote; none for a duplicate.",
    "available": "The credits that a workflow may reserve, after this delivery.",
    "limit": (
        "Of a start that is rejected now, the limit that rejects it: an object with `kind` (the `reason`), `limit` "
        "(the credits that may be held in all; or used and held within the period), `used` (within the period), "
        "`reserved`, and `resets_at` (when the period ends; null: there is no period, and it stays). Else null."
    ),
    "shortfall": "Of a start that is rejected now, how many credits that limit lacks for it. Else null.",
}

OUTCOMES = {
    ("reserved", None): (
        "workflow.start",
        "The credits were reserved. Run it only if `state` is `reserved` too; the workflow may have ended since.",
    ),
    ("rejected", "insufficient_credits"): ("workflow.start", "Too few credits are available: do not run it."),
    ("rejected", "period_cap"): ("workflow.start", "It would exceed the wallet's `period_cap`: do not run it."),
    ("settled", None): ("workflow.finish", "What it used is charged, and what it held is released."),
    ("released", None): ("workflow.cancel, workflow.fail", "What it held is released."),
    ("ignored", "not_started"): (
        "workflow.cancel, workflow.fail",
        "It came before the start. The start will hold nothing.",
    ),
    ("ignored", "already_ended"): (
        "workflow.start, workflow.cancel, workflow.fail",
        "The workflow had ended, expired or been rejected: nothing to hold or to release.",
    ),
    ("posted", None): ("every wallet message", "It is applied."),
    ("ignored", "stale_version"): (
        ", ".join(task for task, model in MESSAGES.items() if issubclass(model, VersionedMessage)),
        "The same version or a higher one came before; for a plan, of any of the organization's subscriptions.",
    ),
    ("ignored", "not_subscribed"): (
        "wallet.unsubscribe",
        "The subscription is neither current nor scheduled. A later subscribe with a lower version is stale.",
    ),
}

EVENTS = {
    "reservation": ("−n", "Holds n credits for a workflow. No balance changes.", ("expires_at",)),
    "reservation_released": (
        "+n",
        "The workflow no longer holds credits. `reason` is `settled`, `cancelled`, `failed` or `expired`.",
        ("reason", "given_reason"),
    ),
    "usage": (
        "−u",
        (
            "Charges u credits, in the [order of use](#credits-that-end), and adds u to the period's usage. `paid_by`: "
            "how many of them the `subscription`, prepaid credits that end (`ending`), and permanent ones (`prepaid`) "
            "paid. `overrun`: what the prepaid balance did not have. `not_charged`: see [bounds](#bounds). "
            "`unreserved`: true if nothing was ever reserved."
        ),
        ("paid_by", "overrun", "not_charged", "unreserved"),
    ),
    "subscription_credit": (
        "+n",
        (
            "A period begins: n to the subscription's balance, and the period's usage starts at 0. `debt_settled`: how "
            "many of them went to the prepaid balance, which was below zero. `not_granted`: what a full wallet cannot "
            "hold. With `reason` `plan_change`: what a larger plan adds within the period, or 0; `replaced_plan`: the "
            "plan before, if it had another name. Of a smaller plan, `monthly_credits` is what it gives from "
            "`effective_at` on."
        ),
        (
            *("subscription_id", "plan", "period_start", "period_end", "debt_settled", "not_granted"),
            *("reason", "replaced_plan", "monthly_credits", "effective_at"),
        ),
    ),
    "prepaid_purchase": (
        "+n",
        "n to the prepaid balance. `expires_at`: when what is left of them ends. `debt_settled`: as above.",
        ("purchase_id", "expires_at", "debt_settled"),
    ),
    "grant": (
        "+n",
        "n to the prepaid balance. `expires_at`, `debt_settled`: as above.",
        ("grant_id", "reason", "expires_at", "debt_settled"),
    ),
    "refund": (
        "+n",
        (
            "n to the prepaid balance. `ending`: those of them that end, a list of `credits` and `expires_at`. "
            "`debt_settled`: as above."
        ),
        ("refund_id", "workflow_id", "ending", "debt_settled"),
    ),
    "adjustment": (
        "±n",
        (
            "±n to the prepaid balance; `from_ending`: how many of those taken had an end. Or, with `reason` "
            "`grant_expired`, `purchase_expired` or `refund_expired`, what ended of that grant, purchase or refund at "
            "`expires_at`. Or, with `subscription_expired`, −n to the subscription's balance: what a period of that "
            "`plan` left beyond the rollover limit, or all of it if the plan was replaced or ended."
        ),
        (
            *("adjustment_id", "reason", "from_ending", "debt_settled"),
            *("expires_at", "grant_id", "purchase_id", "refund_id", "subscription_id", "plan"),
        ),
    ),
    "billing": (
        "0, ±n",
        (
            "The same to the prepaid balance. Of a reversal: `reversal_id`, the `purchase_id` that it is of, and the "
            "`reason`. `from_ending`, `debt_settled`: as above. Or 0, of new limits that were given a `reason`: the "
            "`version`, the `credit_limit`, and the `period_cap` if there is one."
        ),
        (
            *("billing_id", "invoice_id", "reversal_id", "purchase_id", "reason", "from_ending", "debt_settled"),
            *("version", "credit_limit", "period_cap"),
        ),
    ),
}


def render() -> str:
    """The whole page."""
    _must_be_the_same(EXAMPLES, MESSAGES)
    _must_be_the_same(TAKES, MESSAGES)
    _must_be_the_same(ANSWER, list(Result._fields))
    _must_be_the_same(EVENTS, get_args(EventType))
    return (
        "\n\n".join(
            [
                _INTRODUCTION,
                "## Fields of every message",
                _table(("field", "type", "default", "meaning"), [_field(Message, name) for name in COMMON]),
                *(_message(model) for model in MESSAGES.values()),
                _ENDING,
                _BOUNDS,
                _ANSWERS,
                _table(("field", "meaning"), [(f"`{name}`", meaning) for name, meaning in ANSWER.items()]),
                _table(
                    ("outcome", "reason", "of", "meaning"),
                    [
                        (f"`{outcome}`", f"`{reason}`" if reason else "", of, meaning)
                        for (outcome, reason), (of, meaning) in OUTCOMES.items()
                    ],
                ),
                _EVENTS,
                _table(
                    ("event_type", "credits", "effect", "the ledger's own metadata"),
                    [
                        (f"`{event_type}`", amount, effect, ", ".join(f"`{key}`" for key in own))
                        for event_type, (amount, effect, own) in EVENTS.items()
                    ],
                ),
                _DEAD_LETTERS,
                _table(
                    ("code", "meaning", "cure"),
                    [(f"`{name}`", code.meaning, code.cure) for name, code in CODES.items()],
                ),
            ]
        )
        + "\n"
    )


_INTRODUCTION = f"""# Messages

<!-- Written by `make docs` from client/holdfast_client/messages.py and docs/generate_messages.py: change those. -->

Everything that changes a wallet is a message: a Celery task, sent by its name, with one JSON object as its only
positional argument. Any Celery client in any language can send it, to the queue `{QUEUE}`. A workflow engine with fewer
rights sends to `{ENGINE_QUEUE}`. From there only `workflow.*` is taken, and the message's `source` is ignored:
[security.md](security.md). With RabbitMQ a producer needs [two more settings](operating.md#rabbitmq).

A program without a Celery client sends messages [over HTTP](http.md), with the other fields as the body:
`POST {OF_WORKFLOWS}start`, `finish`, `cancel` or `fail`, and
`POST {OF_WALLETS}purchase`, `grant` and so on. There `source` is printable ASCII, and not one that is
reserved, such as `scheduler`.

```python
from celery import Celery

engine = Celery(broker="redis://:password@broker:6379/0", backend="redis://:password@broker:6379/0")
message = {{"org_id": "acme", "workflow_id": "run-1", "credits": 75}}
sent = engine.send_task("workflow.start", args=[message], queue="{QUEUE}", ignore_result=False)
if sent.get(timeout=10)["state"] == "reserved":
    ...  # the credits are held: run it, then send workflow.finish with what it used
```

- **Send again when in doubt.** A repeated message is known by the ids that are named with each message. It is applied
  once. Its `outcome` and `reason` are as the first time; `state` and `available` are the current ones. A message with
  the same ids and other `credits`, or with any other difference in a wallet message's own fields, is a
  [conflict](#dead-letters).
- **The order does not matter within a workflow.** What a workflow does to the balances depends only on the set of its
  messages: a finish always charges, once; without a finish, a cancel or a fail leaves nothing behind, even if it comes
  before the start. Holdfast keeps no order, either: several workers may apply two messages that are under way at once
  in either order. If one has to come first, such as a purchase before the start that needs it, or a finish before its
  refund, wait for its answer.
- **Nothing is delayed or dropped.** An ETA, a countdown, an expiry and a revocation of Celery are ignored. What cannot
  be applied is kept as a [dead letter](#dead-letters).
- **A message is small.** Its body, as Celery sends it, has at most {MAX_BODY_BYTES:,} bytes (64 KiB). On Redis its
  entry in the queue, with Celery's headers and the body in base64, has at most {MOST_ENTRY_BYTES:,} (256 KiB). Valid
  fields need less than half of that. A larger message becomes a dead letter, `too_large`.
- A wallet begins to exist with the first message that names its organization.

| type | what it is |
|---|---|
| id | text, 1–128 characters of `A–Z a–z 0–9 _ . : -` |
| integer | an integer, never `75.0`, `"75"` or `true`; at most {MAX_CREDITS:,} (2^53−1) |
| amount | an integer as well; at most {MAX_AMOUNT:,} (10^12) either way |
| time | text: ISO 8601 with an offset from UTC, such as `2026-01-31T09:00:00Z` |
| text | without the NUL character |
| object | at most {MAX_METADATA_BYTES // 1024} KiB as JSON, nested at most {MAX_METADATA_DEPTH} deep |

Credits are integers. An unknown field is refused, so a typing error never goes unnoticed."""

_ENDING = """## Credits that end

What a subscription gives ends with its period; a grant or a purchase with `expires_at` ends then; what a refund gives
back ends if what had paid would have ended, but not within 30 days. All other credits are permanent.

- **Order of use**: what is past its end and still held; then what ends first (at the same time, the subscription's);
  then the permanent ones, which alone may go below zero.
- **An end takes nothing from under a reservation.** What is past its end stays as long as open reservations cover it,
  and ends with the message, or the expiry, that releases them.
- **A debt comes first.** Whatever comes in, a period's credits too, brings a prepaid balance below zero back towards
  zero.

[credits.md](credits.md) tells the same with examples."""

_BOUNDS = f"""## Bounds

- One message moves at most {MAX_AMOUNT:,} credits (10^12): a larger amount is an `invalid_message`.
- A balance, what is reserved, a limit and a version are at most {MAX_CREDITS:,} (2^53−1), which every JSON client reads
  exactly: that is nine thousand of the largest messages.
- A message that would take a balance past that is a dead letter, `balance_out_of_range`. But **a finish is always
  applied**: the period's usage stays at the bound, and what would take the debt past it is not charged (`not_charged`).
  And a period always begins: what the wallet cannot hold is not granted (`not_granted`)."""

_ANSWERS = """## Answers

A sender that asks for it (`ignore_result=False`, and a `backend` to keep answers in) gets the task's result: an object,
kept for an hour. If the message became a dead letter, the task fails at once, and its error says why. So it does for a
sender that sets nothing (Celery's default), who gets no other answer."""

_EVENTS = """## Events

The credit history shows what a message did: one immutable row for each event, numbered without a gap within its wallet.
All events of a message are written at once. `credits` is the effect on what is available, so the column always adds up
to it. The event keeps the message's metadata; keys that the ledger adds, and `occurred_at`, replace the sender's. The
events of a workflow, and of its refunds, have its `workflow_id`, `project_id` and `activity_name`. A refund that an
older version wrote has none of them, but the filter by `workflow_id` finds it too."""

_DEAD_LETTERS = """## Dead letters

A message that cannot be applied changes nothing. It is kept as it arrived, with a code and a sentence that says what is
wrong, until an operator replays or discards it. A replay is the same message once more, so it can never apply twice. A
database or broker that is down makes no dead letters: messages wait."""


def _message(model: type[Message]) -> str:
    summary = (model.__doc__ or "").strip()
    own = [name for name in model.model_fields if name not in COMMON]
    source = model.model_fields["source"].default
    return "\n\n".join(
        [
            f"## `{model.task}`",
            " ".join(summary.split()),
            f"Known by {_identity(model)}. Default `source`: `{source}`. Takes away: {TAKES[model.task]}",
            _table(("field", "type", "default", "meaning"), [_field(model, name) for name in own]),
            f"```json\n{json.dumps(EXAMPLES[model.task], ensure_ascii=False)}\n```",
        ]
    )


def _identity(model: type[Message]) -> str:
    if issubclass(model, WorkflowMessage):
        names = ["org_id", "workflow_id"]
    else:
        assert issubclass(model, WalletMessage)
        versioned = ["version"] if issubclass(model, VersionedMessage) else []
        names = list(dict.fromkeys(["org_id", model.id_field, *versioned]))
    *most, last = [f"`{name}`" for name in names]
    return f"{', '.join(most)} and {last}"


def _field(model: type[Message], name: str) -> tuple[str, str, str, str]:
    field = model.model_fields[name]
    schema = model.model_json_schema()["properties"][name]
    if field.is_required() and name != "source":
        default = "required"
    elif name in ("source", "metadata"):
        default = {"source": "see the message", "metadata": "`{}`"}[name]
    else:
        default = f"`{json.dumps(field.default)}`"
    return f"`{name}`", _type(schema), default, field.description or ""


def _type(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"anyOf": [given, {"type": "null"}]}:
            return f"{_type(given)}, or null"
        case {"type": "integer"}:
            return _integer(schema)
        case {"type": "boolean"}:
            return "boolean"
        case {"format": "date-time"}:
            return "time"
        case {"enum": [*choices]}:
            return " or ".join(f"`{choice}`" for choice in choices)
        case {"minLength": least, "maxLength": most}:
            return f"text, {least}–{most} characters"
        case {"pattern": str()}:
            return "id"
        case {"type": "object"}:
            return "object"
        case _:
            raise ValueError(f"no words for {schema}")


def _integer(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema["maximum"]
    kind = {MAX_CREDITS: "integer", MAX_AMOUNT: "amount"}.get(most)
    if kind is None:
        return f"integer, {least:,} to {most:,}"
    if "exclusiveMinimum" in schema:
        return f"{kind} > {schema['exclusiveMinimum']}"
    return kind if least == -most else f"{kind} ≥ {least}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


def _must_be_the_same(documented: Iterable[str], existing: Iterable[str]) -> None:
    if difference := set(documented) ^ set(existing):
        raise ValueError(f"only documented, or only in the code: {', '.join(sorted(difference))}")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
