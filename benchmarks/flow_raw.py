"""What each broker's client does alone, for the latency rows: one event published, one taken and acknowledged.

For a new broker: a publisher and a consumer here, as its client's documentation shows them, and one entry in ``RAW``.
A consumer first yields nothing, once it is ready, and then the bodies as they come; what it gave is acknowledged when
it is asked for more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

Publish = Callable[[bytes], Awaitable[Any]]


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


RAW: dict[
    str,
    tuple[
        Callable[[str, str], AbstractAsyncContextManager[Publish]],
        Callable[[str, str], AsyncIterator[Sequence[bytes]]],
    ],
] = {
    "redis": (redis_publisher, redis_consumer),
    "postgresql": (postgresql_publisher, postgresql_consumer),
}
"""By the name of a broker's server: the publisher and the consumer."""
