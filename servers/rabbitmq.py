"""RabbitMQ from the Debian package: one node of its own beside others."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from urllib.parse import quote

from servers import Missing, Server, apt, free_port, listens
from servers.tls import PASSWORD, USER, certificates, files

PROGRAMS = Path("/usr/lib/rabbitmq/bin")
"""The programs themselves: the wrappers on the PATH change to another user and know one node only."""


class RabbitMQ(Server):
    """One node with a name, ports, an epmd and data of its own; Stentor needs no plugin.

    The secure node has the one that takes a client's certificate for its user (the common name).

    A stream is confirmed when the node has it, before the disk has: RabbitMQ has no setting for that.
    """

    name = "rabbitmq"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        super().__init__(folder, secure=secure)
        self.port, self._distribution, self._epmd = free_port(), free_port(), free_port()

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
        (self.folder / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
        plugins = "rabbitmq_auth_mechanism_ssl" if self.secure else ""
        (self.folder / "enabled_plugins").write_text(f"[{plugins}].\n")
        epmd = shutil.which("epmd")
        if epmd is None:
            raise Missing("epmd is not installed; as root: apt-get install erlang-base")
        # A child of ours: the one that a node starts by itself would outlive it.
        self.launch([epmd, "-port", str(self._epmd), "-address", "127.0.0.1"], log="epmd.log")
        self.wait(lambda: listens(self._epmd), f"epmd on port {self._epmd}", log="epmd.log")
        self.launch([PROGRAMS / "rabbitmq-server"], env=self.environment())
        self.wait(self.answers, f"port {self.port}")
        if self.secure and first:
            self.ctl("add_user", USER, PASSWORD)
            self.ctl("set_permissions", USER, ".*", ".*", ".*")
            self.ctl("delete_user", "guest")

    def answers(self) -> bool:
        """Whether it takes connections; its port is opened last."""
        if self.secure:
            return listens(self.port)
        with socket.create_connection(("127.0.0.1", self.port), 5) as line:
            line.sendall(b"AMQP\x00\x00\x09\x01")
            return line.recv(1) == b"\x01"

    def environment(self) -> dict[str, str]:
        """What its programs need to know of this node."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return os.environ | {
            "HOME": str(home),
            "RABBITMQ_NODENAME": f"stentor{self.port}@localhost",
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
