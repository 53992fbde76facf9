"""What the engine of the server brokers does when the server fails in the middle of a step."""

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stentor.brokers.log import LogBroker
from stentor.brokers.log_consumer import Ownership
from stentor.brokers.storage import Write
from stentor.connect import connect
from stentor.errors import LeaseLost, StentorError, Unavailable, UnknownTopic
from stentor.event import Topic
from stentor.message import Delivery, Message, Outcome, Partition, Settlement
from stentor.subscription import Subscription
from tests.real import brokers, url_of

pytestmark = [pytest.mark.server, pytest.mark.slow]


class Taker:
    """A worker that takes what it is given."""

    def __init__(self) -> None:
        self.owned: list[Partition] = []

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        self.owned += partitions

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        self.lost(partitions)

    def lost(self, partitions: Sequence[Partition]) -> None:
        self.owned = [partition for partition in self.owned if partition not in partitions]


@pytest.mark.parametrize("kind", brokers())
async def test_a_takeover_that_fails_half_way_is_done_again(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes away when a dead member's partitions are claimed and not all of them looked at."""
    broker: Any = connect(url_of(kind, tmp_path / "x", tmp_path_factory))
    assert isinstance(broker, LogBroker)
    await broker.open()
    try:
        await broker.declare([Topic("t", partitions=4)], [])
        subscription = Subscription(group="g", topics=("t",))
        await broker.declare([], [subscription])
        group = (await broker.group("g")).id
        for index in range(4):
            space = broker.space(group, "t", index)
            [free] = await broker.get([(space, "!owner")])
            dead = msgspec.msgpack.encode(Ownership(3, "dead"))
            assert await broker.write([Write(space, ("!owner", free), {"!owner": dead})]) == [True]
        await broker.publish(
            [Message(id=str(n), source="s", type="x", topic="t", data=b"{}", key=str(n)) for n in range(40)]
        )
        bounds = broker.bounds
        asked: list[str] = []

        stored = (await broker.topic("t")).stored

        async def failing(topic: str, partitions: Sequence[int]) -> Any:
            asked.append(topic)
            if topic == stored and asked.count(stored) == 3:
                raise Unavailable("planned")
            return await bounds(topic, partitions)

        monkeypatch.setattr(broker, "bounds", failing)
        owner = Taker()
        consumer = await broker.subscribe(subscription, owner)
        try:
            with pytest.raises(Unavailable, match="planned"):
                await consumer.start()
            monkeypatch.setattr(broker, "bounds", bounds)
            await consumer.balance()
            assert sorted(partition.index for partition in owner.owned) == [0, 1, 2, 3]
            found: set[str] = set()
            async with asyncio.timeout(60):
                while len(found) < 40:
                    found.update(delivery.message.id for delivery in await consumer.fetch(100, 1.0))
        finally:
            await consumer.close()
    finally:
        await broker.close()


@pytest.mark.parametrize("kind", brokers())
async def test_what_could_not_be_given_back_is_given_back_again(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes away when a member gives partitions up for another that joined."""
    url = url_of(kind, tmp_path / "x", tmp_path_factory)
    first: Any = connect(url)
    second: Any = connect(url)
    await first.open()
    await second.open()
    consumers = []
    try:
        await first.declare([Topic("t", partitions=4)], [])
        subscription = Subscription(group="g", topics=("t",))
        await first.declare([], [subscription])
        owners = [Taker(), Taker()]
        for broker, owner in zip((first, second), owners, strict=True):
            consumers.append(await broker.subscribe(subscription, owner))
        write = first.write

        async def failing(writes: Sequence[Write]) -> Any:
            if any("!owner" in one.changes for one in writes):
                raise Unavailable("planned")
            return await write(writes)

        old, new = consumers
        await old.start()
        monkeypatch.setattr(first, "write", failing)
        await new.start()
        async with asyncio.timeout(60):
            while len(old.held) > 2:  # by itself, or here
                with contextlib.suppress(Unavailable):
                    await old.balance()
            monkeypatch.setattr(first, "write", write)
            while len(owners[1].owned) < 2:
                await old.balance()
                await new.balance()
        assert sorted(partition.index for owner in owners for partition in owner.owned) == [0, 1, 2, 3]
    finally:
        for consumer in consumers:
            await consumer.close()
        await first.close()
        await second.close()


@pytest.mark.parametrize("trouble", [False, True])
@pytest.mark.parametrize("kind", brokers())
async def test_an_output_that_is_refused_fails_its_event_only(
    kind: str,
    trouble: bool,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and acks of many events are one step, which the server refuses for one of them (no right, say).

    With trouble, the server goes away once the others are settled one by one: what it has is not stored again.
    """
    url = url_of(kind, tmp_path / "x", tmp_path_factory)
    broker: Any = connect(f"{url}{'&' if '?' in url else '?'}transactions=1" if kind == "kafka" else url)
    await broker.open()
    if not broker.features.atomic:
        await broker.close()
        pytest.skip("outputs are stored before the acks, each by itself")
    try:
        await broker.declare([Topic("t", partitions=4), Topic("out", partitions=4)], [])
        subscription = Subscription(group="g", topics=("t",))
        await broker.declare([], [subscription])
        await broker.publish([message("t", str(n)) for n in range(40)])
        write, refused, away = broker.write, {"7", "23"}, False

        async def refusing(writes: Sequence[Write]) -> Any:
            nonlocal away
            ids = {entry.message.id[1:] for one in writes for entry in one.outputs}
            if away:
                raise Unavailable("planned")
            if ids & refused:
                raise UnknownTopic("planned")
            away = trouble and bool(ids)
            return await write(writes)

        async def settled(consumer: Any, found: list[Delivery]) -> dict[str, StentorError]:
            acks = [
                Settlement(one.partition, one.offset, Outcome.ACK, [message("out", f"o{one.message.id}")], {})
                for one in found
            ]
            failures = await consumer.settle(acks)
            return {failure.settlement.outputs[0].id[1:]: failure.error for failure in failures}

        monkeypatch.setattr(broker, "write", refusing)
        consumer = await broker.subscribe(subscription, Taker())
        await consumer.start()
        failed = await settled(consumer, await some(consumer, 40))
        if trouble:
            assert away
            assert {type(error) for error in failed.values()} == {LeaseLost}
            away = trouble = False
        else:
            assert {id: type(error) for id, error in failed.items()} == dict.fromkeys(refused, UnknownTopic)
        monkeypatch.setattr(broker, "write", write)
        await consumer.close()
        stored = [found.id[1:] async for _, found in broker.browse("out", "earliest", follow=False)]
        left = {str(n) for n in range(40)} - set(stored)
        assert refused <= left
        consumer = await broker.subscribe(subscription, Taker())
        try:
            await consumer.start()
            again = await some(consumer, len(left))
            assert {delivery.message.id for delivery in again} == left, "what is stored is done, and nothing else"
            assert await settled(consumer, again) == {}
        finally:
            await consumer.close()
        stored = [found.id[1:] async for _, found in broker.browse("out", "earliest", follow=False)]
        assert sorted(stored) == sorted(str(n) for n in range(40))
    finally:
        await broker.close()


def message(topic: str, id: str) -> Message:
    return Message(id=id, source="s", type="x", topic=topic, data=b"{}", key=id)


async def some(consumer: Any, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await consumer.fetch(100, 1.0)
    return found
