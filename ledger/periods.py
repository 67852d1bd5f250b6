"""Month arithmetic of subscription periods, in UTC. Pure.

Period `k` (0, 1, 2, …) starts at the anchor plus `k` months and ends where the next one starts. The anchor's day is
clamped to the month's length and always counted from the anchor, so 31 January gives 28 February, then 31 March.
"""

import calendar
from datetime import datetime


def period_start(anchor: datetime, k: int) -> datetime:
    """When period `k` begins."""
    assert k >= 0
    years, month_index = divmod(anchor.month - 1 + k, 12)
    year, month = anchor.year + years, month_index + 1
    return anchor.replace(year=year, month=month, day=min(anchor.day, calendar.monthrange(year, month)[1]))


def period_at(anchor: datetime, now: datetime) -> int | None:
    """The period that contains `now`: it has begun and the next has not. None before the anchor."""
    if now < anchor:
        return None
    months = (now.year - anchor.year) * 12 + now.month - anchor.month
    return months if period_start(anchor, months) <= now else months - 1
