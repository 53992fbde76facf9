"""``concurrency="auto"`` beside fixed settings: a handler that needs one of so many places for 10 ms.

The places are connections of PostgreSQL, or those of an HTTP service.

The app runs on the memory broker with events always waiting, for some seconds; the last ones count. Then the HTTP
service loses half of its places while the app runs, gets them back, and as many more. ``simulated`` sends the limiter
through six kinds of services that change (``limiter_model.py``).
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.deliver import served
from benchmarks.limiter_model import KINDS, high, phases
from benchmarks.measure import Bar, Case, Figures, Results, Row
from benchmarks.postgresql_peers import server

PLACES = {"4": 4, "20": 20, "100": 100, "http": 20}
"""By name, in PostgreSQL unless it says otherwise."""
FIXED = (2, 4, 6, 8, 16, 20, 24, 32, 48, 64, 80, 100, 128, 160)
WARM, COUNTED = 5.0, 4.0
SLEEP = "SELECT pg_sleep(0.010)"
CHANGES = (20, 10, 20, 40)
"""The places of the HTTP service, in phases of so many seconds, each looked at by windows."""
PHASE, WINDOW = 6.0, 0.5
CHANGING = ("auto", "8", "16", "24", "32", "48")
"""The settings that go through it: among the fixed ones is a good one for each phase."""
_held = {"places": asyncio.Semaphore(PLACES["http"])}


async def service(scope: Any, receive: Any, send: Any) -> None:
    """Answer when one of the places was held for 10 ms; ``.../places/N`` sets their number."""
    await receive()
    head, _, number = scope["path"].rpartition("/places/")
    if head:
        _held["places"] = asyncio.Semaphore(int(number))
    else:
        async with _held["places"]:
            await asyncio.sleep(0.010)
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@asynccontextmanager
async def _site() -> AsyncIterator[Callable[..., Awaitable[object]]]:
    """A function that asks the HTTP service for a path."""
    import aiohttp

    with served("benchmarks.auto:service") as url:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def get(path: str = "") -> object:
                async with session.get(url + path) as answer:
                    return await answer.read()

            yield get


@asynccontextmanager
async def _called(folder: Path, name: str) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """What a handler calls, with so many places."""
    if name == "http":
        async with _site() as get:
            yield get
        return
    import psycopg_pool

    size = PLACES[name]
    async with psycopg_pool.AsyncConnectionPool(
        server(folder), min_size=size, max_size=size, open=False
    ) as connections:
        await connections.wait()

        async def ask() -> object:
            async with connections.connection() as connection:
                return await connection.execute(SLEEP)

        yield ask


Times = list[tuple[float, float]]
"""When each call ended, and how long it took."""


async def _busy(
    limit: Any, call: Callable[[], Awaitable[object]], phases: Sequence[tuple[float, Callable[[], Awaitable[object]]]]
) -> tuple[Times, list[float], float]:
    """Run with events always waiting through phases, each of so many seconds after a step.

    The calls, when each phase and the last one ended, and the limit then.
    """
    from stentor import App, Event, Group

    class Job(Event, topic="jobs", type="bench.job"):
        n: int

    app = App("bench", broker="memory://")
    times: Times = []
    ends: list[float] = []

    @app.on(Job, group=Group("work", concurrency=limit))
    async def work(job: Job) -> None:
        began = time.perf_counter()
        await call()
        ended = time.perf_counter()
        times.append((ended, ended - began))

    async with app:
        number = 0
        for seconds, step in phases:
            await step()
            ends.append(time.perf_counter() + seconds)
            while time.perf_counter() < ends[-1]:
                while number - len(times) < 2000:
                    await app.publish([Job(n=number + n) for n in range(500)])
                    number += 500
                await asyncio.sleep(0.05)
        assert app.program is not None
        [worker] = app.program.workers
        most = worker.most
        await app.program.stop(0)
    return times, ends, most


async def _nothing() -> None:
    pass


async def _run(folder: Path, name: str, limit: Any) -> tuple[float, float, float]:
    """Events a second, the p99 of the handler in ms, and the limit."""
    async with _called(folder, name) as call:
        times, [now], most = await _busy(limit, call, [(WARM + COUNTED, _nothing)])
    counted = [took for ended, took in times if now - COUNTED <= ended <= now]
    return len(counted) / COUNTED, high(counted) * 1000, most


async def _changing(limit: Any) -> Figures:
    """For each phase events a second and p99 of its last half, and after how many seconds it was near that."""
    figures: dict[str, float] = {}
    async with _site() as get:
        steps = [(PHASE, partial(get, f"/places/{places}")) for places in CHANGES]
        times, ends, _ = await _busy(limit, get, steps)
    for phase, end in enumerate(ends):
        counted = [took for ended, took in times if end - PHASE / 2 <= ended <= end]
        figures[f"change{phase}"] = len(counted) / (PHASE / 2)
        figures[f"slow{phase}"] = high(counted) * 1000
        begin = end - PHASE
        rates = [
            sum(begin + n * WINDOW <= ended < begin + (n + 1) * WINDOW for ended, _ in times) / WINDOW
            for n in range(int(PHASE / WINDOW))
        ]
        first = next(n for n, rate in enumerate(rates) if rate >= 0.9 * figures[f"change{phase}"])
        figures[f"after{phase}"] = (first + 1) * WINDOW
    return figures


def setting(limit: Any, folder: Path) -> Figures:
    """One setting, for each number of places."""
    figures: dict[str, float] = {}
    for pool, places in PLACES.items():
        if limit != "auto" and not places / 2 <= limit <= 2 * places:
            continue
        figures[f"rate{pool}"], figures[f"p99_{pool}"], figures[f"limit{pool}"] = asyncio.run(_run(folder, pool, limit))
    if f"{limit}" in CHANGING:
        figures |= asyncio.run(_changing(limit))
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
    for pool in PLACES:
        rates: dict[str, float] = {}
        for limit in FIXED:
            if values := results.values(f"{limit}", f"rate{pool}"):
                rates[f"{limit}"] = statistics.median(values)
        if not rates:
            continue
        best = max(rates.values())
        good = next(name for name, rate in rates.items() if rate >= 0.98 * best)  # the smallest that is good enough
        found += [
            Bar(f"places, {pool}: events/s, share of the best ({good})",
                results.ratios("auto", good, f"rate{pool}"), 0.95, at_least=True),
            Bar(f"places, {pool}: p99, times that of {good}",
                results.ratios("auto", good, f"p99_{pool}"), 1.25, at_least=False),
        ]  # fmt: skip
    return found + _change_bars(results)


def _change_bars(results: Results) -> list[Bar]:
    """Of all phases and rounds: what was reached of the best fixed setting of the phase, and after how long."""
    shares: list[float] = []
    slower: list[float] = []
    after: list[float] = []
    for phase in range(len(CHANGES)):
        rates = {name: results.values(name, f"change{phase}") for name in CHANGING}
        if not all(rates.values()):
            return []
        best = max(CHANGING[1:], key=lambda name: statistics.median(rates[name]))
        shares += results.ratios("auto", best, f"change{phase}")
        slower += results.ratios("auto", best, f"slow{phase}")
        after += results.values("auto", f"after{phase}")
    tenth = sorted(shares)[len(shares) // 10]
    near = sum(share >= 0.9 for share in shares) / len(shares)
    return [
        Bar("changing places: events/s, median share of the best", [statistics.median(shares)], 0.95, at_least=True),
        Bar("changing places: worst tenth", [tenth], 0.80, at_least=True),
        Bar("changing places: p99, worst tenth", [sorted(slower)[-1 - len(slower) // 10]], 1.25, at_least=False),
        Bar("changing places: phases that come within a tenth", [near], 1.0, at_least=True),
        Bar("changing places: median seconds until then", [statistics.median(after)], 5, at_least=False),
    ]  # fmt: skip


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="auto",
    title='concurrency="auto" beside fixed settings: so many places for 10 ms each, in PostgreSQL and an HTTP service',
    cases=[
        Case("auto", partial(setting, "auto"), "psycopg[pool]"),
        *(Case(f"{limit}", partial(setting, limit), "psycopg[pool]") for limit in FIXED),
        Case("simulated", simulated),
    ],
    columns={
        **{f"{kind}{pool}": f"{text} {pool}" for pool in PLACES
           for kind, text in (("rate", "events/s"), ("p99_", "p99 ms"), ("limit", "limit"))},
        **{f"change{phase}": f"{places} then" for phase, places in enumerate(CHANGES)},
        "median": "median", "tenth": "worst tenth", "p99": "p99", "converged": "converged", "seconds": "after s",
    },
    base="auto",
    bars=bars,
    prepare=_start,
)  # fmt: skip
