"""Greedy batches beside one by one and beside timers: a model of 20 ms a call and 1 ms an item, a call at a time.

An open loop: events come at random times (Poisson), and a latency counts from the time meant to the end of the handler.
A tenth of what one by one can carry shows what a batch handler costs at low load; three times as much, what it is for.
Each setting runs with a greedy one beside it, each with a model of its own: both get the same events at the same times,
and have the same of the machine.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row, percentile

CALL, ITEM = 0.020, 0.001
"""Seconds of the model for a call, and for each item in it."""
CAPACITY = 1 / (CALL + ITEM)
LOW, HIGH = CAPACITY / 10, CAPACITY * 3
SECONDS = 20
SIZE = 32


@dataclass(frozen=True)
class Setting:
    """``wait`` in ms; None: one by one."""

    wait: int | None = 0
    size: int = SIZE
    concurrency: int = 64


@asynccontextmanager
async def _serving(
    setting: Setting, ends: list[tuple[float, float]]
) -> AsyncIterator[Callable[[float], Awaitable[object]]]:
    """An app with its model; gives what publishes an event meant for a time. ``ends``: that time, and the latency."""
    from stentor import App, Batch, Event, Group

    class Asked(Event, topic="asked", key=None, type="bench.asked"):
        at: float

    app = App("bench", broker="memory://")
    group = Group("model", concurrency=setting.concurrency)
    model = asyncio.Lock()

    async def infer(asked: list[Asked]) -> None:
        async with model:
            await asyncio.sleep(CALL + ITEM * len(asked))
        now = time.perf_counter()
        ends.extend((one.at, now - one.at) for one in asked)

    if setting.wait is None:

        @app.on(Asked, group=group)
        async def single(asked: Asked) -> None:
            await infer([asked])

    else:

        @app.on(Asked, group=group, batch=Batch(size=setting.size, wait=f"{setting.wait}ms"))
        async def many(asked: list[Asked]) -> None:
            await infer(asked)

    async with app:
        yield lambda at: app.publish(Asked(at=at))


async def _run(settings: Sequence[Setting], rate: float) -> list[list[float]]:
    """The latencies in ms of each setting, those of the first fifth of the time left out."""
    ends: list[list[tuple[float, float]]] = [[] for _ in settings]
    async with AsyncExitStack() as stack:
        publish = [
            await stack.enter_async_context(_serving(setting, found))
            for setting, found in zip(settings, ends, strict=True)
        ]
        began = at = time.perf_counter()
        count = 0
        while (at := at + random.expovariate(rate)) < began + SECONDS:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            for one in publish:
                await one(at)
            count += 1
        while any(len(found) < count for found in ends):
            await asyncio.sleep(0.01)
    return [[took * 1000 for at, took in found if at - began > SECONDS / 5] for found in ends]


def low(_: Path) -> Figures:
    """A tenth of the load that one by one can carry."""
    ours, theirs = map(statistics.median, asyncio.run(_run([Setting(), Setting(wait=None)], LOW)))
    return {"p50": theirs, "greedy50": ours, "ratio": ours / theirs}


def high(setting: Setting, _: Path) -> Figures:
    """Three times that load, at which one by one has no latency but a line that grows."""
    ours, theirs = asyncio.run(_run([Setting(), setting], HIGH))
    ours99, theirs99 = percentile(ours, 0.99), percentile(theirs, 0.99)
    return {
        "p50": statistics.median(theirs), "greedy50": statistics.median(ours),
        "p99": theirs99, "greedy99": ours99, "ratio": ours99 / theirs99,
    }  # fmt: skip


def bars(results: Results) -> list[Bar]:
    found = {name: results.values(name, "ratio") for name in TIMERS if name in results.rounds}
    best = max(found, key=lambda name: statistics.median(found[name]), default="")
    return [
        Bar("low load: p50 of greedy by that of one by one", results.values("one by one", "ratio"), 1.1,
            at_least=False),
        Bar(f"3x: p99 of greedy by that of the best timer ({best})", found.get(best, []), 1.2, at_least=False),
    ]  # fmt: skip


TIMERS = {
    f"wait {wait}ms, size {size}, {concurrency} at once": Setting(wait, size, concurrency)
    for wait, size, concurrency in [
        *((wait, size, 1) for wait in (2, 5, 10, 20, 40) for size in (8, SIZE)),
        *((wait, SIZE, 64) for wait in (5, 20)),
    ]
}
ROW = Row(
    name="batching",
    title="batches for a model, 20 ms a call and 1 ms an item; open loop, Poisson arrivals",
    cases=[
        Case("one by one", low, note="at a tenth of its capacity; the others at three times that"),
        *(Case(name, partial(high, setting)) for name, setting in TIMERS.items()),
    ],
    columns={
        "p50": "p50 ms", "p99": "p99 ms", "greedy50": "greedy p50", "greedy99": "greedy p99", "ratio": "greedy by it",
    },
    base="one by one",
    bars=bars,
)  # fmt: skip
