"""RocketMQ alone: TLS and passwords, faults of the server and of the way to it, what it does not take."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from servers import Server, free_port
from servers.rocketmq import RocketMQ
from servers.tls import PASSWORD
from stentor import App, Event
from stentor.brokers.rocketmq_remoting import SEND_BATCH, SYSTEM_BUSY, Answer, Link
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, Unavailable
from stentor.event import Topic
from stentor.message import Message
from tests.faults import Proxy, ServerFaults
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class TestRocketMQServer(ServerFaults):
    name = "rocketmq"
    options = ServerFaults.options | {"partitions": 4}
    one_address = "the name server sends all clients to one address: no single one can be cut off"

    @pytest.fixture(scope="class")
    @classmethod
    def fronted(cls, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RocketMQ]:
        """A second server, that sends its clients to an address where only the proxy listens."""
        with RocketMQ(tmp_path_factory.mktemp("fronted"), front="127.0.0.2") as fronted:
            yield fronted

    @pytest.fixture
    def proxy(self, fronted: RocketMQ) -> Iterator[Proxy]:
        with Proxy(fronted.broker_port, fronted.broker_port, fronted.front) as proxy:
            yield proxy

    @pytest.fixture
    def broker_url(self, server: Server, request: pytest.FixtureRequest) -> str:
        if "proxy" not in request.fixturenames:
            return self.url_of(server)
        request.getfixturevalue("proxy")  # it listens before anybody comes, whom the name server sends there
        return self.url_of(request.getfixturevalue("fronted"))


class Placed(Event, topic="orders.placed", key="order_id", type="test.placed"):
    order_id: str


async def test_tls_and_password(tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    app = App("shop", broker=fresh(server_url("rocketmq", tmp_path_factory, secure=True), partitions=2))

    @app.on(Placed)
    async def ship(order: Placed) -> None: ...

    async with app.connected():
        receipt = await app.publish(Placed(order_id="o1"))
        assert receipt.position is not None
        found = [message.type async for _, message in app.broker.browse("orders.placed", "earliest", follow=False)]
        assert found == ["test.placed"]
    assert PASSWORD not in caplog.text
    assert quote(PASSWORD, safe="") not in caplog.text


@pytest.mark.parametrize("user", ["", "stentor:wrong@", "nobody:wrong@"])
async def test_wrong_credentials_fail_at_once(tmp_path_factory: pytest.TempPathFactory, user: str) -> None:
    url = server_url("rocketmq", tmp_path_factory, secure=True)
    head, _, rest = url.rpartition("@")
    broker = connect(fresh(head.partition("//")[0] + "//" + user + rest))
    with pytest.raises(AuthenticationFailed) as caught:
        await broker.open()
    assert "wrong" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_certificate_of_somebody_else_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    url = server_url("rocketmq", tmp_path_factory, secure=True).partition("&ca=")[0]
    with pytest.raises(AuthenticationFailed, match="certificate"):
        await connect(fresh(url)).open()


async def test_nobody_listens() -> None:
    with pytest.raises(Unavailable, match="cannot be reached"):
        await connect(f"rocketmq://127.0.0.1:{free_port()}").open()


def test_options() -> None:
    with pytest.raises(ConfigError, match="acks"):
        connect("rocketmq://localhost?acks=all")
    with pytest.raises(ConfigError, match="durable"):
        connect("rocketmq://localhost?durable=replica")


async def test_a_busy_server_is_asked_again(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes what waited for 200 ms out of its queue, and says that it began nothing of it."""
    call = Link.call
    busy = Answer(SYSTEM_BUSY, "[TIMEOUT_CLEAN_QUEUE]broker busy, start flow control for a while", {}, b"")
    sent: list[int] = []

    async def late(self: Link, code: int, fields: Any, body: bytes = b"", patience: float = 5.0) -> Answer:
        if code == SEND_BATCH:
            sent.append(code)
            if len(sent) < 4 or patience < 1:
                return busy
        return await call(self, code, fields, body, patience)

    broker = connect(fresh(server_url("rocketmq", tmp_path_factory), partitions=1))
    await broker.open()
    try:
        await broker.declare([Topic("orders")], [])
        messages = [Message(id=f"m{n}", source="/t", type="t", topic="orders", key="k", data=b"") for n in range(3)]
        monkeypatch.setattr(Link, "call", late)
        receipts = await broker.publish(messages)
        assert [receipt.position for receipt in receipts] == [0, 1, 2]
        assert len(sent) == 4
        monkeypatch.setattr("stentor.brokers.rocketmq.SEND_PATIENCE", 0.1)
        with pytest.raises(Unavailable, match="broker busy"):  # it is known not to be stored
            await broker.publish([Message(id="m3", source="/t", type="t", topic="orders", key="k", data=b"")])
    finally:
        await broker.close()


async def test_a_name_that_rocketmq_does_not_take(tmp_path_factory: pytest.TempPathFactory) -> None:
    broker = connect(fresh(server_url("rocketmq", tmp_path_factory)))
    await broker.open()
    try:
        with pytest.raises(ConfigError, match="127 characters"):
            await broker.declare([Topic("a" * 150)], [])
    finally:
        await broker.close()
