"""A RabbitMQ of the tests' own: Debian's, as ordinary child processes on free loopback ports, for any account.

Guarantee: it shares nothing with a RabbitMQ that may run on this machine, and nothing of it is left behind. Its port
mapper, which Erlang would start as a daemon of its own, is a child process too.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kombu.connection import Connection

from tests.support import suspended
from worker.broker import DEAD_QUEUE, QUEUE
from worker.embedded import free_port
from worker.process import Process

# Debian's commands in the path insist on the account rabbitmq and on its folders; this is what they call.
_SERVER = shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin:" + os.environ["PATH"])
_CONTROL = shutil.which("rabbitmqctl", path="/usr/lib/rabbitmq/bin:" + os.environ["PATH"])
_PORT_MAPPER = shutil.which("epmd")

START_TIMEOUT_S = 300.0

CONFIGURATION = """\
listeners.tcp.1 = 127.0.0.1:{port}
disk_free_limit.absolute = 1MB
log.file = false
log.console = true
log.console.level = warning
"""


def is_installed() -> bool:
    return _SERVER is not None and _PORT_MAPPER is not None


@dataclass(frozen=True, slots=True)
class RabbitMQ:
    """A broker that runs."""

    port: int
    server: Process
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def answers(self) -> bool:
        try:
            with Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
        except OSError:
            return False
        return True

    def clear(self) -> None:
        """Delete everything that Holdfast and its engines make."""
        with Connection(self.url) as connection, connection.channel() as channel:
            for name in (QUEUE, DEAD_QUEUE, "celery", "engine.own"):
                channel.queue_delete(name)
                channel.exchange_delete(name)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It keeps its connections, and does nothing."""
        assert self.server.pid is not None
        with suspended(self.server.pid):
            yield

    def control(self, *command: str) -> None:
        """Have `rabbitmqctl` do something."""
        assert _CONTROL is not None
        subprocess.run([_CONTROL, *command], env=self.environment, check=True, capture_output=True, timeout=300)

    def restart(self) -> None:
        self.server.stop()
        self.server.start()
        self.server.wait_until(self.answers, timeout_s=START_TIMEOUT_S)


@contextmanager
def running() -> Iterator[RabbitMQ]:
    """Start one, with nothing in it."""
    assert _SERVER is not None
    assert _PORT_MAPPER is not None
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
        cleanup.callback(shutil.rmtree, folder)
        port, distribution_port, mapper_port = free_port(), free_port(), free_port()
        configuration = folder / "rabbitmq.conf"
        configuration.write_text(CONFIGURATION.format(port=port))
        plugins = folder / "enabled_plugins"
        plugins.write_text("[].")
        environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),  # where Erlang keeps the cookie
            "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"tests-{port}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_CONFIG_FILE": str(configuration),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RUNNING_UNDER_SYSTEMD": "true",  # no shell between us and the server
        }
        mapper = Process("epmd", [_PORT_MAPPER], folder, env=environment)
        server = Process("rabbitmq", [_SERVER], folder, env=environment, cwd=folder)
        for process in (mapper, server):
            cleanup.callback(process.kill)
            process.start()
        broker = RabbitMQ(port, server, environment)
        server.wait_until(broker.answers, timeout_s=START_TIMEOUT_S)
        yield broker
