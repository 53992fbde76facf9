"""What is special about Redis: its faults, its security, and what it says when it cannot be used."""

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from stentor.connect import connect
from stentor.errors import AuthenticationFailed, ConfigError, StentorError, StorageFull, Unavailable
from stentor.event import Topic
from stentor.message import Message
from tests.faults import ServerFaults
from tests.real import fresh, server_url

pytestmark = [pytest.mark.server, pytest.mark.slow]


class TestRedisServer(ServerFaults):
    name = "redis"
    options = {"lease": 1, "beat": 0.25}  # noqa: RUF012


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("redis", tmp_path_factory, secure=True))


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh(server_url("redis", tmp_path_factory))


async def refused(url: str) -> str:
    """What ``open`` says of a URL that cannot be used."""
    broker = connect(url)
    with pytest.raises(StentorError) as raised:
        async with asyncio.timeout(20):
            await broker.open()
    return f"{type(raised.value).__name__}: {raised.value}"


async def test_tls_and_a_password(secure: str) -> None:
    broker = connect(secure)
    await broker.open()
    try:
        await broker.declare([Topic("t")], [])
        [receipt] = await broker.publish([Message(id="1", source="s", type="x", topic="t", data=b"{}")])
        assert receipt.position == 1
        assert [message.id async for _, message in broker.browse("t", "earliest", follow=False)] == ["1"]
    finally:
        await broker.close()


async def test_a_password_from_a_file(secure: str, tmp_path: Path) -> None:
    parts = urlsplit(secure)
    assert parts.password is not None
    file = tmp_path / "password"
    file.write_text("s3cret/päss\n", "utf-8")
    bare = secure.replace(f":{parts.password}@", "@")
    broker = connect(f"{bare}&password_file={file}")
    await broker.open()
    await broker.close()


async def test_a_wrong_password_fails_fast_in_one_line(secure: str) -> None:
    parts = urlsplit(secure)
    assert parts.password is not None
    said = await refused(secure.replace(parts.password, "wrong"))
    assert said.startswith(AuthenticationFailed.__name__)
    assert "wrong@" not in said
    assert "\n" not in said


async def test_an_unknown_authority_is_refused(secure: str) -> None:
    assert "certificate" in (await refused(secure.split("?")[0])).lower()


async def test_nobody_there() -> None:
    assert (await refused("redis://127.0.0.1:1")).startswith(Unavailable.__name__)


def test_options() -> None:
    with pytest.raises(ConfigError, match="unknown option colour"):
        connect("redis://localhost?colour=red")


async def test_a_full_server_refuses_and_loses_nothing(plain: str) -> None:
    broker = connect(plain)
    await broker.open()
    try:
        await broker.declare([Topic("t")], [])
        await broker.publish([Message(id="1", source="s", type="x", topic="t", data=b"{}")])
        native = getattr(broker, "native")  # noqa: B009  of this broker only
        await native.execute_command("CONFIG", "SET", "maxmemory", "1")
        try:
            with pytest.raises(StorageFull):
                await broker.publish([Message(id="2", source="s", type="x", topic="t", data=b"{}")])
        finally:
            await native.execute_command("CONFIG", "SET", "maxmemory", "0")
        await broker.publish([Message(id="3", source="s", type="x", topic="t", data=b"{}")])
        assert [message.id async for _, message in broker.browse("t", "earliest", follow=False)] == ["1", "3"]
    finally:
        await broker.close()
