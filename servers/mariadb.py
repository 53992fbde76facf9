"""MariaDB 10.5 or newer, with a binary log as change data capture wants it: Debian's package ``mariadb-server``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

from servers import Server, apt, free_port, printed_version
from servers.tls import PASSWORD, USER, certificates, files

PROGRAM = "/usr/sbin/mariadbd"
ADMIN = "admin"
"""May do all, from this machine, without a password."""
SETTINGS = {
    "log_bin": "binlog",
    "binlog_format": "ROW",
    "binlog_row_metadata": "FULL",
    "server_id": 1,
    "sync_binlog": 1,
    "innodb_flush_log_at_trx_commit": 1,
    "innodb_log_file_size": "32M",
    "skip_name_resolve": "ON",
    "max_connections": 200,
}
RIGHTS = "REPLICATION SLAVE, REPLICATION SLAVE ADMIN, BINLOG MONITOR, RELOAD"


class MariaDB(Server):
    """One server with the user and database ``stentor``, and the user ``admin``, who may do all.

    ``settings`` are of the server, beside those that change data capture wants.
    Secure: TLS only, with the user's password; ``admin`` has TLS too, and no password.
    """

    name = "mariadb"

    def __init__(self, folder: Path, *, secure: bool = False, settings: dict[str, object] | None = None) -> None:
        super().__init__(folder, secure=secure)
        self._settings = settings or {}
        self.port = free_port()
        self.data = folder / "data"

    @classmethod
    def install(cls) -> None:
        apt("mariadb-server", program=PROGRAM)

    @classmethod
    def release(cls) -> str:
        return printed_version(PROGRAM, "--version")

    @property
    def url(self) -> str:
        """As the user ``stentor``, who owns the database and may read the binary log."""
        if not self.secure:
            return f"mysql://{USER}@127.0.0.1:{self.port}/{USER}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"mysql://{login}@localhost:{self.port}/{USER}?tls=1&{files(self.folder / 'tls', self.mutual)}"

    def start(self) -> None:
        self._make()
        settings = SETTINGS | {
            # Paths within the data folder, as a socket's has no more than 107 bytes.
            "socket": "server.sock",
            "pid_file": "server.pid",
            "port": self.port,
            "bind_address": "127.0.0.1",
            "init_file": self.folder / "init.sql",
            **self._settings,
        }
        if self.secure:
            tls = certificates(self.folder / "tls")
            settings |= {
                "ssl_ca": tls / "ca.pem", "ssl_cert": tls / "server.pem", "ssl_key": tls / "server.key",
                "require_secure_transport": "ON",
            }  # fmt: skip
        self.launch([PROGRAM, *self._options(), *(f"--{name}={value}" for name, value in settings.items())])
        ask = ["mariadb-admin", "--no-defaults", "--protocol=tcp", "-h", "127.0.0.1", "-P", str(self.port), "-u", ADMIN]
        if self.secure:
            ask += [f"--ssl-ca={self.folder / 'tls' / 'ca.pem'}"]

        def answers() -> bool:
            return subprocess.run([*ask, "ping"], check=False, capture_output=True).returncode == 0

        self.wait(answers, f"port {self.port}")

    def _make(self) -> None:
        """The data folder, and the users, who are made at each start where they are missing."""
        if not (self.data / "ready").exists():
            shutil.rmtree(self.data, ignore_errors=True)
            options = ["--skip-test-db", "--auth-root-authentication-method=normal", "--innodb-log-file-size=32M"]
            command = ["mariadb-install-db", *self._options(), *options]
            with open(self.folder / "server.log", "ab") as log:
                subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
            (self.data / "ready").touch()
        password = f"IDENTIFIED BY '{PASSWORD}'" if self.secure else ""
        needs = "REQUIRE X509" if self.secure and self.mutual else ""
        statements = [
            "SET sql_log_bin = 0",
            "SET NAMES utf8mb4",
            f"CREATE DATABASE IF NOT EXISTS {USER} CHARACTER SET utf8mb4",
            f"CREATE USER IF NOT EXISTS '{ADMIN}'@'127.0.0.1'",
            f"GRANT ALL ON *.* TO '{ADMIN}'@'127.0.0.1' WITH GRANT OPTION",
            f"CREATE OR REPLACE USER '{USER}'@'127.0.0.1' {password} {needs}",
            f"GRANT ALL ON {USER}.* TO '{USER}'@'127.0.0.1'",
            f"GRANT {RIGHTS} ON *.* TO '{USER}'@'127.0.0.1'",
        ]
        (self.folder / "init.sql").write_text("".join(f"{statement};\n" for statement in statements))

    def _options(self) -> list[str]:
        return ["--no-defaults", f"--datadir={self.data}", *(["--user=root"] if os.geteuid() == 0 else [])]
