"""RabbitMQ from the Debian package: one node of its own beside others."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from servers import Missing, Server, apt, free_port, listens
from servers.tls import PASSWORD, USER, certificates, files

PROGRAMS = Path("/usr/lib/rabbitmq/bin")
"""The programs themselves: the wrappers on the PATH change to another user and know one node only."""


def know_names(server: Server, port: int) -> None:
    """Start an epmd as a child of ours: the one that a node starts by itself would outlive it."""
    epmd = shutil.which("epmd")
    if epmd is None:
        raise Missing("epmd is not installed; as root: apt-get install erlang-base")
    server.launch([epmd, "-port", str(port), "-address", "127.0.0.1"], log="epmd.log")
    server.wait(lambda: listens(port), f"epmd on port {port}", log="epmd.log")


class RabbitMQ(Server):
    """One node with a name, ports, an epmd and data of its own; Stentor needs no plugin.

    The secure node has the one that takes a client's certificate for its user (the common name).

    A stream is confirmed when the node has it, before the disk has: RabbitMQ has no setting for that.
    """

    name = "rabbitmq"

    def __init__(self, folder: Path, *, secure: bool = False, names: int = 0) -> None:
        super().__init__(folder, secure=secure)
        self.port, self._distribution = free_port(), free_port()
        self._epmd = names or free_port()
        self._alone = not names
        """With ``names`` somebody else's epmd, on that port, knows the node, too."""
        self.peers: list[str] = []
        """The nodes of its cluster, itself among them."""

    @classmethod
    def install(cls) -> None:
        """Get RabbitMQ 3.10 or newer. Raises Missing."""
        apt("rabbitmq-server", program=str(PROGRAMS / "rabbitmq-server"))

    @classmethod
    def release(cls) -> str:
        """Its programs tell nothing while no node runs, and their folder has the version in its name."""
        return next(path.name.rpartition("-")[2] for path in PROGRAMS.parent.glob("lib/rabbitmq_server-*"))

    @property
    def url(self) -> str:
        """The broker URL of the running server."""
        if not self.secure:
            return f"amqp://127.0.0.1:{self.port}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"amqps://{login}@localhost:{self.port}?{files(self.folder / 'tls', self.mutual)}"

    def start(self) -> None:
        """Start, or start again on the same data and ports; back when it takes connections."""
        first = not (self.folder / "data").exists()
        address = f"127.0.0.1:{self.port}"
        settings = {"loopback_users": "none", "disk_free_limit.absolute": "50MB", "log.file.level": "warning"}
        if self.secure:
            tls = certificates(self.folder / "tls")
            settings |= {
                "listeners.tcp": "none",
                "listeners.ssl.1": address,
                "ssl_options.cacertfile": str(tls / "ca.pem"),
                "ssl_options.certfile": str(tls / "server.pem"),
                "ssl_options.keyfile": str(tls / "server.key"),
                "ssl_options.verify": "verify_peer",
                "ssl_options.fail_if_no_peer_cert": str(self.mutual).lower(),
                "auth_mechanisms.1": "PLAIN",
                "auth_mechanisms.2": "EXTERNAL",
                "ssl_cert_login_from": "common_name",
            }
        else:
            settings["listeners.tcp.1"] = address
        if self.peers:
            settings["cluster_formation.peer_discovery_backend"] = "classic_config"
            settings |= {f"cluster_formation.classic_config.nodes.{n}": peer for n, peer in enumerate(self.peers, 1)}
        (self.folder / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        plugins = "rabbitmq_auth_mechanism_ssl" if self.secure else ""
        (self.folder / "enabled_plugins").write_text(f"[{plugins}].\n")
        if self._alone:
            know_names(self, self._epmd)
        self.launch([PROGRAMS / "rabbitmq-server"], env=self.environment())
        self.wait(self.answers, f"port {self.port}")
        if self.secure and first:
            self.ctl("add_user", USER, PASSWORD)
            self.ctl("set_permissions", USER, ".*", ".*", ".*")
            self.ctl("delete_user", "guest")

    @property
    def node(self) -> str:
        """Its name among nodes."""
        return f"stentor{self.port}@localhost"

    def answers(self) -> bool:
        """Whether it takes connections; its port is opened last."""
        if self.secure:
            return listens(self.port)
        with socket.create_connection(("127.0.0.1", self.port), 5) as line:
            line.sendall(b"AMQP\x00\x00\x09\x01")
            return line.recv(1) == b"\x01"

    def environment(self) -> dict[str, str]:
        """What its programs need to know of this node."""
        home = self.folder / "home" if self._alone else self.folder.parent / "home"  # nodes share a cookie
        home.mkdir(exist_ok=True)
        return os.environ | {
            "HOME": str(home),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
        }

    def ctl(self, *words: str) -> str:
        """What ``rabbitmqctl`` prints; raises CalledProcessError where it refuses."""
        done = subprocess.run(
            [PROGRAMS / "rabbitmqctl", "-q", *words],
            env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout


class RabbitMQ3(Server):
    """Three nodes, three copies of each stream, two of which confirm: one node may be lost at any time."""

    name = "rabbitmq3"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        if secure:
            raise Missing(f"{self.name} has no secure kind")
        super().__init__(folder)
        self._epmd = free_port()
        self.nodes = [RabbitMQ(folder / f"node{number}", names=self._epmd) for number in range(3)]
        for node in self.nodes:
            node.peers = [peer.node for peer in self.nodes]

    @classmethod
    def install(cls) -> None:
        RabbitMQ.install()

    @classmethod
    def release(cls) -> str:
        return RabbitMQ.release()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"amqp://{hosts}?replicas=3"

    def start(self) -> None:
        know_names(self, self._epmd)
        cookie = self.folder / "home" / ".erlang.cookie"
        left = self.nodes
        if not cookie.exists():
            # Nodes that begin at once would each make a cookie, and those that find nobody a cluster.
            cookie.parent.mkdir(exist_ok=True)
            cookie.write_text("STENTOR")
            cookie.chmod(0o400)
            self.nodes[0].start()
            left = self.nodes[1:]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.start(), left))
        self.nodes[0].ctl("await_online_nodes", "3", "--timeout", "120")

    def end(self, sign: signal.Signals, patience: float = 30.0) -> None:
        for node in self.nodes:
            node.end(sign, patience)
        super().end(sign, patience)

    def start_node(self, node: int) -> None:
        """Start one node again, counted from 0; back when it answers."""
        self.nodes[node].start()

    def end_node(self, node: int, sign: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one node, counted from 0, and wait until it has ended; the others go on."""
        self.nodes[node].end(sign)
