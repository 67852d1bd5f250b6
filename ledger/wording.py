"""Amounts, times, names and metadata in words: for the pages and for the terminal. Pure."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta
from typing import Any, NamedTuple

from holdfast_client.messages import OPERATOR
from ledger.readable import as_json
from ledger.state import EventType

MINUS = "\N{MINUS SIGN}"


def amount(credits: int) -> str:
    """12,345 or −12,345."""
    return f"{credits:,}".replace("-", MINUS)


def change(credits: int) -> str:
    """+12,345, −12,345 or 0."""
    return f"+{credits:,}" if credits > 0 else amount(credits)


def counted(number: int, noun: str) -> str:
    """1 wallet, 2 wallets."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def share(part: int, whole: int) -> str:
    """43 %. What is there, but less than one percent, is <1 %."""
    percent = round(100 * part / whole)
    return f"{percent} %" if percent or not part else "<1 %"


def day(moment: datetime) -> str:
    """2 Nov 2026, in UTC."""
    utc = moment.astimezone(UTC)
    return f"{utc.day} {utc:%b} {utc.year}"


def near_day(moment: datetime, now: datetime) -> str:
    """2 Nov, in UTC; with the year if it is not that of `now`."""
    utc = moment.astimezone(UTC)
    return f"{utc.day} {utc:%b}" if utc.year == now.astimezone(UTC).year else day(moment)


def clock(moment: datetime) -> str:
    """14:05:33, in UTC."""
    return f"{moment.astimezone(UTC):%H:%M:%S}"


def during(first: datetime | None, before: datetime | None) -> str:
    """A range of time, of which `before` is no part: 1 Nov 2026 – 20 Nov 2026, from …, until …, or all time."""
    begin = None if first is None else _moment_or_day(first)
    end = None if before is None else _last_moment_or_day(before)
    if begin is None:
        return "all time" if end is None else f"until {end}"
    if end is None:
        return f"from {begin}"
    return begin if begin == end else f"{begin} – {end}"


def _moment_or_day(moment: datetime) -> str:
    return day(moment) if moment.astimezone(UTC).time() == time.min else f"{day(moment)} {clock(moment)}"


def _last_moment_or_day(before: datetime) -> str:
    is_midnight = before.astimezone(UTC).time() == time.min
    return day(before - timedelta(microseconds=1)) if is_midnight else f"{day(before)} {clock(before)}"


def label(name: str) -> str:
    """A name in words: `prepaid_purchase` becomes Prepaid purchase."""
    return name.replace("_", " ").capitalize()


def in_the_archive(events: int, through: datetime) -> str:
    """Where the older events of an organization are."""
    which = "event is" if events == 1 else f"{amount(events)} events are"
    return f"The first {which} in the archive: until {day(through)}, {clock(through)}."


class Fact(NamedTuple):
    """An entry of metadata in words."""

    name: str
    """Empty, if the value says it all; the key itself, if the ledger does not know it."""
    value: str

    def __str__(self) -> str:
        return f"{self.name} {self.value}" if self.name else self.value


def facts(event_type: EventType, metadata: Mapping[str, Any], source: str) -> list[Fact]:
    """The metadata of an event in words: what the ledger wrote, and then what only the sender knows, as it is.

    Who did it is known only of what operators do. Any other sender may write any name there, and that is said.
    """
    names = {**_OF_EVERY_EVENT, **({"by": "By"} if source == OPERATOR else {}), **NAMES[event_type]}
    in_order = sorted(names, key=lambda key: (key in _IDS, key not in NAMES[event_type]))
    known = [key for key in in_order if key in metadata and not (key == _END and _BEGIN in metadata)]
    as_they_are = [Fact(key, in_words(value)) for key, value in metadata.items() if key not in names]
    return [_fact(event_type, key, names[key], metadata) for key in known] + as_they_are


def _fact(event_type: EventType, key: str, name: str, metadata: Mapping[str, Any]) -> Fact:
    value = metadata[key]
    match value:
        case str() | bool() if sentence := _SENTENCES.get((event_type, key, value)):
            return Fact("", sentence)
        case str() if key == _BEGIN and isinstance(metadata.get(_END), str):
            return Fact("Period", f"{_on_day(value)} – {_on_day(metadata[_END])}")
        case {} if key == "paid_by":
            return Fact(
                name, ", ".join(f"{_PAYERS.get(payer, payer)} {in_words(paid)}" for payer, paid in value.items())
            )
        case [*parts] if key == "ending":
            return Fact(
                name, ", ".join(f"{in_words(part['credits'])} on {_on_day(part['expires_at'])}" for part in parts)
            )
    return Fact(name, in_words(value))


_BEGIN, _END = "period_start", "period_end"

NAMES: Mapping[EventType, Mapping[str, str]] = {
    "usage": {
        "paid_by": "Paid by",
        "overrun": "More than there was:",
        "not_charged": "Not charged:",
        "unreserved": "Without a reservation:",
    },
    "prepaid_purchase": {"purchase_id": "Purchase", "expires_at": "Ends", "debt_settled": "Settled a debt of"},
    "subscription_credit": {
        "reason": "Reason:",
        "plan": "Plan",
        "replaced_plan": "Before:",
        "monthly_credits": "A month:",
        "effective_at": "From",
        _BEGIN: "Begins",
        _END: "Ends",
        "debt_settled": "Settled a debt of",
        "not_granted": "Not granted:",
        "subscription_id": "Subscription",
    },
    "billing": {
        "invoice_id": "Invoice",
        "reason": "Reason:",
        "reversal_id": "Reversal",
        "purchase_id": "Purchase",
        "from_ending": "Of them with an end:",
        "debt_settled": "Settled a debt of",
        "credit_limit": "Credit limit",
        "period_cap": "Cap of a period:",
        "version": "Version",
        "billing_id": "Entry",
    },
    "adjustment": {
        "reason": "Reason:",
        "plan": "Plan",
        "grant_id": "Grant",
        "purchase_id": "Purchase",
        "refund_id": "Refund",
        "expires_at": "Ended",
        "from_ending": "Of them with an end:",
        "debt_settled": "Settled a debt of",
        "adjustment_id": "Correction",
        "subscription_id": "Subscription",
    },
    "grant": {"reason": "Reason:", "expires_at": "Ends", "debt_settled": "Settled a debt of", "grant_id": "Grant"},
    "refund": {
        "workflow_id": "Run",
        "ending": "Ends:",
        "debt_settled": "Settled a debt of",
        "refund_id": "Refund",
    },
    "reservation": {"expires_at": "Held until"},
    "reservation_released": {"reason": "Run ended:", "given_reason": "Reason:"},
}
"""The names of what the ledger writes into the metadata of each type of event, in the order in which it is read."""

_OF_EVERY_EVENT = {"description": "", "reason": "Reason:", "by": "By, as its sender says:", "occurred_at": "Happened"}
"""The names of what every sender may give."""
_IDS = ("billing_id", "adjustment_id", "subscription_id", "grant_id", "refund_id", "purchase_id", "reversal_id")
"""What is read last."""

_SENTENCES: Mapping[tuple[EventType, str, str | bool], str] = {
    ("usage", "unreserved", True): "Nothing was reserved",
    ("subscription_credit", "reason", "plan_change"): "The plan was changed",
    ("billing", "reason", "refunded"): "The payment was refunded",
    ("billing", "reason", "disputed"): "The payment was disputed",
    ("adjustment", "reason", "subscription_expired"): "Unused credits of the plan ended",
    ("adjustment", "reason", "grant_expired"): "Credits of a grant ended",
    ("adjustment", "reason", "purchase_expired"): "Credits of a purchase ended",
    ("adjustment", "reason", "refund_expired"): "Credits of a refund ended",
    ("reservation_released", "reason", "settled"): "The run finished",
    ("reservation_released", "reason", "cancelled"): "The run was cancelled",
    ("reservation_released", "reason", "failed"): "The run failed",
    ("reservation_released", "reason", "expired"): "The run never ended, so the reservation expired",
}

_PAYERS = {"subscription": "plan", "ending": "credits with an end", "prepaid": "prepaid"}

_MOMENT = re.compile(r"20\d\d-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-5]\d(\.\d{1,6})?\+00:00", re.ASCII)
"""A moment as the ledger itself writes it in metadata."""


def _moment(value: str) -> datetime | None:
    if not _MOMENT.fullmatch(value):
        return None
    try:
        return datetime.fromisoformat(value)
    except ValueError:  # the 31st of February
        return None


def _on_day(value: str) -> str:
    moment = _moment(value)
    return value if moment is None else day(moment)


def in_words(value: object) -> str:
    """A JSON value: an amount, a moment, the text itself, or JSON."""
    match value:
        case {}:
            return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
        case str():
            moment = _moment(value)
            return value if moment is None else f"{day(moment)} {moment:%H:%M}"
        case int() if not isinstance(value, bool):
            return amount(value)
    return as_json(value)
