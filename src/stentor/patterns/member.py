"""The one member of a group: for programs that read, or write down, what a group has, in place of its workers."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence

from stentor.broker import Broker, Consumer
from stentor.errors import StentorError
from stentor.message import Message, Partition
from stentor.subscription import Subscription

PATIENCE = 30.0
"""Seconds without anything new after which what is missing will not come; longer than the lease of a dead process."""
FETCH = 1000


class MirrorError(StentorError):
    """A topic or group cannot be moved as it is; the text says what to do."""


def identity(message: Message) -> int:
    """Source and id of a message, in 64 bits."""
    text = f"{message.source}\0{message.id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


class Member:
    """A member of a declared group that owns all its partitions, as long as nobody else is there."""

    consumer: Consumer

    def __init__(self, broker: Broker, subscription: Subscription) -> None:
        self._broker = broker
        self._subscription = subscription
        self.partitions: dict[tuple[str, int], Partition] = {}
        """What is owned now, by topic and index."""

    async def join(self) -> Member:
        self.consumer = await self._broker.subscribe(self._subscription, self)
        await self.consumer.start()
        return self

    async def leave(self) -> None:
        """Give back what is owned; nothing that was only read is settled by it."""
        await self.consumer.close()

    async def assigned(self, partitions: Sequence[Partition]) -> None:
        self.partitions |= {(partition.topic, partition.index): partition for partition in partitions}

    async def revoked(self, partitions: Sequence[Partition]) -> None:
        self.lost(partitions)

    def lost(self, partitions: Sequence[Partition]) -> None:
        for partition in partitions:
            if self.partitions.get((partition.topic, partition.index)) is partition:
                del self.partitions[partition.topic, partition.index]

    async def own(self, topic: str, index: int = 0) -> Partition:
        """A partition, once it is owned. Raises MirrorError when another process keeps it."""
        deadline = time.monotonic() + PATIENCE
        while (topic, index) not in self.partitions:
            if time.monotonic() > deadline:
                raise MirrorError(
                    f"another process is a member of {self._subscription.name} on {self._broker}; one may run at a time"
                )
            await asyncio.sleep(0.05)
        return self.partitions[topic, index]

    async def unsettled(self) -> AsyncIterator[tuple[Partition, int, str, Message]]:
        """All that the group has still to do: partition, offset, replay and message; nothing is settled.

        Raises MirrorError when the broker does not deliver what it says is waiting, or others join.
        """
        name, count, quiet = self._subscription.name, 0, time.monotonic()
        owned = dict(self.partitions)
        while True:
            found = await self.consumer.fetch(FETCH, 0.2)
            for delivery in found:
                yield delivery.partition, delivery.offset, delivery.replay, delivery.message
            count += len(found)
            if self.partitions != owned:
                raise MirrorError(f"a worker of {name} was started on {self._broker}; stop it, and begin again")
            if found:
                quiet = time.monotonic()
                continue
            waiting = sum(lag.events for lag in await self._broker.admin.lag() if lag.group == name)
            if count >= waiting:
                return
            if time.monotonic() - quiet > PATIENCE:
                raise MirrorError(f"{self._broker} says that {name} has {waiting:,} events to do, and gives {count:,}")


async def alone(broker: Broker, group: str) -> None:
    """Wait until no process is a member of a group; a killed one counts until its lease is over.

    Raises MirrorError when members stay.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        members = sum(info.members for info in await broker.admin.groups() if info.name == group)
        if not members:
            return
        if time.monotonic() > deadline:
            raise MirrorError(
                f"group {group} has {members} running members on {broker}; stop its workers first, or copy events "
                "alone with --no-groups"
            )
        await asyncio.sleep(0.2)
