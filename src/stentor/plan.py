"""What a worker runs: the routes of a group, its settings, and what it counts."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from stentor.breaker import Breaker
from stentor.clock import Clock
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
    running: int = 0
    """Batches that run."""
    waiting: bool = False
    """A timer runs for what is pending."""
    waited: bool = False
    """It has run out: the next batch need not wait for more."""


LONGEST_WAIT = 60.0
"""Seconds after which a timer or source that keeps failing is tried again."""
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
    auto: bool = False
    """How many run at once is found by the limiter; ``concurrency`` is the most."""
    rate: float = 0.0
    """Events that begin a second, of all processes together; 0: no limit."""
    key_rate: float = 0.0
    """... of one key."""
    breaker: Breaker | None = None
    priority: int = 0
    """Groups of this process with a higher one begin first."""
    park: bool = False
    broadcast: bool = False
    duties: dict[str, Duty] = field(default_factory=dict)
    """By topic: what the owner of its partition 0 runs beside the events (timers, sources)."""

    def route(self, message: Message) -> Route | None:
        """What handles a message, if the group asks for it."""
        return self.routes.get(message.type) or self.topics.get(message.topic)


class Hold:
    """A time in which a worker fetches nothing and begins nothing; what runs goes on."""

    __slots__ = ("_clock", "_freed", "_poke", "_until", "reason")

    def __init__(self, clock: Clock, poke: Callable[[], None]) -> None:
        self._clock = clock
        self._poke = poke
        self._until = 0.0
        self._freed = asyncio.Event()
        self.reason: str | None = None
        """Why, in one line; None when nothing is held."""

    def set(self, seconds: float, reason: str) -> None:
        """Hold for a while from now; of two times the one that ends later counts."""
        until = self._clock.monotonic() + seconds
        if self.reason is None or until > self._until:
            self.reason, self._until = reason, until
            self._freed.clear()
            self._clock.call_later(seconds, self._free)

    def _free(self) -> None:
        if self.reason is not None and self._clock.monotonic() >= self._until:
            self.reason = None
            self._freed.set()
            self._poke()

    async def over(self) -> None:
        """Wait until nothing is held."""
        while self.reason is not None:
            await self._freed.wait()


@dataclass(slots=True)
class Counts:
    """What a worker did since it started."""

    handled: int = 0
    failed: int = 0
    retried: int = 0
    dead: int = 0
    skipped: int = 0
    refused: int = 0


async def keep(clock: Clock, log: logging.Logger, name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run what is to run until it returns; when it fails, again after a while."""
    wait = 1.0
    while True:
        began = clock.monotonic()
        try:
            await run()
            return
        except StentorError as error:
            log.warning("%s: %s; again in %.3g s", name, error, wait)
        except Exception:
            log.exception("%s failed; again in %.3g s", name, wait)
        if clock.monotonic() - began > LONGEST_WAIT:  # it had recovered from what failed before
            wait = 1.0
        await clock.sleep(wait)
        wait = min(wait * 2, LONGEST_WAIT)


class Duties:
    """What a timer or source may do while its partition is owned: keep a position, publish under the epoch."""

    __slots__ = ("_worker", "clock", "partition")

    def __init__(self, worker: Worker, partition: Partition) -> None:
        self._worker = worker
        self.partition = partition
        self.clock = worker.clock

    async def keep(self, duty: Duty) -> None:
        """Run a timer or source while the partition is owned; when it fails, again after a while."""
        await keep(self.clock, self._worker.log, self._worker.group, partial(duty, self))

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
