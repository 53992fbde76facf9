"""Kafka in KRaft mode, one node or three, run on Java from the Maven artifacts."""

from __future__ import annotations

import base64
import contextlib
import signal
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from servers import Server, free_port, listens, maven
from servers.tls import PASSWORD, USER, certificates, files

LOGGING = {
    # Kafka brings no logging backend, and 4.x does not start without one.
    "3": ("org.slf4j:slf4j-reload4j:1.7.36",),
    "4": ("org.apache.logging.log4j:log4j-slf4j-impl:2.24.3", "org.apache.logging.log4j:log4j-core:2.24.3"),
}
PATIENCE = 180.0
"""Seconds that Java has to start: a few on an idle machine, over a minute seen on a busy one of two cores."""
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"
BRIEF = ("-XX:TieredStopAtLevel=1",)
"""For what runs a few minutes at most: to compile it well costs more than it saves, a third of a cluster's start."""
SMALL: dict[str, object] = {
    # Internal topics with few partitions, and buffers for a laptop: a node is up in seconds, in 512 MiB.
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "share.coordinator.state.topic.num.partitions": 1,
    "log.cleaner.dedupe.buffer.size": 8 * 1024 * 1024,
    "num.network.threads": 2,
    "num.io.threads": 4,
}


class Kafka(Server):
    """One node, broker and controller in one process, that writes to the disk before it confirms.

    Kafka leaves flushing to the system by default and counts on replicas instead; with one node there are none, so
    ``log.flush.interval.messages=1`` is its strongest setting. By default it makes topics that are only asked for.
    """

    name = "kafka"
    version = "4.2.0"
    count = 1

    def __init__(self, folder: Path, *, secure: bool = False, version: str = "") -> None:
        super().__init__(folder, secure=secure)
        self.version = version or self.version
        self.ports = [free_port() for _ in range(self.count)]
        self._controllers = [free_port() for _ in range(self.count)]
        self._insiders = [free_port() for _ in range(self.count)]
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.behind, self.front = free_port(), free_port()
        """A port of the first node, and the one that clients who came by it are sent to: for a proxy between them."""

    @classmethod
    def install(cls) -> None:
        """Get Kafka and what it needs. Raises Missing."""
        cls.classpath(cls.version)

    @classmethod
    def release(cls) -> str:
        return cls.version

    @staticmethod
    def classpath(version: str) -> str:
        """The class path of a version of Kafka, downloaded where it is not there yet. Raises Missing."""
        return maven(f"kafka-{version}", f"org.apache.kafka:kafka_2.13:{version}", *LOGGING[version[0]])

    @property
    def url(self) -> str:
        """The broker URL of the running server."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        if not self.secure:
            return f"kafka://{hosts}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"kafka://{login}@{hosts}?tls=1&{files(self.folder / 'tls', self.mutual)}"

    def start(self) -> None:
        """Start all nodes, or start them again on the same data and ports; back when they answer."""
        nodes = range(self.count)
        for node in nodes:
            text = "".join(f"{name}={value}\n" for name, value in self._settings(node).items())
            self._config(node).write_text(text)
        cluster = self._cluster()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: self._format(node, cluster), nodes))
        for node in nodes:
            self._launch(node)
        self.wait(
            lambda: all(self._answers(node) for node in nodes),
            f"ports {self.ports}",
            PATIENCE,
            self._log(0),
        )

    def start_node(self, node: int) -> None:
        """Start one node again, counted from 0; back when it answers."""
        self._launch(node)
        self.wait(lambda: self._answers(node), f"port {self.ports[node]}", PATIENCE, self._log(node))

    def end_node(self, node: int, sign: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one node, counted from 0, and wait until it has ended; the others go on."""
        process = self._nodes.pop(node)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sign)
        process.wait()
        self.processes.remove(process)

    # ---- a node -------------------------------------------------------------------------------------------------

    def _config(self, node: int) -> Path:
        return self.folder / f"node{node}.properties"

    def _log(self, node: int) -> str:
        return f"node{node}.log"

    def _format(self, node: int, cluster: str) -> None:
        """Make a node's data folder, where there is none yet."""
        if (self.folder / f"data{node}" / "meta.properties").exists():
            return
        command = ["java", *BRIEF, "-cp", self.classpath(self.version), "kafka.tools.StorageTool", "format"]
        command += ["-t", cluster, "-c", str(self._config(node))]
        if self.secure:
            command += ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"kafka: the data folder cannot be made: {done.stderr[-1000:]}")

    def _launch(self, node: int) -> None:
        options = ["-Xms128m", "-Xmx512m"] if self.count == 1 else ["-Xms64m", "-Xmx192m", *BRIEF]
        classpath = self.classpath(self.version)
        command = ["java", *options, "-XX:+UseSerialGC", *self._logging(), "-cp", classpath, "kafka.Kafka"]
        self._nodes[node] = self.launch([*command, self._config(node)], log=self._log(node))

    def _settings(self, node: int) -> dict[str, object]:
        replicas = min(3, self.count)
        least = max(1, replicas - 1)
        voters = ",".join(f"{i + 1}@127.0.0.1:{port}" for i, port in enumerate(self._controllers))
        kind = "SASL_SSL" if self.secure else "PLAINTEXT"
        found: dict[str, object] = SMALL | {
            "process.roles": "broker,controller",
            "node.id": node + 1,
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "INSIDE",
            "listener.security.protocol.map": f"CONTROLLER:PLAINTEXT,INSIDE:PLAINTEXT,BEHIND:PLAINTEXT,CLIENTS:{kind}",
            "listeners": f"CLIENTS://127.0.0.1:{self.ports[node]},INSIDE://127.0.0.1:{self._insiders[node]},"
            f"CONTROLLER://127.0.0.1:{self._controllers[node]}",
            "log.dirs": self.folder / f"data{node}",
            "num.partitions": 3,
            "default.replication.factor": replicas,
            "min.insync.replicas": least,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": least,
            "share.coordinator.state.topic.replication.factor": replicas,
            "share.coordinator.state.topic.min.isr": least,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 500,
        }
        if self.count == 1:
            found |= {
                "log.flush.interval.messages": 1,
                "listeners": f"{found['listeners']},BEHIND://127.0.0.1:{self.behind}",
                "advertised.listeners": f"CLIENTS://127.0.0.1:{self.ports[0]},INSIDE://127.0.0.1:{self._insiders[0]},"
                f"BEHIND://127.0.0.1:{self.front}",
            }
        else:
            # A dead node is noticed in seconds, as the tests do not wait for minutes.
            found |= {"broker.session.timeout.ms": 3000, "broker.heartbeat.interval.ms": 500}
        if self.secure:
            tls = certificates(self.folder / "tls")
            both = tls / "server-with-key.pem"
            both.write_text((tls / "server.key").read_text() + (tls / "server.pem").read_text())
            both.chmod(0o600)
            found |= {
                "sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "listener.name.clients.scram-sha-512.sasl.jaas.config": f"{SCRAM} required;",
                "ssl.keystore.type": "PEM",
                "ssl.keystore.location": both,
                "ssl.truststore.type": "PEM",
                "ssl.truststore.location": tls / "ca.pem",
                "listener.name.clients.ssl.client.auth": "required" if self.mutual else "requested",
            }
        return found

    def _cluster(self) -> str:
        """The cluster's id, the same for all nodes: 16 bytes in 22 characters."""
        path = self.folder / "cluster"
        if not path.exists():
            path.write_text(base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("="))
        # The format tool takes an argument that begins with a dash for an option.
        return path.read_text().replace("-", "A")

    def _logging(self) -> list[str]:
        """Warnings to the node's log, no more: its chatter costs time and disk."""
        if self.version.startswith("3"):
            path = self.folder / "log4j.properties"
            path.write_text(
                "log4j.rootLogger=WARN, out\nlog4j.appender.out=org.apache.log4j.ConsoleAppender\n"
                "log4j.appender.out.layout=org.apache.log4j.PatternLayout\n"
                "log4j.appender.out.layout.ConversionPattern=%d %p %m (%c)%n\n"
            )
            return [f"-Dlog4j.configuration=file:{path}"]
        path = self.folder / "log4j2.properties"
        path.write_text(
            "rootLogger.level=warn\nrootLogger.appenderRef.out.ref=out\nappender.out.type=Console\nappender.out.name=out\n"
            "appender.out.layout.type=PatternLayout\nappender.out.layout.pattern=%d %p %m (%c)%n\n"
        )
        return [f"-Dlog4j2.configurationFile={path}"]

    def _answers(self, node: int) -> bool:
        """Whether a node listens: it opens its ports to clients last, when it has joined the others."""
        return listens(self.ports[node])

    def end(self, sign: signal.Signals, patience: float = 30.0) -> None:
        """Send a signal to all nodes and wait."""
        super().end(sign, patience)
        self._nodes.clear()


class Kafka3(Kafka):
    """Three nodes, three copies of everything, two of which confirm: one node may be lost at any time."""

    name = "kafka3"
    count = 3


class Kafka39(Kafka):
    """The last version before 4.0, and the oldest that is supported."""

    name = "kafka39"
    version = "3.9.1"
