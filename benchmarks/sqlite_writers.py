"""One file, four processes that publish as fast as they can: what they reach together, and how long one waits.

The bare writers commit the same batches: with SQLite's busy handler alone (writers that find the file locked sleep and
try again), and behind a file lock that the kernel hands from one to the next.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row, Side, fresh, percentile
from benchmarks.order import chunks, plain_orders
from benchmarks.store import insert_many, open_log, row_of

BATCH = 100
SECONDS = 1.5
CHECKPOINT = 64
"""Commits between two checkpoints of a bare writer behind the lock, which has them off by default."""


async def _publish_for(seconds: float, publish: Callable[[int], Awaitable[None]]) -> tuple[int, list[float]]:
    """How many batches were published until the time was over, and how long each took."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        await publish(len(taken))
        taken.append(time.perf_counter() - start)
    return len(taken), taken


def write_bare(link: Connection, path: Path, locked: bool) -> None:
    db = open_log(path)
    if locked:
        db.execute("PRAGMA wal_autocheckpoint = 0")
    batches = chunks(plain_orders(BATCH * 10), BATCH)
    lock = path.with_suffix(".lock").open("w")

    async def publish(number: int) -> None:
        rows = [row_of(order, at) for at, order in enumerate(batches[number % 10])]
        if locked:
            fcntl.flock(lock, fcntl.LOCK_EX)
        db.execute("BEGIN IMMEDIATE")
        insert_many(db, rows)
        db.execute("COMMIT")
        if locked:
            if number % CHECKPOINT == CHECKPOINT - 1:
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            fcntl.flock(lock, fcntl.LOCK_UN)

    link.send("ready")
    link.recv()
    link.send(asyncio.run(_publish_for(SECONDS, publish)))


def write_stentor(link: Connection, broker: str) -> None:
    from benchmarks.ours import orders, publishing

    async def main() -> None:
        batches = chunks(orders(BATCH * 10), BATCH)
        async with publishing(broker) as app:

            async def publish(number: int) -> None:
                await app.publish(batches[number % 10])

            await publish(0)
            link.send("ready")
            link.recv()
            link.send(await _publish_for(SECONDS, publish))

    asyncio.run(main())


def _together(sides: list[Side]) -> Figures:
    for side in sides:
        side.receive()
    for side in sides:
        side.link.send("go")
    found = [side.receive() for side in sides]
    for side in sides:
        side.join()
    taken = [seconds for _, each in found for seconds in each]
    return {
        "rate": sum(count for count, _ in found) * BATCH / SECONDS,
        "p99": percentile(taken, 0.99) * 1e3,
        "worst": max(taken) * 1e3,
    }


def bare(processes: int, locked: bool, folder: Path) -> Figures:
    path = fresh(folder, "bare.db")
    open_log(path).close()
    return _together([Side(core, write_bare, path, locked) for core in range(processes)])


def stentor(processes: int, folder: Path) -> Figures:
    from benchmarks.ours import publishing, url

    broker = url(fresh(folder, "stentor.db"))

    async def declare() -> None:
        async with publishing(broker):
            pass

    asyncio.run(declare())
    return _together([Side(core, write_stentor, broker) for core in range(processes)])


def bars(results: Results) -> list[Bar]:
    waits = results.values("Stentor, 4 processes", "worst")
    worst = [max(waits)] if waits else []
    return [
        Bar("longest wait of a writer in any round, ms", worst, 500, at_least=False),
        Bar("of one process", results.ratios("Stentor, 4 processes", "Stentor, 1 process", "rate"), 0.8, at_least=True),
    ]


ROW = Row(
    name="sqlite-writers",
    title=f"sqlite, 4 processes publishing lists of {BATCH} to one file",
    cases=[
        Case("Stentor, 1 process", partial(stentor, 1)),
        Case("Stentor, 4 processes", partial(stentor, 4)),
        Case("busy handler, 1 process", partial(bare, 1, False), note="bare SQLite, synchronous=FULL"),
        Case("busy handler, 4 processes", partial(bare, 4, False)),
        Case("file lock, 4 processes", partial(bare, 4, True), note="flock around each transaction and checkpoint"),
    ],
    columns={"rate": "events/s in all", "p99": "p99 of a publish, ms", "worst": "longest, ms"},
    base="Stentor, 1 process",
    bars=bars,
)
