"""``concurrency="auto"`` beside fixed settings: a handler that needs one of so many PostgreSQL connections for 10 ms.

The app runs on the memory broker with events always waiting, for some seconds; the last ones count. ``simulated`` sends
the limiter through six kinds of services that change (``limiter_model.py``).
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.limiter_model import KINDS, high, phases
from benchmarks.measure import Bar, Case, Figures, Results, Row
from benchmarks.postgresql_peers import server

POOLS = (4, 20, 80)
FIXED = (2, 4, 6, 8, 16, 20, 24, 32, 48, 64, 80, 96, 128)
WARM, COUNTED = 5.0, 4.0
SLEEP = "SELECT pg_sleep(0.010)"


async def _run(folder: Path, pool: int, limit: Any) -> tuple[float, float, float]:
    """Events a second, the p99 of the handler in ms, and the limit, for a pool of connections."""
    import psycopg_pool

    from stentor import App, Event, Group

    class Job(Event, topic="jobs", type="bench.job"):
        n: int

    app = App("bench", broker="memory://")
    times: list[tuple[float, float]] = []

    async with psycopg_pool.AsyncConnectionPool(
        server(folder), min_size=pool, max_size=pool, open=False
    ) as connections:
        await connections.wait()

        @app.on(Job, group=Group("work", concurrency=limit))
        async def work(job: Job) -> None:
            began = time.perf_counter()
            async with connections.connection() as connection:
                await connection.execute(SLEEP)
            ended = time.perf_counter()
            times.append((ended, ended - began))

        async with app:
            began = time.perf_counter()
            number = 0
            while time.perf_counter() - began < WARM + COUNTED:
                while number - len(times) < 2000:
                    await app.publish([Job(n=number + n) for n in range(500)])
                    number += 500
                await asyncio.sleep(0.05)
            assert app.program is not None
            [worker] = app.program.workers
            most = worker.most
            now = time.perf_counter()
            await app.program.stop(0)
    counted = [took for ended, took in times if now - COUNTED <= ended <= now]
    return len(counted) / COUNTED, high(counted) * 1000, most


def setting(limit: Any, folder: Path) -> Figures:
    """One setting, on each pool."""
    figures: dict[str, float] = {}
    for pool in POOLS:
        if limit != "auto" and not pool / 2 <= limit <= 2 * pool:
            continue
        figures[f"rate{pool}"], figures[f"p99_{pool}"], figures[f"limit{pool}"] = asyncio.run(_run(folder, pool, limit))
    return figures


def simulated(_: Path) -> Figures:
    found = sorted(
        (one for kind in KINDS for seed in range(3) for one in phases(kind, 10, seed).values()),
        key=lambda one: one.throughput,
    )
    reached = [one.reached for one in found]
    return {
        "median": statistics.median(one.throughput for one in found),
        "tenth": found[len(found) // 10].throughput,
        "p99": statistics.median(one.p99 for one in found),
        "converged": sum(math.isfinite(one) for one in reached) / len(reached),
        "seconds": statistics.median(reached),
    }


def bars(results: Results) -> list[Bar]:
    found = [
        Bar(
            "simulated: median throughput, share of the best",
            results.values("simulated", "median"),
            0.95,
            at_least=True,
        ),
        Bar("simulated: worst tenth", results.values("simulated", "tenth"), 0.80, at_least=True),
        Bar("simulated: share of phases that converge", results.values("simulated", "converged"), 1.0, at_least=True),
        Bar("simulated: median seconds until then", results.values("simulated", "seconds"), 5, at_least=False),
    ]
    for pool in POOLS:
        rates: dict[str, float] = {}
        for limit in FIXED:
            if values := results.values(f"{limit}", f"rate{pool}"):
                rates[f"{limit}"] = statistics.median(values)
        if not rates:
            continue
        best = max(rates.values())
        good = next(name for name, rate in rates.items() if rate >= 0.98 * best)  # the smallest that is good enough
        found += [
            Bar(f"pool of {pool}: events/s, share of the best ({good})",
                results.ratios("auto", good, f"rate{pool}"), 0.95, at_least=True),
            Bar(f"pool of {pool}: p99, times that of {good}",
                results.ratios("auto", good, f"p99_{pool}"), 1.25, at_least=False),
        ]  # fmt: skip
    return found


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="auto",
    title='concurrency="auto" beside fixed settings: pools of PostgreSQL connections, 10 ms each',
    cases=[
        Case("auto", partial(setting, "auto"), "psycopg[pool]"),
        *(Case(f"{limit}", partial(setting, limit), "psycopg[pool]") for limit in FIXED),
        Case("simulated", simulated),
    ],
    columns={
        **{f"{kind}{pool}": f"{text} {pool}" for pool in POOLS
           for kind, text in (("rate", "events/s"), ("p99_", "p99 ms"), ("limit", "limit"))},
        "median": "median", "tenth": "worst tenth", "p99": "p99", "converged": "converged", "seconds": "after s",
    },
    base="auto",
    bars=bars,
    prepare=_start,
)  # fmt: skip
