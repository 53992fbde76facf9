"""How many processes a group needs, from what its processes measure; and when their number changes.

There are three needs, of which the largest counts: that of the backlog, by its age; that of the arrivals, by Little's
law; and on one host that of the computing, as a Python process uses one core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from stentor.health import flow_entries
from stentor.message import Lag
from stentor.observe.flow import Flow, Reading, between, by_process
from stentor.observe.text import per_second, span

AT_ONCE = 2.0
"""A backlog asks for so many times the processes that run, at most: how long it takes shows when they run."""
BUSY = 0.7
"""The utilisation of handlers and cores to aim at."""
SLACK = 0.8
"""Workers go only when those that stay have at most this part of what makes new ones come."""
SOON = 5
"""Workers that are wanted again within so many cooldowns were not too many."""
LONGEST = 32
"""The cooldown becomes at most so many times as long."""


def by_lag(lags: Sequence[Lag], target: float) -> float:
    """The processes that a backlog asks for: those there are, by how much older than ``target`` seconds it is."""
    oldest = max((lag.seconds for lag in lags if lag.events), default=0.0)
    if not oldest:
        return 1.0 if any(lag.events or lag.parked for lag in lags) else 0.0
    members = max(1, *(lag.members for lag in lags))
    return max(1.0, members * min(oldest / target, AT_ONCE))


def by_flow(flow: Flow, busy: float) -> float:
    """The processes that the arrivals ask for, for a utilisation of ``busy``: λ R / (c ρ), by Little's law."""
    return flow.arrivals * flow.service.mean / (flow.concurrency * busy)


class Look(Struct, frozen=True, kw_only=True):
    """What the workers of a host told at one time."""

    reading: Reading
    lags: list[Lag]
    workers: int
    """Those that are to stay."""
    cpu: dict[int, float]
    """By process: seconds of a core that it has used."""
    silent: int = 0
    """Workers that did not answer."""


class Need(Struct, frozen=True):
    """How many workers are needed, and why; ``moment`` in monotonic seconds."""

    moment: float
    workers: float
    why: str


def need(before: Look, after: Look, target: float) -> Need:
    """The workers that are needed by what was measured between two looks; ``target`` is the age of a backlog to keep.

    A worker that does not answer counts as a core in use: it computes, or it hangs and somebody has to take its place.
    """
    moment = after.reading.moment
    seconds = max(moment - before.reading.moment, 1e-9)
    cores = sum(used - before.cpu[pid] for pid, used in after.cpu.items() if pid in before.cpu) / seconds
    cores += after.silent
    found = [Need(moment, cores / BUSY, f"they use {cores:.2g} cores")]
    for flow in between(before.reading, after.reading):
        told = [groups[flow.group] for groups in after.reading.told.values() if flow.group in groups]
        if not all(one["shared"] for one in told):  # more processes would bring it nothing
            continue
        if flow.service.count:
            rates = f"λ {per_second(flow.arrivals)}, X {per_second(flow.throughput)}, ρ {flow.utilisation:.2f}"
            found.append(Need(moment, by_flow(flow, BUSY), f"{flow.group}: {rates}"))
        lags = [replace(lag, members=after.workers) for lag in after.lags if lag.group == flow.group]
        # What is held waits for something else than workers, and what runs already waits for nobody.
        if not any(one["held"] for one in told) and sum(lag.events for lag in lags) > flow.running:
            why = f"the oldest event of {flow.group} waits for {span(flow.oldest)}"
            found.append(Need(moment, by_lag(lags, target), why))
    return max(found, key=lambda one: one.workers)


def decide(needs: Sequence[Need], workers: int, least: int, most: int, cooldown: float) -> int:
    """How many workers there shall be, by what was needed since their number changed last, oldest first.

    Workers come when two looks in a row ask for them: a single one may be chance. They go when the most that was needed
    for ``cooldown`` seconds leaves room, at most half of them at once.
    """
    if len(needs) < 2:
        return workers
    wanted = math.ceil(min(one.workers for one in needs[-2:]))
    if wanted > workers:
        return max(workers, min(wanted, most))
    if needs[-1].moment - needs[0].moment < cooldown:
        return workers
    enough = math.ceil(max(one.workers for one in needs) / SLACK)
    return min(workers, max(least, enough, math.ceil(workers / AT_ONCE)))


class Scale:
    """The needs of the last time, and what they make of the number of workers.

    Workers that are wanted again soon after others went were not too many: next time the cooldown is twice as long.
    """

    def __init__(self, least: int, most: int, cooldown: float) -> None:
        self._least = least
        self._most = most
        self._cooldown = cooldown
        self._times = 1
        self._shrunk = -math.inf
        self._needs: list[Need] = []

    @property
    def cooldown(self) -> float:
        """Seconds of quiet after which workers go."""
        return self._cooldown * self._times

    def look(self, found: Need, workers: int) -> tuple[int, str]:
        """How many workers there shall be now, and why; from the next call on that is how many there are."""
        self._needs.append(found)
        while len(self._needs) > 2 and self._needs[1].moment <= found.moment - self.cooldown:
            del self._needs[0]
        wanted = decide(self._needs, workers, self._least, self._most, self.cooldown)
        why = found.why
        if wanted < workers:
            self._shrunk = found.moment
            enough = max(one.workers for one in self._needs)
            why = f"for {span(self.cooldown)} {max(enough, 0.01):.2g} would have been enough"
        elif wanted > workers:
            again = found.moment - self._shrunk <= SOON * self.cooldown
            self._times = min(self._times * 2, LONGEST) if again else 1
        if wanted != workers:
            self._needs.clear()
        return wanted, why


def look(moment: float, told: Sequence[dict[str, Any]], lags: list[Lag], workers: int, silent: int) -> Look:
    """From the ``Health.figures`` of processes, and the lag of their groups."""
    reading = Reading(moment, by_process("", flow_entries(told, lags)))
    return Look(
        reading=reading, lags=lags, workers=workers, cpu={one["pid"]: one["cpu"] for one in told}, silent=silent
    )
