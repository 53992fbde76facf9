"""Delivery over HTTP: events from a memory broker to a service, beside posting the same bytes by a bare client.

The service is an empty ASGI application under uvicorn, in a process of its own; 64 requests are under way at once.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import Bar, Case, Figures, Results, Row, timed
from benchmarks.order import bodies, chunks

COUNT, OF_HTTPX, BATCHED, AT_ONCE = 3_000, 300, 30_000, 64
HEADERS = {
    "ce-specversion": "1.0", "ce-id": "1", "ce-type": "bench.order", "ce-source": "/bench", "ce-partitionkey": "o-1",
    "content-type": "application/json",
}  # fmt: skip


async def service(scope: Any, receive: Any, send: Any) -> None:
    """Read a request, and take it."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 202, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


@contextmanager
def served(app: str = "benchmarks.deliver:service") -> Iterator[str]:
    """The URL of a service, in a process of its own."""
    command = [sys.executable, "-m", "uvicorn", app, "--port", "0", "--lifespan", "off"]
    command += ["--no-access-log", "--ws", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        while found is None:
            line = process.stderr.readline()
            if not line:
                raise RuntimeError("uvicorn did not start")
            found = re.search(r"http://127.0.0.1:\d+", line)
        try:
            yield f"{found[0]}/events"
        finally:
            process.terminate()


async def _posted(post: Callable[[bytes], Awaitable[None]], count: int = COUNT) -> Figures:
    waiting = iter(bodies(count))

    async def work() -> None:
        for body in waiting:
            await post(body)

    with timed() as taken:
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return {"rate": count / taken()}


def aiohttp_client(_: Path) -> Figures:
    import aiohttp

    async def main(url: str) -> Figures:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:

            async def post(body: bytes) -> None:
                async with session.post(url, data=body, headers=HEADERS) as answer:
                    assert answer.status == 202
                    await answer.read()

            return await _posted(post)

    with served() as url:
        return asyncio.run(main(url))


def httpx_client(_: Path) -> Figures:
    import httpx

    async def main(url: str) -> Figures:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=AT_ONCE), timeout=60) as client:

            async def post(body: bytes) -> None:
                assert (await client.post(url, content=body, headers=HEADERS)).status_code == 202

            return await _posted(post, OF_HTTPX)

    with served() as url:
        return asyncio.run(main(url))


def _stentor(count: int, **options: Any) -> Figures:
    from benchmarks.ours import Order, orders, settled
    from stentor import App, Group

    async def main(url: str) -> Figures:
        app = App("bench", broker="memory://")
        app.deliver(Order, to=url, group=Group("bench", concurrency=AT_ONCE), **options)
        async with app:
            events = orders(count)
            with timed() as taken:
                for chunk in chunks(events, 100):
                    await app.publish(chunk)
                await settled(app)
        return {"rate": count / taken()}

    with served() as url:
        return asyncio.run(main(url))


def stentor_single(_: Path) -> Figures:
    return _stentor(COUNT)


def stentor_signed(_: Path) -> Figures:
    return _stentor(COUNT, secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")


def stentor_batches(_: Path) -> Figures:
    from stentor import Batch

    return _stentor(BATCHED, batch=Batch(100))


def bars(results: Results) -> list[Bar]:
    return [
        Bar("of what a bare aiohttp client posts", results.ratios("Stentor", "aiohttp", "rate"), 0.6, at_least=True),
        Bar("times a bare httpx client", results.ratios("Stentor", "httpx", "rate"), 2, at_least=True),
        Bar("times as many in batches of 100", results.ratios("Stentor, batches", "Stentor", "rate"), 5, at_least=True),
    ]


ROW = Row(
    name="deliver",
    title="delivery over HTTP to an empty service, published to acknowledged",
    cases=[
        Case("aiohttp", aiohttp_client, "aiohttp", "a bare client, the same bytes"),
        Case("httpx", httpx_client, "httpx", "a bare client, the same bytes"),
        Case("Stentor", stentor_single, "aiohttp", "binary mode, order by key"),
        Case("Stentor, signed", stentor_signed, "aiohttp", "with Standard Webhooks"),
        Case("Stentor, batches", stentor_batches, "aiohttp", "100 events a request"),
    ],
    columns={"rate": "events/s"},
    base="aiohttp",
    bars=bars,
)
