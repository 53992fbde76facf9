"""What Kafka's transactions cost: handlers that publish one event for each that they handle, with and without them."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from benchmarks.flow import fresh
from benchmarks.kafka_peers import server
from benchmarks.measure import Case, Figures, Row
from benchmarks.order import chunks

MANY = 20_000


async def passed_on(folder: Path, transactions: int) -> Figures:
    """Events a second through a handler, from the first handled to the last output and acknowledgement."""
    from benchmarks.ours import Counter, Order, orders, publishing, settled
    from stentor import App, Event, Group

    class Copied(Event, topic="copied", key="order_id", type="bench.copied"):
        order_id: str
        note: str

    url = f"{fresh(server(folder))}&transactions={transactions}"
    lists = chunks(orders(MANY), 500)
    async with publishing(url) as app:
        began = time.perf_counter()
        for some in lists:
            await app.publish(some)
        published = MANY / (time.perf_counter() - began)
    counter = Counter(MANY)
    app = App("bench", broker=url)

    @app.on(Order, group=Group("bench"))
    async def copy(order: Order) -> Copied:
        counter.add()
        return Copied(order_id=order.order_id, note=order.note)

    async with app.running(new_groups=True):
        await counter.done.wait()
        await settled(app)
        taken = time.perf_counter() - counter.first
    return {"passed": MANY / taken, "lists": published}


def _run(transactions: int, folder: Path) -> Figures:
    return asyncio.run(passed_on(folder, transactions))


def _start(folder: Path) -> Figures:
    server(folder)
    return {}


ROW = Row(
    name="kafka-transactions",
    title="Kafka: an output for each event, one event after the other of each key",
    cases=[
        Case("outputs first", partial(_run, 0), note="stored again after a kill, under the same ids"),
        Case("transactions", partial(_run, 1), note="transactions=1"),
    ],
    columns={"passed": "events/s", "lists": "published/s, lists of 500"},
    base="outputs first",
    bars=lambda results: [],
    prepare=_start,
)
