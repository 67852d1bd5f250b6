"""Which tables go to the nodes of a distributed database, and which stay on the coordinator."""

from ledger.distribution import is_distributed, left_to_distribute
from ledger.tables import metadata

ALL = [table.name for table in metadata.sorted_tables]


def test_what_belongs_to_an_organization_is_distributed_and_what_can_be_kept_without_its_node_is_not() -> None:
    stays = {table.name for table in metadata.sorted_tables if not is_distributed(table)}
    assert stays == {"dead_letters", "waiting_messages", "last_verification", "archive_head"}


def test_the_wallets_are_distributed_first_as_the_others_go_where_they_are() -> None:
    first, *others = left_to_distribute(ALL, [])
    assert first == "wallets"
    assert {"workflows", "credit_events", "daily_sums", "daily_sums_through"} <= set(others)


def test_an_interrupted_distribution_goes_on_and_a_table_that_is_not_there_yet_is_left_out() -> None:
    done = ["wallets", "workflows"]
    assert set(left_to_distribute(ALL, done)).isdisjoint(done)
    assert left_to_distribute(["wallets", "workflows", "subscriptions"], done) == ["subscriptions"]
    assert left_to_distribute(ALL, ALL) == []
