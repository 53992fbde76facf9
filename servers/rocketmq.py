"""RocketMQ 5.3: a name server and a broker from Maven Central, on Java 17.

The proxy (gRPC, for RocketMQ's newer clients) runs in the broker's process; Stentor itself asks the name server and
speaks to the broker. The secure server has no proxy.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import struct
from pathlib import Path
from urllib.parse import quote

from servers import Server, free_port, listens, maven
from servers.tls import PASSWORD, USER, certificates, files

VERSION = "5.3.3"
NAME_SERVER = "org.apache.rocketmq.namesrv.NamesrvStartup"
BROKER = "org.apache.rocketmq.broker.BrokerStartup"
PROXY = "org.apache.rocketmq.proxy.ProxyStartup"

# What RocketMQ reaches into on Java 17.
OPENED = (
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
    "--add-opens=java.base/java.nio=ALL-UNNAMED",
    "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-exports=java.base/sun.nio.ch=ALL-UNNAMED",
    "--add-exports=java.base/jdk.internal.ref=ALL-UNNAMED",
)


class RocketMQ(Server):
    """One name server and one broker that flushes each message to the disk before it confirms (SYNC_FLUSH).

    Nothing is removed by age for a year, nor by force when the disk fills: Stentor's groups may not have seen it yet.
    ``front`` is another address of this machine that clients are sent to: for a proxy between them, on the same port.
    """

    name = "rocketmq"

    def __init__(self, folder: Path, *, secure: bool = False, front: str = "") -> None:
        super().__init__(folder, secure=secure)
        self.front = front
        self.port = free_port()
        self.broker_port = broker_port()
        self.ha_port = free_port()
        self.grpc_port = free_port()
        self.remoting_port = free_port()

    @classmethod
    def install(cls) -> None:
        classpath()

    @classmethod
    def release(cls) -> str:
        return VERSION

    @property
    def url(self) -> str:
        if not self.secure:
            return f"rocketmq://127.0.0.1:{self.port}"
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        return f"rocketmq://{login}@localhost:{self.port}?tls=1&{files(self.folder / 'tls', self.mutual)}"

    @property
    def grpc(self) -> str:
        """HOST:PORT of the proxy, for gRPC clients."""
        return f"127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        self.configure()
        self.run(NAME_SERVER, "namesrv", 128, "-c", self.folder / "namesrv.conf")
        self.wait(lambda: listens(self.port), "the name server listens")
        self.start_broker()

    def start_broker(self) -> None:
        """Start the broker, where it was stopped or killed alone."""
        config = self.folder / "broker.conf"
        if self.secure:
            self.run(BROKER, "broker", 768, "-c", config)
        else:
            address = f"127.0.0.1:{self.port}"
            proxy = self.folder / "conf" / "rmq-proxy.json"
            self.run(PROXY, "proxy", 768, "-pm", "local", "-n", address, "-bc", config, "-pc", proxy)
        self.wait(self.registered, "the broker has registered with the name server", 120)
        if not self.secure:
            self.wait(lambda: listens(self.grpc_port), "the proxy listens", 60)

    def kill_broker(self) -> None:
        """SIGKILL for the broker alone; the name server goes on."""
        name_server, broker = self.processes
        os.killpg(broker.pid, signal.SIGKILL)
        broker.wait()
        self.processes[:] = [name_server]

    def run(self, main: str, log: str, megabytes: int, *args: str | Path) -> None:
        """Start one of RocketMQ's programs."""
        options = [
            *OPENED, f"-Xms{megabytes}m", f"-Xmx{megabytes}m", "-XX:MaxDirectMemorySize=512m", "-XX:+UseSerialGC",
            f"-Duser.home={self.folder}", f"-Drmq.logback.configurationFile=rmq.{log}.logback.xml",
        ]  # fmt: skip
        if self.secure:
            options += [
                "-Dtls.enable=true", "-Dtls.server.mode=enforcing", "-Dtls.test.mode.enable=false",
                f"-Dtls.config.file={self.folder / 'tls.properties'}",
            ]  # fmt: skip
        environment = os.environ | {"ROCKETMQ_HOME": str(self.folder), "NAMESRV_ADDR": f"127.0.0.1:{self.port}"}
        self.launch(["java", *options, "-cp", classpath(), main, *args], env=environment)

    def configure(self) -> None:
        """Write the files that the programs read."""
        (self.folder / "conf").mkdir(exist_ok=True)
        broker: dict[str, object] = {
            "brokerClusterName": "DefaultCluster",
            "brokerName": "broker-a",
            "brokerId": 0,
            "brokerIP1": self.front or ("localhost" if self.secure else "127.0.0.1"),
            "bindAddress": "127.0.0.1",
            "brokerRole": "ASYNC_MASTER",
            "listenPort": self.broker_port,
            "haListenPort": self.ha_port,
            "namesrvAddr": f"127.0.0.1:{self.port}",
            "storePathRootDir": self.folder / "store",
            "flushDiskType": "SYNC_FLUSH",
            "mappedFileSizeCommitLog": 64 << 20,
            "mappedFileSizeConsumeQueue": 20 * 10_000,
            "fileReservedTime": 24 * 365,
            "cleanFileForciblyEnable": "false",
            "diskMaxUsedSpaceRatio": 95,
        }
        if self.secure:
            provider = "org.apache.rocketmq.auth.authentication.provider"
            broker |= {
                "authenticationEnabled": "true",
                "authenticationProvider": f"{provider}.DefaultAuthenticationProvider",
                "authenticationMetadataProvider": f"{provider}.LocalAuthenticationMetadataProvider",
                "initAuthenticationUser": json.dumps({"username": USER, "password": PASSWORD}),
                "innerClientAuthenticationCredentials": json.dumps({"accessKey": USER, "secretKey": PASSWORD}),
            }
            tls = certificates(self.folder / "tls")
            properties(
                self.folder / "tls.properties",
                {
                    "tls.server.certPath": tls / "server.pem",
                    "tls.server.keyPath": tls / "server.key",
                    "tls.client.trustCertPath": tls / "ca.pem",
                    "tls.client.authServer": "true",
                    "tls.client.certPath": tls / "client.pem",
                    "tls.client.keyPath": tls / "client.key",
                    "tls.server.trustCertPath": tls / "ca.pem",
                    "tls.server.authClient": "true",
                    "tls.server.need.client.auth": "require" if self.mutual else "optional",
                },
            )
        properties(self.folder / "broker.conf", broker)
        properties(self.folder / "namesrv.conf", {"listenPort": self.port})
        proxy = {
            "rocketMQClusterName": "DefaultCluster",
            "grpcServerPort": self.grpc_port,
            "remotingListenPort": self.remoting_port,
            "localServeAddr": "127.0.0.1",
        }
        (self.folder / "conf" / "rmq-proxy.json").write_text(json.dumps(proxy))

    def registered(self) -> bool:
        """Whether the name server knows the broker, and the broker listens."""
        head = json.dumps({"code": 106, "language": "PYTHON", "version": 477, "opaque": 1, "flag": 0}).encode()
        with socket.create_connection(("127.0.0.1", self.port), 2) as raw:
            link = raw
            if self.secure:
                tls = self.folder / "tls"
                context = ssl.create_default_context(cafile=str(tls / "ca.pem"))
                context.load_cert_chain(tls / "client.pem", tls / "client.key")
                link = context.wrap_socket(raw, server_hostname="localhost")
            with link:
                link.sendall(struct.pack(">II", 4 + len(head), len(head)) + head)
                with link.makefile("rb") as answer:
                    length = struct.unpack(">I", answer.read(4))[0]
                    return str(self.broker_port).encode() in answer.read(length) and listens(self.broker_port)


def classpath() -> str:
    """The jars of the broker, the proxy and the name server."""
    group = "org.apache.rocketmq"
    return maven(f"rocketmq-{VERSION}", f"{group}:rocketmq-proxy:{VERSION}", f"{group}:rocketmq-namesrv:{VERSION}")


def broker_port() -> int:
    """A free port whose second neighbour below is free too: the broker opens that one as well."""
    while True:
        port = free_port()
        if not listens(port - 2):
            return port


def properties(path: Path, entries: dict[str, object]) -> None:
    """Write a Java properties file, which is Latin-1 with escapes."""
    lines = [f"{name}={value}".replace("\\", "\\\\") for name, value in entries.items()]
    escaped = ("".join(c if ord(c) < 128 else f"\\u{ord(c):04x}" for c in line) for line in lines)
    path.write_text("\n".join(escaped) + "\n")
    path.chmod(0o600)
