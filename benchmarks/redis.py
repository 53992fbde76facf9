"""Redis Streams, a write confirmed when it is on disk: publish with many events outstanding, then consume what waits.

Every case publishes typed orders of 200 bytes to an empty database and then consumes them in one process: decode,
handler, acknowledgement. The server is started by the row itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import redis_peers as peers
from benchmarks.measure import Bar, Case, Figures, Results, Row, timed
from benchmarks.order import chunks, decode, encode, plain_orders
from benchmarks.redis_peers import GROUP, emptied, server

MANY = 60_000
OUTSTANDING = 1_000


# ---- the client alone ----------------------------------------------------------------------------------------------


async def raw(folder: Path, fsync: str) -> Figures:
    """redis-py: XADD in pipelines of 100, one after the other; XREADGROUP of 500, decode, one XACK."""
    from redis.asyncio import Redis

    async with Redis.from_url(await emptied(folder, fsync)) as client:
        await client.xgroup_create("orders", GROUP, "0", mkstream=True)
        with timed() as publishing:
            for chunk in chunks(plain_orders(MANY), 100):
                pipe = client.pipeline(transaction=False)
                for order in chunk:
                    pipe.xadd("orders", {"data": encode(order)})
                await pipe.execute()
        seen = 0
        with timed() as consuming:
            while found := await client.xreadgroup(GROUP, "one", {"orders": ">"}, count=500):
                entries = found[0][1]
                for _, entry in entries:
                    decode(entry[b"data"])
                await client.xack("orders", GROUP, *(id for id, _ in entries))
                seen += len(entries)
    assert seen == MANY
    return {"consume": MANY / consuming(), "publish": MANY / publishing()}


# ---- ours ----------------------------------------------------------------------------------------------------------


async def stentor(folder: Path, fsync: str, tasks: int = OUTSTANDING, size: int = 1) -> Figures:
    from benchmarks.ours import measured

    return await measured(await emptied(folder, fsync), MANY, tasks, size)


# ---- the row -------------------------------------------------------------------------------------------------------


def bars(results: Results) -> list[Bar]:
    over = partial(results.ratios, "Stentor")
    return [
        Bar("consume, times FastStream", over("FastStream", "consume"), 12, at_least=True),
        Bar("consume, of raw redis-py", over("raw redis-py", "consume"), 0.5, at_least=True),
        Bar("publish, times FastStream", over("FastStream", "publish"), 5, at_least=True),
        Bar("publish, of raw redis-py", over("raw redis-py", "publish"), 0.8, at_least=True),
    ]


def _run(case: Callable[[Path, str], Any], fsync: str, folder: Path) -> Figures:
    figures: Figures = asyncio.run(case(folder, fsync))
    return figures


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


def row(name: str, fsync: str) -> Row:
    """The cases with one setting of ``appendfsync``."""
    of = lambda case: partial(_run, case, fsync)  # noqa: E731
    return Row(
        name=name,
        title=f"Redis Streams, appendfsync {fsync}: consume + decode + handler + ack, and confirmed publish",
        cases=[
            Case("raw redis-py", of(raw), "redis[hiredis]", "XREADGROUP 500 + XACK; pipelines of 100"),
            Case("Stentor", of(stentor), note=f"order by key; {OUTSTANDING:,} tasks publish"),
            Case("Stentor, 100 tasks", of(partial(stentor, tasks=100)), note="the same, 100 tasks publish"),
            Case("Stentor, lists", of(partial(stentor, tasks=10, size=100)), note="10 tasks publish lists of 100"),
            Case("FastStream", of(peers.faststream), "faststream[redis]", "one by one; 100 tasks publish"),
            Case("FastStream, lists", of(peers.faststream_batch), "faststream[redis]", "lists of 100, acked as one"),
            Case("taskiq", of(peers.taskiq), "taskiq-redis", "100 at once; 100 tasks publish"),
            Case("streaq", of(peers.streaq), "streaq", "16 at once; 100 tasks publish"),
            Case("arq", of(peers.arq), "arq", "10 at once, polled every 10 ms; 100 tasks publish"),
        ],
        columns={"consume": "consumed/s", "publish": "published/s"},
        base="raw redis-py",
        bars=bars,
        prepare=_start,
    )


ROW = row("redis", "always")
