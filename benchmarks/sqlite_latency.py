"""One file: from publish to the handler in another process at a steady 500 events a second.

The floor commits a row with synchronous=FULL and wakes the other process by a Unix datagram; its reader then selects
the row and decodes it. Both of its sides are asyncio programs, as ours are. The other way that needs no server polls.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row, Side, fresh, percentile, pin
from benchmarks.order import PlainOrder, decode, fields
from benchmarks.store import insert_each, open_log, row_of

RATE = 500
COUNT = 1_200
WARM = 200
"""The first events are not counted: files, caches and connections warm up."""


async def _paced(publish: Callable[[int], Awaitable[object]]) -> None:
    start = time.perf_counter()
    for number in range(COUNT):
        await asyncio.sleep(max(0.0, start + number / RATE - time.perf_counter()))
        await publish(number)


def _figures(delays: list[int]) -> Figures:
    assert len(delays) == COUNT
    counted = [delay / 1e6 for delay in delays[WARM:]]
    return {"p50": statistics.median(counted), "p99": percentile(counted, 0.99), "worst": max(counted)}


# ---- the floor, and polling ----------------------------------------------------------------------------------------


class _Reader:
    """Selects and decodes what is new, and notes how long each event was under way."""

    def __init__(self, path: Path) -> None:
        self._db = open_log(path)
        self._last = 0
        self.delays: list[int] = []

    def read(self) -> None:
        page = "SELECT seq, body FROM event WHERE topic_id = 1 AND seq > ? LIMIT 500"
        for seq, body in self._db.execute(page, (self._last,)).fetchall():
            order = decode(body)
            self.delays.append(time.perf_counter_ns() - order.sent)
            self._last = seq


def read_when_woken(link: Connection, path: Path, address: str) -> None:
    async def main() -> None:
        reader = _Reader(path)
        done = asyncio.Event()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.bind(address)
            waker.setblocking(False)

            def woken() -> None:
                waker.recv(16)
                reader.read()
                if len(reader.delays) >= COUNT:
                    done.set()

            asyncio.get_running_loop().add_reader(waker, woken)
            link.send("ready")
            await done.wait()
        link.send(reader.delays)

    asyncio.run(main())


def read_by_polling(link: Connection, path: Path, _: str) -> None:
    reader = _Reader(path)
    link.send("ready")
    while len(reader.delays) < COUNT:
        time.sleep(0.001)
        reader.read()
    link.send(reader.delays)


def bare(read: Callable[[Connection, Path, str], None], folder: Path) -> Figures:
    path = fresh(folder, "bare.db")
    db = open_log(path)
    address = os.path.relpath(fresh(folder, "wake"))  # a socket's address must be short
    side = Side(1, read, path, address)
    pin(0)
    side.receive()
    wakes = read is read_when_woken

    async def main() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:

            async def publish(number: int) -> None:
                order = PlainOrder(**fields(number, sent=time.perf_counter_ns()))
                _commit(db, order, number)
                if wakes:
                    waker.sendto(b"!", address)

            await _paced(publish)

    asyncio.run(main())
    delays = side.receive()
    side.join()
    return _figures(delays)


def _commit(db: sqlite3.Connection, order: PlainOrder, number: int) -> None:
    db.execute("BEGIN IMMEDIATE")
    insert_each(db, [row_of(order, number)])
    db.execute("COMMIT")


# ---- Stentor -------------------------------------------------------------------------------------------------------


def handle_here(link: Connection, broker: str) -> None:
    from benchmarks.ours import Order
    from stentor import App, Group

    delays: list[int] = []
    app = App("bench", broker=broker)
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


def stentor(folder: Path) -> Figures:
    from benchmarks.ours import Order, publishing, url

    broker = url(fresh(folder, "stentor.db"))
    side = Side(1, handle_here, broker)
    pin(0)
    side.receive()

    async def main() -> None:
        async with publishing(broker) as app:

            async def publish(number: int) -> None:
                await app.publish(Order(**fields(number, sent=time.perf_counter_ns())))

            await _paced(publish)

    asyncio.run(main())
    delays = side.receive()
    side.join()
    return _figures(delays)


def bars(results: Results) -> list[Bar]:
    return [
        Bar("p50 over the wake-up floor's", results.ratios("Stentor", "datagram floor", "p50"), 1.5, at_least=False),
        Bar("p99, ms", results.values("Stentor", "p99"), 10, at_least=False),
    ]


ROW = Row(
    name="sqlite-latency",
    title=f"sqlite, publish to handler in another process at {RATE}/s, a core for each side",
    cases=[
        Case("datagram floor", partial(bare, read_when_woken), note="FULL commit, Unix datagram, select, decode"),
        Case("polling every 1 ms", partial(bare, read_by_polling), note="FULL commit, select, decode"),
        Case("Stentor", stentor),
    ],
    columns={"p50": "p50 ms", "p99": "p99 ms", "worst": "worst ms"},
    base="datagram floor",
    bars=bars,
)
