"""Stentor's side of every benchmark, by its public surface only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.measure import Figures
from benchmarks.order import chunks, fields
from benchmarks.outstanding import by_tasks
from stentor import App, Event, Group


class Order(Event, topic="orders", key="order_id", type="bench.order"):
    order_id: str
    customer: str
    amount: float
    currency: str
    items: list[str]
    sent: int
    note: str


def orders(count: int, first: int = 0) -> list[Order]:
    return [Order(**fields(number)) for number in range(first, first + count)]


def url(path: Path) -> str:
    return f"sqlite:///{path.absolute()}"


class Counter:
    """Counts what a handler saw, and wakes whoever waits for the last event."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.first = 0.0
        self.done = asyncio.Event()

    def add(self) -> None:
        if not self.first:
            self.first = time.perf_counter()
        self.left -= 1
        if self.left == 0:
            self.done.set()


def counting_app(broker: str, counter: Counter, group: str = "bench") -> App:
    """An app with one handler of orders, in a group that keeps order by key."""
    app = App("bench", broker=broker)

    @app.on(Order, group=Group(group))
    async def count(order: Order) -> None:
        counter.add()

    return app


@asynccontextmanager
async def publishing(broker: str) -> AsyncIterator[App]:
    """An app without groups of its own, connected to publish."""
    app = App("bench-publisher", broker=broker)
    app.publishes(Order)
    async with app.connected():
        yield app


async def settled(app: App, group: str = "bench") -> None:
    """Return when nothing waits for a group any more: all is handled and acknowledged."""
    while any(lag.events or lag.parked for lag in await app.broker.admin.lag() if lag.group == group):
        await asyncio.sleep(0)


async def measured(broker: str, count: int, tasks: int, size: int = 1) -> Figures:
    """So many tasks publish, one event or a list of ``size`` a call; then a group that keeps order by key handles all,
    from the first handled to the last acknowledged.
    """
    async with publishing(broker) as app:
        events = orders(count) if size == 1 else chunks(orders(count), size)
        published = await by_tasks(app.publish, events, tasks) * size
    counter = Counter(count)
    app = counting_app(broker, counter)
    async with app.running(new_groups=True):
        await counter.done.wait()
        await settled(app)
        taken = time.perf_counter() - counter.first
    return {"consume": count / taken, "publish": published}
