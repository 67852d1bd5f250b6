"""The one thing that a customer has to know first, if there is anything to do. Pure: the wallet in, sentences out."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from ledger.usage import Rate
from ledger.views import Refused, WalletView
from ledger.wording import amount, near_day

REFUSED_FOR = timedelta(days=3)
"""How long a run that was refused is shown."""

NEARLY = 0.9
"""The share of the period's cap from which on it is said."""


@dataclass(frozen=True, slots=True)
class Banner:
    """What has to be done."""

    title: str
    text: str
    is_urgent: bool = True
    """Whether new runs are refused."""
    refused: Refused | None = None
    """A run that was refused lately."""


def banner(
    wallet: WalletView | None, speed: Rate | None, *, largest_held: int, refused: Refused | None, now: datetime
) -> Banner | None:
    """The most important of what has to be done. None: nothing.

    `largest_held` are the credits of the largest open reservation. Without a wallet, nothing has begun yet.
    """
    if wallet is None:
        return None
    if refused is not None and now - refused.at > REFUSED_FOR:
        refused = None
    needed_soon = max(largest_held, 0 if speed is None else speed.credits_per_day)
    found = _none_left(wallet, now) or _cancelled(wallet, now) or _capped(wallet, now)
    found = found or _little_left(wallet, needed_soon, now)
    if refused is None:
        return found
    if found is None:
        return Banner("A run was refused.", _cure(wallet, refused, now), is_urgent=False, refused=refused)
    return Banner(found.title, found.text, found.is_urgent, refused)


def _none_left(wallet: WalletView, now: datetime) -> Banner | None:
    left = wallet.spendable
    if left > 0:
        return None
    if wallet.available >= 0:
        title = "There are no credits."
    elif wallet.credit_limit:
        title = f"The credit limit of {amount(wallet.credit_limit)} is used up."
    else:
        title = f"Overdrawn by {amount(-wallet.available)}."
    return Banner(title, f"New runs are refused until {_more(wallet, -left, now)}.")


def _cancelled(wallet: WalletView, now: datetime) -> Banner | None:
    if wallet.plan is None or wallet.plan_ends_at is None or wallet.next_plan is not None:
        return None
    unused, ends = wallet.left_of_plan, near_day(wallet.plan_ends_at, now)
    if unused > 0:
        text = f"{amount(unused)} unused {'credit ends' if unused == 1 else 'credits end'} on {ends}; no more follow."
    else:
        text = f"It ends on {ends}; no more credits follow."
    return Banner(f"{wallet.plan} was cancelled.", text, is_urgent=False)


def _capped(wallet: WalletView, now: datetime) -> Banner | None:
    if wallet.period_cap is None:
        return None
    left = _under_cap(wallet, wallet.period_cap)
    cap, until = f"cap of {amount(wallet.period_cap)}", _cap_lifted(wallet, now)
    has_period = wallet.current_period_end is not None
    if left <= 0:
        title = f"The {cap} for this period is reached." if has_period else f"The {cap} is reached."
        return Banner(title, f"New runs are refused until {until}.")
    if wallet.period_cap - left < NEARLY * wallet.period_cap:
        return None
    of_what = f"this period's {cap}" if has_period else f"the {cap}"
    title = f"Only {amount(left)} left of {of_what}."
    return Banner(title, f"Runs that are estimated higher are refused until {until}.", is_urgent=False)


def _little_left(wallet: WalletView, needed_soon: int, now: datetime) -> Banner | None:
    left = wallet.spendable
    if left >= needed_soon:
        return None
    text = f"Runs that are estimated higher are refused until {_more(wallet, needed_soon - left, now)}."
    return Banner(f"Only {amount(left)} left.", text, is_urgent=False)


def _cure(wallet: WalletView, refused: Refused, now: datetime) -> str:
    again = "start it again, as a new run"
    lacking = refused.credits - wallet.spendable
    missing = f"{amount(lacking)} {'credit' if lacking == 1 else 'credits'}"
    if wallet.period_cap is None or refused.credits <= _under_cap(wallet, wallet.period_cap):
        return f"Top up at least {missing}, then {again}." if lacking > 0 else f"There is room for it now: {again}."
    until = "the cap is raised" if refused.credits > wallet.period_cap else _cap_lifted(wallet, now)
    if lacking > 0:
        return f"It lacks {missing}, and would pass the cap: top up, and wait until {until}. Then {again}."
    return f"Wait until {until}, then {again}."


def _under_cap(wallet: WalletView, cap: int) -> int:
    """The largest estimate that is not refused because of the period's cap."""
    return cap - wallet.used_this_period - wallet.reserved_credits


def _more(wallet: WalletView, needed: int, now: datetime) -> str:
    """Until when there are too few: you top up, or the plan adds more than `needed`."""
    coming = wallet.next_credits
    if coming is None or coming.credits <= needed:
        return "you top up"
    return f"you top up, or until {near_day(coming.at, now)}, when {coming.plan} adds {amount(coming.credits)}"


def _cap_lifted(wallet: WalletView, now: datetime) -> str:
    if wallet.current_period_end is None or wallet.plan_ends_at is not None:
        return "the cap is raised"
    return f"{near_day(wallet.current_period_end, now)}, when the next period begins, or the cap is raised"
