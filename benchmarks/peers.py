"""Peers that keep events in memory: each publishes typed orders and waits until its handler has seen all of them.

Each is used as its documentation shows; what it cannot do (decode, confirm) it does not do here either. They are
imported where they are used, because none of them has to be installed.
"""

import asyncio
import os
from pathlib import Path

from benchmarks.measure import Figures, timed
from benchmarks.order import PlainOrder, fields, plain_orders


def blinker(_: Path) -> Figures:
    """Signals: a plain call of the handler, with the object as it is."""
    from blinker import Signal

    count = 30_000
    signal = Signal()
    seen = 0

    def handle(_: object, order: PlainOrder) -> None:
        nonlocal seen
        seen += 1

    signal.connect(handle)
    events = plain_orders(count)
    with timed() as taken:
        for event in events:
            signal.send(None, order=event)
    assert seen == count
    return {"us": taken() / count * 1e6}


def taskiq(_: Path) -> Figures:
    """The in-memory broker, which parses the parameter with pydantic; each task is awaited in place."""
    from taskiq import InMemoryBroker

    from benchmarks.pydantic_order import PydanticOrder

    count = 3_000
    broker = InMemoryBroker(await_inplace=True)
    seen = 0

    @broker.task
    async def handle(order: PydanticOrder) -> None:
        nonlocal seen
        assert isinstance(order, PydanticOrder)
        seen += 1

    events = [PydanticOrder(**fields(number)) for number in range(count)]

    async def main() -> Figures:
        await broker.startup()
        with timed() as taken:
            for event in events:
                await handle.kiq(event)
        await broker.shutdown()
        assert seen == count
        return {"us": taken() / count * 1e6}

    return asyncio.run(main())


def faststream(_: Path) -> Figures:
    """The in-memory broker for tests, which runs the handler inside ``publish``; it parses with pydantic."""
    from faststream.nats import NatsBroker, TestNatsBroker

    from benchmarks.pydantic_order import PydanticOrder

    count = 2_000
    broker = NatsBroker(logger=None)
    seen = 0

    @broker.subscriber("orders")
    async def handle(order: PydanticOrder) -> None:
        nonlocal seen
        assert isinstance(order, PydanticOrder)
        seen += 1

    events = [PydanticOrder(**fields(number)) for number in range(count)]

    async def main() -> Figures:
        async with TestNatsBroker(broker) as running:
            with timed() as taken:
                for event in events:
                    await running.publish(event, "orders")
        assert seen == count
        return {"us": taken() / count * 1e6}

    return asyncio.run(main())


def bubus(_: Path) -> Figures:
    """Typed pydantic events on a bus that keeps a history; each is awaited."""
    os.environ["BUBUS_LOGGING_LEVEL"] = "CRITICAL"
    from bubus import BaseEvent, EventBus

    class OrderPlaced(BaseEvent[None]):
        order_id: str
        customer: str
        amount: float
        currency: str
        items: list[str]
        sent: int
        note: str

    count = 300
    seen = 0

    async def handle(event: OrderPlaced) -> None:
        nonlocal seen
        seen += 1

    async def main() -> Figures:
        bus = EventBus()
        bus.on(OrderPlaced, handle)
        events = [OrderPlaced(**fields(number)) for number in range(count)]
        with timed() as taken:
            for event in events:
                await bus.dispatch(event)
        await bus.stop()
        assert seen == count
        return {"us": taken() / count * 1e6}

    return asyncio.run(main())
