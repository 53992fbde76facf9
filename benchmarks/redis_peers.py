"""Peers on Redis, each as its documentation shows, at its defaults: 100 tasks publish, then one process consumes.

They are imported where they are used, because none of them has to be installed.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import servers
from benchmarks.measure import Figures
from benchmarks.order import decode, encode, fields, plain_orders
from benchmarks.outstanding import Seen, by_tasks

SOME = 10_000
FEW = 2_000
OUTSTANDING = 100
"""Tasks that publish: each takes a connection of its own, and with more of them every peer got slower."""
GROUP = "bench"


def server(folder: Path) -> str:
    """The URL of the row's Redis; the first to ask starts it, it ends with the benchmark."""
    return servers.shared("redis", folder / "server", os.getppid())


async def emptied(folder: Path, fsync: str) -> str:
    """The URL of the row's Redis, nothing in it, with the wanted ``appendfsync``."""
    from redis.asyncio import Redis

    url = server(folder)
    async with Redis.from_url(url) as client:
        await client.flushall()
        await client.config_set("appendfsync", fsync)
    return url


async def acknowledged(url: str, stream: str, group: str) -> None:
    """Return when a group of a stream has nothing pending."""
    from redis.asyncio import Redis

    async with Redis.from_url(url) as client:
        while (await client.xpending(stream, group))["pending"]:
            await asyncio.sleep(0.002)


async def faststream(folder: Path, fsync: str) -> Figures:
    """A stream with group and consumer, all else at its default; it acknowledges each event after its handler."""
    from faststream.redis import RedisBroker, StreamSub

    from benchmarks.pydantic_order import PydanticOrder

    url = await emptied(folder, fsync)
    broker = RedisBroker(url, logger=None)
    seen = Seen(SOME)

    @broker.subscriber(stream=StreamSub("orders", group=GROUP, consumer="one", last_id="0"))
    async def handle(order: PydanticOrder) -> None:
        seen.add()

    return await _faststream(broker, url, seen)


async def faststream_batch(folder: Path, fsync: str) -> Figures:
    """The same with ``batch=True``: the handler is given a list of up to 100, acknowledged together."""
    from faststream.redis import RedisBroker, StreamSub

    from benchmarks.pydantic_order import PydanticOrder

    url = await emptied(folder, fsync)
    broker = RedisBroker(url, logger=None)
    seen = Seen(SOME)

    @broker.subscriber(
        stream=StreamSub("orders", group=GROUP, consumer="one", last_id="0", batch=True, max_records=100)
    )
    async def handle(orders: list[PydanticOrder]) -> None:
        seen.add(len(orders))

    return await _faststream(broker, url, seen)


async def _faststream(broker: Any, url: str, seen: Seen) -> Figures:
    from benchmarks.pydantic_order import PydanticOrder

    await broker.connect()
    events = [PydanticOrder(**fields(number)) for number in range(SOME)]
    published = await by_tasks(lambda event: broker.publish(event, stream="orders"), events, OUTSTANDING)
    await broker.start()
    await seen.all.wait()
    await acknowledged(url, "orders", GROUP)
    taken = time.perf_counter() - seen.first
    await broker.stop()
    return {"consume": SOME / taken, "publish": published}


async def taskiq(folder: Path, fsync: str) -> Figures:
    """Its stream broker, reading 100 at a time; 100 tasks at once, which is what its worker command runs by default."""
    from taskiq.receiver import Receiver
    from taskiq_redis import RedisStreamBroker

    from benchmarks.pydantic_order import PydanticOrder

    url = await emptied(folder, fsync)
    broker = RedisStreamBroker(url, queue_name="orders", consumer_group_name=GROUP)
    seen = Seen(SOME)

    @broker.task
    async def handle(order: PydanticOrder) -> None:
        seen.add()

    broker.is_worker_process = True
    await broker.startup()
    events = [PydanticOrder(**fields(number)) for number in range(SOME)]
    published = await by_tasks(handle.kiq, events, OUTSTANDING)
    stop = asyncio.Event()
    receiving = asyncio.create_task(Receiver(broker, max_async_tasks=100, run_startup=False).listen(stop))
    await seen.all.wait()
    await acknowledged(url, "orders", GROUP)
    taken = time.perf_counter() - seen.first
    stop.set()
    await receiving
    await broker.shutdown()
    return {"consume": SOME / taken, "publish": published}


async def streaq(folder: Path, fsync: str) -> Figures:
    """A burst worker with 16 tasks at once, its default; results are kept for 5 minutes, its default."""
    from streaq import Worker

    worker: Any = Worker(redis_url=await emptied(folder, fsync), handle_signals=False)
    seen = Seen(FEW)

    @worker.task
    async def handle(body: bytes) -> None:
        decode(body)
        seen.add()

    async with worker:
        published = await by_tasks(handle.enqueue, [encode(order) for order in plain_orders(FEW)], OUTSTANDING)
    worker.burst = True
    await worker.run_async()
    assert seen.left == 0
    return {"consume": FEW / (time.perf_counter() - seen.first), "publish": published}


async def arq(folder: Path, fsync: str) -> Figures:
    """A burst worker, 10 jobs at once, its default; polled every 10 ms, as every 500 ms, its default, makes 200/s."""
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    settings = RedisSettings.from_dsn(await emptied(folder, fsync))
    pool = await create_pool(settings)
    seen = Seen(FEW)

    async def handle(_: dict[str, Any], body: bytes) -> None:
        decode(body)
        seen.add()

    bodies = [encode(order) for order in plain_orders(FEW)]
    published = await by_tasks(lambda body: pool.enqueue_job("handle", body), bodies, OUTSTANDING)
    worker = Worker(
        functions=[func(handle, name="handle")], redis_pool=pool, poll_delay=0.01, burst=True, handle_signals=False
    )
    await worker.main()
    taken = time.perf_counter() - seen.first
    await worker.close()
    assert seen.left == 0
    return {"consume": FEW / taken, "publish": published}
