"""Amounts, times and names in words: for the pages and for the terminal. Pure."""

from datetime import UTC, datetime

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


def label(name: str) -> str:
    """A name in words: `prepaid_purchase` becomes Prepaid purchase."""
    return name.replace("_", " ").capitalize()
