"""What an operator changes in a wallet: for each kind of change, its form, and the message that it becomes.

Everything that is typed is checked here, with a sentence for a person. What the ledger says about it is in `console`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from holdfast_client.messages import (
    MAX_AMOUNT,
    MAX_CREDITS,
    MAX_REASON_LENGTH,
    OPERATOR,
    OWN_REASONS,
    Adjust,
    AnyMessage,
    Cancel,
    Configure,
    Grant,
    Refund,
    Reverse,
)
from ledger import filters
from ledger.state import Refusal

WHY = "why"
"""The field of the reason, which every form has."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a form."""

    name: str
    label: str
    read: Callable[[str], Any]
    """The value of what was typed. Raises ValueError with a sentence."""
    hint: str = ""
    is_optional: bool = False
    kind: str = "text"
    """`text`, `date`, `number`, `check` or `choice`."""
    choices: tuple[tuple[str, str], ...] = ()
    """The values of a choice, each with its words."""


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of change."""

    name: str
    """Its part of the address."""
    title: str
    message: type[AnyMessage]
    key: str
    """The beginning of the idempotency key of the event that it becomes."""
    fields: tuple[Field, ...]
    terms: Callable[[str, Mapping[str, Any]], dict[str, Any]]
    """The fields of the message besides those of every message, from its id and the values of the form."""
    refused_at: Mapping[str, str] = field(default_factory=dict)
    """The field that is wrong, by the code with which the ledger refuses the message."""

    def understood(self, typed: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The value of each field, None for an optional one that is empty; and by field, what is wrong with it."""
        values: dict[str, Any] = {}
        errors: dict[str, str] = {}
        for each in self.fields:
            text = typed.get(each.name, "").strip()
            try:
                values[each.name] = None if not text and each.is_optional else each.read(text)
            except ValueError as error:
                errors[each.name] = str(error)
        return values, errors

    def payload(self, org_id: str, message_id: str, values: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """The message. Nothing that is typed can change who it says did it."""
        terms = self.terms(message_id, values)
        metadata = {**terms.pop("metadata", {}), "by": by}
        return {"org_id": org_id, **terms, "source": OPERATOR, "metadata": metadata}

    def about_refusal(self, refusal: Refusal) -> tuple[str, str]:
        """The field that is wrong, and a sentence about it."""
        if refusal.code == "unknown_purchase":
            return "purchase_id", "There is no such purchase in this wallet."
        said = refusal.error.partition(": ")[2]
        return self.refused_at.get(refusal.code, self.fields[0].name), f"{said[:1].upper()}{said[1:]}."


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number from `least` to `most`, also one such as `1,000` or `+5`."""

    def read(text: str) -> int:
        signed = text.replace("\N{MINUS SIGN}", "-")
        digits = re.sub(r"[,\s]", "", signed)
        is_whole = re.fullmatch(r"[+-]?(?:[0-9]{1,17}|[0-9]{1,3}(?:[,\s][0-9]{3}){1,5})", signed)  # never 1,5 as 15
        if not is_whole or not least <= int(digits) <= most:
            raise ValueError(f"Enter a whole number from {least:,} to {most:,}.")
        return int(digits)

    return read


def correction(text: str) -> int:
    """A number of credits to add or to take. Raises ValueError."""
    change = whole_number(-MAX_AMOUNT, MAX_AMOUNT)(text)
    if change == 0:
        raise ValueError("Enter a number that is not 0: 50 adds credits, -50 takes them.")
    return change


def last_day(text: str) -> str:
    """The end of a UTC day that is not over, or a moment to come, as ISO 8601. Raises ValueError."""
    try:
        end = filters.when(text).end
    except ValueError:
        raise ValueError("Enter a date, such as 2027-01-31.") from None
    if end <= datetime.now(UTC):
        raise ValueError("Enter a day that is not over yet.")
    if end.year >= 3000:
        raise ValueError("Enter a day before the year 3000.")
    return end.isoformat()


def identifier(what: str) -> Callable[[str], str]:
    """Reads the id of `what`, such as `a run`."""

    def read(text: str) -> str:
        try:
            return filters.identifier(text)
        except ValueError:
            raise ValueError(f"Enter the id of {what}: letters, digits and _ . : - without spaces.") from None

    return read


def reason(text: str) -> str:
    """One line that says why. Raises ValueError."""
    why = " ".join(text.split())
    if not why:
        raise ValueError("Say why, in a few words.")
    if len(why) > MAX_REASON_LENGTH or not why.isprintable():
        raise ValueError(f"Say why in at most {MAX_REASON_LENGTH} characters, and in letters that can be seen.")
    if why.casefold() in OWN_REASONS:
        raise ValueError("Use other words: this is a reason that only the ledger gives.")
    return why


def one_of(*choices: str) -> Callable[[str], str]:
    """Reads one of `choices`."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError("Choose one of them.")
        return text

    return read


_CREDITS = Field("credits", "Credits", whole_number(1, MAX_AMOUNT), kind="number")
_WHY = Field(WHY, "Reason", reason, "Customers see it in their credit history, with your name.")
_RUN = Field("workflow_id", "Run", identifier("a run"), "The workflow's id.")
_PAYMENTS = (("refunded", "The payment was refunded"), ("disputed", "The payment was disputed"))

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form(
            "grant",
            "Grant credits",
            Grant,
            "grant",
            (
                _CREDITS,
                Field("last_day", "Last day (UTC)", last_day, "Empty: they do not expire.", True, "date"),
                _WHY,
            ),
            lambda message_id, said: {
                "grant_id": message_id,
                "credits": said["credits"],
                "expires_at": said["last_day"],
                "reason": said[WHY],
            },
        ),
        Form(
            "adjust",
            "Adjust the balance",
            Adjust,
            "adjustment",
            (
                Field("credits", "Credits", correction, "50 adds credits, -50 takes them.", kind="number"),
                Field("allow_negative", "The balance may end below zero", one_of("yes"), "", True, "check"),
                _WHY,
            ),
            lambda message_id, said: {
                "adjustment_id": message_id,
                "credits": said["credits"],
                "allow_negative": said["allow_negative"] is not None,
                "reason": said[WHY],
            },
        ),
        Form(
            "refund",
            "Refund a run",
            Refund,
            "refund",
            (_RUN, _CREDITS, _WHY),
            lambda message_id, said: {
                "refund_id": message_id,
                "credits": said["credits"],
                "workflow_id": said["workflow_id"],
                "metadata": {"reason": said[WHY]},
            },
            {"refund_exceeds_usage": "credits", "balance_out_of_range": "credits"},
        ),
        Form(
            "reverse",
            "Take back a purchase",
            Reverse,
            "reversal",
            (
                Field("purchase_id", "Purchase", identifier("a purchase"), "The order's id."),
                Field(
                    "credits",
                    "Credits",
                    whole_number(1, MAX_AMOUNT),
                    "Empty: all that were not taken back before.",
                    True,
                    "number",
                ),
                Field("payment", "Payment", one_of(*dict(_PAYMENTS)), kind="choice", choices=_PAYMENTS),
                _WHY,
            ),
            lambda message_id, said: {
                "reversal_id": message_id,
                "purchase_id": said["purchase_id"],
                "credits": said["credits"],
                "reason": said["payment"],
                "metadata": {"given_reason": said[WHY]},
            },
            {"reversal_exceeds_purchase": "credits", "balance_out_of_range": "credits"},
        ),
        Form(
            "release",
            "Release a reservation",
            Cancel,
            "release",
            (_RUN, _WHY),
            lambda _, said: {"workflow_id": said["workflow_id"], "reason": said[WHY]},
        ),
        Form(
            "limits",
            "Change the limits",
            Configure,
            "configure",
            (
                Field(
                    "credit_limit",
                    "Credit limit",
                    whole_number(0, MAX_CREDITS),
                    "How far below zero reservations may take what is available.",
                    kind="number",
                ),
                Field(
                    "period_cap",
                    "Cap of a period",
                    whole_number(0, MAX_CREDITS),
                    "The most credits used in one period. Empty: no cap.",
                    True,
                    "number",
                ),
                _WHY,
            ),
            lambda message_id, said: {
                "version": int(message_id),
                "credit_limit": said["credit_limit"],
                "period_cap": said["period_cap"],
                "reason": said[WHY],
            },
        ),
    )
}
"""Every form, by its name."""
