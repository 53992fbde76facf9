"""What the harness lets go wrong: handlers that fail on demand, and processes that die at a chosen point."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from stentor.broker import Owner
from stentor.brokers.memory import MemoryBroker, MemoryConsumer
from stentor.message import Delivery, Failure, Message, Partition, Settlement
from stentor.plan import Route
from stentor.subscription import Subscription
from stentor.worker import Worker

Point = Literal["received", "started", "before_settle", "after_settle"]
POINTS = ("received", "started", "before_settle", "after_settle")
FOREVER = 1e6
"""Seconds that a fetch may wait: the harness has no use for its time-out."""


class Crash:
    """A process that is to die when a handler's next delivery reaches a point."""

    def __init__(self, group: str, names: frozenset[str], at: Point) -> None:
        self.group = group
        self.names = names
        """Event types, and topics, of the handler."""
        self.at = at
        self.hit = False
        self.handled: tuple[Partition, int] | None = None
        """The delivery whose handler has ended, for the points about settling."""

    def concerns(self, message: Message) -> bool:
        return message.type in self.names or f"topic {message.topic}" in self.names


class Faults:
    """The faults that are armed; ``kill`` is called with the group whose worker dies."""

    def __init__(self, kill: Callable[[str], Any]) -> None:
        self._kill = kill
        self.armed: list[Crash] = []

    def find(self, group: str, *points: Point) -> Crash | None:
        return next((c for c in self.armed if c.group == group and c.at in points), None)

    async def strike(self, crash: Crash) -> None:
        """Kill the worker that runs this; never returns."""
        self.armed.remove(crash)
        crash.hit = True
        self._kill(crash.group)
        await asyncio.get_running_loop().create_future()


class FaultyBroker(MemoryBroker):
    """The memory broker, with its faults; it keeps every message that was stored, in order."""

    faults: Faults
    stored: list[Message]

    async def subscribe(self, subscription: Subscription, owner: Owner) -> Any:
        return _Consumer(await super().subscribe(subscription, owner), subscription.group, self.faults)

    def _store(self, message: Message, now: float) -> int:
        self.stored.append(message)
        return super()._store(message, now)

    def again(self, message: Message) -> None:
        """Store a message a second time, as a broker without a dedup window would."""
        self._append([message])


class _Consumer:
    def __init__(self, inner: MemoryConsumer, group: str, faults: Faults) -> None:
        self._inner = inner
        self._group = group
        self._faults = faults
        self.until = inner.until
        self.sure = inner.sure
        self.start = inner.start
        self.names = inner.names
        self.read = inner.read
        self.marks = inner.marks
        self.close = inner.close
        self.abandon = inner.abandon

    async def fetch(self, limit: int, wait: float) -> Sequence[Delivery]:  # noqa: ARG002 - see FOREVER
        found = await self._inner.fetch(limit, FOREVER)
        crash = self._faults.find(self._group, "received")
        if crash is not None and any(crash.concerns(delivery.message) for delivery in found):
            await self._faults.strike(crash)
        return found

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Failure]:
        crash = self._faults.find(self._group, "before_settle", "after_settle")
        ended = crash is not None and any((s.partition, s.offset) == crash.handled for s in settlements)
        if crash is not None and ended and crash.at == "before_settle":
            await self._faults.strike(crash)
        failures = await self._inner.settle(settlements)
        if crash is not None and ended:
            await self._faults.strike(crash)
        return failures


async def kill(worker: Worker) -> None:
    """End a worker as SIGKILL does: nothing more of it reaches the broker."""
    worker.stopping = True
    tasks: list[asyncio.Task[Any]] = [*worker._tasks, *worker.parking.loads, *worker.runners]
    for share in worker.shares.values():
        share.gone = True
        tasks += share.duties
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    consumer: Any = worker.consumer
    await consumer.abandon()


async def crash_point(faults: Faults, route: Route, group: str, delivery: Delivery, *, ended: bool) -> None:
    """Called before and after a handler runs: strike, or note which delivery is to be settled."""
    if not ended:
        crash = faults.find(group, "started")
        if crash is not None and set(route.handler.names) & crash.names:
            await faults.strike(crash)
        return
    crash = faults.find(group, "before_settle", "after_settle")
    if crash is not None and crash.handled is None and set(route.handler.names) & crash.names:
        crash.handled = (delivery.partition, delivery.offset)
