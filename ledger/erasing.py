"""Erases the free text of one organization: whatever people may have written about a person. No sum changes.

What is erased: the names of activities, what senders put into metadata, and reasons; of dead letters that are closed,
the message, the error and the resolution. What stays: ids, amounts, times, and who did it. That a message was applied
before is still known: of its terms, an erased one is equal to anything.

Guarantee: all of it is erased, or nothing, and `erasures` says until which event, when, by whom and why. Events in the
archive stay as they are in its files.
"""

import json
from dataclasses import dataclass
from datetime import date

from sqlalchemy import Connection, Engine, insert, text

from holdfast_client.messages import ERASED, OWN_REASONS
from ledger.tables import erasures
from ledger.upkeep import UpkeepError, alone, refuse_others
from ledger.wording import NAMES

LOCK_WAIT_S = 10
"""How long to wait for a worker that is at the organization's wallet."""


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased, or would be, in rows."""

    events: int
    workflows: int
    messages: int
    dead_letters: int
    archived_events: int
    """Events in the archive, whose files still have the text."""
    archived_days: tuple[date, date] | None
    """The first and the last day of those files."""


def erase(engine: Engine, org_id: str, *, by: str, why: str, dry_run: bool = False) -> Erased:
    """Erase the free text of `org_id`. With `dry_run`, only count. Raises UpkeepError."""
    with alone(engine) as connection, connection.begin() as transaction:
        _refuse(connection, org_id)
        connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'"))
        about = {"org_id": org_id, "reasons": sorted(_OWN_REASONS), "erased": json.dumps({"reason": ERASED})}
        last_seq = connection.scalar(_LOCK, about)
        record = {"org_id": org_id, "seq": last_seq, "erased_by": by, "why": why}
        connection.execute(insert(erasures).values(erased_at=text("clock_timestamp()"), **record))
        events, runs, messages, letters = (connection.execute(statement, about).rowcount for statement in _STATEMENTS)
        connection.execute(_LOCK_SUMS, about)
        connection.execute(_SUMS, about)
        connection.execute(_NAMED_SUMS, about)
        older = connection.execute(_IN_ARCHIVE, about).one()
        days = None if older.first_day is None else (older.first_day, older.last_day)
        found = Erased(events, runs, messages, letters, older.events, days)
        if dry_run:
            transaction.rollback()
    return found


def _refuse(connection: Connection, org_id: str) -> None:
    refuse_others(connection)
    found = connection.execute(_UNDER_WAY, {"org_id": org_id}).one()
    if not found.is_known:
        raise UpkeepError(f"{org_id} has no wallet: no message has named it yet")
    if found.open_letters:
        raise UpkeepError(
            f"{org_id} has {found.open_letters:,} open dead letters, which have text too: replay or discard them "
            f"first; `holdfast failed list --org {org_id}` shows them"
        )
    if found.waiting:
        raise UpkeepError(f"{found.waiting:,} messages of {org_id} wait to be applied: wait until they are")


_OWN_REASONS = OWN_REASONS | {"refunded", "disputed", "plan_change"}
_UNDER_WAY = text("""
    SELECT EXISTS (SELECT org_id FROM wallets WHERE org_id = :org_id) AS is_known,
           (SELECT count(*) FROM dead_letters WHERE org_id = :org_id AND status = 'open') AS open_letters,
           (SELECT count(*) FROM waiting_messages WHERE org_id = :org_id) AS waiting
""")
# Nobody else writes to the organization until the end.
_LOCK = text("""
    SELECT last_seq FROM wallets WHERE org_id = :org_id FOR UPDATE
""")
_KEYS = ", ".join(f"('{kind}', '{key}')" for kind, keys in NAMES.items() for key in keys if key != "reason")
_OF_PLAN = """(
    event_type = 'subscription_credit' OR starts_with(idempotency_key, 'subscription:')
    OR strpos(idempotency_key, '/ended/') > 0
)"""
# What the ledger itself has written. A text that has a space in it is a sender's.
_KEPT = f"""
    SELECT COALESCE(jsonb_object_agg(key, value), '{{}}') FROM jsonb_each(metadata) AS entry
    WHERE CASE key
        WHEN 'reason' THEN event_type = 'reservation_released' OR value #>> '{{}}' = ANY(CAST(:reasons AS text[]))
        WHEN 'by' THEN source = 'operator'
        WHEN 'given_reason' THEN false
        ELSE (event_type, key) IN ({_KEYS}) AND CASE jsonb_typeof(value)
            WHEN 'string' THEN value #>> '{{}}' !~ '\\s' OR key IN ('plan', 'replaced_plan') AND {_OF_PLAN}
            WHEN 'object' THEN key = 'paid_by'
            WHEN 'array' THEN key = 'ending'
            ELSE true
        END
    END
"""
_STATEMENTS = (
    text(f"""
        UPDATE credit_events SET activity_name = NULL, metadata = ({_KEPT})
        WHERE org_id = :org_id AND (activity_name IS NOT NULL OR metadata <> ({_KEPT}))
    """),
    text("UPDATE workflows SET activity_name = NULL WHERE org_id = :org_id AND activity_name IS NOT NULL"),
    text("""
        UPDATE posted_messages SET terms = terms || CAST(:erased AS jsonb)
        WHERE org_id = :org_id AND kind <> 'reversal' AND jsonb_typeof(terms -> 'reason') = 'string'
    """),
    text("""
        UPDATE dead_letters SET body = '', body_sha256 = sha256(''), error = 'erased', traceback = NULL, cause = '',
                                resolution = 'erased'
        WHERE org_id = :org_id AND body <> ''
    """),
)
_LOCK_SUMS = text("SELECT seq FROM daily_sums_through WHERE org_id = :org_id FOR UPDATE")
_SUMS = text("""
    INSERT INTO daily_sums AS sums
    SELECT org_id, day, event_type, project_id, '', source, sum(events), sum(credits), min(first_seq), max(last_seq)
    FROM daily_sums WHERE org_id = :org_id AND activity_name <> '' GROUP BY org_id, day, event_type, project_id, source
    ON CONFLICT (org_id, day, event_type, project_id, activity_name, source) DO UPDATE SET
        events = sums.events + excluded.events, credits = sums.credits + excluded.credits,
        first_seq = LEAST(sums.first_seq, excluded.first_seq), last_seq = GREATEST(sums.last_seq, excluded.last_seq)
""")
_NAMED_SUMS = text("DELETE FROM daily_sums WHERE org_id = :org_id AND activity_name <> ''")
_IN_ARCHIVE = text("""
    SELECT COALESCE(seq, 0) AS events, CAST(timezone('UTC', created_at) AS date) AS last_day,
           (SELECT min(day) FROM daily_sums WHERE org_id = :org_id AND first_seq <= seq) AS first_day
    FROM wallets LEFT JOIN archived USING (org_id) WHERE org_id = :org_id
""")
