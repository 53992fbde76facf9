"""The stage of a test: a broker, apps that run on it, a publisher, and waiting for a condition with a deadline."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import pytest

from stentor.app import App
from stentor.broker import Broker, Features
from stentor.clock import Clock, SystemClock
from stentor.connect import connect
from stentor.message import DeadLetter, Lag, Message, Receipt, dead_topic, decode_dead_letter
from stentor.parking import Wish, encode_wish
from stentor.program import Program
from stentor.testing.conformance.events import ALWAYS
from stentor.testing.conformance.faults import FaultyBroker

Make = Callable[[str, Clock], Broker]
PATIENCE = float(os.environ.get("STENTOR_CONFORMANCE_PATIENCE", "60"))
"""Seconds that a condition may take to come true; more for a broker that is far away, or a machine that is busy."""
LEASE = max(min(1.0, PATIENCE / 20), PATIENCE / 60)
"""A lease for tests, in seconds: short, as they wait for its end, and yet kept by a process that gets its turn late."""
LATE = 2 * LEASE
"""Seconds by which something timed may be late."""


async def until(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """Wait until ``condition()`` (or what it awaits to) is true, and return it; fails after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    pause = 0.002
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline:
            name = getattr(condition, "__qualname__", "the condition")
            raise AssertionError(f"not within {patience:g} s: {what or name}")
        await asyncio.sleep(pause)
        pause = min(pause * 1.2, 0.05)


class JumpingClock(SystemClock):
    """The machine's clock, which a test can set; timers run on, as they do when NTP sets a clock."""

    def __init__(self) -> None:
        self._set = 0.0
        self._passed = 0.0

    def now(self) -> float:
        return time.time() + self._set + self._passed

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back."""
        self._set += seconds

    def skip(self, seconds: float) -> None:
        """Let time pass, except for timers."""
        self._passed += seconds


class Stage:
    """One broker and what plays on it.

    A broker that other processes can share is opened once for each app, as each process would; any other is opened once
    and shared by the apps.
    """

    def __init__(self, url: str, make: Make, clock: Clock | None = None) -> None:
        self.url = url
        self.clock = clock or SystemClock()
        self._make = make
        self._open: list[Broker] = []

    async def start(self) -> None:
        self.broker = await self._connect()
        self.features: Features = self.broker.features
        self.producer = self.app("producer")
        self._connection = self.producer.running(broker=self.broker, connect_only=True)
        await self._connection.__aenter__()

    async def stop(self) -> None:
        await self._connection.__aexit__(None, None, None)
        for broker in reversed(self._open):
            await broker.close()
        self._open.clear()

    async def _connect(self) -> Broker:
        broker = self._make(self.url, self.clock)
        await broker.open()
        self._open.append(broker)
        return broker

    async def another(self) -> Broker:
        """The broker as another process sees it."""
        return await self._connect() if self.features.shared else self.broker

    # ---- apps ---------------------------------------------------------------------------------------------------

    def app(self, name: str = "shop") -> App:
        app = App(name, clock=self.clock)
        for cls in ALWAYS:
            app.catalog.add(cls)
        return app

    @asynccontextmanager
    async def running(self, app: App, grace: str = "5s", **options: Any) -> AsyncIterator[Program]:
        """Run an app on this broker; its faults can be set on ``program.broker`` (a FaultyBroker)."""
        inner = await self.another()
        try:
            async with app.running(broker=FaultyBroker(inner), grace=grace, **options) as program:
                yield program
        finally:
            if inner is not self.broker:
                self._open.remove(inner)
                await inner.close()

    # ---- publishing and looking -----------------------------------------------------------------------------------

    async def publish(self, events: Any, **options: Any) -> Any:
        return await self.producer.publish(events, **options)

    async def send(self, *messages: Message) -> Sequence[Receipt]:
        """Publish messages as they are, valid or not."""
        return await self.broker.publish(messages)

    async def browse(self, topic: str) -> list[Message]:
        """All messages that a topic holds."""
        return [message async for _, message in self.broker.browse(topic, "earliest", follow=False)]

    async def position(self, receipt: Receipt) -> int:
        """Where a published event lies: its receipt says so, or nothing."""
        found = self.broker.browse(receipt.topic, "earliest", follow=False)
        [place] = [place async for place, message in found if message.id == receipt.id]
        assert receipt.position in (place, None)
        return place

    async def letters(self, group: str) -> list[DeadLetter]:
        """The dead letters of a group, oldest first."""
        return [decode_dead_letter(message.data) for message in await self.browse(dead_topic(group))]

    async def dead(self, group: str, count: int = 1) -> list[DeadLetter]:
        """The dead letters of a group, once there are ``count`` of them."""

        async def enough() -> list[DeadLetter] | None:
            found = await self.letters(group)
            return found if len(found) >= count else None

        found: list[DeadLetter] = await until(enough, f"{count} dead letters of {group}")
        assert len(found) == count, found
        return found

    async def redrive(self, letter: DeadLetter, *, redrive: bool = True) -> None:
        """Ask the owner of a dead letter's partition to handle it again, or to forget it."""
        value = encode_wish(Wish(redrive=redrive, letter=letter))
        await self.broker.admin.mark(letter.group, letter.message.topic, letter.partition, f"m/{letter.id}", value)

    async def edge(self) -> datetime:
        """A moment between all that is stored and all that will be, for clocks that differ by a little."""
        moment = self.clock.now() + 0.05
        await until(lambda: self.clock.now() > moment + 0.05)
        return datetime.fromtimestamp(moment, UTC)

    async def lag(self, group: str) -> list[Lag]:
        return [lag for lag in await self.broker.admin.lag() if lag.group == group]

    async def waiting(self, group: str) -> int:
        """Events that a group has not settled, in the log."""
        return sum(lag.events for lag in await self.lag(group))

    async def parked(self, group: str) -> int:
        """Events that a group keeps in its journal."""
        return sum(lag.parked for lag in await self.lag(group))

    async def settled(self, *groups: str, patience: float = PATIENCE) -> None:
        """Wait until groups have nothing left to do."""

        async def done() -> bool:
            lags = await self.broker.admin.lag()
            left = {lag.group for lag in lags if lag.events + lag.parked}
            return not left.intersection(groups) and {lag.group for lag in lags}.issuperset(groups)

        await until(done, f"nothing left for {', '.join(groups)}", patience)


class Scene:
    """What every class of the suite gets: the fixtures ``broker_url`` (yours) and ``stage``, and the hooks."""

    pytestmark = pytest.mark.conformance

    @pytest.fixture
    def broker_url(self) -> str:
        """The URL of a fresh, empty broker: override it."""
        raise NotImplementedError("a conformance class has a fixture broker_url")

    def make_broker(self, url: str, clock: Clock) -> Broker:
        """Make a broker that is not open yet; override it for a broker that no URL scheme stands for."""
        return connect(url, clock)

    @pytest.fixture
    def stage_clock(self) -> JumpingClock:
        return JumpingClock()

    @pytest.fixture
    async def stage(self, broker_url: str, stage_clock: JumpingClock) -> AsyncIterator[Stage]:
        stage = Stage(broker_url, self.make_broker, stage_clock)
        await stage.start()
        try:
            yield stage
        finally:
            await stage.stop()


Handler = Callable[..., Awaitable[Any]]
