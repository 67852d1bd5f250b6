"""Values in words that people read."""

from datetime import timedelta

import pytest

from ledger.readable import readable_json, span


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (timedelta(seconds=-5), "0 s"),
        (timedelta(seconds=59), "59 s"),
        (timedelta(minutes=5, seconds=30), "5 min"),
        (timedelta(hours=2, minutes=3), "2 h 3 min"),
        (timedelta(days=29, hours=23, minutes=59), "29 d 23 h"),
    ],
)
def test_a_length_of_time_is_told_in_its_two_largest_units(length: timedelta, words: str) -> None:
    assert span(length) == words


def test_json_is_spread_over_lines_unless_that_makes_it_several_times_as_long() -> None:
    assert readable_json({"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'
    assert readable_json({"é": "\ud800"}) == '{\n  "é": "\\ud800"\n}'
    assert "\n" not in readable_json([[[[[[[[[[0] * 100]]]]]]]]])
