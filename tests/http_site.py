"""A small shop served over HTTP, for the tests of HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from stentor import App, Event, Message, upcast
from stentor.message import Receipt
from stentor.serve import serve

OBJECT = {
    "specversion": "1.0", "type": "com.shop.order.placed", "source": "/till/7", "id": "e-1",
    "data": {"order_id": "o-1"},
}  # fmt: skip
BODY = json.dumps(OBJECT).encode()
HEADERS = {"ce-specversion": "1.0", "ce-type": "com.shop.order.placed", "ce-source": "/till/7", "ce-id": "e-1"}
STRUCTURED = {"content-type": "application/cloudevents+json"}
BATCH = {"content-type": "application/cloudevents-batch+json"}


def numbered(number: int) -> bytes:
    """The event in JSON under another id."""
    return json.dumps({**OBJECT, "id": f"e-{number}"}).encode()


class Placed(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0


class Paid(Event, topic="payments", key="order_id", type="com.shop.payment.taken", version=2):
    order_id: str


@upcast(Paid, from_version=1)
def renamed(old: dict[str, Any]) -> dict[str, Any]:
    return {"order_id": old["order"]}


class Site:
    """An app, the URL under which it is served, and what its handler saw."""

    url: str
    client: httpx.AsyncClient

    def __init__(self, app: App) -> None:
        self.app = app
        self.seen: list[Placed] = []
        self._more = asyncio.Condition()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(
        self, body: bytes | AsyncIterator[bytes], headers: Any, *, topic: str | None = None
    ) -> httpx.Response:
        target = "/events" if topic is None else f"/events?topic={topic}"
        return await self.client.post(target, content=body, headers=headers)

    async def saw(self, order: Placed) -> None:
        async with self._more:
            self.seen.append(order)
            self._more.notify_all()

    async def handled(self, count: int) -> list[Placed]:
        async with self._more, asyncio.timeout(60):
            await self._more.wait_for(lambda: len(self.seen) >= count)
        return self.seen

    async def stored(self, topic: str = "orders") -> list[Message]:
        return [message async for _, message in self.app.broker.browse(topic, "earliest", follow=False)]


def make(broker: str = "memory", folder: Path | None = None) -> Site:
    """A shop on ``memory`` or on ``sqlite`` in a folder."""
    app = App("shop", broker="memory://" if broker == "memory" else f"sqlite:///{folder}/shop.db")
    site = Site(app)

    @app.on(Placed)
    async def charge(order: Placed) -> None:
        await site.saw(order)

    @app.on(Paid)
    async def book(paid: Paid) -> None: ...

    @app.on(topic="anything")
    async def watch(message: Message) -> None: ...

    return site


@asynccontextmanager
async def served(site: Site, **options: Any) -> AsyncIterator[Site]:
    """Run the app and serve it on a port of its own; options as for ``App.running``."""
    async with (
        site.app.running(**options),
        serve(site.app, "127.0.0.1:0") as site.url,
        httpx.AsyncClient(base_url=site.url, timeout=30) as site.client,
    ):
        yield site


class Held:
    """Publishes that wait for their release."""

    def __init__(self) -> None:
        self._go = asyncio.Event()
        self._arrivals: asyncio.Queue[None] = asyncio.Queue()

    async def wait(self) -> None:
        self._arrivals.put_nowait(None)
        await self._go.wait()

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(60):
            for _ in range(count):
                await self._arrivals.get()

    def release(self) -> None:
        self._go.set()


@asynccontextmanager
async def stuck(site: Site) -> AsyncIterator[Held]:
    """The broker takes its time: a publish waits until it is released."""
    held = Held()
    publish = site.app.broker.publish

    async def late(messages: Sequence[Message]) -> Sequence[Receipt]:
        await held.wait()
        return await publish(messages)

    with patch.object(site.app.broker, "publish", late), patch("stentor.ingress.HELD", 30.0):
        yield held
