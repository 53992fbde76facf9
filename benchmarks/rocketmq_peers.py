"""RocketMQ's official Python client (gRPC, through the proxy), as its documentation shows it.

It is imported where it is used, because it does not have to be installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Semaphore
from typing import Any

import servers
from benchmarks.measure import Figures, timed
from benchmarks.order import decode, encode, plain_orders

SOME = 5_000
OUTSTANDING = 1_000
MOST = 32
"""Messages that one receive brings: the server gives no more."""
INVISIBLE = 60
"""Seconds until a message that was not acknowledged comes again."""
WAIT = 10
"""Seconds that a receive waits where there is nothing."""
PATIENCE = 30
"""Seconds that a request may take: with its 3 s a thousand at once fail while the server is cold."""
QUEUES = 12


def server(folder: Path) -> str:
    """The URL of the row's RocketMQ; the first to ask starts it, it ends with the benchmark."""
    return servers.shared("rocketmq", folder / "server", os.getppid())


def prepared(url: str, folder: Path, topic: str) -> str:
    """The address of the proxy of a server in ``folder``, a topic of 12 queues being made: its clients make none."""
    from stentor import App

    async def make() -> None:
        async with App("bench-prepare", broker=f"{url}?namespace=prepare").connected() as app:
            await app.broker.make_topic(topic, QUEUES)  # type: ignore[attr-defined]

    asyncio.run(make())
    settings = json.loads((folder / "conf" / "rmq-proxy.json").read_text())
    return f"127.0.0.1:{settings['grpcServerPort']}"


def _configuration(address: str) -> Any:
    from rocketmq import ClientConfiguration, Credentials

    return ClientConfiguration(address, Credentials(), request_timeout=PATIENCE)


def message(topic: str, body: bytes) -> Any:
    from rocketmq import Message

    found = Message()
    found.topic = topic
    found.body = body
    return found


@contextmanager
def producer(address: str, topic: str) -> Iterator[Any]:
    from rocketmq import Producer

    client = Producer(_configuration(address), (topic,))
    client.startup()
    try:
        yield client
    finally:
        client.shutdown()


@contextmanager
def simple_consumer(address: str, topic: str, group: str) -> Iterator[Any]:
    """A group that is new begins with what is in the memory of the server: all of it, here."""
    from rocketmq import FilterExpression, SimpleConsumer

    client = SimpleConsumer(_configuration(address), group, {topic: FilterExpression()}, await_duration=WAIT)
    client.startup()
    try:
        yield client
    finally:
        client.shutdown()


def receive(client: Any) -> list[Any]:
    """What it has; nothing where the proxy does not know its settings yet: it may not when ``startup`` returns."""
    from rocketmq.v5.exception import InternalErrorException

    try:
        found: list[Any] = client.receive(MOST, INVISIBLE)
    except InternalErrorException:
        return []
    return found


def official(folder: Path, threads: int = 1) -> Figures:
    """``send_async``, 1,000 unconfirmed; then threads receive 32, decode and ``ack`` each, one by one."""
    topic = f"orders-{secrets.token_hex(4)}"
    address = prepared(server(folder), folder / "server", topic)
    with producer(address, topic) as client:
        published = _publish(client, topic)
    with simple_consumer(address, topic, topic) as client, ThreadPoolExecutor(threads) as pool:
        return {"consume": _consume(client, pool, threads), "publish": published}


def _publish(client: Any, topic: str) -> float:
    room = Semaphore(OUTSTANDING)
    sent: list[Future[Any]] = []
    bodies = [encode(order) for order in plain_orders(SOME)]
    with timed() as taken:
        for body in bodies:
            room.acquire()
            future = client.send_async(message(topic, body))
            future.add_done_callback(lambda _: room.release())
            sent.append(future)
        for future in sent:
            future.result()
    return SOME / taken()


def _consume(client: Any, pool: ThreadPoolExecutor, threads: int) -> float:
    seen: set[str] = set()
    first: list[float] = []

    def work() -> None:
        while len(seen) < SOME:
            for found in receive(client):
                first[:] = first or [time.perf_counter()]
                decode(found.body)
                client.ack(found)
                seen.add(found.message_id)
                if len(seen) == SOME:
                    first.append(time.perf_counter())

    for done in [pool.submit(work) for _ in range(threads)]:
        done.result()
    return SOME / (first[1] - first[0])
