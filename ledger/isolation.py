"""Applies the items of many organizations in few transactions, although some of them fail.

A batch that fails is split until the culprit is alone. An organization with a passing fault, such as a locked wallet,
is kept waiting, and the others go on.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import psycopg
from psycopg.errors import QueryCanceled
from sqlalchemy import Engine

from ledger import distribution
from ledger.database import is_abandoned, raw_connection, shard_connections
from ledger.faults import is_about_a_node, is_lost_connection, is_transient, may_be_local
from ledger.statements import Connection
from ledger.working_set import PATIENCE_S, SHORT_PATIENCE_S, SHORTEST_PATIENCE_S

MAX_BATCH = 1_000
"""The most messages that one transaction applies; more are applied as several batches."""

PIECES = 32
"""The number of parts into which a batch with a culprit is split: two splits find it."""

MOST_CULPRITS = 10
"""How many organizations may fail alone while none succeeds, before the fault counts as the whole database's."""

Item = TypeVar("Item")
Became = TypeVar("Became")


@dataclass(frozen=True, slots=True)
class Work(Generic[Item, Became]):
    """How to apply items, and what to do with those that fail."""

    org_id_of: Callable[[Item], str]
    apply: Callable[[Connection, Sequence[Item], float | None], list[Became]]
    """Applies items in one transaction.

    With a number of seconds it is careful: it skips what somebody else has locked, and no statement takes longer.
    """
    bury: Callable[[Engine, Item, Exception], Became]
    """Gives up an item that cannot be applied even alone."""
    keep_waiting: Callable[[Engine, Sequence[Item], Exception], Sequence[Became]]
    """Keeps the items of one organization that cannot be applied now."""
    patience_s: float = PATIENCE_S
    """The longest that PostgreSQL may take for a statement of `apply`."""


def apply_all(engine: Engine, items: Sequence[Item], work: Work[Item, Became]) -> list[Became]:
    """Apply `items`. Returns the result of each. Raises a database error that concerns everybody.

    If the ledger is distributed, the items of each shard are applied by themselves, those of several shards at once.
    """
    at_once = shard_connections(engine)
    if at_once is None:
        return _Run(engine, items, work).done()
    groups = _by_shard(engine, [work.org_id_of(item) for item in items])
    runs = [_Run(engine, [items[place] for place in places], work, node) for node, places in groups]
    with ThreadPoolExecutor(at_once) as threads:
        faults = list(threads.map(_Run.fault, runs))
    became: dict[int, Became] = {}
    for (_, places), run, fault in zip(groups, runs, faults, strict=True):
        if fault is not None:
            if all(faults):
                raise fault
            run.keep_all_waiting(fault)
        became |= zip(places, run.results(), strict=True)
    return [became[place] for place in range(len(items))]


def node_of(engine: Engine, org_id: str) -> int | None:
    """The node that has an organization; None: the ledger is not distributed. Raises database errors."""
    if shard_connections(engine) is None:
        return None
    return _places(engine, {org_id})[org_id].node


def _by_shard(engine: Engine, org_ids: Sequence[str]) -> list[tuple[int, list[int]]]:
    """The node of each shard, and the places of its organizations in order; the largest group first."""
    found = _places(engine, set(org_ids))
    places: dict[distribution.Place, list[int]] = {}
    for place, org_id in enumerate(org_ids):
        places.setdefault(found[org_id], []).append(place)
    return sorted(((node, group) for (_, node), group in places.items()), key=lambda each: len(each[1]), reverse=True)


def _places(engine: Engine, org_ids: set[str], *, again: bool = True) -> dict[str, distribution.Place]:
    try:
        with raw_connection(engine) as connection:
            return distribution.places(connection, org_ids)
    except psycopg.Error as fault:
        if not again or not _others_can_go_on(engine, fault):
            raise
        return _places(engine, org_ids, again=False)


@dataclass(slots=True)
class _Run(Generic[Item, Became]):
    engine: Engine
    items: Sequence[Item]
    work: Work[Item, Became]
    node: int | None = None
    """The node that has the organizations, if the ledger is distributed."""
    became: dict[int, Became] = field(default_factory=dict)
    """By the item's place in `items`."""
    culprits: dict[str, Exception] = field(default_factory=dict)
    """The organizations that are kept waiting, and why."""
    pending: list[tuple[Sequence[int], bool]] = field(default_factory=list)
    """Places to try together, and whether carefully. The last entry is next."""
    waited_for: int = 0
    """How many culprits took time to fail."""

    def done(self) -> list[Became]:
        """Apply all items."""
        self.pending += [(part, False) for part in _parts(range(len(self.items)), MAX_BATCH)]
        while self.pending:
            places, carefully = self.pending.pop()
            if self.culprits:
                places = [place for place in places if self._org_id(place) not in self.culprits]
            if places:
                self._try(places, carefully=carefully)
        for org_id, fault in self.culprits.items():
            self._keep_waiting(org_id, fault)
        return self.results()

    def results(self) -> list[Became]:
        """The result of each item, once all have one."""
        return [self.became[place] for place in range(len(self.items))]

    def fault(self) -> Exception | None:
        """Apply all items. Returns the error that `done` raises."""
        try:
            self.done()
        except Exception as error:  # noqa: BLE001 - it is raised, or its shard has to wait
            return error
        return None

    def keep_all_waiting(self, fault: Exception) -> None:
        """Keep the items waiting that could not be applied because of `fault`, which concerns their shard alone.

        Raises `fault` if it concerns everybody.
        """
        if not _others_can_go_on(self.engine, fault):
            raise fault
        for org_id in {self._org_id(place) for place in range(len(self.items)) if place not in self.became}:
            self._keep_waiting(org_id, fault)

    def _org_id(self, place: int) -> str:
        return self.work.org_id_of(self.items[place])

    def _try(self, places: Sequence[int], *, carefully: bool) -> None:
        # The more culprits took time, the less time the next one gets.
        patience_s = max(SHORT_PATIENCE_S / (1 + self.waited_for), SHORTEST_PATIENCE_S) if carefully else None
        began_at = time.monotonic()
        fault: Exception
        try:
            with raw_connection(self.engine, node=self.node, patience_s=self.work.patience_s) as connection:
                became = self.work.apply(connection, [self.items[place] for place in places], patience_s)
        except Exception as error:  # noqa: BLE001 - what cannot be isolated is raised
            fault = error
        else:
            self.became |= zip(places, became, strict=True)
            return
        if not is_transient(fault):
            if len(places) > 1:
                self.pending += [(half, carefully) for half in _parts(places, (len(places) + 1) // 2)]
                return
            try:
                self.became[places[0]] = self.work.bury(self.engine, self.items[places[0]], fault)
            except psycopg.Error as second:
                fault = second
            else:
                return
        if not _others_can_go_on(self.engine, fault):
            raise fault from None
        had_to_wait = patience_s is not None and time.monotonic() - began_at > patience_s / 2
        self._isolate(places, fault, carefully=carefully, had_to_wait=had_to_wait)

    def _isolate(self, places: Sequence[int], fault: Exception, *, carefully: bool, had_to_wait: bool) -> None:
        """Try `places` again, in another way, or keep them waiting."""
        is_slow = isinstance(fault, QueryCanceled)
        slow_ones = sum(isinstance(fault, QueryCanceled) for fault in self.culprits.values())
        if is_about_a_node(fault):  # of all these organizations
            self.culprits |= {self._org_id(place): fault for place in places}
        elif not carefully and not is_slow:
            self.pending.append((places, True))
        elif is_slow and self.became and slow_ones >= MOST_CULPRITS:
            # Each further try costs the others time. The rest wait too, each organization by itself.
            self.culprits |= {self._org_id(place): fault for place in places}
        elif len(places) > 1:
            self.pending += [(part, True) for part in _dealt(places, self._org_id)]
        elif self.became or len(self.culprits) < MOST_CULPRITS:
            self.culprits[self._org_id(places[0])] = fault
            self.waited_for += had_to_wait  # a culprit that fails at once costs the others nothing
        else:
            raise fault from None

    def _keep_waiting(self, org_id: str, fault: Exception) -> None:
        left = [place for place in range(len(self.items)) if place not in self.became and self._org_id(place) == org_id]
        try:
            kept = self.work.keep_waiting(self.engine, [self.items[place] for place in left], fault)
        except psycopg.Error as second:  # that cannot be written either
            raise fault from second
        self.became |= zip(left, kept, strict=True)


def _parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """`items` in parts of at most `size`, the last part first, so that the first one is popped first."""
    return [items[first : first + size] for first in range(0, len(items), size)][::-1]


def _dealt(places: Sequence[int], org_id_at: Callable[[int], str]) -> list[Sequence[int]]:
    """`places` in at most `PIECES` parts, each organization in one part; a single organization is split in order.

    Organizations with neighbouring ids go into different parts, because they often share a fault.
    """
    places_of: dict[str, list[int]] = {}
    for place in places:
        places_of.setdefault(org_id_at(place), []).append(place)
    if len(places_of) == 1:
        return _parts(places, -(-len(places) // PIECES))
    groups = [places_of[org_id] for org_id in sorted(places_of)]
    return [[place for group in groups[first::PIECES] for place in group] for first in range(min(PIECES, len(groups)))]


def _others_can_go_on(engine: Engine, error: Exception) -> bool:
    if not may_be_local(error) or is_abandoned(engine):
        return False
    if is_lost_connection(error):
        try:
            with raw_connection(engine) as connection:
                connection.execute("SELECT 1")
        except Exception as second:
            if not is_transient(second):
                raise
            return False
    return True
