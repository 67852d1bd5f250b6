"""Organizations, runs and orders are found, among however many there are; and so is what operators did."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from ledger import actions, dead_letters, directory
from ledger.actions import ActionFilter, Place
from ledger.store import apply_batch
from tests.messages import delivery, finish, purchase
from tests.support import another_past, sql


def found(engine: Engine, find: Any, *arguments: Any) -> Any:
    with engine.connect() as connection:
        return find(connection, *arguments)


@pytest.fixture
def named(engine: Engine) -> Engine:
    """Some thousand wallets, and a few that somebody looks for."""
    sql(
        engine,
        """
        INSERT INTO wallets (org_id, last_seq, prepaid_balance, subscription_balance, reserved, period_usage,
                             credit_limit, config_version)
        SELECT name, 0, 5, 0, 0, 0, 0, 0 FROM (
            SELECT 'many-' || number AS name FROM generate_series(1, 3000) AS number
            UNION ALL VALUES ('northwind'), ('Northwind-2'), ('south'), ('acme-corp')
        ) AS wallet
        """,
    )
    return engine


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        ("northwind", ["northwind", "Northwind-2"]),
        ("NORTH", ["Northwind-2", "northwind"]),
        ("so", ["south"]),
        ("x", []),
        ("many-2999", ["many-2999"]),
    ],
)
def test_organizations_are_found_by_how_their_names_begin(named: Engine, beginning: str, expected: list[str]) -> None:
    assert [each.org_id for each in found(named, directory.beginning_with, beginning)] == expected


def test_a_name_comes_first_and_no_more_than_can_be_read(named: Engine) -> None:
    listed = [each.org_id for each in found(named, directory.beginning_with, "many-1")]
    assert (listed[0], len(listed)) == ("many-1", directory.MOST_FOUND)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("nortwind", "northwind"),
        ("orthwind", "northwind"),
        ("nrothwind", "northwind"),
        ("northwindd", "northwind"),
        ("northw1nd", "northwind"),
        ("NORTHWIND", "northwind"),
        ("acme corp", "acme-corp"),
        ("acme-korp", "acme-corp"),
    ],
)
def test_a_mistyped_name_leads_to_the_one_that_was_meant(named: Engine, typed: str, meant: str) -> None:
    assert found(named, directory.similar, typed)[0] == meant


@pytest.mark.parametrize("typed", ["", "nothing-like-it", "<b>", "x" * 1_000])
def test_what_looks_like_no_name_leads_nowhere(named: Engine, typed: str) -> None:
    assert found(named, directory.similar, typed) == []


def test_runs_and_orders_are_found_whoever_they_belong_to(engine: Engine) -> None:
    for org_id in ("acme", "globex"):
        refund = delivery("wallet.refund", org_id=org_id, refund_id="r1", credits=3, workflow_id="w1")
        configure = delivery("wallet.configure", org_id=org_id, version=1)
        apply_batch(engine, [purchase(org_id, "p1", 50), finish(org_id, "w1", 10), refund, configure])
    assert found(engine, directory.runs, "w1") == [
        directory.FoundRun(org_id, "w1", "settled", 10, 3) for org_id in ("acme", "globex")
    ]
    assert found(engine, directory.orders, "p1") == [
        directory.FoundOrder(org_id, "purchase", "p1", 50) for org_id in ("acme", "globex")
    ]
    assert found(engine, directory.orders, "1") == found(engine, directory.runs, "w2") == []


def test_the_lists_have_who_is_active_low_and_overdrawn(engine: Engine) -> None:
    for org_id, bought, used in (("rich", 1000, 60), ("low", 100, 60), ("debt", 5, 60), ("idle", 5, None)):
        apply_batch(engine, [purchase(org_id, credits=bought)])
        if used is not None:
            apply_batch(engine, [finish(org_id, "w", used)])
    recent = found(engine, directory.recent)
    assert [(each.org_id, each.available) for each in recent] == [
        ("idle", 5),
        ("debt", -55),
        ("low", 40),
        ("rich", 940),
    ]
    assert [each.org_id for each in found(engine, directory.low, recent)] == ["low"]
    with engine.connect() as connection:
        assert [each.org_id for each in directory.overdrawn(connection, limit=5)] == ["debt"]
    assert set(found(engine, directory.named, ["rich", "nobody"])) == {"rich"}


# What operators did


def done(engine: Engine, **conditions: Any) -> list[tuple[str, str | None, str]]:
    with engine.connect() as connection:
        listed = actions.actions(connection, ActionFilter(**conditions), limit=100)
    return [(each.kind, each.by, each.about) for each in listed]


@pytest.fixture
def acted(engine: Engine) -> Engine:
    """Grants to two organizations at one moment, a dead letter that was discarded then, and events of others."""
    by = {"source": "operator", "metadata": {"by": "olga"}}
    grants = [
        delivery("wallet.grant", org_id=org_id, grant_id=f"g{number}", credits=5, reason="why", **by)
        for org_id in ("acme", "globex")
        for number in range(3)
    ]
    apply_batch(engine, [*grants, purchase("acme", credits=100)])
    forged = delivery("wallet.grant", org_id="acme", grant_id="x", credits=5, metadata={"by": "olga"})
    apply_batch(engine, [forged, purchase("acme", "bad", 0), purchase("acme", "worse", 0)])
    dead_letters.discard(engine, 1, by="otto", why="sent by mistake")
    [(moment,)] = sql(engine, "SELECT max(created_at) FROM credit_events")
    with another_past(engine) as connection:
        connection.execute(text("UPDATE credit_events SET created_at = :moment"), {"moment": moment})
    sql(engine, "UPDATE dead_letters SET resolved_at = :moment WHERE id = 1", moment=moment)
    return engine


def test_what_operators_did_is_listed_newest_first_and_nothing_else(acted: Engine) -> None:
    of_one = [("grant", "olga", f"g{number}") for number in (2, 1, 0)]
    assert done(acted) == [*of_one, *of_one, ("discarded", "otto", "wallet.purchase")]
    assert done(acted, by="otto") == done(acted, kind="discarded") == [("discarded", "otto", "wallet.purchase")]
    assert done(acted, org_id="globex") == of_one
    assert done(acted, kind="refund") == done(acted, kind="replayed") == []
    now = datetime.now(UTC)
    assert len(done(acted, done_from=now - timedelta(days=1), done_before=now + timedelta(days=1))) == 7
    assert done(acted, done_before=now - timedelta(days=1)) == []


def test_pages_neither_skip_nor_repeat_what_was_done_at_the_same_moment(acted: Engine) -> None:
    with acted.connect() as connection:
        every = actions.actions(connection, limit=100)
        seen: list[actions.Action] = []
        before: Place | None = None
        while page := actions.actions(connection, limit=2, before=before):
            seen += page
            before = Place.read(str(page[-1].place))
    assert (len(seen), seen) == (7, every)
