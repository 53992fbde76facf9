"""What the peers' modules share: many tasks that publish, and the watch of a handler."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from benchmarks.measure import timed


async def by_tasks(publish: Callable[[Any], Awaitable[Any]], events: Sequence[Any], tasks: int) -> float:
    """Events a second that so many tasks publish, each awaiting its own event before the next."""

    async def one(mine: Sequence[Any]) -> None:
        for event in mine:
            await publish(event)

    with timed() as taken:
        async with asyncio.TaskGroup() as group:
            for number in range(tasks):
                group.create_task(one(events[number::tasks]))
    return len(events) / taken()


class Seen:
    """What a peer's handler has seen: starts the watch at the first event, and tells of the last."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.first = 0.0
        self.last = 0.0
        self.all = asyncio.Event()

    def add(self, count: int = 1) -> None:
        self.first = self.first or time.perf_counter()
        self.left -= count
        if self.left <= 0:
            self.last = time.perf_counter()
            self.all.set()

    def elapsed(self) -> float:
        """Seconds since the first event."""
        return time.perf_counter() - self.first
