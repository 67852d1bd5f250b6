"""Three clocks: the one that differs from the others by more than an hour is wrong."""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from ledger import clocks
from ledger.faults import WrongClockError, is_transient, may_be_local

DAY = 86_400.0


@pytest.fixture(autouse=True)
def nothing_heard() -> Iterator[None]:
    clocks.heard(None)
    clocks.check(datetime.now(UTC))
    yield
    clocks.heard(None)
    clocks.check(datetime.now(UTC))


def database(ahead_s: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=ahead_s)


@pytest.mark.parametrize("ahead_s", [0, 3_590, -3_590])
@pytest.mark.parametrize("third_ahead_s", [None, 0, 5])
def test_clocks_that_are_less_than_an_hour_apart_agree(ahead_s: float, third_ahead_s: float | None) -> None:
    clocks.heard(None if third_ahead_s is None else time.time() + third_ahead_s)
    clocks.check(database(ahead_s))


@pytest.mark.parametrize("ahead_s", [31 * DAY, -31 * DAY, 3_700, -3_700, 5_000 * 366 * DAY])
@pytest.mark.parametrize("third_ahead_s", [None, 0, -9_000_000, 1e20])
def test_a_database_that_nobody_agrees_with_is_wrong(ahead_s: float, third_ahead_s: float | None) -> None:
    clocks.heard(None if third_ahead_s is None else time.time() + third_ahead_s)
    with pytest.raises(WrongClockError, match=r"^it says ") as wrong:
        clocks.check(database(ahead_s))
    assert is_transient(wrong.value)
    assert not may_be_local(wrong.value)


def test_another_clock_that_is_wrong_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    clocks.heard(time.time() + DAY)
    for _ in range(3):
        clocks.check(database(DAY))  # it agrees with the third one, so it is ours that is wrong
    clocks.heard(time.time())
    clocks.check(database(0))
    clocks.heard(time.time() - DAY)
    for _ in range(3):
        clocks.check(database(0))
    own, again, third = (record.getMessage() for record in caplog.records)
    assert own.startswith("A clock is wrong; set it: this worker's says 20")
    assert again == "All clocks agree again"
    assert third.startswith("A clock is wrong; set it: the broker's says 20")
