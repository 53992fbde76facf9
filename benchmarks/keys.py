"""A hundred thousand keys: one hot key and one that fails for an hour must not slow the others down."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from benchmarks.measure import Bar, Case, Figures, Results, Row, fresh
from benchmarks.order import chunks, fields

KEYS = 100_000
COUNT = 100_000
HOT = 10
"""Every tenth event carries the hot key."""
FAILING = 1000
"""How many events carry the failing key: the first fails and waits an hour, the rest are held behind it."""


def _key(number: int, troubled: bool) -> str:
    if troubled and number % (COUNT // FAILING) == 1:
        return "failing"
    if troubled and number % HOT == 0:
        return "hot"
    return f"order-{number:06d}"


def consume(kind: str, troubled: bool, folder: Path) -> Figures:
    """Events a second, the failing key's not counted: on sqlite from the first handled, in memory from publish on."""
    from benchmarks.ours import Counter, Order, url
    from stentor import App, Group, Retry

    app = App("bench", broker="memory://" if kind == "memory" else url(fresh(folder, "keys.db")))
    events = [Order(**fields(number, key=_key(number, troubled))) for number in range(COUNT)]
    counted = COUNT - (FAILING if troubled else 0)
    failures = 0

    async def publish() -> None:
        for chunk in chunks(events, 1000):
            await app.publish(chunk)

    async def main() -> Figures:
        counter = Counter(counted)

        @app.on(Order, group=Group("bench"), retry=Retry(first="1h", longest="1h"))
        async def handle(order: Order) -> None:
            nonlocal failures
            if order.order_id == "failing":
                failures += 1
                raise RuntimeError("for an hour")
            counter.add()

        if kind != "memory":
            async with app.connected():
                await publish()
        async with app:
            start = time.perf_counter()
            if kind == "memory":
                await publish()
            await counter.done.wait()
            taken = time.perf_counter() - (start if kind == "memory" else counter.first)
        assert failures == troubled
        return {"rate": counted / taken}

    return asyncio.run(main())


def bars(results: Results) -> list[Bar]:
    return [
        Bar(
            f"{kind}: the rest, of the rate with no hot and no failing key",
            results.ratios(f"{kind}, hot and failing", f"{kind}, all alike", "rate"),
            0.9,
            at_least=True,
        )
        for kind in ("sqlite", "memory")
    ]


ROW = Row(
    name="keys",
    title=f"{KEYS:,} distinct keys, one of them hot, one failing for an hour",
    cases=[
        Case("sqlite, all alike", partial(consume, "sqlite", False), note="consume from a log of 100,000"),
        Case("sqlite, hot and failing", partial(consume, "sqlite", True), note="10% hot, 1% failing"),
        Case("memory, all alike", partial(consume, "memory", False), note="publish and consume"),
        Case("memory, hot and failing", partial(consume, "memory", True), note="10% hot, 1% failing"),
    ],
    columns={"rate": "events/s"},
    base="sqlite, all alike",
    bars=bars,
)
