"""What is special to Redis: TLS, users and passwords, memory that runs out, eviction; and faults of the real server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from servers.redis import Redis
from servers.tls import PASSWORD, USER
from stentor import App, Event
from stentor.brokers.redis import RedisBroker, RedisFeed
from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, PublishUnknown, StorageFull, Unavailable
from stentor.event import Topic
from stentor.message import Message
from tests.faults import Proxy, ServerFaults
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class TestRedisServer(ServerFaults):
    name = "redis"


class Noted(Event, topic="notes", key="about", type="test.noted"):
    about: str
    text: str = ""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisBroker]:
    broker = connect(url)
    assert isinstance(broker, RedisBroker)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


async def ask(broker: RedisBroker, *command: str) -> None:
    await broker.native.execute_command(*command)  # type: ignore[no-untyped-call]


async def round_trip(url: str) -> list[str]:
    """What a handler sees of one event that went through the broker."""
    app = App("secure", broker=url)
    seen: list[str] = []
    done = asyncio.Event()

    @app.on(Noted)
    async def note(noted: Noted) -> None:
        seen.append(noted.about)
        done.set()

    async with app:
        await app.publish(Noted(about="tls"))
        async with asyncio.timeout(60):
            await done.wait()
    return seen


class TestSecure:
    @pytest.fixture
    def url(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return fresh(server_url("redis", tmp_path_factory, secure=True))

    async def test_tls_user_and_password(self, url: str) -> None:
        assert url.startswith("rediss://")
        assert await round_trip(url) == ["tls"]

    async def test_password_file(self, url: str, tmp_path: Path) -> None:
        (tmp_path / "password").write_text(PASSWORD + "\n", "utf-8")
        bare = url.replace(f":{quote(PASSWORD, safe='')}@", "@")
        assert bare != url
        assert await round_trip(f"{bare}&password_file={tmp_path / 'password'}") == ["tls"]

    @pytest.mark.parametrize("login", [f"{USER}:wrong-word@", "nobody:wrong-word@", ""])
    async def test_wrong_credentials_fail_fast(self, url: str, login: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        wrong = url.replace(f"{USER}:{quote(PASSWORD, safe='')}@", login)
        async with asyncio.timeout(20):
            with pytest.raises(AuthenticationFailed) as caught:
                await connect(wrong).open()
        assert "\n" not in str(caught.value)
        assert "wrong-word" not in str(caught.value) + caplog.text

    async def test_password_is_in_no_log(self, url: str, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        await round_trip(url)
        for word in (PASSWORD, quote(PASSWORD, safe="")):
            assert word not in caplog.text

    async def test_server_is_verified(self, url: str) -> None:
        with pytest.raises(AuthenticationFailed, match="certificate"):  # signed by nobody known
            await connect(url.partition("?")[0]).open()
        with pytest.raises(AuthenticationFailed, match="certificate"):  # of localhost, not of this address
            await connect(url.replace("@localhost:", "@0.0.0.0:")).open()


async def test_wrong_address_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await connect("redis://127.0.0.1:1").open()


@pytest.mark.parametrize("query", ["no_such=1", "lease=soon"])
def test_options_are_checked(query: str) -> None:
    with pytest.raises(ConfigError):
        connect(f"redis://localhost?{query}")


class TestRoom:
    """A server of its own, whose settings the tests change."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[Redis]:
        Redis.install()
        with Redis(tmp_path / "redis") as server:
            yield server

    async def test_out_of_memory_loses_nothing(self, server: Redis) -> None:
        """At maxmemory a publish is refused as a whole; all that was confirmed is there, and it goes on after."""
        app = App("room", broker=server.url)
        app.publishes(Noted)
        async with app.connected(), opened(server.url) as broker:
            await ask(broker, "CONFIG", "SET", "maxmemory", "6mb")
            confirmed = 0
            with pytest.raises(StorageFull):
                while confirmed < 10_000:
                    await app.publish([Noted(about=f"{confirmed}.{n}", text="x" * 10_000) for n in range(10)])
                    confirmed += 10
            assert 0 < confirmed < 10_000
            assert len([m async for _, m in broker.browse("notes", "earliest", follow=False)]) == confirmed
            await ask(broker, "CONFIG", "SET", "maxmemory", "0")
            await app.publish(Noted(about="more"))
            assert len([m async for _, m in broker.browse("notes", "earliest", follow=False)]) == confirmed + 1

    async def test_health_tells_of_eviction(self, server: Redis) -> None:
        async with opened(server.url) as broker:
            assert await broker.health() is None
            await ask(broker, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            assert "maxmemory-policy" in (await broker.health() or "")

    async def test_health_tells_of_a_weaker_disk(self, server: Redis) -> None:
        async with opened(server.url) as broker:
            await ask(broker, "CONFIG", "SET", "appendfsync", "everysec")
            assert "appendfsync" in (await broker.health() or "")
            await ask(broker, "CONFIG", "SET", "appendonly", "no")
            assert "appendonly" in (await broker.health() or "")

    async def test_killed_clients_come_back(self, server: Redis) -> None:
        """CLIENT KILL of all connections: the next events are handled."""
        app = App("killed", broker=f"{server.url}?lease=1&beat=0.25")
        seen: list[str] = []
        woken = asyncio.Event()

        @app.on(Noted)
        async def note(noted: Noted) -> None:
            seen.append(noted.about)
            woken.set()

        async with app, opened(server.url) as killer:
            for n in range(3):
                await ask(killer, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                async with asyncio.timeout(60):
                    while True:
                        try:
                            await app.publish(Noted(about=str(n)), id=str(n))
                            break
                        except Unavailable:
                            continue
                    while str(n) not in seen:
                        woken.clear()
                        await woken.wait()
        assert seen == ["0", "1", "2"]

    async def test_a_batch_whose_answer_is_lost(self, server: Redis) -> None:
        """It is sent again by itself: stored once, its receipt is that of an event which is no duplicate."""
        with Proxy(server.port) as proxy:
            way = server.url.replace(f":{server.port}", f":{proxy.port}") + "?lease=1&beat=0.25"
            async with opened(server.url) as seeing, opened(way) as broker:

                async def stored() -> list[str]:
                    return [message.id async for _, message in seeing.browse("notes", "earliest", follow=False)]

                async def both() -> bool:
                    return await stored() == ["1", "2"]

                def fresh_one(id: str) -> Message:
                    return Message(id=id, source="s", type="t", topic="notes", data=b"{}", fresh=True)

                await broker.declare([Topic("notes")], [])
                await broker.publish([fresh_one("1")])
                proxy.blackhole("replies")
                lost = asyncio.create_task(broker.publish([fresh_one("2")]))
                async with asyncio.timeout(60):
                    while not await both():
                        await asyncio.sleep(0.01)
                proxy.heal()
                [receipt] = await lost
                assert (receipt.id, receipt.duplicate) == ("2", False)
                assert await both()


@pytest.mark.parametrize(
    ("steps", "raised"),
    [
        (["unknown"], Unavailable),  # what the script is called is not known, and cannot be asked
        (["away"], Unavailable),
        (["cut", "cut"], PublishUnknown),
        (["cut", "away"], PublishUnknown),
        (["cut", "unknown"], PublishUnknown),
    ],
)
async def test_what_is_known_of_an_append(steps: list[str], raised: type[Exception]) -> None:
    """Unavailable: nothing was sent. What was sent once and not answered may be stored."""
    broker: Any = connect("redis://localhost")
    left = list(steps)

    async def digest(_: str) -> str:
        if left[0] == "unknown":
            raise Unavailable("nobody tells")
        return "sha"

    class Line:
        async def connect(self) -> None:
            if left[0] == "away":
                raise redis.exceptions.ConnectionError("away")

        async def ask(self, *_: Any) -> None:
            raise redis.exceptions.ConnectionError(left.pop(0))

    broker._digest, broker._line = digest, Line()
    with pytest.raises(raised):
        await broker._sent(())


async def test_a_reader_that_a_bug_ends_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = connect("redis://localhost")
    assert isinstance(broker, RedisBroker)

    async def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(RedisFeed, "_read", bug)
    feed = RedisFeed(broker)
    feed.seek("token", "t", 0, 0)
    for _ in range(2):
        with pytest.raises(Unavailable, match="stentor redis reader ended: ZeroDivisionError: a bug"):
            await feed.read(10, 10.0)
    await feed.close()
