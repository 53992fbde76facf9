"""What each broker's client does alone, for the latency rows: one event published, one taken and acknowledged.

For a new broker: a publisher and a consumer here, as its client's documentation shows them, and one entry in ``RAW``.
A consumer first yields nothing, once it is ready, and then the bodies as they come; what it gave is acknowledged when
it is asked for more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

Publish = Callable[[bytes], Awaitable[Any]]


# ---- Redis ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def redis_publisher(url: str, name: str) -> AsyncIterator[Publish]:
    from redis.asyncio import Redis

    async with Redis.from_url(url) as client:
        yield lambda body: client.xadd(name, {"body": body})


async def redis_consumer(url: str, name: str) -> AsyncIterator[Sequence[bytes]]:
    from redis.asyncio import Redis

    async with Redis.from_url(url) as client:
        await client.xgroup_create(name, "bench", "0", mkstream=True)
        yield ()
        while True:
            found: Any = await client.xreadgroup("bench", "one", {name: ">"}, count=100, block=1000)
            for _, entries in found:
                yield [entry[b"body"] for _, entry in entries]
                await client.xack(name, "bench", *(id for id, _ in entries))


# ---- PostgreSQL ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def postgresql_publisher(url: str, name: str) -> AsyncIterator[Publish]:
    import psycopg

    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:

        async def publish(body: bytes) -> None:
            async with db.transaction():
                await db.execute(f"INSERT INTO {name} (body) VALUES (%s)", (body,))
                await db.execute(f"NOTIFY {name}")

        yield publish


async def postgresql_consumer(url: str, name: str) -> AsyncIterator[Sequence[bytes]]:
    import psycopg

    take = (
        f"DELETE FROM {name} WHERE n = ANY(ARRAY(SELECT n FROM {name} ORDER BY n LIMIT 100 FOR UPDATE SKIP LOCKED)) "
        "RETURNING body"
    )
    connect = psycopg.AsyncConnection.connect
    async with await connect(url, autocommit=True) as db, await connect(url, autocommit=True) as ear:
        await db.execute(f"CREATE TABLE {name} (n bigserial PRIMARY KEY, body bytea NOT NULL)")
        await ear.execute(f"LISTEN {name}")
        yield ()
        while True:
            async with db.transaction():
                rows = await (await db.execute(take, binary=True)).fetchall()
                if rows:
                    yield [body for (body,) in rows]
            if not rows:
                async for _ in ear.notifies(timeout=1, stop_after=1):
                    pass


# ---- NATS ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def nats_publisher(url: str, name: str) -> AsyncIterator[Publish]:
    import nats

    async with await nats.connect(f"nats://{urlsplit(url).netloc}") as client:
        jetstream = client.jetstream()
        yield lambda body: jetstream.publish(f"{name}.0", body)


async def nats_consumer(url: str, name: str) -> AsyncIterator[Sequence[bytes]]:
    import nats

    async with await nats.connect(f"nats://{urlsplit(url).netloc}") as client:
        jetstream = client.jetstream()
        await jetstream.add_stream(name=name, subjects=[f"{name}.*"])
        subscription = await jetstream.subscribe(f"{name}.*", durable="bench", manual_ack=True)
        yield ()
        async for message in subscription.messages:
            yield [message.data]
            await message.ack()


# ---- RabbitMQ ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def rabbitmq_publisher(url: str, name: str) -> AsyncIterator[Publish]:
    from aio_pika import DeliveryMode, Message, connect_robust

    async with await connect_robust(url) as connection:
        exchange = (await connection.channel()).default_exchange
        yield lambda body: exchange.publish(Message(body, delivery_mode=DeliveryMode.PERSISTENT), name)


async def rabbitmq_consumer(url: str, name: str) -> AsyncIterator[Sequence[bytes]]:
    from aio_pika import connect_robust

    async with await connect_robust(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        queue = await channel.declare_queue(name, durable=True)
        yield ()
        async with queue.iterator() as messages:
            async for message in messages:
                yield [message.body]
                await message.ack()


# ---- Kafka ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def kafka_publisher(url: str, name: str) -> AsyncIterator[Publish]:
    """The producer's own delay, 5 ms by default, is turned off."""
    from confluent_kafka import Producer

    loop = asyncio.get_running_loop()
    producer = Producer({"bootstrap.servers": urlsplit(url).netloc, "acks": "all", "linger.ms": 0})
    ended = False

    def poll() -> None:
        while not ended:
            producer.poll(0.1)

    def publish(body: bytes) -> asyncio.Future[None]:
        done = loop.create_future()

        def report(error: Any, message: Any) -> None:
            assert error is None
            loop.call_soon_threadsafe(done.set_result, None)

        producer.produce(name, body, on_delivery=report)
        return done

    polling = loop.run_in_executor(None, poll)
    yield publish
    ended = True
    await polling


async def kafka_consumer(url: str, name: str) -> AsyncIterator[Sequence[bytes]]:
    """Committed after each batch, without waiting for the answer; each write is flushed, as with Stentor's topics."""
    from confluent_kafka import Consumer
    from confluent_kafka.admin import AdminClient, NewTopic

    servers = {"bootstrap.servers": urlsplit(url).netloc}
    admin = AdminClient(servers)
    made = admin.create_topics([NewTopic(name, 1, 1, config={"flush.messages": "1"})])
    await asyncio.to_thread(made[name].result)
    consumer = Consumer(servers | {"group.id": name, "auto.offset.reset": "earliest", "enable.auto.commit": False})
    consumer.subscribe([name])
    while not consumer.assignment():
        await asyncio.to_thread(consumer.poll, 0.1)
    yield ()
    while True:
        # It waits until so many are there or the time is over: one at a time comes at once.
        message = await asyncio.to_thread(consumer.poll, 1.0)
        if message is not None:
            found = [message, *consumer.consume(99, 0)]
            yield [one.value() for one in found]
            consumer.commit(asynchronous=True)


# ---- RocketMQ ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def rocketmq_publisher(url: str, name: str) -> AsyncIterator[Publish]:
    from benchmarks.rocketmq_peers import message, producer

    with producer(url, name) as client:
        yield lambda body: asyncio.wrap_future(client.send_async(message(name, body)))


async def rocketmq_consumer(url: str, name: str) -> AsyncIterator[Sequence[bytes]]:
    """Its simple consumer in a thread, one receive after the other."""
    from benchmarks.rocketmq_peers import receive, simple_consumer

    with simple_consumer(url, name, name) as client:
        yield ()
        while True:
            found = await asyncio.to_thread(receive, client)
            yield [message.body for message in found]
            for message in found:
                await asyncio.to_thread(client.ack, message)


RAW: dict[
    str,
    tuple[
        Callable[[str, str], AbstractAsyncContextManager[Publish]],
        Callable[[str, str], AsyncIterator[Sequence[bytes]]],
    ],
] = {
    "redis": (redis_publisher, redis_consumer),
    "postgresql": (postgresql_publisher, postgresql_consumer),
    "nats": (nats_publisher, nats_consumer),
    "rabbitmq": (rabbitmq_publisher, rabbitmq_consumer),
    "kafka": (kafka_publisher, kafka_consumer),
    "rocketmq": (rocketmq_publisher, rocketmq_consumer),
}
"""By the name of a broker's server: the publisher and the consumer."""
