"""A wallet in sentences: how much is available and why, how long it lasts, and what comes or ends next. Pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from ledger.usage import Rate
from ledger.views import NextCredits, WalletView
from ledger.wording import MINUS, amount, near_day

LONG = timedelta(days=365)
"""From so far ahead on, no day is named."""

_FAR = 1_000_000
"""So many days ahead is as good as for ever, and still a date."""


class Term(NamedTuple):
    """One term of the sum that is available."""

    credits: int
    what: str
    """`prepaid`, `plan` or `held`."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What to tell the owner of a wallet."""

    available: int
    terms: tuple[Term, ...]
    """They add up to `available`. Those that are 0 are left out."""
    sentences: tuple[str, ...]
    """What to know, the most urgent first: plain text, in which names of plans stand as they are."""

    @property
    def arithmetic(self) -> str:
        """3,318 prepaid + 403 plan − 393 held. Of a single term, or of none, nothing that is not said already."""
        first, *others = self.terms or (Term(0, "prepaid"),)
        rest = (f" {MINUS if part.credits < 0 else '+'} {abs(part.credits):,} {part.what}" for part in others)
        return f"{amount(first.credits)} {first.what}{''.join(rest)}"


def outlook(view: WalletView, rate: Rate | None, now: datetime) -> Outlook:
    """What to tell about the wallet `view` at the time `now`. `rate`: None, if it is too new to say."""
    terms = (
        Term(view.prepaid_balance, "prepaid"),
        Term(view.subscription_balance, "plan"),
        Term(-view.reserved_credits, "held"),
    )
    sentences = (
        _overdrawn(view),
        lasting(view, rate, now),
        _last_of_plan(view, now),
        _ending(view, now),
        _limit(view),
        _cap(view),
    )
    return Outlook(
        view.available,
        tuple(term for term in terms if term.credits),
        tuple(sentence for sentence in sentences if sentence is not None),
    )


def _overdrawn(view: WalletView) -> str | None:
    if view.spendable > 0:
        return None
    if view.credit_limit:
        added = f"more than {-view.spendable:,} is added" if view.spendable else "credits are added"
        return f"The credit limit of {view.credit_limit:,} is used up: new runs are refused until {added}."
    if view.available == 0:
        return "Nothing is available: new runs are refused until credits are added."
    return f"Overdrawn by {-view.available:,}: new runs are refused until more than that is added."


def lasting(view: WalletView, rate: Rate | None, now: datetime) -> str | None:
    """How long the credits last, and what comes next. None: nothing is known."""
    coming = view.next_credits if view.next_credits is not None and view.next_credits.at > now else None
    adds = None if coming is None else _adds(coming)
    if rate is None or view.available <= 0:
        return None if coming is None else f"On {near_day(coming.at, now)}, {adds}."
    if rate.credits_per_day == 0:
        return "Nothing was used in the days before today." + (
            f" On {near_day(coming.at, now)}, {adds}." if coming else ""
        )
    used, until = f"About {rate.credits_per_day:,} a day", _lasts_until(view, rate, now)
    if coming is not None and (until is None or until >= coming.at):
        return f"{used}; enough until {near_day(coming.at, now)}, when {adds}."
    if until is None or until - now >= LONG:
        return f"{used}; enough for more than a year."
    said = f"{used}; enough until about {near_day(until, now)}."
    return said if coming is None else f"{said} On {near_day(coming.at, now)}, {adds}."


def _lasts_until(view: WalletView, rate: Rate, now: datetime) -> datetime | None:
    """When what is available is used up or has ended. What ends first is used first, and is held first."""
    days, held, left, ends_unused = 0.0, view.reserved_credits, view.available, False
    for expires_at, ending in sorted(_ends(view)):
        usable = max(0, ending - held)
        held -= ending - usable
        left -= usable
        until_end = max(days, (expires_at - now) / timedelta(days=1))
        ends_unused |= days + usable / rate.credits_per_day > until_end
        days = min(days + usable / rate.credits_per_day, until_end)
    if not ends_unused:
        return rate.lasts_until
    return now + timedelta(days=min(days + max(0, left) / rate.credits_per_day, _FAR))


def _ends(view: WalletView) -> list[tuple[datetime, int]]:
    """When how many credits end, as far as is known. What the next period keeps does not."""
    ends = [(part.expires_at, part.credits) for part in view.ending]
    if view.current_period_end is not None:
        kept = 0 if view.next_credits is None else view.next_credits.kept
        ends.append((view.current_period_end, max(0, view.left_of_plan - kept)))
    return ends


def _adds(coming: NextCredits) -> str:
    kept = f" (up to {coming.kept:,} unused are kept)" if coming.kept else ""
    return f"{coming.plan} adds {coming.credits:,}{kept}"


def _last_of_plan(view: WalletView, now: datetime) -> str | None:
    if view.plan_ends_at is None or view.next_credits is not None:
        return None
    end = near_day(view.plan_ends_at, now)
    left = view.left_of_plan
    unused = "1 unused credit ends" if left == 1 else f"{left:,} unused credits end"
    ends = f"{unused} on {end}; no more follow" if left > 0 else f"It ends on {end}"
    return f"{view.plan} was cancelled. {ends}."


def _ending(view: WalletView, now: datetime) -> str | None:
    for part in view.ending:
        if part.expires_at > now and not part.is_from_subscription:
            return f"{part.credits:,} of the prepaid credits end on {near_day(part.expires_at, now)}."
    return None


def _limit(view: WalletView) -> str | None:
    """Also what is overdrawn within the limit, as runs go on as usual."""
    if view.spendable <= 0 or not view.credit_limit:
        return None
    return f"With a credit limit of {view.credit_limit:,}, runs may reserve {view.spendable:,}."


def _cap(view: WalletView) -> str | None:
    if view.period_cap is None:
        return None
    left = max(0, view.period_cap - view.used_this_period - view.reserved_credits)
    return f"The cap of {view.period_cap:,} leaves {left:,} to reserve in this period."
