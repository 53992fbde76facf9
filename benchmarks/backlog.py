"""One file with a million events waiting: rates beside those of an empty log, and the memory of a worker.

The log is filled once. Each round publishes to it and reads it with a new group that begins at the earliest event,
which is a million behind.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh, resident, timed
from benchmarks.order import chunks

WAITING = 1_000_000
COUNT = 60_000
LIST = 1_000
FULL = "full.db"
LONG = 300_000
"""Events over which a worker's memory is watched."""


def prepare(folder: Path) -> Figures:
    """A million events, with a declared group that has handled none of them."""
    from benchmarks.ours import Counter, counting_app, orders, url

    async def fill() -> None:
        app = counting_app(url(folder / FULL), Counter(0), "behind")
        async with app.connected():
            events = orders(20 * LIST)
            for _ in range(WAITING // len(events)):
                for chunk in chunks(events, LIST):
                    await app.publish(chunk)

    asyncio.run(fill())
    return {}


def publish(full: bool, folder: Path) -> Figures:
    """Events a second taken in lists, with a group declared that handles none of them meanwhile."""
    from benchmarks.ours import Counter, counting_app, orders, url

    async def main() -> Figures:
        path = folder / FULL if full else fresh(folder, "empty.db")
        app = counting_app(url(path), Counter(0), "behind")
        events = chunks(orders(COUNT), LIST)
        async with app.connected():
            with timed() as taken:
                for chunk in events:
                    await app.publish(chunk)
        return {"rate": COUNT / taken()}

    return asyncio.run(main())


def consume(full: bool, folder: Path) -> Figures:
    """Events a second from the first to the 60,000th handled, by a group that has them, or a million, before it."""
    from benchmarks.ours import Counter, counting_app, orders, url

    async def main() -> Figures:
        path = folder / FULL if full else fresh(folder, "empty.db")
        if not full:
            async with counting_app(url(path), Counter(0), "behind").connected() as app:
                for chunk in chunks(orders(COUNT), LIST):
                    await app.publish(chunk)
        counter = Counter(COUNT)
        app = counting_app(url(path), counter, f"reads-{time.time_ns()}")
        async with app.running(new_groups=True):
            await counter.done.wait()
            taken = time.perf_counter() - counter.first
        return {"rate": COUNT / taken}

    return asyncio.run(main())


def memory(folder: Path) -> Figures:
    """Resident memory of a worker that is a million behind, after 60,000 events and after 300,000 more."""
    from benchmarks.ours import Counter, counting_app, url

    async def main() -> Figures:
        counter = Counter(COUNT)
        app = counting_app(url(folder / FULL), counter, f"reads-{time.time_ns()}")
        async with app.running(new_groups=True):
            await counter.done.wait()
            early = resident()
            counter.left = LONG
            counter.done.clear()
            await counter.done.wait()
            late = resident()
        return {"early": early, "late": late}

    return asyncio.run(main())


def bars(results: Results) -> list[Bar]:
    published = results.ratios("publish, full log", "publish, empty log", "rate")
    consumed = results.ratios("consume, full log", "consume, empty log", "rate")
    return [
        Bar("publish, of an empty log", published, 0.9, at_least=True),
        Bar("consume, of an empty log", consumed, 0.9, at_least=True),
        Bar("worker RSS, late over early", results.ratios("memory", "memory", "late", "early"), 1.05, at_least=False),
    ]


ROW = Row(
    name="backlog",
    title=f"sqlite, {WAITING:,} events waiting, a group {WAITING:,} behind",
    cases=[
        Case("publish, empty log", partial(publish, False), note=f"lists of {LIST:,}"),
        Case("publish, full log", partial(publish, True), note=f"lists of {LIST:,}"),
        Case("consume, empty log", partial(consume, False), note="decode, handle, acknowledge"),
        Case("consume, full log", partial(consume, True), note="decode, handle, acknowledge"),
        Case("memory", memory, note=f"after {COUNT:,} events (early) and {LONG:,} more (late)"),
    ],
    columns={"rate": "events/s", "early": "RSS MiB early", "late": "RSS MiB late"},
    base="publish, empty log",
    bars=bars,
    prepare=prepare,
)
