"""Dead letters by their cause: one incident is one group, which is counted and discarded as a whole."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine

from holdfast_client.messages import InvalidMessage
from ledger import dead_letters
from ledger.dead_letters import Group, LetterFilter, Place
from ledger.store import Delivery, apply_batch
from ledger.waiting import NOBODY
from tests.messages import delivery
from tests.support import sql

CAUSE = "credits must be greater than 0"


def purchases(org_id: str, *numbers: int) -> list[Delivery]:
    """Purchases that cannot be applied, each for another amount."""
    return [delivery("wallet.purchase", org_id=org_id, purchase_id=f"p{number}", credits=-number) for number in numbers]


@pytest.fixture
def letters(engine: Engine) -> Engine:
    """Numbers 1 to 6: three of acme's, one of globex, one that names nobody, and one of another cause."""
    nobody = Delivery("wallet.purchase", InvalidMessage("undecodable_message", "no JSON", None), b"{")
    other = delivery("wallet.bill", org_id="acme", billing_id="b1", credits=-5)
    apply_batch(engine, [*purchases("acme", 1)])
    apply_batch(engine, [*purchases("acme", 2)])
    apply_batch(engine, [*purchases("acme", 3)])
    for each in (*purchases("globex", 4), nobody, other):
        apply_batch(engine, [each])
    return engine


def grouped(engine: Engine, matching: LetterFilter, limit: int = 10) -> list[tuple[str | None, str, int, int]]:
    with engine.connect() as connection:
        found = dead_letters.groups(connection, matching, limit=limit)
    return [(group.org_id, group.cause, group.count, group.newest_id) for group in found.listed]


def test_the_letters_of_one_incident_are_one_group_and_the_largest_comes_first(letters: Engine) -> None:
    assert grouped(letters, LetterFilter()) == [
        ("acme", CAUSE, 3, 3),
        ("acme", "… would take the prepaid balance, …, below zero", 1, 6),
        (None, "no JSON", 1, 5),
        ("globex", CAUSE, 1, 4),
    ]
    times = "SELECT min(first_failed_at), max(last_failed_at) FROM dead_letters WHERE id <= 3"
    [(first, last)] = sql(letters, times)
    with letters.connect() as connection:
        found = dead_letters.groups(connection, LetterFilter(), limit=1)
    assert found.listed == [Group("acme", "wallet.purchase", "invalid_message", CAUSE, 3, first, last, 3)]
    assert (found.total, found.letters, found.organizations) == (4, 6, 2)


def test_groups_are_filtered_as_letters_are(letters: Engine) -> None:
    assert grouped(letters, LetterFilter(org_id="globex")) == [("globex", CAUSE, 1, 4)]
    assert grouped(letters, LetterFilter(org_id=NOBODY)) == [(None, "no JSON", 1, 5)]
    assert grouped(letters, LetterFilter(code="insufficient_credits"))[0][3] == 6
    assert [row[:1] for row in grouped(letters, LetterFilter(cause=CAUSE))] == [("acme",), ("globex",)]
    [(now,)] = sql(letters, "SELECT clock_timestamp()")
    assert grouped(letters, LetterFilter(failed_since=now)) == []
    assert len(grouped(letters, LetterFilter(failed_since=now - timedelta(days=1)))) == 4
    with letters.connect() as connection:
        nothing = dead_letters.groups(connection, LetterFilter("discarded"), limit=10)
    assert (nothing.listed, nothing.total, nothing.letters, nothing.organizations) == ([], 0, 0, 0)


def test_a_group_matches_its_letters_and_no_other(letters: Engine) -> None:
    with letters.connect() as connection:
        found = dead_letters.groups(connection, LetterFilter(), limit=10)
        ids = [[one.id for one in dead_letters.letters(connection, group.filter("open"))] for group in found.listed]
    assert ids == [[3, 2, 1], [6], [5], [4]]


def test_letters_are_counted_by_status_whatever_the_status_of_the_filter_is(letters: Engine) -> None:
    dead_letters.discard(letters, 2, by="ann", why="a test")
    with letters.connect() as connection:
        assert dead_letters.counts(connection, LetterFilter()) == {"open": 5, "discarded": 1}
        assert dead_letters.counts(connection, LetterFilter("discarded", org_id="globex")) == {"open": 1}
        assert dead_letters.counts(connection, LetterFilter(org_id="nobody-else")) == {}


def test_the_place_of_a_letter_among_those_that_are_open(letters: Engine) -> None:
    dead_letters.discard(letters, 3, by="ann", why="a test")
    with letters.connect() as connection:
        assert dead_letters.place(connection, 6) == Place(1, 5, None, 5)
        assert dead_letters.place(connection, 4) == Place(3, 5, 5, 2)
        assert dead_letters.place(connection, 3) == Place(4, 5, 4, 2)  # where it was
        assert dead_letters.place(connection, 1) == Place(5, 5, 2, None)


def test_a_group_is_discarded_in_steps_and_nothing_else_with_it(letters: Engine) -> None:
    group = LetterFilter("open", "invalid_message", "wallet.purchase", "acme", cause=CAUSE)
    apply_batch(letters, purchases("acme", 5))  # 7: it came when the group had been shown
    with letters.connect() as connection:
        assert dead_letters.open_ids(connection, group, up_to_id=6, limit=10) == [1, 2, 3]
        assert dead_letters.open_ids(connection, group, after_id=1, up_to_id=7, limit=2) == [2, 3]

    def discard(why: str) -> int:
        return dead_letters.discard_all(letters, group, up_to_id=6, by="ann", why=why, limit=2)

    assert [discard("first"), discard("second"), discard("third")] == [2, 1, 0]
    assert sql(letters, "SELECT id, resolved_by, resolution FROM dead_letters WHERE status = 'discarded'") == [
        (1, "ann", "first"),
        (2, "ann", "first"),
        (3, "ann", "second"),
    ]
    assert sql(letters, "SELECT count(*) FROM dead_letters WHERE status = 'open'") == [(4,)]


def test_a_letter_that_fails_for_another_reason_changes_its_group(letters: Engine) -> None:
    sql(letters, "UPDATE dead_letters SET cause = '' WHERE id = 6")  # as an older version left it
    assert ("acme", "", 1, 6) in grouped(letters, LetterFilter())
    apply_batch(letters, [delivery("wallet.bill", org_id="acme", billing_id="b1", credits=-5)])
    assert ("acme", "… would take the prepaid balance, …, below zero", 1, 6) in grouped(letters, LetterFilter())


def test_letters_are_grouped_through_the_index_alone(letters: Engine) -> None:
    with letters.connect() as connection:
        connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
        plan = "\n".join(
            connection.exec_driver_sql(
                "EXPLAIN SELECT org_id, task, error_code, cause, count(*), min(first_failed_at), max(last_failed_at),"
                " max(id) FROM dead_letters WHERE status = 'open' GROUP BY 1, 2, 3, 4"
            ).scalars()
        )
    assert "Index Only Scan using dead_letters_causes" in plan
