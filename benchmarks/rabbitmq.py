"""RabbitMQ, durable and confirmed: publish with many events outstanding, then consume what waits.

Every case publishes typed orders of 200 bytes to a queue, or to streams, of its own, and then consumes them in one
process: decode, handler, acknowledgement. The server is started by the row itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import rabbitmq_peers as peers
from benchmarks.flow import fresh
from benchmarks.measure import Bar, Case, Figures, Results, Row
from benchmarks.rabbitmq_peers import server

MANY = 40_000
OUTSTANDING = 1_000


async def stentor(folder: Path, tasks: int = OUTSTANDING, size: int = 1) -> Figures:
    from benchmarks.ours import measured

    return await measured(fresh(server(folder)), MANY, tasks, size)


def bars(results: Results) -> list[Bar]:
    over = partial(results.ratios, "Stentor")
    return [
        Bar("consume, times FastStream", over("FastStream", "consume"), 5, at_least=True),
        Bar("consume, times raw aio-pika", over("raw aio-pika", "consume"), 3, at_least=True),
        Bar("consume, of pika select", over("pika select", "consume"), 0.75, at_least=True),
        Bar("publish, times FastStream", over("FastStream", "publish"), 4, at_least=True),
        Bar("publish, of pika select", over("pika select", "publish"), 0.75, at_least=True),
    ]


def _case(run: Callable[..., Any], **options: Any) -> Callable[[Path], Figures]:
    return partial(_run, partial(run, **options))


def _run(run: Callable[[Path], Any], folder: Path) -> Figures:
    figures: Figures = asyncio.run(run(folder))
    return figures


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="rabbitmq",
    title="RabbitMQ: consume + decode + handler + ack, and confirmed publish",
    cases=[
        Case("raw aio-pika", _case(peers.aio_pika), "aio-pika", "100 ahead, ack each; 1,000 tasks publish"),
        Case("pika select", _case(peers.pika), "pika", "1,000 ahead, acks of 100; 1,000 unconfirmed at once"),
        Case("Stentor", _case(stentor), note=f"streams; order by key; {OUTSTANDING:,} tasks publish"),
        Case("Stentor, 100 tasks", _case(stentor, tasks=100), note="the same, 100 tasks publish"),
        Case("Stentor, lists", _case(stentor, tasks=10, size=100), note="the same, 10 tasks publish lists of 100"),
        Case("FastStream", _case(peers.faststream), "faststream[rabbit]", "no limit ahead; 1,000 tasks publish"),
        Case(
            "FastStream, prefetch 100", _case(peers.faststream, prefetch=100), "faststream[rabbit]", "the same, a limit"
        ),
    ],
    columns={"consume": "consumed/s", "publish": "published/s"},
    base="raw aio-pika",
    bars=bars,
    prepare=_start,
)
