"""Redis with an append-only file, from the Debian package."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
from pathlib import Path
from urllib.parse import quote

from servers import Server, apt, free_port, printed_version
from servers.tls import PASSWORD, USER, certificates, files


class Redis(Server):
    """One Redis that answers a write when it is on disk (``appendfsync always``), never evicts, and makes no snapshots.

    ``fsync`` may be ``everysec``, the default of Redis: with the host goes up to a second of confirmed writes.
    """

    name = "redis"

    def __init__(self, folder: Path, *, secure: bool = False, fsync: str = "always") -> None:
        super().__init__(folder, secure=secure)
        self.fsync = fsync
        self.port = free_port()

    @classmethod
    def install(cls) -> None:
        """Get ``redis-server`` 7.0 or newer. Raises Missing."""
        apt("redis-server", program="redis-server")

    @classmethod
    def release(cls) -> str:
        return printed_version("redis-server", "--version")

    @property
    def url(self) -> str:
        """The broker URL of the running server."""
        if not self.secure:
            return f"redis://127.0.0.1:{self.port}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"rediss://{login}@localhost:{self.port}?{files(self.folder / 'tls', self.mutual)}"

    def start(self) -> None:
        """Start, or start again on the same data and port; back when the data is loaded."""
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        settings = {
            "bind": "127.0.0.1",
            "port": 0 if self.secure else self.port,
            "dir": f'"{data}"',
            "appendonly": "yes",
            "appendfsync": self.fsync,
            "maxmemory-policy": "noeviction",
            "save": '""',
        }
        if self.secure:
            tls = certificates(self.folder / "tls")
            settings |= {
                "tls-port": self.port,
                "tls-ca-cert-file": f'"{tls / "ca.pem"}"',
                "tls-cert-file": f'"{tls / "server.pem"}"',
                "tls-key-file": f'"{tls / "server.key"}"',
                "tls-auth-clients": "yes" if self.mutual else "optional",
            }
        lines = [f"{name} {value}" for name, value in settings.items()]
        if self.secure:
            digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
            lines += ["user default off", f"user {USER} on #{digest} ~* &* +@all"]
        config = self.folder / "redis.conf"
        config.write_text("\n".join(lines) + "\n")
        self.launch(["redis-server", config])
        self.wait(self.answers, f"port {self.port}")

    def answers(self) -> bool:
        """Whether it takes commands: while it loads its file, it refuses them."""
        with contextlib.ExitStack() as stack:
            line: socket.socket = stack.enter_context(socket.create_connection(("127.0.0.1", self.port), 5))
            if self.secure:
                tls = self.folder / "tls"
                trust = ssl.create_default_context(cafile=str(tls / "ca.pem"))
                trust.load_cert_chain(tls / "client.pem", tls / "client.key")
                line = stack.enter_context(trust.wrap_socket(line, server_hostname="localhost"))
                line.sendall(command("AUTH", USER, PASSWORD))
                if not line.recv(100).startswith(b"+OK"):
                    return False
            line.sendall(command("PING"))
            return line.recv(100).startswith(b"+PONG")


def command(*words: str) -> bytes:
    """A command as Redis reads it."""
    parts = [word.encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
