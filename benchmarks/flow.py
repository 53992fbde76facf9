"""How events flow through a broker on its real server: handlers that wait, latency at a steady rate, two workers.

``bench flow`` measures every broker, ``bench flow redis`` one. The server is started by the row.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import servers
from benchmarks import rocketmq_peers, sqlite_latency
from benchmarks.flow_raw import RAW
from benchmarks.measure import Bar, Case, Figures, Results, Row, Side, percentile, pin, timed
from benchmarks.order import PlainOrder, chunks, decode, encode, fields

BROKERS = ("memory", "sqlite", *RAW)
WAIT = 0.01
HANDLERS = 64
WAITING = 25_600
"""Events for the handlers that wait: four seconds at best."""
RATE = 500
COUNT = 1_700
WARM = 200
"""The first events are not counted: connections and caches warm up."""
WORK = 0.001
"""Seconds that a handler computes where workers are compared: they, not the broker, are the limit."""
BACKLOG = 12_000
WINDOW = 3.0


def server(name: str, folder: Path) -> str:
    """The URL of the row's server; the first to ask starts it, it ends with the benchmark."""
    if name not in RAW:
        return f"sqlite:///{folder.absolute()}/flow.db" if name == "sqlite" else "memory://"
    return servers.shared(name, folder / "server", os.getppid())


def fresh(url: str) -> str:
    """The same with a namespace that nobody used before."""
    return f"{url}{'&' if '?' in url else '?'}namespace=b{secrets.token_hex(4)}"


# ---- handlers that wait --------------------------------------------------------------------------------------------


def waiting(name: str, folder: Path) -> Figures:
    """64 handlers that each wait 10 ms, keys in order: events a second, and how many of them waited on average; from
    the first handled to the last.
    """
    from benchmarks.ours import Counter, Order, orders, publishing
    from stentor import App, Group

    url = fresh(server(name, folder))

    async def publish(app: App) -> None:
        for chunk in chunks(orders(WAITING), 1000):
            await app.publish(chunk)

    async def main() -> Figures:
        if name != "memory":
            async with publishing(url) as publisher:
                await publish(publisher)
        app = App("bench", broker=url)
        counter = Counter(WAITING)
        waited = 0.0

        @app.on(Order, group=Group("bench", concurrency=HANDLERS))
        async def wait(order: Order) -> None:
            nonlocal waited
            began = time.perf_counter()
            await asyncio.sleep(WAIT)
            waited += time.perf_counter() - began
            counter.add()

        async with app.running(new_groups=True):
            if name == "memory":  # it has nothing but what this app was given while it runs
                await publish(app)
            await counter.done.wait()
            taken = time.perf_counter() - counter.first
            return {"rate": WAITING / taken, "busy": waited / taken}

    return asyncio.run(main())


def loop_alone(folder: Path) -> Figures:
    """What asyncio gives: tasks that do nothing but wait, its timers being right to a millisecond."""
    turns = WAITING // HANDLERS

    async def wait() -> None:
        for _ in range(turns):
            await asyncio.sleep(WAIT)

    async def main() -> Figures:
        with timed() as taken:
            await asyncio.gather(*(wait() for _ in range(HANDLERS)))
        return {"rate": turns * HANDLERS / taken()}

    return asyncio.run(main())


# ---- latency -------------------------------------------------------------------------------------------------------


async def _paced(publish: Callable[[int], Awaitable[object]]) -> None:
    start = time.perf_counter()
    for number in range(COUNT):
        await asyncio.sleep(max(0.0, start + number / RATE - time.perf_counter()))
        await publish(number)


def _figures(delays: list[int]) -> Figures:
    counted = [delay / 1e6 for delay in delays[WARM:COUNT]]
    return {"p50": statistics.median(counted), "p99": percentile(counted, 0.99)}


def take_raw(link: Connection, name: str, url: str, place: str) -> None:
    async def main() -> None:
        delays: list[int] = []
        consuming = RAW[name][1](url, place)
        await anext(consuming)
        link.send("ready")
        async for bodies in consuming:
            delays += [time.perf_counter_ns() - decode(body).sent for body in bodies]
            if len(delays) >= COUNT:
                link.send(delays)
                return

    asyncio.run(main())


def raw(name: str, folder: Path) -> Figures:
    """The client alone: each event published and confirmed by itself, taken, decoded and acknowledged."""
    url, place = server(name, folder), f"raw{secrets.token_hex(4)}"
    if name == "rocketmq":
        url = rocketmq_peers.prepared(url, folder / "server", place)
    side = Side(1, take_raw, name, url, place)
    pin(0)
    side.receive()

    async def main() -> None:
        async with RAW[name][0](url, place) as publish:
            await _paced(lambda n: publish(encode(PlainOrder(**fields(n, sent=time.perf_counter_ns())))))

    asyncio.run(main())
    found = _figures(side.receive())
    side.join()
    return found


def take_ours(link: Connection, url: str) -> None:
    from benchmarks.ours import Order
    from stentor import App, Group

    delays: list[int] = []
    app = App("bench", broker=url)
    done = asyncio.Event()

    @app.on(Order, group=Group("bench"))
    async def note(order: Order) -> None:
        delays.append(time.perf_counter_ns() - order.sent)
        if len(delays) == COUNT:
            done.set()

    async def main() -> None:
        async with app:
            link.send("ready")
            await done.wait()
        link.send(delays)

    asyncio.run(main())


def latency(name: str, folder: Path) -> Figures:
    from benchmarks.ours import Order, publishing

    url = fresh(server(name, folder))
    side = Side(1, take_ours, url)
    pin(0)
    side.receive()

    async def main() -> None:
        async with publishing(url) as app:
            await _paced(lambda n: app.publish(Order(**fields(n, sent=time.perf_counter_ns()))))

    asyncio.run(main())
    found = _figures(side.receive())
    side.join()
    return found


# ---- workers -------------------------------------------------------------------------------------------------------


def work(link: Connection, url: str) -> None:
    """Handle events until told to end; send when each was handled."""
    from benchmarks.ours import Order
    from stentor import App, Group

    app = App("bench", broker=url)
    times: list[float] = []

    @app.on(Order, group=Group("bench"))
    async def compute(order: Order) -> None:
        end = time.thread_time() + WORK
        while time.thread_time() < end:
            pass
        times.append(time.perf_counter())
        if len(times) == 1:
            link.send("working")

    async def main() -> None:
        async with app:
            await asyncio.to_thread(link.recv)
        link.send(times)

    asyncio.run(main())


def workers(count: int, name: str, folder: Path) -> Figures:
    """Processes, a core each, that work off what waits: events a second of all together, once all of them work."""
    from benchmarks.ours import Counter, counting_app, orders

    url = fresh(server(name, folder))

    async def prepare() -> None:
        async with counting_app(url, Counter(0)).connected() as app:
            for chunk in chunks(orders(BACKLOG), 1000):
                await app.publish(chunk)

    asyncio.run(prepare())
    sides = [Side(core, work, url) for core in range(count)]
    for side in sides:
        side.receive()
    time.sleep(0.5)  # shares settle
    start = time.perf_counter()
    time.sleep(WINDOW)
    for side in sides:
        side.link.send("end")
    handled = [moment for side in sides for moment in side.receive()]
    assert len(handled) < BACKLOG, "they were done too soon"
    return {"rate": sum(start <= moment < start + WINDOW for moment in handled) / WINDOW}


# ---- the rows ------------------------------------------------------------------------------------------------------


def bars(results: Results) -> list[Bar]:
    best = HANDLERS / WAIT
    found = [
        Bar(f"of {best:,.0f}/s with {HANDLERS} handlers that wait {WAIT * 1000:g} ms",
            [rate / best for rate in results.values("handlers that wait", "rate")], 0.9, at_least=True),
    ]  # fmt: skip
    if "Stentor" in results.rounds or "Stentor" in results.missing:
        found += [
            Bar(f"p50 at {RATE}/s over the raw client's", results.ratios("Stentor", "raw client", "p50"), 1.3,
                at_least=False),
            Bar("2 workers over 1", results.ratios("2 workers", "1 worker", "rate"), 1.6, at_least=True),
        ]  # fmt: skip
    return found


def _start(name: str, folder: Path) -> Figures:
    server(name, folder)
    return {}


def row(name: str) -> Row:
    """The row of the broker whose server is called so; nothing of ``memory`` is between processes."""
    client = partial(raw, name)
    if name == "sqlite":
        client = partial(sqlite_latency.bare, sqlite_latency.read_when_woken)
    cases = [
        Case("asyncio alone", loop_alone, note=f"{HANDLERS} tasks that do nothing but wait"),
        Case("handlers that wait", partial(waiting, name), note=f"{HANDLERS} handlers, {WAIT * 1000:g} ms each"),
    ]
    if name != "memory":
        cases += [
            Case("raw client", client, note="each event confirmed, taken, acknowledged by itself"),
            Case("Stentor", partial(latency, name)),
            Case("1 worker", partial(workers, 1, name), note=f"handlers that compute for {WORK * 1000:g} ms"),
            Case("2 workers", partial(workers, 2, name), note="the same, a core each"),
        ]
    return Row(
        name=f"flow-{name}",
        title=f"{name}: handlers that wait, latency at {RATE}/s between two processes, two workers",
        cases=cases,
        columns={"rate": "events/s", "busy": "at once", "p50": "p50 ms", "p99": "p99 ms"},
        base="1 worker" if name != "memory" else "asyncio alone",
        bars=bars,
        prepare=partial(_start, name),
    )
