"""The command line, `holdfast`.

Exit codes: 0 success; 1 the answer is no (an invariant is broken, an organization is unknown); 2 the command could not
run (a wrong setting, a service that does not answer).
"""

import errno
import os
import sys

from ledger import extras

with extras.of("server"):
    import typer
    from sqlalchemy.exc import DBAPIError

    from holdfast_client.client import ClientError
    from ledger import migrations, roles
    from ledger.database import UnsuitableDatabaseError
    from ledger.faults import describe, is_about_schema
    from ledger.settings import SettingsError
    from ledger.upkeep import UpkeepError
    from worker.cli import archive, database, failed, holds, running, send, token, totals, usage, wallet
    from worker.cli.terminal import fail, open_ledger
    from worker.cli.wording import Commands
    from worker.local.process import ServiceError

app = typer.Typer(
    cls=Commands,
    help="A credit ledger: workflows reserve and use credits, exactly once.",
    epilog="Example: holdfast demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


for group in (database, archive, running, wallet, usage, totals, send, failed, holds, token):
    app.add_typer(group.app)


def main() -> None:
    """Run the command line; every error is one line and an exit code."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (
        SettingsError,
        ServiceError,
        migrations.LockedError,
        migrations.NewerSchemaError,
        roles.NotGrantedError,
        ClientError,
        UpkeepError,
    ) as error:
        fail(str(error))
    except DBAPIError as error:
        if isinstance(error.orig, UnsuitableDatabaseError):
            fail(str(error.orig))
        if is_about_schema(error):
            with open_ledger() as engine:
                fail(migrations.described(error, engine))
        fail(f"the database does not answer as it should: {describe(error)}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries once more when it ends
        fail(f"the output could not be written: {error.strerror}")
