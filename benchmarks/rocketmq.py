"""RocketMQ that flushes what it confirms: publish with many events outstanding, then consume what waits.

Every case publishes typed orders of 200 bytes to a topic of its own, and then consumes them in one process: decode,
handler, acknowledgement. The server is started by the row itself; the official client talks to its proxy.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from benchmarks import rocketmq_peers as peers
from benchmarks.flow import fresh
from benchmarks.measure import Bar, Case, Figures, Results, Row
from benchmarks.rocketmq_peers import server

MANY = 40_000
OUTSTANDING = 1_000
THREADS = 16


def stentor(folder: Path, tasks: int = OUTSTANDING, size: int = 1) -> Figures:
    from benchmarks.ours import measured

    return asyncio.run(measured(fresh(server(folder)), MANY, tasks, size))


def bars(results: Results) -> list[Bar]:
    return [
        Bar(f"{column}, times the official client{more}", results.ratios("Stentor", f"official client{more}", column),
            limit, at_least=True)
        for column, limit in (("consume", 3), ("publish", 2))
        for more in ("", f", {THREADS} threads")
    ]  # fmt: skip


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="rocketmq",
    title="RocketMQ, SYNC_FLUSH: consume + decode + handler + ack, and confirmed publish",
    cases=[
        Case(
            "official client", peers.official, "rocketmq-python-client",
            "simple consumer, receives of 32, ack each, no order; send_async, 1,000 unconfirmed",
        ),
        Case(
            f"official client, {THREADS} threads", partial(peers.official, threads=THREADS), "rocketmq-python-client",
            "so many threads receive and ack; the same publish",
        ),
        Case("Stentor", stentor, note=f"order by key; {OUTSTANDING:,} tasks publish"),
        Case("Stentor, 100 tasks", partial(stentor, tasks=100), note="the same, 100 tasks publish"),
        Case("Stentor, lists", partial(stentor, tasks=10, size=100), note="10 tasks publish lists of 100"),
    ],
    columns={"consume": "consumed/s", "publish": "published/s"},
    base="official client",
    bars=bars,
    prepare=_start,
)  # fmt: skip
