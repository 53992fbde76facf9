"""What ``stentor doctor`` is told of each server: what is well, and what its settings put at risk."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stentor.broker import Broker, Finding
from stentor.brokers import findings, postgresql
from stentor.connect import connect
from stentor.event import Topic
from stentor.testing.conformance import Rules  # noqa: F401  first: it has asserts rewritten
from tests.real import brokers, url_of

server = [pytest.mark.server, pytest.mark.slow]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Any]:
    broker = connect(url)
    await broker.open()
    try:
        await broker.declare([Topic("orders")], [])
        yield broker
    finally:
        await broker.close()


async def review(broker: Broker) -> dict[str, Finding]:
    return {finding.check: finding for finding in await broker.review()}


class TestServers:
    pytestmark = server

    @pytest.mark.parametrize("kind", brokers())
    async def test_of_the_tests_is_well_set_up(
        self, kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        async with opened(url_of(kind, tmp_path, tmp_path_factory)) as broker:
            found = await review(broker)
        assert [finding for finding in found.values() if finding.verdict != "ok"] == []
        assert len(found) >= 3

    @pytest.mark.parametrize(
        ("kind", "check"),
        [
            ("redis", "appendfsync"), ("kafka", "retention.ms"), ("rocketmq", "fileReservedTime"),
            ("rocketmq", "cleanFileForciblyEnable"), ("nats", "retention"),
        ],
    )  # fmt: skip
    async def test_a_weaker_setting_is_told(
        self, kind: str, check: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        async with opened(url_of(kind, tmp_path, tmp_path_factory)) as broker:
            await WEAKEN[kind](broker, True)
            try:
                found = await review(broker)
            finally:
                await WEAKEN[kind](broker, False)
            assert found[check].verdict != "ok"
            assert found[check].advice
            assert (await review(broker))[check].verdict == "ok"

    async def test_an_old_transaction_is_told(
        self, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(postgresql, "OLD", 0.0)
        async with opened(url_of("postgresql", tmp_path, tmp_path_factory)) as broker:
            async with await broker.native() as connection, connection.transaction():
                await connection.execute("SELECT 1")
                found = await review(broker)
            assert "vacuum frees nothing" in found["transactions"].advice


async def redis(broker: Any, weak: bool) -> None:
    await broker.native.config_set("appendfsync", "everysec" if weak else "always")


async def kafka(broker: Any, weak: bool) -> None:
    from confluent_kafka import admin

    here: Any = admin
    value = "1000" if weak else "-1"
    entry = here.ConfigEntry("retention.ms", value, incremental_operation=here.AlterConfigOpType.SET)
    topic = here.ConfigResource(here.ResourceType.TOPIC, f"{broker.prefix}orders", incremental_configs=[entry])
    await broker._answer(broker._asked().incremental_alter_configs([topic]))


async def rocketmq(broker: Any, weak: bool) -> None:
    settings = f"fileReservedTime={72 if weak else 8760}\ncleanFileForciblyEnable={str(weak).lower()}\n"
    for _, address in await broker.masters():
        await broker._call(address, 25, {}, settings.encode())


async def nats(broker: Any, weak: bool) -> None:
    config = (await broker._info(f"{broker.prefix}orders"))["config"]
    await broker.link.api(f"STREAM.UPDATE.{config['name']}", **(config | {"max_msgs": 1000 if weak else -1}))


WEAKEN: dict[str, Callable[[Any, bool], Awaitable[None]]] = {
    "redis": redis, "kafka": kafka, "rocketmq": rocketmq, "nats": nats,
}  # fmt: skip


def test_a_version_that_is_too_old() -> None:
    assert findings.version("Redis", "7.0.15", (7,)).verdict == "ok"
    assert findings.version("NATS", "2.10.4-beta", (2, 9)).verdict == "ok"
    assert findings.version("RabbitMQ", "3.9.1", (3, 10)).verdict == "fail"


def test_a_clock_that_is_apart() -> None:
    assert findings.clock(100.0, 99.0, 101.0).verdict == "ok"
    assert "50 s behind" in findings.clock(100.0, 150.0, 150.1).found
    assert "50 s ahead of" in findings.clock(200.1, 150.0, 150.1).found


def test_room_that_is_nearly_used() -> None:
    assert findings.room("memory", 70, 100, "x").verdict == "ok"
    assert findings.room("memory", 90, 100, "publishers are refused").advice == "at the limit publishers are refused"
    assert findings.room("memory", 90, 0, "x").verdict == "ok"


def test_a_setting_that_may_not_be_read() -> None:
    found = findings.setting("appendonly", None, ["yes"], "events can be lost")
    assert (found.verdict, found.found) == ("warn", "this user may not read it")
    assert "yes" in found.advice
