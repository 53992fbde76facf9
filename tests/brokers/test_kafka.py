"""What is special about Kafka: its faults, a lost node of three, its security, its settings."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import servers
from servers.kafka import Kafka
from servers.tls import PASSWORD, USER
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, Unavailable
from stentor.event import Topic
from stentor.message import Message
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.fleet import Fleet
from tests.faults import Proxy, Report, ServerFaults
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


KEPT = {"test_r10_rolling_restart", "test_r11_cut_connections"}


class TestKafkaServer(ServerFaults):
    name = "kafka"
    options = {"lease": 1, "beat": 0.25}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def kept(self, request: pytest.FixtureRequest) -> None:
        if request.function.__name__ not in KEPT:
            pytest.skip("not shown to be kept on Kafka yet, see docs/brokers/kafka.md")

    @pytest.fixture
    def proxy(self, server: servers.Server) -> Iterator[Proxy]:
        """Kafka tells its clients where to go: those that come by this proxy are told to go by it."""
        assert isinstance(server, Kafka)
        with Proxy(server.behind, server.front) as proxy:
            yield proxy

    def through(self, url: str, proxy: Proxy) -> str:
        return f"kafka://127.0.0.1:{proxy.port}?{url.partition('?')[2]}"


class TestKafkaNodes(ServerFaults):
    """Three nodes with three copies of everything, two of which confirm."""

    name = "kafka3"
    options = {"lease": 1, "beat": 0.25}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def kept(self) -> None:
        pytest.skip("not shown to be kept on Kafka yet, see docs/brokers/kafka.md")

    async def test_r02_a_node_is_lost(self, fleet: Fleet, server: servers.Server, report: Report) -> None:
        """One of three nodes is killed under load and comes back, then another."""
        assert isinstance(server, servers.find("kafka3"))
        nodes: Any = server
        async with self.under_load(fleet, report) as load:
            for node in (0, 1):
                await asyncio.to_thread(nodes.kill_node, node)
                await load.goes_on(self.patience)
                await asyncio.to_thread(nodes.start_node, node)
                await load.goes_on(self.patience)


def message(id: str) -> Message:
    return Message(id=id, source="s", type="x", topic="t", data=b"{}")


async def round_trip(url: str) -> list[str]:
    broker = connect(url)
    await broker.open()
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([message("1")])
        return [found.id async for _, found in broker.browse("t", "earliest", follow=False)]
    finally:
        await broker.close()


class TestSecure:
    @pytest.fixture
    def url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return fresh(server_url("kafka", tmp_path_factory, secure=True))

    async def test_tls_and_scram(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        assert await round_trip(url) == ["1"]
        assert PASSWORD not in caplog.text

    async def test_password_file(self, url: str, tmp_path: Path) -> None:
        (tmp_path / "password").write_text(PASSWORD + "\n", "utf-8")
        bare = url.replace(f":{quote(PASSWORD, safe='')}@", "@")
        assert bare != url
        assert await round_trip(f"{bare}&password_file={tmp_path / 'password'}") == ["1"]

    @pytest.mark.parametrize("login", [f"{USER}:wrong-word@", "nobody:wrong-word@"])
    async def test_wrong_credentials_fail_fast(self, url: str, login: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        wrong = url.replace(f"{USER}:{quote(PASSWORD, safe='')}@", login)
        async with asyncio.timeout(20):
            with pytest.raises(AuthenticationFailed) as caught:
                await connect(wrong).open()
        assert "\n" not in str(caught.value)
        assert "wrong-word" not in str(caught.value) + caplog.text

    async def test_server_is_verified(self, url: str) -> None:
        with pytest.raises((AuthenticationFailed, Unavailable), match=r"(?i)certificate"):
            await connect(url.partition("&ca=")[0]).open()


async def test_wrong_address_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await connect("kafka://127.0.0.1:1").open()


@pytest.mark.parametrize("query", ["no_such=1", "replicas=0"])
def test_options_are_checked(query: str) -> None:
    with pytest.raises(ConfigError):
        connect(f"kafka://localhost?{query}")


async def test_another_number_of_partitions_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    url = fresh(server_url("kafka", tmp_path_factory), partitions=4)
    assert await round_trip(url) == ["1"]
    broker: Any = connect(url)
    await broker.open()
    try:
        with pytest.raises(ConfigError, match="has 4 partitions, not 2"):
            await broker.make_topic(broker.prefix + "t", 2)
    finally:
        await broker.close()
