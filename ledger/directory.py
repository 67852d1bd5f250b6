"""Finds organizations, runs and orders for somebody who works for all customers. Only reads.

A name is looked up in the order of the primary key of `wallets`, from the text on; so however many wallets there are,
few are read. Only `overdrawn` and `runs` look at every wallet, as an index for them would cost every message.
"""

import difflib
import re
from collections.abc import Sequence
from datetime import datetime
from string import ascii_lowercase, digits
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, ColumnElement, Connection, Select, Text, any_, literal, select, text, true

from holdfast_client.messages import MAX_ID_LENGTH
from ledger.tables import posted_messages, wallets, workflows

MOST_FOUND = 20
"""The most organizations, runs or orders that a search returns."""

MOST_SIMILAR = 5
"""The most similar names."""

_NEIGHBOURS = 100
"""How many names are compared that follow the text, or its first half, in the order of names."""

_LONGEST_EDITED = 40
"""The longest text of which every single typing error is tried."""

_TAIL_PAGES = 200
"""In how many of the last pages of `credit_events` the latest events are looked for: some thousand events."""

MOST_RECENT = 30
"""The most organizations that `recent` returns."""


class Listed(NamedTuple):
    """An organization in a list, with its balance in credits."""

    org_id: str
    available: int
    credit_limit: int
    last_event_at: datetime | None


class FoundRun(NamedTuple):
    """A run with the id that was looked for."""

    org_id: str
    workflow_id: str
    state: str
    used: int | None
    """None: it has not finished."""
    refunded: int


class FoundOrder(NamedTuple):
    """A message about a wallet with the id that was looked for: a purchase, a refund and so on."""

    org_id: str
    kind: str
    message_id: str
    credits: int | None
    """None: it is not about an amount."""


_AVAILABLE = wallets.c.prepaid_balance + wallets.c.subscription_balance - wallets.c.reserved
_LISTED = select(wallets.c.org_id, _AVAILABLE.label("available"), wallets.c.credit_limit, wallets.c.last_event_at)


def beginning_with(connection: Connection, beginning: str) -> list[Listed]:
    """The organizations whose names begin with `beginning`, at most `MOST_FOUND`, the one with just this name first.

    Of other capitals, those are found that are all small, all large, or at the beginning.
    """
    found: dict[str, Listed] = {}
    for spelling in _spellings(beginning):
        for each in _listed(connection, _from(spelling).limit(_NEIGHBOURS)):
            if each.org_id.lower().startswith(beginning.lower()):
                found[each.org_id] = each
    return sorted(found.values(), key=lambda each: (each.org_id != beginning, each.org_id))[:MOST_FOUND]


def similar(connection: Connection, name: str) -> list[str]:
    """The organizations whose names look like `name`, which is none: the most similar first, at most `MOST_SIMILAR`."""
    name = re.sub(r"\s+", "-", name.strip())[:MAX_ID_LENGTH]
    near: set[str] = set()
    for spelling in _spellings(name[: (len(name) + 1) // 2]):
        near.update(connection.scalars(_from(spelling).with_only_columns(wallets.c.org_id).limit(_NEIGHBOURS)))
    mistyped = literal(sorted({*_spellings(name), *_one_error_away(name.lower())}), ARRAY(Text))
    near.update(connection.scalars(select(wallets.c.org_id).where(wallets.c.org_id == any_(mistyped))))
    by_small = {each.lower(): each for each in sorted(near, reverse=True)}
    close = difflib.get_close_matches(name.lower(), by_small, n=MOST_SIMILAR, cutoff=0.7)
    return [by_small[each] for each in close]


def runs(connection: Connection, workflow_id: str) -> list[FoundRun]:
    """The runs with just this id, of all organizations; at most `MOST_FOUND`. Looks it up in each wallet."""
    columns = workflows.c
    found = select(columns.org_id, columns.workflow_id, columns.state, columns.finish_credits, columns.refunded)
    of_each = found.where(columns.org_id == wallets.c.org_id, columns.workflow_id == workflow_id).lateral("run")
    rows = connection.execute(select(of_each).select_from(wallets.join(of_each, true())).order_by(of_each.c.org_id))
    return [FoundRun(*row) for row in rows.fetchmany(MOST_FOUND)]


def orders(connection: Connection, message_id: str) -> list[FoundOrder]:
    """The purchases, refunds and so on with just this id, of all organizations; at most `MOST_FOUND`."""
    columns = posted_messages.c
    query = select(columns.org_id, columns.kind, columns.message_id, columns.terms["credits"].label("credits")).where(
        columns.message_id == message_id, text("kind <> 'configure'")
    )
    rows = connection.execute(query.order_by(columns.org_id, columns.kind).limit(MOST_FOUND))
    return [FoundOrder(*row) for row in rows]


def named(connection: Connection, org_ids: Sequence[str]) -> dict[str, Listed]:
    """Those of `org_ids` that have a wallet, by name."""
    one_of_them = wallets.c.org_id == any_(literal(list(org_ids), ARRAY(Text)))
    return {each.org_id: each for each in _listed(connection, _LISTED.where(one_of_them))}


def recent(connection: Connection) -> list[Listed]:
    """The organizations that the latest events belong to, the latest first; at most `MOST_RECENT`.

    Events are never changed, so the table ends with the newest ones. Only its end is read.
    """
    pages = connection.scalar(text("SELECT pg_relation_size('credit_events') / current_setting('block_size')::bigint"))
    begin = {"begin": f"({max(0, (pages or 0) - _TAIL_PAGES)},0)", "most": MOST_RECENT}
    org_ids = list(connection.scalars(_OF_THE_TAIL, begin))
    found = named(connection, org_ids)
    return [found[org_id] for org_id in org_ids if org_id in found]


def low(connection: Connection, among: Sequence[Listed]) -> list[Listed]:
    """Those of `among` that have credits, but fewer than they use in a day; the fewest first.

    What they use is the usage of their last 300 events: of a day, if these span more than one.
    """
    rows = connection.scalars(_USE_MORE_IN_A_DAY, {"org_ids": [each.org_id for each in among]})
    found = set(rows)
    return sorted((each for each in among if each.org_id in found), key=lambda each: each.available)


def overdrawn(connection: Connection, *, limit: int) -> list[Listed]:
    """The organizations with less than nothing available, the deepest in debt first. Reads every wallet."""
    return _listed(connection, _LISTED.where(_AVAILABLE < 0).order_by(_AVAILABLE, wallets.c.org_id).limit(limit))


_OF_THE_TAIL = text("""
    SELECT org_id FROM credit_events WHERE ctid >= CAST(:begin AS tid)
    GROUP BY org_id ORDER BY max(created_at) DESC, org_id LIMIT :most
""")


_USE_MORE_IN_A_DAY = text("""
    SELECT org_id FROM wallets CROSS JOIN LATERAL (
        SELECT sum(-credits) AS used, extract(epoch FROM clock_timestamp() - min(created_at)) / 86400 AS days
        FROM credit_events AS event
        WHERE event.org_id = wallets.org_id AND seq > last_seq - 300 AND event_type = 'usage'
    ) AS latest
    WHERE org_id = ANY(:org_ids) AND prepaid_balance + subscription_balance - reserved >= 0
      AND prepaid_balance + subscription_balance - reserved < used / GREATEST(days, 1)
""")


def _from(name: str) -> Select[Any]:
    begins: ColumnElement[bool] = wallets.c.org_id >= name
    return _LISTED.where(begins).order_by(wallets.c.org_id)


def _listed(connection: Connection, query: Select[Any]) -> list[Listed]:
    return [Listed(*row) for row in connection.execute(query)]


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((name, name.lower(), name.upper(), name.capitalize())))


def _one_error_away(name: str) -> set[str]:
    """What somebody may have meant who typed one letter too few, too many or wrong, or two in the wrong order."""
    if len(name) > _LONGEST_EDITED:
        return set()
    letters = f"{ascii_lowercase}{digits}_.:-"
    halves = [(name[:at], name[at:]) for at in range(len(name) + 1)]
    return {
        *(left + right[1:] for left, right in halves),
        *(left + right[1::-1] + right[2:] for left, right in halves),
        *(left + letter + right[kept:] for left, right in halves for letter in letters for kept in (0, 1)),
    }
