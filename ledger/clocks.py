"""Checks the database's clock, which dates every event and decides what is due.

A clock that is a month ahead for a single message expires reservations and begins periods. Neither can be undone. So up
to three clocks are compared: the database's, this process's, and a third one that the process is told of. The one that
differs from the other two is wrong.
"""

import logging
import time
from datetime import UTC, datetime

from ledger.faults import WrongClockError

logger = logging.getLogger(__name__)

MOST_APART_S = 3_600.0
"""The largest difference between two clocks that agree."""

_third: tuple[float, float] | None = None
"""The third clock's reading, and the monotonic time of that reading."""
_told: str | None = None


def heard(third_s: float | None) -> None:
    """Record what the third clock says now, in seconds since 1970, or None if it cannot be read."""
    global _third  # noqa: PLW0603 - one per process, like its own clock
    _third = None if third_s is None else (third_s, time.monotonic())


def check(database_now: datetime) -> None:
    """Raise WrongClockError unless the database's clock agrees with another one."""
    database, own = database_now.timestamp(), time.time()
    third = None if _third is None else _third[0] + time.monotonic() - _third[1]
    if _agree(database, own):
        _tell(None if third is None or _agree(database, third) else f"the broker's says {_at(third)}")
    elif third is not None and _agree(database, third):
        _tell(f"this worker's says {_at(own)}")
    elif third is None:
        raise WrongClockError(f"it says {_at(database)}, and this worker's {_at(own)}: set the one that is wrong")
    else:
        raise WrongClockError(f"it says {_at(database)}, this worker's {_at(own)}, and the broker's {_at(third)}")


def _agree(one: float, other: float) -> bool:
    return abs(one - other) <= MOST_APART_S


def _tell(wrong: str | None) -> None:
    """Log once that another clock is wrong. The ledger does not depend on it."""
    global _told  # noqa: PLW0603
    if (wrong is None) != (_told is None):
        logger.warning("%s", "All clocks agree again" if wrong is None else f"A clock is wrong; set it: {wrong}")
        _told = wrong


def _at(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f} s since 1970"
