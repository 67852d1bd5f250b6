"""How amounts, times and names are written."""

from datetime import UTC, datetime, timedelta, timezone

from ledger.wording import amount, change, clock, counted, day, label, near_day


def test_amounts_have_separators_and_a_true_minus_sign() -> None:
    assert [amount(number) for number in (12_345, 0, -12_345)] == ["12,345", "0", "−12,345"]
    assert [change(number) for number in (12_345, 0, -12_345)] == ["+12,345", "0", "−12,345"]


def test_one_of_a_thing_is_not_several() -> None:
    assert [counted(number, "wallet") for number in (0, 1, 2_000)] == ["0 wallets", "1 wallet", "2,000 wallets"]


def test_days_and_times_are_those_of_utc() -> None:
    late = datetime(2025, 12, 31, 23, 30, 5, tzinfo=timezone(-timedelta(hours=1)))
    assert (day(late), clock(late)) == ("1 Jan 2026", "00:30:05")


def test_a_day_of_the_same_year_needs_no_year() -> None:
    now = datetime(2026, 11, 26, tzinfo=UTC)
    days = [near_day(moment, now) for moment in (datetime(2026, 1, 2, tzinfo=UTC), datetime(2027, 1, 2, tzinfo=UTC))]
    assert days == ["2 Jan", "2 Jan 2027"]


def test_a_name_becomes_words() -> None:
    assert label("prepaid_purchase") == "Prepaid purchase"
