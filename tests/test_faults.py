"""The proxy itself: what it cuts, swallows and delays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from servers import free_port
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from stentor.testing.conformance.stage import until
from tests.faults import Proxy


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.got = b""
        self._clients: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.append(writer)
        while data := await reader.read(65536):
            self.got += data
            writer.write(data)
            await writer.drain()
        writer.close()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for writer in self._clients:
            writer.close()
        await self._server.wait_closed()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    yield echo
    await echo.stop()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[Proxy]:
    proxy = Proxy(await echo.start())
    yield proxy
    proxy.close()


class Client:
    """A connection through the proxy."""

    async def connect(self, proxy: Proxy) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        return self

    async def ask(self, text: bytes) -> bytes:
        self.writer.write(text)
        return await self.reader.readexactly(len(text))

    async def closed(self) -> bool:
        """Once the other side has ended the connection: whether it said nothing before."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


@pytest.fixture
async def clients() -> AsyncIterator[list[Client]]:
    found: list[Client] = []
    yield found
    for client in found:
        client.writer.close()
        with suppress(OSError):
            await client.writer.wait_closed()


async def client(proxy: Proxy, clients: list[Client]) -> Client:
    clients.append(await Client().connect(proxy))
    return clients[-1]


async def test_it_passes_all_on(proxy: Proxy, clients: list[Client]) -> None:
    """A megabyte there and back, on two connections; a client that leaves takes its connection along."""
    first, second = await client(proxy, clients), await client(proxy, clients)
    body = bytes(range(256)) * 4096
    assert list(await asyncio.gather(first.ask(body), second.ask(b"short"))) == [body, b"short"]
    assert proxy.connections == 2
    first.writer.close()
    await until(lambda: proxy.connections == 1)


async def test_drop_cuts_what_is_open(proxy: Proxy, clients: list[Client]) -> None:
    """Open connections end; a new one passes at once."""
    old = await client(proxy, clients)
    assert await old.ask(b"one") == b"one"
    proxy.drop()
    assert await old.closed()
    assert proxy.connections == 0
    assert await (await client(proxy, clients)).ask(b"two") == b"two"


async def test_a_blackhole_is_silent(proxy: Proxy, echo: Echo, clients: list[Client]) -> None:
    """Nothing arrives and nothing ends, on old and new connections; after ``heal`` those stay silent, new ones pass."""
    old = await client(proxy, clients)
    assert await old.ask(b"one") == b"one"
    proxy.blackhole()
    new = await client(proxy, clients)
    old.writer.write(b"lost")
    new.writer.write(b"lost")
    await until(lambda: proxy.swallowed == 8)
    proxy.heal()
    old.writer.write(b"lost")
    await until(lambda: proxy.swallowed == 12)
    assert await (await client(proxy, clients)).ask(b"two") == b"two"
    assert echo.got == b"onetwo"
    assert proxy.connections == 3
    proxy.drop()
    assert await old.closed()
    assert await new.closed()


async def test_only_replies_are_lost(proxy: Proxy, echo: Echo, clients: list[Client]) -> None:
    """The server gets the request, the client hears nothing of it."""
    asking = await client(proxy, clients)
    proxy.blackhole("replies")
    asking.writer.write(b"order")
    await until(lambda: proxy.swallowed == 5)
    assert echo.got == b"order"
    proxy.drop()
    assert await asking.closed()


async def test_delay_holds_back_and_keeps_order(proxy: Proxy, clients: list[Client]) -> None:
    """A reply is not there before twice the delay, and comes in order although the delay shrinks meanwhile."""
    asking = await client(proxy, clients)
    assert await asking.ask(b"now") == b"now"
    loop = asyncio.get_running_loop()
    began = loop.time()
    proxy.delay(0.1)
    asking.writer.write(b"first ")
    asked = await client(proxy, clients)
    reply = asyncio.create_task(asked.ask(b"other"))
    assert await asking.reader.readexactly(6) == b"first "
    assert loop.time() - began >= 0.2
    assert await reply == b"other"
    proxy.heal()
    assert await asking.ask(b"second") == b"second"


async def test_a_target_that_is_away(clients: list[Client]) -> None:
    """The proxy accepts and closes; once there is a target, it passes."""
    echo = Echo()
    proxy = Proxy(free_port())
    try:
        assert await (await client(proxy, clients)).closed()
        proxy.target_port = await echo.start()
        assert await (await client(proxy, clients)).ask(b"there") == b"there"
    finally:
        proxy.close()
        await echo.stop()
