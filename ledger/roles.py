"""The roles that Holdfast connects as, and what each may do. No role is created here: see docs/operating.md, "Roles".

The tables' owner, whoever that is, migrates them. The worker writes the ledger, but changes no event and deletes none.
The reader, which is for the API and for people, reads, and marks dead letters. Whoever wants a single role takes the
owner.

A new table has its line in `PRIVILEGES` for every role that needs it; tests/integration/test_roles.py fails until then.
"""

from sqlalchemy import Connection, text

WORKER, READER = "holdfast_worker", "holdfast_reader"

_TABLES = (
    "wallets",
    "workflows",
    "subscriptions",
    "posted_messages",
    "credit_events",
    "dead_letters",
    "waiting_messages",
    "alembic_version",
)

# To lock a row takes UPDATE, too.
PRIVILEGES: dict[str, dict[str, tuple[str, ...]]] = {
    WORKER: {
        "wallets": ("SELECT", "INSERT", "UPDATE"),
        "workflows": ("SELECT", "INSERT", "UPDATE"),
        "subscriptions": ("SELECT", "INSERT", "UPDATE"),
        "posted_messages": ("SELECT", "INSERT"),
        "credit_events": ("INSERT",),
        "dead_letters": ("SELECT", "INSERT", "UPDATE"),
        "waiting_messages": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    },
    READER: {
        **dict.fromkeys(_TABLES, ("SELECT",)),
        "dead_letters": ("SELECT", "UPDATE (status, resolved_at, resolved_by, resolution)"),
    },
}
"""What each role needs of each table; of a table that is not named, nothing."""


class NotGrantedError(Exception):
    """The roles cannot be given what they need; the text says who has to do what first."""


def refuse_unprepared(connection: Connection) -> None:
    """Raise NotGrantedError if something is missing that only an administrator of PostgreSQL can give."""
    needed = [statement for role in PRIVILEGES for statement in connection.scalars(_NEEDED, {"role": role})]
    if needed:
        raise NotGrantedError(
            f"an administrator of PostgreSQL has to run {'; '.join(needed)}; and to give both roles a password, with "
            r"\password in psql; then run `holdfast migrate --roles` again"
        )


def grant(connection: Connection) -> None:
    """Give each role what it needs of every table that is there, and take from it what else it has of them.

    In the transaction of `connection`, whose role owns the tables; raises NotGrantedError if it does not.
    """
    refuse_unprepared(connection)
    tables = list(connection.execute(_FOUND, {"tables": list(_TABLES)}))
    if not all(is_owned for _, is_owned in tables):
        raise NotGrantedError(
            f"{connection.scalar(text('SELECT current_user'))} does not own the ledger's tables: "
            "run `holdfast migrate --roles` as the role that does"
        )
    for name, _ in tables:
        connection.execute(text(f"REVOKE ALL ON {name} FROM {', '.join(PRIVILEGES)}"))
        for role, needed in PRIVILEGES.items():
            if name in needed:
                connection.execute(text(f"GRANT {', '.join(needed[name])} ON {name} TO {role}"))


def excess(connection: Connection) -> str | None:
    """What the role of `connection` may do to the ledger's tables and neither worker nor reader needs, in a sentence.

    The worker and the reader are each compared with what they need. None: it may do nothing more.
    """
    role = connection.scalar(text("SELECT current_user"))
    may_do = connection.execute(_MAY_DO, {"tables": list(_TABLES)})
    compared = [PRIVILEGES[role]] if role in PRIVILEGES else PRIVILEGES.values()
    found: list[str] = []
    for table, privilege, is_owned in may_do:
        if is_owned:
            found = ["change and drop every table"]
            break
        if not any(privilege in needed.get(table, ()) for needed in compared):
            found.append(f"{privilege} {table}")
    if not found:
        return None
    return (
        f"this connection's role, {role}, may do more than a worker or the API needs: {', '.join(found)}; "
        'docs/operating.md, "Roles", tells how to connect with less'
    )


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
    SELECT name, pg_has_role(relowner, 'USAGE') FROM unnest(CAST(:tables AS text[])) AS name
    JOIN pg_class ON oid = to_regclass(name)
""")
_MAY_DO = text("""
    SELECT name, privilege, pg_has_role(relowner, 'USAGE') FROM unnest(CAST(:tables AS text[])) AS name
    JOIN pg_class ON oid = to_regclass(name)
    CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
    WHERE has_table_privilege(oid, privilege)
""")
