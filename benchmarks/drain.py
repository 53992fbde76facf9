"""Does a worker drain a backlog at its best as it is? Larger fetches and windows beside that.

``quick`` decodes and counts. ``pool`` needs one of 20 places for 5 ms: ``concurrency="auto"`` beside the best number.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import postgresql_peers, redis_peers
from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh
from benchmarks.order import chunks

QUICK, SLOW = 30_000, 20_000
FETCHES = {"as it is": None, "four times": 4, "sixteen times": 16}
POOL, HOLDS = 20, 0.005
LIMITS = (20, 24, 64, "auto")


async def _broker(name: str, folder: Path) -> str:
    (folder / name).mkdir(exist_ok=True)  # a row has one server in a folder
    if name == "redis":
        return await redis_peers.emptied(folder / name, "always")
    if name == "postgresql":
        return await postgresql_peers.emptied(folder / name)
    return f"sqlite:///{fresh(folder, 'drain.db').absolute()}"


async def _fill(url: str, count: int) -> None:
    from benchmarks.ours import Counter, counting_app, orders

    async with counting_app(url, Counter(0)).connected() as app:
        for chunk in chunks(orders(count), 1_000):
            await app.publish(chunk)


def quick(broker: str, times: float | None, folder: Path) -> Figures:
    """Events a second, from the first handled to the last acknowledged, with so many times as much in one fetch."""
    from benchmarks.ours import Counter, counting_app, settled
    from stentor import worker

    if times is not None:
        worker.FETCH, worker.WINDOW = int(worker.FETCH * times), int(worker.WINDOW * times)

    async def main() -> Figures:
        url = await _broker(broker, folder)
        await _fill(url, QUICK)
        counter = Counter(QUICK)
        app = counting_app(url, counter)
        used = time.process_time()
        async with app:
            await counter.done.wait()
            await settled(app)
            taken = time.perf_counter() - counter.first
        return {"rate": QUICK / taken, "cpu": (time.process_time() - used) / QUICK * 1e6}

    return asyncio.run(main())


def pool(limit: Any, folder: Path) -> Figures:
    """Events a second, with so many handlers at once before a pool of 20 places."""
    from benchmarks.ours import Counter, Order, settled
    from stentor import App, Group

    async def main() -> Figures:
        url = await _broker("sqlite", folder)
        await _fill(url, SLOW)
        counter = Counter(SLOW)
        app = App("bench", broker=url)
        places = asyncio.Semaphore(POOL)

        @app.on(Order, group=Group("bench", concurrency=limit))
        async def hold(order: Order) -> None:
            async with places:
                await asyncio.sleep(HOLDS)
            counter.add()

        async with app:
            await counter.done.wait()
            await settled(app)
            return {"rate": SLOW / (time.perf_counter() - counter.first)}

    return asyncio.run(main())


def bars(results: Results) -> list[Bar]:
    found = []
    for broker in BROKERS:
        best = _best(results, [f"{broker}, {name}" for name, times in FETCHES.items() if times is not None])
        ratios = results.ratios(f"{broker}, as it is", best, "rate")
        found.append(Bar(f"{broker}: of the best size ({best})", ratios, 0.9, at_least=True))
    best = _best(results, [f"pool, {limit} at once" for limit in LIMITS if limit != "auto"])
    ratios = results.ratios("pool, auto at once", best, "rate")
    return [*found, Bar(f"auto: of the best number ({best})", ratios, 0.95, at_least=True)]


def _best(results: Results, names: list[str]) -> str:
    return max(names, key=lambda name: statistics.median(results.values(name, "rate") or [0.0]))


BROKERS = {"sqlite": "", "redis": "redis", "postgresql": "psycopg[binary]"}
ROW = Row(
    name="drain",
    title="a backlog, with larger fetches and windows, and by concurrency",
    cases=[
        *(
            Case(f"{broker}, {name}", partial(quick, broker, times), requires)
            for broker, requires in BROKERS.items()
            for name, times in FETCHES.items()
        ),
        *(Case(f"pool, {limit} at once", partial(pool, limit)) for limit in LIMITS),
    ],
    columns={"rate": "events/s", "cpu": "CPU µs an event"},
    base="sqlite, as it is",
    bars=bars,
)
