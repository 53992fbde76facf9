"""What a worker runs: the routes of a group, its settings, and what it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stentor.errors import StentorError
from stentor.event import EventSpec
from stentor.handler import Handler, Invoke
from stentor.lanes import Lane
from stentor.message import Message, Partition
from stentor.subscription import Subscription

if TYPE_CHECKING:
    from stentor.worker import Worker


@dataclass(slots=True, eq=False)
class Route:
    """A handler, ready to run: how its events are read, and what runs them."""

    handler: Handler
    spec: EventSpec | None
    invoke: Invoke
    pending: deque[Lane] = field(default_factory=deque)
    """For a batch handler: lanes whose head waits for the next batch."""
    armed: bool = False
    """A batch is about to be taken."""
    waiting: bool = False
    """... after its wait, or when it is full."""


Duty = Callable[["Duties"], Awaitable[None]]


@dataclass(slots=True)
class Plan:
    """A group as the worker runs it."""

    name: str
    subscription: Subscription
    routes: dict[str, Route]
    """By event type."""
    topics: dict[str, Route]
    """Handlers of whole topics, and of topics of plain JSON."""
    ordered: bool = True
    concurrency: int = 64
    park: bool = False
    broadcast: bool = False
    duties: dict[str, Duty] = field(default_factory=dict)
    """By topic: what the owner of its partition 0 runs beside the events (timers, sources)."""


@dataclass(slots=True)
class Counts:
    """What a worker did since it started."""

    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    skipped: int = 0
    refused: int = 0


class Duties:
    """What a timer or source may do while its partition is owned: keep a position, publish under the epoch."""

    __slots__ = ("_worker", "clock", "partition")

    def __init__(self, worker: Worker, partition: Partition) -> None:
        self._worker = worker
        self.partition = partition
        self.clock = worker.clock

    async def keep(self, duty: Duty) -> None:
        """Run a timer or source while the partition is owned; when it fails, again after a while."""
        group, log, wait = self._worker.group, self._worker.log, 1.0
        while True:
            try:
                await duty(self)
                return
            except StentorError as error:
                log.warning("%s: %s; again in %.3g s", group, error, wait)
            except Exception:
                log.exception("%s failed; again in %.3g s", group, wait)
            await self.clock.sleep(wait)
            wait = min(wait * 2, 60.0)

    async def read(self, name: str) -> bytes | None:
        """A journal value kept under ``s/<name>``."""
        return (await self._worker.consumer.read(self.partition, [f"s/{name}"])).get(f"s/{name}")

    async def write(self, name: str, value: bytes, outputs: Sequence[Message] = ()) -> None:
        """Publish ``outputs`` and keep ``value``: together where the broker can, else in this order.

        Raises:
            LeaseLost: another process has the partition now.
        """
        await self._worker.write(self.partition, {f"s/{name}": value}, outputs)

    async def publish(self, outputs: Sequence[Message], name: str, value: bytes | None) -> None:
        """``write``, or publish alone when there is no value to keep."""
        await self._worker.write(self.partition, {} if value is None else {f"s/{name}": value}, outputs)
