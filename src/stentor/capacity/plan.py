"""Answers to what people ask of a program: what limits it, how long events wait, how much of what is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev

from msgspec import Struct
from msgspec.structs import replace

from stentor.capacity.queues import erlang_c, latency_quantile, utilisation
from stentor.capacity.replay import replay
from stentor.capacity.times import Times, arrivals
from stentor.errors import DefinitionError
from stentor.event import PARTITIONS

SIMULATED = 300_000
"""Events of a modelled run."""
QUANTILES = (0.5, 0.95, 0.99)
MOST_WORKERS = 1024


class Setup(Struct, frozen=True, kw_only=True):
    """A program: its load, its handler and its size. Rates are in events a second, service times in seconds."""

    rate: float
    """λ"""
    service: Sequence[float]
    """Equally likely service times."""
    concurrency: int = 64
    """Handlers that run at once in a process."""
    workers: int = 1
    """Processes."""
    partitions: int = PARTITIONS
    arrival_cv: float = 1.0
    hot: float = 0.0
    """The share of events that have the commonest key."""
    ceiling: float | None = None
    """The most events a second that one process takes, however short its handlers are."""
    source: float | None = None
    """The most events a second that the source makes."""
    broker: float | None = None
    """The most events a second that the broker carries."""

    def __post_init__(self) -> None:
        for name in ("rate", "concurrency", "workers", "partitions"):
            if not getattr(self, name) > 0:
                raise DefinitionError(f"{name} has to be above 0, not {getattr(self, name)}")
        for name in ("ceiling", "source", "broker"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise DefinitionError(f"{name} has to be above 0, not {getattr(self, name)}")
        if not 0 <= self.arrival_cv < math.inf:
            raise DefinitionError(f"arrival_cv has to be 0 or more, not {self.arrival_cv}")
        if not 0 <= self.hot <= 1:
            raise DefinitionError(f"the share of the hottest key lies between 0 and 1; {self.hot} does not")
        if not self.service or min(self.service) <= 0:
            raise DefinitionError("service times have to be above 0")

    @property
    def mean(self) -> float:
        """R0: the mean service time in seconds."""
        return fmean(self.service)

    @property
    def service_cv(self) -> float:
        return pstdev(self.service) / self.mean

    @property
    def at_work(self) -> int:
        """Processes that own a partition."""
        return min(self.workers, self.partitions)

    @property
    def lanes(self) -> int:
        """Handlers that run at once in all processes."""
        return self.at_work * self.concurrency


class Limit(Struct, frozen=True, kw_only=True):
    """One bound of the throughput, in events a second, and what would raise it."""

    name: str
    rate: float
    advice: str


class Answer(Struct, frozen=True, kw_only=True):
    """What a program does under its load."""

    rate: float
    throughput: float
    limit: Limit
    utilisation: float
    in_flight: float
    """Events being handled, on average (Little)."""
    waits: float
    """The chance of an event to wait for a handler (Erlang C)."""
    closed: dict[str, float] | None
    """Seconds from arrival to end by closed form, at p50, p95 and p99; None when the backlog grows."""
    simulated: dict[str, float] | None
    """The same by replay through a simulated worker."""
    grows: float
    """Events a second by which the backlog grows; 0 in the steady state."""
    notes: list[str]


def limits(setup: Setup) -> list[Limit]:
    """All that bounds the throughput, the lowest first: min(λ's source, N / R0, the rest)."""
    mean = setup.mean
    handlers = setup.lanes / mean
    idle = setup.workers - setup.at_work
    more = "more partitions, or" if idle else "more concurrency or workers, or"
    found = [Limit(name="handlers", rate=handlers, advice=f"{more} a faster handler ({mean * 1e3:.3g} ms now)")]
    if setup.hot:
        advice = f"one key has {setup.hot:.1%} of the events, one at a time: a finer key, or no order"
        found.append(Limit(name="hot key", rate=1 / (setup.hot * mean), advice=advice))
    if setup.ceiling is not None:
        rate = setup.ceiling * setup.at_work
        found.append(Limit(name="process", rate=rate, advice="more workers: one process takes no more"))
    if setup.source is not None:
        found.append(Limit(name="source", rate=setup.source, advice="a source that makes more"))
    if setup.broker is not None:
        found.append(Limit(name="broker", rate=setup.broker, advice="another broker, or more of its nodes"))
    return sorted(found, key=lambda limit: limit.rate)


def answer(setup: Setup, times: Times | None = None) -> Answer:
    """What this program does under its load; ``times`` are recorded events to replay instead of modelled ones."""
    limit = limits(setup)[0]
    throughput = min(setup.rate, limit.rate)
    steady = setup.rate < limit.rate and not math.isclose(setup.rate, limit.rate)
    notes = _notes(setup)
    closed = simulated = None
    if steady:
        services = sorted(setup.service)
        thinned = services[:: max(1, len(services) // 1000)]
        closed = {
            f"p{q * 100:.0f}": latency_quantile(q, setup.rate, thinned, setup.lanes, setup.arrival_cv, setup.service_cv)
            for q in QUANTILES
        }
    elif math.isclose(setup.rate, limit.rate):
        why = "the load is exactly what it carries: a backlog, once there, is never worked off; no percentile exists"
        notes.insert(0, why)
    else:
        notes.insert(0, f"overload: the backlog grows by {setup.rate - limit.rate:,.1f} events/s; no percentile exists")
    if steady:
        run = times or arrivals(setup.rate, setup.service, SIMULATED, cv=setup.arrival_cv, hot=setup.hot)
        simulated = _simulate(setup, run)
    busy = utilisation(setup.rate, setup.mean, setup.lanes)
    return Answer(
        rate=setup.rate, throughput=throughput, limit=limit, utilisation=busy,
        in_flight=min(throughput * setup.mean, setup.lanes), waits=erlang_c(setup.rate * setup.mean, setup.lanes),
        closed=closed, simulated=simulated, grows=max(0.0, setup.rate - limit.rate), notes=notes,
    )  # fmt: skip


def _simulate(setup: Setup, times: Times) -> dict[str, float]:
    found = replay(
        times, setup.concurrency, workers=setup.at_work, partitions=setup.partitions,
        overhead=1 / setup.ceiling if setup.ceiling else 0.0,
    )  # fmt: skip
    ordered = sorted(found.latencies)
    return {f"p{q * 100:.0f}": ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES}


def _notes(setup: Setup) -> list[str]:
    """Where the figures are known to be weak."""
    found = []
    if setup.workers > setup.at_work:
        found.append(
            f"{setup.workers - setup.at_work} of {setup.workers} workers stand by: {setup.partitions} partitions"
        )
    if setup.lanes == 1 and setup.service_cv > 1.5:
        found.append("one lane with service times that vary this much: the closed form can be off by more than 15 %")
    if setup.arrival_cv > 1.2 and setup.lanes <= 4:
        found.append("bursts on four lanes or fewer: the closed form can be off by more than 15 %")
    if setup.hot:
        found.append("the closed form knows nothing of keys; the simulation does")
    return found


def workers_for(setup: Setup, p99: float) -> int | None:
    """The fewest processes that keep p99 (seconds, simulated) at the setup's rate; None when no number does.

    Partitions are taken to be as many as needed: see ``partitions_for``.
    """

    def holds(workers: int) -> bool:
        wider = replace(setup, workers=workers, partitions=partitions_for(setup, workers))
        return _p99(wider) <= p99

    return _least(holds, MOST_WORKERS)


def partitions_for(setup: Setup, workers: int) -> int:
    """The partitions that so many processes need: those that there are, and one for each at least."""
    return max(setup.partitions, workers)


def largest_rate(setup: Setup, p99: float) -> float:
    """The largest rate in events a second at which p99 (simulated) stays within so many seconds; 0 when none does."""
    most = limits(setup)[0].rate
    low, high = 0.0, most
    while high - low > 0.002 * most:
        middle = (low + high) / 2
        if _p99(replace(setup, rate=middle)) <= p99:
            low = middle
        else:
            high = middle
    return low


def drain_time(setup: Setup, backlog: float) -> float:
    """Seconds until ``backlog`` events are worked off while new ones come; infinity when they never are.

    Raises:
        DefinitionError: The backlog is not a number of 0 or more.
    """
    if not 0 <= backlog < math.inf:
        raise DefinitionError(f"a backlog is 0 events or more, not {backlog:g}")
    spare = limits(setup)[0].rate - setup.rate
    return backlog / spare if spare > 0 else math.inf


def lag_after(setup: Setup, outage: float) -> tuple[float, float]:
    """After an outage of so many seconds: the events that wait, and the seconds until they are worked off."""
    backlog = setup.rate * outage
    return backlog, drain_time(setup, backlog)


def latencies(setup: Setup) -> dict[str, float]:
    """Seconds from arrival to end at p50, p95 and p99, simulated with fewer events; the load is below the limit."""
    run = arrivals(setup.rate, setup.service, SIMULATED // 3, cv=setup.arrival_cv, hot=setup.hot)
    return _simulate(setup, run)


def _p99(setup: Setup) -> float:
    return math.inf if setup.rate >= limits(setup)[0].rate else latencies(setup)["p99"]


def _least(holds: Callable[[int], bool], most: int) -> int | None:
    """The least number for which it holds, when it holds for all above."""
    high = 1
    while not holds(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
