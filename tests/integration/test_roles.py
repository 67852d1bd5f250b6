"""What each role may do, on the real server: all that it needs, and nothing more."""

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import DBAPIError

from ledger import audit, dead_letters, distribution, history, migrations, roles, scheduler, waiting
from ledger.database import connect
from ledger.store import apply_batch, apply_waiting
from ledger.waiting import LOCKED, Waits
from tests.databases import administrator_of
from tests.messages import delivery
from tests.support import as_role, sql
from worker import cli
from worker.local.embedded import Embedded

# Every table, and what each role may do to it: all or some of SELECT, INSERT, UPDATE, DELETE. Never more than that.
WORKER = {
    "alembic_version": "S",
    "archive_head": "",
    "archived": "S",
    "credit_events": "(S)I",
    "daily_sums": "SIU",
    "daily_sums_through": "SIU",
    "dead_letters": "SIU",
    "ending_credits": "SIUD",
    "erasures": "",
    "last_verification": "",
    "posted_messages": "SI(U)",
    "subscriptions": "SIU",
    "waiting_messages": "SIUD",
    "wallets": "SIU",
    "workflows": "SIU",
}
READER = {**dict.fromkeys(WORKER, "S"), "dead_letters": "S(U)", "last_verification": "SIU"}

SHARED = "takes the roles away, which others who use the cluster need"

LETTER = {"org_id": "acme", "refund_id": "r1", "credits": 5, "workflow_id": "none"}


@pytest.fixture
def worker(database_url: str) -> Iterator[Engine]:
    """The test's own database, as a worker connects."""
    yield from connected(as_role(roles.WORKER, database_url))


@pytest.fixture
def reader(database_url: str) -> Iterator[Engine]:
    """The test's own database, as the API connects."""
    yield from connected(as_role(roles.READER, database_url))


def connected(url: str) -> Iterator[Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def books(engine: Engine) -> None:
    """An event, a reservation, and a dead letter."""
    apply_batch(
        engine,
        [
            delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=50),
            delivery("workflow.start", org_id="acme", workflow_id="w1", credits=5),
            delivery("wallet.refund", **LETTER),
        ],
    )


@pytest.fixture
def holdfast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, ...]]:
    """Runs a command in this process: its exit code, and what it has printed."""

    def run(url: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("HOLDFAST_DATABASE_URL", url)
        monkeypatch.setattr(sys, "argv", ["holdfast", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


# What they may do


def may_do(engine: Engine, role: str) -> dict[str, str]:
    """What `role` may do to each relation of ours: letters, in parentheses where it is some columns."""
    found = sql(
        engine,
        """
        SELECT relname, privilege, has_table_privilege(:role, pg_class.oid, privilege),
               privilege IN ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')
               AND has_any_column_privilege(:role, pg_class.oid, privilege)
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER'])
          WITH ORDINALITY AS every (privilege, place)
        WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND nspname !~ '^pg_' AND nspname <> 'information_schema'
          AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'e')  -- an extension's
        ORDER BY relname, place
        """,
        role=role,
    )
    letters = {"SELECT": "S", "INSERT": "I", "UPDATE": "U", "DELETE": "D"}
    result: dict[str, str] = {relation: "" for relation, *_ in found}
    for relation, privilege, of_all, of_columns in found:
        letter = letters.get(privilege, privilege)
        result[relation] += letter if of_all else f"({letter})" if of_columns else ""
    return result


@pytest.mark.parametrize(("role", "expected"), [(roles.WORKER, WORKER), (roles.READER, READER)])
def test_each_role_has_what_it_needs_of_every_table_and_nothing_more(
    engine: Engine, role: str, expected: dict[str, str]
) -> None:
    assert may_do(engine, role) == expected
    assert sql(
        engine,
        "SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls,"
        " has_schema_privilege(rolname, 'public', 'CREATE'), pg_has_role(rolname, 'holdfast', 'MEMBER')"
        " FROM pg_roles WHERE rolname = :role",
        role=role,
    ) == [(False,) * 7]


def test_the_reader_changes_what_became_of_a_dead_letter_and_no_other_column(engine: Engine) -> None:
    columns = sql(
        engine,
        "SELECT attname FROM pg_attribute WHERE attrelid = 'dead_letters'::regclass AND attnum > 0"
        f" AND has_column_privilege('{roles.READER}', attrelid, attname, 'UPDATE') ORDER BY attnum",
    )
    assert [name for (name,) in columns] == ["status", "resolved_at", "resolved_by", "resolution"]


def test_granting_again_gives_what_is_missing_and_takes_what_is_too_much(engine: Engine) -> None:
    sql(engine, f"GRANT ALL ON credit_events, wallets, alembic_version TO {roles.WORKER}, {roles.READER}")
    sql(engine, f"GRANT UPDATE (body) ON dead_letters TO {roles.READER}")
    sql(engine, f"REVOKE ALL ON workflows FROM {roles.WORKER}")
    for _ in range(2):
        migrations.grant(engine)
        assert (may_do(engine, roles.WORKER), may_do(engine, roles.READER)) == (WORKER, READER)
    body = f"SELECT has_column_privilege('{roles.READER}', 'dead_letters', 'body', 'UPDATE')"
    assert sql(engine, body) == [(False,)]


def test_what_a_role_has_passed_on_is_taken_too(engine: Engine, database_url: str) -> None:
    sql(engine, f"GRANT SELECT ON wallets TO {roles.WORKER} WITH GRANT OPTION")
    worker = connect(as_role(roles.WORKER, database_url))
    sql(worker, f"GRANT SELECT ON wallets TO {roles.READER}")
    worker.dispose()
    migrations.grant(engine)
    assert (may_do(engine, roles.WORKER), may_do(engine, roles.READER)) == (WORKER, READER)


def test_an_older_schema_has_its_grants_too_and_the_tables_that_come_later_theirs(engine: Engine) -> None:
    migrations.downgrade(engine, "0002")
    migrations.grant(engine)
    later = {"waiting_messages", "ending_credits", "daily_sums", "daily_sums_through", "last_verification"}
    later |= {"archived", "archive_head", "erasures"}
    before = {name: may for name, may in WORKER.items() if name not in later}
    assert may_do(engine, roles.WORKER) == {**before, "posted_messages": "SI"}
    migrations.upgrade(engine)
    migrations.grant(engine)
    assert may_do(engine, roles.WORKER) == WORKER


# What is refused

DENIED, NOT_OWNER = "permission denied", "must be owner"


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE credit_events SET credits = 51", DENIED),
        ("DELETE FROM credit_events", DENIED),
        ("TRUNCATE credit_events", DENIED),
        ("SELECT metadata FROM credit_events", DENIED),
        ("ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only", NOT_OWNER),
        ("ALTER TABLE credit_events DROP CONSTRAINT credit_events_sign", NOT_OWNER),
        ("DROP TRIGGER credit_events_append_only ON credit_events", NOT_OWNER),
        ("DROP FUNCTION credit_events_refuse_change() CASCADE", NOT_OWNER),
        ("DROP TABLE credit_events", NOT_OWNER),
        ("CREATE TRIGGER mine BEFORE INSERT ON credit_events EXECUTE FUNCTION credit_events_refuse_change()", DENIED),
        ("CREATE TABLE public.mine ()", DENIED),
        ("SET session_replication_role = replica", DENIED),
        ("SET ROLE holdfast", DENIED),
        ("DELETE FROM wallets", DENIED),
        ("DELETE FROM workflows", DENIED),
        ("DELETE FROM subscriptions", DENIED),
        ("UPDATE posted_messages SET outcome = 'posted'", DENIED),
        ("DELETE FROM posted_messages", DENIED),
        ("DELETE FROM dead_letters", DENIED),
        ("UPDATE alembic_version SET version_num = '0001'", DENIED),
    ],
)
def test_the_worker_cannot(books: None, engine: Engine, worker: Engine, statement: str, why: str) -> None:
    before = contents(engine)
    with pytest.raises(DBAPIError, match=why) as refused:
        sql(worker, statement)
    assert isinstance(refused.value.orig, psycopg.errors.InsufficientPrivilege)
    assert contents(engine) == before


INSERT_EVENT = """
    INSERT INTO credit_events SELECT org_id, 2, created_at, event_type, source, workflow_id, project_id, activity_name,
      credits, prepaid_balance_after, subscription_balance_after, reserved_after, period_usage_after, 'mine', metadata
    FROM credit_events
"""


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (INSERT_EVENT, DENIED),
        ("UPDATE wallets SET prepaid_balance = 51", DENIED),
        ("SELECT 1 FROM wallets WHERE org_id = 'acme' FOR UPDATE", DENIED),
        *((f"{verb} {table}", DENIED) for verb in ("DELETE FROM", "TRUNCATE") for table in READER),
        *((f"INSERT INTO {table} DEFAULT VALUES", DENIED) for table in READER if table != "last_verification"),
        ("UPDATE workflows SET refunded = 0", DENIED),
        ("UPDATE subscriptions SET version = 2", DENIED),
        ("UPDATE posted_messages SET outcome = 'posted'", DENIED),
        ("UPDATE credit_events SET credits = 51", DENIED),
        ("UPDATE waiting_messages SET attempts = 0", DENIED),
        ("UPDATE dead_letters SET body = ''", DENIED),
        ("UPDATE dead_letters SET attempts = 2", DENIED),
        ("UPDATE alembic_version SET version_num = '0001'", DENIED),
        ("ALTER TABLE credit_events DISABLE TRIGGER credit_events_append_only", NOT_OWNER),
        ("CREATE TABLE public.mine ()", DENIED),
        ("SET ROLE holdfast", DENIED),
        ("SET ROLE holdfast_worker", DENIED),
    ],
)
def test_the_reader_cannot(books: None, engine: Engine, reader: Engine, statement: str, why: str) -> None:
    before = contents(engine)
    with pytest.raises(DBAPIError, match=why) as refused:
        sql(reader, statement)
    assert isinstance(refused.value.orig, psycopg.errors.InsufficientPrivilege)
    assert contents(engine) == before


def contents(engine: Engine) -> dict[str, list[tuple[Any, ...]]]:
    return {table: sql(engine, f"SELECT * FROM {table}") for table in WORKER}


def test_the_worker_writes_the_ledger_and_the_reader_reads_it(
    books: None, engine: Engine, worker: Engine, reader: Engine
) -> None:
    """The parts and the commands themselves work under these roles in all of tests/acceptance."""
    purchase = delivery("wallet.purchase", org_id="acme", purchase_id="p2", credits=1)
    with engine.connect() as holder:
        holder.exec_driver_sql("SELECT 1 FROM wallets WHERE org_id = 'acme' FOR UPDATE")
        [waits] = apply_batch(worker, [purchase])
        assert isinstance(waits, Waits)
        assert waits.reason == LOCKED
        with reader.connect() as connection:
            assert [found.org_id for found in waiting.organizations(connection)] == ["acme"]
    assert len(apply_waiting(worker, "acme", limit=10).answers) == 1
    apply_batch(worker, [delivery("wallet.refund", **LETTER)])
    assert (scheduler.post_due(worker), scheduler.release_expired(worker)) == (0, 0)
    with reader.connect() as connection:
        assert history.events(connection, "acme").total == 3
        [letter] = dead_letters.letters(connection)
    assert letter.attempts == 2
    assert dead_letters.replay(reader, letter.id, by="ann", send=lambda *_: "not waited for") == "sent; not waited for"
    assert audit.verify(reader).is_clean


# How they are set up


@pytest.fixture
def without_roles(database_url: str, services: Embedded) -> Iterator[None]:
    """The server has no such roles, until the test makes some. Requested first: a role that has rights stays."""
    names = roles.WORKER, roles.READER
    admin = connect(services.admin_url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for name in names:
            connection.exec_driver_sql(f"ALTER ROLE {name} RENAME TO {name}_away")
        yield
        for name in names:
            connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}")
            connection.exec_driver_sql(f"ALTER ROLE {name}_away RENAME TO {name}")
    admin.dispose()


def test_migrate_grants_and_says_so(empty_database_url: str, empty_engine: Engine, holdfast: Any) -> None:
    head = migrations.head_revision()
    granted = "holdfast_worker and holdfast_reader have the privileges that they need.\n"
    for line in (f"The database is at {head} now.\n", f"The database was at {head} already.\n"):
        answer = holdfast(empty_database_url, "migrate", "--roles")
        with empty_engine.connect() as connection:
            places = distribution.described(connection)
        distributed = f"Its tables are distributed by organization: {places}.\n" if places else ""
        assert answer == (0, line + distributed + granted, "")
    assert (may_do(empty_engine, roles.WORKER), may_do(empty_engine, roles.READER)) == (WORKER, READER)


@pytest.mark.one_server(SHARED)
def test_roles_that_are_missing_are_one_line_with_what_to_run_and_nothing_is_migrated(
    without_roles: None, empty_database_url: str, empty_engine: Engine, services: Embedded, holdfast: Any
) -> None:
    code, out, error = holdfast(empty_database_url, "migrate", "--roles")
    assert (code, out) == (2, "")
    statements = "CREATE ROLE holdfast_worker LOGIN; CREATE ROLE holdfast_reader LOGIN;"
    assert error == (
        f"holdfast: an administrator of PostgreSQL has to run {statements} and to give both roles a password, with "
        "\\password in psql; then run `holdfast migrate --roles` again\n"
    )
    assert migrations.current_revision(empty_engine) is None
    admin = connect(services.admin_url)
    sql(admin, statements)
    admin.dispose()
    assert holdfast(empty_database_url, "migrate", "--roles")[::2] == (0, "")
    assert may_do(empty_engine, roles.READER) == READER


def test_a_database_that_is_closed_to_the_roles_is_one_line_with_what_to_run(
    engine: Engine, database_url: str, holdfast: Any
) -> None:
    name = engine.url.database
    sql(engine, f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
    sql(engine, "REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    code, _, error = holdfast(database_url, "migrate", "--roles")
    assert code == 2
    needed = re.findall(r"(GRANT \w+ ON [\w ]+ TO \w+);", error)
    assert needed == [
        f"GRANT {privilege} TO {role}"
        for role in (roles.WORKER, roles.READER)
        for privilege in (f"CONNECT ON DATABASE {name}", "USAGE ON SCHEMA public")
    ]
    for statement in needed:
        sql(engine, statement)
    assert holdfast(database_url, "migrate", "--roles")[::2] == (0, "")


def test_only_the_owner_of_the_tables_grants(database_url: str, holdfast: Any) -> None:
    code, _, error = holdfast(as_role(roles.READER, database_url), "migrate", "--roles")
    assert code == 2
    assert error == (
        "holdfast: holdfast_reader does not own the ledger's tables: run `holdfast migrate --roles` as the role that "
        "does\n"
    )


@pytest.mark.one_server(SHARED)
def test_a_single_role_still_does_everything(
    empty_database_url: str, empty_engine: Engine, without_roles: None, holdfast: Any
) -> None:
    assert holdfast(empty_database_url, "migrate")[::2] == (0, "")
    apply_batch(empty_engine, [delivery("wallet.purchase", org_id="acme", purchase_id="p1", credits=50)])
    code, out, _ = holdfast(empty_database_url, "wallet", "acme")
    assert (code, "50" in out) == (0, True)
    assert holdfast(empty_database_url, "verify")[0] == 0


# What `verify` warns of


def warning(role: str, what: str) -> str:
    return (
        f"holdfast: warning: this connection's role, {role}, may do more than a worker or the API needs: {what}; "
        'see docs/operating.md, "Roles", to connect with less\n'
    )


def test_verify_warns_of_the_owner_and_of_nobody_who_has_what_they_need(database_url: str, holdfast: Any) -> None:
    verified = "Verified: every invariant holds (wallets: 0, events: 0, open dead letters: 0)."
    code, out, error = holdfast(database_url, "verify")
    assert (code, error) == (0, warning("holdfast", "change and drop every table"))
    assert verified in out
    assert holdfast(database_url, "verify", "--json")[::2] == (0, error)
    code, out, error = holdfast(as_role(roles.READER, database_url), "verify")
    assert (code, error) == (0, "")
    assert verified in out


def test_verify_warns_of_what_was_granted_beyond_the_need(engine: Engine, database_url: str, holdfast: Any) -> None:
    sql(engine, f"GRANT INSERT ON credit_events TO {roles.READER}")
    sql(engine, f"GRANT UPDATE ON dead_letters TO {roles.READER}")
    url = as_role(roles.READER, database_url)
    expected = warning(roles.READER, "INSERT credit_events, UPDATE dead_letters")
    assert holdfast(url, "verify")[::2] == (0, expected)


BEYOND = [
    ("GRANT UPDATE (prepaid_balance) ON wallets TO {}", "UPDATE (prepaid_balance) wallets"),
    ("GRANT UPDATE (status, body) ON dead_letters TO {}", "UPDATE (body) dead_letters"),
    ("GRANT DELETE ON wallets TO PUBLIC", "DELETE wallets"),
    ("GRANT UPDATE ON SEQUENCE dead_letters_id_seq TO {}", "UPDATE dead_letters_id_seq"),
    ("GRANT CREATE ON SCHEMA public TO {}", "CREATE in the schema public"),
    ("ALTER ROLE {} CREATEROLE", "CREATEROLE"),
    ("ALTER ROLE {} REPLICATION", "REPLICATION"),
    ("GRANT holdfast_worker TO {}", "what holdfast_worker may"),
    ("GRANT pg_execute_server_program TO {}", "what pg_execute_server_program may"),
    ("GRANT SET ON PARAMETER session_replication_role TO {}", "SET session_replication_role"),
    ("ALTER SCHEMA public OWNER TO {}", "CREATE in the schema public"),
    ("ALTER FUNCTION credit_events_refuse_change OWNER TO {}", "replace the function credit_events_refuse_change"),
    ("ALTER ROLE {} NOINHERIT; GRANT holdfast TO {}", "change and drop every table"),
]
TAKEN_BACK = """
    ALTER ROLE {0} NOCREATEROLE NOREPLICATION INHERIT;
    REVOKE SET ON PARAMETER session_replication_role FROM {0};
    REVOKE holdfast_worker, pg_execute_server_program, holdfast FROM {0}
"""


@pytest.mark.parametrize(("statement", "what"), BEYOND)
def test_verify_warns_of_every_way_to_do_more_and_so_does_granting(
    database_url: str, services: Embedded, holdfast: Any, statement: str, what: str
) -> None:
    admin = administrator_of(services, str(make_url(database_url).database))
    try:
        sql(admin, statement.format(roles.READER, roles.READER))
        code, _, error = holdfast(as_role(roles.READER, database_url), "verify")
        assert (code, what in error) == (0, True)
        code, out, error = holdfast(database_url, "migrate", "--roles")
        assert (code, "have the privileges that they need" in out) == (0, True)
        is_taken = statement.startswith("GRANT UPDATE (")
        assert (f"warning: {roles.READER} has more privileges" in error) is not is_taken
    finally:
        sql(admin, TAKEN_BACK.format(roles.READER))
        admin.dispose()


def test_verify_keeps_its_result_and_where_it_cannot_it_says_so(
    engine: Engine, database_url: str, holdfast: Any
) -> None:
    kept = "SELECT broken, ended_at FROM last_verification"
    assert holdfast(as_role(roles.READER, database_url), "verify")[::2] == (0, "")
    [(broken, ended_at)] = sql(engine, kept)
    assert broken == 0
    sql(engine, f"REVOKE INSERT ON last_verification FROM {roles.READER}")
    code, out, error = holdfast(as_role(roles.READER, database_url), "verify")
    assert (code, "Verified: every invariant holds" in out) == (0, True)
    assert error == (
        "holdfast: warning: the result is not kept for monitoring: permission denied for table last_verification; run "
        "`holdfast migrate --roles` as the owner of the tables, or connect as a role that may do this\n"
    )
    sql(engine, f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = on")
    code, _, error = holdfast(as_role(roles.READER, database_url), "verify")
    assert (code, error) == (
        0,
        "holdfast: warning: the result is not kept for monitoring: cannot execute INSERT in a read-only transaction\n",
    )
    assert sql(engine, kept) == [(0, ended_at)]


def test_a_role_of_another_name_is_compared_with_both(
    engine: Engine, database_url: str, services: Embedded, holdfast: Any
) -> None:
    admin = administrator_of(services, str(engine.url.database))
    sql(admin, f"CREATE ROLE auditor LOGIN IN ROLE {roles.WORKER}, {roles.READER}")
    try:
        url = as_role("auditor", database_url)
        assert holdfast(url, "verify")[::2] == (0, "")
        sql(engine, "GRANT DELETE ON credit_events TO auditor")
        assert holdfast(url, "verify")[::2] == (0, warning("auditor", "DELETE credit_events"))
        sql(engine, "REVOKE DELETE ON credit_events FROM auditor")
    finally:
        sql(admin, "DROP ROLE auditor")
        admin.dispose()


def test_what_a_role_lacks_is_one_line_that_says_what_to_do(database_url: str, holdfast: Any) -> None:
    code, out, error = holdfast(as_role(roles.WORKER, database_url), "history", "acme")
    assert (code, out) == (2, "")
    assert error == (
        "holdfast: the database does not answer as it should: permission denied for table credit_events; run `holdfast "
        "migrate --roles` as the owner of the tables, or connect as a role that may do this\n"
    )
