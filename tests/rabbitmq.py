"""A RabbitMQ of the tests' own: Debian's, as ordinary child processes on free loopback ports, for any account.

Guarantee: it shares nothing with a RabbitMQ that may run on this machine, and nothing of it is left behind. Its port
mapper, which Erlang would start as a daemon of its own, is a child process too.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kombu.connection import Connection

from holdfast_client.broker import DEAD_QUEUES, ENGINE_QUEUE, QUEUE
from tests.support import suspended
from worker.local.machine import free_port
from worker.local.process import Process

# Debian's commands in the path insist on the account rabbitmq and on its folders; this is what they call.
_COMMANDS = os.environ.get("RABBITMQ_BIN", "/usr/lib/rabbitmq/bin")
PATH = f"{_COMMANDS}:{os.environ['PATH']}"
_SERVER = shutil.which("rabbitmq-server", path=PATH)
_CONTROL = shutil.which("rabbitmqctl", path=PATH)
_QUEUES = shutil.which("rabbitmq-queues", path=PATH)
_PORT_MAPPER = shutil.which("epmd")

START_TIMEOUT_S = 300.0

RECOMMENDED = Path(__file__).parents[1] / "deploy/rabbitmq"
"""The files of settings that docs/reliability.md recommends for every node of a cluster."""

# One scheduler, which sleeps when it has nothing to do: a node and a command are cheap then.
SCHEDULERS = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none"
ERLANG_ARGUMENTS = f"-kernel inet_dist_use_interface {{127,0,0,1}} {SCHEDULERS}"

CONFIGURATION = """\
listeners.tcp.1 = 127.0.0.1:{port}
disk_free_limit.absolute = 1MB
log.file = false
log.console = true
log.console.level = warning
"""

# What RabbitMQ 4.3 refuses by default. Versions before 3.13, as Debian's, do not know these settings. A node of a
# cluster may fail to start with them: it looks for such queues before it has the tables of the others.
REFUSING = """\
deprecated_features.permit.global_qos = false
deprecated_features.permit.transient_nonexcl_queues = false
deprecated_features.permit.classic_queue_mirroring = false
deprecated_features.permit.queue_master_locator = false
"""


def is_installed() -> bool:
    return _SERVER is not None and _PORT_MAPPER is not None


@dataclass(frozen=True, slots=True)
class RabbitMQ:
    """A broker that runs."""

    port: int
    server: Process
    environment: dict[str, str]
    user: str = "guest:guest"
    """And the password."""

    @property
    def name(self) -> str:
        return self.environment["RABBITMQ_NODENAME"]

    @property
    def url(self) -> str:
        return f"amqp://{self.user}@127.0.0.1:{self.port}//"

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
            for name in (QUEUE, ENGINE_QUEUE, *DEAD_QUEUES, "celery", "engine.own"):
                channel.queue_delete(name)
                channel.exchange_delete(name)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It keeps its connections, and does nothing."""
        assert self.server.pid is not None
        with suspended(self.server.pid):
            yield

    def control(self, *command: str) -> str:
        """Have `rabbitmqctl` do something; returns what it prints."""
        assert _CONTROL is not None
        return self._printed_by(_CONTROL, *command)

    def queues(self, *command: str) -> str:
        """Have `rabbitmq-queues` do something; returns what it prints."""
        assert _QUEUES is not None
        return self._printed_by(_QUEUES, *command)

    def _printed_by(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=300, text=True)
        return done.stdout

    def start(self) -> None:
        self.server.start()
        self.wait()

    def wait(self) -> None:
        """Wait until it takes connections."""
        self.server.wait_until(self.answers, timeout_s=START_TIMEOUT_S)

    def restart(self) -> None:
        self.server.stop()
        self.start()


@contextmanager
def running() -> Iterator[RabbitMQ]:
    """Start one, with nothing in it."""
    with cluster(1) as [broker]:
        yield broker


@contextmanager
def cluster(
    size: int = 3,
    *,
    while_first_is_alone: Callable[[RabbitMQ], None] = lambda _: None,
    as_recommended: bool = False,
    folder: Path | None = None,
) -> Iterator[list[RabbitMQ]]:
    """Start so many nodes of one cluster, with nothing in it but what is done while there is only the first.

    `as_recommended`: with the settings of RECOMMENDED. `folder`: where data and logs are kept; default: nowhere.
    """
    assert _PORT_MAPPER is not None
    with ExitStack() as cleanup:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="rabbitmq-"))
            cleanup.callback(shutil.rmtree, folder)
        plugins = folder / "enabled_plugins"
        plugins.write_text("[].")
        ports = [free_port() for _ in range(size)]
        mapper_port = free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),  # where Erlang keeps the cookie
            "ERL_EPMD_PORT": str(mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_ARGUMENTS,
            "RABBITMQ_CTL_ERL_ARGS": SCHEDULERS,
            "RUNNING_UNDER_SYSTEMD": "true",  # no shell between us and the server
        }
        mapper = Process("epmd", [_PORT_MAPPER], folder, env=environment)
        cleanup.callback(mapper.kill)
        mapper.start()
        settings = ""
        if as_recommended:
            settings = (RECOMMENDED / "cluster.conf").read_text()
            environment["RABBITMQ_ADVANCED_CONFIG_FILE"] = str(RECOMMENDED / "advanced.config")
        nodes = [_node(port, ports, folder, environment, settings) for port in ports]
        first, *others = nodes
        for node in nodes:
            cleanup.callback(node.server.kill)
        first.start()
        while_first_is_alone(first)
        for node in others:  # which join it, at the same time
            node.server.start()
        for node in others:
            node.wait()
        yield nodes


def _node(port: int, ports: list[int], folder: Path, environment: dict[str, str], settings: str) -> RabbitMQ:
    assert _SERVER is not None
    configuration = folder / f"{port}.conf"
    members = enumerate(ports, start=1)
    configuration.write_text(
        CONFIGURATION.format(port=port)
        + (REFUSING if "RABBITMQ_BIN" in os.environ and len(ports) == 1 else "")
        + settings
        # Version 4 would look for the others for minutes, of which none is there yet.
        + ("cluster_formation.discovery_retry_limit = 1\n" if port == ports[0] else "")
        + "cluster_formation.peer_discovery_backend = classic_config\n"
        + "".join(f"cluster_formation.classic_config.nodes.{number} = {_name(one)}\n" for number, one in members)
    )
    own = {
        **environment,
        "RABBITMQ_NODENAME": _name(port),
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_CONFIG_FILE": str(configuration),
        "RABBITMQ_PID_FILE": str(folder / f"{port}.pid"),
    }
    return RabbitMQ(port, Process(f"rabbitmq-{port}", [_SERVER], folder, env=own, cwd=folder), own)


def _name(port: int) -> str:
    return f"tests-{port}@localhost"
