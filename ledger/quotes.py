"""What a start would be answered now. Only reads, and holds nothing.

What is due in the wallet counts as posted, as a start posts it first. Messages that are on their way, or that wait for
their organization, do not count.
"""

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from ledger import rules
from ledger.database import LedgerConnection
from ledger.state import Quote, Wallet
from ledger.working_set import WorkingSet


class MuchDueError(Exception):
    """More is due in the wallet than one transaction posts. A start would have to wait, too."""


def quote(connection: Connection, org_id: str, credits: int) -> Quote:
    """What a start of `org_id` with `credits` would be answered. `connection` is a snapshot that only reads.

    Raises MuchDueError, WrongClockError, and the errors of SQLAlchemy.
    """
    driver = connection.connection.driver_connection
    assert isinstance(driver, LedgerConnection)
    try:
        work = WorkingSet.look(driver, org_id)
    except psycopg.Error as error:
        raise DBAPIError(None, None, error) from error  # as if SQLAlchemy had sent the statements
    if org_id in work.reasons_to_wait:
        raise MuchDueError
    found = rules.quote(work.wallets.get(org_id, Wallet(org_id)), credits)
    return found._replace(as_of_seq=found.as_of_seq - len(work.events))  # which are not written
