"""PostgreSQL, every commit on disk: publish with many events outstanding, then consume what waits.

Every case publishes typed orders of 200 bytes to an empty database and then consumes them in one process: decode,
handler, acknowledgement. The server is started by the row itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import postgresql_peers as peers
from benchmarks.measure import Bar, Case, Figures, Results, Row, timed
from benchmarks.order import chunks, decode, encode, plain_orders
from benchmarks.postgresql_peers import emptied, server

MANY = 60_000
OUTSTANDING = 1_000


# ---- the client alone ----------------------------------------------------------------------------------------------


async def raw(folder: Path) -> Figures:
    """psycopg: 100 rows a transaction by ``executemany``; 100 taken with SKIP LOCKED, decoded and deleted as one."""
    import psycopg

    take = (
        "DELETE FROM raw WHERE n = ANY(ARRAY(SELECT n FROM raw ORDER BY n LIMIT 100 FOR UPDATE SKIP LOCKED)) "
        "RETURNING body"
    )
    async with await psycopg.AsyncConnection.connect(await emptied(folder)) as db:
        await db.execute("CREATE TABLE raw (n bigserial PRIMARY KEY, body bytea NOT NULL)")
        await db.commit()
        cursor = db.cursor(binary=True)
        with timed() as publishing:
            for chunk in chunks(plain_orders(MANY), 100):
                await cursor.executemany("INSERT INTO raw (body) VALUES (%b)", [(encode(order),) for order in chunk])
                await db.commit()
        seen = 0
        with timed() as consuming:
            while rows := await (await cursor.execute(take)).fetchall():
                for (body,) in rows:
                    decode(body)
                await db.commit()
                seen += len(rows)
    assert seen == MANY
    return {"consume": MANY / consuming(), "publish": MANY / publishing()}


# ---- ours ----------------------------------------------------------------------------------------------------------


async def stentor(folder: Path, tasks: int = OUTSTANDING, size: int = 1) -> Figures:
    from benchmarks.ours import measured

    return await measured(await emptied(folder), MANY, tasks, size)


# ---- the row -------------------------------------------------------------------------------------------------------


def bars(results: Results) -> list[Bar]:
    """Single publishes beside single ones, lists of 100 beside lists of 100, each by as many tasks; one consumer."""
    return [
        Bar(f"{column}, times {peer}", results.ratios(ours, peer, column), 3, at_least=True)
        for column, single, lists in (
            ("consume", "Stentor", "Stentor"), ("publish", "Stentor, 100 tasks", "Stentor, lists"),
        )
        for peer, ours in (
            ("procrastinate", single), ("procrastinate, lists", lists), ("pgqueuer", single), ("pgqueuer, lists", lists)
        )
    ]  # fmt: skip


def _case(run: Callable[[Path], Any]) -> Callable[[Path], Figures]:
    return partial(_run, run)


def _run(run: Callable[[Path], Any], folder: Path) -> Figures:
    figures: Figures = asyncio.run(run(folder))
    return figures


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="postgresql",
    title="PostgreSQL: consume + decode + handler + ack, and confirmed publish",
    cases=[
        Case("raw psycopg", _case(raw), "psycopg[binary]", "100 a transaction; SKIP LOCKED 100, deleted"),
        Case("Stentor", _case(stentor), note=f"order by key; {OUTSTANDING:,} tasks publish"),
        Case("Stentor, 100 tasks", _case(partial(stentor, tasks=100)), note="the same, 100 tasks publish"),
        Case("Stentor, lists", _case(partial(stentor, tasks=10, size=100)), note="10 tasks publish lists of 100"),
        Case("procrastinate", _case(partial(peers.procrastinate, lists=False)), "procrastinate", "100 at once; by one"),
        Case("procrastinate, lists", _case(partial(peers.procrastinate, lists=True)), "procrastinate", "100 a call"),
        Case("pgqueuer", _case(partial(peers.pgqueuer, lists=False)), "pgqueuer[asyncpg]", "10 a fetch; one by one"),
        Case("pgqueuer, lists", _case(partial(peers.pgqueuer, lists=True)), "pgqueuer[asyncpg]", "100 a fetch, a call"),
    ],
    columns={"consume": "consumed/s", "publish": "published/s"},
    base="raw psycopg",
    bars=bars,
    prepare=_start,
)
