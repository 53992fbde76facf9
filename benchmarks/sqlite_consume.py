"""One file: consume with typed decode, handler and acknowledgement, order kept by key, beside a bare read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import queues
from benchmarks.measure import Bar, Case, Figures, Results, Row, timed
from benchmarks.order import chunks, decode, plain_orders
from benchmarks.store import insert_many, open_log, row_of

COUNT = 60_000
PAGE = 500
WAITING = f"{queues.WAITING:,} waiting:"
FEW = f"{queues.FEW:,} waiting"


def prepare(folder: Path) -> Figures:
    """A bare log, and one of Stentor's with a declared group that has everything before it."""
    from benchmarks.ours import Counter, counting_app, orders, url

    db = open_log(folder / "raw.db")
    for number, chunk in enumerate(chunks(plain_orders(COUNT), 1000)):
        db.execute("BEGIN IMMEDIATE")
        insert_many(db, [row_of(order, number * 1000 + at) for at, order in enumerate(chunk)])
        db.execute("COMMIT")
    db.close()

    async def fill() -> None:
        app = counting_app(url(folder / "stentor.db"), Counter(0))
        async with app.connected():
            for chunk in chunks(orders(COUNT), 1000):
                await app.publish(chunk)

    asyncio.run(fill())
    return {}


def raw(folder: Path) -> Figures:
    """Pages of the same columns, decoded."""
    db = open_log(folder / "raw.db")
    page = "SELECT seq, slot, id, key, type, ts, headers, body FROM event WHERE topic_id = 1 AND seq > ? LIMIT ?"
    seen = last = 0
    with timed() as taken:
        while rows := db.execute(page, (last, PAGE)).fetchall():
            for row in rows:
                decode(row[7])
            seen += len(rows)
            last = rows[-1][0]
    assert seen == COUNT
    return {"rate": COUNT / taken()}


def stentor(folder: Path) -> Figures:
    """From the first event handled to the last one acknowledged; a new group a round, from the earliest event."""
    from benchmarks.ours import Counter, counting_app, settled, url

    async def main() -> Figures:
        group = f"bench-{time.time_ns()}"
        counter = Counter(COUNT)
        app = counting_app(url(folder / "stentor.db"), counter, group)
        async with app.running(new_groups=True):
            await counter.done.wait()
            await settled(app, group)
            taken = time.perf_counter() - counter.first
        return {"rate": COUNT / taken}

    return asyncio.run(main())


def _peer(make: queues.Make, waiting: int = queues.WAITING) -> Callable[[Path], Figures]:
    return partial(queues.consume, make, waiting)


def bars(results: Results) -> list[Bar]:
    over = partial(results.ratios, "Stentor", key="rate")
    return [
        Bar("of a raw read with decode", over("raw read"), 0.12, at_least=True),
        Bar("times huey", over("huey"), 20, at_least=True),
        Bar("times litequeue", over("litequeue"), 40, at_least=True),
        Bar("times persist-queue", over("persist-queue"), 40, at_least=True),
    ]


ROW = Row(
    name="sqlite-consume",
    title="sqlite, consume + typed decode + handler + ack, order by key",
    cases=[
        Case("raw read", raw, note=f"pages of {PAGE}, decoded, nothing acknowledged"),
        Case("Stentor", stentor, note=f"{COUNT:,} waiting"),
        Case("huey", _peer(queues.huey), "huey", f"{WAITING} dequeue, execute"),
        Case("persist-queue", _peer(queues.persist_queue), "persist-queue", f"{WAITING} get, ack"),
        Case("litequeue", _peer(queues.litequeue), "litequeue", f"{WAITING} pop, done; no fsync"),
        Case("huey, few", _peer(queues.huey, queues.FEW), "huey", FEW),
        Case("persist-queue, few", _peer(queues.persist_queue, queues.FEW), "persist-queue", FEW),
        Case("litequeue, few", _peer(queues.litequeue, queues.FEW), "litequeue", FEW),
    ],
    columns={"rate": "events/s"},
    base="raw read",
    bars=bars,
    prepare=prepare,
)
