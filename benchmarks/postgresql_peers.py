"""Peers on PostgreSQL, each as its documentation shows: tasks publish, then one process consumes what waits.

They are imported where they are used, because none of them has to be installed. The server is at its defaults for
durability: every commit waits for the disk.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import servers
from benchmarks.measure import Figures
from benchmarks.order import chunks, decode, encode, fields, plain_orders
from benchmarks.outstanding import by_tasks

SOME = 5_000
OUTSTANDING = 100
"""Tasks that publish: with a thousand no peer was faster."""


def server(folder: Path) -> str:
    """The URL of the row's PostgreSQL; the first to ask starts it, it ends with the benchmark."""
    return servers.shared("postgresql", folder / "server", os.getppid())


async def emptied(folder: Path) -> str:
    """The URL of the row's database, nothing in it and nothing left to vacuum."""
    import psycopg

    url = server(folder)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:
        found = await db.execute("SELECT nspname FROM pg_namespace WHERE nspowner = current_user::regrole")
        for (schema,) in await found.fetchall():
            await db.execute(f'DROP SCHEMA "{schema}" CASCADE'.encode())
        await db.execute("DROP OWNED BY current_user CASCADE")
        await db.execute("CREATE SCHEMA IF NOT EXISTS public")
    return url


class Seen:
    """What a peer's handler has seen: starts the watch at the first event."""

    def __init__(self) -> None:
        self.count = 0
        self.first = 0.0

    def add(self) -> None:
        if not self.first:
            self.first = time.perf_counter()
        self.count += 1

    def figures(self, published: float) -> Figures:
        """To be asked when all is acknowledged."""
        taken = time.perf_counter() - self.first
        assert self.count == SOME
        return {"consume": SOME / taken, "publish": published}


async def procrastinate(folder: Path, *, lists: bool) -> Figures:
    """Tasks deferred one by one by ``defer_async``, or 100 a call; a worker runs 100 at once until none is left."""
    import msgspec
    from procrastinate import App, PsycopgConnector

    from benchmarks.order import PlainOrder

    app = App(connector=PsycopgConnector(conninfo=await emptied(folder)))
    seen = Seen()

    @app.task(queue="orders")
    async def handle(order: dict[str, Any]) -> None:
        msgspec.convert(order, PlainOrder)
        seen.add()

    orders: Any = [{"order": fields(number)} for number in range(SOME)]
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        if lists:
            published = 100 * await by_tasks(lambda part: handle.batch_defer_async(*part), chunks(orders, 100), 10)
        else:
            published = await by_tasks(lambda order: handle.defer_async(**order), orders, OUTSTANDING)
        await app.run_worker_async(queues=["orders"], concurrency=100, wait=False)
        return seen.figures(published)


async def pgqueuer(folder: Path, *, lists: bool) -> Figures:
    """Jobs enqueued one by one, or 100 a call, on asyncpg; a worker drains the queue, 10 or 100 at a time."""
    import asyncpg
    from pgqueuer import PgQueuer
    from pgqueuer.db import AsyncpgDriver
    from pgqueuer.models import Job
    from pgqueuer.types import QueueExecutionMode

    size = 100 if lists else 10
    worker = PgQueuer(AsyncpgDriver(await asyncpg.connect(await emptied(folder))))
    queries: Any = worker.qm.queries
    await queries.install()
    seen = Seen()

    @worker.entrypoint("orders")
    async def handle(job: Job) -> None:
        decode(job.payload or b"")
        seen.add()

    bodies = [encode(order) for order in plain_orders(SOME)]
    if lists:
        published = 100 * await by_tasks(
            lambda part: queries.enqueue(["orders"] * len(part), part, [0] * len(part)), chunks(bodies, 100), 10
        )
    else:
        published = await by_tasks(partial(queries.enqueue, "orders"), bodies, OUTSTANDING)
    await worker.qm.run(batch_size=size, mode=QueueExecutionMode.drain)
    return seen.figures(published)
