"""What a gateway costs: events posted to a service, and through Envoy as `stentor gateway envoy` writes it.

The service answers 202 to whatever comes, so the ratio is the worst case: all that is measured is the way there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Bar, Case, Figures, Results, Row, Side, fresh, percentile
from servers import free_port, listens
from servers.envoy import Envoy
from stentor import App, Event
from stentor.gateway import files
from stentor.gateway.routes import make, read_settings

CLIENTS, SECONDS = 16, 4.0
BODY = b'{"order": "o-1", "amount": 12.5, "items": [1, 2]}'
ANSWER = b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n"


class Placed(Event, topic="orders", key="order", type="com.shop.order.placed"):
    order: str


class _Service(asyncio.Protocol):
    """Answers each request at its BODY: head and body may come apart."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(ANSWER * data.count(BODY))


def _serve(_: Any, port: int) -> None:
    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(_Service, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(forever())


async def _post(port: int) -> Figures:
    request = (
        "POST /events HTTP/1.1\r\nhost: bus\r\nce-specversion: 1.0\r\nce-id: 1\r\nce-source: /till\r\n"
        "ce-type: com.shop.order.placed\r\nce-partitionkey: o-1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(BODY)}\r\n\r\n"
    ).encode() + BODY
    took: list[float] = []
    end = time.perf_counter() + SECONDS

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 202"), answer
            took.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return {
        "rate": len(took) / SECONDS, "p50": percentile(took, 0.5) * 1000, "p99": percentile(took, 0.99) * 1000
    }  # fmt: skip


def _direct(_: Path) -> Figures:
    return _measure(lambda port: port)


def _measure(front: Callable[[int], int]) -> Figures:
    """The figures of a service behind ``front``, which turns its port into the one to post to."""
    port = free_port()
    Side(1, _serve, port)  # ends with this process
    while not listens(port):
        time.sleep(0.02)
    return asyncio.run(_post(front(port)))


def _envoy(folder: Path) -> Figures:
    ports = [free_port() for _ in range(3)]
    shop = App("shop")

    @shop.on(Placed)
    async def take(order: Placed) -> None: ...

    envoy = Envoy(fresh(folder, "envoy"), f"127.0.0.1:{ports[0]}")

    def start(port: int) -> int:
        toml = (
            f"admin = '127.0.0.1:{ports[0]}'\nlisten = '127.0.0.1:{ports[1]}'\ninside = '127.0.0.1:{ports[2]}'\n"
            f"dead_letter = 'shop'\n[services]\nshop = {{ at = ['127.0.0.1:{port}'], health = '' }}\n"
        )
        files.write(make([shop], read_settings(toml, "bench")), envoy.folder)
        envoy.start()
        return ports[1]

    try:
        return _measure(start)
    finally:
        envoy.kill()


def _bars(results: Results) -> list[Bar]:
    return [Bar("Envoy beside direct calls, events/s", results.ratios("envoy", "direct", "rate"), 0.25, at_least=True)]


ROW = Row(
    "gateway",
    f"posting events over {CLIENTS} connections, to a service and through the gateway",
    [
        Case("direct", _direct),
        Case("envoy", _envoy, note="two worker threads, on the same cores as client and service"),
    ],
    {"rate": "events/s", "p50": "p50 ms", "p99": "p99 ms"},
    base="direct",
    bars=_bars,
)
