"""Why an answer did not come, as far as a sender can see: how many messages wait, and whether a worker is there.

Takes up to PING_S longer than the caller wanted to wait, when nothing is left to hurry for.
"""

from kombu.connection import Connection
from kombu.pidbox import Mailbox

from holdfast_client.broker import CONTROL_EXCHANGE
from holdfast_client.publishing import BROKER_ERRORS, Publisher, connect, leave

PING_S = 1.0
"""How long a worker may take to answer a ping: a busy one applies its batch first."""


def what_is_seen(publisher: Publisher) -> str:
    """What waits in the queue of `publisher`, and whether a worker answers, in words. Never raises an error."""
    try:
        # Not one of those that publish: a ping would be counted among their confirmations.
        with publisher.new_connection() as connection:
            try:
                connect(connection)
                waiting = _waiting(connection, publisher.queue)
                is_answered = _is_answered(connection)
            except BROKER_ERRORS:
                leave(connection)
                raise
            where = f"{publisher.broker}{_database(connection)}"
    except BROKER_ERRORS:
        return f"the broker at {publisher.broker} does not answer now"
    count = "1 message waits" if waiting == 1 else f"{waiting:,} messages wait"
    there = f"{count} in the queue {publisher.queue} at {where}"
    if waiting == 0 and is_answered is False:
        return f"no worker answers at {where}, and no message waits there: one that is busy or paused may have taken it"
    if waiting == 0:
        return (
            f"no message waits in the queue {publisher.queue} at {where}, so a worker has taken it: it waits for the "
            "database or for its organization, as the log says, or its answer is kept elsewhere (HOLDFAST_RESULT_URL)"
        )
    if is_answered is None:
        return f"{there}; whether a worker is there, this user of the broker may not ask"
    if is_answered:
        return f"{there}, and a worker is there: its log says what it waits for"
    return f"{there}, and no worker answers: none runs, or it is paused, or uses another broker or database"


def sees_worker(publisher: Publisher) -> bool | None:
    """Whether a worker answers. None: this user of the broker may not ask. Raises BROKER_ERRORS."""
    with publisher.new_connection() as connection:
        try:
            connect(connection)
            return _is_answered(connection)
        except BROKER_ERRORS:
            leave(connection)
            raise


def _waiting(connection: Connection, queue: str) -> int:
    with connection.channel() as channel:
        if connection.transport.driver_type == "redis":
            return int(channel.client.llen(queue))  # all that an engine may ask
        return int(channel.queue_declare(queue, passive=True).message_count)


def _is_answered(connection: Connection) -> bool | None:
    """Whether a worker answers. None: this user of the broker may not ask."""
    mailbox = Mailbox(CONTROL_EXCHANGE, type="fanout")(connection)  # as Celery's remote control has it
    try:
        return bool(mailbox._broadcast("ping", reply=True, timeout=PING_S, limit=1))  # noqa: SLF001 # Celery calls it, too
    except BROKER_ERRORS:
        leave(connection)
        return None


def _database(connection: Connection) -> str:
    if connection.transport.driver_type != "redis":
        return ""
    return f" (Redis database {str(connection.virtual_host).strip('/') or 0})"
