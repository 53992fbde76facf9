"""What is special about NATS: its faults, its security, its streams, and what a message from elsewhere becomes."""

import asyncio
import json
from typing import Any

import pytest

from stentor.brokers.nats import NatsBroker
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, StentorError, Unavailable
from stentor.event import Topic
from stentor.message import Message
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.stage import until
from tests.faults import ServerFaults, ThreeNodes
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


# nats-py leaves the socket of a connection attempt that failed half-way to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestNatsServer(ServerFaults):
    name = "nats"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestNatsNodes(ThreeNodes):
    name = "nats3"

    async def leader(self, broker: Any, server: Any, topic: str) -> int:
        return int((await self.patient(lambda: broker._info(topic)))["cluster"]["leader"].removeprefix("n"))


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("nats", tmp_path_factory))


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("nats", tmp_path_factory, secure=True))


def message(id: str, key: str | None = None) -> Message:
    return Message(id=id, source="s", type="x", topic="t", data=b"{}", key=key)


async def opened(url: str) -> NatsBroker:
    broker = connect(url)
    assert isinstance(broker, NatsBroker)
    await broker.open()
    return broker


async def test_tls_and_a_password(secure: str) -> None:
    broker = await opened(secure)
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([message("1")])
        assert [found.id async for _, found in broker.browse("t", "earliest", follow=False)] == ["1"]
        assert await broker.health() is None
    finally:
        await broker.close()


@pytest.mark.parametrize(
    ("right", "wrong"), [("@localhost", "x@localhost"), ("&ca=", "&durable=host&namespace=x&nota=")]
)
async def test_what_is_wrong_is_said_at_once(
    secure: str, right: str, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong password, an authority that nobody knows; and by nobody else than the exception."""
    url = secure.replace(right, wrong, 1)
    if "nota" in wrong:
        url = secure.partition("&ca=")[0]
    with pytest.raises(StentorError) as raised:
        await opened(url)
    assert isinstance(raised.value, AuthenticationFailed), raised.value
    assert "secret" not in str(raised.value)
    await asyncio.sleep(0.2)  # for what asyncio says when the server hangs up
    assert caplog.text == ""


async def test_another_number_of_partitions(plain: str) -> None:
    first = await opened(f"{plain}&partitions=2")
    second = await opened(f"{plain}&partitions=3")
    try:
        await first.make_topic(f"{first.prefix}t", 2)
        with pytest.raises(ConfigError, match="has 2 partitions, not 3; write partitions=2"):
            await second.declare([Topic("t")], [])
    finally:
        await first.close()
        await second.close()


async def test_subjects_of_another_stream(plain: str) -> None:
    broker = await opened(plain)
    other = f"other{broker.prefix.strip('.')}"
    await broker.link.api(f"STREAM.CREATE.{other}", name=other, subjects=[f"{broker.prefix}t.*"])
    try:
        with pytest.raises(ConfigError, match="its subjects are another stream's"):
            await broker.declare([Topic("t")], [])
    finally:
        await broker.close()


@pytest.mark.parametrize("kind", ["nats", "nats29"])
async def test_many_of_one_key_keep_their_order(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In atomic batches where the server has them, else one after the other."""
    broker = await opened(fresh(server_url(kind, tmp_path_factory)))
    try:
        await broker.declare([Topic("t")], [])
        few = [message(str(n), "a") for n in range(5)]
        many = [message(str(n), "a") for n in range(5, 2505 if kind == "nats" else 105)]
        await broker.publish(few)
        await broker.publish(many)
        found = [found.id async for _, found in broker.browse("t", "earliest", follow=False)]
        assert found == [one.id for one in few + many]
        [lag_end] = [end for _, end in await broker.bounds(f"{broker.prefix}t", [0])]
        assert lag_end == len(few + many) + 1
    finally:
        await broker.close()


@pytest.mark.parametrize("kind", ["nats", "nats29"])
@pytest.mark.parametrize("left", [0, 2])
async def test_what_is_removed_while_it_is_read(
    kind: str, left: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the count and the reading: nobody waits for what is no more, as other readers of the topic go on."""
    broker = await opened(fresh(server_url(kind, tmp_path_factory), partitions=1))
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([message(str(n)) for n in range(5)])
        stored, look = broker.prefix + "t", broker._look

        async def remove_them(topic: str, index: int, offset: int) -> tuple[str, int]:
            found = await look(topic, index, offset)
            await broker.trim(topic, index, 6 - left)
            return found

        monkeypatch.setattr(broker, "_look", remove_them)
        page = await broker.page(stored, 0, 1, 5)
        assert [entry.message.id for entry in page] == ["3", "4"][2 - left :]
    finally:
        await broker.close()


async def test_what_others_publish(plain: str) -> None:
    """A plain message on a subject of a topic is an event without attributes of its own."""
    broker = await opened(plain)
    try:
        await broker.declare([Topic("t", partitions=1)], [])
        await broker.native.publish(f"{broker.prefix}t.0", json.dumps({"a": 1}).encode())
        await broker.native.flush()
        [found] = [found async for _, found in broker.browse("t", "earliest", follow=False)]
        assert found.data == b'{"a": 1}'
    finally:
        await broker.close()


async def test_the_connection_is_the_librarys_for_others(plain: str) -> None:
    """Who subscribes by ``native`` has the library's subscription with headers; garbage to an inbox ends nothing."""
    broker = await opened(plain)
    try:
        await broker.declare([Topic("t", partitions=1)], [])
        heard = await broker.native.subscribe("others")
        await broker.native.publish("others", b"hello", headers={"a": "b"})
        found = await heard.next_msg(timeout=10)
        assert (found.data, found.headers) == (b"hello", {"a": "b"})
        inbox = await broker.link.listen(lambda message: int(message.data))  # type: ignore[arg-type]
        await broker.native.publish(inbox.subject, b"no number")
        await until(lambda: "no number" in broker.link.trouble, "the garbage came")
        assert broker.native.is_connected
        await broker.publish([message("1")])
    finally:
        await broker.close()


async def test_a_connection_that_is_lost_is_no_end(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who browses is told that the rest was not seen."""
    broker = await opened(plain)
    try:
        await broker.declare([Topic("t", partitions=1)], [])
        await broker.publish([message("1")])
        send = broker.link.send
        monkeypatch.setattr(
            broker.link, "send", lambda one: broker.link._lose() if "NEXT" in one.subject else send(one)
        )
        with pytest.raises(Unavailable, match="the connection was lost"):
            await broker.page(broker.prefix + "t", 0, 0, 10)
    finally:
        monkeypatch.undo()
        await broker.close()
