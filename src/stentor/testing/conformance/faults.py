"""Faults between a worker and its broker: a crash at a chosen point, a refused settlement, a broker that is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Literal

from stentor.broker import Admin, Broker, Consumer, Features, Finding, Owner, Start
from stentor.errors import StentorError
from stentor.event import Topic
from stentor.message import Delivery, Failure, Mark, Message, Outcome, Partition, Receipt, Settlement
from stentor.subscription import Subscription

Point = Literal["received", "started", "before_settle", "after_settle"]
At = Callable[[Point, Message], Awaitable[None]]
"""Called when a message passes a point; it may end the process, or never return."""
Refuse = Callable[[Settlement], StentorError | None]


class FaultyBroker:
    """A broker that does what the one inside it does, except for the faults that are set on it."""

    def __init__(self, inner: Broker, at: At | None = None) -> None:
        self.inner = inner
        self.features: Features = inner.features
        self.at = at
        self.refuse: Refuse | None = None
        """Settlements that are refused, with their error."""
        self.away: StentorError | None = None
        """Raised by every fetch, settle and publish while it is set."""
        self.unconfirmed: Callable[[Sequence[Message]], StentorError | None] | None = None
        """Raised by a publish after it stored the messages."""
        self.gone = False
        """The process died: nothing returns any more."""
        self.paused = False
        """The process stands still: nothing is fetched."""
        self.consumers: list[FaultyConsumer] = []

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def admin(self) -> Admin:
        return self.inner.admin

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def declare(self, topics: Sequence[Topic], subscriptions: Sequence[Subscription]) -> None:
        await self.inner.declare(topics, subscriptions)

    async def publish(self, messages: Sequence[Message]) -> Sequence[Receipt]:
        await self.check()
        receipts = await self.inner.publish(messages)
        if self.unconfirmed is not None:
            error = self.unconfirmed(messages)
            if error is not None:
                raise error
        return receipts

    async def subscribe(self, subscription: Subscription, owner: Owner) -> FaultyConsumer:
        consumer = FaultyConsumer(self, await self.inner.subscribe(subscription, owner))
        self.consumers.append(consumer)
        return consumer

    def browse(self, topic: str, start: Start, *, follow: bool) -> AsyncIterator[tuple[int, Message]]:
        return self.inner.browse(topic, start, follow=follow)

    async def review(self) -> list[Finding]:
        return await self.inner.review()

    async def health(self) -> str | None:
        return str(self.away) if self.away is not None else await self.inner.health()

    async def check(self) -> None:
        if self.gone:
            await asyncio.get_running_loop().create_future()
        if (away := self.away) is not None:
            await asyncio.sleep(0)
            raise away


class FaultyConsumer:
    """A consumer of a FaultyBroker."""

    def __init__(self, broker: FaultyBroker, inner: Consumer) -> None:
        self.inner = inner
        self._broker = broker
        self._messages: dict[tuple[Partition, int], Message] = {}

    @property
    def until(self) -> float:
        return self.inner.until

    async def sure(self) -> None:
        await self.inner.sure()

    async def start(self) -> None:
        await self.inner.start()

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:
        await self._broker.check()
        found = await self.inner.fetch(limit, wait)
        if self._broker.paused:
            await asyncio.get_running_loop().create_future()
        at = self._broker.at
        if at is not None:
            for delivery in found:
                self._messages[delivery.partition, delivery.offset] = delivery.message
                await at("received", delivery.message)
        return found

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Failure]:
        await self._broker.check()
        await self._pass("before_settle", settlements)
        refuse = self._broker.refuse
        refused: list[Failure] = []
        if refuse is not None:
            refused = [Failure(s, error) for s in settlements if (error := refuse(s)) is not None]
            names = {id(failure.settlement) for failure in refused}
            settlements = [s for s in settlements if id(s) not in names]
        failures = [*refused, *await self.inner.settle(settlements)]
        await self._pass("after_settle", settlements)
        return failures

    async def _pass(self, point: Point, settlements: Sequence[Settlement]) -> None:
        at = self._broker.at
        if at is None:
            return
        for settlement in settlements:
            message = self._messages.get((settlement.partition, settlement.offset))
            if message is not None and settlement.outcome is Outcome.ACK:
                await at(point, message)

    async def names(self, partition: Partition) -> list[str]:
        return await self.inner.names(partition)

    async def read(self, partition: Partition, names: Sequence[str]) -> dict[str, bytes]:
        await self._broker.check()
        return await self.inner.read(partition, names)

    async def marks(self) -> Sequence[Mark]:
        await self._broker.check()
        return await self.inner.marks()

    async def close(self) -> None:
        await self.inner.close()

    async def abandon(self) -> None:
        """Leave as a killed process does; only brokers that no other process shares need it."""
        leave: Any = self.inner
        await leave.abandon()
