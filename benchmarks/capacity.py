"""What `stentor capacity` predicts, beside what runs then do.

The flights of one day, sped up, and modelled queues go through a real app on the embedded file; each of its handlers
waits as a call to a service would. The prediction is made first: the times at which events are to come, and how long a
handler takes, as a few calls before the run showed. SimPy, an independent simulator, judges the same queues.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import ours
from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh
from examples.flights.record import Timeline, find_record
from stentor import App, Event, Group
from stentor.capacity import Setup, Times, answer, arrivals, fitted, replay

QUANTILES = (0.5, 0.95, 0.99)
CALLS = 400
"""Calls of the handler before the run, to see how long they take here."""
PARTITIONS = 64
"""Of a file."""


class Passed(Event, topic="passed", key="tail", type="bench.passed"):
    tail: str
    number: int
    takes: float


class Load:
    """Events: when each is to come, in seconds from the first, its key, and how long its call shall take."""

    def __init__(self, at: list[float], keys: list[str], service: list[float], lanes: int) -> None:
        chance = random.Random(1)
        self.at, self.keys, self.lanes = at, keys, lanes
        self.takes = chance.choices(service, k=len(at))

    async def call(self, seconds: float) -> None:
        """What the handler waits for."""
        await asyncio.sleep(seconds)

    async def overhead(self) -> float:
        """By how many seconds a call takes longer than it was asked to."""
        late = []
        for takes in self.takes[:CALLS]:
            begun = time.perf_counter()
            await self.call(min(takes, 0.01))
            late.append(time.perf_counter() - begun - min(takes, 0.01))
        return fmean(late)

    def predicted(self, overhead: float) -> Figures:
        """X and latencies in ms."""
        service = [takes + overhead for takes in self.takes]
        found = replay(Times(at=self.at, service=service, keys=self.keys), self.lanes, partitions=PARTITIONS)
        return {"X": found.throughput} | {f"p{q * 100:.0f}": found.quantile(q) * 1e3 for q in QUANTILES}

    async def run(self, url: str) -> Figures:
        """The same of a run in an open loop: events are published when they are due, whatever waits."""
        app = App("capacity", broker=url)
        ended: dict[int, float] = {}
        done = asyncio.Event()

        @app.on(Passed, group=Group("capacity", concurrency=self.lanes))
        async def handle(event: Passed) -> None:
            await self.call(event.takes)
            ended[event.number] = time.perf_counter()
            if len(ended) == len(self.at):
                done.set()

        events = [
            Passed(tail=key, number=number, takes=takes)
            for number, (key, takes) in enumerate(zip(self.keys, self.takes, strict=True))
        ]
        async with app:
            publishing: set[asyncio.Task[Any]] = set()
            begun = time.perf_counter()
            number = 0
            while number < len(events):
                now = time.perf_counter() - begun
                first = number
                while number < len(events) and self.at[number] <= now:
                    number += 1
                if number > first:
                    task = asyncio.ensure_future(app.publish(events[first:number]))
                    publishing.add(task)
                    task.add_done_callback(publishing.discard)
                if number < len(events):
                    await asyncio.sleep(max(0.0, self.at[number] - (time.perf_counter() - begun)))
            await done.wait()
        latencies = sorted(ended[number] - begun - at for number, at in enumerate(self.at))
        took = max(ended.values()) - begun - self.at[0]
        return {"X": len(latencies) / took} | {
            f"p{q * 100:.0f}": latencies[min(len(latencies) - 1, int(q * len(latencies)))] * 1e3 for q in QUANTILES
        }


def flights(speed: float | None, hours: float, lanes: int) -> Load:
    """The busiest hours of New Year's Day, so many times as fast as they were; None is all of them at once."""
    day = list(Timeline(find_record(), 1).events())
    times = [event.at.timestamp() for event in day]
    most = max(range(len(day)), key=lambda first: sum(times[first] <= t < times[first] + hours * 3600 for t in times))
    chosen = [n for n, t in enumerate(times) if times[most] <= t < times[most] + hours * 3600]
    at = [(times[n] - times[most]) / speed if speed else 0.0 for n in chosen]
    return Load(at, [day[n].tail or "none" for n in chosen], fitted(0.1, 0.5), lanes)


def queue(busy: float, lanes: int, cv: float, seconds: float) -> Load:
    """A modelled queue: calls of 10 ms on average, so many at once, busy for this share of the time."""
    service = fitted(0.01, cv)
    rate = busy * lanes / 0.01
    times = arrivals(rate, service, int(rate * seconds))
    return Load(list(times.at), [str(n) for n in range(len(times.at))], service, lanes)


async def beside_run(make: Callable[[], Load], folder: Path) -> Figures:
    load = make()
    predicted = load.predicted(await load.overhead())
    seen = await load.run(ours.url(fresh(folder, "capacity.db")))
    return _both(predicted, seen)


def beside_simpy(busy: float, lanes: int, cv: float, _: Path) -> Figures:
    setup = Setup(rate=busy * lanes / 0.01, service=fitted(0.01, cv), concurrency=lanes)
    found = answer(setup)
    assert found.simulated is not None
    predicted = {"X": found.throughput} | {n: s * 1e3 for n, s in found.simulated.items()}
    return _both(predicted, simpy(setup, cv))


def drawn(chance: random.Random, mean: float, cv: float) -> float:
    """A service time: constant, of a gamma distribution, or from a cv of 1 on hyperexponential with balanced means."""
    if cv <= 1:
        return chance.gammavariate(1 / cv**2, mean * cv**2) if cv else mean
    quick = (1 + math.sqrt((cv**2 - 1) / (cv**2 + 1))) / 2
    return chance.expovariate(2 * (quick if chance.random() < quick else 1 - quick) / mean)


def simpy(setup: Setup, cv: float, count: int = 500_000) -> Figures:
    """The same queue in SimPy."""
    import simpy as simulator

    chance = random.Random(7)
    environment = simulator.Environment()
    pool = simulator.Resource(environment, capacity=setup.lanes)
    ends: list[float] = []
    latencies: list[float] = []

    def event() -> Generator[Any, Any, Any]:
        came = environment.now
        with pool.request() as turn:
            yield turn
            yield environment.timeout(drawn(chance, setup.mean, cv))
        ends.append(environment.now)
        latencies.append(environment.now - came)

    def source() -> Generator[Any, Any, Any]:
        for _ in range(count):
            yield environment.timeout(chance.expovariate(setup.rate))
            environment.process(event())

    environment.process(source())
    environment.run()
    latencies.sort()
    return {"X": count / ends[-1]} | {f"p{q * 100:.0f}": latencies[int(q * count)] * 1e3 for q in QUANTILES}


def _both(predicted: Figures, seen: Figures) -> Figures:
    return {f"{name} predicted": value for name, value in predicted.items()} | dict(seen)


def _run(make: Callable[[], Load], folder: Path) -> Figures:
    return asyncio.run(beside_run(make, folder))


RUNS: dict[str, Callable[[], Load]] = {
    "flights x200": partial(flights, 200, 4, 2),
    "flights x1000": partial(flights, 1000, 20, 4),
    "flights flat out": partial(flights, None, 20, 16),
    "queue, 16 calls, ρ 0.7, cv 1": partial(queue, 0.7, 16, 1.0, 20),
    "queue, 16 calls, ρ 0.9, cv 0.5": partial(queue, 0.9, 16, 0.5, 20),
    "queue, 4 calls, ρ 0.8, cv 1": partial(queue, 0.8, 4, 1.0, 40),
}
QUEUES = {
    f"SimPy, {lanes} calls, ρ {busy}, cv {cv:g}": (busy, lanes, cv)
    for busy, lanes, cv in ((0.7, 1, 1.0), (0.9, 4, 0.5), (0.9, 16, 1.0), (0.8, 4, 1.5), (0.8, 16, 2.0))
}
SIMPY = {name: partial(beside_simpy, *queue) for name, queue in QUEUES.items()}
FURTHER = {name: 0.15 for name, (_, _, cv) in QUEUES.items() if cv > 1}
"""How far a latency may be off there."""


def bars(results: Results) -> list[Bar]:
    """How far predictions are off, in parts of what was seen: 0 is right."""
    found = []
    for case in (*RUNS, *SIMPY):
        far = FURTHER.get(case, 0.10)
        for name, limit in (("X", 0.03), ("p95", far), ("p99", far)):
            ratios = results.ratios(case, case, f"{name} predicted", name)
            found.append(Bar(f"{case}: {name} off by", [abs(r - 1) for r in ratios], limit, at_least=False))
    return found


ROW = Row(
    name="capacity",
    title="what `stentor capacity` predicts beside what a run, or SimPy, does; X in events/s, latencies in ms",
    cases=[Case(name, partial(_run, make), note="real calls, embedded file") for name, make in RUNS.items()]
    + [Case(name, judge, "simpy", "an independent simulator") for name, judge in SIMPY.items()],
    columns={
        column: column
        for name in ("X", *(f"p{q * 100:.0f}" for q in QUANTILES))
        for column in (name, f"{name} predicted")
    },
    base="flights x200",
    bars=bars,
)
