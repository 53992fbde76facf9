"""Kafka in KRaft mode, one node or three, run on Java from the Maven artifacts."""

from __future__ import annotations

import base64
import contextlib
import signal
import subprocess
import uuid
from pathlib import Path
from urllib.parse import quote

from servers import Server, free_port, listens, maven
from servers.tls import PASSWORD, USER, certificates

LOGGING = {
    # Kafka brings no logging backend, and 4.x does not start without one.
    "3": ("org.slf4j:slf4j-reload4j:1.7.36",),
    "4": ("org.apache.logging.log4j:log4j-slf4j-impl:2.24.3", "org.apache.logging.log4j:log4j-core:2.24.3"),
}
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule"
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
    ``log.flush.interval.messages=1`` is its strongest setting. Topics are made by their users, never by a publish.
    ``version`` may be set to 3.9.1 on a class or an object, before it is installed.
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
        ca = quote(str(self.folder / "tls" / "ca.pem"))
        return f"kafka://{USER}:{quote(PASSWORD, safe='')}@{hosts}?tls=1&ca={ca}"

    def start(self) -> None:
        """Start all nodes, or start them again on the same data and ports; back when they answer."""
        for node in range(self.count):
            self._launch(node)
        self.wait(
            lambda: all(self._answers(node) for node in range(self.count)), f"ports {self.ports}", log=self._log(0)
        )

    def start_node(self, node: int) -> None:
        """Start one node again, counted from 0; back when it answers."""
        self._launch(node)
        self.wait(lambda: self._answers(node), f"port {self.ports[node]}", log=self._log(node))

    def kill_node(self, node: int) -> None:
        """SIGKILL one node, counted from 0; the others go on."""
        process = self._nodes.pop(node)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()
        self.processes.remove(process)

    # ---- a node -------------------------------------------------------------------------------------------------

    def _log(self, node: int) -> str:
        return f"node{node}.log"

    def _launch(self, node: int) -> None:
        config = self.folder / f"node{node}.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in self._settings(node).items()))
        classpath = self.classpath(self.version)
        if not (self.folder / f"data{node}" / "meta.properties").exists():
            command = [
                *("java", "-cp", classpath, "kafka.tools.StorageTool", "format"),
                *("-t", self._cluster(), "-c", str(config)),
            ]
            if self.secure:
                command += ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={PASSWORD}]"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"kafka: the data folder cannot be made: {done.stderr[-1000:]}")
        self._nodes[node] = self.launch(
            [
                "java",
                "-Xms128m",
                "-Xmx512m",
                "-XX:+UseSerialGC",
                *self._logging(),
                "-cp",
                classpath,
                "kafka.Kafka",
                config,
            ],
            log=self._log(node),
        )

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
            "auto.create.topics.enable": "false",
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
                "listener.name.clients.ssl.client.auth": "requested",
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
