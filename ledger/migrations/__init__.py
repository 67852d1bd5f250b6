"""The schema's history, as Alembic revisions, and how to bring a database to one of them.

Two migrations at once are one after the other: each holds an advisory lock while it runs.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

_LOCK_ID = 4_877_001


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


def head_revision() -> str:
    """The newest revision that this version of Holdfast knows."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current_revision(engine: Engine) -> str | None:
    """The database's revision. None: it was never migrated."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the database up to `revision`. Does nothing if it is there."""
    _run(engine, command.upgrade, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take the database down to `revision` (`base`: drop everything, data included)."""
    _run(engine, command.downgrade, revision)


def _run(engine: Engine, migrate: object, revision: str) -> None:
    assert callable(migrate)
    config = _config()
    with engine.begin() as connection:
        # The lock may be held, and a statement may take, as long as somebody else's migration does.
        connection.execute(text("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK_ID})
        config.attributes["connection"] = connection
        migrate(config, revision)
