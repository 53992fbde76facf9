"""The runs of a bench: an open loop of events on one broker, workers that handle them, and what became of them.

Open loop: an event is published at its time whatever became of those before, and its latency counts from that time, not
from when the publisher got round to it. So a broker that stalls cannot hide it (coordinated omission; Gil Tene, "How
NOT to Measure Latency", 2015).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import signal
import sys
import tempfile
import time
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import msgspec
from msgspec import Struct

from stentor.app import App
from stentor.bench.load import Load
from stentor.bench.member import EXTENSION, Job, number_of, read
from stentor.broker import Broker
from stentor.connect import BrokerUrl
from stentor.errors import BrokerError, ConfigError, DefinitionError, PublishUnknown, Unavailable
from stentor.event import Outgoing
from stentor.message import dead_topic, decode_dead_letter

LANES = 8
"""Publishes under way at once; the events of a key share one, so that they are published in order."""
TOGETHER = 500
"""Events of one publish, at most: what has come due while the last one was under way."""
PATIENCE = 30.0
"""Seconds without any progress after which what is missing counts as lost."""
QUIET = 0.5
"""Seconds without any handling after which the dead letters are looked at."""
FACTOR = 1.1
"""A ramp ends when the largest rate is known to within this factor."""
WINDOW = 0.5
"""Seconds after a fault that are looked at together: whether events take no longer than before it."""
SHORT = 0.02
"""A rate is kept up with if no more than this share of it is left undone."""
FAULTS = ("kill", "slow", "poison", "restart")
_POINTS = [*(n / 100 for n in range(0, 90, 5)), *(1 - 0.1**n for n in (1, 1.3, 1.7, 2, 2.3, 2.7, 3, 3.5, 4, 5))]
_BINS = 60


class Result(Struct, kw_only=True):
    """What one run showed. Times are in seconds, rates in events a second."""

    broker: str
    url: str
    kind: str
    """"load", "ramp", "backlog", or the fault: "kill", "slow", "poison", "restart"."""
    events: int
    rate: float
    """λ: the rate at which events were to be published."""
    throughput: float
    """X: handled a second, while events were published; of a backlog, from the first to the last."""
    published: float = 0.0
    """Of a backlog: confirmed a second, as fast as it goes."""
    largest: float | None = None
    """Of a ramp: the largest rate that was kept up with."""
    exceeded: float | None = None
    """Of a ramp: the least rate that was too much; what it could do at most lies between the two."""
    durable: str = ""
    """What a confirmed event survived: "process", "host" or "replica"."""
    confirm: dict[str, float] = {}
    """From an event's time until the broker had it, by percentile."""
    latency: dict[str, float] = {}
    """From an event's time until its handler had ended, by percentile."""
    curve: list[tuple[float, float]] = []
    """The same for a plot: share of the events, seconds."""
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    """Handled after a later one of their key."""
    dead: int = 0
    """Given up, and a dead letter now."""
    fault_at: float | None = None
    """Seconds after the begin."""
    recovered: float | None = None
    """Seconds from the fault until the last events ended that it made late; 0 if it made none late."""
    timeline: list[tuple[float, int, int]] = []
    """Up to each second: how many were due, and how many handled."""


class Bench(Struct, kw_only=True):
    """What all runs have in common."""

    app: App
    events: Callable[[int], Any]
    """The event with a number."""
    load: Load
    groups: list[str]
    """Those whose handlers are measured."""
    command: list[str]
    """What starts a member; its Job is added as the last argument."""
    job: Job
    workers: int = 1
    limit: float = 0.5
    """A ramp's rate is kept up with if p99 stays below so many seconds, and the backlog does not grow."""
    during: float = 10.0
    restart: str = ""
    """A shell command that restarts the broker."""

    @property
    def step(self) -> float:
        """Seconds of each rate of a ramp."""
        return max(2.0, self.during / 4)

    async def run(self, url: str, kind: str, events: int = 0) -> Result:
        """One run: "load", "ramp", "backlog" of ``events`` events, or one of FAULTS.

        Raises ConfigError for a broker that other processes cannot share, and what the app or the broker raise.
        """
        try:
            async with stand(self, url, poison=kind == "poison") as found:
                if kind == "backlog":
                    return await _backlog(found, events)
                await found.start()
                await found.offer(found.prepare([n / 100 for n in range(100)]))  # connections, caches, code
                await found.drained()
                if kind == "ramp":
                    return await _ramp(found)
                return await _load(found, kind)
        except ExceptionGroup as group:  # of the tasks that publish and make the fault
            raise group.exceptions[0] from None


class Offer(Struct):
    """Events to publish: the numbers from ``first`` on, due ``at`` seconds after ``began``."""

    first: int
    began: float
    at: Sequence[float]
    events: list[Outgoing]
    confirmed: list[float]


class Stand:
    """An app's workers on one broker, and a publisher in this process."""

    def __init__(self, bench: Bench, job: Job, ledger: Path, broker: Broker) -> None:
        self.bench = bench
        self.starts: dict[tuple[int, int], float] = {}
        """By number and group: when its handler began that ended first."""
        self.ends: dict[tuple[int, int], float] = {}
        """By number and group, in the order in which they ended."""
        self.again = 0
        """Ends of what had ended before."""
        self.dead: set[tuple[int, int]] = set()
        """By number and group: those that have a dead letter."""
        self.keep_ids = False
        """Give each event an id, as publishing again may be needed."""
        self._broker = broker
        self._job = job
        self._ledger = ledger
        self._offset = 0
        self._keys: list[str | None] = []
        """Of all that was published, by number."""
        self.wanted: set[tuple[int, int]] = set()
        """By number and group: what is to be handled."""
        known = bench.app.groups()
        self._takes = [{name for each in known[name].handlers for name in each.names} for name in bench.groups]
        self._members: list[asyncio.subprocess.Process] = []
        self._id = secrets.token_hex(6)

    # ---- members ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the members that are missing."""
        while len(self._members) < self.bench.workers:
            with self._ledger.with_suffix(".log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *self.bench.command, msgspec.json.encode(self._job).decode(), stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                )  # fmt: skip
            self._members.append(process)
            assert process.stdout is not None
            if await process.stdout.readline() != b"ready\n":
                lines = self._ledger.with_suffix(".log").read_text(errors="replace").strip().splitlines()
                raise ConfigError(f"a worker did not start: {lines[-1] if lines else 'it said nothing'}")

    async def kill(self) -> None:
        """SIGKILL for one member."""
        process = self._members.pop(0)
        process.kill()
        await process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to one member."""
        self._members[0].send_signal(number)

    async def close(self) -> None:
        for process in self._members:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._members:
            try:
                await asyncio.wait_for(process.wait(), PATIENCE)
            except TimeoutError:
                process.kill()
                await process.wait()

    # ---- publishing -------------------------------------------------------------------------------------------------

    def prepare(self, at: Sequence[float]) -> Offer:
        """Make the events of an offer, which begins now."""
        first, catalog = len(self._keys), self.bench.app.catalog
        events = []
        for n in range(first, first + len(at)):
            event = self.bench.events(n)
            message = catalog.encode(event, catalog.stamp())
            names = {message.type, f"topic {message.topic}"}
            takers = {(n, group) for group, takes in enumerate(self._takes) if takes & names}
            if not takers:
                raise DefinitionError(f"none of {', '.join(self.bench.groups)} handles {message.type}")
            self._keys.append(message.key)
            self.wanted |= takers
            id = f"{self._id}-{n}" if self.keep_ids else None
            events.append(Outgoing(event, headers={EXTENSION: n}, id=id))
        return Offer(first, time.monotonic() + 0.05, at, events, [math.nan] * len(at))

    async def offer(self, offer: Offer) -> Offer:
        """Publish each event at its time; back when the broker has them all."""
        at = offer.at
        lanes = [deque[int]() for _ in range(LANES)]
        homes = [lanes[self._lane(offer.first + n)] for n in range(len(at))]
        wakes = [asyncio.Event() for _ in lanes]
        over = asyncio.Event()

        async def due() -> None:
            done = 0
            while done < len(at):
                now = time.monotonic() - offer.began
                last = bisect_right(at, now, done)
                for n in range(done, last):
                    homes[n].append(n)
                if last > done:
                    done = last
                    for wake in wakes:
                        wake.set()
                if done < len(at):
                    await asyncio.sleep(max(0.001, at[done] - (time.monotonic() - offer.began)))
                else:
                    over.set()
            for wake in wakes:
                wake.set()

        async def publish(lane: deque[int], wake: asyncio.Event) -> None:
            while lane or not over.is_set():
                if not lane:
                    wake.clear()
                    await wake.wait()
                    continue
                some = [lane.popleft() for _ in range(min(len(lane), TOGETHER))]
                await self._publish([offer.events[n] for n in some])
                now = time.monotonic()
                for n in some:
                    offer.confirmed[n] = now

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(due())
            for lane, wake in zip(lanes, wakes, strict=True):
                tasks.create_task(publish(lane, wake))
        return offer

    async def _publish(self, events: list[Outgoing]) -> None:
        """Publish, again while the broker is away: a bench of faults is not to end by one."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await self.bench.app.publish(events)
                return
            except (Unavailable, PublishUnknown):
                if not self.keep_ids or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    def _lane(self, n: int) -> int:
        key = self._keys[n]
        return n % LANES if key is None else crc32(key.encode()) % LANES

    # ---- what became of them ----------------------------------------------------------------------------------------

    def look(self) -> int:
        """Read what members wrote since; how many handlings it was."""
        seen, self._offset = read(self._ledger, self._offset)
        for one in seen:
            pair = (one.n, one.group)
            if pair in self.ends:
                self.again += 1
            else:
                self.starts[pair], self.ends[pair] = one.began, one.ended
        return len(seen)

    async def drained(self) -> None:
        """Wait until all that was published is handled or given up, or nothing has been for a while."""
        progress = looked = time.monotonic()
        while len(self.ends) + len(self.dead) < len(self.wanted) and time.monotonic() - progress < PATIENCE:
            if self.look():
                progress = time.monotonic()
                continue
            if time.monotonic() - max(progress, looked) > QUIET:
                if await self._bury():
                    progress = time.monotonic()
                looked = time.monotonic()
            await asyncio.sleep(0.02)

    async def _bury(self) -> int:
        """Read the dead letters; how many are new."""
        before = len(self.dead)
        for number, group in enumerate(self.bench.groups):
            async for _, message in self._broker.browse(dead_topic(group), "earliest", follow=False):
                n = number_of(decode_dead_letter(message.data).message)
                if n is not None and (n, number) not in self.ends:
                    self.dead.add((n, number))
        return len(self.dead) - before

    def times(self, offer: Offer) -> dict[tuple[int, int], float]:
        """How long after it was due each event of an offer had been handled, in the order in which they ended."""
        last = offer.first + len(offer.at)
        return {
            (n, group): ended - offer.began - offer.at[n - offer.first]
            for (n, group), ended in self.ends.items()
            if offer.first <= n < last
        }

    def judge(self, offer: Offer, kind: str, fault_at: float | None = None) -> Result:
        """What became of an offer."""
        self.look()
        last = offer.first + len(offer.at)
        wanted = {pair for pair in self.wanted if offer.first <= pair[0] < last}
        recovered = None
        times = self.times(offer)
        if fault_at is not None:
            recovered = _recovered(_late(offer, times), fault_at)
        dead = wanted & self.dead
        ended = sorted(self.ends[pair] - offer.began for pair in times)
        span = offer.at[-1]
        share = bisect_right(ended, span) / len(wanted)
        features = self._broker.features
        ordered = sorted(times.values())
        confirmed = sorted(
            when - offer.began - at for when, at in zip(offer.confirmed, offer.at, strict=True) if not math.isnan(when)
        )
        return Result(
            broker=features.name, url=str(BrokerUrl(self._job.url)), kind=kind, events=len(offer.at),
            rate=(len(offer.at) - 1) / span if span else 0.0, throughput=share * len(offer.at) / span if span else 0.0,
            durable=features.durable, confirm=percentiles(confirmed), latency=percentiles(ordered),
            curve=[(p, _at(ordered, p)) for p in _POINTS] if ordered else [],
            lost=len(wanted - dead - times.keys()), doubled=self.again, disordered=self._disordered(times),
            dead=len(dead), fault_at=fault_at, recovered=recovered,
            timeline=_timeline(sorted(offer.at[n - offer.first] for n, _ in wanted - dead), ended),
        )  # fmt: skip

    def _disordered(self, times: dict[tuple[int, int], float]) -> int:
        last: dict[tuple[str, int], int] = {}
        found = 0
        for n, group in times:  # in the order in which they ended
            key = self._keys[n]
            if key is None:
                continue
            if n < last.get((key, group), -1):
                found += 1
            else:
                last[key, group] = n
        return found


def _timeline(due: Sequence[float], ended: Sequence[float]) -> list[tuple[float, int, int]]:
    end = max(*due[-1:], *ended[-1:], 1e-3)
    edges = [end * (n + 1) / _BINS for n in range(_BINS)]
    return [(edge, bisect_right(due, edge), bisect_right(ended, edge)) for edge in edges]


def percentiles(ordered: Sequence[float]) -> dict[str, float]:
    """The usual ones of sorted values; none of no values."""
    names = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {name: _at(ordered, share) for name, share in names.items()} if ordered else {}


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _late(offer: Offer, times: dict[tuple[int, int], float]) -> list[tuple[float, float]]:
    """When each event was due, and how long after that it had been handled."""
    return [(offer.at[n - offer.first], late) for (n, _), late in times.items()]


def keeps_up(took: Sequence[tuple[float, float]]) -> bool:
    """Whether the backlog stays as it is, by when each event was due and how long after it had been handled.

    Where a share x of the rate is left undone, each event takes x of the time since the first one longer. So the
    medians of the first and the last third tell x long before the latency itself is large. A step of few events says
    it less exactly: about as many may come at once by chance as the root of their number.
    """
    ordered = [late for _, late in sorted(took)]
    third = len(ordered) // 3
    if not third:
        return False
    grew = median(ordered[-third:]) - median(ordered[:third])
    between = (max(took)[0] - min(took)[0]) * 2 / 3
    return grew <= max(SHORT, 0.7 / math.sqrt(len(ordered))) * between


def _recovered(took: Sequence[tuple[float, float]], fault_at: float) -> float:
    """How long after the fault the last of the events ended that it made late; by when each was due, and how late.

    In a window some are late when they are more than a tenth, and more than one: now and then an event is late without
    any fault. From the first window after the last of those on it was as before.
    """
    before = sorted(late for due, late in took if due + late < fault_at)
    usual = max(2 * _at(before, 0.99), 0.05) if before else 0.05
    windows: dict[int, list[tuple[float, float]]] = {}
    length = max(WINDOW, 10 * max(took)[0] / len(took)) if took else WINDOW
    for due, late in took:
        if due + late >= fault_at:  # those on their way when it came are of the first window
            windows.setdefault(max(0, int((due - fault_at) / length)), []).append((due, late))
    over = fault_at
    for some in windows.values():
        slow = [due + late for due, late in some if late > usual]
        if len(slow) > max(1, len(some) / 10):
            over = max(over, *slow)
    return over - fault_at


@asynccontextmanager
async def stand(bench: Bench, url: str, *, poison: bool = False) -> AsyncIterator[Stand]:
    """A broker in a namespace of its own, with the app's topics and groups on it and its publisher connected."""
    if "namespace=" in url:
        raise ConfigError(f"{BrokerUrl(url)}: a bench has a namespace of its own; leave namespace= out")
    whole = url + ("&" if "?" in url else "?") + f"namespace=bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="stentor-bench-") as folder:
        ledger = Path(folder, "ledger")
        os.close(os.open(ledger, os.O_CREAT))
        job = msgspec.structs.replace(bench.job, url=whole, ledger=str(ledger), groups=bench.groups, poison=poison)
        async with bench.app.running(url=whole, connect_only=True, new_groups=True) as program:
            if not program.broker.features.shared:
                raise ConfigError(f"{BrokerUrl(url)} lives inside one process; a bench has several")
            made = Stand(bench, job, ledger, program.broker)
            try:
                yield made
            finally:
                await made.close()
                for group in bench.groups:
                    with contextlib.suppress(BrokerError):
                        await program.broker.admin.drop_group(group)


# ---- the kinds of runs ----------------------------------------------------------------------------------------------


async def _load(found: Stand, kind: str) -> Result:
    """The load as it is, or with a fault on the way."""
    bench = found.bench
    at = bench.load.at
    fault_at = at[-1] / 3 if kind in ("kill", "slow", "restart") else None
    found.keep_ids = kind == "restart"
    offer = found.prepare(at)

    async def fault(after: float) -> None:
        await asyncio.sleep(offer.began + after - time.monotonic())
        if kind == "kill":
            await found.kill()
            await found.start()
        elif kind == "slow":
            found.signal(signal.SIGUSR1)
            await asyncio.sleep(at[-1] / 3)
            found.signal(signal.SIGUSR2)
        else:
            process = await asyncio.create_subprocess_shell(
                bench.restart, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            said, _ = await process.communicate()
            if process.returncode:
                raise ConfigError(f"--restart ended with {process.returncode}: {said.decode().strip()[-200:]}")

    async with asyncio.TaskGroup() as tasks:
        if fault_at is not None:
            tasks.create_task(fault(fault_at))
        tasks.create_task(found.offer(offer))
    await found.drained()
    return found.judge(offer, kind, fault_at)


async def _ramp(found: Stand) -> Result:
    """Double the rate until it is too much, then halve the gap between what was kept up with and what was not."""
    step = found.bench.step
    best: Result | None = None
    low, high = 0.0, math.inf
    rate = found.bench.load.rate
    while best is None or low == 0.0 or high == math.inf or high / low > FACTOR:
        result, kept = await _step(found, rate)
        if not kept:  # a stall of the machine would end the search far below what is looked for
            result, kept = await _step(found, rate)
        if kept:
            best, low = result, rate
            rate = 2 * rate if high == math.inf else math.sqrt(low * high)
        else:
            best, high = best or result, rate
            rate = rate / 2 if low == 0.0 else math.sqrt(low * high)
        if rate * step < 2:
            break
    return msgspec.structs.replace(best, largest=low, exceeded=high)


async def _step(found: Stand, rate: float) -> tuple[Result, bool]:
    """A rate of a ramp, and whether it was kept up with."""
    offer = await found.offer(found.prepare(found.bench.load.at_rate(rate, found.bench.step).at))
    await found.drained()
    result = found.judge(offer, "ramp")
    quick = result.lost == 0 and result.latency.get("p99", math.inf) <= found.bench.limit
    return result, quick and keeps_up(_late(offer, found.times(offer)))


async def _backlog(found: Stand, events: int) -> Result:
    """Publish as fast as it goes with nobody there to handle it, then work it off."""
    offer = await found.offer(found.prepare([0.0] * events))
    published = events / (max(offer.confirmed) - offer.began)
    await found.start()
    await found.drained()
    result = found.judge(offer, "backlog")
    begins, ends = found.starts.values(), found.ends.values()
    took = max(ends, default=1.0) - min(begins, default=0.0)
    done = len(found.ends) / len(found.wanted)
    return msgspec.structs.replace(
        result, published=published, throughput=done * events / took if took else 0.0, latency={}, curve=[]
    )


def member_command() -> list[str]:
    """What starts a member with the Python that runs now."""
    return [sys.executable, "-m", "stentor", "bench", "--member"]


def machine() -> str:
    """What this runs on, in one line."""
    import platform

    room = ""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        room = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{room}"
