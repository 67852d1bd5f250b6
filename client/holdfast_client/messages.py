"""The messages that the ledger takes: one model for each, and `parse`, which never raises.

A message is checked here completely, once, before anything else reads it: its types, its bounds and its text. A valid
message can be written to the database unchanged. Nothing here knows a wallet: `rules` decides what a message does.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError, to_json

from holdfast_client.results import ErrorCode

MAX_CREDITS = 2**53 - 1
"""The largest balance or limit, in credits: every JSON client reads it exactly."""

MAX_AMOUNT = 10**12
"""The most credits that one message moves. Nine thousand times as much is the largest balance."""

MAX_BODY_BYTES = 64 * 1024
"""The largest body of a message, as it is sent. A valid one has at most 24 KiB, even with every character escaped."""

SUSPECT, DELIVERY_LIMIT = 3, 20
"""How many workers a message may end before it is taken alone, and before it becomes a dead letter."""

MAX_PROBLEMS = 10
"""The most problems that one error names."""

MAX_METADATA_BYTES = 8 * 1024
"""The largest metadata of a message, as compact JSON in UTF-8."""

MAX_METADATA_DEPTH = 20
"""How deep objects and lists may be nested in metadata; the metadata object itself is level 1."""

MAX_METADATA_INTEGER_BITS = 1_024
"""The longest integer in metadata."""

OPERATOR = "operator"
"""The source of what an operator does. Over HTTP nobody else may name it; `by` in the metadata says who it was."""

ERASED = {"erased": True}
"""What replaces a reason in the terms of a message that was applied, once the organization's free text was erased."""

OWN_REASONS = frozenset({"subscription_expired", "grant_expired", "purchase_expired", "refund_expired"})
"""Reasons for an adjustment that only the ledger gives."""


def _plain_text(text: str) -> str:
    if "\x00" in text:
        raise PydanticCustomError("nul_character", "must not contain the NUL character")
    return text


def _instant(value: object) -> datetime:
    if not isinstance(value, str):
        raise PydanticCustomError("instant_type", "must be an ISO 8601 string, such as 2026-01-31T09:00:00Z")
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        raise PydanticCustomError("instant_form", "must be an ISO 8601 date and time") from None
    if instant.tzinfo is None:
        raise PydanticCustomError("instant_offset", "must have an offset from UTC, such as Z or +02:00")
    if not 1970 < instant.year < 3000:
        raise PydanticCustomError("instant_range", "must be between the years 1971 and 2999")
    return instant.astimezone(UTC)


def _metadata(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PydanticCustomError("metadata_type", "must be a JSON object")
    if problem := _metadata_problem(value, depth=1):
        raise PydanticCustomError("metadata", "{problem}", {"problem": problem})
    if len(to_json(value)) > MAX_METADATA_BYTES:
        raise PydanticCustomError("metadata", f"must not be larger than {MAX_METADATA_BYTES // 1024} KiB as JSON")
    return value


def _metadata_problem(value: object, *, depth: int) -> str | None:
    """The first reason why JSON or PostgreSQL cannot hold `value`, or None."""
    match value:
        case str() if "\x00" in value:
            return "must not contain the NUL character"
        case str() if _HALF_A_SURROGATE_PAIR.search(value):
            return "must not contain half a surrogate pair"
        case float() if not math.isfinite(value):
            return "must not contain NaN or Infinity"
        case int() if value.bit_length() > MAX_METADATA_INTEGER_BITS:
            return f"must not contain an integer of more than {MAX_METADATA_INTEGER_BITS:,} bits"
        case None | str() | bool() | int() | float():
            return None
        case dict() | list() if depth > MAX_METADATA_DEPTH:
            return f"must not be nested deeper than {MAX_METADATA_DEPTH} levels"
        case dict():
            if not all(isinstance(key, str) for key in value):
                return "must have strings as keys"
            return _first_problem(value, depth=depth) or _first_problem(value.values(), depth=depth + 1)
        case list():
            return _first_problem(value, depth=depth + 1)
        case _:
            return f"must not contain a {type(value).__name__}"


def _first_problem(values: Iterable[object], *, depth: int) -> str | None:
    for value in values:
        if problem := _metadata_problem(value, depth=depth):
            return problem
    return None


_HALF_A_SURROGATE_PAIR = re.compile("[\ud800-\udfff]")


def _given_reason(reason: str) -> str:
    if reason.strip().casefold() in OWN_REASONS:
        raise PydanticCustomError("reason", "must not be a reason that only the ledger gives")
    return reason


ID_CHARACTERS = "A-Za-z0-9_.:-"
MAX_ID_LENGTH = 128
ID_PATTERN = f"[{ID_CHARACTERS}]{{1,{MAX_ID_LENGTH}}}"

Id = Annotated[str, StringConstraints(pattern=f"^{ID_PATTERN}$")]
"""1 to `MAX_ID_LENGTH` characters of `A-Z a-z 0-9 _ . : -`."""

PLAIN_TEXT_PATTERN = r"^[^\x00]*$"
"""The rule of `_plain_text`, for a JSON Schema."""

TIME_PATTERN = r"[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-5][0-9](\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})"
"""A time after its year and hyphen, for a JSON Schema: as in RFC 3339, but without leap seconds."""

_PLAIN = Field(json_schema_extra={"pattern": PLAIN_TEXT_PATTERN})

Source = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64),
    AfterValidator(_plain_text),
    Field(description="The sender, as the credit history shows it."),
    _PLAIN,
]
MAX_NAME_LENGTH = 256
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_LENGTH), AfterValidator(_plain_text), _PLAIN]
MAX_REASON_LENGTH = 500
Reason = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_REASON_LENGTH), AfterValidator(_plain_text), _PLAIN
]
Instant = Annotated[
    datetime,
    BeforeValidator(_instant),
    Field(json_schema_extra={"pattern": f"^(197[1-9]|19[89][0-9]|2[0-9]{{3}})-{TIME_PATTERN}$"}),
]
"""A point in time, given as ISO 8601 text with an offset, held in UTC."""

Metadata = Annotated[dict[str, Any], PlainValidator(_metadata), WithJsonSchema({"type": "object"})]

Credits = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]
PositiveCredits = Annotated[int, Field(gt=0, le=MAX_AMOUNT)]
SignedCredits = Annotated[int, Field(ge=-MAX_AMOUNT, le=MAX_AMOUNT)]
MostCredits = Annotated[int, Field(ge=0, le=MAX_CREDITS)]
"""What nobody is given or charged: it bounds balances, so it may be as large as they."""
Version = Annotated[int, Field(ge=1, le=MAX_CREDITS)]


def _at_most_monthly(credits: int | None, info: ValidationInfo) -> int | None:
    monthly: int | None = info.data.get("monthly_credits")
    if credits is not None and monthly is not None and credits > monthly:
        raise PydanticCustomError(
            "above_monthly",
            "must not be above monthly_credits, {monthly}, got {credits}",
            {"monthly": monthly, "credits": credits},
        )
    return credits


def _not_zero(credits: int) -> int:
    if credits == 0:
        raise PydanticCustomError("zero", "must not be 0")
    return credits


_PROJECT = "The project, for the credit history."
_ACTIVITY = "The activity's name, for the credit history."
_EXPIRES_AT = "When the credits end. Default: never. Credits with a time in the past end at once."
_GIVEN_REASON = "The reason; kept as `given_reason` in the event's metadata."


class Message(BaseModel):
    """The fields of every message. Types are strict: `75.0`, `"75"` and `true` are not integers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: ClassVar[str]
    """The name of the Celery task that takes the message."""

    org_id: Id = Field(description="The organization that owns the wallet.")
    source: Source
    occurred_at: Instant | None = Field(
        default=None,
        description="When it happened. Kept in the event's metadata; the ledger's own clock dates the event.",
    )
    metadata: Metadata = Field(default_factory=dict, description="Kept in the metadata of the message's events.")

    @property
    def workflow_key(self) -> tuple[str, str] | None:
        """The (org_id, workflow_id) of the workflow that the message names, or None."""
        return None

    @property
    def subscription_key(self) -> tuple[str, str] | None:
        """The (org_id, subscription_id) of the subscription that the message names, or None."""
        return None


class WorkflowMessage(Message):
    """A step in a workflow's life. Idempotent by (org_id, workflow_id, task)."""

    workflow_id: Id = Field(description="The workflow. Never used again for another one.")
    source: Source = "workflow-engine"

    @property
    def workflow_key(self) -> tuple[str, str]:
        """The (org_id, workflow_id) of the workflow."""
        return self.org_id, self.workflow_id


class Start(WorkflowMessage):
    """Reserve `credits` for a workflow, for at most `expires_in_s` seconds, or reject it."""

    task = "workflow.start"
    credits: Credits = Field(description="The credits to reserve: the most that the workflow is expected to use.")
    project_id: Id | None = Field(default=None, description=_PROJECT)
    activity_name: Name | None = Field(default=None, description=_ACTIVITY)
    expires_in_s: Annotated[int, Field(ge=60, le=2_592_000)] = Field(
        default=86_400, description="Seconds after which a reservation that is still open is released."
    )


class Finish(WorkflowMessage):
    """The workflow is done: release its reservation and charge the `credits` that it used."""

    task = "workflow.finish"
    credits: Credits = Field(description="The credits used: charged in full, whatever was reserved.")
    project_id: Id | None = Field(default=None, description=f"{_PROJECT} Default: as in the start.")
    activity_name: Name | None = Field(default=None, description=f"{_ACTIVITY} Default: as in the start.")


class Cancel(WorkflowMessage):
    """The workflow was cancelled: release its reservation."""

    task = "workflow.cancel"
    reason: Reason | None = Field(default=None, description=_GIVEN_REASON)


class Fail(WorkflowMessage):
    """The workflow failed: release its reservation."""

    task = "workflow.fail"
    reason: Reason | None = Field(default=None, description=_GIVEN_REASON)


class WalletMessage(Message):
    """A change of the wallet itself. Idempotent by (org_id, kind, message_id)."""

    kind: ClassVar[str]
    """The kind of message. A message's id is unique within (org_id, kind)."""

    id_field: ClassVar[str]

    @property
    def message_id(self) -> str:
        """The message's own id, unique within (org_id, kind)."""
        return str(getattr(self, self.id_field))

    @property
    def posted_key(self) -> tuple[str, str, str]:
        """The (org_id, kind, message_id) by which a repeated message is recognized."""
        return self.org_id, self.kind, self.message_id

    def terms(self) -> dict[str, Any]:
        """The fields that must be the same in a repeated message, as JSON values."""
        return self.model_dump(mode="json", exclude={*Message.model_fields, self.id_field})


class Purchase(WalletMessage):
    """The organization bought prepaid `credits`."""

    task, kind, id_field = "wallet.purchase", "purchase", "purchase_id"
    purchase_id: Id = Field(description="The purchase.")
    credits: PositiveCredits = Field(description="The credits bought.")
    expires_at: Instant | None = Field(default=None, description=_EXPIRES_AT)
    source: Source = "billing"


class Grant(WalletMessage):
    """The organization was given prepaid `credits`."""

    task, kind, id_field = "wallet.grant", "grant", "grant_id"
    grant_id: Id = Field(description="The grant.")
    credits: PositiveCredits = Field(description="The credits given.")
    reason: Reason | None = Field(default=None, description="The reason; kept in the event's metadata.")
    expires_at: Instant | None = Field(default=None, description=_EXPIRES_AT)
    source: Source = "admin"


class Adjust(WalletMessage):
    """Correct the prepaid balance by `credits`.

    Without `allow_negative` it takes neither the prepaid balance nor what is available below zero.
    """

    task, kind, id_field = "wallet.adjust", "adjustment", "adjustment_id"
    adjustment_id: Id = Field(description="The adjustment.")
    credits: Annotated[SignedCredits, AfterValidator(_not_zero)] = Field(
        description="The correction; not 0.", json_schema_extra={"not": {"const": 0}}
    )
    reason: Annotated[Reason, AfterValidator(_given_reason)] = Field(
        description="The reason; kept in the event's metadata. Not one that only the ledger gives, such as "
        "`subscription_expired`.",
        json_schema_extra={"not": {"enum": [*sorted(OWN_REASONS)]}},
    )
    allow_negative: bool = Field(default=False, description="Whether the balance may end below zero.")
    source: Source = "admin"


class Refund(WalletMessage):
    """Give `credits` back; for a named workflow never more, in total, than it used, and to where they came from.

    What permanent credits paid is permanent again. The rest ends as it would have ended, but not within 30 days.
    """

    task, kind, id_field = "wallet.refund", "refund", "refund_id"
    refund_id: Id = Field(description="The refund.")
    credits: PositiveCredits = Field(description="The credits given back.")
    workflow_id: Id | None = Field(default=None, description="The workflow whose usage is refunded.")
    source: Source = "billing"

    @property
    def workflow_key(self) -> tuple[str, str] | None:
        """The (org_id, workflow_id) of the workflow whose usage is refunded."""
        return None if self.workflow_id is None else (self.org_id, self.workflow_id)


class Bill(WalletMessage):
    """A billing entry; `credits` may be positive, negative or 0 (an entry for the record)."""

    task, kind, id_field = "wallet.bill", "billing", "billing_id"
    billing_id: Id = Field(description="The entry.")
    credits: SignedCredits = Field(
        description="The effect on the prepaid balance. It takes neither that nor the available balance below zero."
    )
    invoice_id: Id | None = Field(default=None, description="The invoice that the entry belongs to.")
    source: Source = "billing"


class Reverse(WalletMessage):
    """The payment of a purchase was taken back: take its `credits` back, even below zero."""

    task, kind, id_field = "wallet.reverse", "reversal", "reversal_id"
    reversal_id: Id = Field(description="The reversal.")
    purchase_id: Id = Field(description="The purchase.")
    credits: PositiveCredits | None = Field(
        default=None, description="How much of it. Default: all of it that was not reversed before."
    )
    reason: Literal["refunded", "disputed"] = Field(description="Why; kept in the event's metadata.")
    source: Source = "billing"

    @property
    def purchase_key(self) -> tuple[str, str, str]:
        """The (org_id, kind, message_id) of the purchase."""
        return self.org_id, Purchase.kind, self.purchase_id


class VersionedMessage(WalletMessage):
    """A setting that replaces the one before it: only a higher `version` has an effect."""

    version: Version = Field(description="Has an effect only if it is higher than every version before.")


class SubscriptionMessage(VersionedMessage):
    """A change of one subscription. Its version only grows within the organization, across its subscriptions."""

    id_field = "subscription_id"
    subscription_id: Id = Field(description="The subscription.")
    source: Source = "billing"

    @property
    def message_id(self) -> str:
        """Every version of a subscription is a message of its own."""
        return f"{self.subscription_id}:{self.version}"

    @property
    def subscription_key(self) -> tuple[str, str]:
        """The (org_id, subscription_id) of the subscription."""
        return self.org_id, self.subscription_id


class Subscribe(SubscriptionMessage):
    """The organization gets `monthly_credits` every month, counted from `anchor` (default: when first applied).

    At the end of a period, up to `rollover_limit` of the credits left are kept. An anchor in the future schedules the
    subscription: until then, the current one goes on.
    """

    task, kind = "wallet.subscribe", "subscribe"
    plan: Name = Field(description="The plan's name, as customers read it.")
    monthly_credits: Credits = Field(description="The credits granted in each period.")
    rollover_limit: MostCredits = Field(default=0, description="The most credits kept at the end of a period.")
    anchor: Instant | None = Field(
        default=None,
        description="When the first period starts; it sets the day of the month for all others. It never changes.",
    )
    first_credits: Annotated[Credits | None, AfterValidator(_at_most_monthly)] = Field(
        default=None,
        description="What its first period is given, for a trial or a part of a month; at most `monthly_credits`. "
        "Default: as any other; in a later version, with as much less as before.",
    )


class Unsubscribe(SubscriptionMessage):
    """End the allocations; the credits left expire when the period ends."""

    task, kind = "wallet.unsubscribe", "unsubscribe"


class Configure(VersionedMessage):
    """Set both limits of the wallet: a field left out goes back to its default."""

    task, kind, id_field = "wallet.configure", "configure", "version"
    credit_limit: MostCredits = Field(
        default=0, description="How far below zero reservations may take the available balance."
    )
    period_cap: MostCredits | None = Field(
        default=None,
        description="The most credits used and reserved within one subscription period, or at all while there is no "
        "subscription. Null: no cap.",
    )
    reason: Reason | None = Field(
        default=None,
        description="The reason. With it, the history shows the change: an event of 0 credits with the new limits.",
    )
    source: Source = "admin"


AnyWorkflowMessage = Start | Finish | Cancel | Fail
AnyWalletMessage = Purchase | Grant | Adjust | Refund | Bill | Reverse | Subscribe | Unsubscribe | Configure
AnyMessage = AnyWorkflowMessage | AnyWalletMessage
"""Every message. `rules.decide` has a rule for each; mypy names one without a rule."""

MESSAGES: dict[str, type[AnyMessage]] = {model.task: model for model in get_args(AnyMessage)}
"""Every message by its task name."""

_BY_LAST_NAME = {task.partition(".")[2]: task for task in MESSAGES}


@dataclass(frozen=True, slots=True)
class InvalidMessage:
    """Why a payload is not a valid message, in words for a person."""

    code: ErrorCode
    error: str
    org_id: str | None


WORKFLOW_TASKS = frozenset(model.task for model in get_args(AnyWorkflowMessage))
"""The tasks that an engine may send."""


def too_large_body(size: int, sha256: str) -> InvalidMessage:
    """The error for a body of `size` bytes, more than MAX_BODY_BYTES. `sha256`: of the whole body, in hexadecimal."""
    kept = f"only the first {MAX_BODY_BYTES:,} are kept; the SHA-256 of the whole body is {sha256}"
    return InvalidMessage("too_large", f"the body has {size:,} bytes, more than {MAX_BODY_BYTES:,}: {kept}", None)


def too_large_entry(size: int, limit: int, sha1: str) -> InvalidMessage:
    """The error for an entry of the queue of `size` bytes, more than `limit`. `sha1`: of the whole entry."""
    kept = f"only the body in its first {MAX_BODY_BYTES:,} is kept; the SHA-1 of the whole entry is {sha1}"
    error = f"the message's entry in the queue has {size:,} bytes, more than {limit:,}: {kept}"
    return InvalidMessage("too_large", error, None)


def parse(task: str, payload: object) -> AnyMessage | InvalidMessage:
    """Read the JSON value `payload` as a message of `task`. An InvalidMessage is returned unchanged. Never raises."""
    if isinstance(payload, InvalidMessage):
        return payload
    model = MESSAGES.get(task)
    if model is None:
        similar = _similar(task.rpartition(".")[2], _BY_LAST_NAME)
        hint = f"; did you mean {_BY_LAST_NAME[similar]}?" if similar else ""
        return InvalidMessage("unknown_task", f"there is no task named {_shown(task)}{hint}", _org_id(payload))
    if not isinstance(payload, dict):
        return InvalidMessage(
            "invalid_message", f"{task}: the message must be a JSON object, got {_shown(payload)}", None
        )
    try:
        return model.model_validate(payload)
    except ValidationError:
        return InvalidMessage("invalid_message", f"{task}: {named(_problems(model, payload))}", _org_id(payload))


def named(problems: Iterator[str]) -> str:
    """The first MAX_PROBLEMS of `problems` in one sentence, and how many more there are."""
    first = "; ".join(islice(problems, MAX_PROBLEMS))
    more = sum(1 for _ in problems)
    return f"{first}; … and {more:,} more" if more else first


def _problems(model: type[Message], payload: dict[Any, object]) -> Iterator[str]:
    """Everything that is wrong with `payload`, one sentence each."""
    try:
        model.model_validate({name: value for name, value in payload.items() if name in model.model_fields})
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            yield _sentence(detail)
    unknown = [str(name) for name in payload if name not in model.model_fields]
    for number, name in enumerate(unknown):
        # Only for those that are shown: a hostile message may have thousands.
        similar = _similar(name, model.model_fields.keys() - payload.keys()) if number < MAX_PROBLEMS else None
        hint = f" (did you mean {similar}?)" if similar else ""
        yield f"{ascii(name)[1:-1][:64]} is not a field of this message{hint}"


def _similar(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that somebody who wrote `name` may have meant."""
    return next(iter(difflib.get_close_matches(name[:64], sorted(names), n=1)), None)


def _sentence(detail: ErrorDetails) -> str:
    field = ".".join(map(str, detail["loc"]))
    match detail["type"]:
        case "missing":
            return f"{field} is missing"
        case "string_unicode":
            return f"{field} must not contain half a surrogate pair"
        case "string_pattern_mismatch":
            return f"{field} must be 1-{MAX_ID_LENGTH} characters of A-Z a-z 0-9 _ . : -, got {_shown(detail['input'])}"
        case "metadata" | "reason" | "zero" | "above_monthly":
            return f"{field} {detail['msg']}"
        case _:
            problem = detail["msg"].removeprefix("Input ").removeprefix("String ").replace("should ", "must ", 1)
            said = f"{field} {problem[0].lower()}{problem[1:]}"
            said = said.replace("a valid integer", "an integer").replace("a valid boolean", "true or false")
            return f"{said}, got {_shown(detail['input'])}"


def _shown(value: object) -> str:
    """`value` as short, printable text: a person reads it in a terminal, PostgreSQL stores it."""
    match value:
        case dict() | list():
            return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
        case None | bool():
            return json.dumps(value)
        case int() if value.bit_length() > MAX_METADATA_INTEGER_BITS:
            return f"an integer of {value.bit_length():,} bits"
        case _:
            text = ascii(value)
            return text if len(text) <= 80 else f"{text[:77]}..."


def _org_id(payload: object) -> str | None:
    """The organization that a bad message names, if its id could exist."""
    match payload:
        case {"org_id": str(org_id)} if org_id.isascii() and org_id.isprintable() and 1 <= len(org_id) <= MAX_ID_LENGTH:
            return org_id
        case _:
            return None
