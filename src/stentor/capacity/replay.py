"""Events through a simulated worker: what waited how long, in virtual time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from zlib import crc32

from msgspec import Struct

from stentor.capacity.times import Times
from stentor.event import PARTITIONS


class Replayed(Struct, frozen=True, kw_only=True):
    """Seconds from arrival to the end of handling, in the order in which events ended, and of the whole run."""

    latencies: Sequence[float]
    seconds: float
    busy: float
    """Seconds of service, over all handlers."""

    @property
    def throughput(self) -> float:
        """X: events a second from the first arrival to the last end."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def quantile(self, q: float) -> float:
        """A quantile of the latencies in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def replay(
    times: Times, lanes: int, *, workers: int = 1, partitions: int = PARTITIONS, overhead: float = 0.0
) -> Replayed:
    """Run events through ``workers`` processes with ``lanes`` handlers each, a key's events one at a time.

    Partitions are shared out to the workers in turn. ``overhead`` is what a process spends on an event besides its
    handler, in seconds, one event at a time: 1 / overhead is the most it can take.
    """
    count = len(times.at)
    if times.keys or workers > 1 or overhead:
        parts: list[list[int]] = [[] for _ in range(workers)]
        keys = times.keys or (None,) * count
        for n, key in enumerate(keys):
            partition = n % partitions if key is None else crc32(key.encode()) % partitions
            parts[partition % workers].append(n)
        latencies: list[float] = []
        ended = 0.0
        for part in parts:
            found, last = _keyed(times, keys, part, lanes, overhead)
            latencies += found
            ended = max(ended, last)
    else:
        latencies, ended = _free(times, lanes)
    return Replayed(latencies=latencies, seconds=ended - times.at[0], busy=sum(times.service))


def _free(times: Times, lanes: int) -> tuple[list[float], float]:
    """Without keys: each event takes the handler that is free first."""
    free = [0.0] * lanes
    latencies = []
    for at, service in zip(times.at, times.service, strict=True):
        end = max(free[0], at) + service
        heapreplace(free, end)
        latencies.append(end - at)
    return latencies, max(free)


def _keyed(
    times: Times, keys: Sequence[str | None], part: Sequence[int], lanes: int, overhead: float
) -> tuple[list[float], float]:
    """One process: an event whose key is busy waits beside the others, which overtake it."""
    at, service = times.at, times.service
    waiting: dict[str, deque[int]] = {}  # a key is here while an event of it is ready or runs
    ready: deque[int] = deque()
    ends: list[tuple[float, int]] = []
    latencies = []
    last = taken = 0.0
    following = 0
    while following < len(part) or ends:
        arrival = None
        if following < len(part):
            arrival = max(at[part[following]], taken) + overhead
        if arrival is not None and (not ends or arrival <= ends[0][0]):
            now = taken = arrival
            event = part[following]
            following += 1
            key = keys[event]
            behind = waiting.get(key) if key is not None else None
            if behind is not None:
                behind.append(event)
            else:
                if key is not None:
                    waiting[key] = deque()
                ready.append(event)
        else:
            now, event = heappop(ends)
            last = now
            latencies.append(now - at[event])
            key = keys[event]
            if key is not None:
                behind = waiting[key]
                if behind:
                    ready.append(behind.popleft())
                else:
                    del waiting[key]
        while ready and len(ends) < lanes:
            event = ready.popleft()
            heappush(ends, (now + service[event], event))
    return latencies, last
