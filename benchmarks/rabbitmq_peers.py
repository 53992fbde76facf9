"""Peers on RabbitMQ, each as its documentation shows: durable queues, persistent messages, confirms, manual acks.

They are imported where they are used, because none of them has to be installed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import servers
from benchmarks.measure import Figures, timed
from benchmarks.order import decode, encode, fields, plain_orders
from benchmarks.outstanding import Seen, by_tasks

MANY = 40_000
SOME = 10_000
OUTSTANDING = 1_000
"""Messages that wait for their confirmation at once."""
PREFETCH = 1_000
ACKED = 100
"""Messages that pika acknowledges together."""


def server(folder: Path) -> str:
    """The URL of the row's RabbitMQ; the first to ask starts it, it ends with the benchmark."""
    return servers.shared("rabbitmq", folder / "server", os.getppid())


@asynccontextmanager
async def queue(url: str) -> AsyncIterator[str]:
    """A durable queue of the case's own; when it is deleted, all it was given has to be acknowledged."""
    import aio_pika

    name = f"orders-{secrets.token_hex(4)}"
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(name, durable=True)
        try:
            yield name
        finally:
            left = await (await connection.channel()).queue_delete(name)
        assert not left.message_count, f"{left.message_count} were not acknowledged"


# ---- aio-pika ------------------------------------------------------------------------------------------------------


async def aio_pika(folder: Path) -> Figures:
    """A thousand tasks publish; a callback of a consumer, 100 ahead, decodes and acknowledges each."""
    from aio_pika import DeliveryMode, Message, connect_robust
    from aio_pika.abc import AbstractIncomingMessage

    url = server(folder)
    async with queue(url) as name, await connect_robust(url) as connection:
        channel = await connection.channel()
        exchange = channel.default_exchange

        async def publish(order: Any) -> None:
            await exchange.publish(Message(encode(order), delivery_mode=DeliveryMode.PERSISTENT), name)

        published = await by_tasks(publish, plain_orders(SOME), OUTSTANDING)
        seen = Seen(SOME)

        async def handle(message: AbstractIncomingMessage) -> None:
            async with message.process():
                decode(message.body)
            seen.add()

        await channel.set_qos(prefetch_count=100)
        await (await channel.get_queue(name)).consume(handle)
        await seen.all.wait()
        await channel.close()
    return {"consume": SOME / (seen.last - seen.first), "publish": published}


# ---- pika ----------------------------------------------------------------------------------------------------------


async def pika(folder: Path) -> Figures:
    """A ``SelectConnection``, in a thread: 1,000 unconfirmed at once; 1,000 ahead, an ack for each 100."""
    url = server(folder)
    async with queue(url) as name:
        published = await asyncio.to_thread(_publish, url, name)
        consumed = await asyncio.to_thread(_consume, url, name)
    return {"consume": consumed, "publish": published}


def _connected(url: str, begin: Any) -> Any:
    """A connection that calls ``begin`` with its channel; the loop is the caller's to run."""
    from pika import SelectConnection, URLParameters

    return SelectConnection(
        URLParameters(f"{url}/%2F"),
        on_open_callback=lambda connection: connection.channel(on_open_callback=begin),
        on_close_callback=lambda connection, reason: connection.ioloop.stop(),
    )


def _publish(url: str, name: str) -> float:
    from pika import BasicProperties, DeliveryMode

    orders = iter(plain_orders(MANY))
    persistent = BasicProperties(delivery_mode=DeliveryMode.Persistent)
    unconfirmed: dict[int, None] = {}
    sent = 0

    def fill(channel: Any) -> None:
        nonlocal sent
        while len(unconfirmed) < OUTSTANDING and (order := next(orders, None)):
            channel.basic_publish("", name, encode(order), persistent)
            sent += 1
            unconfirmed[sent] = None
        if not unconfirmed:
            channel.connection.close()

    def begin(channel: Any) -> None:
        def confirmed(frame: Any) -> None:
            tag = frame.method.delivery_tag
            if frame.method.multiple:
                for earlier in list(takewhile(tag.__ge__, unconfirmed)):
                    del unconfirmed[earlier]
            else:
                del unconfirmed[tag]
            fill(channel)

        channel.confirm_delivery(confirmed, lambda _: fill(channel))

    connection = _connected(url, begin)
    with timed() as taken:
        connection.ioloop.start()
    assert sent == MANY
    return MANY / taken()


def _consume(url: str, name: str) -> float:
    seen = Seen(MANY)
    taken: list[float] = []

    def begin(channel: Any) -> None:
        def handle(_: Any, method: Any, properties: Any, body: bytes) -> None:
            decode(body)
            seen.add()
            if method.delivery_tag % ACKED == 0 or not seen.left:
                channel.basic_ack(method.delivery_tag, multiple=True)
            if not seen.left:  # what is asked on this channel is answered after the ack was taken
                channel.queue_declare(name, passive=True, callback=lambda _: done(channel))

        channel.basic_qos(prefetch_count=PREFETCH, callback=lambda _: channel.basic_consume(name, handle))

    def done(channel: Any) -> None:
        taken.append(seen.elapsed())
        channel.connection.close()

    _connected(url, begin).ioloop.start()
    return MANY / taken[0]


# ---- FastStream ----------------------------------------------------------------------------------------------------


async def faststream(folder: Path, prefetch: int | None = None) -> Figures:
    """A subscriber of a durable queue; tasks publish ``persist=True``. ``prefetch``, if given, is its channel's."""
    from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

    from benchmarks.pydantic_order import PydanticOrder

    url = server(folder)
    async with queue(url) as name:
        broker = RabbitBroker(url, logger=None, default_channel=Channel(prefetch_count=prefetch))
        seen = Seen(SOME)

        @broker.subscriber(RabbitQueue(name, durable=True))
        async def handle(order: PydanticOrder) -> None:
            seen.add()

        await broker.connect()
        events = [PydanticOrder(**fields(number)) for number in range(SOME)]
        published = await by_tasks(lambda event: broker.publish(event, name, persist=True), events, OUTSTANDING)
        await broker.start()
        await seen.all.wait()
        await broker.stop()
    return {"consume": SOME / (seen.last - seen.first), "publish": published}
