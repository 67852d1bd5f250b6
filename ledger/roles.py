"""The roles that Holdfast connects as, and their privileges. Creates no role: see docs/operating.md, "Roles".

The owner of the tables migrates them. The worker writes the ledger, but neither changes nor deletes an event. The
reader, for the API and for people, reads, marks dead letters, and keeps the result of `holdfast verify`. An
installation with a single role uses the owner.

A new table needs a line in `PRIVILEGES` for every role that uses it; tests/integration/test_roles.py fails until then.
"""

from sqlalchemy import Connection, text

WORKER, READER = "holdfast_worker", "holdfast_reader"

_TABLES = (
    "wallets",
    "workflows",
    "subscriptions",
    "ending_credits",
    "posted_messages",
    "credit_events",
    "daily_sums",
    "daily_sums_through",
    "archived",
    "archive_head",
    "erasures",
    "dead_letters",
    "waiting_messages",
    "last_verification",
    "alembic_version",
)

# Locking a row needs UPDATE, too.
PRIVILEGES: dict[str, dict[str, tuple[str, ...]]] = {
    WORKER: {
        "wallets": ("SELECT", "INSERT", "UPDATE"),
        "workflows": ("SELECT", "INSERT", "UPDATE"),
        "subscriptions": ("SELECT", "INSERT", "UPDATE"),
        "ending_credits": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        "posted_messages": ("SELECT", "INSERT", "UPDATE (reversed)"),
        "credit_events": (
            "SELECT (org_id, seq, created_at, event_type, source, project_id, activity_name, credits)",
            "INSERT",
        ),
        "daily_sums": ("SELECT", "INSERT", "UPDATE"),
        "daily_sums_through": ("SELECT", "INSERT", "UPDATE"),
        "archived": ("SELECT",),
        "dead_letters": ("SELECT", "INSERT", "UPDATE"),
        "waiting_messages": ("SELECT", "INSERT", "UPDATE", "DELETE"),
        "alembic_version": ("SELECT",),
    },
    READER: {
        **dict.fromkeys(_TABLES, ("SELECT",)),
        "dead_letters": ("SELECT", "UPDATE (status, resolved_at, resolved_by, resolution)"),
        "last_verification": ("SELECT", "INSERT", "UPDATE"),
    },
}
"""The privileges that each role needs on each table. On a table that is not listed: none."""


class NotGrantedError(Exception):
    """The privileges cannot be granted; the text says what has to be done first, and by which role."""


def refuse_unprepared(connection: Connection) -> None:
    """Raise NotGrantedError if something is missing that only an administrator of PostgreSQL can give."""
    needed = [statement for role in PRIVILEGES for statement in connection.scalars(_NEEDED, {"role": role})]
    if needed:
        raise NotGrantedError(
            f"an administrator of PostgreSQL has to run {'; '.join(needed)}; and to give both roles a password, with "
            r"\password in psql; then run `holdfast migrate --roles` again"
        )


def grant(connection: Connection) -> None:
    """Grant each role what it needs on every existing table, and revoke all its other privileges on them.

    Runs in the transaction of `connection`. Raises NotGrantedError if its role does not own the tables, or if an
    administrator has to do something first.
    """
    refuse_unprepared(connection)
    tables = list(connection.execute(_FOUND, {"tables": list(_TABLES)}))
    if not all(is_owned for _, is_owned, _ in tables):
        raise NotGrantedError(
            f"{connection.scalar(text('SELECT current_user'))} does not own the ledger's tables: "
            "run `holdfast migrate --roles` as the role that does"
        )
    for name, _, columns in tables:
        connection.execute(text(f"REVOKE ALL ON {name} FROM {', '.join(PRIVILEGES)} CASCADE"))
        for role, needed in PRIVILEGES.items():
            # An older schema lacks what came later.
            if there := [may for may in needed.get(name, ()) if set(_columns(may)).issubset(columns)]:
                connection.execute(text(f"GRANT {', '.join(there)} ON {name} TO {role}"))


TOLD = 'see docs/operating.md, "Roles", to connect with less'


def own_excess(connection: Connection) -> str | None:
    """A sentence that says what the role of `connection` may do beyond its needs. None: nothing."""
    role = connection.scalar(text("SELECT current_user"))
    assert role is not None
    found = excess(connection, role)
    if found is None:
        return None
    return f"this connection's role, {role}, may do more than a worker or the API needs: {found}; {TOLD}"


def excess(connection: Connection, role: str) -> str | None:
    """What `role` may do beyond the needs of worker and reader, in words. None: nothing.

    The worker's and the reader's role are each compared with their own needs only.
    """
    about = {"role": role, "tables": list(_TABLES), "roles": list(PRIVILEGES)}
    general = list(connection.scalars(_GENERAL, about))
    if "everything" in general:
        return "everything, as a superuser"
    if connection.scalar(_OWNS, about):
        return "change and drop every table"
    compared = [PRIVILEGES[role]] if role in PRIVILEGES else list(PRIVILEGES.values())
    found = [
        what
        for table, privilege, columns in connection.execute(_MAY_DO, about)
        if (what := _beyond([needed.get(table, ()) for needed in compared], table, privilege, columns)) is not None
    ]
    return ", ".join([*found, *general]) or None


def _beyond(needed: list[tuple[str, ...]], table: str, privilege: str, columns: list[str] | None) -> str | None:
    """The part of `privilege` on `table` that is not needed. None: all of it is. `columns`: held on these only."""
    of_columns = {name for each in needed for may in each if may.startswith(privilege) for name in _columns(may)}
    if any(privilege in each for each in needed):
        return None
    if columns is None:
        return f"{privilege} {table}"
    too_many = [name for name in columns if name not in of_columns]
    return f"{privilege} ({', '.join(too_many)}) {table}" if too_many else None


def _columns(may: str) -> list[str]:
    """The columns in `UPDATE (a, b)`; in `UPDATE` there are none."""
    _, _, columns = may.partition(" (")
    return columns.rstrip(")").split(", ") if columns else []


_NEEDED = text("""
    SELECT statement FROM (VALUES
        (1, (SELECT oid FROM pg_roles WHERE rolname = :role) IS NOT NULL, format('CREATE ROLE %I LOGIN', :role)),
        (2, has_database_privilege(COALESCE((SELECT rolname FROM pg_roles WHERE rolname = :role), 'public'),
            current_database(), 'CONNECT'), format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :role)),
        (3, has_schema_privilege(COALESCE((SELECT rolname FROM pg_roles WHERE rolname = :role), 'public'),
            current_schema(), 'USAGE'), format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), :role))
    ) AS needed (place, is_there, statement) WHERE NOT is_there ORDER BY place
""")
_FOUND = text("""
    SELECT name, pg_has_role(relowner, 'USAGE'),
           ARRAY(SELECT CAST(attname AS text) FROM pg_attribute WHERE attrelid = pg_class.oid AND NOT attisdropped)
    FROM unnest(CAST(:tables AS text[])) AS name
    JOIN pg_class ON oid = to_regclass(name)
""")
_OWNS = text("""
    SELECT EXISTS (
        SELECT FROM unnest(CAST(:tables AS text[])) AS name JOIN pg_class ON pg_class.oid = to_regclass(name)
        JOIN pg_roles AS me ON me.rolname = :role WHERE pg_has_role(me.oid, relowner, 'MEMBER')
    )
""")
# NULL instead of columns: the whole table.
_MAY_DO = text("""
    SELECT name, privilege, CASE WHEN NOT of_all THEN columns END
    FROM pg_roles AS me CROSS JOIN unnest(CAST(:tables AS text[])) WITH ORDINALITY AS owned (name, place)
    JOIN pg_class ON pg_class.oid = to_regclass(name)
    CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
    CROSS JOIN LATERAL (SELECT has_table_privilege(me.oid, pg_class.oid, privilege) AS of_all) AS whole
    CROSS JOIN LATERAL (
        SELECT array_agg(CAST(attname AS text) ORDER BY attnum) AS columns FROM pg_attribute
        WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped
          AND CASE WHEN privilege IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')
                   THEN has_column_privilege(me.oid, attrelid, attnum, privilege) END
    ) AS part
    WHERE me.rolname = :role AND (of_all OR columns IS NOT NULL) ORDER BY place, privilege
""")
_GENERAL = text("""
    SELECT what FROM pg_roles AS me CROSS JOIN LATERAL (
        VALUES ('everything', rolsuper), ('CREATEROLE', rolcreaterole), ('CREATEDB', rolcreatedb),
            ('REPLICATION', rolreplication), ('BYPASSRLS', rolbypassrls),
            (format('CREATE in the schema %I', current_schema()),
             has_schema_privilege(me.oid, current_schema(), 'CREATE'))
        UNION ALL SELECT format('UPDATE %s', relname),
            CASE WHEN relkind = 'S' THEN has_sequence_privilege(me.oid, oid, 'UPDATE') END
            FROM pg_class WHERE relnamespace = to_regnamespace(current_schema())
        UNION ALL SELECT 'SET session_replication_role',
            has_parameter_privilege(me.oid, 'session_replication_role', 'SET')
        UNION ALL SELECT format('replace the function %s', proname), pg_has_role(me.oid, proowner, 'MEMBER')
            FROM pg_proc WHERE proname = 'credit_events_refuse_change'
                AND pronamespace = to_regnamespace(current_schema())
        UNION ALL SELECT format('what %s may', rolname), pg_has_role(me.oid, oid, 'MEMBER') FROM pg_roles
            WHERE oid <> me.oid AND (starts_with(CAST(rolname AS text), 'pg_')
                OR rolname = ANY(CAST(:roles AS text[])) AND me.rolname = ANY(CAST(:roles AS text[])))
    ) AS found (what, has) WHERE me.rolname = :role AND has
""")
