"""In memory: from publish to settled, beside buses and test brokers that keep everything in one process."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.measure import Bar, Case, Figures, Results, Row, timed
from benchmarks.order import bodies, chunks, decode

COUNT = 30_000
BATCH = 100


def floor(_: Path) -> Figures:
    """Decode and await a handler: what no framework can go below."""
    waiting = bodies(COUNT)

    async def handle(_: object) -> None: ...

    async def main() -> Figures:
        with timed() as taken:
            for body in waiting:
                await handle(decode(body))
        return {"us": taken() / COUNT * 1e6}

    return asyncio.run(main())


def _stentor(drive: Callable[[Any, Any, list[Any]], Coroutine[Any, Any, None]]) -> Figures:
    from benchmarks.ours import Counter, counting_app, orders, settled

    async def main() -> Figures:
        counter = Counter(COUNT)
        app = counting_app("memory://", counter)
        events = orders(COUNT)
        gc.collect()
        async with app:
            with timed() as taken:
                await drive(app, counter, events)
                await counter.done.wait()
                await settled(app)
        return {"us": taken() / COUNT * 1e6}

    return asyncio.run(main())


def stentor_batches(_: Path) -> Figures:
    async def drive(app: Any, _counter: Any, events: list[Any]) -> None:
        for chunk in chunks(events, BATCH):
            await app.publish(chunk)

    return _stentor(drive)


def stentor_single(_: Path) -> Figures:
    async def drive(app: Any, _counter: Any, events: list[Any]) -> None:
        for event in events:
            await app.publish(event)

    return _stentor(drive)


def stentor_turns(_: Path) -> Figures:
    """The next event is published when the handler has seen the one before."""

    async def drive(app: Any, counter: Any, events: list[Any]) -> None:
        for left, event in zip(range(len(events) - 1, -1, -1), events, strict=True):
            await app.publish(event)
            while counter.left > left:
                await asyncio.sleep(0)

    return _stentor(drive)


def bars(results: Results) -> list[Bar]:
    return [
        Bar("µs an event in batches", results.values("Stentor, batches", "us"), 6, at_least=False),
        Bar("µs an event, one publish call each", results.values("Stentor, one a call", "us"), 15, at_least=False),
        Bar(
            "faster than the FastStream in-memory broker, times",
            results.ratios("FastStream", "Stentor, batches", "us"),
            20,
            at_least=True,
        ),
    ]


ROW = Row(
    name="memory",
    title="memory broker, publish to settled",
    cases=[
        Case("floor", floor, note="msgspec decode, await handler"),
        Case("Stentor, batches", stentor_batches, note=f"lists of {BATCH}"),
        Case("Stentor, one a call", stentor_single),
        Case("Stentor, in turns", stentor_turns, note="one event under way at a time"),
        Case("blinker", peers.blinker, "blinker", "no queue, no decode"),
        Case("taskiq", peers.taskiq, "taskiq", "in-memory broker"),
        Case("FastStream", peers.faststream, "faststream[nats]", "in-memory test broker (NATS)"),
        Case("bubus", peers.bubus, "bubus"),
    ],
    columns={"us": "µs an event"},
    base="floor",
    bars=bars,
)
