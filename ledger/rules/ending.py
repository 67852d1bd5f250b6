"""Credits with an end: the order in which credits are used, and how they end.

Usage takes what ends first, first: what is past its end and still held, then whatever ends next (a period's credits end
with the period; at a tie, they go first), then the permanent rest, which alone may go below zero.

An end takes nothing from under a reservation: past their end, credits stay as long as reservations cover them that were
made before the end. A wallet without such credits pays for none of this.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from datetime import datetime
from heapq import merge
from typing import Any, NamedTuple

from holdfast_client.messages import Grant, Purchase, Refund
from ledger.rules.posting import SCHEDULER, post
from ledger.state import Cover, EndingCredits, Event, Wallet

Rows = tuple[EndingCredits, ...]


class Drawn(NamedTuple):
    """From where credits are taken."""

    from_subscription: int
    """What the subscription balance gives."""
    from_ending: int
    """What prepaid credits with an end give."""
    from_permanent: int
    """What is left for the permanent ones, however many there are."""
    ends: dict[datetime, int]
    """When what is taken would have ended: how many credits by each time."""
    ending: Rows
    set_aside: Rows
    """`Wallet.ending` and `Wallet.set_aside` afterwards."""

    @property
    def from_prepaid(self) -> int:
        """What the prepaid balance gives."""
        return self.from_ending + self.from_permanent


def draw(wallet: Wallet, credits: int) -> Drawn:
    """Where `credits` of `wallet` come from, in the order of use. Looks at no more rows than it takes from."""
    if not (wallet.ending or wallet.set_aside):  # as nearly always
        from_subscription = min(credits, wallet.subscription_balance)
        ends = {wallet.next_period_at: from_subscription} if from_subscription and wallet.next_period_at else {}
        return Drawn(from_subscription, 0, credits - from_subscription, ends, (), ())
    return _draw(wallet, credits, merge(wallet.set_aside, _period(wallet), wallet.ending, key=_order))


def draw_prepaid(wallet: Wallet, credits: int, *, first: str | None = None) -> Drawn:
    """Where `credits` of the prepaid balance come from: what the origin `first` brought, then in the order of use."""
    own = next((row for row in wallet.ending if row.origin == first), None)
    if own is None:
        return _draw(wallet, credits, wallet.ending)
    taken = min(own.remaining, credits)
    others = wallet._replace(ending=tuple(row for row in wallet.ending if row is not own))
    drawn = _draw(others, credits - taken, others.ending)
    ending = drawn.ending
    if own.remaining > taken:
        ending = _placed(ending, own._replace(remaining=own.remaining - taken))
    drawn.ends[own.expires_at] = drawn.ends.get(own.expires_at, 0) + taken
    return drawn._replace(from_ending=drawn.from_ending + taken, ending=ending)


def _draw(wallet: Wallet, credits: int, rows: Iterable[EndingCredits]) -> Drawn:
    """Take `credits` from `rows` of the wallet, one after the other, and the rest from the permanent ones."""
    left, from_subscription = credits, 0
    ends: dict[datetime, int] = {}
    ending, set_aside = _Taking(wallet.ending), _Taking(wallet.set_aside)
    for row in rows:
        if not left:
            break
        taken = min(left, row.remaining)
        left -= taken
        ends[row.expires_at] = ends.get(row.expires_at, 0) + taken
        if not row.is_from_subscription:
            ending.take(taken)
            continue
        from_subscription += taken
        if row.origin != _PERIOD:
            set_aside.take(taken)
    return Drawn(from_subscription, credits - left - from_subscription, left, ends, ending.left(), set_aside.left())


class _Taking:
    """Takes from the first of some rows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._place = self._taken = 0

    def take(self, credits: int) -> None:
        self._taken += credits
        if self._taken == self._rows[self._place].remaining:
            self._place, self._taken = self._place + 1, 0

    def left(self) -> Rows:
        if not self._taken:
            return self._rows[self._place :] if self._place else self._rows
        first = self._rows[self._place]
        return (first._replace(remaining=first.remaining - self._taken), *self._rows[self._place + 1 :])


_PERIOD = "subscription:"
"""Stands for the credits of the current period, which are no row."""


def of_period(wallet: Wallet) -> int:
    """The credits of the current period that are left: they end with it."""
    return wallet.subscription_balance - sum(row.remaining for row in wallet.set_aside)


def _period(wallet: Wallet) -> Iterator[EndingCredits]:
    if left := of_period(wallet):
        assert wallet.next_period_at is not None
        yield EndingCredits(wallet.org_id, _PERIOD, wallet.next_period_at, wallet.last_seq + 1, left)


def _order(row: EndingCredits) -> tuple[datetime, bool, int, str]:
    return row.expires_at, not row.is_from_subscription, row.seq, row.origin


def _past(rows: Rows, now: datetime) -> Rows:
    """Those of the sorted `rows` that are past their end."""
    return rows[: bisect_right(rows, now, key=lambda row: row.expires_at)] if rows else ()


def _placed(rows: Rows, row: EndingCredits) -> Rows:
    """The sorted `rows` and one more."""
    placed = list(rows)
    insort(placed, row, key=_order)
    return tuple(placed)


def _with_rows(wallet: Wallet, ending: Rows, set_aside: Rows, now: datetime, *, held: int) -> Wallet:
    """`wallet` with these rows, of whose credits `held` are past their end."""
    upcoming = [rows[len(past)].expires_at for rows in (ending, set_aside) if len(past := _past(rows, now)) < len(rows)]
    return wallet._replace(
        ending=ending,
        set_aside=set_aside,
        held_past_end=held,
        next_ending_at=min(upcoming, default=None),
    )


def without(wallet: Wallet, drawn: Drawn, now: datetime) -> Wallet:
    """`wallet` when its rows are those that `drawn` leaves."""
    if not (wallet.ending or wallet.set_aside):  # as nearly always
        return wallet
    held = wallet.held_past_end
    if held:
        held -= sum(taken for by, taken in drawn.ends.items() if by <= now)
    wallet = _with_rows(wallet, drawn.ending, drawn.set_aside, now, held=held)
    return wallet if held else wallet._replace(covers=None)


def with_row(wallet: Wallet, row: EndingCredits, now: datetime) -> Wallet:
    """`wallet` with some credits more that have an end. What one period sets aside in parts is one row."""
    ending, set_aside = wallet.ending, wallet.set_aside
    if row.is_from_subscription:
        same = [other for other in set_aside if (other.origin, other.expires_at) == (row.origin, row.expires_at)]
        others = tuple(other for other in set_aside if other not in same)
        in_all = row.remaining + sum(other.remaining for other in same)
        set_aside = _placed(others, row._replace(remaining=in_all))
    else:
        ending = _placed(ending, row)
    return _with_rows(wallet, ending, set_aside, now, held=wallet.held_past_end)


def without_origin(wallet: Wallet, origin: str, now: datetime) -> Wallet:
    """`wallet` without the rows that `origin` has set aside: they belong to the current period again."""
    kept = tuple(row for row in wallet.set_aside if row.origin != origin)
    return _with_rows(wallet, wallet.ending, kept, now, held=wallet.held_past_end)


def uncover(wallet: Wallet, credits: int, reserved_seq: int | None) -> Wallet:
    """A reservation of `credits`, which is the event `reserved_seq`, covers nothing any more."""
    if not wallet.covers:
        return wallet
    since = reserved_seq or 0  # one that does not know is older than this rule
    covers = (
        cover._replace(credits=cover.credits - credits) if since <= cover.seq else cover for cover in wallet.covers
    )
    return wallet._replace(covers=tuple(covers))


def _noted(wallet: Wallet, now: datetime) -> Wallet:
    """`wallet` with what is past its end by `now`, and with what covers it: all that is reserved now."""
    held = sum(row.remaining for rows in (wallet.ending, wallet.set_aside) for row in _past(rows, now))
    if held == wallet.held_past_end:
        return wallet
    covers = wallet.covers or ()
    if covers and covers[-1].credits == wallet.reserved:
        covers = covers[:-1]  # nothing was reserved since then
    covers = (*covers, Cover(now, wallet.last_seq, wallet.reserved))
    return _with_rows(wallet._replace(covers=covers), wallet.ending, wallet.set_aside, now, held=held)


def _uncovered(wallet: Wallet) -> int:
    """How many credits past their end no reservation covers that was made before it."""
    covers = wallet.covers or ()
    if len(covers) == 1:
        return max(0, wallet.held_past_end - max(0, covers[0].credits))
    uncovered = 0
    for cover in covers:
        rows = (*_past(wallet.ending, cover.until), *_past(wallet.set_aside, cover.until))
        uncovered += max(0, sum(row.remaining for row in rows) - uncovered - max(0, cover.credits))
    return uncovered


def end_uncovered(wallet: Wallet, now: datetime, *, most_events: int | None = None) -> tuple[Wallet, tuple[Event, ...]]:
    """End what is past its end and not covered: the oldest end first, at most `most_events` events.

    If there is more to end than that, the wallet is due still.
    """
    if not (wallet.ending or wallet.set_aside):
        return wallet, ()
    wallet = _noted(wallet, now)
    if not (left := _uncovered(wallet)):
        return wallet, ()
    events: list[Event] = []
    ending, set_aside = _Taking(wallet.ending), _Taking(wallet.set_aside)
    first: datetime | None = None
    for row in merge(wallet.set_aside, wallet.ending, key=_order):
        if not left or (most_events is not None and len(events) >= most_events):
            first = row.expires_at
            break
        taken = min(left, row.remaining)
        wallet, event = end(wallet, row, taken, now)
        (set_aside if row.is_from_subscription else ending).take(taken)
        left -= taken
        events.append(event)
    held = wallet.held_past_end + sum(event.credits for event in events)
    wallet = _with_rows(wallet, ending.left(), set_aside.left(), now, held=held)
    if left:
        wallet = wallet._replace(held_past_end=0, next_ending_at=first)
    elif not held:
        wallet = wallet._replace(covers=None)
    return wallet, tuple(events)


def end(wallet: Wallet, row: EndingCredits, credits: int, now: datetime) -> tuple[Wallet, Event]:
    """The event that ends `credits` of `row`."""
    return post(
        wallet,
        now,
        "adjustment",
        -credits,
        subscription=-credits if row.is_from_subscription else 0,
        prepaid=0 if row.is_from_subscription else -credits,
        key=f"{row.origin}/ended/{wallet.last_seq + 1}",
        source=SCHEDULER,
        metadata={**_named(row), "expires_at": row.expires_at.isoformat()},
    )


_ID_FIELDS = {model.kind: model.id_field for model in (Grant, Purchase, Refund)}


def _named(row: EndingCredits) -> dict[str, Any]:
    """Why it ends, and what it was."""
    kind, _, identity = row.origin.partition(":")
    if row.is_from_subscription:
        return {"reason": "subscription_expired", "subscription_id": identity.rpartition(":")[0], "plan": row.plan}
    return {"reason": f"{kind}_expired", _ID_FIELDS[kind]: identity}
