"""Mosquitto, an MQTT 5 and 3.1.1 server, from the Debian package."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import quote

from servers import Server, apt, free_port, listens
from servers.tls import PASSWORD, USER, certificates


class Mosquitto(Server):
    """One Mosquitto that keeps sessions and their messages in a file, written when it is stopped.

    While it runs it is not written: 2.0.11 was seen to crash there (double free).
    """

    name = "mosquitto"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        super().__init__(folder, secure=secure)
        self.port = free_port()

    @classmethod
    def install(cls) -> None:
        """Get ``mosquitto`` 2.0 or newer. Raises Missing."""
        apt("mosquitto", program="/usr/sbin/mosquitto")

    @property
    def url(self) -> str:
        """The URL of the running server."""
        if not self.secure:
            return f"mqtt://127.0.0.1:{self.port}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"mqtts://{login}@localhost:{self.port}?ca={quote(str(self.folder / 'tls' / 'ca.pem'))}"

    def start(self) -> None:
        """Start, or start again on the same data and port; back when it listens."""
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        lines = [
            "user root", f"listener {self.port} 127.0.0.1", "persistence true", f"persistence_location {data}/",
            "autosave_interval 0", "max_queued_messages 0", f"allow_anonymous {str(not self.secure).lower()}",
        ]  # fmt: skip
        if self.secure:
            tls, passwords = certificates(self.folder / "tls"), self.folder / "passwords"
            if not passwords.exists():
                passwords.write_text(f"{USER}:{PASSWORD}\n")
                subprocess.run(["mosquitto_passwd", "-U", passwords], check=True)
            lines += [
                f"cafile {tls / 'ca.pem'}", f"certfile {tls / 'server.pem'}", f"keyfile {tls / 'server.key'}",
                f"password_file {passwords}",
            ]  # fmt: skip
        config = self.folder / "mosquitto.conf"
        config.write_text("\n".join(lines) + "\n")
        self.launch(["/usr/sbin/mosquitto", "-c", config])
        self.wait(lambda: listens(self.port), f"port {self.port}")
