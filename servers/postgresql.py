"""PostgreSQL 14 or newer: Debian's package, or whatever ``postgres`` is on the PATH."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from servers import Server, apt, free_port, printed_version
from servers.tls import PASSWORD, USER, certificates, files

HOST = "127.0.0.1"
SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": 200,
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "wal_level": "logical",
}
TLS = {
    "ssl": "on",
    "ssl_cert_file": "server.pem",
    "ssl_key_file": "server.key",
    "ssl_ca_file": "ca.pem",
    "ssl_min_protocol_version": "TLSv1.2",
}
CERTIFIED = "certified"
ACCOUNT = "postgres"
"""The system user that the server runs as, since it refuses root; also the database's superuser."""


def program(name: str) -> str:
    """The path of one of PostgreSQL's programs: the newest of Debian's, else the one on the PATH."""
    debian = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(debian, key=lambda path: int(path.parts[4]), default=None)
    return str(newest or shutil.which(name) or name)


class PostgreSQL(Server):
    """One server with the role and database ``stentor``; the superuser is ``postgres``, without a password.

    Secure: TLS only, with the role's password; in the database ``certified`` its client certificate instead of that.
    """

    name = "postgresql"

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        super().__init__(folder, secure=secure)
        self.port = free_port()
        self.data = folder / "data"

    @classmethod
    def install(cls) -> None:
        apt("postgresql", program=program("postgres"))

    @classmethod
    def release(cls) -> str:
        return printed_version(program("postgres"), "--version")

    @property
    def url(self) -> str:
        """As the role ``stentor``, the owner of its database and no superuser."""
        if not self.secure:
            return f"postgresql://{USER}@{HOST}:{self.port}/{USER}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"postgresql://{login}@localhost:{self.port}/{USER}?tls=1&{files(self.folder / 'tls', self.mutual)}"

    def start(self) -> None:
        if not (self.data / "ready").exists():
            self._make()
        settings = SETTINGS | {"port": self.port} | (TLS if self.secure else {})
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._account() as (place, account):
            self.launch([program("postgres"), *options, "-D", place], **account)
        ask = [program("pg_isready"), "-q", "-h", HOST, "-p", str(self.port), "-U", USER, "-t", "1"]
        self.wait(lambda: subprocess.run(ask, check=False).returncode == 0, "pg_isready")

    def stop(self) -> None:
        """A fast shutdown: open transactions are rolled back, connections are cut."""
        self.end(signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL, to all processes of the server: each is in a session of its own."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)  # or it would begin to recover from the death of its children
            listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
            for line in listed.stdout.splitlines():
                pid, parent = map(int, line.split())
                if parent == process.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        super().kill()

    # ---- making it ----------------------------------------------------------------------------------------------

    def _make(self) -> None:
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(mode=0o700)
        self._hand_over(self.data)
        self._run("initdb", "-U", ACCOUNT, "-E", "UTF8", "--locale=C", "--auth=trust")
        rules = "host all all 127.0.0.1/32 trust\n"
        if self.secure:
            made = certificates(self.folder / "tls")
            for name in ("ca.pem", "server.pem", "server.key"):
                shutil.copy(made / name, self.data / name)
                self._hand_over(self.data / name)
            both = " clientcert=verify-ca" if self.mutual else ""
            rules = f"hostssl {CERTIFIED} all 127.0.0.1/32 cert\nhostssl all all 127.0.0.1/32 scram-sha-256{both}\n"
        (self.data / "pg_hba.conf").write_text(rules)
        password = PASSWORD.replace("'", "''")
        script = f"CREATE ROLE {USER} LOGIN PASSWORD '{password}'\n"
        script += "".join(f"CREATE DATABASE {database} OWNER {USER}\n" for database in (USER, CERTIFIED))
        self._run("postgres", "--single", "postgres", text=script)
        (self.data / "ready").touch()

    def _hand_over(self, path: Path) -> None:
        if os.geteuid() == 0:
            shutil.chown(path, ACCOUNT, ACCOUNT)

    def _run(self, name: str, *args: str, text: str = "") -> None:
        with self._account() as (place, options), open(self.folder / "server.log", "ab") as log:
            command = [program(name), *args, "-D", place]
            subprocess.run(command, input=text.encode(), stdout=log, stderr=log, check=True, **options)

    @contextlib.contextmanager
    def _account(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The data folder as the server's processes are told of it, and what makes them run as an account they accept.

        That account may have no right to enter the folders above, such as root's temporary ones: a descriptor of the
        data folder lets it in.
        """
        if os.geteuid() != 0:
            yield str(self.data), {}
            return
        folder = os.open(self.data, os.O_RDONLY | os.O_DIRECTORY)
        account = pwd.getpwnam(ACCOUNT)
        try:
            options = {"cwd": "/", "user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            yield f"/proc/self/fd/{folder}", options | {"pass_fds": [folder]}
        finally:
            os.close(folder)
