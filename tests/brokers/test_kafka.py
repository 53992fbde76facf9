"""What is special about Kafka: its faults, a lost node of three, its security, its settings."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from confluent_kafka import KafkaError, Producer

import servers
from servers.kafka import Kafka
from servers.tls import PASSWORD, USER
from stentor.brokers import kafka
from stentor.brokers.kafka import KafkaBroker, _failure
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, Unavailable, UnknownTopic
from stentor.event import Topic
from stentor.message import Message
from stentor.subscription import Subscription
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.stage import Stage, until
from tests.faults import Proxy, ServerFaults, ThreeNodes
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class TestKafkaServer(ServerFaults):
    name = "kafka"
    options = {"lease": 1, "beat": 0.25}  # noqa: RUF012

    @pytest.fixture
    def proxy(self, server: servers.Server) -> Iterator[Proxy]:
        """Kafka tells its clients where to go: those that come by this proxy are told to go by it."""
        assert isinstance(server, Kafka)
        with Proxy(server.behind, server.front) as proxy:
            yield proxy

    def through(self, url: str, proxy: Proxy) -> str:
        return f"kafka://127.0.0.1:{proxy.port}?{url.partition('?')[2]}"


class TestKafkaNodes(ThreeNodes):
    name = "kafka3"
    options = {"lease": 1, "beat": 0.25}  # noqa: RUF012

    async def leader(self, broker: Any, server: Any, topic: str) -> int:
        found: int = (await broker._metadata(10, topic)).topics[topic].partitions[0].leader
        return found - 1

    async def in_step(self, broker: Any) -> bool:
        return "in step" not in {finding.check for finding in await self.patient(broker.review)}

    async def test_r11_what_is_asked_as_a_node_dies(self, stage: Stage, server: servers.Server) -> None:
        """Clients still take it for a leader and are told so: what they ask is answered once another leads."""
        broker = stage.broker
        assert isinstance(broker, KafkaBroker)
        await broker.declare([Topic("t", partitions=3)], [])
        await stage.send(*[message(str(n)) for n in range(30)])
        stored = broker.prefix + "t"
        ends = await broker.bounds(stored, range(3))
        first = next(iter((await broker._metadata(10)).brokers))
        async with self.lost(server, first - 1):
            other, found = await asyncio.gather(
                self.patient(stage.another), self.patient(lambda: broker.bounds(stored, range(3)))
            )
            assert found == ends
            assert other.features.durable == "replica"
            await self.patient(lambda: other.declare([Topic("meanwhile", partitions=3)], []))
            made = (await broker._metadata(10, f"{broker.prefix}meanwhile")).topics.popitem()[1]
            assert {len(part.replicas) for part in made.partitions.values()} == {3}


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
        async with asyncio.timeout(60):
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


async def test_nothing_is_made_by_asking(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By default the server makes a topic that a client asks for, and removes what is a week old there."""
    broker: Any = connect(fresh(server_url("kafka", tmp_path_factory)))
    await broker.open()
    try:
        missing = broker.prefix + "missing"
        for asking in (broker.told(missing), broker.bounds(missing, [0]), broker.tell(missing, b"")):
            with pytest.raises(UnknownTopic):
                await asking
        await broker.remove(missing)
        there = {name for name in (await broker._metadata(10)).topics if name.startswith(broker.prefix)}
        assert there == {f"{broker.prefix}stentor.{name}" for name in ("leases", "state.0")}
    finally:
        await broker.close()


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


async def test_a_topic_is_found_that_was_missing_before(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The client library remembers for minutes that there is none, behind what it remembers for longer."""
    url = fresh(server_url("kafka", tmp_path_factory))
    first: Any = connect(url)
    second: Any = connect(url)
    await first.open()
    await second.open()
    try:
        topic = first.prefix + "late"
        with pytest.raises(UnknownTopic):
            await first.bounds(topic, [0])
        await second.make(topic)
        assert await first.bounds(topic, [0]) == [(0, 0)]
    finally:
        await second.close()
        await first.close()


async def stored(broker: Any) -> list[str]:
    return [found.id async for _, found in broker.browse("t", "earliest", follow=False)]


async def test_events_behind_an_open_transaction_wait(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody reads past a transaction that has not ended, whoever has it: what stands behind it is lag all the same."""
    url = fresh(server_url("kafka", tmp_path_factory))
    broker: Any = connect(url)
    await broker.open()
    other = Producer({"bootstrap.servers": urlsplit(url).netloc, "transactional.id": broker.prefix})
    try:
        await broker.declare([Topic("t", partitions=1)], [Subscription(group="g", topics=("t",), app="app")])
        await asyncio.to_thread(other.init_transactions, 10)
        other.begin_transaction()
        other.produce(broker.prefix + "t", b"{}", partition=0)
        assert await asyncio.to_thread(other.flush, 10) == 0
        await broker.publish([message("1")])
        assert [(lag.events, lag.seconds) for lag in await broker.admin.lag()] == [(2, 0.0)]
        looking = asyncio.create_task(stored(broker))
        done, _ = await asyncio.wait([looking], timeout=0.5)
        assert not done  # a commit that was confirmed may look like this for a while
        await asyncio.to_thread(other.abort_transaction, 10)
        assert await looking == ["1"]

        async def seen() -> bool:
            [lag] = await broker.admin.lag()
            return bool(lag.seconds)

        await until(seen, "the event is seen, and how old it is")
        other.begin_transaction()
        other.produce(broker.prefix + "t", b"{}", partition=0)
        assert await asyncio.to_thread(other.flush, 10) == 0
        monkeypatch.setattr(kafka, "MARKED_WITHIN", 0.1)
        assert await stored(broker) == ["1"]
        assert "behind a transaction that does not end" in caplog.text
    finally:
        await broker.close()


@pytest.mark.parametrize(("code", "answered"), [("NOT_LEADER_FOR_PARTITION", True), ("BROKER_NOT_AVAILABLE", False)])
async def test_a_server_that_does_not_lead_yet_is_asked_for_longer(
    code: str, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker: Any = connect("kafka://localhost")
    asked: list[float] = []

    async def busy(patience: float) -> str:
        asked.append(time.monotonic())
        if asked[-1] < asked[0] + 1.0:
            raise _failure(broker, KafkaError(getattr(KafkaError, code)))
        return "led"

    async def metadata(*_: object) -> None:
        pass

    monkeypatch.setattr(broker, "_metadata", metadata)
    monkeypatch.setattr(kafka, "ASK_PATIENCE", -1.5)  # of all that is waited for, half a second
    if answered:
        assert await broker._ask(busy) == "led"
    else:
        with pytest.raises(Unavailable, match="Broker not available"):
            await broker._ask(busy)


async def test_events_that_come_during_a_look_for_a_time_are_not_before_it(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is asked twice; what is taken for earlier is trimmed, and a group that begins there never sees it."""
    broker: Any = connect(fresh(server_url("kafka", tmp_path_factory), partitions=1))
    await broker.open()
    offsets, one_by_one = broker._offsets, asyncio.Lock()

    async def slowly(*asked: Any) -> Any:
        async with one_by_one:
            found = await offsets(*asked)
            await broker.publish([message(str(found))])
            return found

    try:
        await broker.declare([Topic("t")], [])
        monkeypatch.setattr(broker, "_offsets", slowly)
        assert await broker.find((await broker.topic("t")).stored, [0], 0.0) == [0]
    finally:
        await broker.close()


async def test_what_a_producer_that_ended_had_sent_is_told(tmp_path: Path) -> None:
    """A producer ends with the first message that is given up; what was under way behind it hears of that too."""
    kind = servers.find("kafka")
    kind.install()
    with kind(tmp_path) as server:
        assert isinstance(server, Kafka)
        with Proxy(server.behind, server.front) as proxy:
            broker: Any = connect(f"kafka://127.0.0.1:{proxy.port}")
            await broker.open()
            try:
                await broker.make("t")
                sender = broker.data
                assert await sender.send([("t", 0, b"1", None)]) == [0]
                proxy.blackhole()
                ended = sender.producer
                sending = asyncio.create_task(sender.send([("t", 0, b"2", None)]))
                await until(lambda: len(ended) and proxy.swallowed > 0, "it is under way")
                sender._renew(ended)
                async with asyncio.timeout(8):
                    [error] = await sending
                assert isinstance(error, KafkaError)
                # Nothing is stored behind what was given up: the rest of a send goes no other way.
                told: list[KafkaError] = []
                sender.produce(lambda error, _: told.append(error), "t", 0, behind=ended, value=b"x")
                assert [error.code() for error in told] == [KafkaError._PURGE_QUEUE]
                proxy.heal()
                proxy.drop()
                assert isinstance((await sender.send([("t", 0, b"3", None)]))[0], int)
            finally:
                await broker.close()
