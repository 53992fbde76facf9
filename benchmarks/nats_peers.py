"""Peers on NATS JetStream, each as its documentation shows: typed orders are published, then one process consumes them.

They are imported where they are used, because none of them has to be installed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import servers
from benchmarks.measure import Figures, timed
from benchmarks.order import decode, encode, fields, plain_orders
from benchmarks.outstanding import Seen

MANY = 40_000
SOME = 10_000
OUTSTANDING = 1_000
"""Events of FastStream that wait for their confirmation at once, by so many tasks."""


def server(name: str, folder: Path) -> str:
    """The URL of the row's NATS server; the first to ask starts it, it ends with the benchmark."""
    return servers.shared(name, folder / name, os.getppid())


def address(url: str) -> str:
    """The server of a URL, without Stentor's options."""
    return f"nats://{urlsplit(url).netloc}"


async def emptied(name: str, folder: Path) -> str:
    """The URL of the row's server, with no stream on it."""
    import nats

    url = server(name, folder)
    async with await nats.connect(address(url)) as client:
        jetstream = client.jetstream()
        for stream in await jetstream.streams_info():
            await jetstream.delete_stream(str(stream.config.name))
    return url


async def acknowledged(url: str, stream: str, durable: str) -> None:
    """Return when a consumer has been given everything and waits for no acknowledgement."""
    import nats

    async with await nats.connect(address(url)) as client:
        jetstream = client.jetstream()
        while True:
            found = await jetstream.consumer_info(stream, durable)
            if not (found.num_pending or found.num_ack_pending):
                return
            await asyncio.sleep(0.005)


# ---- the client alone ----------------------------------------------------------------------------------------------


async def _filled(jetstream: Any) -> float:
    await jetstream.add_stream(name="ORDERS", subjects=["orders.*"])
    orders = plain_orders(MANY)
    with timed() as taken:
        for number, order in enumerate(orders):
            await jetstream.publish_async(f"orders.{number % 12}", encode(order))
        await jetstream.publish_async_completed()
    return MANY / taken()


async def pull(url: str) -> Figures:
    """nats-py: ``publish_async``, up to 4,000 outstanding; ``fetch(500)``, decode, an ack each."""
    import nats

    async with await nats.connect(address(url)) as client:
        jetstream = client.jetstream()
        published = await _filled(jetstream)
        subscription = await jetstream.pull_subscribe("orders.*", durable="bench")
        seen = 0
        with timed() as taken:
            while seen < MANY:
                for message in await subscription.fetch(500):
                    decode(message.data)
                    await message.ack()
                    seen += 1
            await acknowledged(url, "ORDERS", "bench")
    return {"consume": MANY / taken(), "publish": published}


async def push(url: str) -> Figures:
    """nats-py: the same publish; a callback of a push consumer, decode, an ack each."""
    import nats
    from nats.aio.msg import Msg

    async with await nats.connect(address(url)) as client:
        jetstream = client.jetstream()
        published = await _filled(jetstream)
        seen = Seen(MANY)

        async def handle(message: Msg) -> None:
            decode(message.data)
            await message.ack()
            seen.add()

        await jetstream.subscribe("orders.*", durable="bench", cb=handle, manual_ack=True)
        await seen.all.wait()
        await acknowledged(url, "ORDERS", "bench")
        taken = time.perf_counter() - seen.first
    return {"consume": MANY / taken, "publish": published}


# ---- FastStream ----------------------------------------------------------------------------------------------------


async def faststream(url: str, kind: str) -> Figures:
    """A durable subscriber of a stream: ``push``, ``pull`` (requests of 500), or ``batch`` (lists of 500)."""
    from faststream.nats import JStream, NatsBroker, PullSub

    from benchmarks.pydantic_order import PydanticOrder

    broker = NatsBroker(address(url), logger=None)
    stream = JStream("ORDERS", subjects=["orders.*"])
    seen = Seen(SOME)
    how: dict[str, Any] = {
        "push": {},
        "pull": {"pull_sub": PullSub(batch_size=500)},
        "batch": {"pull_sub": PullSub(batch_size=500, timeout=1, batch=True)},
    }[kind]

    async def one(order: PydanticOrder) -> None:
        seen.add()

    async def several(orders: list[PydanticOrder]) -> None:
        seen.add(len(orders))

    handler: Callable[..., Any] = several if kind == "batch" else one
    broker.subscriber("orders.*", stream=stream, durable="bench", deliver_policy="all", **how)(handler)
    await broker.connect()
    await broker.start()
    events = [PydanticOrder(**fields(number)) for number in range(SOME)]
    await broker.stop()  # the stream and the consumer exist now, and nobody reads yet

    publisher = NatsBroker(address(url), logger=None)
    await publisher.connect()

    async def some(mine: list[PydanticOrder], subject: str) -> None:
        for event in mine:
            await publisher.publish(event, subject, stream="ORDERS", timeout=30)

    with timed() as publishing:
        async with asyncio.TaskGroup() as group:
            for number in range(OUTSTANDING):
                group.create_task(some(events[number::OUTSTANDING], f"orders.{number % 12}"))
    await publisher.stop()
    await broker.start()
    await seen.all.wait()
    await acknowledged(url, "ORDERS", "bench")
    taken = time.perf_counter() - seen.first
    await broker.stop()
    return {"consume": SOME / taken, "publish": SOME / publishing()}
