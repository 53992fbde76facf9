"""What is special about PostgreSQL: its faults, its security, its schema, and other people's transactions."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import servers
from servers.postgresql import ACCOUNT, PostgreSQL
from servers.tls import USER
from stentor.broker import Broker
from stentor.brokers.postgresql import PostgresBroker
from stentor.brokers.postgresql_client import Connection
from stentor.clock import SystemClock
from stentor.connect import BrokerUrl, connect
from stentor.errors import AuthenticationFailed, ConfigError, StentorError, StorageUnusable, Unavailable
from stentor.event import Topic
from stentor.message import Message
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.fleet import Fleet
from stentor.testing.conformance.stage import until
from tests.faults import Proxy, Report, ServerFaults
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class TestPostgresqlServer(ServerFaults):
    name = "postgresql"

    async def test_r11_no_connection_is_left(self, fleet: Fleet, server: servers.Server, report: Report) -> None:
        """Under load all connections end and the limit is full: health says why, and all goes on when it is not."""
        assert isinstance(server, PostgreSQL)
        superuser = await psycopg.AsyncConnection.connect(
            host="127.0.0.1", port=server.port, user=ACCOUNT, dbname="postgres", autocommit=True
        )
        broker = fleet.stage.broker
        try:
            async with self.under_load(fleet, report) as load:
                await superuser.execute(f"ALTER ROLE {USER} CONNECTION LIMIT 0".encode())
                await superuser.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (USER,)
                )
                try:
                    await until(lambda: said(broker, "too many connections"), "health says why", self.patience)
                    with pytest.raises(Unavailable, match="too many connections"):
                        await connect(self.url_of(server)).open()
                    await asyncio.sleep(self.outage)  # how long the fault lasts
                finally:
                    await superuser.execute(f"ALTER ROLE {USER} CONNECTION LIMIT -1".encode())
                await load.goes_on(self.patience)
        finally:
            await superuser.close()


async def said(broker: Broker, text: str) -> bool:
    """Whether a broker's health tells of something."""
    return text in (await broker.health() or "")


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("postgresql", tmp_path_factory, secure=True))


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("postgresql", tmp_path_factory))


def message(id: str) -> Message:
    return Message(id=id, source="s", type="x", topic="t", data=b"{}")


async def refused(url: str) -> str:
    """What ``open`` says of a URL that cannot be used."""
    broker = connect(url)
    with pytest.raises(StentorError) as raised:
        async with asyncio.timeout(60):
            await broker.open()
    return f"{type(raised.value).__name__}: {raised.value}"


async def test_tls_and_a_password(secure: str) -> None:
    broker = connect(secure)
    await broker.open()
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([message("1")])
        assert [found.id async for _, found in broker.browse("t", "earliest", follow=False)] == ["1"]
    finally:
        await broker.close()


async def test_a_wrong_password_fails_fast_in_one_line(secure: str) -> None:
    password = urlsplit(secure).password
    assert password is not None
    said = await refused(secure.replace(password, "wrong"))
    assert said.startswith(AuthenticationFailed.__name__)
    assert "\n" not in said
    assert "wrong" not in said


async def test_an_unknown_authority_is_refused(secure: str, plain: str) -> None:
    assert "certificate" in (await refused(secure.split("?", maxsplit=1)[0] + "?tls=1")).lower()


async def test_nobody_there() -> None:
    assert (await refused("postgresql://stentor@127.0.0.1:1/stentor")).startswith(Unavailable.__name__)


def test_options() -> None:
    with pytest.raises(ConfigError, match="unknown option colour"):
        connect("postgresql://localhost/x?colour=red")
    with pytest.raises(ConfigError, match="schema"):
        connect("postgresql://localhost/x?schema=a;b")


async def test_a_newer_schema_is_refused(plain: str) -> None:
    broker: Any = connect(plain + "&schema=newer")
    await broker.open()
    session: Callable[[], Awaitable[Any]] = broker.native
    connection = await session()
    await connection.execute("UPDATE version SET version = 99")
    await connection.close()
    await broker.close()
    assert (await refused(plain + "&schema=newer")).startswith(StorageUnusable.__name__)


async def test_several_may_start_at_once(plain: str) -> None:
    brokers = [connect(plain + "&schema=crowd") for _ in range(5)]
    await asyncio.gather(*(broker.open() for broker in brokers))
    await asyncio.gather(*(broker.declare([Topic("t")], []) for broker in brokers))
    await asyncio.gather(*(broker.publish([message(str(n))]) for n, broker in enumerate(brokers)))
    found = [found.id async for _, found in brokers[0].browse("t", "earliest", follow=False)]
    assert sorted(found) == ["0", "1", "2", "3", "4"]
    for broker in brokers:
        await broker.close()


async def test_a_long_transaction_of_others_stalls_nothing(plain: str) -> None:
    """A transaction that has written and stays open holds back neither publishing nor reading."""
    broker: Any = connect(plain)
    await broker.open()
    connection = await broker.native()
    try:
        await broker.declare([Topic("t")], [])
        await connection.execute("CREATE TABLE IF NOT EXISTS theirs (n int)")
        async with connection.transaction():
            await connection.execute("INSERT INTO theirs VALUES (1)")
            async with asyncio.timeout(60):
                await broker.publish([message("1"), message("2")])
                found = [found.id async for _, found in broker.browse("t", "earliest", follow=False)]
        assert sorted(found) == ["1", "2"]
    finally:
        await connection.close()
        await broker.close()


async def test_a_batch_whose_answer_is_lost(plain: str) -> None:
    """It is sent again by itself: stored once, its receipt is that of an event which is no duplicate."""
    port = urlsplit(plain).port
    assert port is not None
    with Proxy(port) as proxy:
        seeing = connect(plain)
        broker = connect(plain.replace(f":{port}", f":{proxy.port}") + "&lease=1&beat=0.25")
        await seeing.open()
        await broker.open()

        async def stored() -> list[str]:
            return [message.id async for _, message in seeing.browse("t", "earliest", follow=False)]

        try:
            await broker.declare([Topic("t")], [])
            first, second = (Message(id=n, source="s", type="x", topic="t", data=b"{}", fresh=True) for n in "12")
            await broker.publish([first])
            proxy.blackhole("replies")
            lost = asyncio.create_task(broker.publish([second]))
            async with asyncio.timeout(60):
                while await stored() != ["1", "2"]:
                    await asyncio.sleep(0.01)
            proxy.heal()
            [receipt] = await lost
            assert (receipt.id, receipt.duplicate) == ("2", False)
            assert await stored() == ["1", "2"]
        finally:
            await broker.close()
            await seeing.close()


class Recorded(PostgresBroker):
    """A broker all of whose connections are kept an eye on."""

    def __init__(self, url: str) -> None:
        super().__init__(BrokerUrl(url), SystemClock())
        self.made: list[Connection] = []
        self.making = asyncio.Event()
        """Somebody has begun to connect."""

    async def session(self) -> Connection:
        self.making.set()
        connection = await super().session()
        self.made.append(connection)
        return connection

    async def idle(self) -> int:
        """The connections that are open when nothing runs any more, also nothing that nobody awaits."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        return sum(not connection.closed for connection in self.made)


async def one(connection: Connection) -> None:
    await connection.execute("SELECT 1")


class TestNothingStaysOpen:
    @pytest.fixture
    def recorded(self, plain: str) -> Recorded:
        return Recorded(plain)

    async def test_a_read_that_was_given_up(self, recorded: Recorded) -> None:
        """A reader is closed while the query of a cancelled read still runs."""
        await recorded.open()
        reader = recorded.reader()
        begun = asyncio.Event()

        async def slow(connection: Connection) -> None:
            begun.set()
            await connection.execute("SELECT pg_sleep(0.2)")

        await reader._line.run(one, sent=Unavailable)
        reading = asyncio.create_task(reader._line.run(slow, sent=Unavailable))
        await begun.wait()
        reading.cancel()
        await reader.close()
        await recorded.close()
        assert await recorded.idle() == 0

    async def test_closed_while_it_connects(self, recorded: Recorded) -> None:
        await recorded.open()
        recorded.making.clear()
        asking = asyncio.create_task(recorded.ping())
        await recorded.making.wait()
        asking.cancel()
        await recorded.close()
        assert await recorded.idle() == 0

    async def test_an_open_that_was_cancelled(self, recorded: Recorded) -> None:
        opening = asyncio.create_task(recorded.open())
        await recorded.making.wait()
        opening.cancel()
        assert await recorded.idle() == 0

    async def test_a_close_that_was_cancelled(self, recorded: Recorded) -> None:
        await recorded.open()
        await recorded.ping()
        closing = asyncio.create_task(recorded.close())
        await asyncio.sleep(0)  # it has begun
        closing.cancel()
        assert await recorded.idle() == 0

    async def test_a_reader_that_nobody_closed(self, recorded: Recorded) -> None:
        await recorded.open()
        reader = recorded.reader()
        await reader._line.run(one, sent=Unavailable)
        await recorded.close()
        assert await recorded.idle() == 0
