"""NATS JetStream, a publish confirmed when it is on disk: publish with many events outstanding, then consume them all.

Every case publishes typed orders of 200 bytes to an empty server and then consumes them in one process: decode,
handler, acknowledgement. The server is started by the row itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from benchmarks import nats_peers as peers
from benchmarks.measure import Bar, Case, Figures, Results, Row

MANY = 40_000
OUTSTANDING = 1_000


async def stentor(url: str, tasks: int = OUTSTANDING, size: int = 1) -> Figures:
    from benchmarks.ours import measured

    return await measured(url, MANY, tasks, size)


def bars(results: Results) -> list[Bar]:
    over = partial(results.ratios, "Stentor")
    return [
        Bar("consume, times FastStream push", over("FastStream push", "consume"), 2.5, at_least=True),
        Bar("consume, times nats-py pull", over("nats-py pull", "consume"), 1.2, at_least=True),
        Bar("publish, times FastStream", over("FastStream push", "publish"), 1.7, at_least=True),
        Bar("publish, of nats-py publish_async", over("nats-py pull", "publish"), 0.9, at_least=True),
    ]


def _run(case: Callable[[str], Awaitable[Figures]], server: str, folder: Path) -> Figures:
    async def main() -> Figures:
        return await case(await peers.emptied(server, folder))

    return asyncio.run(main())


def _start(server: str, folder: Path) -> Figures:
    peers.server(server, folder)
    return {}


def row(name: str, server: str, sync: str) -> Row:
    """The cases on a server with one setting of ``sync_interval``."""
    of = lambda case: partial(_run, case, server)  # noqa: E731
    faststream = lambda kind: of(partial(peers.faststream, kind=kind))  # noqa: E731
    return Row(
        name=name,
        title=f"NATS JetStream, sync_interval {sync}: consume + decode + handler + ack, and confirmed publish",
        cases=[
            Case("nats-py pull", of(peers.pull), "nats-py", "fetch(500), ack each; publish_async, 4,000 outstanding"),
            Case("nats-py push", of(peers.push), "nats-py", "callback, ack each; the same publish"),
            Case("Stentor", of(stentor), note=f"order by key; {OUTSTANDING:,} tasks publish"),
            Case("Stentor, 100 tasks", of(partial(stentor, tasks=100)), note="the same, 100 tasks publish"),
            Case("Stentor, lists", of(partial(stentor, tasks=10, size=100)), note="10 tasks publish lists of 100"),
            Case("FastStream push", faststream("push"), "faststream[nats]", "1,000 tasks publish"),
            Case("FastStream pull", faststream("pull"), "faststream[nats]", "requests of 500; the same publish"),
            Case("FastStream batch", faststream("batch"), "faststream[nats]", "lists of 500; the same publish"),
        ],
        columns={"consume": "consumed/s", "publish": "published/s"},
        base="nats-py pull",
        bars=bars,
        prepare=partial(_start, server),
    )


ROW = row("nats", "nats", "always")
