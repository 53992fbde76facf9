"""Kafka, one node that flushes what it confirms: publish with many events outstanding, then consume what waits.

Every case publishes typed orders of 200 bytes to a topic of its own, and then consumes them in one process: decode,
handler, acknowledgement. The server is started by the row itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import kafka_peers as peers
from benchmarks.flow import fresh
from benchmarks.kafka_peers import server
from benchmarks.measure import Bar, Case, Figures, Results, Row

MANY = 60_000
OUTSTANDING = 1_000


async def stentor(folder: Path, tasks: int = OUTSTANDING, size: int = 1) -> Figures:
    from benchmarks.ours import measured

    return await measured(fresh(server(folder)), MANY, tasks, size)


def bars(results: Results) -> list[Bar]:
    over = partial(results.ratios, "Stentor")
    return [
        Bar("consume, times FastStream confluent", over("FastStream confluent", "consume"), 5, at_least=True),
        Bar("consume, times FastStream aiokafka", over("FastStream aiokafka", "consume"), 5, at_least=True),
        Bar("consume, of raw confluent-kafka", over("raw confluent-kafka", "consume"), 0.5, at_least=True),
        Bar("publish, times FastStream confluent", over("FastStream confluent", "publish"), 5, at_least=True),
        Bar("publish, times FastStream aiokafka", over("FastStream aiokafka", "publish"), 5, at_least=True),
        Bar("publish, of raw confluent-kafka", over("raw confluent-kafka", "publish"), 0.8, at_least=True),
    ]


def _case(run: Callable[[Path], Any]) -> Callable[[Path], Figures]:
    return partial(_run, run)


def _run(run: Callable[[Path], Any], folder: Path) -> Figures:
    figures: Figures = asyncio.run(run(folder))
    return figures


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="kafka",
    title="Kafka, acks=all: consume + decode + handler + ack, and confirmed publish",
    cases=[
        Case("raw confluent-kafka", peers.confluent, "confluent-kafka", "500 a call, committed; 1,000 unconfirmed"),
        Case("Stentor", _case(stentor), note=f"order by key; {OUTSTANDING:,} tasks publish"),
        Case("Stentor, 100 tasks", _case(partial(stentor, tasks=100)), note="the same, 100 tasks publish"),
        Case("Stentor, lists", _case(partial(stentor, tasks=10, size=100)), note="10 tasks publish lists of 100"),
        Case(
            "FastStream confluent", _case(peers.faststream_confluent), "faststream[confluent]",
            "commits each 5 s; 1,000 tasks publish",
        ),
        Case(
            "FastStream aiokafka", _case(peers.faststream_aiokafka), "faststream[kafka]",
            "commits each 5 s; 1,000 tasks publish",
        ),
    ],
    columns={"consume": "consumed/s", "publish": "published/s"},
    base="raw confluent-kafka",
    bars=bars,
    prepare=_start,
)  # fmt: skip
