"""One file: durable publish by a thousand tasks, each awaiting its own event, beside SQLite itself and file queues."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import queues
from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh, timed
from benchmarks.order import chunks, plain_orders
from benchmarks.store import Insert, Writer, insert_each, insert_many, open_log, row_of

TASKS = 1_000
EACH = 40
COUNT = TASKS * EACH


def raw(insert: Insert, folder: Path) -> Figures:
    """Ready rows, a thousand a commit, no tasks."""
    db = open_log(fresh(folder, "raw.db"))
    rows = [row_of(order, number) for number, order in enumerate(plain_orders(COUNT))]
    with timed() as taken:
        for chunk in chunks(rows, 1000):
            db.execute("BEGIN IMMEDIATE")
            insert(db, chunk)
            db.execute("COMMIT")
    db.close()
    return {"rate": COUNT / taken()}


async def _all_tasks(publish: Callable[[Any], Awaitable[Any]], events: list[Any]) -> Figures:
    async def one(mine: list[Any]) -> None:
        for event in mine:
            await publish(event)

    with timed() as taken:
        async with asyncio.TaskGroup() as group:
            for number in range(TASKS):
                group.create_task(one(events[number::TASKS]))
    return {"rate": len(events) / taken()}


def bare(insert: Insert, folder: Path) -> Figures:
    """A writer thread with group commit, and nothing around it but the event's encoding."""

    async def main() -> Figures:
        db = open_log(fresh(folder, "bare.db"))
        writer = Writer(db, insert)
        numbers = iter(range(COUNT))
        figures = await _all_tasks(lambda order: writer.publish(row_of(order, next(numbers))), plain_orders(COUNT))
        writer.close()
        (stored,) = db.execute("SELECT count(*) FROM event").fetchone()
        assert stored == COUNT
        return figures

    return asyncio.run(main())


def stentor(folder: Path) -> Figures:
    from benchmarks.ours import orders, publishing, url

    async def main() -> Figures:
        async with publishing(url(fresh(folder, "stentor.db"))) as app:
            return await _all_tasks(app.publish, orders(COUNT))

    return asyncio.run(main())


def bars(results: Results) -> list[Bar]:
    return [
        Bar("of a bare writer thread", results.ratios("Stentor", "bare writer thread", "rate"), 0.8, at_least=True),
        Bar("raw executemany over Stentor", results.ratios("raw executemany", "Stentor", "rate"), 2.5, at_least=False),
    ]


ROW = Row(
    name="sqlite-publish",
    title=f"sqlite, durable publish, {TASKS:,} tasks awaiting",
    cases=[
        Case("raw executemany", partial(raw, insert_each), note="1,000 a commit, synchronous=FULL"),
        Case("raw multi-row", partial(raw, insert_many), note="the same, 100 rows a statement"),
        Case("bare writer thread", partial(bare, insert_each), note="group commit, executemany"),
        Case("bare, multi-row", partial(bare, insert_many), note="group commit, 100 rows a statement"),
        Case("Stentor", stentor),
        Case("huey", partial(queues.publish, queues.huey), "huey", "one by one"),
        Case("persist-queue", partial(queues.publish, queues.persist_queue), "persist-queue", "one by one"),
        Case("litequeue", partial(queues.publish, queues.litequeue), "litequeue", "one by one, no fsync"),
    ],
    columns={"rate": "events/s"},
    base="raw executemany",
    bars=bars,
)
