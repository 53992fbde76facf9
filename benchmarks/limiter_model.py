"""Services that a handler may call, simulated: what one does with N calls at once, and how it changes over time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from stentor.limiter import Limiter


@dataclass
class Service:
    """So many calls at once take ``time`` seconds each on average; more of them wait in line, or share."""

    room: float = 20
    time: float = 0.010
    vary: float = 1.0
    """Share of a call's time that is exponential; the rest is constant."""
    shared: bool = False
    """Calls beyond ``room`` slow all down, instead of waiting."""
    thrash: float = 0.0
    """By so much of itself the service gets slower for each ``room`` of calls beyond it."""


KINDS: dict[str, Callable[[], Service]] = {
    "pool of 4": lambda: Service(room=4),
    "pool of 20": lambda: Service(room=20),
    "pool of 100": lambda: Service(room=100),
    "steady times": lambda: Service(room=20, vary=0.1),
    "shared cores": lambda: Service(room=8, shared=True),
    "thrashing": lambda: Service(room=20, thrash=0.3),
}
PHASES: dict[str, Callable[[Service], None]] = {
    "start": lambda service: None,
    "half the room": lambda service: setattr(service, "room", service.room / 2),
    "twice the room": lambda service: setattr(service, "room", service.room * 2),
    "twice the time": lambda service: setattr(service, "time", service.time * 2),
    "the time of before": lambda service: setattr(service, "time", service.time / 2),
}


STEP = 0.25


class World:
    """Virtual time in which handlers, always with work waiting, call a service."""

    def __init__(self, service: Service, limit: Callable[[], int], ended: Callable[[float], object], seed: int) -> None:
        self.now = 0.0
        self.service = service
        self._limit = limit
        self._ended = ended
        self._chance = random.Random(seed)
        self._ends: list[tuple[float, int, float]] = []
        self._line: list[float] = []
        self._number = itertools.count()
        self.done = 0
        self.times: list[float] = []

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            self._fill()
            if not self._ends or self._ends[0][0] > end:
                self.now = end
                return
            self.now, _, began = heapq.heappop(self._ends)
            self.done += 1
            self.times.append(self.now - began)
            self._ended(began)

    def _fill(self) -> None:
        service = self.service
        while len(self._ends) + len(self._line) < self._limit():
            self._line.append(self.now)
        while self._line and (service.shared or len(self._ends) < service.room):
            began = self._line.pop(0)
            crowd = (len(self._ends) + 1 + len(self._line)) / service.room
            slower = max(1.0, crowd) if service.shared else 1.0
            slower *= 1 + service.thrash * max(0.0, crowd - 1)
            took = service.time * slower * (1 - service.vary + service.vary * self._chance.expovariate(1))
            heapq.heappush(self._ends, (self.now + took, next(self._number), began))


class Phase(NamedTuple):
    """How it went: throughput as a share of the best, p99 as a multiple of that with as many calls as there is room
    for, both in the second half; the mean limit there; and the seconds until the throughput was at 0.9 of the best.
    """

    throughput: float
    p99: float
    limit: float
    room: float
    reached: float


def phases(kind: str, seconds: float, seed: int) -> dict[str, Phase]:
    """Run the limiter through all phases of a kind of service, each for so many virtual seconds."""
    service = KINDS[kind]()
    worlds: list[World] = []
    limiter = Limiter(lambda: worlds[0].now if worlds else 0.0)

    def ended(began: float) -> None:
        limiter.full = True
        limiter.ended(began)

    world = World(service, lambda: limiter.limit, ended, seed)
    worlds.append(world)
    found = {}
    for name, change in PHASES.items():
        change(service)
        best, p99 = fixed(service, math.ceil(service.room), seconds, seed)
        steps = int(seconds / STEP)
        rates, limits = [], []
        for step in range(steps):
            if step == steps // 2:
                world.times.clear()
            before = world.done
            world.run(STEP)
            rates.append((world.done - before) / STEP / best)
            limits.append(limiter.limit)
        reached = next((n * STEP for n in range(steps) if fmean(rates[n : n + 4]) >= 0.9), math.inf)
        half = steps // 2
        found[name] = Phase(fmean(rates[half:]), high(world.times) / p99, fmean(limits[half:]), service.room, reached)
    return found


def fixed(service: Service, limit: int, seconds: float, seed: int) -> tuple[float, float]:
    """Throughput and p99 with a fixed number of calls at once."""
    world = World(replace(service), lambda: limit, lambda _: None, seed)
    world.run(seconds)
    return world.done / seconds, high(world.times)


def high(times: list[float]) -> float:
    """The 99th percentile."""
    return sorted(times)[int(0.99 * (len(times) - 1))]
