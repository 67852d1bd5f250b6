"""What the measuring instrument makes of its figures."""

from collections import Counter

import pytest

from bench.measures import Figure
from bench.report import BARS, Bar, Report
from bench.workload import Workload

KEYS = {bar.key for bar in BARS} | {bar.over for bar in BARS if bar.over is not None}


def report(*repetitions: dict[str, float]) -> Report:
    """A report in which every other figure is 1."""
    figures = [
        [Figure(key, f"what {key} is", values.get(key, 1.0), "messages/s") for key in sorted(KEYS)]
        for values in repetitions
    ]
    return Report.of(figures, {"date": "today"})


def bar(key: str) -> Bar:
    [found] = [bar for bar in BARS if bar.key == key]
    return found


def test_a_row_is_the_median_of_its_repetitions_and_says_how_far_they_are_apart() -> None:
    table = report({"b-1": 900.0}, {"b-1": 5_000.0}, {"b-1": 1_000.0}).as_markdown()
    [line] = [line for line in table.splitlines() if "what b-1 is" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "(b)",
        "what b-1 is",
        "1,000 messages/s",
        "900 – 5,000",
        "1,000 ×",
    ]


def test_rows_are_in_the_order_of_their_letters() -> None:
    letters = [key[0] for key in report({}).rows]
    assert letters == sorted(letters)


@pytest.mark.parametrize(
    ("key", "values", "is_met"),
    [
        ("b-1", {"a": 10.0, "b-1": 250.0}, True),
        ("b-1", {"a": 10.0, "b-1": 249.0}, False),
        ("c", {"b-1": 10.0, "c": 7.9}, False),
        ("g-p99", {"g-p99": 100.0}, True),
        ("g-p99", {"g-p99": 100.1}, False),
        ("j-type-far", {"j-type-newest": 2.0, "j-type-far": 6.1}, False),
    ],
)
def test_a_bar_is_met_or_missed(key: str, values: dict[str, float], is_met: bool) -> None:
    found = report(values)
    assert bar(key).is_met(found.rows) is is_met
    [line] = [line for line in found.as_markdown().splitlines() if line.startswith(f"| {bar(key).what} ")]
    assert ("MISSED" in line) is not is_met


def test_every_workflow_starts_before_it_ends_and_organizations_have_equally_many() -> None:
    started: set[str] = set()
    ends = 0
    load = Workload.lifecycle(2_000, organizations=10)
    assert len(load.messages) == 2_000
    for task, payload in load.messages:
        if task == "workflow.start":
            started.add(payload["workflow_id"])
        else:
            assert payload["workflow_id"] in started
            ends += 1
    assert len(started) == 1_000
    assert ends == 1_000
    each = Counter(payload["org_id"] for _, payload in load.messages).values()
    assert len(each) == 10
    assert max(each) - min(each) < 20
