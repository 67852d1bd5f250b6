"""The ledger's invariants as SQL, checked on a live database in one snapshot. Reports offenders, repairs nothing.

Each check restates a rule from the rows alone, without the code that wrote them. It blocks no writer. The last two
check what the database itself refuses, as the owner of the tables can switch that off.

Of a wallet whose older events are in the archive, the row in `archived` is where the balances continue from. A workflow
or message without its event is accepted there if all of these together are exactly what the archive has taken.
`ledger.archive.verify` reads the archived events back, and runs the same checks over all events.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, func, text
from sqlalchemy.dialects.postgresql import insert

from holdfast_client.messages import MAX_CREDITS
from ledger import distribution
from ledger.tables import last_verification, metadata

MAX_OFFENDERS = 20
"""The most offenders that one check names."""


@dataclass(frozen=True, slots=True)
class Check:
    """An invariant: what always holds, and a query for what breaks it, as (org_id, offender).

    If an offender belongs to no organization, `org_id` is the name of its table.
    """

    name: str
    rule: str
    offenders: str
    of_shards: str = ""
    """A query for what breaks it in the shards of a distributed ledger, if `offenders` cannot see it there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check: the first offenders, or none."""

    check: Check
    offenders: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The findings of all checks, and how many rows were checked."""

    findings: list[Finding]
    wallets: int
    events: int
    archived: int
    """The events that are in the archive and were not checked."""
    open_dead_letters: int

    @property
    def broken(self) -> int:
        """How many invariants do not hold."""
        return sum(bool(finding.offenders) for finding in self.findings)

    @property
    def is_clean(self) -> bool:
        """Whether every invariant holds."""
        return self.broken == 0


def verify(engine: Engine) -> Verdict:
    """Check every invariant in one snapshot of the database."""
    with engine.connect() as connection:
        return check_all(connection)


def check_all(connection: Connection) -> Verdict:
    """The same in a new transaction of `connection`."""
    connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    is_distributed = distribution.described(connection) is not None

    def count(rows: str) -> Any:
        return connection.scalar(text(f"SELECT count(*) FROM {rows}"))

    def offenders(check: Check) -> list[tuple[str, str]]:
        is_anywhere = is_distributed and check.of_shards
        broken = f"{check.offenders} UNION ALL {check.of_shards}" if is_anywhere else check.offenders
        query = text(f"SELECT org_id, offender FROM ({broken}) AS broken ORDER BY 1, 2 LIMIT :most")
        return [(row.org_id, row.offender) for row in connection.execute(query, {"most": MAX_OFFENDERS})]

    return Verdict(
        [Finding(check, offenders(check)) for check in CHECKS],
        wallets=count("wallets"),
        events=count("credit_events"),
        archived=int(connection.scalar(text("SELECT COALESCE(sum(seq), 0) FROM archived")) or 0),
        open_dead_letters=count("dead_letters WHERE status = 'open'"),
    )


def record(engine: Engine, verdict: Verdict) -> None:
    """Keep the result, and that it is of now, for monitoring. It replaces the one before."""
    found = {"ended_at": func.clock_timestamp(), "broken": verdict.broken}
    row = insert(last_verification).values(**found)
    with engine.begin() as connection:
        connection.execute(row.on_conflict_do_update(index_elements=["number"], set_=found))


_STEPS = """
    SELECT * FROM (
    SELECT org_id, seq, event_type, credits, idempotency_key, created_at,
           subscription_balance_after - subscription_change AS subscription_before,
           prepaid_balance_after - prepaid_change AS prepaid_before,
           period_usage_after - usage_change AS usage_before, metadata,
           prepaid_change, subscription_change, reserved_change, usage_change, period_usage_after,
           seq - lag(seq, 1, 0::bigint) OVER wallet AS seq_step,
           lag(created_at) OVER wallet AS created_before
    FROM (
        SELECT *,
               prepaid_balance_after - lag(prepaid_balance_after, 1, 0::bigint) OVER wallet AS prepaid_change,
               subscription_balance_after - lag(subscription_balance_after, 1, 0::bigint) OVER wallet
                 AS subscription_change,
               reserved_after - lag(reserved_after, 1, 0::bigint) OVER wallet AS reserved_change,
               period_usage_after - lag(period_usage_after, 1, 0::bigint) OVER wallet AS usage_change
        FROM (
            SELECT org_id, seq, created_at, event_type, credits, idempotency_key, metadata, prepaid_balance_after,
                   subscription_balance_after, reserved_after, period_usage_after
            FROM credit_events
            UNION ALL
            SELECT org_id, seq, created_at, NULL, NULL, NULL, NULL, prepaid_balance, subscription_balance, reserved,
                   period_usage
            FROM archived
        ) AS there
        WINDOW wallet AS (PARTITION BY org_id ORDER BY seq)
    ) AS changes
    WINDOW wallet AS (PARTITION BY org_id ORDER BY seq)
    ) AS steps WHERE event_type IS NOT NULL
"""


def _number(*path: str) -> str:
    """The number at `path` in an event's metadata, or 0: older events have what their sender said there."""
    value = f"metadata #> '{{{','.join(path)}}}'"
    return f"CASE WHEN jsonb_typeof({value}) = 'number' THEN ({value})::numeric ELSE 0 END"


_OF_MESSAGE = """(
    (workflow_id IS NULL OR event_type = 'refund') AND NOT starts_with(idempotency_key, 'subscription:')
    AND strpos(idempotency_key, '/ended/') = 0 AND NOT (starts_with(idempotency_key, 'configure:') AND credits = 0)
)"""
_REVERSES = "starts_with(idempotency_key, 'reversal:')"
# What an event moves of the prepaid credits with an end.
_MOVED = f"""CASE
    WHEN starts_with(idempotency_key, 'subscription:') THEN 0
    WHEN strpos(idempotency_key, '/ended/') > 0 THEN credits
    WHEN event_type = 'usage' THEN -{_number("paid_by", "ending")}
    WHEN event_type IN ('adjustment', 'billing') THEN -{_number("from_ending")}
    WHEN event_type = 'refund' THEN (
        SELECT COALESCE(sum((part)::numeric), 0)
        FROM jsonb_path_query(metadata, '$.ending[*].credits ? (@.type() == "number")') AS part
    )
    WHEN event_type IN ('grant', 'prepaid_purchase') AND EXISTS (
        SELECT FROM posted_messages AS sent
        WHERE sent.org_id = event.org_id AND kind || ':' || message_id = idempotency_key
          AND kind = split_part(idempotency_key, ':', 1) AND terms ->> 'expires_at' IS NOT NULL
    ) THEN credits - {_number("debt_settled")}
    ELSE 0
END"""
_RESERVED = "sum(-credits) FILTER (WHERE event_type = 'reservation')"
_RELEASED = "sum(credits) FILTER (WHERE event_type = 'reservation_released')"
_USED = f"sum(-credits + {_number('not_charged')}) FILTER (WHERE event_type = 'usage')"

BALANCES = ("prepaid_balance", "subscription_balance", "reserved", "period_usage")
"""The balances of a wallet; after an event, with `_after`."""

ARCHIVED = {
    "held": f"COALESCE({_RESERVED}, 0)",
    "released": f"COALESCE({_RELEASED}, 0)",
    "used": f"COALESCE({_USED}, 0)",
    "posted": f"COALESCE(sum(credits) FILTER (WHERE {_OF_MESSAGE} AND NOT {_REVERSES}), 0)",
    "reversed": f"COALESCE(sum(-credits) FILTER (WHERE {_REVERSES}), 0)",
    "ending": f"sum({_MOVED})",
}
"""What `archived` keeps of the events of a wallet that leave, by column: expressions over the rows of `event`."""

FUNCTION_MD5 = "798d2bd8197fe0c9c61dc6846a35d25d"
"""Of the text of `credit_events_refuse_change`, as revision 0031 makes it."""

# Not a temporary view of the same name, as `ledger.archive.verify` has.
_TABLE = """(
    SELECT pg_class.oid FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (schema, place)
    JOIN pg_namespace ON nspname = schema JOIN pg_class ON relnamespace = pg_namespace.oid AND relname = {}
    ORDER BY place LIMIT 1
)"""

_TRIGGERS = f"""
    SELECT 'credit_events' AS org_id, 'the trigger ' || name || ' is ' || state AS offender
    FROM (
        SELECT name,
               CASE
                 WHEN tgname IS NULL THEN 'missing'
                 WHEN tgenabled NOT IN ('O', 'A') THEN 'disabled'
                 WHEN tgtype <> type OR tgattr <> '' OR tgqual IS NOT NULL
                   OR md5(prosrc) <> '{FUNCTION_MD5}'
                   THEN 'not the one that holdfast migrate creates'
               END AS state
        FROM (VALUES
            ('credit_events_append_only', 1 + 2 + 8 + 16), -- for each row, before UPDATE and DELETE
            ('credit_events_no_truncate', 2 + 32) -- for each statement, before TRUNCATE
        ) AS expected (name, type)
        LEFT JOIN pg_trigger ON tgrelid = {{table}} AND tgname IN (name, {{name}})
        LEFT JOIN pg_proc ON pg_proc.oid = tgfoid
    ) AS trigger
    WHERE state IS NOT NULL
"""
_EXPECTED = ", ".join(
    f"('{table.name}', '{constraint.name}')" for table in metadata.sorted_tables for constraint in table.constraints
)
_CONSTRAINTS = f"""
    SELECT relation AS org_id,
           name || CASE WHEN conname IS NULL THEN ' is missing' ELSE ' is not validated' END AS offender
    FROM (VALUES {_EXPECTED}) AS expected (relation, name)
    LEFT JOIN pg_constraint ON conrelid = {{table}} AND conname IN (name, {{name}})
    WHERE convalidated IS NOT TRUE
"""


def _of_shards(tables: Sequence[str], offenders: str) -> str:
    """The `offenders` in each shard of these tables. Some names have the number of the shard at the end there."""
    found = offenders.format(table="'%1$s'::regclass", name=r"name || substring('%1$s' FROM '_\d+$')")
    names = ", ".join(f"('{table}')" for table in tables)
    return rf"""
        SELECT relation, offender || ' in shard ' || string_agg(shardid::text, ', ' ORDER BY shardid)
        FROM (VALUES {names}) AS distributed (relation)
        CROSS JOIN LATERAL run_command_on_shards({_TABLE.format("relation")}, replace($query$
            SELECT string_agg(offender, E'\n') FROM ({found}) AS broken WHERE org_id = 'RELATION'
        $query$, 'RELATION', relation)) AS found
        CROSS JOIN LATERAL unnest(string_to_array(result, E'\n')) AS offender
        GROUP BY relation, offender
    """


CHECKS = (
    Check(
        "numbering",
        "A wallet's events are numbered 1, 2, 3, … without a gap.",
        f"""
        SELECT org_id, 'event ' || seq AS offender FROM ({_STEPS}) AS step WHERE seq_step <> 1
        UNION ALL
        SELECT org_id, 'wallet says ' || last_seq || ', its last event is ' || COALESCE(max(seq), 0)
        FROM wallets LEFT JOIN credit_events USING (org_id) GROUP BY org_id, last_seq
        HAVING last_seq <> COALESCE(max(seq), 0)
        """,
    ),
    Check(
        "owner",
        "Every event and every workflow belongs to a wallet.",
        """
        SELECT org_id, 'its events have no wallet' AS offender
        FROM credit_events LEFT JOIN wallets USING (org_id) WHERE wallets.last_seq IS NULL GROUP BY org_id
        UNION ALL
        SELECT org_id, 'its workflows have no wallet'
        FROM workflows LEFT JOIN wallets USING (org_id) WHERE wallets.last_seq IS NULL GROUP BY org_id
        """,
    ),
    Check(
        "clock",
        "Time never runs backwards within a wallet.",
        f"SELECT org_id, 'event ' || seq AS offender FROM ({_STEPS}) AS step WHERE created_at < created_before",
    ),
    Check(
        "arithmetic",
        "Every event changes the balances as its type requires.",
        f"""
        SELECT org_id, 'event ' || seq || ', ' || event_type AS offender FROM ({_STEPS}) AS step
        WHERE NOT CASE
          WHEN event_type IN ('reservation', 'reservation_released')
            THEN reserved_change = -credits AND prepaid_change = 0 AND subscription_change = 0 AND usage_change = 0
          WHEN event_type = 'usage'
            THEN subscription_change = CASE WHEN {_number("paid_by", "ending")} = 0
                   THEN -LEAST(-credits, subscription_before) ELSE -{_number("paid_by", "subscription")} END
             AND prepaid_change = credits - subscription_change AND prepaid_change <= 0 AND reserved_change = 0
             AND usage_change = LEAST(-credits, {MAX_CREDITS} - usage_before)
          WHEN event_type = 'subscription_credit'
            THEN prepaid_change = {_number("debt_settled")} AND subscription_change = credits - prepaid_change
             AND prepaid_change BETWEEN 0 AND LEAST(credits, GREATEST(0, -prepaid_before)) AND reserved_change = 0
             AND CASE WHEN strpos(idempotency_key, '/') > 0 THEN usage_change = 0 ELSE period_usage_after = 0 END
          WHEN event_type = 'adjustment' AND starts_with(idempotency_key, 'subscription:')
            THEN subscription_change = credits AND prepaid_change = 0 AND reserved_change = 0 AND usage_change = 0
          WHEN event_type IN ('prepaid_purchase', 'grant', 'refund', 'adjustment', 'billing')
            THEN prepaid_change = credits AND subscription_change = 0 AND reserved_change = 0 AND usage_change = 0
          ELSE false -- an unknown type
        END
        """,
    ),
    Check(
        "sum",
        "The credits of all events add up to the available balance.",
        """
        SELECT org_id, 'events add up to ' || added || ', available is ' || available AS offender
        FROM (
            SELECT wallet.org_id, wallet.prepaid_balance + wallet.subscription_balance - wallet.reserved AS available,
                   COALESCE(sum(credits), 0)
                   + COALESCE(old.prepaid_balance + old.subscription_balance - old.reserved, 0) AS added
            FROM wallets AS wallet LEFT JOIN credit_events USING (org_id)
            LEFT JOIN archived AS old ON old.org_id = wallet.org_id
            GROUP BY wallet.org_id, old.org_id
        ) AS sums
        WHERE added <> available
        """,
    ),
    Check(
        "balances",
        "A wallet's balances are those after its last event.",
        """
        SELECT wallet.org_id, 'wallet and event ' || last_seq || ' differ' AS offender
        FROM wallets AS wallet JOIN credit_events AS event ON event.org_id = wallet.org_id AND event.seq = last_seq
        WHERE (prepaid_balance, subscription_balance, reserved, period_usage, last_event_at)
           IS DISTINCT FROM
              (prepaid_balance_after, subscription_balance_after, reserved_after, period_usage_after, event.created_at)
        """,
    ),
    Check(
        "reserved",
        "The reserved credits are the sum of the open reservations.",
        """
        SELECT org_id, 'reserved is ' || reserved || ', open reservations add up to ' || open AS offender
        FROM (
            SELECT org_id, reserved, COALESCE(sum(start_credits) FILTER (WHERE state = 'reserved'), 0) AS open
            FROM wallets LEFT JOIN workflows USING (org_id) GROUP BY org_id, reserved
        ) AS holds
        WHERE reserved <> open
        """,
    ),
    Check(
        "expiry",
        "No open reservation expires before the wallet's next expiry.",
        """
        SELECT org_id, 'workflow ' || workflow_id AS offender
        FROM workflows JOIN wallets USING (org_id)
        WHERE state = 'reserved' AND (next_hold_expiry IS NULL OR expires_at < next_hold_expiry)
        """,
    ),
    Check(
        "workflows",
        "A workflow is reserved, released and charged at most once, as its state and its messages' amounts require.",
        f"""
        WITH joined AS NOT MATERIALIZED (
            SELECT *, workflow.org_id AS archived_of,
                   CASE WHEN start_answer = 'reserved' THEN start_credits END AS holds,
                   CASE WHEN start_answer = 'reserved' AND state <> 'reserved' THEN start_credits END AS releases
            FROM (
                SELECT org_id, workflow_id, state, start_credits, start_answer, reserved_seq, finish_credits,
                       archived.seq AS left_until
                FROM workflows LEFT JOIN archived USING (org_id)
            ) AS workflow
            FULL JOIN (
                SELECT org_id, workflow_id, {_RESERVED} AS reserved, {_RELEASED} AS released, {_USED} AS used,
                       max(metadata ->> 'reason') FILTER (WHERE event_type = 'reservation_released') AS release_reason,
                       count(*) = count(DISTINCT event_type) AS once
                FROM credit_events WHERE workflow_id IS NOT NULL AND event_type <> 'refund' GROUP BY org_id, workflow_id
            ) AS history USING (org_id, workflow_id)
        )
        SELECT org_id, 'workflow ' || workflow_id AS offender FROM joined
        WHERE state IS NULL
           OR NOT COALESCE(once, true)
           OR (used IS DISTINCT FROM finish_credits AND (left_until IS NULL OR used IS NOT NULL))
           OR (reserved IS DISTINCT FROM holds
               AND (left_until IS NULL OR reserved IS NOT NULL OR reserved_seq > left_until))
           OR (released IS DISTINCT FROM releases AND (left_until IS NULL OR released IS NOT NULL))
           OR (state IN ('cancelled', 'failed', 'expired') AND release_reason <> state)
        UNION ALL
        SELECT old.org_id, 'the workflows whose events are in the archive'
        FROM archived AS old LEFT JOIN joined ON archived_of = old.org_id
        GROUP BY old.org_id, old.held, old.released, old.used
        HAVING (COALESCE(sum(holds) FILTER (WHERE joined.reserved IS NULL), 0),
                COALESCE(sum(releases) FILTER (WHERE joined.released IS NULL), 0),
                COALESCE(sum(finish_credits) FILTER (WHERE joined.used IS NULL), 0))
            <> (old.held, old.released, old.used)
        """,
    ),
    Check(
        "refunds",
        "A workflow records the sum of its refunds, which never exceeds its usage. No refund names another workflow.",
        f"""
        SELECT org_id, 'workflow ' || workflow_id AS offender
        FROM (SELECT org_id, workflow_id, refunded, finish_credits FROM workflows) AS workflow
        FULL JOIN (
            SELECT posted.org_id, terms ->> 'workflow_id' AS workflow_id, sum((terms ->> 'credits')::bigint) AS given
            FROM posted_messages AS posted WHERE kind = 'refund' AND terms ->> 'workflow_id' IS NOT NULL GROUP BY 1, 2
        ) AS refunds USING (org_id, workflow_id)
        WHERE COALESCE(refunded, 0) <> COALESCE(given, 0) OR COALESCE(given, 0) > COALESCE(finish_credits, 0)
        UNION ALL
        SELECT org_id, idempotency_key || ' names ' || workflow_id
        FROM credit_events JOIN posted_messages USING (org_id)
        WHERE event_type = 'refund' AND kind = 'refund' AND idempotency_key = 'refund:' || message_id
          AND workflow_id IS NOT NULL AND workflow_id IS DISTINCT FROM terms ->> 'workflow_id'
        UNION ALL
        SELECT org_id, 'workflow ' || workflow_id || ' was paid by other credits'
        FROM workflows JOIN credit_events AS event USING (org_id, workflow_id)
        WHERE event_type = 'usage' AND paid_by_ending IS NOT NULL AND (
            SELECT COALESCE(sum(paid::bigint), 0) FROM jsonb_each_text(paid_by_ending) AS part (by, paid)
        ) <> {_number("paid_by", "subscription")} + {_number("paid_by", "ending")}
        """,
    ),
    Check(
        "messages",
        "Every message about the wallet that has credits, such as a purchase, is one event with these credits.",
        f"""
        WITH joined AS NOT MATERIALIZED (
            SELECT *, message.org_id AS archived_of
            FROM (
                SELECT org_id, kind || ':' || message_id AS key, kind, archived.seq AS left_until,
                       (terms ->> 'credits')::bigint * CASE kind WHEN 'reversal' THEN -1 ELSE 1 END AS sent
                FROM posted_messages LEFT JOIN archived USING (org_id) WHERE terms ? 'credits'
            ) AS message
            FULL JOIN (
                SELECT org_id, idempotency_key AS key, credits FROM credit_events WHERE {_OF_MESSAGE}
            ) AS event USING (org_id, key)
        )
        SELECT org_id, key AS offender FROM joined
        WHERE (credits IS NOT NULL OR left_until IS NULL)
          AND CASE WHEN kind = 'reversal' AND sent IS NULL THEN COALESCE(credits, 0) >= 0
                   ELSE sent IS DISTINCT FROM credits END
        UNION ALL
        SELECT old.org_id, 'the messages whose events are in the archive'
        FROM archived AS old LEFT JOIN joined ON archived_of = old.org_id GROUP BY old.org_id, posted
        HAVING COALESCE(sum(sent) FILTER (WHERE credits IS NULL AND kind <> 'reversal'), 0) <> posted
        """,
    ),
    Check(
        "reversals",
        "What was reversed of a purchase is remembered, and is not more than it brought.",
        """
        WITH joined AS NOT MATERIALIZED (
            SELECT org_id, purchase.org_id AS archived_of, purchase_id, left_until, COALESCE(brought, 0) AS brought,
                   COALESCE(reversed, 0) AS reversed, COALESCE(taken, 0) AS taken
            FROM (
                SELECT org_id, message_id AS purchase_id, (terms ->> 'credits')::bigint AS brought,
                       posted_messages.reversed, archived.seq AS left_until
                FROM posted_messages LEFT JOIN archived USING (org_id) WHERE kind = 'purchase'
            ) AS purchase
            FULL JOIN (
                SELECT org_id, terms ->> 'purchase_id' AS purchase_id, sum(-credits) AS taken
                FROM posted_messages JOIN credit_events USING (org_id)
                WHERE kind = 'reversal' AND idempotency_key = 'reversal:' || message_id GROUP BY 1, 2
            ) AS reversals USING (org_id, purchase_id)
        )
        SELECT org_id, 'purchase ' || purchase_id AS offender FROM joined
        WHERE taken > brought OR taken > reversed OR (taken < reversed AND left_until IS NULL)
        UNION ALL
        SELECT old.org_id, 'the reversals in the archive'
        FROM archived AS old LEFT JOIN joined ON archived_of = old.org_id GROUP BY old.org_id, old.reversed
        HAVING COALESCE(sum(joined.reversed - taken), 0) <> old.reversed
        """,
    ),
    Check(
        "ending",
        "Credits with an end are part of the balances, and the wallet knows when the next of them end.",
        """
        SELECT org_id, 'its credits with an end' AS offender
        FROM (
            SELECT wallets.org_id, prepaid_balance, subscription_balance, next_ending_at, held_past_end,
                   COALESCE(sum(remaining) FILTER (WHERE NOT of_plan), 0) AS prepaid,
                   COALESCE(sum(remaining) FILTER (WHERE of_plan), 0) AS subscription,
                   COALESCE(sum(remaining) FILTER (WHERE expires_at < COALESCE(next_ending_at, 'infinity')), 0) AS held,
                   min(expires_at) FILTER (WHERE expires_at >= next_ending_at) AS next
            FROM wallets LEFT JOIN (
                SELECT *, starts_with(origin, 'subscription:') AS of_plan FROM ending_credits
            ) AS ending USING (org_id)
            GROUP BY wallets.org_id
        ) AS wallet
        WHERE prepaid > GREATEST(prepaid_balance, 0) OR subscription > subscription_balance
           OR held <> held_past_end OR next IS DISTINCT FROM next_ending_at
        UNION ALL
        SELECT org_id, 'its credits with an end have no wallet'
        FROM ending_credits LEFT JOIN wallets USING (org_id) WHERE wallets.last_seq IS NULL GROUP BY org_id
        """,
    ),
    Check(
        "origins",
        "Credits with an end come from an event, and what is left or has ended of them is not more than it brought.",
        """
        SELECT org_id, origin AS offender
        FROM (
            SELECT org_id, origin, sum(credits) AS credits FROM (
                SELECT org_id, origin, remaining AS credits FROM ending_credits
                UNION ALL
                SELECT org_id, split_part(idempotency_key, '/ended/', 1), -credits FROM credit_events
                WHERE strpos(idempotency_key, '/ended/') > 0
            ) AS part GROUP BY org_id, origin
        ) AS ending
        LEFT JOIN (SELECT org_id, idempotency_key AS origin, credits AS brought FROM credit_events) AS event
          USING (org_id, origin)
        WHERE (brought IS NULL AND NOT EXISTS (SELECT FROM archived WHERE archived.org_id = ending.org_id))
           OR (credits > brought AND NOT starts_with(origin, 'subscription:'))
        """,
    ),
    Check(
        "uses",
        "Of the prepaid credits with an end, as many are left as came in and were neither used nor ended.",
        f"""
        SELECT org_id, 'came in and left: ' || moved || ', there are ' || remaining AS offender
        FROM (
            SELECT org_id, sum(moved) AS moved FROM (
                SELECT org_id, {_MOVED} AS moved FROM credit_events AS event
                UNION ALL SELECT org_id, ending FROM archived
            ) AS part GROUP BY org_id
        ) AS history
        FULL JOIN (
            SELECT org_id, sum(remaining) AS remaining FROM ending_credits
            WHERE NOT starts_with(origin, 'subscription:') GROUP BY org_id
        ) AS there USING (org_id)
        WHERE COALESCE(moved, 0) <> COALESCE(remaining, 0)
        """,
    ),
    Check(
        "periods",
        "A wallet's subscriptions, current and scheduled, exist, and its period began with a subscription credit.",
        """
        SELECT wallet.org_id, 'subscription ' || wallet.subscription_id AS offender
        FROM wallets AS wallet
        LEFT JOIN subscriptions AS current
          ON current.org_id = wallet.org_id AND current.subscription_id = wallet.subscription_id
        LEFT JOIN credit_events AS begun
          ON begun.org_id = wallet.org_id
         AND begun.idempotency_key = concat('subscription:', wallet.subscription_id, ':', current.period)
        WHERE wallet.subscription_id IS NOT NULL
          AND (current.org_id IS NULL OR (current.period IS NOT NULL AND begun.org_id IS NULL))
        UNION ALL
        SELECT org_id, 'scheduled subscription ' || scheduled_id
        FROM wallets LEFT JOIN subscriptions AS scheduled USING (org_id)
        WHERE scheduled_id IS NOT NULL AND scheduled.subscription_id = scheduled_id
          AND (NOT active OR period IS NOT NULL OR anchor <> scheduled_at)
        UNION ALL
        SELECT org_id, 'scheduled subscription ' || scheduled_id FROM wallets
        WHERE scheduled_id IS NOT NULL AND NOT EXISTS (
            SELECT FROM subscriptions WHERE org_id = wallets.org_id AND subscription_id = scheduled_id
        )
        """,
    ),
    Check(
        "daily sums",
        "The daily sums are those of the events that have been summed.",
        """
        SELECT org_id, 'the sums of ' || day AS offender
        FROM (
            SELECT sums.* FROM daily_sums AS sums LEFT JOIN archived USING (org_id)
            WHERE day > COALESCE(CAST(timezone('UTC', created_at) AS date), '-infinity')
        ) AS daily_sums FULL JOIN (
            SELECT org_id, CAST(timezone('UTC', created_at) AS date) AS day, event_type,
                   COALESCE(project_id, '') AS project_id, COALESCE(activity_name, '') AS activity_name, source,
                   count(*) AS counted, sum(event.credits) AS added, min(event.seq) AS first_seq,
                   max(event.seq) AS last_seq
            FROM credit_events AS event JOIN daily_sums_through AS through USING (org_id)
            WHERE event.seq <= through.seq AND NOT EXISTS (
                SELECT FROM archived WHERE archived.org_id = event.org_id AND timezone('UTC', event.created_at)
                  < CAST(timezone('UTC', archived.created_at) AS date) + 1
            )
            GROUP BY 1, 2, 3, 4, 5, 6
        ) AS history USING (org_id, day, event_type, project_id, activity_name, source)
        WHERE (events, credits, daily_sums.first_seq, daily_sums.last_seq)
            IS DISTINCT FROM (counted, added, history.first_seq, history.last_seq)
        UNION ALL
        SELECT org_id, 'the sums of all days' FROM (
            SELECT old.org_id, COALESCE(through.seq, 0) AS summed,
                   (SELECT COALESCE(sum(events), 0) FROM daily_sums WHERE org_id = old.org_id) AS counted,
                   (SELECT COALESCE(sum(credits), 0) FROM daily_sums WHERE org_id = old.org_id) AS added,
                   old.prepaid_balance + old.subscription_balance - old.reserved + (
                       SELECT COALESCE(sum(credits), 0) FROM credit_events
                       WHERE org_id = old.org_id AND seq <= through.seq
                   ) AS moved
            FROM archived AS old LEFT JOIN daily_sums_through AS through USING (org_id)
        ) AS sums
        WHERE (summed, moved) <> (counted, added)
        """,
    ),
    Check(
        "append-only",
        "The database refuses to change or delete an event that is neither archived nor to be erased.",
        _TRIGGERS.format(table=_TABLE.format("'credit_events'"), name="name"),
        _of_shards(["credit_events"], _TRIGGERS),
    ),
    Check(
        "constraints",
        "The database refuses a row that the rules cannot make: every constraint is there, and holds for every row.",
        _CONSTRAINTS.format(table=_TABLE.format("relation"), name="name"),
        _of_shards([table.name for table in filter(distribution.is_distributed, metadata.sorted_tables)], _CONSTRAINTS),
    ),
)
